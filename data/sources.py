"""The grammar of text sources, and the records that readers return.

A task is `SOURCE` or `WEIGHT SOURCE + WEIGHT SOURCE ...`. A source is `[NAME=]KIND[:WHERE][@SPLIT]`; data/README.md
lists the kinds. A path may contain @ and +, unless a split follows the last @, or a source follows " + ".
"""

import re
from typing import NamedTuple

import xxhash

from steppe.data.errors import refused

BUILT_IN = ("embedded", "topics")  # kinds without WHERE
FILES = ("text", "lines", "jsonl", "parquet")
PREPARED = ("tfds", "seqio", "hf")  # kinds with splits of their own
READY = {  # short names of data sets of the hub
    "fineweb-edu": "HuggingFaceFW/fineweb-edu/sample-10BT",
    "wikitext-103": "Salesforce/wikitext/wikitext-103-raw-v1",
    "tinystories": "roneneldan/TinyStories",
    "c4": "allenai/c4/en",
}
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

    @property
    def address(self) -> str:
        """KIND or KIND:WHERE."""
        return f"{self.kind}:{self.where}" if self.where else self.kind


class Limit(NamedTuple):
    """How much of a split to read: until one of both is reached. given: whether the source says it."""

    documents: float = float("inf")
    bytes: float = float("inf")
    given: bool = False


class Reading(NamedTuple):
    """The keys of config.data that readers need in addition to the source."""

    text_field: str = "text"
    held_out_fraction: float = 0.0
    tfds_dir: str = ""
    seqio_module: str = ""


class Record(NamedTuple):
    """One record: its text, or a fault and the location of the record."""

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
            raise refused(key, task, f"sources with different names, such as {example}; two are called {name!r}")
    return tuple(sources)


def _parse_source(part: str, key: str, split: str, weighted: bool) -> Source:
    grammar = f"[WEIGHT ][NAME=]KIND[:WHERE][@SPLIT], KIND one of {', '.join(KINDS)}"
    body, at, end = part.rpartition("@")
    match = _SOURCE.fullmatch(part)
    if at and "/" not in end and end:
        before = _SOURCE.fullmatch(body)
        # A path may hold an @: for files, only a split after it counts.
        if before and (before["kind"] in PREPARED or end in SPLITS or not match):
            match, split = before, end
    if not match:
        raise refused(key, part, grammar)
    kind, where = match["kind"], match["where"] or ""
    if (kind in BUILT_IN) == bool(where):
        raise refused(key, part, f"{grammar}; {kind} {'takes no' if where else 'needs'} WHERE")
    try:
        weight = float(match["weight"]) if match["weight"] else 1.0
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf") or (weighted and not match["weight"]):
        raise refused(key, part, f"a weight > 0 before every source of a mixture, such as '0.7 {part.split()[-1]}'")
    if kind not in PREPARED and split not in SPLITS:
        raise refused(key, part, f"a source with one of the splits of {kind}: {', '.join(SPLITS)}")
    if kind == "hf" and not _HUB.fullmatch(where):
        raise refused(key, part, f"hf:OWNER/NAME[/CONFIG][:REVISION], or hf: and one of {', '.join(READY)}")
    if kind == "hf" and not _HUB_SPLIT.fullmatch(split):
        accepted = "@SPLIT, @SPLIT[:100000] (documents), @SPLIT[:1GB] (of text; kB to TB) or @SPLIT[:all]"
        raise refused(key, part, accepted)
    name = match["name"] or (re.sub(r"[^\w.-]+", "_", where) if kind in PREPARED else kind)
    return Source(name, kind, where, split, weight)


_HUB = re.compile(rf"(?:{'|'.join(map(re.escape, READY))}|[\w.-]+/[\w.-]+(?:/[^:@]+)?)(?::[^:@]+)?")
_HUB_SPLIT = re.compile(r"([\w.-]+)(\[:(?:all|(\d+)|(\d+(?:\.\d+)?)([kMGT]?)B)\])?")


def hub_split(split: str) -> tuple[str, Limit]:
    """(name, limit) of the split of an hf source."""
    match = _HUB_SPLIT.fullmatch(split)
    assert match
    name, limit, documents, size, unit = match.groups()
    scale = 1000.0 ** " kMGT".index(unit or " ")
    return name, Limit(float(documents or "inf"), float(size or "inf") * scale, bool(limit))


def held_out_sources(task: str, held_out: tuple[str, ...]) -> tuple[Source, ...]:
    """The held-out sets of a run: those of config.data.held_out, else the held_out split of every source."""
    if not held_out:
        sets = []
        for source in parse(task):  # a limit of the hub's sets holds for the held-out split too
            limit = source.split.partition("[")[1:] if source.kind == "hf" else ()
            sets.append(source._replace(split="".join(("held_out", *limit)), weight=1.0))
        return tuple(sets)
    key = "data.held_out"
    parsed = [parse(entry, key, "held_out") for entry in held_out]
    if several := [entry for entry, listed in zip(held_out, parsed, strict=True) if len(listed) > 1]:
        raise refused(key, several[0], "one source per entry")
    sources = tuple(source for (source,) in parsed)
    if len({source.name for source in sources}) < len(sources):
        raise refused(key, held_out, "sets with different names: two are equal; name them, such as a=text:GLOB@all")
    return sources


def in_split(source: Source, reading: Reading, identity: bytes) -> bool:
    """Whether a record is in the split of its source. A hash of its `identity` decides."""
    if source.split == "all":
        return True
    threshold = round(reading.held_out_fraction * 2**32)
    return (xxhash.xxh3_64_intdigest(identity) % 2**32 < threshold) == (source.split == "held_out")
