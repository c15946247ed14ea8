"""The cache: prepared once, by another process, whatever the number of runs that ask for it."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from steppe.configs.base import get_config
from steppe.data import manifest as manifests
from steppe.data.cache import ensure
from steppe.data.errors import CorpusDamaged, CorpusMismatch, DataError
from steppe.data.prepare import identity, prepare, recipe_of, without_samples
from steppe.data.readers.built_in import embedded_documents

ROOT = Path(__file__).parents[2]

RUN = """
import sys
from steppe.configs.base import get_config
from steppe.data.cache import ensure
from steppe.data.loader import open_corpus, training_rows
config = get_config().data
config.cache, config.task, config.sequence_length = sys.argv[1], sys.argv[2], 32
config.held_out_fraction = 0.2
directory = ensure(config, log=lambda line: print(line, file=sys.stderr))
corpus = open_corpus(directory, config.vocabulary, config.sequence_length, config.packing, config.verify)
batch = training_rows(corpus, 0, 0, 4)
assert not any(name.split(".")[0] in ("tensorflow", "seqio", "tensorflow_datasets") for name in sys.modules)
print(directory, batch["targets"].sum())
"""


def test_two_processes_prepare_the_cache_once_and_never_import_tensorflow(tmp_path):
    (tmp_path / "texts").mkdir()
    for i, (_, text) in enumerate(embedded_documents()[:80]):
        (tmp_path / "texts" / f"{i}.txt").write_bytes(text[:3000])
    command = [sys.executable, "-c", RUN, str(tmp_path / "cache"), f"text:{tmp_path}/texts/*"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sum("prepared" in line for _, log in outputs for line in log.splitlines()) == 1
    config = get_config().data
    config.cache, config.task, config.sequence_length = str(tmp_path / "cache"), f"text:{tmp_path}/texts/*", 32
    config.held_out_fraction = 0.2
    assert ensure(config, log=pytest.fail) == outputs[0][0].split()[0]


def test_a_text_edited_at_equal_size_and_time_is_prepared_anew(tmp_path):
    config, path = small(tmp_path), tmp_path / "a.txt"
    first, status = ensure(config, log=lambda line: None), os.stat(path)
    assert ensure(config, log=pytest.fail) == first
    path.write_text(path.read_text().replace("the", "our", 1))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = ensure(config, log=lambda line: None)
    assert second != first
    with pytest.raises(CorpusMismatch, match="samples is"):
        prepare(recipe_of(config), first)


def test_a_corpus_prepared_before_files_were_looked_into_opens_as_before(tmp_path):
    config = small(tmp_path)
    directory = ensure(config, log=lambda line: None)
    older = without_samples(identity(recipe_of(config)))
    old = os.path.join(config.cache, f"text-{manifests.checksum(older)[:16]}")
    os.rename(directory, old)
    known = manifests.read(old)
    manifests.write_json(os.path.join(old, manifests.NAME), {**known, "identity": older})
    assert ensure(config, log=pytest.fail) == old
    assert prepare(recipe_of(config), old, log=lambda line: None)["identity"] == older
    os.utime(tmp_path / "a.txt", ns=(0, 0))
    assert ensure(config, log=lambda line: None) not in (old, directory)


def small(tmp_path):
    """config.data of a text of one file."""
    (tmp_path / "a.txt").write_text("all the words of the text\n" * 400)
    (tmp_path / "b.txt").write_text("others\n" * 400)
    config = get_config().data
    config.cache, config.task, config.sequence_length = str(tmp_path / "cache"), f"text:{tmp_path}/a.txt@all", 32
    config.held_out = (f"val=text:{tmp_path}/b.txt@all",)
    return config


def test_errors_of_the_preparing_process_arrive_as_they_are(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 2000)
    config = get_config().data
    config.cache, config.task = str(tmp_path / "cache"), f"jsonl:{tmp_path}/a.jsonl@all"
    config.held_out = ("embedded",)
    with pytest.raises(DataError, match=r"config.data.text_field = 'text': [^\n]* the fields seen are body$") as error:
        ensure(config, log=lambda line: None)
    assert (error.value.key, error.value.value) == ("data.text_field", "text")
    assert not list((tmp_path / "cache").glob("*/"))
    config.directory = str(tmp_path / "absent")
    with pytest.raises(CorpusDamaged, match="absent' does not exist"):
        ensure(config)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_preparation_ends_with_its_parent_and_the_next_start_does_it_again(tmp_path):
    """The parent killed alone, while the first shard is being written."""
    (tmp_path / "text.txt").write_bytes(
        b"".join(b"%d some line of text that is not short\n" % i for i in range(250_000))
    )
    arguments = [str(tmp_path / "cache"), f"lines:{tmp_path}/text.txt"]
    parent = subprocess.Popen([sys.executable, "-c", RUN, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("train/*/*.tmp")) and time.monotonic() < deadline and parent.poll() is None:
        time.sleep(0.01)
    (child,) = preparing(tmp_path)
    parent.kill()
    parent.wait()
    while preparing(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child not in preparing(tmp_path)
    assert not list(tmp_path.rglob("manifest.json"))
    again = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert "continuing the preparation" in again.stderr
    assert not list(tmp_path.rglob("*.tmp"))


def preparing(place) -> list[int]:
    """The processes that prepare a corpus below a directory."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes()
            if b"steppe.data.prepare" in line and str(place).encode() in line:
                found.append(int(folder.name))
    return found
