"""Whatever is wrong with a command line: one line that names it, status 2, and nothing left behind."""

import argparse
import contextlib
import io
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steppe.configs import base
from steppe.data import cache
from steppe.lm.keep.exits import REFUSALS
from steppe.lm.parts.check import check
from steppe.scripts import cli, command

TRAIN = ["train", "--config=quickstart", "--workdir=run"]
PREPARE = ["prepare_data", "--config=quickstart"]
TABLE = [
    # (command line, what the line must name)
    (
        [*TRAIN[:2], "--workdir=nosuchscheme://bucket/run"],
        "nosuchscheme://bucket/run: must be a directory, or a URL such as",
    ),
    ([*TRAIN[:2], "--workdir=s3://"], "--workdir: s3://: must be a directory, or a URL such as"),
    (
        ["sweep", "--config=quickstart", "--sweep=rho", "--out=s3://b/x"],
        "s3://b/x: must be a directory of this machine",
    ),
    (["evaluate", "--workdir=memory://nothing/here"], "memory://nothing/here: must be the workdir of a run"),
    (["report", "memory://nothing/here"], "--out is missing"),
    ([*TRAIN[:2], "--workdir=" + "x" * 300], "must be a writable directory"),
    ([*TRAIN[:2], "--workdir=a\0b"], "must be a writable directory"),
    ([*TRAIN[:2], "--workdir=here.txt"], "must be a writable directory"),
    ([*TRAIN[:2], "--workdir=here.txt/run"], "must be a writable directory"),
    ([*TRAIN[:2], "--workdir=dangling"], "must be a writable directory"),
    ([*TRAIN[:2], "--workdir=~nobody_of_this_name/run"], "must be a writable directory"),
    ([*TRAIN[:2], "--workdir=linked"], "linked/metrics.jsonl: is a link, and a run would write through it"),
    ([*TRAIN[:2], "--workdir=/proc/run"], "/proc/run: "),
    ([*TRAIN, "--coordinator=nonsense"], "--coordinator=nonsense"),
    ([*TRAIN, "--coordinator=a.b:x", "--num_processes=2", "--process_id=0"], "PORT is a number from 1 to 65535"),
    ([*TRAIN, "--coordinator=no.such.host.:9", "--num_processes=2", "--process_id=0"], "cannot be resolved"),
    ([*TRAIN, "--allow_change=sead"], "--allow_change=sead"),
    ([*TRAIN, "--until=0"], "--until: 0: must be an integer >= 1"),
    ([*TRAIN, "--until=x"], "--until"),
    ([*TRAIN, "--replay_step=3"], "run: must be the workdir of a run"),
    ([*TRAIN, "--config.train.duration=1e300 tokens"], "config.train.duration = '1e300 tokens'"),
    ([*TRAIN, "--config.train.duration=1e300 epochs"], "a duration that is a finite number of steps"),
    ([*TRAIN, "--config.evaluate.every=1e400 steps"], "config.evaluate.every = '1e400 steps'"),
    ([*TRAIN, "--config.model.width=1048576", "--config.model.size="], "a model whose state and gradient fit a device"),
    ([*TRAIN, f"--config.train.batch_size={2**40}"], "a batch of which one activation fits a device"),
    ([*TRAIN, f"--config.evaluate.batch_size={2**40}"], "a batch of which one activation fits a device"),
    ([*TRAIN, f"--config.data.sequence_length={2**40}"], "an integer from 1 to 16777216"),
    ([*TRAIN, "--config.branch_from=" + "x" * 5000], "config.branch_from = 'xxx"),
    (
        [*TRAIN, "--config.optim.method=sam", "--config.optim.base=optax:lbfgs"],
        "config.optim.base = 'optax:lbfgs': must be a base whose update takes a gradient",
    ),
    (
        [*TRAIN, "--config.optim.method=sam", "--config.optim.base=optax.contrib:galore"],
        "must be one whose state checkpoints can hold",
    ),
    (
        ["judge", "optax.contrib:galore", "--config=study", "--out=judged"],
        "config.optim.base = 'optax.contrib:galore': must be one whose state checkpoints can hold",
    ),
    ([*TRAIN, "--config.data.task=lines:absent"], "lines:absent matches no file"),
    ([*TRAIN, "--config.data.task=lines:."], "lines:. is a directory"),
    ([*TRAIN, "--config.data.directory=absent"], "config.data.directory = 'absent' does not exist"),
    ([*TRAIN, "--config.data.directory=here.txt"], "config.data.directory = 'here.txt' is a file"),
    ([*TRAIN, "--config.data.cache=here.txt"], "config.data.cache = 'here.txt'"),
    ([*TRAIN, "--config.init_from=absent"], "absent: holds no checkpoint"),
    ([*TRAIN, "--config.checkpoint.directory=nosuchscheme://x/y"], "nosuchscheme://x/y"),
    (["train", "--config=ends.py", "--workdir=run"], "--config = ends.py: it ended the program"),
    (["train", "--config=array.py", "--workdir=run"], "array.py: get_config must return a ConfigDict"),
    (["train", "--config=truth.py", "--workdir=run"], "config.train.batch_size = True in truth.py"),
    (["train", "--config=none.py", "--workdir=run"], "config.train.batch_size = None in none.py"),
    (["evaluate"], "--workdir"),
    (["evaluate", "--workdir=absent"], "absent: must be the workdir of a run"),
    (["evaluate", "--workdir=here.txt"], "here.txt"),
    (["evaluate", "--workdir=list"], "config.json: it = []: must be an object"),
    (["evaluate", "--workdir=absent", "--batches=-1"], "--batches: -1: must be"),
    (["evaluate", "--workdir=absent", "--config.seed=1"], "--config: must be left out"),
    (["generate", "--workdir=absent"], "absent: must be the workdir of a run"),
    (["generate", "--workdir=absent", "--tokens=0"], "--tokens: 0: must be"),
    (["generate", "--workdir=absent", "--temperature=nan"], "--temperature: nan: must be"),
    (["generate", "--workdir=absent", "--prompt=\ud800"], "--prompt="),
    (["generate", "--workdir=absent", "--prompts=absent.txt"], "--prompts=absent.txt: cannot be read"),
    (["generate", "--workdir=absent", "--prompts=array.json"], "absent: must be the workdir of a run"),
    (["export", "--workdir=absent", "--out=o"], "absent: must be the workdir of a run"),
    (["export", "--workdir=absent", "--out=list"], "--out=list: must be a new or empty directory"),
    (["config", "from-hf", "absent"], "must be the config of a Hugging Face model"),
    (["watch", "absent"], "absent: must be the directory of a sweep"),
    ([*TRAIN, "--branch_from=absent"], "config.branch_from = 'absent': must be the workdir of a run"),
    ([*TRAIN, "--config.log.profile=steps 5"], "config.log.profile = 'steps 5': must be like"),
    ([*TRAIN, "--config.data.vocabulary=array.json"], "not a SentencePiece model"),
    ([*PREPARE, "--out=here.txt"], "--out: here.txt: must be a writable directory"),
    ([*PREPARE, "--out=here.txt/o"], "--out: here.txt/o: must be a writable directory"),
    ([*PREPARE, "--out=dangling"], "--out: dangling: must be a writable directory"),
    (["prepare_data", "vocabulary", "--config=quickstart", "--size=300", "--out=here.txt/v.model"], "here.txt/v.model"),
    ([*PREPARE, "--out=o", "--workers=0"], "--workers: 0: must be"),
    ([*PREPARE, "--out=o", "--shards=0"], "--shards: 0: must be an integer from 1 to 99999"),
    ([*PREPARE, "--out=o", "--config.data.task=jsonl:array.json"], "a JSON array"),
    ([*PREPARE, "--out=o", "--config.data.vocabulary=here.txt"], "not a SentencePiece model"),
    (["prepare_data", "show", "absent"], "absent"),
    (["prepare_data", "show", "absent", "--step=-1"], "--step: -1: must be"),
    (["prepare_data", "vocabulary", "--config=quickstart", "--out=v.model", "--size=3"], "--size=3"),
    (["sweep", "--config=quickstart", "--out=o"], "--grid"),
    (["sweep", "--config=quickstart", "--out=o", "--grid", "optim.rho="], "--grid optim.rho="),
    (["sweep", "--config=quickstart", "--out=o", "--grid", "optim.ro=1"], "config.optim.ro"),
    (["sweep", "--config=quickstart", "--out=list", "--grid", "seed=0,1"], "sweep.json"),
    (["sweep", "--config=quickstart", "--out=o", "--sweep=array.py"], "array.py"),
    (["sweep", "--config=quickstart", "--out=o", "--grid", "seed=0", "--jobs=-1"], "--jobs: -1: must be"),
    (["report", "absent"], "absent: must be the directory of a sweep"),
    (["report", "list"], "sweep.json"),
    (["report", "here.txt"], "here.txt"),
    (["plot", "absent"], "absent: must be the directory of a sweep"),
    (["curvature", "--workdir=absent"], "absent: must be the directory of a sweep, or the workdir of a run"),
    (["curvature", "--workdir=absent", "--batches=0"], "--batches"),
    (["curvature", "--workdir=absent", "--within=("], "--within: (: must be a regular expression"),
    (["report", "pack", "list", "--out=here.txt/x.jsonl"], "--out=here.txt/x.jsonl: "),
    ([*TRAIN, "--branch_from=" + "x" * 5000], "config.branch_from = 'xxx"),
    ([*TRAIN, "--config.init_from=" + "x" * 5000], "xxx"),
    (["config", "from-hf", "deep"], "deep/config.json: is nested more than 64 deep"),
    (["config", "from-hf", "rope"], "rope/config.json: rope_parameters = 1.5: must be an object or null"),
    (["config", "diff", "deep", "base"], "deep/config.json: is nested more than 64 deep"),
    (["evaluate", "--workdir=deep"], "deep/config.json: is nested more than 64 deep"),
    (["plot", "deep"], "deep/config.json: is nested more than 64 deep"),
    (["report", "deep.jsonl", "--out=o"], "deep.jsonl: line 1: is nested more than 64 deep"),
    (["report", "pipes"], "pipes/sweep.json: must be an ordinary file"),
    (["plot", "pipes"], "pipes/sweep.json: must be an ordinary file"),
    (["watch", "pipes", "--once"], "pipes/sweep.json: must be an ordinary file"),
    (["curvature", "--workdir=pipes"], "pipes/sweep.json: must be an ordinary file"),
    (["retention", "--workdir=pipes"], "pipes/sweep.json: must be an ordinary file"),
    (["retention", "--workdir=absent"], "absent"),
    (["plan", "--config=quickstart"], "--topology"),
    (["plan", "--config=quickstart", "--topology=moon:8"], "--topology"),
    (["plan", "--table", "--methods", "samm"], "--methods: samm: must be one of"),
    (["bench", "nothing"], "nothing"),
    (["bench", "step", "--runs=-1"], "--runs: -1: must be an integer >= 0"),
    (["bench", "step", "--remat=some"], "--remat: some: must be one of"),
    (["bench", "step", "--methods", "sam:some"], "--methods: some: must be one of"),
    (["bench", "gpu", "--methods", "adamw,sam"], "--methods: adamw,sam: must be one of"),
    (["bench", "collectives", "--topology=v5e"], "v5e"),
    ([*TRAIN, "--config.optim.perturb=()"], "config.optim.perturb"),
    ([*TRAIN, "--config.optim.perturb=('typo',)"], "config.optim.perturb"),
    ([*PREPARE, "--out=o", "--hosts=2"], "--hosts=2: needs --launcher=slurm or print"),
    (["config", "nothing"], "nothing"),
    (["docs", "nothing"], "nothing"),
    (["nothing"], "nothing"),
]
LATE = {"/proc/run: ", "a duration that is a finite number of steps"}  # refused by the system, or by the text's size


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a few things that are not what they are named for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPPE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here.txt").write_text("text\n")
    (tmp_path / "array.json").write_text('[{"text": "a"},\n{"text": "b"}]\n')
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "metrics.jsonl").symlink_to("../here.txt")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    (tmp_path / "list" / "sweep.json").write_text("[1]")
    head = "import sys\nfrom steppe.configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
    (tmp_path / "ends.py").write_text(f"{head}    sys.exit(3)\n")
    (tmp_path / "array.py").write_text("def get_config():\n    return []\n\n\ndef get_spec():\n    return [3]\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text("[" * 10**5)
    (tmp_path / "deep.jsonl").write_text('{"config":' * 10**5)
    (tmp_path / "rope").mkdir()
    (tmp_path / "rope" / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "rope_parameters": 1.5}'
    )
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "sweep.json")
    for name, value in (("truth", True), ("none", None)):
        change = f"    with config.ignore_type():\n        config.train.batch_size = {value}\n    return config\n"
        (tmp_path / f"{name}.py").write_text(head + change)
    return tmp_path


def ended(argv) -> int:
    try:
        return cli.main(argv)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("argv", "named"), TABLE, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else ""
)
def test_a_refusal_is_one_line_and_leaves_nothing(here, capsys, monkeypatch, argv, named):
    """Also before a text is prepared, which may take hours."""
    before = sorted(here.rglob("*"))
    if argv[0] == "train" and named not in LATE:
        monkeypatch.setattr(cache, "_prepare_apart", None)
    assert ended(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert named in said
    left = [path for path in sorted(here.rglob("*")) if path not in before and "cache" not in path.parts]
    assert not left


COMMANDS = [[name, *kind] for name in cli.COMMANDS for kind in [[], *([each] for each in cli.KINDS.get(name, ()))]]


@pytest.mark.parametrize("line", COMMANDS, ids=" ".join)
def test_every_number_of_a_command_line_is_bounded(monkeypatch, line):
    """As its declaration says: no number is negative, none is too large for an array, none is no number."""
    parsers = []

    def seen(self, *arguments):
        parsers.append(self)
        raise command.UsageError("seen")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", seen)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", seen)
    with contextlib.suppress(SystemExit, command.UsageError):
        cli.main([*line, "--nothing"])
    numbers = [action for parser in parsers for action in parser._actions if is_number(action.type)]
    assert numbers or line != ["generate"]  # which has some
    for action in numbers:
        for text in ("-1", "nan", "", "9" * 400):
            with pytest.raises(argparse.ArgumentTypeError):
                action.type(text)


@pytest.mark.parametrize("line", COMMANDS, ids=" ".join)
def test_two_dashes_are_no_value_of_any_option(monkeypatch, capsys, line):
    options = []

    def seen(parser, given):
        options.extend(parser._option_string_actions)
        options.extend(["--config.seed", "--config"] if parser.takes_config else [])

    with monkeypatch.context() as patched:
        patched.setattr(command, "_parsed", seen)
        with contextlib.suppress(Exception, SystemExit):
            cli.main([*line, "--nothing"])
    capsys.readouterr()
    for option in options:
        if option.startswith("--"):
            assert ended([*line, f"{option}=--"]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1, (option, said)
            assert option.startswith("--config") or option in said


def is_number(read) -> bool:
    with contextlib.suppress(Exception):
        return type(read("5")) in (int, float)
    return False


WORDS = [
    "", "0", "-1", "1e300", "-1e300", "nan", "inf", "None", "true", "1e-300", "9" * 30, "()", "(,)", "[]", "{}", "(",
    "('a',)", "'", "\\", "a" * 5000, "1e300 epochs", "1e300 tokens", "5%", "101%", "0%", "9999999999 steps",
    "chinchilla", "bytes", "/", "/proc", "~", "~nobody", "gs://x/y", "://", "text:/", "text:*", "jsonl:/dev/null",
    "tfds:x", "seqio:x", "0.5 embedded + 0.5 topics", "embedded + topics", "[", "*", "layers/", "sam", "\0", "\n", "漢",
    "\n:", "\ud800", "1,2", "a=b", "=", "--", "@", "embedded@x", "1_000", "0x10",
]  # fmt: skip
ASSIGNED = st.tuples(st.sampled_from(list(base.keys())), st.one_of(st.sampled_from(WORDS), st.text(max_size=20)))


@pytest.mark.parametrize("word", ["a" * 300, "a" * 5000, "\0"], ids=["longer than a name", "than a path", "null"])
@pytest.mark.parametrize("config", ["quickstart", "study"])
def test_what_no_file_can_be_called_is_taken_or_refused_in_one_line_whatever_the_key(config, word):
    for key in list(base.keys()):
        taken_or_refused([f"--config={config}", f"--config.{key}={word}"], 1)


@settings(max_examples=1000, deadline=None)
@given(
    st.sampled_from(["quickstart", "base", "study", "paper:24m,sam,fixed"]),
    st.lists(ASSIGNED, min_size=1, max_size=3),
    st.sampled_from([1, 8]),
)
def test_any_values_are_taken_or_refused_in_one_line(config, assigned, devices):
    taken_or_refused([f"--config={config}", *(f"--config.{key}={value}" for key, value in assigned)], devices)


def taken_or_refused(argv, devices):
    said, status = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(said):
            parsed, _ = command.parse(argv, command.parser("train", ""))
            check(parsed, device_count=devices, backend="cpu")
    except SystemExit as stop:
        status = stop.code
    except REFUSALS as error:
        status = 2
        said.write(f"{error}\n")
    assert (status, said.getvalue().count("\n")) in ((0, 0), (2, 1))
