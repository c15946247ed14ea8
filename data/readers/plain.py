"""Reads text in files: whole files, lines, JSONL and Parquet, compressed or not.

The first bytes of a file decide its format, not its name. `check` refuses a file of the wrong format before anything is
written. Damage further on raises an error when it is read.
"""

import bz2
import codecs
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, BinaryIO

import xxhash

from steppe.configs import packages
from steppe.data.errors import BadRecords, DataError, refused
from steppe.data.files import is_remote, matching, opened
from steppe.data.sources import Reading, Record, Source, in_split

Stream = BinaryIO | io.BufferedIOBase  # a file's decompressed bytes

HEAD = 1000  # records of a source to check before it is read
WHOLE, BLOCKS, BLOCK = 64 << 20, 8, 4096  # bytes hashed fully per source; else blocks per file, of this many bytes
REMOTE_HEADS = 8  # files to check at a URL
_REFUSED = {
    b"PK\x03\x04": "a zip archive",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x1f\x9d": "compressed by compress (.Z)",
    b"\xff\x06\x00\x00sNaPpY": "compressed by snappy",
    b"LZIP": "compressed by lzip",
    b"\xff\xfe": "UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`",
    b"%PDF-": "a PDF",
    b"\x89HDF": "an HDF5 file",
    b"ARROW1": "an Arrow file; write it as Parquet and name it parquet:",
}
_PARQUET = b"PAR1"
_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")


def check(source: Source, reading: Reading, log: Callable[[str], None]) -> None:
    """Raises DataError if the source's files or their first records do not have its format."""
    paths = files(source)
    for path in paths if not is_remote(source.where) else paths[:REMOTE_HEADS]:
        with opened_text(path, source.kind):
            pass
    seen: dict[str, None] = {}
    first = None
    for record in islice(_every_record(source, reading, paths, seen), HEAD):
        if not record.fault:
            return
        first = first or record
    if seen:
        listed = ", ".join(list(seen)[:20])
        accepted = f"a text field of {source.kind}:{source.where}; the fields seen are {listed}"
        raise refused("data.text_field", reading.text_field, accepted)
    if first:
        raise BadRecords(f"{first.place}: not a JSON object, nor is any later record; jsonl: needs one object per line")


def records(source: Source, reading: Reading, shard: int = 0, shards: int = 1) -> Iterator[Record]:
    """The records of one shard of a source, in a fixed order.

    Shards divide whole files if there are at least `shards` files, else single records. Every record is in exactly one
    shard and one split. A hash of its text (or of the faulty line or location) decides the split.
    """
    paths = files(source)
    if len(paths) >= shards:
        paths, shard, shards = paths[shard::shards], 0, 1
    for record in _every_record(source, reading, paths, {}, shard, shards):
        if in_split(source, reading, record.text):
            yield record


def files(source: Source) -> list[str]:
    """The files that the glob of a source matches, sorted. Raises DataError if there are none."""
    paths = matching(source.where)
    if paths:
        return paths
    where = os.path.expanduser(source.where)
    reason = "is a directory; name its files, such as DIR/*" if os.path.isdir(where) else "matches no file"
    raise DataError(f"config.data: {source.kind}:{source.where} {reason}")


def fingerprint(source: Source, reading: Reading) -> str:
    """Hash of names, sizes and modification times of the files. `sample` hashes their contents."""
    digest = xxhash.xxh3_128()
    for path in files(source):
        if is_remote(path):
            digest.update(f"{path}\0".encode())
            continue
        status = os.stat(path)
        digest.update(f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def sample(source: Source) -> str:
    """Hash of the contents of local files, "" for URLs. Hashes everything up to WHOLE bytes in total, else BLOCKS
    blocks of each file, including its first and last. Raises DataError for an unreadable file."""
    paths = [path for path in files(source) if not is_remote(path)]
    sizes = [os.stat(path).st_size for path in paths]
    blocks = None if sum(sizes) <= WHOLE else BLOCKS
    with ThreadPoolExecutor(16) as pool:
        digests = pool.map(lambda path, size: _sample(path, size, blocks), paths, sizes)
        return xxhash.xxh3_128_hexdigest(b"".join(digests)) if paths else ""


def _sample(path: str, size: int, blocks: int | None) -> bytes:
    try:
        with open(path, "rb", buffering=0) as handle:
            if blocks is None or size <= blocks * BLOCK:
                return hashlib.file_digest(handle, xxhash.xxh3_128).digest()
            starts = (number * (size - BLOCK) // (blocks - 1) for number in range(blocks))
            return xxhash.xxh3_128_digest(b"".join(os.pread(handle.fileno(), BLOCK, start) for start in starts))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; repair or remove the file") from error


def _every_record(
    source: Source, reading: Reading, paths: list[str], seen: dict[str, None], shard: int = 0, shards: int = 1
) -> Iterator[Record]:
    """Every `shards`-th record of each file. Adds the fields of records without text to `seen`."""
    read = {"text": _whole, "lines": _lines, "jsonl": _objects, "parquet": _rows}[source.kind]
    for index, path in enumerate(paths):
        mine = range((shard - index) % shards, sys.maxsize, shards)  # numbers of records
        with opened_text(path, source.kind) as handle:
            yield from read(handle, path, reading.text_field, mine, seen)


@contextmanager
def opened_text(path: str, kind: str) -> Iterator[Stream]:
    """Opens the decompressed text of a file, after a byte-order mark; Parquet unchanged.

    Raises DataError, one line with the file's name, for any error of a decoder while it is open.
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
        raise DataError(f"cannot read {path}: {reason}; repair or remove the file") from error


def _recognised(path: str, kind: str, raw: BinaryIO) -> Stream:
    head = raw.read(512)
    raw.seek(0)
    if kind == "parquet":
        if not head.startswith(_PARQUET):
            raise DataError(f"cannot read {path}: it is not a Parquet file; text:, lines: and jsonl: read other files")
        return raw
    made, packed = _decompressed(path, raw, head), head
    if made is not raw:
        head = made.read(512)
        raw.seek(0)
        made = _decompressed(path, raw, packed)
    if head.startswith(_PARQUET):
        raise DataError(f"cannot read {path}: it is a Parquet file; name it parquet:{path}")
    what = next((name for magic, name in _REFUSED.items() if head.startswith(magic)), "")
    if what or head[257:262] == b"ustar":
        known = "Steppe reads plain, .gz, .zst, .bz2 and .xz files; unpack or convert it first"
        raise DataError(f"cannot read {path}: it is {what or 'a tar archive'}; {known}")
    if kind == "jsonl" and head.lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        remedy = "write one object per line, with `jq -c '.[]' FILE`"
        raise DataError(f"cannot read {path}: it is a JSON array, not one object per line; {remedy}")
    if head.startswith(codecs.BOM_UTF8):
        made.read(len(codecs.BOM_UTF8))
    return made


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
    """Reads all frames of a .zst file. Unlike the library's reader, it raises EOFError for a truncated frame."""

    def __init__(self, raw: BinaryIO):
        self._parts, self._pending = _frames(raw), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._pending = self._pending or next(self._parts, b"")
        taken = min(len(buffer), len(self._pending))
        buffer[:taken] = self._pending[:taken]
        self._pending = self._pending[taken:]
        return taken


def _frames(raw: BinaryIO) -> Iterator[bytes]:
    import zstandard

    new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj  # for zstd --long=31
    frame = new()
    # small chunks, because each may expand 32,768 times
    while chunk := (frame.eof and frame.unused_data) or raw.read(1 << 14):
        frame = new() if frame.eof else frame
        if part := frame.decompress(chunk):
            yield part
    if not frame.eof:
        raise EOFError


# One reader of an open file per kind. None keeps a record's text, because documents can be large.


LONGEST = 256 << 20  # longest document, bytes; a small compressed file may expand to any size


def _bounded(document: bytes, place: str) -> bytes:
    if len(document) > LONGEST:
        raise DataError(f"cannot read {place}: one document is longer than {LONGEST >> 20} MiB; split it")
    return document


def _whole(handle, path, field, mine, seen) -> Iterator[Record]:
    if 0 in mine:
        yield Record(_bounded(handle.read(LONGEST + 1), path), "", path)


def _lines(handle, path, field, mine, seen) -> Iterator[Record]:
    for number, line in enumerate(iter(lambda: _bounded(handle.readline(LONGEST + 1), path), b"")):
        if number in mine and not line.isspace():
            yield Record(line.rstrip(b"\r\n"), "", f"{path}:{number + 1}")


def _objects(handle, path, field, mine, seen) -> Iterator[Record]:
    for number in count():
        record = _object(handle, f"{path}:{number + 1}", field, number in mine, seen)
        if record is None:
            return
        if record is not _NOTHING:
            yield record
        del record


_NOTHING = Record(b"")


def _object(handle, place: str, field: str, wanted: bool, seen: dict[str, None]) -> Record | None:
    """The record of the next line; _NOTHING for a blank or unwanted line, None at the end. Frees memory early."""
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
    document = value_at(value, field)
    if not isinstance(document, str):
        seen.update(dict.fromkeys(_fields(value)))
        return Record(text.encode(), "field", place)
    del text, value
    return Record(document.encode("utf-8", "surrogatepass"), "", place)  # fault_of refuses lone surrogates


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_no_json)


def json_value(text: str) -> Any:
    """The value of a line of JSONL. Raises ValueError unless it is strict JSON, without NaN and Infinity."""
    try:
        return _JSON.decode(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def value_at(value, field: str):
    """The entry of a JSON value at a field or a dotted path of fields, None if absent."""
    if not isinstance(value, dict) or field in value:
        return value.get(field) if isinstance(value, dict) else None
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _fields(value, prefix: str = "") -> Iterator[str]:
    """The dotted paths of an object's fields, two levels deep."""
    for name, inside in value.items() if isinstance(value, dict) else ():
        yield f"{prefix}{name}"
        if isinstance(inside, dict) and not prefix:
            yield from _fields(inside, f"{name}.")


def _rows(handle, path, field, mine, seen) -> Iterator[Record]:
    if lacking := packages.lacking("pyarrow"):
        raise DataError(f"{path}: a Parquet file {lacking}")
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(handle) as table:
        names = table.schema_arrow.names
        top, *inside = [field] if field in names else field.split(".")
        if top not in names:
            raise refused("data.text_field", field, f"a column of {path}, which has {', '.join(names)}")
        number = 0
        for batch in table.iter_batches(columns=[field], batch_size=1024):
            for value in batch.column(0).to_pylist():
                if number in mine:
                    place = f"{path}, row {number + 1}"
                    value = value_at(value, ".".join(inside)) if inside else value
                    if isinstance(value, str | bytes):
                        text = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
                        yield Record(text, "", place)
                    else:
                        seen.update(dict.fromkeys(names))
                        yield Record(place.encode(), "field", place)
                number += 1
