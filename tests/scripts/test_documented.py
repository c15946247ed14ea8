"""Every command that is documented, run to its end on a small size, with its defaults where they cost little."""

import itertools
import json
import math
import os
import pathlib
import re
import shlex

import jax
import pytest

from steppe.configs.read import read_config
from steppe.data import vocabulary
from steppe.lm.parts.check import check
from steppe.scripts import cli, command

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "configs/quickstart.py"
TINY = ("--sizes", "0.01m", "--batch_size=8", "--sequence_length=16", "--vocabulary_size=64", "--runs=1")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def steppe(capsys):
    """steppe(words, status=0) -> (standard output, standard error) of a command that must end so."""

    def run(*words, status: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        try:
            ended = cli.main([str(word) for word in words])
        except SystemExit as stop:
            ended = stop.code
        out, err = capsys.readouterr()
        assert ended == status, err
        return out, err

    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a few hundred lines of real text."""
    folder = tmp_path_factory.mktemp("text")
    source = pathlib.Path(os.__file__).read_text()
    (folder / "train.txt").write_text(source[:12_000])
    (folder / "val.txt").write_text(source[12_000:14_000])
    (folder / "second.txt").write_text("".join(f"and the people said unto him that day {n}\n" for n in range(60)))
    return folder


@pytest.fixture(scope="module")
def small(text):
    """Overrides of the quickstart: a tiny model on a small text, the method and all else as they are."""
    keys = {
        "model.size": "0.01m",
        "data.task": f"text:{text}/train.txt@all",
        "data.held_out": f"('val=text:{text}/val.txt@all',)",
        "data.cache": text / "cache",
        "data.sequence_length": 16,
        "train.duration": "4 steps",
        "evaluate.batches": 2,
        "sample.tokens": 4,
    }
    return [f"--config={CONFIG}", *(f"--config.{key}={value}" for key, value in keys.items())]


@pytest.fixture(scope="module")
def run(tmp_path_factory, small):
    """The workdir of a run of four steps of the quickstart, with its checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert cli.main(["train", *small, f"--workdir={workdir}"]) == 0
    return workdir


# --------------------------------------------------------------------------------------------------------- the commands
def test_train_continues_what_it_began_and_looks_into_a_step(steppe, run, small):
    assert {"metrics.jsonl", "loss.png", "config.json", "checkpoints"} <= {path.name for path in run.iterdir()}
    before = (run / "checkpoints" / "4" / "SEAL").read_bytes()
    steppe("train", *small, f"--workdir={run}")
    assert (run / "checkpoints" / "4" / "SEAL").read_bytes() == before
    steppe("train", *small, f"--workdir={run}", "--config.optim.rho=0.01", status=2)
    assert "step 2" in "".join(steppe("train", *small, f"--workdir={run}", "--replay_step=2"))


def test_a_method_chosen_on_the_command_line_is_resumed_by_the_same_command(steppe, run, small, tmp_path):
    chosen = ("train", *small, "--config.optim.method=adamw")
    steppe(*chosen, f"--workdir={tmp_path}/adamw", "--until=2")
    before = (tmp_path / "adamw" / "config.json").read_bytes()
    assert json.loads(before)["optim"]["rho"] is None
    _, said = steppe(*chosen, f"--workdir={tmp_path}/adamw")
    way = f"ignoring config.optim.rho = 0.02 in {CONFIG}: config.optim.method = adamw takes no options"
    assert said.splitlines().count(way) == 1
    assert (tmp_path / "adamw" / "checkpoints" / "4").is_dir()
    assert (tmp_path / "adamw" / "config.json").read_bytes() == before

    theirs = (run / "config.json").read_bytes()  # another run's options are not ignored
    steppe(*chosen, f"--workdir={run}", status=2)
    assert (run / "config.json").read_bytes() == theirs


def test_plot_draws_what_there_is(steppe, run):
    (run / "loss.png").unlink()
    assert steppe("plot", str(run))[0].splitlines() == [f"{run}/loss.png"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_other_text_is_evaluated_with_the_run_s_vocabulary(steppe, run):
    said, _ = steppe(
        "evaluate", f"--workdir={run}", f"--task=notes=lines:{ROOT}/LICENSE + 0.5 topics@held_out", status=2
    )
    said, _ = steppe("evaluate", f"--workdir={run}", f"--task=1 notes=lines:{ROOT}/LICENSE + 1 topics@held_out")
    notes, topics = (line.split() for line in said.splitlines()[-2:])
    assert (notes[0], topics[0]) == ("notes", "topics")
    assert int(notes[-1].replace(",", "")) > 10_000


def test_evaluate_and_generate(steppe, run):
    said, _ = steppe("evaluate", f"--workdir={run}")
    name, loss, *_ = said.splitlines()[-1].split()
    assert name == "val"
    assert 0 < float(loss) < 10
    assert "def " in steppe("generate", f"--workdir={run}", "--prompt=def ", "--tokens=4")[0]
    _, said = steppe("generate", f"--workdir={run}", "--prompt=a\udc80", status=2)
    assert "without lone surrogates" in said


def test_prepare_data_prepares_and_shows_and_learns_a_vocabulary(steppe, small, tmp_path):
    said, _ = steppe("prepare_data", *small, f"--out={tmp_path}/corpus", "--workers=1")
    assert f"use it with --config.data.directory={tmp_path}/corpus" in said
    shown, _ = steppe("prepare_data", "show", tmp_path / "corpus", "--step=0")
    assert "batch 0 of training" in shown
    assert "=== row 3" in shown
    steppe("prepare_data", "vocabulary", *small, f"--out={tmp_path}/my.model", "--size=400")
    assert (tmp_path / "my.model").stat().st_size


def test_plan_says_whether_it_fits(steppe):
    keys = ("--config.model.size=0.01m", "--config.data.sequence_length=16")
    said, _ = steppe("plan", f"--config={CONFIG}", *keys, "--topology=cpu:1")
    assert re.search(r"memory .* fits", said)
    said, _ = steppe("plan", f"--config={CONFIG}", *keys, "--topology=cpu:1", "--search")
    assert "combinations of remat and mesh should fit" in said
    said, _ = steppe("plan", "--table", "--sizes", "0.01m", "--methods", "adamw")
    assert [line.split("|")[2].strip() for line in said.splitlines()[2:]] == ["adamw"]


def test_report_of_a_run_and_of_two_next_to_each_other(steppe, run, tmp_path):
    steppe("report", run, f"--out={tmp_path}/report")
    assert "All runs" in (tmp_path / "report" / "index.html").read_text()
    said, _ = steppe("report", "compare", run, run, f"--out={tmp_path}/two.html")
    assert "nowhere in 4 common steps" in said
    assert "<svg" in (tmp_path / "two.html").read_text()


def rows(said: str) -> list[list[str]]:
    """The cells of the lines of a Markdown table."""
    lines = [line.strip("|").split("|") for line in said.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line] for line in lines]


@pytest.mark.exhaustive  # a command of minutes
def test_bench_step(steppe):
    methods = ["adamw", "functional_sam:keep"]  # the defaults without those that compile nothing else
    table = rows(steppe("bench", "step", *TINY, "--methods", *methods, "--against")[0])
    assert [row[0] for row in table] == [*methods, "plain adamw", "optax.contrib.sam"]
    assert all(float(row[1].replace(",", "")) > 0 for row in table)
    steppe("bench", "step", *TINY, "--methods", "samm", status=2)


@pytest.mark.exhaustive  # a command of minutes
def test_bench_collectives(steppe):
    sizes = ("--size=0.01m", "--batch_size=8", "--topology", "cpu:8")
    out, _ = steppe("bench", "collectives", *sizes, "--methods", "adamw", "sam", "--sources")
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in out.splitlines() if line.startswith("| ")}
    assert float(rows["adamw"][-1]) >= 0.9
    assert float(rows["sam"][1]) == pytest.approx(2 * float(rows["adamw"][1]), abs=2e-3)
    assert "all-gather" in out


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU to measure")
def test_bench_gpu_needs_one(steppe):
    assert "needs a GPU that jax can use" in steppe("bench", "gpu", status=2)[1]


@pytest.mark.exhaustive  # from the wheel in test_package.py
def test_a_sweep_and_its_report_where_the_user_has_files_of_our_names(steppe, small, tmp_path, monkeypatch):
    """Of the command's own process tests/test_package.py says the same."""
    for name in ("configs", "data", "optim", "lm", "scripts", "steppe"):
        (tmp_path / f"{name}.py").write_text('raise RuntimeError("a file of the user\'s was imported")\n')
    (tmp_path / "small.py").write_text((ROOT / CONFIG).read_text())
    monkeypatch.chdir(tmp_path)
    sweep = ("sweep", "--config=small.py", *small[1:], "--out=sweeps/rho", "--grid", "optim.rho=0.01,0.03")
    assert "runs    2 (2 unfinished)" in steppe(*sweep, "--plan")[0]
    steppe(*sweep)
    assert "runs    2 (2 unfinished)" not in steppe(*sweep)[0]
    assert "wrote sweeps/rho/report/index.html" in steppe("report", "sweeps/rho")[0]
    steppe("report", "compare", "sweeps/rho/runs/rho=0.01", "sweeps/rho/runs/rho=0.03")


def test_a_named_sweep_is_planned(steppe, tmp_path):
    said, _ = steppe("sweep", f"--config={CONFIG}", "--sweep=rho_by_scale:0.1m", f"--out={tmp_path}/rho", "--plan")
    assert "runs    31 (31 unfinished)" in said
    said, _ = steppe(
        "sweep",
        "--config=configs/study.py",
        "--sweep=configs/studies/first/spec.py",
        f"--out={tmp_path}/study",
        "--plan",
    )
    assert "runs    " in said


@pytest.mark.exhaustive  # and with fewer layers in measure/test_curvature.py
def test_curvature_of_every_checkpoint(steppe, run):
    brief = ("--batches=1", "--probes=2", "--densities=1", "--lanczos=4", "--ascent=1", "--draws=1", "--slices=3")
    said, _ = steppe("curvature", f"--workdir={run}", "--step=all", *brief)
    assert "quickstart:4" in said
    assert json.loads((run / "curvature" / "4.json").read_text())["summary"]["lambda_max"] > 0


@pytest.mark.exhaustive  # and with fewer layers in measure/test_retention.py
def test_retention_of_runs(steppe, run, text, tmp_path):
    brief = ("--fine_tune_steps=2", "--fine_tune_rates=0.001", "--batches=1", "--samples=1", "--noise=0.1", "--bits=8")
    second = f"--fine_tune=lines:{text}/second.txt"
    steppe("retention", f"--workdir={run}", f"--out={tmp_path}/retention", second, *brief)
    assert {path.name for path in (tmp_path / "retention").iterdir()} == {"retention.csv", "retention.png"}


def test_config_and_print_config(steppe, run):
    said, _ = steppe("config", "quickstart")
    assert "optim.rho = 0.02" in said
    said, _ = steppe("config", "diff", "quickstart", run, status=1)
    assert "model.size" in said
    assert "optim.method" not in said
    said, _ = steppe("train", f"--config={CONFIG}", "--config.optim.rho=0.5", "--print_config")
    assert "0.5" in said


def test_docs(steppe):
    assert steppe("docs", "scripts")[0].startswith("# scripts")


# ---------------------------------------------------------------------------------------------------- the documentation
# a name in capitals stands for a value: these are read as numbers, names or files; any other may be a file's name
STANDS_FOR = {
    "plan --config=FILE": "plan --config=paper:1.2b,sam,chinchilla",
    "config=FILE": "config=quickstart",
    "config.key=value": "config.seed=3",
    "K": "1",
    "N": "400",
    "X": "0.5",
    "SECONDS": "1",
    "ROOM": "optim",
    "METHOD": "sam",
    "VOCABULARY": "bytes",
    "SPEC": "rho_by_scale",
    "STAGE": "1",
    "TEXT": "text",
    "NAME": "quickstart",
}
DEVICES = re.compile(r".*--xla_force_host_platform_device_count=(\d+) .*")
LEFT_OUT = ("...", "…", "--help")


def documented() -> list[tuple[str, str]]:
    """(file, command with what stands before it) of every command that a README, a docstring or a help shows.

    One within a sentence begins with a backquote.
    """
    found = [("steppe --help", f"steppe {name} {example}") for name, (_, example) in cli.COMMANDS.items()]
    rooms = ("configs", "data", "lm", "optim", "scripts")
    for path in [ROOT / "README.md", *(path for room in rooms for path in sorted((ROOT / room).rglob("*.*")))]:
        if path.suffix not in (".md", ".py"):
            continue
        text = path.read_text().replace("\\\n", " ")
        shown = re.findall(r"^\s*((?:\w+=\S+ |[^`\n]* && )?(?:\S*/)?steppe [a-z].*)", text, re.MULTILINE)
        shown += re.findall(r"`steppe [a-z][^`]*", text) if path.suffix == ".md" else []
        found += [(str(path.relative_to(ROOT)), " ".join(line.split())) for line in shown]
    return list(dict.fromkeys(found))


def commands(line: str) -> list[list[str]]:
    """The words of the commands that a documented line stands for, without "steppe": one for each of its choices."""
    line = re.sub(r"('[^']*')|[][`]", r"\1", line).partition(" > ")[0]  # what is quoted stands there
    for name, value in STANDS_FOR.items():
        line = re.sub(rf"\b{name}\b", value, line)
    words = shlex.split(line, comments=True)
    words = words[[word.rpartition("/")[2] for word in words].index("steppe") + 1 :]
    choices = []
    for word in words:
        head = re.match(r"--\w+=|", word)[0]
        said = word.removeprefix(head).split("|")
        choices.append([head + each for each in said if each not in LEFT_OUT or word == head + each != each])
    return [list(words) for words in itertools.product(*filter(None, choices))]


@pytest.fixture(scope="module")
def place(tmp_path_factory, run):
    """A folder with the files that documented commands name."""
    folder = tmp_path_factory.mktemp("place")
    for room in ("configs", "optim"):
        (folder / room).symlink_to(ROOT / room)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lines = pathlib.Path(os.__file__).read_text().splitlines()
        vocabulary.train_sentencepiece(map(str.encode, lines), "c4.model", 400)
        (folder / "mine.py").write_text((ROOT / "optim/outside/examples/half_sign.py").read_text())
        (folder / "text").mkdir()
        (folder / "text" / "first.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        assert cli.main(["export", f"--workdir={run}", "--out=HF_DIR"]) == 0
        assert cli.main(["config", "from-hf", "HF_DIR", "--out=theirs.py"]) == 0
    return folder


@pytest.fixture(scope="module")
def planned():
    """The runs of sweeps that have been planned: several files show the same ones."""
    return set()


class Parsed(Exception):
    """A command line has been read: (config's path, overrides, options)."""


@pytest.mark.parametrize(("where", "line"), documented(), ids=[f"{where}: {line}" for where, line in documented()])
def test_every_documented_command_can_run(where, line, steppe, place, planned, monkeypatch):
    """Its own parser reads it and its config is checked as before a run; a sweep is planned."""
    read = command.parse_unread

    def stop(argv, parser):
        for action in parser._actions:
            action.required &= not line.startswith("`")  # a sentence may leave out the rest
        raise Parsed(*read(argv, parser))

    monkeypatch.chdir(place)
    for words in commands(line):
        runs = tuple(word for word in words if not word.startswith(("--out", "--order", "--plan")))
        if words[0] == "sweep" and runs not in planned:
            planned.add(runs)
            plan = ["--plan", "--launcher=print"]  # one device a run, whatever this process has
            steppe(*words, *plan, *([] if any(word.startswith("--out") for word in words) else ["--out=DIR"]))
        with monkeypatch.context() as patch:
            patch.setattr(command, "parse_unread", stop)
            try:
                steppe(*words)
            except Parsed as parsed:
                path, overrides, options = parsed.args
                if path:
                    devices = getattr(options, "topology", "").partition(":")[2] or DEVICES.sub(r"\1", line)
                    count = math.prod(map(int, devices.split("x"))) if re.fullmatch(r"\d+(x\d+)*", devices) else None
                    named = [("optim.method", options.reference)] if hasattr(options, "reference") else []
                    check(read_config(path, [*named, *overrides]), device_count=count)


@pytest.mark.exhaustive  # planned above, and a branch in lm/keep/test_branch.py
def test_the_branches_of_the_readme_run(steppe, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trunk, branches = [each for where, line in documented() if "runs/trunk" in line for each in commands(line)]
    sizes = [word for word in small[1:] if not word.startswith("--config.train.duration")]
    steppe(*trunk, *sizes)
    assert "2 finished" in steppe(*branches, *sizes)[0]
