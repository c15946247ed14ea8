"""The grammar that names where text comes from, and what every reader gives.

A task is `SOURCE` or `WEIGHT SOURCE + WEIGHT SOURCE ...`, a source `[NAME=]KIND[:WHERE][@SPLIT]`:

    embedded                        this Python's standard library, always at hand
    topics                          its help topics, English prose, of which embedded holds a part too
    text:GLOB                       every file is a document
    lines:GLOB                      every line that is not blank is a document
    jsonl:GLOB                      every line is a JSON object, its document under config.data.text_field
    parquet:GLOB                    every row is a record, its document in the column config.data.text_field
    tfds:NAME[/CONFIG][:VERSION]    a TFDS builder found in config.data.tfds_dir
    seqio:NAME                      a registered seqio task or mixture, once config.data.seqio_module is imported

SPLIT is train (default), held_out or all; for tfds and seqio any of its own. What follows the last @ or a + of a path
is part of it unless it reads as a split or a source.
"""

import re
from typing import NamedTuple

import xxhash

from steppe.data.errors import refused

BUILT_IN = ("embedded", "topics")  # kinds without a place
FILES = ("text", "lines", "jsonl", "parquet")
PREPARED = ("tfds", "seqio")  # kinds with splits of their own
KINDS = (*BUILT_IN, *FILES, *PREPARED)
SPLITS = ("train", "held_out", "all")
_WEIGHT, _NAME, _KIND = r"[0-9.eE+-]+", r"\w[\w.-]*", "|".join(KINDS)
_SOURCE = re.compile(
    rf"(?:(?P<weight>{_WEIGHT}|nan|inf)\s+)?(?:(?P<name>{_NAME})=)?(?P<kind>{_KIND})(?::(?P<where>.+))?", re.DOTALL
)
_NEXT = re.compile(rf"\s\+\s+(?=(?:{_WEIGHT}\s+)?(?:{_NAME}=)?(?:{_KIND})(?:[:@]|\s|$))")


class Source(NamedTuple):
    """One component of a task or one held-out set."""

    name: str
    kind: str
    where: str  # glob or name; "" for BUILT_IN
    split: str
    weight: float  # share of rows in a mixture, relative to the others


class Reading(NamedTuple):
    """What reading depends on beside the source: keys of config.data."""

    text_field: str = "text"
    held_out_fraction: float = 0.0
    tfds_dir: str = ""
    seqio_module: str = ""


class Record(NamedTuple):
    """One record as read: its text, or the reason why there is none and the place where it stands."""

    text: bytes
    fault: str = ""  # "" | json | field
    place: str = ""


def parse(task: str, key: str = "data.task", split: str = "train") -> tuple[Source, ...]:
    """Parses `task` (grammar above); `split` is the default split. Names default to the kind or the TFDS name."""
    parts = [part.strip() for part in _NEXT.split(task)]
    sources = [_parse_source(part, key, split, weighted=len(parts) > 1) for part in parts]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            example = f"a={parts[0].split(maxsplit=1)[-1]}"
            raise refused(key, task, f"sources with names of their own: two are called {name!r}; as in {example}")
    return tuple(sources)


def _parse_source(part: str, key: str, split: str, weighted: bool) -> Source:
    grammar = f"[WEIGHT ][NAME=]KIND[:WHERE][@SPLIT], KIND one of {', '.join(KINDS)}"
    body, at, end = part.rpartition("@")
    match = _SOURCE.fullmatch(part)
    if at and "/" not in end and end:
        before = _SOURCE.fullmatch(body)
        # A path may hold an @: only what is a split ends a file source.
        if before and (before["kind"] in PREPARED or end in SPLITS or not match):
            match, split = before, end
    if not match:
        raise refused(key, part, grammar)
    kind, where = match["kind"], match["where"] or ""
    if (kind in BUILT_IN) == bool(where):
        raise refused(key, part, f"{grammar}; {kind} {'takes no' if where else 'needs a'} place")
    try:
        weight = float(match["weight"]) if match["weight"] else 1.0
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf") or (weighted and not match["weight"]):
        raise refused(key, part, f"a weight > 0 before every source of a mixture, as in '0.7 {part.split()[-1]}'")
    if kind not in PREPARED and split not in SPLITS:
        raise refused(key, part, f"for {kind} the splits {', '.join(SPLITS)}")
    name = match["name"] or (re.sub(r"[^\w.-]+", "_", where) if kind in PREPARED else kind)
    return Source(name, kind, where, split, weight)


def held_out_sources(task: str, held_out: tuple[str, ...]) -> tuple[Source, ...]:
    """The held-out sets of a run: those named by config.data.held_out, else the held_out split of every source."""
    if not held_out:
        return tuple(source._replace(split="held_out", weight=1.0) for source in parse(task))
    key = "data.held_out"
    parsed = [parse(entry, key, "held_out") for entry in held_out]
    if several := [entry for entry, found in zip(held_out, parsed, strict=True) if len(found) > 1]:
        raise refused(key, several[0], "one source an entry; list them apart")
    sources = tuple(found for (found,) in parsed)
    if len({source.name for source in sources}) < len(sources):
        raise refused(key, held_out, "sets with names of their own: two share one; as in a=text:GLOB@all")
    return sources


def in_split(source: Source, reading: Reading, identity: bytes) -> bool:
    """Whether a record is in the split of its source, drawn by a hash of what identifies it."""
    if source.split == "all":
        return True
    threshold = round(reading.held_out_fraction * 2**32)
    return (xxhash.xxh3_64_intdigest(identity) % 2**32 < threshold) == (source.split == "held_out")
