"""Runs, corpora, reports and addresses that others made are safe to open: the attacks that were once possible.

What a stored config names is followed only with --trust, and no command that reads a run touches what was not named.
"""

import io
import json
import os
import shutil
import sys
import uuid
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile
from fsspec.spec import AbstractFileSystem

from helpers import lm_runs, report_runs
from steppe.data import files
from steppe.data import manifest as manifests
from steppe.data.prepare import prepare, recipe_of
from steppe.lm.keep import mirror, seal
from steppe.lm.parts.corpus import CORPUS
from steppe.scripts import cli

pytestmark = pytest.mark.usefixtures("one_device")

MODULE = "strangers_module"


class Elsewhere(AbstractFileSystem):
    """A store that notes that somebody asked for it, and has nothing."""

    protocol = "elsewhere"
    cachable = False
    asked: ClassVar[list[str]] = []

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        Elsewhere.asked.append("reached")
        raise PermissionError("nothing for you")


fsspec.register_implementation("elsewhere", Elsewhere, clobber=True)


@pytest.fixture(autouse=True)
def watched(tmp_path, monkeypatch):
    """A canary, and a module that would write into it once imported; nothing of either may move."""
    monkeypatch.setenv("STEPPE_CACHE", str(tmp_path / "cache"))
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("precious")
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{MODULE}.py").write_text(f"open({str(canary / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    Elsewhere.asked.clear()
    yield canary
    assert MODULE not in sys.modules
    assert {path.name: path.read_text() for path in canary.iterdir()} == {"file": "precious"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a config, a run of it)."""
    place = tmp_path_factory.mktemp("trained")
    text, cache = lm_runs.write_text(place)
    config = lm_runs.config(text, cache, train__duration="4 steps", average__weights=("ema",))
    assert lm_runs.run(config.copy_and_resolve_references(), place / "run", draws=True) == 0
    return config, place / "run"


@pytest.fixture
def downloaded(trained, tmp_path):
    """made(changes) -> a copy of the run with other values in its config, and a corpus that is not here."""

    def made(changes, name="run"):
        run = tmp_path / name
        shutil.copytree(trained[1], run)
        (run / CORPUS).unlink()
        config = json.loads((run / "config.json").read_text())
        for key, value in changes.items():
            section, _, last = key.partition(".")
            config[section][last] = value
        (run / "config.json").write_text(json.dumps(config))
        return run

    return made


def said_by(line, capsys):
    """(status, its output)."""
    try:
        status = cli.main([str(word) for word in line])
    except SystemExit as stop:
        status = stop.code
    streams = capsys.readouterr()
    return status, streams.out + streams.err


TEXT = "text:elsewhere://x/y.txt"
NAMED = {
    "an address of a corpus": ({"data.directory": "elsewhere://x/corpus"}, "data.directory"),
    "an address of its text": ({"data.task": TEXT}, "data.task"),
    "an address of a held-out set": ({"data.held_out": [f"val={TEXT}"]}, "data.held_out"),
    "a module": ({"data.task": "seqio:task", "data.seqio_module": MODULE}, "data.task"),
    "code of a data set": ({"data.task": "tfds:c4/en"}, "data.task"),
    "a data set of the hub": ({"data.task": "hf:owner/name"}, "data.task"),
    "a vocabulary of the hub": ({"data.vocabulary": "hf:owner/name"}, "data.vocabulary"),
    "an address of its checkpoints": ({"checkpoint.directory": "elsewhere://x/steps"}, "checkpoint.directory"),
}
MODELS = {
    "evaluate": ["evaluate", "--batches=1"],
    "generate": ["generate", "--tokens=1"],
    "export": ["export", "--out=OUT"],
    "curvature": ["curvature", "--batches=1"],
    "retention": ["retention", "--fine_tune=none", "--batches=1"],
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("command", MODELS)
def test_what_a_stored_config_names_is_not_followed(downloaded, tmp_path, capsys, command, kind):
    changes, key = NAMED[kind]
    run = downloaded(changes)
    line = [word.replace("OUT", str(tmp_path / "out")) for word in MODELS[command]]
    status, said = said_by([*line, f"--workdir={run}"], capsys)
    refusal = [each for each in said.splitlines() if f"config.{key} = " in each]
    assert len(refusal) == 1, said
    assert "pass --trust if the run is your own" in refusal[0]
    assert status in (1, 2)
    assert not Elsewhere.asked
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", MODELS)
def test_with_trust_it_is_followed(downloaded, tmp_path, capsys, command):
    run = downloaded({"data.directory": "elsewhere://x/corpus"})
    line = [word.replace("OUT", str(tmp_path / "out")) for word in MODELS[command]]
    _, said = said_by([*line, f"--workdir={run}", "--trust"], capsys)
    assert Elsewhere.asked, said
    assert "elsewhere://x/corpus: cannot be reached (PermissionError: nothing for you)" in said


def test_with_trust_a_module_is_imported(downloaded, capsys, monkeypatch):
    monkeypatch.setattr(sys, "modules", {**sys.modules})  # the module that is imported here is none of the next test's
    run = downloaded({"data.task": "seqio:task", "data.seqio_module": "strangers_own"})
    status, said = said_by([*MODELS["evaluate"], f"--workdir={run}", "--trust"], capsys)
    assert status == 2
    assert "config.data.seqio_module = 'strangers_own': " in said, said


def test_the_run_that_curvature_goes_towards_is_not_followed_either(trained, downloaded, capsys):
    run = downloaded({"checkpoint.directory": "elsewhere://x/steps"})
    line = [*MODELS["curvature"], f"--workdir={trained[1]}", f"--towards={run}"]
    status, said = said_by(line, capsys)
    assert status == 2
    assert "config.checkpoint.directory = 'elsewhere://x/steps'" in said
    assert not Elsewhere.asked
    _, said = said_by([*line, "--trust"], capsys)
    assert "elsewhere://x/steps: cannot be reached" in said


def test_control_characters_of_a_model_are_escaped_on_a_terminal(trained, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, raw in ((Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(["generate", f"--workdir={trained[1]}", "--tokens=1", "--prompt=a\x1b[2Jb"]) == 0
        assert ("\x1b" in stream.getvalue()) == raw
        assert ("\\x1b[2J" in stream.getvalue()) == (not raw)


def test_control_characters_of_a_name_are_escaped_wherever_it_is_printed(trained, tmp_path, capsys):
    run = tmp_path / "a\x1b[2Jb"
    shutil.copytree(trained[1], run)
    (tmp_path / "c\x1b[2Jd").mkdir()
    for argv in (["watch", f"{tmp_path}", "--once"], ["plot", f"{run}"], ["evaluate", f"--workdir={run}", "--step=7"],
                 ["tra\x1b[2Jin"]):  # fmt: skip
        cli.main(argv)
        said = "".join(capsys.readouterr())
        assert "\x1b" not in said
        assert "\\x1b[2J" in said, argv


def test_a_record_without_bits_per_byte_leaves_them_out_of_the_card(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained[1], run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("bits_per_byte", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    status, said = said_by(["export", f"--workdir={run}", f"--out={tmp_path / 'out'}"], capsys)
    assert status == 0, said
    card = (tmp_path / "out" / "README.md").read_text()
    assert " nats a token |" in card
    assert "bits a byte" not in card


def test_questions_of_a_stored_config_are_not_fetched(downloaded, capsys):
    run = downloaded({"evaluate.choices": ["q=jsonl:elsewhere://x/q.jsonl"]})
    status, said = said_by(["evaluate", f"--workdir={run}", "--batches=1"], capsys)
    assert status == 2
    assert "name the items with --choices, or pass --trust" in said.splitlines()[-1]
    assert not Elsewhere.asked
    said_by(["evaluate", f"--workdir={run}", "--batches=1", "--trust"], capsys)
    assert Elsewhere.asked


def test_what_reads_records_alone_follows_nothing_at_all(downloaded, tmp_path, capsys):
    everything = {key: value for changes, _ in NAMED.values() for key, value in changes.items()}
    everything |= {"data.task": "seqio:task", "data.vocabulary": "elsewhere://x/v", "data.tfds_dir": "elsewhere://x"}
    run, other = downloaded(everything), downloaded(everything, "other")
    for line in (
        ["watch", run, "--once"],
        ["plot", run],
        ["report", "compare", run, other, f"--out={tmp_path / 'compared.html'}"],
        ["report", "pack", run, f"--out={tmp_path / 'runs.jsonl'}"],
        ["report", tmp_path / "runs.jsonl", f"--out={tmp_path / 'again'}"],
        ["config", "diff", run, other],
    ):
        status, said = said_by(line, capsys)
        assert status == 0, said
        assert not Elsewhere.asked, line


def test_a_branch_follows_its_parent_to_an_address_only_with_trust(trained, downloaded, tmp_path, capsys):
    config, _ = trained
    parent = downloaded({"checkpoint.directory": "elsewhere://x/steps", "data.directory": "elsewhere://x/corpus"})
    (tmp_path / "own.py").write_text(
        "from helpers import lm_runs\n\n\ndef get_config():\n"
        f"    return lm_runs.config({os.path.dirname(trained[1])!r}, {config.data.cache!r}, "
        f"branch_from={str(parent)!r}).unlock()\n"
    )
    line = ["train", f"--config={tmp_path / 'own.py'}", f"--workdir={tmp_path / 'branch'}"]
    status, said = said_by(line, capsys)
    assert status == 2
    assert "config.checkpoint.directory = 'elsewhere://x/steps'" in said
    assert "--trust" in said
    assert not Elsewhere.asked
    assert not (tmp_path / "branch").exists()
    status, said = said_by([*line, "--trust"], capsys)
    assert status == 2
    assert "elsewhere://x/steps: cannot be reached" in said


def test_weights_of_anothers_run_bring_nothing_of_its_config(trained, downloaded, tmp_path):
    config, _ = trained
    everything = {key: value for changes, _ in NAMED.values() for key, value in changes.items()}
    run = downloaded(everything)
    own = config.copy_and_resolve_references().unlock()
    own.update(init_from=str(run))
    assert lm_runs.run(own.lock(), tmp_path / "own", until=1) == 0
    assert not Elsewhere.asked


# ---------------------------------------------------------------------------------------------------- the four attacks
@pytest.mark.parametrize("name", ["/", "../../", "train/../../../"], ids=["absolute", "above", "within"])
@pytest.mark.parametrize("of", ["shard", "vocabulary"])
def test_evaluating_a_downloaded_run_overwrites_nothing(trained, downloaded, watched, tmp_path, capsys, of, name):
    """Its manifest names a file outside; the checksums are the attacker's own, and --trust was given."""
    published = tmp_path / "published" / "corpus"
    prepare(recipe_of(trained[0].data), str(published), log=lambda line: None)
    name = str(watched / "file") if name == "/" else f"{name}canary/file"
    manifest = manifests.read(str(published))
    content = b"overwritten"
    (tmp_path / "published" / "file").write_bytes(content)
    entry = {"file": name, "size": len(content), "hash": files.content_hash(tmp_path / "published" / "file"),
             "content": "", "rows": 0}  # fmt: skip
    for below in ("published/canary", "published/corpus/../canary"):  # where the address would have it
        os.makedirs(tmp_path / below, exist_ok=True)
        (tmp_path / below / "file").write_bytes(content)
    if of == "shard":
        manifest["train"][0]["shards"].append(entry)
    else:
        manifest["vocabulary"]["file"] = entry
    (published / manifests.NAME).chmod(0o644)
    manifests.write_json(str(published / manifests.NAME), manifest)
    run = downloaded({"data.directory": f"file://{published}", "data.cache": str(tmp_path / "cache")})
    status, said = said_by(["evaluate", f"--workdir={run}", "--batches=1", "--trust"], capsys)
    assert status == 2
    assert f"the name {name!r} must be relative" in said.splitlines()[-1]


@pytest.fixture
def address():
    store, place = fsspec.filesystem("memory"), f"memory://strangers/{uuid.uuid4().hex}/run"
    yield place
    if store.exists("/strangers"):
        store.rm("/strangers", recursive=True)


@pytest.mark.parametrize("key", ["../../../canary/file", "checkpoints/4/../../../../../canary/file", "a/../../x"])
@pytest.mark.parametrize("line", [["watch", "--once"], ["plot"], ["evaluate"]], ids=lambda line: line[0])
def test_no_key_of_a_bucket_is_written_or_removed_outside(trained, address, tmp_path, capsys, line, key):
    store = fsspec.filesystem("memory")
    store.put(str(trained[1]), address, recursive=True)
    store.store[f"{address.removeprefix('memory:/')}/{key}"] = MemoryFile(None, "/x", b"overwritten")
    target = [f"--workdir={address}"] if line[0] == "evaluate" else [address]
    for _ in range(2):
        status, said = said_by([line[0], *target, *line[1:]], capsys)
        assert status == 2, said
        assert f"the name {key!r} must be relative" in said


@pytest.mark.parametrize("line", [["watch", "--once"], ["plot"], ["evaluate", "--batches=1"]], ids=lambda line: line[0])
@pytest.mark.parametrize("gone", ["/checkpoints", ""], ids=["its checkpoints", "all of it"])
def test_reading_an_address_removes_no_sealed_checkpoint(trained, address, capsys, line, gone):
    """What the address lacks may exist nowhere else."""
    with mirror.kept(address, True, print) as place:
        shutil.copytree(trained[1], place, dirs_exist_ok=True)
    here = mirror._place(address)
    before = {str(path): path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert [path for path in before if path.endswith(f"checkpoints/4/{seal.NAME}")]
    fsspec.filesystem("memory").rm(f"{address}{gone}", recursive=True)
    target = [f"--workdir={address}"] if line[0] == "evaluate" else [address]
    said_by([line[0], *target, *line[1:]], capsys)
    after = {str(path): path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before if not path.endswith("loss.png")} == {
        path: content for path, content in before.items() if not path.endswith("loss.png")
    }


@pytest.mark.parametrize("older", [True, False], ids=["a list", "hashes"])
def test_a_report_removes_no_file_of_the_user(watched, tmp_path, capsys, older):
    sweep, out = tmp_path / "sweep", tmp_path / "out"
    plans = (report_runs.plan("adamw"), report_runs.plan("sam", 0.1))
    report_runs.write_sweep(sweep, {name: (overrides, 3.0) for name, overrides in plans})
    out.mkdir()
    (out / "notes.csv").write_text("my notes")
    (out / "notes.txt").write_text("my notes")
    (out / "link.csv").symlink_to(watched / "file")
    true = {
        name: files.content_hash(watched / "file") for name in ("../canary/file", str(watched / "file"), "link.csv")
    }
    hashes = {"notes.csv": "", "notes.txt": files.content_hash(out / "notes.txt"), **true}
    files.write_json(out / "files.json", {"files": list(hashes)} if older else {"hashes": hashes})
    assert said_by(["report", sweep, f"--out={out}"], capsys)[0] == 0
    assert (out / "notes.csv").read_text() == (out / "notes.txt").read_text() == "my notes"
    assert (out / "link.csv").is_symlink()
