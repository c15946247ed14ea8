"""The command: prepare, vocabulary and show, as a user runs them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steppe.data.readers.built_in import embedded_documents
from steppe.scripts import prepare_data

ROOT = Path(__file__).parents[2]


def run(*arguments):
    """What the command prints, as a process of its own."""
    command = [sys.executable, "-P", "-m", "steppe.scripts.prepare_data", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def call(capsys, *arguments, status=0):
    """What the command prints on standard output, or on standard error if it is to fail; in this process."""
    try:
        found = prepare_data.main([*map(str, arguments)])
    except SystemExit as stop:
        found = stop.code
    output, error = capsys.readouterr()
    assert found == status, error
    return error if status else output


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"text": text.decode()[:600]}) for _, text in embedded_documents()[:200]]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder


def options(texts, **extra):
    chosen = {"task": f"jsonl:{texts}/a.jsonl", "held_out_fraction": 0.1, "sequence_length": 96, **extra}
    return ["--config=base", *(f"--config.data.{key}={value}" for key, value in chosen.items())]


def test_help_answers_within_3_seconds():
    began = time.monotonic()
    output = run("--help")
    assert time.monotonic() - began < 3
    assert "--workers" in output
    assert "show DIR" in output


def test_time_left_is_that_of_the_shards_since_the_start(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(prepare_data.time, "monotonic", lambda: clock[0])
    with prepare_data._progress() as (_, report):
        for clock[0], shards in ((100.0, 3), (115.0, 3), (140.0, 5)):  # three of an interrupted start; then two in 40 s
            report({"shards": shards, "of": 10, "documents": 7, "tokens": 2_000_000, "bytes": 0})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "3/10 shards, 7 documents, 2.0M tokens, 0.13M tokens/s"
    assert second == "5/10 shards, 7 documents, 2.0M tokens, 0.05M tokens/s, left 1:40"


def test_vocabulary_then_prepare_then_show(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    model, out = tmp_path / "v.model", tmp_path / "out"
    trained = call(capsys, "vocabulary", *options(texts), f"--out={model}", "--size=400")
    assert "400 pieces" in trained
    assert f"--config.data.vocabulary={model}" in trained
    again = call(capsys, "vocabulary", *options(texts), f"--out={model}", "--size=400", status=2)
    assert again.startswith(f"--out={model}: exists")

    prepared = run(*options(texts, vocabulary=model, packing="bestfit"), f"--out={out}", "--shards=2", "--workers=1")
    assert "bad records: none" in prepared
    manifest = json.loads((out / "manifest.json").read_text())
    assert f"{manifest['train'][0]['tokens']:,} tokens" in prepared
    assert len(manifest["train"][0]["shards"]) == 2

    shown = call(capsys, "show", out, "--step=1", "--batch_size=3")
    assert shown == call(capsys, "show", out, "--step=1", "--batch_size=3")
    assert shown != call(capsys, "show", out, "--step=2", "--batch_size=3")
    assert shown.count("=== row") == 3
    assert "% used" in shown
    assert "--- positions 0 to" in shown
    first = shown.split("--- positions")[1].split("\n", 1)[1].strip().splitlines()[0]
    assert any(first in json.loads(line)["text"] for line in (texts / "a.jsonl").read_text().splitlines())
    assert "batch 0 of jsonl:" in call(capsys, "show", out, "--held_out=jsonl")
    assert "held-out set 'x': " in call(capsys, "show", out, "--held_out=x", status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=x"], "--config is missing"),
        (["--config=base"], "--out is missing"),
        (["--config=base", "--out=x", "--workers=0"], "--workers: 0: must be an integer >= 1"),
        (["--config=base", "--out=x", "--shards=0"], "--shards: 0: must be an integer from 1 to 99999"),
        (["--config=base", "--out=x", "--config.data.task=web"], "config.data.task = 'web': must be "),
        (["show", "absent"], "config.data.directory = 'absent' does not exist"),
        (["show", "absent", "--step=-1"], "--step: -1: must be an integer >= 0"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    error = call(capsys, *arguments, status=2)
    assert message in error
    assert error.count("\n") == 1
    assert not (ROOT / "x").exists()
