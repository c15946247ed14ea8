"""Prepares one shard, the unit of work and of resuming: read, tokenise, pack, write, and verify."""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from steppe.data import files, packing, readers
from steppe.data import manifest as manifests
from steppe.data.errors import BadRecords, CorpusDamaged, StorageError
from steppe.data.sources import Reading, Record, Source
from steppe.data.vocabulary import PART, Tokenizer, load_tokenizer

OPTIONS = "group_size:1,zstd:3"  # one record per group, so that random access reads only that record
LOCK = ".lock"  # suffix of a shard's lock file, held by its writer
GIVE_UP = 1000  # stop if this many first records of a shard are all bad


class Recipe(NamedTuple):
    """The keys of config.data that determine a prepared directory."""

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
    seqio_module: str = ""

    @property
    def reading(self) -> Reading:
        return Reading(*(getattr(self, field) for field in Reading._fields))


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


def written(directory: str, job: Job) -> dict | None:
    """The entry of a written shard; None if it is missing or has another size."""
    path = os.path.join(directory, job.file)
    try:
        entry = manifests.read_json(path + ".json")
        return entry if os.stat(path).st_size == entry["size"] else None
    except (OSError, CorpusDamaged):
        return None


def finished(directory: str, job: Job) -> dict | None:
    """Like written, but also checks the hash. Deletes the entry of a damaged shard."""
    path = os.path.join(directory, job.file)
    entry = written(directory, job)
    with contextlib.suppress(OSError):
        if entry and files.content_hash(path) == entry["hash"]:
            return entry
        os.unlink(path + ".json")
    return None


def take(
    directory: str, recipe: Recipe, job: Job, dtype: str, count: Callable[[int, int, int], None] = lambda *_: None
) -> dict | None:
    """Writes a shard if it is missing and returns its entry of counts and hashes; None if another process writes it.

    Calls count(documents, tokens, bytes) during the work. A shard gets its name once it is complete and verified.
    """
    path = os.path.join(directory, job.file)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with files.lock(path + LOCK):
            return written(directory, job) or _write(directory, recipe, job, dtype, count)
    except files.Held:
        return None


def _write(directory: str, recipe: Recipe, job: Job, dtype: str, count: Callable[[int, int, int], None]) -> dict:
    path = os.path.join(directory, job.file)
    tally = _Tally(job, _held_out_digests(directory) if job.part == "train" else frozenset())
    tokenizer = load_tokenizer(recipe.vocabulary)
    records = readers.READERS[job.source.kind].records(job.source, recipe.reading, job.shard, job.shards)
    documents = _documents(_groups(tally.good(records)), tokenizer, tally, count)

    with files.replacing(path) as partial:
        packed = packing.rows(documents, recipe.packing, recipe.sequence_length, tokenizer.begin_id)
        rows, content = _write_rows(partial, packed, dtype)
        _read_back(partial, rows, content)
        entry = {
            "file": job.file,
            "size": os.stat(partial).st_size,
            "hash": files.content_hash(partial),
            "content": content,
            "rows": rows,
            "documents_hash": tally.hashes.hexdigest(),
            "faults": dict(sorted(tally.faults.items())),
            "places": tally.places,
            **{key: getattr(tally, key) for key in ("records", "documents", "tokens", "bytes", "overlap")},
        }
        if job.part == "held_out":
            files.write(path + ".digests", bytes(tally.digests))
    manifests.write_json(path + ".json", entry)
    return entry


REMEDY = "check config.data.text_field and the source, or raise config.data.bad_records"


class _Tally:
    """Counts the records of a shard and selects the valid ones."""

    def __init__(self, job: Job, held_out: frozenset[bytes]):
        self.job, self.held_out = job, held_out
        self.records = self.documents = self.tokens = self.bytes = self.overlap = 0
        self.faults, self.places = Counter(), {}  # number of each fault, and location of its first record
        self.hashes, self.digests = xxhash.xxh3_128(), bytearray()

    def bad(self, fault: str, place: str) -> None:
        self.faults[fault] += 1
        self.places.setdefault(fault, place)
        if self.faults.total() == self.records >= GIVE_UP:
            (part, source, *_), why = self.job, listed(self.faults, self.places)
            name = f"{source.address} ({part}, {source.name})"
            raise BadRecords(f"{name}: its first {self.records} records are all bad ({why}); {REMEDY}")

    def good(self, records: Iterable[Record]) -> Iterator[Record]:
        """The valid records that are not in a held-out set."""
        for record in records:
            self.records += 1
            if fault := record.fault or readers.fault_of(record.text):
                self.bad(fault, record.place)
            elif self.held_out and xxhash.xxh3_128_digest(record.text) in self.held_out:
                self.overlap += 1
            else:
                yield record
            del record  # documents can be large

    def document(self, text: bytes, tokens: int) -> None:
        digest = xxhash.xxh3_128_digest(text)
        self.hashes.update(digest)
        if self.job.part == "held_out":
            self.digests.extend(digest)
        self.documents += 1
        self.tokens += tokens
        self.bytes += len(text)


def listed(faults: Mapping[str, int], places: Mapping[str, str]) -> str:
    """The number of each fault and the location of its first record, as text; "none" without faults."""
    texts = (
        f"{n} {fault}{f' (first: {places[fault]})' if places.get(fault) else ''}" for fault, n in sorted(faults.items())
    )
    return ", ".join(texts) or "none"


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Groups short records, to save calls. A record longer than PART is a group by itself."""
    group, size = [], 0
    for record in records:
        if group and (size >= PART or len(record.text) > PART):
            yield group
            group, size = [], 0
        group.append(record)
        size += len(record.text)
        del record
    if group:
        yield group


def _documents(
    groups: Iterable[list[Record]], tokenizer: Tokenizer, tally: _Tally, count: Callable[[int, int, int], None]
) -> Iterator[packing.Documents]:
    """Tokenises records and ends each document with the end-of-document id."""
    end = tokenizer.eos_id
    for group in groups:
        before = tally.documents, tally.tokens, tally.bytes
        if len(group[0].text) > PART:
            counts, ids = 0, np.zeros(0, np.int32)
            for part in tokenizer.cuts(group[0].text):
                tokens = tokenizer.measure([part])
                ids = tokens.ids
                counts += len(ids)
                yield packing.Documents(tokens.ids, tokens.lengths, np.zeros(0, np.int64))
            counts = np.array([counts])
            if counts[0]:
                yield packing.Documents(np.array([end], ids.dtype), np.zeros(1, np.uint8), np.ones(1, np.int64))
        else:
            tokens = tokenizer.measure([record.text for record in group])
            counts = tokens.counts
            ends = np.cumsum(counts[counts > 0] + 1)
            inside = np.ones(len(tokens.ids) + len(ends), bool)
            inside[ends - 1] = False
            ids, lengths = np.full(len(inside), end, tokens.ids.dtype), np.zeros(len(inside), tokens.lengths.dtype)
            ids[inside], lengths[inside] = tokens.ids, tokens.lengths
            yield packing.Documents(ids, lengths, ends)
        for record, n in zip(group, counts.tolist(), strict=True):
            if n:
                tally.document(record.text, n + 1)
            else:  # a lossy vocabulary may drop a whole text, such as zero-width characters
                tally.bad("no token", record.place)
        count(*(after - b for after, b in zip((tally.documents, tally.tokens, tally.bytes), before, strict=True)))


def _write_rows(path: str, rows: Iterator[list[packing.Segment]], dtype: str) -> tuple[int, str]:
    from array_record.python.array_record_module import ArrayRecordWriter

    content, written = xxhash.xxh3_128(), 0
    writer = ArrayRecordWriter(path, OPTIONS)
    try:
        for row in rows:
            record = packing.to_record(row, dtype)
            with _storing(path):
                writer.write(record)
            content.update(record)
            written += 1
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            writer.close()
        raise
    with _storing(path):
        writer.close()
    return written, content.hexdigest()


def _read_back(path: str, rows: int, content: str) -> None:
    from array_record.python.array_record_module import ArrayRecordReader

    digest = xxhash.xxh3_128()
    with _storing(path):
        files.sync(path)
        reader = ArrayRecordReader(path)
        count = reader.num_records()
        for start in range(0, count, 1024):  # a whole shard may not fit in memory
            for record in reader.read(list(range(start, min(start + 1024, count)))):
                digest.update(record)
        reader.close()
        if count != rows or digest.hexdigest() != content:
            raise OSError("the written file reads back differently")


@contextlib.contextmanager
def _storing(path: str) -> Iterator[None]:
    """Turns every error into a StorageError: array_record raises bare RuntimeError."""
    try:
        yield
    except Exception as error:
        reason, free = " ".join(str(error).split())[:200], shutil.disk_usage(os.path.dirname(path)).free
        remedy = "finished shards remain; free space and run again"
        raise StorageError(f"cannot write {path}: {reason} ({free / 1e6:.1f} MB free there); {remedy}") from error


def _held_out_digests(directory: str) -> frozenset[bytes]:
    digests = set()
    for path in Path(directory, "held_out").glob("*/*.digests"):
        data = path.read_bytes()
        digests.update(data[i : i + 16] for i in range(0, len(data), 16))
    return frozenset(digests)
