"""Batches of a prepared directory, as pure functions of (seed, step, global row). Never imports tensorflow.

grain's index shuffle reorders the rows of a source in every epoch, and sources are mixed by weight. Row r of step s is
element s * batch_size + r of this endless sequence. So there is no iterator state, and batches do not depend on hosts,
workers or restarts.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, cast

import grain
import numpy as np

from steppe.data import manifest as manifests
from steppe.data.errors import CorpusDamaged, CorpusMismatch, DataError, refused
from steppe.data.packing import to_batch
from steppe.data.vocabulary import Tokenizer, load_tokenizer

READ_AHEAD = 256  # rows read together for smaller batches; one call costs as much as reading a hundred rows
HELD_OUT_SEED = 0  # fixed shuffle of held-out rows, so that their first rows are a fair sample


_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Rows:
    """The rows of one source of training text or of one held-out set."""

    name: str
    weight: float  # share of training rows, relative to the other sources
    rows: int
    tokens: int  # targets with weight 1, over all rows
    bytes: int  # of source text
    documents: int
    records: Any  # a grain.sources.ArrayRecordDataSource, whose methods type checkers cannot see


@dataclass(frozen=True, eq=False)
class Corpus:
    """An open prepared directory. Hashed by identity; threads may share it."""

    directory: str
    manifest: manifests.Manifest
    tokenizer: Tokenizer
    sequence_length: int
    packing: str
    train: tuple[Rows, ...]
    held_out: dict[str, Rows]

    @property
    def fingerprint(self) -> str:
        """Equal for two directories exactly if they have the same corpus."""
        return self.manifest["fingerprint"]

    @property
    def epoch_tokens(self) -> int:
        """Positions (rows x T) of one pass over every training row."""
        return sum(part.rows for part in self.train) * self.sequence_length

    @property
    def tokens_per_row(self) -> float:
        """Mean number of tokens that a training row predicts; below T for bestfit, which pads rows."""
        if self.packing == "concat":
            return self.sequence_length
        total = sum(part.weight for part in self.train)
        return sum(part.weight / total * part.tokens / part.rows for part in self.train)

    def epochs(self, tokens: int) -> dict[str, float]:
        """How many times a budget of `tokens` positions (steps x batch_size x T) reads every row of each source."""
        total = sum(part.weight for part in self.train)
        rows = tokens / self.sequence_length
        return {part.name: rows * part.weight / total / part.rows for part in self.train}


def open_corpus(
    directory: str,
    vocabulary: str | None = None,
    sequence_length: int | None = None,
    packing: str | None = None,
    verify: str = "auto",
) -> Corpus:
    """Opens and verifies a prepared directory. The run expects `vocabulary`, `sequence_length` and `packing`.

    None accepts the value of the directory, and its copy of the vocabulary. Raises CorpusMismatch for another value,
    CorpusDamaged for a damaged file.
    """
    if verify not in manifests.VERIFY:
        raise refused("data.verify", verify, f"one of {', '.join(manifests.VERIFY)}")
    manifest = manifests.read(directory)
    have = manifest["vocabulary"]
    tokenizer = load_tokenizer(vocabulary) if vocabulary else None
    if tokenizer and tokenizer.fingerprint != have["fingerprint"]:
        difference = f"{vocabulary} ({tokenizer.fingerprint}), but {directory} was prepared with {have['spec']}"
        again = "; older versions of Steppe treated control strings or beginnings differently: prepare it again"
        again *= tokenizer.fingerprint.startswith(have["fingerprint"] + "-")
        raise CorpusMismatch(f"config.data.vocabulary is {difference} ({have['fingerprint']}){again}")
    for key, value in (("sequence_length", sequence_length), ("packing", packing)):
        if value not in (manifest[key], None):
            raise CorpusMismatch(f"config.data.{key} is {value}, but {directory} was prepared with {manifest[key]}")
    manifests.verify(directory, manifest, verify)
    if tokenizer is None:
        copied = manifests.path_of(directory, have["file"]) if have["file"] else "bytes"
        tokenizer = load_tokenizer(copied, have["fingerprint"])
    return Corpus(
        directory=directory,
        manifest=manifest,
        tokenizer=tokenizer,
        sequence_length=manifest["sequence_length"],
        packing=manifest["packing"],
        train=tuple(_open_rows(directory, entry) for entry in manifest["train"]),
        held_out={entry["name"]: _open_rows(directory, entry) for entry in manifest["held_out"]},
    )


def _open_rows(directory: str, entry: manifests.Component) -> Rows:
    paths = [manifests.path_of(directory, shard) for shard in entry["shards"] if shard["rows"]]
    try:
        records: Any = grain.sources.ArrayRecordDataSource(paths)
    except Exception as error:  # array_record raises bare RuntimeError and ValueError
        raise CorpusDamaged(f"{directory}: {entry['name']} cannot be read: {_line(error)}") from error
    if len(records) != entry["rows"]:
        raise CorpusDamaged(f"{directory}: {entry['name']} has {len(records)} rows, the manifest says {entry['rows']}")
    own: dict[str, Any] = {field.name: entry[field.name] for field in fields(Rows) if field.name != "records"}
    return Rows(**own, records=records)


def training_rows(
    corpus: Corpus, seed: int, step: int, batch_size: int, rows: Sequence[int] | None = None, before: int = 0
) -> dict[str, np.ndarray]:
    """Rows `rows` (global indices in [0, batch_size), default all) of a step's batch; see data.packing.to_batch.

    before: rows that batches of another size consumed before step 0.
    """
    rows = tuple(_checked(rows, batch_size))
    steps = max(1, READ_AHEAD // max(1, len(rows)))
    block, within = divmod(step, steps)
    first = before + block * steps * batch_size
    if steps == 1:
        return _batch(corpus, _training_records(corpus, seed, first, batch_size, rows, 1))
    with _one_at_a_time:  # so that only one thread reads a block
        records = _training_block(corpus, seed, first, batch_size, rows, steps)
    return _batch(corpus, records[within * len(rows) : (within + 1) * len(rows)])


def _training_records(
    corpus: Corpus, seed: int, first: int, batch_size: int, rows: tuple[int, ...], steps: int
) -> list[bytes]:
    """Rows `rows` of `steps` batches that start at row `first` of the stream."""
    stream = _stream(corpus, seed)
    picked = [stream[first + step * batch_size + row] for step in range(steps) for row in rows]
    records: list[bytes] = [b""] * len(picked)
    for number, part in enumerate(corpus.train):
        places = [place for place, (owner, _) in enumerate(picked) if owner == number]
        for place, record in zip(places, _read(part, [picked[place][1] for place in places]), strict=True):
            records[place] = record
    return records


_training_block = lru_cache(maxsize=4)(_training_records)


@lru_cache(maxsize=8)
def _stream(corpus: Corpus, seed: int) -> Sequence[tuple[int, int]]:
    """The endless sequence of (source, row)."""

    def shuffled(number: int, part: Rows) -> grain.MapDataset:
        # Mixing in the name gives every source its own order, independent of the rest of the mixture.
        (own,) = np.random.SeedSequence([seed, *part.name.encode()]).generate_state(1)
        order = grain.MapDataset.range(part.rows).seed(int(own)).shuffle().repeat(None)
        return order.map(lambda row: (number, int(row)))

    parts = [shuffled(number, part) for number, part in enumerate(corpus.train)]
    mixed = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights=[part.weight for part in corpus.train])
    return cast(Sequence[tuple[int, int]], mixed)


def rows_in_order(corpus: Corpus, part: Rows, start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows [start, stop) of a source in stored order, for statistics, not for training."""
    return _batch(corpus, _read(part, list(range(start, stop))))


def held_out_steps(corpus: Corpus, name: str, batch_size: int) -> int:
    """Number of batches that cover held-out set `name` once."""
    return -(-_held_out(corpus, name).rows // batch_size)


def held_out_rows(
    corpus: Corpus, name: str, index: int, batch_size: int, rows: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Rows of batch `index` of a held-out set, in a fixed order; empty rows fill the last batch."""
    part = _held_out(corpus, name)
    numbers = (index * batch_size + r for r in _checked(rows, batch_size))
    places = [divmod(n, READ_AHEAD) if n < part.rows else None for n in numbers]
    return _batch(corpus, [at and _held_out_block(corpus, name, at[0])[at[1]] for at in places])


@lru_cache(maxsize=8)
def _held_out_block(corpus: Corpus, name: str, block: int) -> Sequence[bytes]:
    """One block of held-out rows in the fixed order."""
    part = corpus.held_out[name]
    order = _held_out_order(part.rows)
    last = min(part.rows, (block + 1) * READ_AHEAD)
    return _read(part, [int(order[n]) for n in range(block * READ_AHEAD, last)])


@lru_cache(maxsize=8)
def _held_out_order(rows: int) -> Sequence[int]:
    return cast(Sequence[int], grain.MapDataset.range(rows).seed(HELD_OUT_SEED).shuffle())


def _held_out(corpus: Corpus, name: str) -> Rows:
    if name not in corpus.held_out:
        raise DataError(f"held-out set {name!r}: {corpus.directory} has {', '.join(corpus.held_out) or 'none'}")
    return corpus.held_out[name]


def _checked(rows: Sequence[int] | None, batch_size: int) -> Sequence[int]:
    rows = range(batch_size) if rows is None else [int(r) for r in rows]
    if any(not 0 <= r < batch_size for r in rows):
        raise DataError(f"rows must lie in [0, {batch_size}), got {min(rows)} to {max(rows)}")
    return rows


def _read(part: Rows, indices: list[int]) -> Sequence[bytes]:
    if not indices:
        return []
    try:
        return part.records.__getitems__(indices)  # one call is six times as fast as single reads
    except Exception as error:  # array_record raises bare RuntimeError and ValueError
        raise CorpusDamaged(f"rows of {part.name} cannot be read: {_line(error)}") from error


def _batch(corpus: Corpus, records: Sequence[bytes | None]) -> dict[str, np.ndarray]:
    try:
        return to_batch(records, corpus.manifest["dtype"], corpus.packing, corpus.sequence_length)
    except (ValueError, IndexError) as error:
        raise CorpusDamaged(f"{corpus.directory}: a row was not written by Steppe ({_line(error)})") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def beginning(corpus: Corpus, most: int = 24) -> str:
    """The first words of the first held-out text: at most `most` characters of its first line."""
    part = next(iter(corpus.held_out.values()))
    row = _batch(corpus, _read(part, [0]))
    line = corpus.tokenizer.decode(row["targets"][0].tolist()).lstrip().partition("\n")[0].rstrip()
    return line if len(line) <= most else line[:most].rpartition(" ")[0] or line[:most]


class prefetch(Iterator, contextlib.AbstractContextManager):
    """Iterates over (step, read(step)) for first <= step < last, with background threads that read ahead.

    depth: most waiting results. workers: threads that call `read`; 0 reads on demand. Results keep their order.
    `waited` is the total and `last_wait` the last time, in seconds, that the consumer waited. An exception of `read` is
    raised in place of its result. Use it in a `with` block, or call close().
    """

    def __init__(self, read: Callable[[int], object], first: int, last: int, depth: int = 2, workers: int = 1):
        steps = grain.MapDataset.range(first, last).map(lambda step: (step, read(step)))
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(depth, workers) if workers else 0)
        self._iterator = iter(steps.to_iter_dataset(options))
        self._iterator.start_prefetch()
        self.waited = self.last_wait = 0.0

    def __exit__(self, *_) -> None:
        self.close()

    def __next__(self):
        began = time.perf_counter()
        try:
            return next(self._iterator)
        finally:
            self.last_wait = time.perf_counter() - began
            self.waited += self.last_wait

    def close(self) -> None:
        """Stops the threads and drops waiting results."""
        self._iterator.close()
