"""Reading text: the grammar of tasks, every file kind, bad records, and the splits."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from steppe.data import sources
from steppe.data.errors import DataError
from steppe.data.sources import held_out_sources, parse, records

TEXTS = [f"document {i}\nnaïve 漢字" for i in range(100)]


def read(task, **options):
    (source,) = parse(task)
    settings = {"text_field": "text", "held_out_fraction": 0.2, **options}
    return list(records(source, **settings))


def texts(task, **options):
    return [record.text.decode() for record in read(task, **options)]


@pytest.fixture(params=["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt", "txt.gz", "txt.zst", "lines"])
def corpus(request, tmp_path):
    """(task, documents) of TEXTS in three files of one format."""
    kind = request.param
    documents = [text.replace("\n", " ") for text in TEXTS] if kind == "lines" else TEXTS
    for part in range(3):
        mine, stem = documents[part::3], tmp_path / f"part{part}"
        if kind.startswith("jsonl"):
            data = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(mine)).encode()
        elif kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": mine, "id": list(range(len(mine)))}), f"{stem}.parquet")
            continue
        elif kind == "lines":
            data = "\n".join(mine).encode()
        else:
            for i, text in enumerate(mine):
                write(f"{stem}-{i}.{kind}", text.encode())
            continue
        write(f"{stem}.{kind}", data)
    name = {"txt": "text", "lines": "lines", "parquet": "parquet", "jsonl": "jsonl"}[kind.split(".")[0]]
    return f"{name}:{tmp_path}/*.{kind}@all", documents


def write(path, data):
    if path.endswith(".gz"):
        data = gzip.compress(data)
    elif path.endswith(".zst"):
        half = len(data) // 2  # two frames, as parallel compressors write
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    with open(path, "wb") as handle:
        handle.write(data)


def test_every_format_gives_every_document_once(corpus):
    task, documents = corpus
    assert sorted(texts(task)) == sorted(documents)
    assert texts(task) == texts(task)


@pytest.mark.parametrize("shards", [2, 3, 7, 150])
def test_shards_partition_the_records(corpus, shards):
    task, documents = corpus
    parts = [texts(task, shard=shard, shards=shards) for shard in range(shards)]
    assert sorted(text for part in parts for text in part) == sorted(documents)
    if shards == 7:
        assert sum(bool(part) for part in parts) == 7


def test_train_and_held_out_are_complementary(corpus):
    task, documents = corpus
    base = task.removesuffix("@all")
    train, held_out = texts(base), texts(base + "@held_out")
    assert sorted(train + held_out) == sorted(documents)
    assert 5 <= len(held_out) <= 40
    assert texts(base, held_out_fraction=0.0) == texts(task)


def test_bad_records_are_told_apart(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [
        b'{"text": "good"}',
        b"{",
        b'{"body": "x"}',
        b'{"text": 3}',
        b"[1]",
        b'{"text": "\xff"}',
        b"",
        b'{"text": ""}',
    ]
    path.write_bytes(b"\n".join([*lines, b'{"text": "\\ud800"}', b'{"text": "last"}']))
    found = read(f"jsonl:{path}@all")
    assert [record.fault for record in found] == ["", "json", "field", "field", "field", "json", "empty", "", "", ""]
    assert [record.text for record in found if not record.fault] == [b"good", b"", b"\xed\xa0\x80", b"last"]


def test_a_null_in_parquet_is_a_bad_record_and_a_missing_column_an_error(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    assert [record.fault for record in read(f"parquet:{path}@all")] == ["", "field", ""]
    with pytest.raises(DataError, match=r"config.data.text_field='body'.*it has text$"):
        read(f"parquet:{path}@all", text_field="body")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_compressed_file_is_an_error(tmp_path, suffix):
    path = tmp_path / f"x.jsonl{suffix}"
    write(str(path), b"".join(json.dumps({"text": str(i) * 20}).encode() + b"\n" for i in range(5000)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"^cannot read {path}: [^\n]*$"):
        read(f"jsonl:{path}@all")


def test_no_parquet_is_one_line(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=f"^cannot read {tmp_path}/x.parquet: [^\n]*$"):
        read(f"parquet:{tmp_path}/x.parquet")


def test_embedded_corpus_is_real_text_of_this_python():
    documents = sources.embedded_documents()
    names = [name for name, _ in documents]
    assert names == sorted(set(names))
    assert {"argparse.py", "asyncio/events.py", "pydoc_data/topics/for"} <= set(names)
    assert not any(name.startswith(("test/", "idlelib/idle_test/", "site-packages/")) for name in names)
    assert sum(len(text) for _, text in documents) > 5_000_000
    train, held_out = texts("embedded"), texts("embedded@held_out")
    assert len(train) + len(held_out) == len(documents)
    assert len(held_out) > 20


def test_topics_are_the_prose_of_the_embedded_corpus_split_as_there():
    documents = dict(sources.topic_documents())
    embedded = dict(sources.embedded_documents())
    assert documents == {name: text for name, text in embedded.items() if name.startswith("pydoc_data/topics/")}
    assert b"statement" in documents["pydoc_data/topics/for"]
    assert 300_000 < sum(map(len, documents.values())) < 1_500_000
    held_out = set(texts("topics@held_out"))
    assert 0 < len(held_out) < len(documents)
    assert held_out == set(texts("embedded@held_out")) & {text.decode() for text in documents.values()}
    prose, code = (sources.fingerprint(*parse(task)) for task in ("topics", "embedded"))
    assert prose != code


def test_fingerprint_follows_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    (source,) = parse(f"text:{tmp_path}/*.txt")
    before = sources.fingerprint(source)
    assert sources.fingerprint(source) == before
    path.write_text("three")
    changed = sources.fingerprint(source)
    (tmp_path / "b.txt").write_text("two")
    assert len({before, changed, sources.fingerprint(source)}) == 3


def test_grammar():
    a, b = parse("0.7 c4=tfds:c4/en:3.1.0@train[:1%] + 0.3 jsonl:/d/year=2020/*.jsonl.gz")
    assert a == ("c4", "tfds", "c4/en:3.1.0", "train[:1%]", 0.7)
    assert b == ("jsonl", "jsonl", "/d/year=2020/*.jsonl.gz", "train", 0.3)
    assert parse("tfds:lm1b")[0].name == "lm1b"
    assert parse("embedded") == (("embedded", "embedded", "", "train", 1.0),)
    assert held_out_sources("0.5 embedded + 0.5 text:x", ())[1] == ("text", "text", "x", "held_out", 1.0)
    assert held_out_sources("embedded", ("val=lines:v@all", "embedded"))[0] == ("val", "lines", "v", "all", 1.0)


@pytest.mark.parametrize(
    "task",
    [
        *(
            "",
            "embeded",
            "embedded:x",
            "topics:x",
            "jsonl",
            "jsonl:",
            "0 embedded + 1 text:x",
            "-1 text:x",
            "embedded + 0.5 text:x",
        ),
        *("0.5 text:a + 0.5 text:b", "embedded@validation", "web:x", "nan text:x"),
    ],
)
def test_bad_tasks_name_the_key(task):
    with pytest.raises(DataError, match=r"^config\.data\.task=[^\n]*$"):
        parse(task)


def test_bad_held_out_sets_name_the_key():
    for held_out in (("nothing",), ("text:a", "text:b")):
        with pytest.raises(DataError, match=r"^config\.data\.held_out=[^\n]*$"):
            held_out_sources("embedded", held_out)


def test_a_glob_without_files_is_an_error(tmp_path):
    with pytest.raises(DataError, match="matches no file"):
        read(f"text:{tmp_path}/*.txt")
