"""One shard of a preparation, the unit of work and of resuming: read, tokenise, pack, write, read back."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import xxhash

from steppe.data import files, packing
from steppe.data import manifest as manifests
from steppe.data.errors import BadRecords, CorpusDamaged, DataError
from steppe.data.readers import tasks
from steppe.data.sources import Source

OPTIONS = "group_size:1,zstd:3"  # one record per group: random access reads nothing else
GIVE_UP = 1000  # a shard whose first records are all bad is not read to its end


class Recipe(NamedTuple):
    """What decides the contents of a prepared directory; plain values, the keys of config.data."""

    task: str
    held_out: tuple[str, ...]
    vocabulary: str
    sequence_length: int
    packing: str
    shards: int
    text_field: str
    tfds_dir: str
    held_out_fraction: float
    bad_records: float


class Job(NamedTuple):
    """Shard `shard` of `shards` of one source of one part (train or held_out)."""

    part: str
    source: Source
    shard: int
    shards: int

    @property
    def file(self) -> str:
        """Path of the shard within the prepared directory."""
        return f"{self.part}/{self.source.name}/{self.shard:05d}-of-{self.shards:05d}.array_record"


def finished(directory: str, job: Job) -> dict | None:
    """What an earlier, interrupted preparation recorded of this shard; None if it must be written (again)."""
    path = os.path.join(directory, job.file)
    try:
        entry = manifests.read_json(path + ".json")
        return entry if files.content_hash(path) == entry["hash"] else None
    except (OSError, CorpusDamaged):
        return None


def write(
    directory: str, recipe: Recipe, job: Job, dtype: str, count: Callable[[int, int, int], None] = lambda *_: None
) -> dict:
    """Writes one shard and its record of counts and hashes; `count(documents, tokens, bytes)` is called as work
    proceeds.

    A shard appears under its name only when it is complete and was read back.
    """
    path = os.path.join(directory, job.file)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    totals, faults, hashes = Counter(), Counter(), xxhash.xxh3_128()
    digests = bytearray()
    held_out = _held_out_digests(directory) if job.part == "train" else frozenset()

    def documents() -> Iterator[packing.Document]:
        examples = tasks.examples(
            job.source,
            recipe.vocabulary,
            recipe.text_field,
            recipe.held_out_fraction,
            recipe.tfds_dir,
            job.shard,
            job.shards,
        )
        for example in examples:
            totals["records"] += 1
            if example.fault:
                faults[example.fault] += 1
                if faults.total() == totals["records"] == GIVE_UP:
                    listed = ", ".join(f"{n} {fault}" for fault, n in faults.items())
                    raise BadRecords(f"{_describe(job)}: its first {GIVE_UP} records are all bad ({listed}); {REMEDY}")
                continue
            digest = xxhash.xxh3_128_digest(example.text)
            if digest in held_out:
                totals["overlap"] += 1
                continue
            hashes.update(digest)
            if job.part == "held_out":
                digests.extend(digest)
            n = len(example.document.ids)
            totals.update(documents=1, tokens=n, bytes=len(example.text))
            count(1, n, len(example.text))
            yield example.document

    with files.replacing(path) as partial:
        rows, content = _write_rows(partial, packing.rows(documents(), recipe.packing, recipe.sequence_length), dtype)
        _read_back(partial, rows, content)
        entry = {
            "file": job.file,
            "size": os.stat(partial).st_size,
            "hash": files.content_hash(partial),
            "content": content,
            "rows": rows,
            "documents_hash": hashes.hexdigest(),
            "faults": dict(sorted(faults.items())),
            **{key: totals[key] for key in ("records", "documents", "tokens", "bytes", "overlap")},
        }
        if job.part == "held_out":
            files.write(path + ".digests", bytes(digests))
    manifests.write_json(path + ".json", entry)
    return entry


REMEDY = "check config.data.text_field and the source, or raise config.data.bad_records"


def _describe(job: Job) -> str:
    place = f":{job.source.where}" if job.source.where else ""
    return f"{job.source.kind}{place} ({job.part}, {job.source.name})"


def _write_rows(path: str, rows: Iterator[list[packing.Segment]], dtype: str) -> tuple[int, str]:
    from array_record.python.array_record_module import ArrayRecordWriter

    content, written = xxhash.xxh3_128(), 0
    writer = ArrayRecordWriter(path, OPTIONS)
    try:
        for row in rows:
            record = packing.to_record(row, dtype)
            try:
                writer.write(record)
            except Exception as error:
                raise _cannot_write(path, error) from error
            content.update(record)
            written += 1
    except BaseException:
        _close(writer)
        raise
    try:
        writer.close()
    except Exception as error:
        raise _cannot_write(path, error) from error
    return written, content.hexdigest()


def _close(writer) -> None:
    with contextlib.suppress(Exception):  # the error that led here is the one to report
        writer.close()


def _read_back(path: str, rows: int, content: str) -> None:
    from array_record.python.array_record_module import ArrayRecordReader

    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
        reader = ArrayRecordReader(path)
        found = reader.num_records()
        for start in range(0, found, 1024):  # never a whole shard in memory
            for record in reader.read(list(range(start, min(start + 1024, found)))):
                digest.update(record)
        reader.close()
    except Exception as error:
        raise _cannot_write(path, error) from error
    if found != rows or digest.hexdigest() != content:
        raise _cannot_write(path, "what was written reads back differently")


def _cannot_write(path: str, error: Exception | str) -> DataError:
    reason = " ".join(str(error).split())[:200]
    status = os.statvfs(os.path.dirname(path))
    free = status.f_bavail * status.f_frsize
    remedy = "finished shards are kept, make room and run again"
    return DataError(f"cannot write {path}: {reason} ({free / 1e6:.1f} MB free there); {remedy}")


def _held_out_digests(directory: str) -> frozenset[bytes]:
    digests = set()
    root = os.path.join(directory, "held_out")
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith(".digests"):
                with open(os.path.join(folder, name), "rb") as handle:
                    data = handle.read()
                digests.update(data[i : i + 16] for i in range(0, len(data), 16))
    return frozenset(digests)
