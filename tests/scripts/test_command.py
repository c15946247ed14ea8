"""The command line: accepted input, and one line with status 2 for everything else."""

import json
import os
import platform
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from steppe.configs import base
from steppe.configs.keys import ConfigError
from steppe.configs.read import read_config, reader
from steppe.lm.parts.check import check
from steppe.optim import methods
from steppe.optim.methods import METHODS
from steppe.scripts import cli, command, train
from steppe.scripts import config as config_command
from steppe.scripts.model import evaluate

CONFIG = "--config=base"
HEAD = ["from steppe.configs import base", "def get_config():", "    config = base.get_config()"]
_EXTRA = "from steppe.configs import base\ndef get_config():\n  c = base.get_config()\n  "


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def _parser():
    parser = command.parser("demo", "A demonstration.")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--steps", type=int)
    return parser


def _parse(*argv, **keywords):
    return command.parse([*argv, "--workdir=run"], _parser(), **keywords)


def _written(tmp_path, text):
    file = tmp_path / "mine.py"
    file.write_text(text)
    return f"--config={file}"


def test_overrides_take_the_type_of_their_key():
    config, options = _parse(
        CONFIG, "--config.optim.rho=1e-2", "--config.train.batch_size", "32", "--config.model.qk_norm",
        "--noconfig.model.tie_embeddings", "--config.data.directory=",
        "--config.optim.perturb=a.*", "--config.optim.perturb=b", "--config.optim.decay_mask=('x',)",
        "--config.optim.end_learning_rate=1",
    )  # fmt: skip
    assert (config.optim.rho, config.train.batch_size, config.model.qk_norm) == (0.01, 32, True)
    assert (config.model.tie_embeddings, config.data.directory) == (False, "")
    assert (config.optim.perturb, config.optim.decay_mask) == (("a.*", "b"), ("x",))
    assert type(config.optim.end_learning_rate) is float
    assert options.workdir == "run"
    untouched = base.get_config()
    assert config.optim.b2 == untouched.optim.b2
    assert config.is_locked


@pytest.mark.parametrize("text", ["ema,lawa", "('ema', 'lawa')", "['ema','lawa']", "ema, lawa"])
def test_a_list_is_written_with_commas_or_as_python_has_it(text):
    config, _ = command.parse(["--config=quickstart", f"--config.average.weights={text}"], command.parser("train", ""))
    assert config.average.weights == ("ema", "lawa")


def test_negative_numbers_and_last_config_position():
    config, _ = command.parse(
        ["--config.optim.rho", "-0.5", "--workdir", "w", "--config", "configs/base.py"], _parser()
    )
    assert config.optim.rho == -0.5  # impossible, but that is lm.check's to say


def test_none_restores_the_default_of_an_optional_key(tmp_path):
    mine = _written(tmp_path, f"{_EXTRA}c.optim.rho = 0.5\n  return c\n")
    assert _parse(mine)[0].optim.rho == 0.5
    assert _parse(mine, "--config.optim.rho=None")[0].optim.rho is None


def test_the_named_size_is_resolved():
    config, _ = _parse(CONFIG, "--config.model.size=42m", "--config.model.layers=6")
    assert (config.model.layers, config.model.width, config.model.heads, config.model.mlp_width) == (6, 768, 12, 3072)


def test_a_ready_config_a_module_and_a_file_are_one_config(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text("from steppe.configs.quickstart import get_config\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "inside.py").write_text("from steppe.configs.quickstart import get_config\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    whole = read_config("quickstart")
    for text in ("steppe.configs.quickstart", "package.inside", str(tmp_path / "theirs.py")):
        assert read_config(text).to_dict() == whole.to_dict()
    assert read_config("paper:24m,sam,fixed").optim.method == "sam"


def test_the_config_that_results_is_printed_and_nothing_else_happens(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--config=quickstart", "--config.optim.rho=0.5", f"--workdir={tmp_path}/run", "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    again = read_config(_written(tmp_path, printed).removeprefix("--config="))
    assert again.to_dict() == read_config("quickstart", [("optim.rho", "0.5")]).to_dict()


def test_a_config_that_cannot_run_is_not_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--config=quickstart", "--config.optim.method=adamw", "--config.optim.rho=0.1", "--print_config"])
    assert stop.value.code == 2
    printed, said = capsys.readouterr()
    assert (printed, said.count("\n")) == ("", 1)
    assert said.startswith("config.optim.rho = 0.1: must be None: rho is not an option of adamw")


def test_a_config_for_other_devices_is_printed(capsys):
    many = ["--config.mesh.fsdp=64", "--config.train.batch_size=64", "--config.mesh.data=-1"]
    with pytest.raises(SystemExit) as stop:
        train.main(["--config=quickstart", *many, "--print_config"])
    assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        train.main(["--config=quickstart", *many[:1], "--print_config"])
    assert stop.value.code == 2
    assert "config.train.batch_size = 8" in capsys.readouterr().err


@pytest.fixture(scope="module")
def every_option(tmp_path_factory):
    """A config file that sets every option of every method, and a reader of it."""
    values = {option: default for name in METHODS for option, default in methods.options_of(name, {}).items()}
    lines = ["    config.optim.method = 'sam'"]
    lines += [f"    config.optim.{option} = {value!r}" for option, value in values.items()]
    path = tmp_path_factory.mktemp("configs") / "every.py"
    path.write_text("\n".join([*HEAD, *lines, "    return config"]))
    assert set(values) == set(methods.OPTIONS)
    return values, path, reader(str(path))


@pytest.mark.parametrize("method", [*METHODS, *methods.ALIASES])
def test_options_of_the_file_give_way_to_a_method_of_the_command_line(method, every_option, capsys):
    values, path, read = every_option
    own = set(methods.options_of(method, {}))
    config = read([("optim.method", method)])
    check(config, device_count=1)
    assert {option for option in values if config.optim[option] is not None} == own
    assert all(config.optim[option] == values[option] for option in own)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith(f" in {path}: config.optim.method = {method} {methods.takes(method)}")
    gone = [option for option in values if option not in own]
    assert all(f"config.optim.{option} = {values[option]!r}" in said for option in gone)

    for option in gone:  # on the command line itself it is refused
        given = [("optim.method", method), (f"optim.{option}", str(values[option]))]
        with pytest.raises(ConfigError) as refused:
            check(read(given), device_count=1)
        assert (refused.value.key, refused.value.value) == (f"optim.{option}", values[option])


def test_nothing_gives_way_to_the_file_s_own_method(every_option, capsys):
    values, _, read = every_option
    config = read([("optim.rho", "0.1")])
    assert all(config.optim[option] is not None for option in values)
    with pytest.raises(ConfigError):
        check(config, device_count=1)
    assert capsys.readouterr().err == ""


def test_a_rho_of_0_is_of_every_method(tmp_path, capsys):
    (tmp_path / "none.py").write_text("\n".join([*HEAD, "    config.optim.rho = 0.0", "    return config"]))
    assert read_config(str(tmp_path / "none.py"), [("optim.method", "adamw")]).optim.rho == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["train", "prepare_data", "plan", "sweep", "config"])
def test_every_command_that_takes_a_config_prints_it_whatever_else_it_needs(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--config=quickstart", "--config.model.size=0.1m", "--print_config"])
    assert stop.value.code == 0
    assert "    config.model.size = '0.1m'\n" in capsys.readouterr().out


def test_a_command_without_a_config_refuses_one(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--workdir=x", "--config.seed=3"])
    assert stop.value.code == 2
    assert "steppe evaluate takes none" in capsys.readouterr().err


def test_config_shows_every_key_and_what_differs(tmp_path, capsys):
    assert config_command.main(["quickstart"]) == 0
    shown = capsys.readouterr().out
    for name, key in base.keys().items():
        assert f"\n{name} = " in shown
        assert key.meaning.split()[0] in shown
    assert "optim.rho = 0.02   (base: None)" in shown
    assert config_command.main(["diff", "quickstart", "quickstart"]) == 0
    assert config_command.main(["diff", "quickstart", "base"]) == 1
    assert "optim.rho: 0.02 -> None" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"seed": 7}))  # a run of a version with one key
    assert config_command.main(["diff", str(tmp_path), "base"]) == 1
    assert capsys.readouterr().out == "seed: 7 -> 0\n"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("steppe tr", ["train"]),
        ("steppe help tr", ["train"]),
        ("steppe bench st", ["step"]),
        ("steppe bench step --siz", ["--sizes"]),
        ("steppe config pap", ["paper"]),
        ("steppe config diff qui", ["quickstart"]),
        ("steppe sweep --sweep=rho", ["rho_by_scale"]),
        ("steppe train --print", ["--print_config"]),
        ("steppe train --config=qu", ["quickstart"]),
        ("steppe train --config.optim.layer", ["--config.optim.layerwise_rho"]),
        ("steppe train --config.model.remat=of", ["offload"]),
        ("steppe evaluate --work", ["--workdir"]),
    ],
)
def test_a_shell_completes_commands_options_keys_and_values(line, offered, tmp_path):
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    environment = {**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "_ARGCOMPLETE_IFS": "\n"}
    subprocess.run([sys.executable, "-P", "-m", "steppe.scripts.cli"], env=environment, capture_output=True)
    assert [word.strip().rpartition("=")[2] for word in answer.read_text().split("\n")] == offered


@pytest.mark.parametrize("words", [["-m", "steppe.scripts.trian"], ["-msteppe.scripts.trian"]])
def test_a_mistyped_module_gets_the_line_of_a_mistyped_command(words):
    done = subprocess.run([sys.executable, "-P", *words, "--workdir=x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "steppe trian: no such command" in done.stderr
    assert "did you mean train?" in done.stderr


@pytest.mark.parametrize(("name", "code"), [("config", 0), ("judge.check", 2), ("bench.step", 2)])
def test_a_module_is_a_command_or_is_refused_never_silent(name, code):
    done = subprocess.run(
        [sys.executable, "-P", "-m", f"steppe.scripts.{name}", "--help"], capture_output=True, text=True
    )
    assert done.returncode == code
    assert (f"usage: steppe {name}" if code == 0 else f"steppe {name}: no such command") in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([CONFIG, "--config.optim.rhoo=1"], ["config.optim.rhoo", "did you mean config.optim.rho?"]),
        ([CONFIG, "--config.optm.rho=1"], ["config.optm.rho", "did you mean config.optim.rho?"]),
        ([CONFIG, "--config.batch_size=1"], ["config.batch_size", "did you mean config.train.batch_size?"]),
        ([CONFIG, "--config.zzz.qqq=1"], ["config.zzz.qqq", "`steppe config` lists every key"]),
        ([CONFIG, "--config.optim.rho=big"], ["config.optim.rho = big", "must be a finite number >= 0, or None"]),
        ([CONFIG, "--config.optim.rho="], ["config.optim.rho = nothing", "must be a finite number"]),
        ([CONFIG, "--config.train.batch_size=8.5"], ["config.train.batch_size = 8.5", "must be an integer"]),
        ([CONFIG, "--config.train.batch_size=None"], ["config.train.batch_size = None", "must be an integer"]),
        ([CONFIG, "--config.train.batch_size"], ["config.train.batch_size = nothing", "must be an integer"]),
        ([CONFIG, "--config.model.qk_norm=maybe"], ["config.model.qk_norm = maybe", "must be true or false"]),
        ([CONFIG, "--config.optim.perturb=(1, 2)"], ["config.optim.perturb = (1, 2)", "must be a tuple of texts"]),
        ([CONFIG, "--config.optim.perturb=a b,"], ["config.optim.perturb = a b,", "must be a tuple of texts"]),
        ([CONFIG, "--config.seed=1", "--config.seed=2"], ["config.seed = 1, 2", "must be given once"]),
        ([CONFIG, "--config.optim={}"], ["config.optim is a section", "--config.optim."]),
        ([CONFIG, "--config.model.size=25m"], ["config.model.size = '25m'", "24m, 42m"]),
        ([CONFIG, "--config.model.size=24m", "--config.model.width=64"], ["config.model.width = 64", "24m", "576"]),
        ([CONFIG, "--config.model.size=24M"], ["config.model.size = '24M'", "did you mean 24m?"]),
        ([CONFIG, "--config.optim.Peak-Learning-Rate=1"], ["did you mean config.optim.peak_learning_rate?"]),
        (["--config=QuickStart"], ["did you mean --config=quickstart?"]),
        ([], ["--config is missing", "--config=quickstart"]),
        (["--config"], ["--config", "must be followed by a config"]),
        ([CONFIG, CONFIG], ["--config", "given once"]),
        (["--config=quickstrt"], ["--config = quickstrt", "did you mean --config=quickstart?"]),
        (["--config=elsewhere/quickstart.py"], ["elsewhere/quickstart.py", "did you mean --config=quickstart?"]),
        (
            ["--config=configs/nope.py"],
            [
                "--config = configs/nope.py",
                "must be one of base, english, paper, quickstart, study, watts, a module or a file",
            ],
        ),
        (["--config=configs"], ["--config = configs", "a module or a file"]),
        (["--config=base:24m"], ["base:24m", "takes no argument"]),
        (["--config=lm/__init__.py"], ["--config = lm/__init__.py", "get_config()"]),
        (["--config=README.md"], ["--config = README.md", ""]),
        ([CONFIG, "--step=3"], ["--step", "did you mean --steps?"]),
        ([CONFIG, "--steps=three"], ["--steps", "'three'"]),
        ([CONFIG, "stray"], ["stray", "must be left out"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv, parts, capsys):
    with pytest.raises(SystemExit) as stop:
        _parse(*argv)
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.endswith("\n")
    assert printed.err.count("\n") == 1
    for part in parts:
        assert part in printed.err


def test_a_missing_option_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        command.parse([CONFIG], _parser())
    assert stop.value.code == 2
    assert capsys.readouterr().err == "--workdir is missing; --help shows the usage\n"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("def get_config(:\n", ["line 1"]),
        ("import os\nundefined\n", ["line 2", "NameError"]),
        ("def get_config():\n  return 3\n", ["ConfigDict", "int"]),
        ("def get_config(argument):\n  return 3\n", [":ARGUMENT"]),
        (_EXTRA + "c.optim.roh = 1.0\n  return c\n", ["config.optim.roh", "did you mean config.optim.rho?"]),
        (_EXTRA + "del c.optim.rho\n  return c\n", ["config.optim.rho is missing", "configs/base.py"]),
        (
            "from ml_collections import ConfigDict\n"
            + _EXTRA
            + "c = dict(c.to_dict(), seed='x')\n  return ConfigDict(c)\n",
            ["config.seed = 'x'", "an integer"],
        ),
        (_EXTRA + "raise ValueError('the argument must be a or b')\n", ["line 4: the argument must be a or b"]),
    ],
)
def test_a_bad_config_file_is_one_line(tmp_path, text, parts, capsys):
    with pytest.raises(SystemExit) as stop:
        _parse(_written(tmp_path, text))
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.count("\n") == 1
    for part in [str(tmp_path / "mine.py"), *parts]:
        assert part in printed


def test_a_config_written_from_scratch_gets_the_types_of_base(tmp_path):
    values = base.get_config().to_dict()
    values["optim"]["clip_norm"] = 2
    text = f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({values!r})\n"
    config, _ = _parse(_written(tmp_path, text))
    assert isinstance(config, ConfigDict)
    assert type(config.optim.clip_norm) is float
    assert config.to_dict() == values


def test_parsing_imports_nothing_heavy():
    code = (
        "import sys; from steppe.scripts import command\n"
        "command.parse(['--config=base', '--config.seed=3'], command.parser('demo', 'demo'))\n"
        "print([m for m in ('tensorflow', 'grain', 'orbax', 'flax', 'wandb', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")
def test_a_process_that_computes_keeps_the_memory_of_a_step_for_the_next():
    """Pages that an execution with 64 MiB of temporaries faults in, once malloc has grown to what they take.

    The median of nine: malloc grows once more where a thread gives back one execution's memory after the next began.
    """
    script = (
        "import resource, sys\n"
        "from steppe.scripts import process\n"
        "process.keep_memory()\n"
        "import jax, jax.numpy as jnp\n"
        "f = jax.jit(lambda x: (jnp.sin(x) @ jnp.ones((x.shape[1], 8))).sum())\n"
        "x = jnp.ones((1024, 16384))\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(16): f(x).block_until_ready()\n"
        "seen = [faults()]\n"
        "for _ in range(9): f(x).block_until_ready(); seen.append(faults())\n"
        "print(sorted(b - a for a, b in zip(seen, seen[1:]))[4])\n"
    )
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    for environment, few in (({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)):  # whoever sets malloc is left alone
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**plain, **environment}
        )
        assert int(done.stdout) < 164 if few else int(done.stdout) >= 16384, done.stdout  # of 16,384 pages: one in 100


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_options_of_a_method_and_a_base_from_a_file(flag, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "from typing import Annotated\n"
        "from steppe.optim.options import SHARE, Option\n"
        "def way(mix: Annotated[float, Option('share of the sign', *SHARE)] = 0.5): ...\n"
        "def other(learning_rate, slow: Annotated[float, Option('slowness', *SHARE)] = 0.25): ...\n"
    )
    line = ["--config=base", f"--config.optim.method={file}:way", f"--config.optim.base={file}:other", flag]
    with pytest.raises(SystemExit) as done:
        train.main(line)
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "--config.optim.mix=0.5        share of the sign: a number >= 0 and < 1" in printed
    assert "--config.optim.slow=0.25      slowness" in printed
    with pytest.raises(SystemExit) as done:
        train.main([f"--config.optim.method={file}:wya", flag])
    assert done.value.code == 2
    assert "way" in capsys.readouterr().err
