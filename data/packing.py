"""Packs documents into rows, serialises rows as records, and makes batches from records.

A row predicts at most T tokens. It is a list of segments. A segment has the tokens to predict (targets) and the token
before them (first), which is 0 at the beginning of a document or stream. `concat` rows have one segment; `bestfit` rows
have whole documents. Record: int32 [bytes, S], S x int32 [length, first], then the targets in uint16 or uint32, all
little-endian, without padding.
"""

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

PACKINGS = ("concat", "bestfit")
WINDOW = 1 << 14  # segments that bestfit packs together; bounds memory and affects the stored rows


class Documents(NamedTuple):
    """Concatenated tokenised documents. ids [n]: each document ends with the end-of-document id. lengths [n]: source
    bytes of each id. ends [d]: end positions of documents in ids, ascending.

    If the last of `ends` is not n, the last document continues in the next Documents.
    """

    ids: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray


class Segment(NamedTuple):
    """Targets [n] in one context, the token before them, and the number of their source bytes."""

    targets: np.ndarray
    first: int
    bytes: int


def rows(documents: Iterable[Documents], packing: str, sequence_length: int, begin: int = 0) -> Iterator[list[Segment]]:
    """Packs documents into rows; every token is the target of exactly one position of one row.

    begin: the input before the first token of a stream.
    """
    pack = _concat if packing == "concat" else _bestfit
    return pack(documents, sequence_length, begin)


def _concat(documents: Iterable[Documents], length: int, begin: int) -> Iterator[list[Segment]]:
    """Cuts one stream every `length` tokens. The first input of a row is the last target before it, or `begin`."""
    ids, sizes, first = np.zeros(0, np.uint16), np.zeros(0, np.uint8), begin
    for more in documents:
        ids, sizes = np.concatenate([ids, more.ids]), np.concatenate([sizes, more.lengths])
        used = len(ids) // length * length
        behind = sizes[:used].reshape(-1, length).sum(1, dtype=np.int64)
        for targets, size in zip(ids[:used].reshape(-1, length), behind.tolist(), strict=True):
            yield [Segment(targets, first, size)]
            first = int(targets[-1])
        ids, sizes = ids[used:].copy(), sizes[used:].copy()  # views would keep the used arrays in memory
    if len(ids):
        yield [Segment(ids, first, int(sizes.sum(dtype=np.int64)))]


def _bestfit(documents: Iterable[Documents], length: int, begin: int) -> Iterator[list[Segment]]:
    """Best-fit decreasing over windows: each segment goes to the fullest row that has room for it.

    Cuts a document that is longer than a row; the rest starts another row with the token before it as first input.
    """
    window: list[Segment] = []
    for ended, *pieces in _segments(documents, length, begin):
        window += pieces
        if ended and len(window) >= WINDOW:
            yield from _pack_window(window, length)
            window = []
    yield from _pack_window(window, length)


def _segments(documents: Iterable[Documents], length: int, opening: int) -> Iterator[tuple[bool, *tuple[Segment, ...]]]:
    """Yields (whether a document ends here, *complete segments of one document)."""
    ids, sizes, first = np.zeros(0, np.uint16), np.zeros(0, np.uint8), opening  # of the unfinished document
    for more in documents:
        total = np.concatenate([[0], np.cumsum(more.lengths, dtype=np.int64)])
        begin = 0
        for end, ended in [*((end, True) for end in more.ends.tolist()), (len(more.ids), False)]:
            if begin == end:
                continue
            if ended and not len(ids) and end - begin <= length:
                yield True, Segment(more.ids[begin:end], opening, int(total[end] - total[begin]))
                begin = end
                continue
            ids, sizes = np.concatenate([ids, more.ids[begin:end]]), np.concatenate([sizes, more.lengths[begin:end]])
            begin = end
            pieces, used = [], len(ids) if ended else (len(ids) - 1) // length * length
            for start in range(0, used, length):
                targets = ids[start : min(start + length, used)]
                pieces.append(Segment(targets, first, int(sizes[start : start + len(targets)].sum(dtype=np.int64))))
                first = int(targets[-1])
            ids, sizes, first = (
                (ids[:0], sizes[:0], opening) if ended else (ids[used:].copy(), sizes[used:].copy(), first)
            )
            yield ended, *pieces


def _pack_window(window: list[Segment], length: int) -> Iterator[list[Segment]]:
    packed: list[list[Segment]] = []
    with_room: dict[int, list[int]] = {}  # number of free positions -> rows
    free: list[int] = []  # the keys of with_room, sorted
    for segment in sorted(window, key=lambda segment: -len(segment.targets)):
        size = len(segment.targets)
        at = bisect.bisect_left(free, size)
        if at == len(free):
            row, room = len(packed), length
            packed.append([])
        else:
            room = free[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], free[at]
        packed[row].append(segment)
        if room > size:
            if room - size not in with_room:
                bisect.insort(free, room - size)
            with_room.setdefault(room - size, []).append(row)
    yield from packed


def token_dtype(vocab_size: int) -> str:
    """Name of the dtype of stored ids."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def to_record(row: list[Segment], dtype: str) -> bytes:
    """Serialises one row."""
    header = [sum(segment.bytes for segment in row), len(row)]
    for segment in row:
        header += [len(segment.targets), segment.first]
    targets = np.concatenate([segment.targets for segment in row])
    return np.asarray(header, "<i4").tobytes() + targets.astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def from_record(record: bytes, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(targets [n] int32, segment lengths [S], first inputs [S], number of source bytes) of one record."""
    size, segments = np.frombuffer(record, "<i4", 2)
    pairs = np.frombuffer(record, "<i4", 2 * int(segments), 8).reshape(-1, 2)
    targets = np.frombuffer(record, np.dtype(dtype).newbyteorder("<"), -1, 8 + 8 * int(segments)).astype(np.int32)
    return targets, pairs[:, 0], pairs[:, 1], int(size)


def to_batch(records: Sequence[bytes | None], dtype: str, packing: str, sequence_length: int) -> dict[str, np.ndarray]:
    """Makes the batch of R records; None is an empty row.

    inputs, targets: int32 [R, T]. weights: float32 [R, T], 0 on padding. bytes: int32 [R], source bytes of a row's
    targets. bestfit adds segments, int32 [R, T]: 1, 2, ... and 0 on padding; and positions in them, int32 [R, T].
    """
    shape = (len(records), sequence_length)
    batch: dict[str, np.ndarray] = {name: np.zeros(shape, np.int32) for name in ("inputs", "targets")}
    batch["weights"] = np.zeros(shape, np.float32)
    batch["bytes"] = np.zeros(shape[:1], np.int32)
    if packing == "bestfit":
        batch |= {name: np.zeros(shape, np.int32) for name in ("segments", "positions")}
    for r, record in enumerate(records):
        if record is None:
            continue
        targets, lengths, firsts, batch["bytes"][r] = from_record(record, dtype)
        n = len(targets)
        starts = np.cumsum(lengths) - lengths
        batch["targets"][r, :n] = targets
        batch["inputs"][r, 1:n] = targets[:-1]
        batch["inputs"][r, starts] = firsts
        batch["weights"][r, :n] = 1
        if packing == "bestfit":
            batch["segments"][r, :n] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            batch["positions"][r, :n] = np.arange(n) - np.repeat(starts, lengths)
    return batch
