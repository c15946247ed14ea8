"""What a run's wall-clock time is spent on: each second of all its starts counts for one kind."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from steppe.lm.track.lines import Records

# kind: its name in the output; the share of the first is the goodput
KINDS = {
    "step": "steps",
    "data": "waiting for data",
    "evaluate": "evaluations",
    "curvature": "curvature",
    "save": "checkpoints",
    "compile": "compiling",
    "start": "starting",
    "other": "the rest",
    "lost": "steps done again",
}


class Goodput:
    """A clock that counts for one kind at a time, at first `start`. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._kind, self._since = clock, "start", clock()
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._marks: dict[int, float] = {}

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Counts time for this kind while the `with` block runs."""
        before = self._turn(kind)
        try:
            yield
        finally:
            self._turn(before)

    def move(self, seconds: float, source: str, target: str) -> None:
        """Moves seconds from one kind to another."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def mark(self, step: int) -> None:
        """Marks a step that the run can go back to."""
        self._marks[step] = self.seconds()["step"]

    def back(self, step: int) -> None:
        """The run goes back to a step: the time of steps since then counts as lost."""
        since = max((at for at in self._marks if at <= step), default=-1)
        self.move(self.seconds()["step"] - self._marks.get(since, 0.0), "step", "lost")

    def add(self, earlier: Mapping[str, float]) -> None:
        """Adds the time of earlier starts of the run."""
        for kind, seconds in earlier.items():
            self._seconds[kind if kind in KINDS else "other"] += seconds

    def seconds(self) -> dict[str, float]:
        """{kind: seconds until now}."""
        self._turn(self._kind)
        return dict(self._seconds)

    def _turn(self, kind: str) -> str:
        now, before = self._clock(), self._kind
        self._seconds[before] += now - self._since
        self._since, self._kind = now, kind
        return before


def earlier(records: Records, step: int) -> dict[str, float]:
    """The recorded time of earlier starts of a run that resumes after `step` updates; that of later steps is lost."""
    known: dict[str, float] = {}
    for record in records.others:
        if record["step"] <= step and isinstance(record.get("goodput"), dict):
            known = {kind: float(seconds) for kind, seconds in record["goodput"].items()}
    train = records.train
    again = train.step > step
    if again.any():
        clock = train.seconds[again]
        begin = train.seconds[train.step == step]
        begin = begin[-1] if len(begin) and begin[-1] < clock[0] else clock[0]
        known["lost"] = known.get("lost", 0.0) + float(clock.max() - begin)
    return known


def share(seconds: Mapping[str, float]) -> float:
    """The share of wall-clock time spent in steps that count; NaN if no time is recorded."""
    total = sum(seconds.values())
    return seconds["step"] / total if total else float("nan")


def described(seconds: Mapping[str, float], mfu: float = 0.0) -> str:
    """The times as one line. mfu: of the steps that count, 0 if unknown."""
    parts = [f"{KINDS[kind]} {_short(spent)}" for kind, spent in seconds.items() if kind != "step" and spent >= 0.05]
    used = f"MFU {mfu:.1%} in them, {mfu * share(seconds):.1%} of all; " if mfu else ""
    return f"{share(seconds):.1%} of {_short(sum(seconds.values()))} in steps; {used}{', '.join(parts)}"


def _short(seconds: float) -> str:
    for size, letter in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {letter}"
    return f"{seconds:.1f} s"
