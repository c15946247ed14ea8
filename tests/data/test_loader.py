"""Loading: a pure function of (seed, step, row), the same in every process, and errors instead of another corpus."""

import hashlib
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from steppe.configs.base import get_config
from steppe.data import loader
from steppe.data import manifest as manifests
from steppe.data.errors import CorpusDamaged, CorpusMismatch, DataError
from steppe.data.loader import held_out_rows, held_out_steps, open_corpus, prefetch, training_rows
from steppe.data.prepare import prepare, recipe_of
from steppe.data.readers.built_in import embedded_documents

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A mixture of two sources in several shards, both packings' features apart from bestfit."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, part in (("a", slice(0, 60)), ("b", slice(60, 80))):
        (folder / name).mkdir()
        for module, text in embedded_documents()[part]:
            (folder / name / module.replace("/", "_")).write_bytes(text[:1000])
    task = f"0.75 a=text:{folder}/a/* + 0.25 b=text:{folder}/b/*"
    recipe = recipe_of(get_config().data, task=task, sequence_length=64, shards=3, held_out_fraction=0.15)
    prepare(recipe, str(folder / "out"), log=lambda line: None)
    return str(folder / "out")


@pytest.fixture(scope="module")
def corpus(directory):
    return open_corpus(directory, "bytes", 64)


def digest(batch):
    hashed = hashlib.sha256()
    for name in sorted(batch):
        hashed.update(name.encode() + batch[name].tobytes())
    return hashed.hexdigest()


def test_a_corpus_begins_with_the_first_words_of_its_held_out_text(directory, corpus):
    begin = loader.beginning(corpus)
    assert 0 < len(begin) <= 24
    assert "\n" not in begin
    files = (Path(directory).parent / "a").iterdir()
    assert any(path.read_text().lstrip().startswith(begin) for path in files)
    assert begin.startswith(loader.beginning(corpus, 8))


def test_a_batch_is_the_union_of_its_rows(corpus):
    whole = training_rows(corpus, 7, 5, 12)
    for rows in (range(12), range(4, 8), [11, 0, 3], np.arange(6), []):
        part = training_rows(corpus, 7, 5, 12, rows)
        for name, value in part.items():
            assert (value == whole[name][list(rows)]).all()
            assert len(value) == len(rows)
    with pytest.raises(DataError, match=r"rows must lie in \[0, 12\)"):
        training_rows(corpus, 7, 5, 12, [12])


def test_the_stream_does_not_depend_on_how_it_is_cut_into_steps(corpus):
    long = training_rows(corpus, 3, 0, 48)
    for step in range(6):
        assert (training_rows(corpus, 3, step, 8)["targets"] == long["targets"][8 * step : 8 * step + 8]).all()
    many = 2 * loader.READ_AHEAD + 40  # read in one call, and by blocks of several small batches
    long = training_rows(corpus, 3, 1, many, before=5)["targets"]
    for step in (0, 1, loader.READ_AHEAD // 8, many // 8 - 1):
        found = training_rows(corpus, 3, step, 8, before=5 + many)["targets"]
        assert (found == long[8 * step : 8 * step + 8]).all()


def test_held_out_rows_do_not_depend_on_how_they_are_cut_into_batches(corpus):
    name = max(corpus.held_out, key=lambda name: corpus.held_out[name].rows)
    whole = held_out_rows(corpus, name, 0, loader.READ_AHEAD)["targets"]
    assert corpus.held_out[name].rows > 20
    for index in range(-(-len(whole) // 12)):
        part = held_out_rows(corpus, name, index, 12)["targets"]
        expected = whole[12 * index : 12 * index + 12]
        assert (part[: len(expected)] == expected).all()
        assert not part[len(expected) :].any()


def test_seeds_and_steps_differ(corpus):
    digests = {digest(training_rows(corpus, seed, step, 8)) for seed in range(5) for step in range(5)}
    assert len(digests) == 25
    # A run with the next seed is not this run one epoch later.
    steps = sum(part.rows for part in corpus.train)
    later = training_rows(corpus, 0, steps, 8)
    assert digest(later) != digest(training_rows(corpus, 1, 0, 8))


def read_order(corpus, seed, rows):
    """[(source, row)] of the first `rows` rows of the stream."""
    stream = loader._stream(corpus, seed)
    return [stream[i] for i in range(rows)]


def test_every_epoch_is_a_new_permutation_and_weights_are_kept(corpus):
    order = read_order(corpus, 0, 6000)
    share = sum(part == 0 for part, _ in order) / len(order)
    assert abs(share - 0.75) < 0.002
    for number, part in enumerate(corpus.train):
        rows = [row for owner, row in order if owner == number]
        epochs = [rows[i : i + part.rows] for i in range(0, len(rows) - part.rows + 1, part.rows)]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(part.rows)) for epoch in epochs)
        assert epochs[0] != epochs[1]
        assert epochs[0] != sorted(epochs[0])
    # What epochs() promises is what is read.
    told = corpus.epochs(6000 * 64)
    for number, part in enumerate(corpus.train):
        assert told[part.name] == pytest.approx(sum(owner == number for owner, _ in order) / part.rows, rel=0.01)
    assert corpus.epoch_tokens == 64 * sum(part.rows for part in corpus.train)


def test_golden_order():
    """The order of rows is part of every published run. If this fails after an upgrade of grain, runs of the old one
    cannot be continued with the new one: pin grain for runs under way and say so in the release, then change it."""

    class FakeCorpus:
        train = (loader.Rows("embedded", 1.0, 1000, 0, 0, 0, None),)

    stream = loader._stream(FakeCorpus(), 0)
    assert [stream[i][1] for i in (0, 1, 2, 999, 1000)] == GOLDEN


GOLDEN = [333, 473, 162, 271, 240]


def test_held_out_rows_cover_each_row_once(corpus):
    for name, part in corpus.held_out.items():
        steps = held_out_steps(corpus, name, 7)
        batches = [held_out_rows(corpus, name, i, 7) for i in range(steps)]
        assert sum(batch["weights"].sum() for batch in batches) == part.tokens
        assert sum(batch["bytes"].sum() for batch in batches) == part.bytes
        seen = [row.tobytes() for batch in batches for row in batch["targets"] if row.any()]
        assert len(seen) == part.rows == steps * 7 - sum((~batch["targets"].any(1)).sum() for batch in batches)
        parts = np.concatenate([held_out_rows(corpus, name, 1, 7, [r])["targets"] for r in range(7)])
        assert (parts == batches[1]["targets"]).all()
    with pytest.raises(DataError, match=r"held-out set 'c': .* has a, b"):
        held_out_rows(corpus, "c", 0, 4)


WORKER = """
import hashlib, sys
import numpy as np
from steppe.data.loader import open_corpus, prefetch, training_rows
directory, process, processes, workers, first, last = sys.argv[1], *map(int, sys.argv[2:])
corpus = open_corpus(directory, "bytes", 64)
mine = range(process * 8 // processes, (process + 1) * 8 // processes)
with prefetch(lambda step: training_rows(corpus, 5, step, 8, mine), first, last, 3, workers) as batches:
    for step, batch in batches:
        for i, row in enumerate(mine):
            print(step, row, hashlib.sha256(b"".join(batch[name][i].tobytes() for name in sorted(batch))).hexdigest())
assert not any(name.startswith(("tensorflow", "seqio")) for name in sys.modules), "tensorflow was imported"
"""


def global_rows(directory, processes, workers, steps):
    """{(step, row): digest} as read by real processes, each its part of every batch."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, directory, *map(str, (i, processes, workers, *steps))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    found = {}
    for process in running:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        for line in output.splitlines():
            step, row, hashed = line.split()
            assert (int(step), int(row)) not in found
            found[int(step), int(row)] = hashed
    return found


def test_1_2_and_4_processes_0_and_4_workers_and_a_restart_read_the_same_batches(directory):
    reference = global_rows(directory, 1, 0, (0, 40))
    assert len(reference) == 40 * 8
    assert global_rows(directory, 2, 4, (0, 40)) == reference
    # Stopped after step 24, continued on another number of processes.
    assert global_rows(directory, 4, 4, (0, 25)) | global_rows(directory, 1, 4, (25, 40)) == reference


def test_prefetch_reads_ahead_in_order_and_measures_the_wait():
    reading = []

    def read(step):
        reading.append(step)
        time.sleep(0.02)
        return step * step

    with prefetch(read, 3, 9, depth=2) as batches:
        time.sleep(0.1)
        assert reading == [3, 4]
        got = []
        for step, value in batches:
            got.append((step, value))
            time.sleep(0.04)
    assert got == [(step, step * step) for step in range(3, 9)]
    assert batches.waited < 0.04
    with prefetch(read, 0, 3, depth=0, workers=0) as batches:
        assert [step for step, _ in batches] == [0, 1, 2]
        assert batches.waited >= 0.06
    assert list(prefetch(read, 5, 5)) == []


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_prefetch_raises_where_the_failing_batch_would_be_and_stops(workers):
    def read(step):
        if step == 6:
            raise CorpusDamaged("row 6")
        return step

    batches = prefetch(read, 4, 100, 3, workers)
    assert [next(batches)[0], next(batches)[0]] == [4, 5]
    with pytest.raises(CorpusDamaged, match=r"^row 6"):
        next(batches)
    batches.close()
    batches.close()
    deadline = time.monotonic() + 5
    while any("grain-prefetch" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any("grain-prefetch" in thread.name for thread in threading.enumerate())


def test_a_mismatch_names_key_value_and_directory(corpus, directory, tmp_path):
    with pytest.raises(CorpusMismatch, match=r"config.data.sequence_length is 128, but .* was prepared with 64"):
        open_corpus(directory, "bytes", 128)
    with pytest.raises(CorpusMismatch, match=r"config.data.packing is bestfit, but .* was prepared with concat"):
        open_corpus(directory, "bytes", 64, "bestfit")
    from steppe.data.vocabulary import train_sentencepiece

    model = str(tmp_path / "v.model")
    train_sentencepiece([text.decode() for _, text in embedded_documents()[:20]], model, 400)
    with pytest.raises(CorpusMismatch, match=f"config.data.vocabulary is {model} .* was prepared with bytes"):
        open_corpus(directory, model, 64)


@pytest.fixture
def copy(directory, tmp_path):
    """A writable copy, to be damaged."""
    shutil.copytree(directory, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "copy"


def shard_files(folder):
    return sorted(folder.rglob("*.array_record"))


def test_damage_is_an_error_that_names_the_file(copy):
    intact = {path: path.read_bytes() for path in [*shard_files(copy), copy / manifests.NAME]}
    generator = np.random.default_rng(0)
    open_corpus(str(copy), "bytes", 64)
    for path, data in intact.items():
        positions = generator.integers(0, len(data), 25)
        damaged = [data[:p] + bytes([data[p] ^ 1 << int(p) % 8]) + data[p + 1 :] for p in positions]
        damaged += [data[:-1], data[: len(data) // 2], b"", data + b"x", next(d for d in intact.values() if d != data)]
        for content in [*damaged, None]:
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(CorpusDamaged, match=r"^[^\n]*$") as error:
                open_corpus(str(copy), "bytes", 64)
            assert path.name in str(error.value)
        path.write_bytes(data)
    open_corpus(str(copy), "bytes", 64)


def test_what_verification_by_size_leaves_unread_is_found_when_it_is_read(copy):
    """A flipped byte in a shard that was not hashed is an error when its row is read, never another row."""
    path = shard_files(copy / "train")[0]
    data = path.read_bytes()
    written = np.flatnonzero(np.frombuffer(data, np.uint8))
    rows = sum(part.rows for part in open_corpus(str(copy)).train)
    expected = digest(training_rows(open_corpus(str(copy)), 0, 0, 3 * rows))
    found = 0
    for position in np.random.default_rng(1).choice(written, 12, replace=False):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        try:
            corpus = open_corpus(str(copy), "bytes", 64, verify="sizes")
            # Some bytes describe the file, not its rows: then all rows are as they were.
            assert digest(training_rows(corpus, 0, 0, 3 * rows)) == expected
        except CorpusDamaged:
            found += 1
    assert found > 6


def test_sizes_alone_find_a_truncated_or_missing_shard(copy):
    path = shard_files(copy / "train")[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorpusDamaged, match=r"has \d+ bytes, the manifest says \d+"):
        open_corpus(str(copy), verify="sizes")
    path.unlink()
    with pytest.raises(CorpusDamaged, match="is missing"):
        open_corpus(str(copy), verify="sizes")


def test_a_foreign_or_unfinished_directory_is_refused(copy, tmp_path):
    with pytest.raises(CorpusDamaged, match=r"^config\.data\.directory = '[^']*absent' does not exist$"):
        open_corpus(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusDamaged, match=r"empty' has no manifest.json; it is not a prepared directory$"):
        open_corpus(str(tmp_path / "empty"))
    manifest = manifests.read(str(copy))
    manifests.write_json(str(copy / manifests.NAME), {**manifest, "format": 99})
    with pytest.raises(CorpusDamaged, match="has format 99; this version reads 1"):
        open_corpus(str(copy))
    # A manifest that is whole, but of another corpus.
    train = [{**manifest["train"][0], "rows": manifest["train"][0]["rows"] + 1}, manifest["train"][1]]
    manifests.write_json(str(copy / manifests.NAME), {**manifest, "train": train})
    with pytest.raises(CorpusDamaged, match=r"a has \d+ rows, the manifest says"):
        open_corpus(str(copy))
    with pytest.raises(DataError, match=r"^config\.data\.verify = 'maybe': must be one of auto, full, sizes$"):
        open_corpus(str(copy), verify="maybe")
