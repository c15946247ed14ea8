"""metrics.jsonl: reads its lines, truncates it, and encodes numbers as JSON. Imports nothing heavy."""

import array
import contextlib
import math
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Required, TypedDict

import msgspec
from msgspec import Meta

from steppe.data import files, stored

if TYPE_CHECKING:
    import numpy as np

METRICS = "metrics.jsonl"
AVERAGES = "averages"  # the workdir's folder for measurements of averaged weights
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
Number = float | None | Literal["nan", "inf", "-inf"]  # in the form that `plain` writes
Name = Annotated[str, Meta(pattern=r"^\w[\w.+-]{0,99}$")]  # usable as the name of a folder

COMMON: dict[str, Any] = {"kind": Required[str], "step": Required[stored.Count], "name": str, "weights": str}
LOSSES = {"name": Required[str], "loss": Required[Number], "bits_per_byte": Number, "tokens": Number}
FLOPS = ("flops", "adamw_flops", "flops_per_step", "adamw_flops_per_step", "tokens_per_step")
# {kind: the values that are read}; later versions added those that are not Required
KINDS: dict[str, Any] = {
    "run": {  # one per start
        "title": str, "steps": stored.Count, "tokens": stored.Count, **dict.fromkeys(FLOPS, float),
        "parameters": dict[str, stored.Count], "baselines": dict[str, Number], "versions": dict[str, str],
    },
    "train": {
        "tokens": stored.Count, **dict.fromkeys(("seconds", "loss", "perturbed_loss", "tokens_per_second"), Number),
    },
    "evaluate": LOSSES,
    "average": {**LOSSES, "weights": Required[Name]},  # weights other than those that the run is judged by
    "anomaly": {"what": Required[str], "decision": str},  # a bad step
    "parted": {"cosine": Required[Number], "usual": Required[Number]},  # of the gradients of a step's two passes
    "rollback": {
        "to": Required[stored.Count], "because": Required[dict[str, Any]],
        "windows": Required[list[tuple[stored.Count, stored.Count]]],  # batches skipped since then
    },
    "branch": {"parent": Required[str], "parent_run": str},
    "change": {"key": Required[str]},  # a config key that a restart changed
    "curvature": {"all": dict[str, Number]},
    "goodput": {"goodput": dict[str, stored.Amount]},  # seconds by kind
    "checkpoint": {"goodput": dict[str, stored.Amount]},
}  # fmt: skip
EVALUATED = ("evaluate", "average", "choices")  # the kinds of an evaluation
_MADE: Any = TypedDict  # type checkers accept only literal fields
RECORD = _MADE("record", COMMON, total=False)
KINDS = {kind: _MADE(kind, {**COMMON, **values}, total=False) for kind, values in KINDS.items()}


class Train(NamedTuple):
    """The training steps of a record, in order, as arrays [n]; NaN for numbers that a step lacks.

    apart: whether something else, or nothing, was recorded right before the step; its time then includes that.
    """

    step: "np.ndarray"
    tokens: "np.ndarray"
    seconds: "np.ndarray"
    loss: "np.ndarray"
    perturbed_loss: "np.ndarray"
    apart: "np.ndarray"


class Records(NamedTuple):
    """The content of a metrics.jsonl: its training steps, and every other record in order."""

    train: Train
    others: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The other records of one kind."""
        return [record for record in self.others if record["kind"] == kind]


_BLOCK = 1 << 20  # bytes read at a time from the end
_LONGEST = 16 << 20  # most bytes read of a line


class _Step(msgspec.Struct, tag_field="kind", tag="train"):
    """A train line; the fields of Train without `apart`. Decoding only these is several times faster than a record."""

    step: stored.Count
    tokens: stored.Count = 0
    seconds: float = math.nan
    loss: float = math.nan
    perturbed_loss: float = math.nan


_STEP = msgspec.json.Decoder(_Step)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; nothing if it is absent."""
    with contextlib.suppress(FileNotFoundError), files.ordinary(path) as handle:
        while line := handle.readline(_LONGEST):
            yield line


def read(workdir: str | os.PathLike) -> Records:
    """The records of a run's metrics.jsonl, without torn or damaged lines; no records if it is absent.

    Non-finite numbers are floats again. Raises stored.Wrong for a complete line that no run writes.
    """
    import numpy as np  # imported here because other commands do not need it

    rows, apart, others, after, path = array.array("d"), bytearray(), [], True, Path(workdir) / METRICS
    for number, line in enumerate(_lines(path), 1):
        try:
            step = _STEP.decode(line)
        except (ValueError, RecursionError):  # another record, a damaged line, or a number that is not finite
            record = _typed(line, f"{path}: line {number}")
            if record is None:
                continue
            if record["kind"] != "train":
                others.append(record)
                after = True
                continue
            step = msgspec.convert(record, _Step)
        rows.extend(msgspec.structs.astuple(step))
        apart.append(after)
        after = False
    step, tokens, *numbers = np.frombuffer(rows, np.float64).reshape(-1, len(Train._fields) - 1).T
    counts = step.astype(np.int64), tokens.astype(np.int64)
    return Records(Train._make((*counts, *numbers, np.frombuffer(apart, bool))), others)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Every complete record of a metrics.jsonl, in order, with all its values; slower than `read`."""
    for record in map(_record, _lines(path)):
        if record is not None:
            yield restored(record)


def restored(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose non-finite numbers are floats again."""
    return _restore(record, nothing=None if record["kind"] in ("run", "change") else math.nan)


def evaluated(path: Path, step: int) -> int:
    """How many records of the evaluation after `step` updates metrics.jsonl has."""
    if not path.exists():
        return 0
    with open(path, "rb") as handle:
        handle.seek(_tail(path, step))
        records = map(_record, handle)
        return sum(record is not None and record["step"] == step and record["kind"] in EVALUATED for record in records)


def rewind(path: Path, step: int, without: Collection[str] = ("change",)) -> list[str]:
    """Truncates metrics.jsonl to the records up to `step` updates (-1: empties it); returns lines for the user.

    without: the kinds of which those of `step` itself go too. A change belongs to the restart that made it: a restart
    from the same step records it again. Reads from the end, only as far as necessary. A kill leaves the old file or the
    new one.
    """
    if not path.exists():
        return []
    begin = _tail(path, step)
    with open(path, "rb") as handle:
        handle.seek(begin)
        tail = handle.read()
    *lines, end = tail.split(b"\n")
    records = [(line, _record(line)) for line in lines]
    torn = len(end)
    if not torn and records and records[-1][1] is None:  # zeros or half a line: a block that was never written
        torn = len(records.pop()[0])
    broken = sum(record is None for _, record in records)
    problems = [f"{path.name}: dropped a torn last line of {torn} bytes"] if torn else []
    problems += [f"{path.name}: dropped {broken} damaged lines"] if broken else []
    kept = b"".join(
        line + b"\n"
        for line, record in records
        if record and (record["step"] < step or (record["step"] == step and record["kind"] not in without))
    )
    if tail.startswith(kept):
        if len(kept) < len(tail):
            os.truncate(path, begin + len(kept))
            files.sync(path)
    else:
        with files.replacing(path) as aside:
            shutil.copyfile(path, aside)
            os.truncate(aside, begin)
            with open(aside, "ab") as handle:
                handle.write(kept)
    if step > 0:
        with open(path, "rb") as handle:
            missing = step - sum(line.startswith(b'{"kind": "train"') for line in handle)
        if missing > 0:
            problems.append(f"{path.name}: {missing} of the {step} steps before this start are missing")
    return problems


def _tail(path: Path, step: int) -> int:
    """The position in metrics.jsonl from which records may be of a step >= `step`; steps only grow."""
    position = path.stat().st_size
    with open(path, "rb") as handle:
        while position > 0 and step > 0:
            position = max(0, position - _BLOCK)
            handle.seek(position)
            if position:
                position += len(handle.readline())
            first = _record(handle.readline())
            if first is not None and first["step"] < step:
                break
    return position if step > 0 else 0


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None for a damaged one, because a kill can cut a line or leave zeros."""
    try:
        return stored.decode(line, RECORD, METRICS)
    except stored.Wrong:
        return None


def _typed(line: bytes, place: str) -> dict[str, Any] | None:
    """The record with its original numbers. Raises stored.Wrong for values that do not fit its kind."""
    record = _record(line)
    if record is None:
        return None
    stored.typed(record, KINDS.get(record["kind"], RECORD), place)
    return restored(record)


def number(value: Any) -> Any:
    """A Python value from a scalar array; other values unchanged."""
    return value.item() if hasattr(value, "item") else value


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    value = number(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _restore(value: Any, nothing: float | None) -> Any:
    """The original value. nothing: the value of null."""
    if isinstance(value, dict):
        return {key: _restore(item, nothing) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item, nothing) for item in value]
    if value is None:
        return nothing
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def latest(workdir: str | os.PathLike, kinds: tuple[str, ...] = ("run", "train", "evaluate")) -> dict[str, dict]:
    """{kind: its last record} of a run, for kinds that occur. Reads from the file's end. Raises stored.Wrong."""
    path, found = Path(workdir) / METRICS, {}
    begins = {kind: b'\n{"kind": "%s",' % kind.encode() for kind in kinds}
    with contextlib.suppress(FileNotFoundError), files.ordinary(path) as handle:
        end = position = os.fstat(handle.fileno()).st_size
        after = b""  # the start of the block read before, where a line may begin
        while position and len(found) < len(kinds):
            position = max(0, position - _BLOCK)
            handle.seek(position)
            block = (b"\n" if position == 0 else b"") + handle.read(min(_BLOCK, end - position)) + after
            for kind in [kind for kind in kinds if kind not in found]:
                at, last = len(block), None
                while last is None and (at := block.rfind(begins[kind], 0, at)) >= 0:
                    handle.seek(position + at + (position > 0))
                    last = _typed(handle.readline(_LONGEST), f"{path}: its last line of the kind {kind}")
                if last is not None:
                    found[kind] = last
            end, after = position, block[: max(map(len, begins.values()))]
    return found
