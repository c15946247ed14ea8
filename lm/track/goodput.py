"""Where the wall-clock of a run goes: every second, of all of its starts, counts for one thing."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from steppe.lm.track.lines import Records

# kind: how it is called; only the first is what the run is for
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
    """A clock that always runs for one kind; `start` at first. clock: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._kind, self._since = clock, "start", clock()
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._marks: dict[int, float] = {}

    @contextmanager
    def spending(self, kind: str) -> Iterator[None]:
        """Time counts for this kind while the `with` block runs."""
        before = self._turn(kind)
        try:
            yield
        finally:
            self._turn(before)

    def move(self, seconds: float, source: str, target: str) -> None:
        """So many seconds were spent on another kind than was thought."""
        self._turn(self._kind)
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def mark(self, step: int) -> None:
        """The run can go back to this step."""
        self._turn(self._kind)
        self._marks[step] = self._seconds["step"]

    def back(self, step: int) -> None:
        """The run goes back to a step: what its steps have taken since is lost."""
        self._turn(self._kind)
        since = max((at for at in self._marks if at <= step), default=None)
        self.move(self._seconds["step"] - (self._marks[since] if since is not None else 0.0), "step", "lost")

    def add(self, earlier: Mapping[str, float]) -> None:
        """What earlier starts of the run spent."""
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
    """What the starts before this one spent, of a run that goes on after `step` updates: as they had recorded it by
    then, and the time of what they did since, which is lost."""
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
    """The share of the wall-clock that went into steps that count; NaN of a run that recorded none."""
    total = sum(seconds.values())
    return seconds["step"] / total if total else float("nan")


def described(seconds: Mapping[str, float], mfu: float = 0.0) -> str:
    """One line for the reader. mfu: of the steps that count, 0 where unknown."""
    parts = [f"{KINDS[kind]} {_short(spent)}" for kind, spent in seconds.items() if kind != "step" and spent >= 0.05]
    used = f"MFU {mfu:.1%} in them, {mfu * share(seconds):.1%} of all; " if mfu else ""
    return f"{share(seconds):.1%} of {_short(sum(seconds.values()))} in steps; {used}{', '.join(parts)}"


def _short(seconds: float) -> str:
    for size, letter in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {letter}"
    return f"{seconds:.1f} s"
