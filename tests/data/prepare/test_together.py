"""One preparation by several processes, as by several hosts that see one directory."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from steppe.configs.base import get_config
from steppe.data import files
from steppe.data import prepare as preparing
from steppe.data.errors import BadRecords, DataError
from steppe.data.loader import open_corpus
from steppe.data.prepare import prepare, recipe_of
from steppe.data.readers.built_in import embedded_documents
from steppe.scripts import prepare_data

ROOT = Path(__file__).parents[3]


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*.array_record"))}


def written(folder, documents, copies=1):
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text.decode()}) + "\n" for text in documents * copies))
    return path


def at_once(count, recipe, out):
    """What `count` threads that prepare together returned or raised; files are locked as between processes."""
    found = [None] * count

    def work(index):
        try:
            found[index] = prepare(recipe, str(out), log=lambda line: None, together=True)
        except DataError as error:
            found[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture(autouse=True)
def _poll(monkeypatch):
    monkeypatch.setattr(preparing, "POLL", 0.02)


def test_together_they_make_the_corpus_of_one(tmp_path):
    path = written(tmp_path, [text for _, text in embedded_documents()[:60]])
    recipe = recipe_of(get_config().data, task=f"jsonl:{path}", shards=7, sequence_length=64, held_out_fraction=0.2)
    alone = prepare(recipe, str(tmp_path / "alone"), log=lambda line: None)
    for manifest in at_once(3, recipe, tmp_path / "out"):
        differing = {key for key in alone if alone[key] != manifest[key]}
        assert differing <= {"created", "checksum"}
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    open_corpus(str(tmp_path / "out"), verify="full")
    kept = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert kept == {path.name for path in (tmp_path / "alone").rglob("*") if path.is_file()}
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.stat().st_mode & 0o222]


def test_what_one_refuses_ends_all_and_leaves_nothing(tmp_path):
    documents = [text for _, text in embedded_documents()[:60]]
    path = written(tmp_path, documents)
    with path.open("a") as handle:
        handle.write("{\n" * 9)
    recipe = recipe_of(get_config().data, task=f"jsonl:{path}", shards=7, sequence_length=64, held_out_fraction=0.2)
    found = at_once(3, recipe, tmp_path / "out")
    assert [type(error) for error in found] == [BadRecords] * 3, found
    assert "bad_records" in str(found[0])
    assert [path.name for path in tmp_path.glob("out/*")] == [preparing.LOCK]  # which is as good as empty
    written(tmp_path, documents)
    assert all(isinstance(manifest, dict) for manifest in at_once(2, recipe, tmp_path / "out"))


def test_another_recipe_does_not_join(tmp_path):
    path = written(tmp_path, [text for _, text in embedded_documents()[:20]])
    recipe = recipe_of(get_config().data, task=f"jsonl:{path}", sequence_length=64, held_out_fraction=0.2)
    out = tmp_path / "out"
    out.mkdir()
    preparing._start(str(out), preparing.identity(recipe), lambda line: None)
    with files.lock(out / preparing.LOCK, shared=True), pytest.raises(DataError, match="sequence_length is 64 there"):
        prepare(recipe._replace(sequence_length=32), str(out), log=lambda line: None, together=True)
    with files.lock(out / preparing.LOCK, shared=True), pytest.raises(DataError, match="join it with --together"):
        prepare(recipe, str(out), log=lambda line: None)


def test_one_that_is_killed_is_made_up_for(tmp_path, capsys):
    path = written(tmp_path, [text for _, text in embedded_documents()[:300]], copies=3)
    arguments = ["--config=base", f"--config.data.task=jsonl:{path}", "--shards=6", "--workers=1"]
    out = tmp_path / "out"
    assert prepare_data.main([*arguments, f"--out={out}", "--hosts=2", "--launcher=print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    first, second = (
        subprocess.Popen(line, shell=True, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        for line in lines
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("train/*/*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert second.wait(60) == 0
    assert prepare_data.main([*arguments, f"--out={tmp_path / 'alone'}"]) == 0
    assert contents(out) == contents(tmp_path / "alone")
    assert not list(out.rglob(f"*{files.ASIDE}"))
    assert sys.executable in lines[0]
