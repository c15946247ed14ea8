"""Reading files: every kind and compression, bad records, what is refused, and the splits."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zipfile

import hypothesis
import hypothesis.strategies as st
import msgspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from steppe.data import readers
from steppe.data.errors import DataError
from steppe.data.readers import plain
from steppe.data.sources import Reading, parse


def zstd(data):
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)  # as the command line tool does


PACKERS = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress}
TEXTS = [f"document {i}\nnaïve 漢字" for i in range(100)]


def read(task, **options):
    (source,) = parse(task)
    place = {name: options.pop(name) for name in ("shard", "shards") if name in options}
    return list(readers.READERS[source.kind].records(source, Reading(**{"held_out_fraction": 0.2, **options}), **place))


def check(task, **options):
    (source,) = parse(task)
    readers.READERS[source.kind].check(source, Reading(**options), print)


def texts(task, **options):
    return [record.text.decode() for record in read(task, **options)]


@pytest.fixture(params=["jsonl", *(f"jsonl.{s}" for s in PACKERS), "parquet", "txt", "txt.gz", "txt.zst", "lines"])
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
    """Compressed as the name says, in two parts one after the other, as parallel compressors write."""
    pack = PACKERS.get(path.rpartition(".")[2])
    if pack:
        data = pack(data[: len(data) // 2]) + pack(data[len(data) // 2 :])
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
    assert [record.fault for record in found] == ["", "json", "field", "field", "field", "json", "", "", ""]
    assert [record.text for record in found if not record.fault] == [b"good", b"", b"\xed\xa0\x80", b"last"]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(-1e9, 1e9)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
FOREIGN = [
    "NaN", "Infinity", "-Infinity", "-", "+1", "01", "1.", ".5", "1e", "'a'", ",", "]", "{", '"', "\\q", "\t", "\x0c",
    " ", "undefined", "True", "/**/", "\ufeff", "\u2028", "\r",
]  # fmt: skip


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(VALUES, st.sampled_from(FOREIGN), st.integers(0, 200), st.integers(0, 3))
@hypothesis.example([-309], "1e", 0, 2)
@hypothesis.example([1.4046781005106314e-188], "1e", 1, 2)
def test_a_line_is_json_where_msgspec_says_so(value, foreign, at, cut):
    """Of values as they are written, and with something put in or taken out."""
    text = json.dumps(value, ensure_ascii=False)
    for line in (text, text[:at] + foreign + text[at + cut :]):
        try:
            wanted = msgspec.json.decode(line)
        except msgspec.ValidationError:  # it stops at a number that it does not hold; of the rest json knows
            try:
                wanted = json.loads(line)
            except ValueError:
                with pytest.raises(ValueError):  # noqa: PT011
                    plain.json_value(line)
            else:
                assert plain.json_value(line) == wanted
        except msgspec.DecodeError:
            with pytest.raises(ValueError):  # noqa: PT011
                plain.json_value(line)
        else:
            assert plain.json_value(line) == wanted


def test_a_null_in_parquet_is_a_bad_record_and_a_missing_column_an_error(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    assert [record.fault for record in read(f"parquet:{path}@all")] == ["", "field", ""]
    with pytest.raises(DataError, match=r"config.data.text_field = 'body'.*which has text$"):
        read(f"parquet:{path}@all", text_field="body")


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_truncated_compressed_file_is_an_error(tmp_path, suffix):
    path = tmp_path / f"x.jsonl.{suffix}"
    write(str(path), b"".join(json.dumps({"text": str(i) * 20}).encode() + b"\n" for i in range(5000)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"^cannot read {path}: [^\n]*(cut short|damaged)[^\n]*$"):
        read(f"jsonl:{path}@all")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=f"^cannot read {path}: it ends in the middle, cut short; [^\n]*$"):
        check(f"jsonl:{path}")


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_flipped_byte_is_an_error(tmp_path, suffix):
    path = tmp_path / f"x.jsonl.{suffix}"
    write(str(path), b"".join(json.dumps({"text": str(i) * 20}).encode() + b"\n" for i in range(5000)))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 3] ^= 0x55
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"^cannot read {path}: it is damaged \([^\n]*$"):
        read(f"jsonl:{path}@all")


def archive(kind):
    made = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(made, "w") as handle:
            handle.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=made, mode=f"w:{'gz' if kind == 'tar.gz' else ''}") as handle:
            handle.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return made.getvalue()


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("jsonl", b' \n[{"text": "a"},\n', "JSON array, not one object per line"),
        ("jsonl", b"\xef\xbb\xbf[\n", "JSON array"),
        ("jsonl", archive("zip"), "a zip archive; Steppe reads plain, .gz, .zst, .bz2 and .xz files"),
        ("text", archive("tar"), "a tar archive"),
        ("lines", archive("tar.gz"), "a tar archive"),
        ("text", b"\x04\x22\x4d\x18" + b"x" * 20, "compressed by lz4"),
        ("lines", "text\n".encode("utf-16"), "UTF-16; convert it"),
        ("jsonl", b"PAR1" + b"x" * 20, "a Parquet file; name it parquet:"),
        ("parquet", b'{"text": "a"}', "not a Parquet file; text:, lines: and jsonl: read other files"),
        ("jsonl", b'{"text":\n "a"\n}\n', "x:1: not a JSON object, nor is any later record"),
    ],
    ids=lambda value: "content" if isinstance(value, bytes) else None,  # an archive holds the second it was made in
)
def test_what_a_file_is_not_is_found_before_it_is_read(tmp_path, kind, content, said):
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(said)) as error:
        check(f"{kind}:{path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "content"), [("text", b"%s"), ("lines", b"short\n%s\n"), ("jsonl", b'{"text": "short"}\n{"text": "%s"}\n')]
)
@pytest.mark.parametrize("packer", [None, *PACKERS])
def test_a_document_of_any_length_in_a_small_file_is_refused_early(tmp_path, monkeypatch, kind, content, packer):
    monkeypatch.setattr(plain, "LONGEST", 1 << 20)
    path, content = tmp_path / "x", content % (b"a" * (3 << 20))
    path.write_bytes(PACKERS[packer](content) if packer else content)
    with pytest.raises(DataError, match=r"cannot read [^\n]*x[:\d]*: one document is longer than 1 MiB") as error:
        texts(f"{kind}:{path}@all")
    assert "\n" not in str(error.value)


def test_a_name_says_nothing_of_what_a_file_is(tmp_path):
    (tmp_path / "plain.jsonl.gz").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "b"}\n')
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(b'{"text": "c"}\n'))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert texts(f"jsonl:{tmp_path}/*.jsonl*@all") == ["c", "a", "b"]
    assert texts(f"lines:{tmp_path}/plain.jsonl.gz@all") == ['{"text": "a"}', '{"text": "b"}']


def test_fields_may_be_nested(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"data": {"text": "a", "id": 1}}\n{"data.text": "b"}\n{"data": ["text"]}\n')
    found = read(f"jsonl:{tmp_path}/a.jsonl@all", text_field="data.text")
    assert [record.text for record in found if not record.fault] == [b"a", b"b"]
    with pytest.raises(DataError, match=r"the fields seen are data, data\.text, data\.id$") as error:
        check(f"jsonl:{tmp_path}/a.jsonl")
    assert error.value.key == "data.text_field"
    pyarrow.parquet.write_table(pyarrow.table({"data": [{"text": "a", "id": 1}, None]}), tmp_path / "a.parquet")
    found = read(f"parquet:{tmp_path}/a.parquet@all", text_field="data.text")
    assert (found[0].text, found[0].fault) == (b"a", "")
    assert found[1].fault == "field"


@pytest.mark.parametrize(
    "name", ["data[v1]", "what?", "a b", "ünï", "x@y", "a + b", "star*", "50% of text:x", "~tilde"]
)
def test_every_name_means_itself(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / f"{name}.txt").write_text("text")
    assert texts(f"text:{folder}/*.txt@all") == ["text"]
    assert texts(f"text:{folder}/{name}.txt") == ["text"]
    (source,) = parse(f"0.5 text:{folder}/{name}.txt@held_out")
    assert (source.where, source.split) == (f"{folder}/{name}.txt", "held_out")
    assert [s.where for s in parse(f"0.5 a=text:{folder}/* + 0.5 embedded")] == [f"{folder}/*", ""]


def test_no_parquet_is_one_line(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=f"^cannot read {tmp_path}/x.parquet: [^\n]*$"):
        read(f"parquet:{tmp_path}/x.parquet")


def test_fingerprint_follows_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    (source,) = parse(f"text:{tmp_path}/*.txt")
    before = plain.fingerprint(source, Reading())
    assert plain.fingerprint(source, Reading()) == before
    path.write_text("three")
    changed = plain.fingerprint(source, Reading())
    (tmp_path / "b.txt").write_text("two")
    assert len({before, changed, plain.fingerprint(source, Reading())}) == 3


@pytest.mark.parametrize("whole", [True, False])
def test_the_sample_follows_the_contents_at_equal_size_and_time(tmp_path, monkeypatch, whole):
    (source,) = parse(f"text:{tmp_path}/*.txt")
    size = 10_000 if whole else 3_000_000
    monkeypatch.setattr(plain, "WHOLE", 100_000)
    for name in ("a.txt", "b.txt", "empty.txt"):
        (tmp_path / name).write_bytes(bytes(size) if name < "c" else b"")
    before, path = plain.sample(source), tmp_path / "b.txt"
    assert plain.sample(source) == before
    status = os.stat(path)
    os.utime(path, ns=(0, status.st_mtime_ns))
    named = plain.fingerprint(source, Reading())
    places = range(0, size, 499) if whole else [0, plain.BLOCK - 1, size - plain.BLOCK, size - 1]
    if not whole:  # and one of the blocks between
        places.append(3 * (size - plain.BLOCK) // (plain.BLOCKS - 1) + 5)
    for place in places:
        with open(path, "r+b") as handle:
            handle.seek(place)
            handle.write(b"x")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert plain.fingerprint(source, Reading()) == named
        assert plain.sample(source) != before, place
        with open(path, "r+b") as handle:
            handle.seek(place)
            handle.write(b"\0")
    assert plain.sample(source) == before
    read = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda *given: read.append(len(real(*given))) or real(*given))
    plain.sample(source)
    assert sum(read) == (0 if whole else 2 * plain.BLOCKS * plain.BLOCK), "bounded, however large the files"


def test_a_glob_without_files_is_an_error(tmp_path):
    with pytest.raises(DataError, match="matches no file"):
        read(f"text:{tmp_path}/*.txt")
