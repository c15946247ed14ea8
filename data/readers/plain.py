"""Text in files: whole files, lines, JSONL and Parquet, compressed or not.

What a file is, its first bytes say, not its name. A file that cannot be what its source says is found by `check`,
before anything is written; what is damaged further on is an error where it is met.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, BinaryIO

import xxhash

from steppe.data.errors import BadRecords, DataError, refused
from steppe.data.files import is_remote, matching, opened
from steppe.data.sources import Reading, Record, Source, in_split

Stream = BinaryIO | io.BufferedIOBase  # a file's bytes, decompressed or as they are

HEAD = 1000  # records of a source that are looked at before it is read
WHOLE, BLOCKS, BLOCK = 64 << 20, 8, 4096  # bytes of a source that are all hashed; blocks of each file else, of bytes
REMOTE_HEADS = 8  # of files behind an address, so many are looked at
_REFUSED = {
    b"PK\x03\x04": "a zip archive",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x1f\x9d": "compressed by compress (.Z)",
    b"\xff\x06\x00\x00sNaPpY": "compressed by snappy",
    b"LZIP": "compressed by lzip",
    b"\xff\xfe": "UTF-16; convert it, as in `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16; convert it, as in `iconv -f UTF-16 -t UTF-8`",
    b"%PDF-": "a PDF",
    b"\x89HDF": "an HDF5 file",
    b"ARROW1": "an Arrow file; write it as Parquet and name it parquet:",
}
_PARQUET = b"PAR1"
_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")


def check(source: Source, reading: Reading) -> None:
    """Raises DataError if the source's files, or the first records of them, cannot be what it says."""
    paths = files(source)
    for path in paths if not is_remote(source.where) else paths[:REMOTE_HEADS]:
        with opened_text(path, source.kind):
            pass
    seen: dict[str, None] = {}
    first = None
    for record in islice(_every_record(source, reading, paths, None, seen), HEAD):
        if not record.fault:
            return
        first = first or record
    if seen:
        listed = ", ".join(list(seen)[:20])
        accepted = f"a field with text in {source.kind}:{source.where}; the fields seen are {listed}"
        raise refused("data.text_field", reading.text_field, accepted)
    if first:
        raise BadRecords(f"{first.place}: no JSON object, nor is any record after it; jsonl: needs one object a line")


def records(source: Source, reading: Reading, shard: int = 0, shards: int = 1) -> Iterator[Record]:
    """Every `shards`-th record of a source, in a fixed order, beginning at `shard`.

    Whole files are dealt out when there are at least `shards` of them, single records otherwise. Every record is in
    exactly one shard, and in one split: a hash of the text, or of what stands in its place, draws it.
    """
    paths = files(source)
    by_file = len(paths) >= shards
    if by_file:
        paths, mine = paths[shard::shards], None
    else:
        mine = lambda file, number: (number + file) % shards == shard  # noqa: E731
    for record in _every_record(source, reading, paths, mine, {}):
        if in_split(source, reading, record.text):
            yield record


def files(source: Source) -> list[str]:
    """Paths that the glob of a source matches, sorted."""
    paths = matching(source.where)
    if paths:
        return paths
    where = os.path.expanduser(source.where)
    reason = "is a directory; name the files in it, as DIR/*" if os.path.isdir(where) else "matches no file"
    raise DataError(f"config.data: {source.kind}:{source.where} {reason}")


def fingerprint(source: Source, reading: Reading) -> str:
    """Changes when the text may have changed: names, sizes and times of the files. `sample` looks into them."""
    digest = xxhash.xxh3_128()
    for path in files(source):
        if is_remote(path):
            digest.update(f"{path}\0".encode())
            continue
        status = os.stat(path)
        digest.update(f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def sample(source: Source) -> str:
    """A hash of what is in the files: of all of it up to WHOLE bytes in all, else of BLOCKS blocks of each, its first
    and its last among them; "" behind an address. DataError for a file that cannot be read."""
    paths = [path for path in files(source) if not is_remote(path)]
    sizes = [os.stat(path).st_size for path in paths]
    blocks = None if sum(sizes) <= WHOLE else BLOCKS
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda path, size: _sample(path, size, blocks), paths, sizes)
        return xxhash.xxh3_128_hexdigest(b"".join(found)) if paths else ""


def _sample(path: str, size: int, blocks: int | None) -> bytes:
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb", buffering=0) as handle:
            if blocks is None or size <= blocks * BLOCK:
                while chunk := handle.read(1 << 20):
                    digest.update(chunk)
            else:
                for number in range(blocks):
                    digest.update(os.pread(handle.fileno(), BLOCK, number * (size - BLOCK) // (blocks - 1)))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; mend or remove the file") from error
    return digest.digest()


def _every_record(
    source: Source, reading: Reading, paths: list[str], mine: Callable[[int, int], bool] | None, seen: dict[str, None]
) -> Iterator[Record]:
    """The records of files that are `mine(file, number)`; names of fields without a text are added to `seen`."""
    read = {"text": _whole, "lines": _lines, "jsonl": _objects, "parquet": _rows}[source.kind]
    for index, path in enumerate(paths):
        chosen = None if mine is None else (lambda number, index=index: mine(index, number))
        with opened_text(path, source.kind) as handle:
            yield from read(handle, path, reading.text_field, chosen, seen)


@contextmanager
def opened_text(path: str, kind: str) -> Iterator[Stream]:
    """The text of a file, decompressed, from its first byte that is no byte-order mark. Parquet as it is.

    Whatever goes wrong inside a decoder while it is open becomes one line that names the file.
    """
    try:
        with opened(path) as raw:
            yield _recognised(path, kind, raw)
    except DataError:
        raise
    except Exception as error:
        if isinstance(error, EOFError):
            reason = "it ends in the middle, cut short"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = f"it is damaged ({' '.join(str(error).split())[:200] or type(error).__name__})"
        raise DataError(f"cannot read {path}: {reason}; mend or remove the file") from error


def _recognised(path: str, kind: str, raw: BinaryIO) -> Stream:
    head = _head(raw)
    if kind == "parquet":
        if not head.startswith(_PARQUET):
            raise DataError(f"cannot read {path}: it is no Parquet file; text:, lines: and jsonl: read others")
        return raw
    made = _decompressed(path, raw, head)
    head = head if made is raw else _head(made)
    if head.startswith(_PARQUET):
        raise DataError(f"cannot read {path}: it is a Parquet file; name it parquet:{path}")
    what = next((name for magic, name in _REFUSED.items() if head.startswith(magic)), "")
    if what or head[257:262] == b"ustar":
        known = "plain, .gz, .zst, .bz2 and .xz are read; unpack or convert it first"
        raise DataError(f"cannot read {path}: it is {what or 'a tar archive'}; {known}")
    if kind == "jsonl" and head.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        remedy = "write one object a line, as in `jq -c '.[]' FILE`"
        raise DataError(f"cannot read {path}: it is a JSON array, not one object a line; {remedy}")
    if head.startswith(codecs.BOM_UTF8):
        made.read(len(codecs.BOM_UTF8))
    return made


def _head(handle: Stream) -> bytes:
    head = handle.read(512)
    handle.seek(0)
    return head


def _decompressed(path: str, raw: BinaryIO, head: bytes) -> Stream:
    if not head and path.endswith(_SUFFIXES):
        raise EOFError
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(raw, "rb")
    if head.startswith(b"BZh"):
        return bz2.open(raw, "rb")
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(raw, "rb")
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F):
        return io.BufferedReader(_Zstandard(raw), 1 << 20)
    return raw


class _Zstandard(io.RawIOBase):
    """All frames of a .zst file; unlike the library's reader, a file cut inside a frame is an error."""

    def __init__(self, raw: BinaryIO):
        import zstandard

        self._raw = raw
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj  # as zstd --long=31 writes
        self._restart()

    def _restart(self) -> None:
        self._frame, self._pending, self._started = self._new(), b"", False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset or whence:
            raise io.UnsupportedOperation("only back to the beginning")
        self._raw.seek(0)
        self._restart()
        return 0

    def readinto(self, buffer) -> int:
        while not self._pending:
            chunk = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._started = self._new(), False
            chunk = chunk or self._raw.read(1 << 14)  # may become 32,768 times as many bytes
            if not chunk:
                if self._started:
                    raise EOFError
                return 0
            self._started = True
            self._pending = self._frame.decompress(chunk)
        taken = min(len(buffer), len(self._pending))
        buffer[:taken] = self._pending[:taken]
        self._pending = self._pending[taken:]
        return taken

    def close(self) -> None:
        self._raw.close()
        super().close()


# Of each kind: the records of one open file. A record's text is handed on, never kept: documents can be large.


LONGEST = 256 << 20  # bytes of a document; a small compressed file may hold any number


def _bounded(document: bytes, place: str) -> bytes:
    if len(document) > LONGEST:
        raise DataError(f"cannot read {place}: one document is longer than {LONGEST >> 20} MiB; cut it into several")
    return document


def _whole(handle, path, field, mine, seen) -> Iterator[Record]:
    if mine is None or mine(0):
        yield Record(_bounded(handle.read(LONGEST + 1), path), "", path)


def _lines(handle, path, field, mine, seen) -> Iterator[Record]:
    for number, line in enumerate(iter(lambda: _bounded(handle.readline(LONGEST + 1), path), b"")):
        if (mine is None or mine(number)) and not line.isspace():
            yield Record(line.rstrip(b"\r\n"), "", f"{path}:{number + 1}")


def _objects(handle, path, field, mine, seen) -> Iterator[Record]:
    for number in count():
        record = _object(handle, f"{path}:{number + 1}", field, mine is None or mine(number), seen)
        if record is None:
            return
        if record is not _NOTHING:
            yield record
        del record


_NOTHING = Record(b"")


def _object(handle, place: str, field: str, wanted: bool, seen: dict[str, None]) -> Record | None:
    """The record of the next line; _NOTHING of a blank one. Nothing else of a line is held longer than it has to be."""
    line = _bounded(handle.readline(LONGEST + 1), place)
    if not line:
        return None
    if not wanted or line.isspace():
        return _NOTHING
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return Record(line, "json", place)
    line = b""
    try:
        value = json_value(text)
    except ValueError:
        return Record(text.encode(), "json", place)
    found = value_at(value, field)
    if not isinstance(found, str):
        seen.update(dict.fromkeys(_fields(value)))
        return Record(text.encode(), "field", place)
    del text, value
    return Record(found.encode("utf-8", "surrogatepass"), "", place)  # lone surrogates are then found to be no UTF-8


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_JSON = json.JSONDecoder(parse_constant=_no_json)


def json_value(text: str) -> Any:
    """The value of a line of JSONL. ValueError where it is not strictly JSON: NaN and Infinity are none."""
    try:
        return _JSON.decode(text)
    except RecursionError as error:
        raise ValueError("is nested too deep") from error


def value_at(value, field: str):
    """What stands in a JSON value under a field, or along a dotted path of fields; None if nothing does."""
    if not isinstance(value, dict) or field in value:
        return value.get(field) if isinstance(value, dict) else None
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _fields(value, prefix: str = "") -> Iterator[str]:
    """The dotted paths of an object's fields, two deep."""
    for name, inside in value.items() if isinstance(value, dict) else ():
        yield f"{prefix}{name}"
        if isinstance(inside, dict) and not prefix:
            yield from _fields(inside, f"{name}.")


def _rows(handle, path, field, mine, seen) -> Iterator[Record]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(handle) as table:
        names = table.schema_arrow.names
        top, *inside = [field] if field in names else field.split(".")
        if top not in names:
            raise refused("data.text_field", field, f"a column of {path}, which has {', '.join(names)}")
        number = 0
        for batch in table.iter_batches(columns=[field], batch_size=1024):
            for value in batch.column(0).to_pylist():
                if mine is None or mine(number):
                    place = f"{path}, row {number + 1}"
                    value = value_at(value, ".".join(inside)) if inside else value
                    if isinstance(value, str | bytes):
                        text = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
                        yield Record(text, "", place)
                    else:
                        seen.update(dict.fromkeys(names))
                        yield Record(place.encode(), "field", place)
                number += 1
