"""Where text comes from, without tensorflow: the embedded corpus, local files, and the grammar that names them.

A task is `SOURCE` or `WEIGHT SOURCE + WEIGHT SOURCE ...`, a source `[NAME=]KIND[:WHERE][@SPLIT]`:

    embedded                        this Python's standard library, always at hand
    topics                          its help topics, English prose, of which embedded holds a part too
    text:GLOB                       every file is a document
    lines:GLOB                      every line is a document
    jsonl:GLOB                      every line is a JSON object, its document under config.data.text_field
    parquet:GLOB                    every row is a record, its document in the column config.data.text_field
    tfds:NAME[/CONFIG][:VERSION]    a TFDS builder found in config.data.tfds_dir

Text, lines and JSONL may be compressed (.gz, .zst). SPLIT is train (default), held_out or all; for tfds any of the
builder's.
"""

import gzip
import io
import json
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from steppe.data.errors import DataError
from steppe.data.files import matching, opened

BUILT_IN = ("embedded", "topics")  # kinds without a place
KINDS = (*BUILT_IN, "text", "lines", "jsonl", "parquet", "tfds")
SPLITS = ("train", "held_out", "all")
_SOURCE = re.compile(
    r"(?:(?P<weight>[0-9.eE-]+)\s+)?(?:(?P<name>\w[\w.-]*)=)?(?P<kind>[a-z]+)(?::(?P<where>.+?))?(?:@(?P<split>[^@/]+))?"
)


class Source(NamedTuple):
    """One component of a task or one held-out set."""

    name: str
    kind: str
    where: str  # glob or TFDS name; "" for BUILT_IN
    split: str
    weight: float  # share of rows in a mixture, relative to the others


class Record(NamedTuple):
    """One record as read: its text, or the reason why there is none."""

    text: bytes
    fault: str = ""  # "" | json | field


def parse(task: str, key: str = "config.data.task", split: str = "train") -> tuple[Source, ...]:
    """Parses `task` (grammar above); `split` is the default split. Names default to the kind or the TFDS name."""
    parts = [part.strip() for part in task.split(" + ")]
    sources = [_parse_source(part, key, split, weighted=len(parts) > 1) for part in parts]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                f"{key}={task!r}: two sources are called {name!r}; name them, as in a={parts[0].split()[-1]}"
            )
    return tuple(sources)


def _parse_source(part: str, key: str, split: str, weighted: bool) -> Source:
    accepted = f"accepted: [WEIGHT ][NAME=]KIND[:WHERE][@SPLIT], KIND one of {', '.join(KINDS)}"
    match = _SOURCE.fullmatch(part)
    if not match or match["kind"] not in KINDS:
        raise DataError(f"{key}={part!r}: {accepted}")
    kind, where = match["kind"], match["where"] or ""
    if (kind in BUILT_IN) == bool(where):
        raise DataError(f"{key}={part!r}: {kind} {'takes no' if where else 'needs a'} place; {accepted}")
    try:
        weight = float(match["weight"]) if match["weight"] else 1.0
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf") or (weighted and not match["weight"]):
        raise DataError(f"{key}={part!r}: every source of a mixture needs a weight > 0, as in '0.7 {part.split()[-1]}'")
    split = match["split"] or split
    if kind != "tfds" and split not in SPLITS:
        raise DataError(f"{key}={part!r}: split {split!r}; accepted for {kind}: {', '.join(SPLITS)}")
    name = match["name"] or (re.sub(r"[^\w.-]+", "_", where) if kind == "tfds" else kind)
    return Source(name, kind, where, split, weight)


def held_out_sources(task: str, held_out: tuple[str, ...]) -> tuple[Source, ...]:
    """The held-out sets of a run: those named by config.data.held_out, else the held_out split of every source."""
    if not held_out:
        return tuple(source._replace(split="held_out", weight=1.0) for source in parse(task))
    sources = tuple(parse(entry, "config.data.held_out", "held_out")[0] for entry in held_out)
    if len({source.name for source in sources}) < len(sources):
        raise DataError(f"config.data.held_out={held_out!r}: two sets share a name; name them, as in a=text:GLOB@all")
    return sources


def records(
    source: Source, text_field: str, held_out_fraction: float, shard: int = 0, shards: int = 1
) -> Iterator[Record]:
    """Reads every `shards`-th record of a source that is not TFDS, in a fixed order, beginning at `shard`.

    Whole files are dealt out when there are at least `shards` of them, single records otherwise. Every record is in
    exactly one shard. A train or held_out split is drawn by a hash of the text (BUILT_IN: of its name).
    """
    threshold = round(held_out_fraction * 2**32)

    def chosen(text: bytes) -> bool:
        if source.split == "all":
            return True
        return (xxhash.xxh3_64_intdigest(text) % 2**32 < threshold) == (source.split == "held_out")

    if source.kind in BUILT_IN:
        listed = [(name, text) for name, text in built_in_documents(source.kind) if chosen(name.encode())]
        yield from (Record(text) for _, text in listed[shard::shards])
        return
    paths = files(source)
    by_file = len(paths) >= shards
    for index, path in enumerate(paths):
        if by_file and index % shards != shard:
            continue
        skip = None if by_file else (lambda number, index=index: (number + index) % shards != shard)
        try:
            for record in _read_file(source.kind, path, text_field, skip):
                # A record that cannot be read counts once, where the training split is read.
                if chosen(record.text) if not record.fault else source.split != "held_out":
                    yield record
        except (OSError, EOFError, ValueError, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"cannot read {path}: {' '.join(str(error).split()) or type(error).__name__}") from error


def files(source: Source) -> list[str]:
    """Paths that the glob of a file source matches, sorted."""
    paths = matching(source.where)
    if not paths:
        raise DataError(f"config.data: {source.kind}:{source.where} matches no file")
    return paths


def fingerprint(source: Source, tfds_dir: str = "") -> str:
    """Changes when the source's text may have changed: contents of what is built in, sizes and times of files."""
    digest = xxhash.xxh3_128()
    if source.kind in BUILT_IN:
        for name, text in built_in_documents(source.kind):
            digest.update(f"{name}\0{len(text)}\0".encode() + text)
    elif source.kind == "tfds":
        digest.update(f"{source.where}\0{tfds_dir}".encode())
    else:
        for path in files(source):
            status = os.stat(path)
            digest.update(f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _read_file(kind: str, path: str, text_field: str, skip) -> Iterator[Record]:
    if kind == "parquet":
        yield from _read_parquet(path, text_field, skip)
        return
    with _open(path) as handle:
        if kind == "text":
            if not (skip and skip(0)):
                yield Record(handle.read())
            return
        for number, line in enumerate(handle):
            if skip and skip(number):
                continue
            line = line.rstrip(b"\r\n")
            yield Record(line) if kind == "lines" else _json_record(line, text_field)


def _open(path: str) -> io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.open(opened(path), "rb")
    if path.endswith(".zst"):
        import zstandard

        return io.BufferedReader(_Complete(path, zstandard), 1 << 20)
    return opened(path)


class _Complete(io.RawIOBase):
    """Raw reader of all frames of a .zst file; unlike the library's reader, a file cut inside a frame is an error."""

    def __init__(self, path: str, zstandard):
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._decompressor = zstandard.ZstdDecompressor
        self._frame = self._decompressor().decompressobj()
        self._pending, self._started = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._pending:
            chunk = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._started = self._decompressor().decompressobj(), False
            chunk = chunk or self._file.read(1 << 18)
            if not chunk:
                if self._started:
                    raise EOFError("the compressed file ends inside a frame")
                return 0
            self._started = True
            self._pending = self._frame.decompress(chunk)
        taken = min(len(buffer), len(self._pending))
        buffer[:taken] = self._pending[:taken]
        self._pending = self._pending[taken:]
        return taken

    def close(self) -> None:
        self._file.close()
        super().close()


def _json_record(line: bytes, text_field: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError:  # also bytes that are no UTF-8
        return Record(line, "json" if line.strip() else "empty")
    text = value.get(text_field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        return Record(line, "field")
    return Record(text.encode("utf-8", "surrogatepass"))  # lone surrogates are then found to be no UTF-8


def _read_parquet(path: str, text_field: str, skip) -> Iterator[Record]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        if text_field not in table.schema_arrow.names:
            have = ", ".join(table.schema_arrow.names)
            raise DataError(f"config.data.text_field={text_field!r}: {path} has no such column; it has {have}")
        number = 0
        for batch in table.iter_batches(columns=[text_field], batch_size=1024):
            for value in batch.column(0).to_pylist():
                if not (skip and skip(number)):
                    if isinstance(value, str | bytes):
                        yield Record(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)
                    else:
                        yield Record(b"", "field")
                number += 1


def built_in_documents(kind: str) -> list[tuple[str, bytes]]:
    """(name, UTF-8 text) of the documents of a BUILT_IN kind, sorted by name."""
    return embedded_documents() if kind == "embedded" else topic_documents()


def topic_documents() -> list[tuple[str, bytes]]:
    """(name, UTF-8 text) of the help topics of pydoc, sorted by name; names as in the embedded corpus."""
    from pydoc_data import topics

    found = [(f"pydoc_data/topics/{name}", text.encode()) for name, text in topics.topics.items() if text.strip()]
    return sorted(found)


def embedded_documents() -> list[tuple[str, bytes]]:
    """(name, UTF-8 text) of this Python's standard library, its tests left out, sorted by name; no network.

    pydoc_data's topics are documents of their own. Text differs between Python versions: the manifest records a
    hash of it.
    """
    root = os.path.dirname(os.__file__)
    listed = []
    for folder, folders, names in os.walk(root):
        skipped = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3")
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("config-"))
        for name in names:
            relative = os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
            # Written by this machine's installation, not part of the library.
            local = name.startswith(("_sysconfigdata", "sitecustomize"))
            if name.endswith(".py") and not local and relative != "pydoc_data/topics.py":
                listed.append((relative, os.path.join(root, relative)))
    documents = []
    for relative, path in listed:
        with open(path, "rb") as handle:
            text = handle.read()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents.append((relative, text))
    return sorted([*documents, *topic_documents()])
