"""Preparing: round trips, counts, overlap, bad records, workers, resuming, immutability, and a full disk."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from steppe.configs.base import get_config
from steppe.data import files, sources
from steppe.data import manifest as manifests
from steppe.data import prepare as preparing
from steppe.data.baselines import baselines, token_counts
from steppe.data.errors import BadRecords, CorpusDamaged, CorpusMismatch, DataError, StorageError
from steppe.data.loader import held_out_rows, held_out_steps, open_corpus, training_rows
from steppe.data.packing import from_record
from steppe.data.prepare import prepare, recipe_of, shards
from steppe.data.readers.built_in import embedded_documents
from steppe.data.vocabulary import load_tokenizer, train_sentencepiece

ROOT = Path(__file__).parents[3]
C4_MODEL = ROOT.parent / "shared" / "t5_cc_all_32000_100extra.model"
WORDS = [text.decode() for _, text in embedded_documents()[:150]]


def quiet(line):
    pass


def recipe(task, **options):
    return recipe_of(get_config().data, task=task, **{"sequence_length": 32, "held_out_fraction": 0.1, **options})


def write_jsonl(path, texts, bad=()):
    path.write_bytes(b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts) + b"".join(bad))
    return f"jsonl:{path}"


@pytest.fixture
def documents():
    return [f"{i}: {WORDS[i][:700]}" for i in range(120)]


def segments(corpus, part):
    """(first, targets) of every segment of every row of a training source or held-out set, in shard order."""
    for record in part.records:
        targets, lengths, firsts, _ = from_record(record, corpus.manifest["dtype"])
        for first, piece in zip(firsts, np.split(targets, np.cumsum(lengths)[:-1]), strict=True):
            yield int(first), piece.tolist()


def contents(directory):
    """{relative path: bytes} of the shards, and the names of everything else."""
    files = {path.relative_to(directory): path for path in directory.rglob("*") if path.is_file()}
    return {name: path.read_bytes() if path.suffix == ".array_record" else b"" for name, path in files.items()}


def texts_of(corpus, part):
    """The documents of a corpus, decoded from its rows."""
    eos, decode = corpus.tokenizer.eos_id, corpus.tokenizer.decode
    if corpus.packing == "concat":
        stream = [token for _, piece in segments(corpus, part) for token in piece]
        pieces = "".join(chr(token) for token in stream).split(chr(eos))[:-1]
        return [decode([ord(c) for c in piece]) for piece in pieces]
    # A rest follows its beginning, but in another row: put them together by the token that joins them.
    found, rests = [], []
    for first, piece in segments(corpus, part):
        (rests if first else found).append(piece)
    whole = [decode(piece) for piece in found if piece[-1] == eos]
    return whole, len(rests)


@pytest.mark.parametrize("shard_count", [1, 3])
def test_round_trip_of_bytes_and_counts(tmp_path, documents, shard_count):
    task = write_jsonl(tmp_path / "a.jsonl", documents)
    manifest = prepare(recipe(task, shards=shard_count), str(tmp_path / "out"), log=quiet)
    corpus = open_corpus(str(tmp_path / "out"), "bytes", 32)
    train, held_out = texts_of(corpus, corpus.train[0]), texts_of(corpus, corpus.held_out["jsonl"])
    assert sorted(train + held_out) == sorted(documents)
    assert len(manifest["train"][0]["shards"]) == shard_count
    for part, texts in (("train", train), ("held_out", held_out)):
        entry = manifest[part][0]
        size = sum(len(text.encode()) for text in texts)
        assert (entry["documents"], entry["bytes"], entry["tokens"]) == (len(texts), size, size + len(texts))
    steps = held_out_steps(corpus, "jsonl", 8)
    batches = [held_out_rows(corpus, "jsonl", i, 8) for i in range(steps)]
    assert sum(batch["bytes"].sum() for batch in batches) == manifest["held_out"][0]["bytes"]
    assert sum(batch["weights"].sum() for batch in batches) == manifest["held_out"][0]["tokens"]


def test_more_shards_than_documents(tmp_path):
    task = write_jsonl(tmp_path / "a.jsonl", WORDS[:3])
    val = write_jsonl(tmp_path / "b.jsonl", ["x"])
    chosen = recipe(f"{task}@all", held_out=(f"val={val}@all",), shards=5, sequence_length=1 << 20)
    manifest = prepare(chosen, str(tmp_path / "out"), log=quiet)
    assert [shard["rows"] for shard in manifest["train"][0]["shards"]] == [1, 1, 1, 0, 0]
    corpus = open_corpus(str(tmp_path / "out"))
    assert texts_of(corpus, corpus.train[0]) == WORDS[:3]
    assert held_out_rows(corpus, "val", 0, 1)["bytes"].tolist() == [1]
    one = recipe(f"{task}@all", held_out=(f"val={val}@all",), sequence_length=1 << 24)
    prepare(one, str(tmp_path / "one"), log=quiet)
    single = open_corpus(str(tmp_path / "one"))
    assert single.train[0].rows == 1
    assert training_rows(single, 0, 5, 2)["weights"].sum() == 2 * single.train[0].tokens


def test_bestfit_keeps_whole_documents(tmp_path, documents):
    task = write_jsonl(tmp_path / "a.jsonl", [text[:100] for text in documents] + [documents[0] * 3])
    prepare(recipe(task, packing="bestfit", sequence_length=128), str(tmp_path / "out"), log=quiet)
    corpus = open_corpus(str(tmp_path / "out"), "bytes", 128, "bestfit")
    whole, rests = texts_of(corpus, corpus.train[0])
    held_out, _ = texts_of(corpus, corpus.held_out["jsonl"])
    assert sorted(whole + held_out) == sorted(text[:100] for text in documents)
    assert rests == -(-(len((documents[0] * 3).encode()) + 1) // 128) - 1


@pytest.mark.skipif(not C4_MODEL.exists(), reason="the C4 vocabulary is not next to the repository")
def test_sentencepiece_corpus_is_the_library_s_own_encoding_of_1000_documents(tmp_path):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(C4_MODEL))
    texts = [f"{i} {WORDS[i % 150][(i // 150) * 500 :][:1500]}" for i in range(1000)]
    task = write_jsonl(tmp_path / "a.jsonl", texts)
    held_out = (write_jsonl(tmp_path / "b.jsonl", WORDS[:3]) + "@all",)
    chosen = recipe(task + "@all", vocabulary=str(C4_MODEL), held_out=held_out)
    manifest = prepare(chosen, str(tmp_path / "out"), log=quiet)
    corpus = open_corpus(str(tmp_path / "out"), str(C4_MODEL), 32)
    stream = [token for _, piece in segments(corpus, corpus.train[0]) for token in piece]
    assert stream == [token for text in texts for token in [*library.encode(text), 1]]
    assert manifest["train"][0]["bytes"] == sum(len(text.encode()) for text in texts)
    assert sum(from_record(record, "uint16")[3] for record in corpus.train[0].records) == manifest["train"][0]["bytes"]
    # The copy inside the directory serves where the original is not at hand.
    assert open_corpus(str(tmp_path / "out")).tokenizer.fingerprint == corpus.tokenizer.fingerprint


@pytest.mark.skipif(not C4_MODEL.exists(), reason="the C4 vocabulary is not next to the repository")
def test_what_a_lossy_vocabulary_drops_is_counted(tmp_path):
    """A document of which no token is left is a bad record; gzip is per byte of the source, not of what is decoded."""
    task = write_jsonl(tmp_path / "a.jsonl", [f"{i} {WORDS[i]}" for i in range(40)] + ["\u200b\ufeff"])
    spaced = [text.replace(" ", "     ") for text in WORDS[40:44]]
    held_out = (write_jsonl(tmp_path / "b.jsonl", spaced) + "@all",)
    chosen = recipe(task + "@all", vocabulary=str(C4_MODEL), held_out=held_out, bad_records=0.1)
    manifest = prepare(chosen, str(tmp_path / "out"), log=quiet)
    (train,), (held,) = manifest["train"], manifest["held_out"]
    assert (train["faults"], train["records"], train["documents"]) == ({"no token": 1}, 41, 40)
    corpus = open_corpus(str(tmp_path / "out"))
    found = baselines(corpus, held["name"], token_counts(corpus, corpus.tokenizer.vocab_size))
    decoded = corpus.tokenizer.decode(
        [id for _, piece in segments(corpus, corpus.held_out[held["name"]]) for id in piece]
    )
    source = sum(len(text.encode()) for text in spaced)
    assert len(decoded.encode()) < 0.8 * source
    assert found["gzip"] == pytest.approx(8 * len(gzip.compress(decoded.encode(), 9)) / source)


def test_own_vocabulary_counts_bytes_exactly(tmp_path, documents):
    model = str(tmp_path / "v.model")
    train_sentencepiece(documents, model, 500)
    tokenizer = load_tokenizer(model)
    for text in [*documents, "", "漢字 🎉 naïve", "  spaces  ", "\n\n"]:
        ids, lengths, counts = tokenizer.measure([text.encode()])
        assert ids.tolist() == tokenizer.encode(text)
        assert lengths.sum() == len(text.encode()) or not len(ids)
        assert (lengths >= 0).all()
        assert counts.tolist() == [len(ids)]


def test_held_out_text_is_left_out_of_training(tmp_path, documents):
    task = write_jsonl(tmp_path / "a.jsonl", [*documents, *documents[:5]])
    val = write_jsonl(tmp_path / "b.jsonl", documents[:10])
    other = write_jsonl(tmp_path / "c.jsonl", documents[10:12])
    chosen = recipe(task + "@all", held_out=(f"val={val}@all", f"other={other}@all"), shards=2)
    manifest = prepare(chosen, str(tmp_path / "out"), log=quiet)
    assert [entry["name"] for entry in manifest["held_out"]] == ["val", "other"]
    assert manifest["train"][0]["overlap"] == 10 + 5 + 2
    corpus = open_corpus(str(tmp_path / "out"))
    assert sorted(texts_of(corpus, corpus.train[0])) == sorted(documents[12:])
    everything = recipe(task, held_out=(f"val={task}@all",))
    with pytest.raises(BadRecords, match=r"train set jsonl .* has no documents"):
        prepare(everything, str(tmp_path / "none"), log=quiet)


BAD = (b"{\n", b'{"body": 1}\n', b'{"text": "  "}\n', b'{"text": "\xff"}\n', b'{"text": "\\ud800"}\n')


def test_bad_records_are_counted_and_refused_over_the_fraction(tmp_path, documents):
    task = write_jsonl(tmp_path / "a.jsonl", documents, BAD)
    lines = []
    manifest = prepare(recipe(task, bad_records=0.05), str(tmp_path / "out"), log=lines.append)
    # Each is in one of the two splits, as a document is.
    found = sum((Counter(manifest[part][0]["faults"]) for part in ("train", "held_out")), Counter())
    assert found == {"empty": 1, "encoding": 1, "field": 1, "json": 2}
    assert any(f"1 field (first: {tmp_path}/a.jsonl:{len(documents) + 2})" in line for line in lines)
    with pytest.raises(BadRecords, match=r"^config\.data\.bad_records = 0\.01: 5 of \d+ records .*\(4\.\d+%[^\n]*$"):
        prepare(recipe(task, bad_records=0.01), str(tmp_path / "refused"), log=quiet)
    assert not (tmp_path / "refused").exists()


def test_a_wrong_field_is_refused_early(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n' * 3000)
    with pytest.raises(DataError, match=r"^config\.data\.text_field = 'text': .*the fields seen are body$"):
        prepare(recipe(f"jsonl:{path}@all", held_out=("embedded",)), str(tmp_path / "out"), log=quiet)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [0.01, 0.05], ids=["refused", "finished"])
def test_files_that_a_preparation_did_not_make_stay(tmp_path, documents, bad):
    chosen = recipe(write_jsonl(tmp_path / "a.jsonl", documents, BAD), bad_records=bad)
    out = tmp_path / "out"
    own = ["notes.txt", "notes.txt.tmp", "train/jsonl/mine", "train/jsonl/00000-of-00001.array_record.bak", "a/b/c.tmp"]
    for name in own:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    manifests.write_json(str(out / preparing.PLAN), preparing.identity(chosen))  # of one that was interrupted
    if bad < 0.04:
        with pytest.raises(BadRecords):
            prepare(chosen, str(out), log=quiet)
        assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(own)
    else:
        prepare(chosen, str(out), log=quiet)
    assert [(out / name).read_text() for name in own] == own


def test_workers_do_not_change_the_corpus_and_a_killed_preparation_resumes(tmp_path, documents):
    """Two real worker processes, killed with SIGKILL as soon as one shard is finished, then run again."""
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [text * 8 for text in documents]}), parquet)
    arguments = [f"--config.data.task=parquet:{parquet}", "--config.data.held_out_fraction=0.1", "--shards=4"]
    arguments += ["--config.data.sequence_length=32"]
    chosen = recipe(f"parquet:{parquet}", shards=4)
    alone = prepare(chosen, str(tmp_path / "alone"), log=quiet)
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "steppe.scripts.prepare_data", "--config=base", f"--out={out}"]
    first = subprocess.Popen(
        [*command, "--workers=2", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("train/*/*.json")) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("train/*/*.array_record")}
    assert kept
    with pytest.raises(CorpusDamaged, match="unfinished preparation"):
        open_corpus(str(out))
    with pytest.raises(CorpusMismatch, match="sequence_length is 32 there, 64 now"):
        prepare(chosen._replace(sequence_length=64), str(out), log=quiet)
    lines = []
    resumed = prepare(chosen, str(out), workers=1, log=lines.append)
    assert lines[0] == f"continuing the preparation in {out}"
    for name, written in kept.items():
        assert (out / "train" / "parquet" / name).stat().st_mtime_ns == written
    assert {key: value for key, value in resumed.items() if key not in ("created", "checksum")} == {
        key: value for key, value in alone.items() if key not in ("created", "checksum")
    }
    assert contents(out) == contents(tmp_path / "alone")


def test_a_damaged_finished_shard_is_written_again_on_resume(tmp_path, documents):
    task = write_jsonl(tmp_path / "a.jsonl", documents)
    chosen, out = recipe(task, shards=2), str(tmp_path / "out")
    expected = prepare(chosen, str(tmp_path / "other"), log=quiet)
    # As an interruption leaves it: a plan and one finished shard, which then loses its end.
    os.makedirs(out)
    manifests.write_json(os.path.join(out, preparing.PLAN), preparing.identity(chosen))
    job = shards.Job("held_out", sources.held_out_sources(chosen.task, ())[0], 0, 1)
    shards.take(out, chosen, job, "uint16")
    assert shards.finished(out, job)
    with open(os.path.join(out, job.file), "r+b") as handle:
        handle.truncate(100)
    assert shards.finished(out, job) is None
    assert prepare(chosen, out, log=quiet)["fingerprint"] == expected["fingerprint"]


def test_changed_sources_are_not_mixed_into_an_unfinished_preparation(tmp_path, documents):
    task = write_jsonl(tmp_path / "a.jsonl", documents)
    out = str(tmp_path / "out")
    os.makedirs(out)
    manifests.write_json(os.path.join(out, preparing.PLAN), preparing.identity(recipe(task)))
    write_jsonl(tmp_path / "a.jsonl", documents[1:])
    with pytest.raises(CorpusMismatch, match="unfinished part of another preparation: samples is"):
        prepare(recipe(task), out, log=quiet)


def test_a_finished_directory_is_immutable(tmp_path, documents):
    task = write_jsonl(tmp_path / "a.jsonl", documents)
    out = tmp_path / "out"
    prepare(recipe(task), str(out), log=quiet)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    lines = []
    prepare(recipe(task), str(out), log=lines.append)
    assert lines == [f"{out} is already prepared and intact"]
    with pytest.raises(CorpusMismatch, match="finished and holds another preparation: packing is 'concat' there"):
        prepare(recipe(task, packing="bestfit"), str(out), log=quiet)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert all(path.stat().st_mode & 0o222 == 0 for path in before if path.is_file())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match="exists and is not a preparation"):
        prepare(recipe(task), str(tmp_path / "full"), log=quiet)


def test_a_second_preparation_of_the_same_directory_is_refused(tmp_path, documents):
    task = write_jsonl(tmp_path / "a.jsonl", documents)
    out = tmp_path / "out"
    out.mkdir()
    with files.lock(out / preparing.LOCK), pytest.raises(DataError, match="another process is preparing it"):
        prepare(recipe(task), str(out), log=quiet)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("megabytes", [1, 3])
def test_a_full_disk_is_an_error_and_the_preparation_continues_after_room_is_made(tmp_path, documents, megabytes):
    task = write_jsonl(tmp_path / "a.jsonl", [text * 40 for text in documents])
    chosen = recipe(task, shards=3, sequence_length=64)
    expected = prepare(chosen, str(tmp_path / "elsewhere"), log=quiet)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(StorageError, match=r"^cannot write [^\n]*MB free[^\n]*run again$"):
            prepare(chosen, str(disk / "out"), log=quiet)
        assert not list(disk.rglob("*.tmp"))
        with pytest.raises(CorpusDamaged, match="unfinished preparation" if megabytes > 1 else "unfinished|not exist"):
            open_corpus(str(disk / "out"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert prepare(chosen, str(disk / "out"), log=quiet)["fingerprint"] == expected["fingerprint"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("sequence_length", 0), ("packing", "none"), ("shards", 0), ("held_out_fraction", 1.0)),
        *(("bad_records", -0.1), ("text_field", ""), ("task", "web:x"), ("held_out", ("x",))),
    ],
)
def test_impossible_values_name_the_key(key, value):
    with pytest.raises(DataError, match=rf"^config\.data\.{key} = [^\n]*$"):
        recipe_of(get_config().data, **{key: value})
