"""metrics.jsonl: its lines read, cut back, and numbers as JSON has them. Imports nothing heavy."""

import array
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from steppe.data import files

if TYPE_CHECKING:
    import numpy as np

METRICS = "metrics.jsonl"
AVERAGES = "averages"  # the folder of a workdir for what is measured of the averages that the run keeps
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Train(NamedTuple):
    """The training steps of a record, in order, as arrays [n]; NaN where a step has no such number.

    apart: whether something else was recorded right before the step, or nothing: its clock then also ran for that.
    """

    step: "np.ndarray"
    tokens: "np.ndarray"
    seconds: "np.ndarray"
    loss: "np.ndarray"
    perturbed_loss: "np.ndarray"
    apart: "np.ndarray"


class Records(NamedTuple):
    """What a metrics.jsonl holds: its training steps, and every other record in order."""

    train: Train
    others: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The other records of one kind."""
        return [record for record in self.others if record["kind"] == kind]


# The numbers of lines as `step` writes them, in their order: parsing the whole of them takes several times as long.
_BLOCK = 1 << 20  # bytes read at a time
_NUMBERS = re.compile(rb'"(?:step|tokens|seconds|loss|perturbed_loss)": ([^,}]+)')
_STEP, _END_OF_STEPS = b'{"kind": "train", ', re.compile(rb'\n(?!\{"kind": "train", )')


def _steps_from(content: bytes, position: int) -> bytes:
    """The whole lines of steps that follow one another from a position on."""
    if not content.startswith(_STEP, position):
        return b""
    end = _END_OF_STEPS.search(content, position)
    return content[position : end.end()] if end else b""


def _numbers(lines: bytes) -> "np.ndarray | None":
    """[n, 5] of the lines of steps, as Train has them but for `apart`; None of lines that have to be looked at."""
    import numpy as np

    text = np.frombuffer(lines, np.uint8)  # in which numpy counts several times as fast as Python
    ends = np.flatnonzero(text == ord("\n"))
    count = len(ends)
    if np.count_nonzero(text == ord("{")) != count or (text[ends - 1] != ord("}")).any():  # torn, or of something else
        return None
    found = _NUMBERS.findall(lines)
    if len(found) not in (4 * count, 5 * count):
        return None
    try:
        rows = np.fromiter(map(float, found), np.float64, len(found)).reshape(count, -1)
    except ValueError:
        return None
    return np.pad(rows, ((0, 0), (0, 5 - rows.shape[1])), constant_values=np.nan)


def _blocks(path: Path) -> Iterator[bytes]:
    """A file in parts of whole lines; nothing where there is none."""
    if path.exists():
        with open(path, "rb") as handle:
            while block := handle.read(_BLOCK):
                yield block + handle.readline()


def read(workdir: str | os.PathLike) -> Records:
    """The records of a run's metrics.jsonl, without torn or damaged lines; no records where there is none.

    Numbers that are not finite are floats again.
    """
    import numpy as np  # here: commands that read no run do without it

    rows, others, apart = array.array("d"), [], True
    for content in _blocks(Path(workdir) / METRICS):
        position = 0
        while position < len(content):
            lines = _steps_from(content, position)
            block = _numbers(lines) if lines else None
            if block is not None:
                first = np.zeros((len(block), 1))
                first[0], apart, position = apart, False, position + len(lines)
                rows.frombytes(np.hstack([block, first]).tobytes())
                continue
            end = content.find(b"\n", position) + 1 or len(content)
            record = _record(content[position:end])
            position = end
            if record is None:
                continue
            record = _restore(record, nothing=None if record["kind"] in ("run", "change") else math.nan)
            if record["kind"] == "train":
                numbers = (record.get(name) for name in Train._fields[1:-1])
                rows.extend((record["step"], *(math.nan if n is None else n for n in numbers), apart))
            else:
                others.append(record)
            apart = record["kind"] != "train"
    columns = np.frombuffer(rows, np.float64).reshape(-1, len(Train._fields)).T
    step, tokens, *numbers, apart = columns
    return Records(Train(step.astype(np.int64), np.nan_to_num(tokens).astype(np.int64), *numbers, apart > 0), others)


def last_steps(workdir: str | os.PathLike) -> dict[tuple[str, str], int]:
    """{(kind, name): the last step recorded} of a run; name: of a held-out set, SET/WEIGHTS of an average's, or ""."""
    train, others = read(workdir)
    found = {("train", ""): int(train.step.max())} if len(train.step) else {}
    for record in others:
        key = record["kind"], "/".join(filter(None, (record.get("name", ""), record.get("weights", ""))))
        found[key] = max(record["step"], found.get(key, -1))
    return found


def rewind(path: Path, step: int) -> list[str]:
    """Cuts metrics.jsonl back to what was known after `step` updates (-1: empties it); returns what a reader must know.

    Read from its end, as far as what is cut. A kill leaves the old file or the new one.
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
    if not torn and records and records[-1][1] is None:  # zeros, or half a line, where a block was never written
        torn = len(records.pop()[0])
    broken = sum(record is None for _, record in records)
    problems = [f"{path.name}: dropped a torn last line of {torn} bytes"] if torn else []
    problems += [f"{path.name}: dropped {broken} damaged lines"] if broken else []
    # a change belongs to the restart that made it: restarted from the same step, it is recorded anew
    kept = b"".join(
        line + b"\n"
        for line, record in records
        if record and (record["step"] < step or (record["step"] == step and record["kind"] != "change"))
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
        missing = step - _count(path, b'{"kind": "train"')
        if missing > 0:
            problems.append(f"{path.name}: {missing} of the {step} steps before this start are not in it")
    return problems


def _tail(path: Path, step: int) -> int:
    """Where the part of a metrics.jsonl begins in which something may be of a step >= `step`: steps only grow."""
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


def _count(path: Path, start: bytes) -> int:
    """Lines of a file that begin so."""
    with open(path, "rb") as handle:
        return sum(line.startswith(start) for line in handle)


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None of one that is damaged: a kill cuts a line short or leaves zeros."""
    try:
        record = json.loads(line)
        return {**record, "kind": str(record["kind"]), "step": int(record["step"])}
    except (ValueError, KeyError, TypeError):
        return None


def number(value: Any) -> Any:
    """A Python number (or text, truth, None) from it or from a scalar array."""
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
    """A value as it was recorded. nothing: what null stands for."""
    if isinstance(value, dict):
        return {key: _restore(item, nothing) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item, nothing) for item in value]
    if value is None:
        return nothing
    return _NONFINITE.get(value, value) if isinstance(value, str) else value


def latest(workdir: str | os.PathLike, kinds: tuple[str, ...] = ("run", "train", "evaluate")) -> dict[str, dict]:
    """{kind: its last record} of a run, as far as there are any; the file is read from its end."""
    path, found, after = Path(workdir) / METRICS, {}, b""
    position = path.stat().st_size if path.exists() else 0
    with open(path if path.exists() else os.devnull, "rb") as handle:
        while position and len(found) < len(kinds):
            size = min(position, _BLOCK)
            position -= size
            handle.seek(position)
            block = handle.read(size) + after
            after, *whole = block.split(b"\n") if position else [b"", *block.split(b"\n")]
            for line in reversed(whole):
                record = _record(line) if line else None
                if record is not None and record["kind"] in kinds:
                    found.setdefault(record["kind"], _restore(record, nothing=math.nan))
    return found
