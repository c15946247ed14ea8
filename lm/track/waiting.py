"""Tells whoever waits what is being done and how long it will take: a bar on a terminal, lines elsewhere."""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from steppe.data import files

EVERY = 10.0  # seconds between lines, where there is no bar
FIRST = 1.5  # seconds after which a command says something, whatever it imports
_first: threading.Timer | None = None


def soon(text: str, stream: TextIO | None = None) -> None:
    """Says a text shortly, on standard output or a stream, unless something else is said before."""
    global _first
    heard()
    _first = threading.Timer(FIRST, lambda: print(text, file=stream, flush=True))
    _first.daemon = True
    _first.start()


def heard() -> None:
    """Something was said, or nothing will be: what `soon` was asked to say is dropped."""
    if _first is not None:
        _first.cancel()


def say(text: str, bar: Any, stream: TextIO | None) -> None:
    """Prints a line that stays, above the bar if there is one."""
    if bar is not None:
        bar.console.print(files.visible(text), markup=False, highlight=False, soft_wrap=True)
    else:
        print(files.visible(text), file=stream, flush=True)


def clock_face(seconds: float) -> str:
    """1:02:03 or 2:03; ? if unknown."""
    if math.isnan(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def columns(rows: Sequence[Sequence[str]], width: float = math.inf) -> str:
    """Rows of cells, the heads first, as aligned text. Names, the first column, are never cut: where they make lines
    longer than the width, each takes a line of its own above the rest of its row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    fits, lines = sum(widths) + 2 * len(widths) <= width + 2, []
    for name, *cells in rows:
        rest = "  ".join(cell.rjust(size) for cell, size in zip(cells, widths[1:], strict=True))
        lines += [f"{name.ljust(widths[0])}  {rest}"] if fits else [name, f"  {rest}"]
    return "\n".join(lines)


@contextmanager
def compiling(what: str, log: Callable[[str], None], before: float = 0.0) -> Iterator[None]:
    """Says that `what` is compiled while the `with` block runs, then how long it took. before: seconds that
    earlier starts took for it, 0 if unknown."""
    log(f"compiling   {what}" + f", {before:.1f} s before" * (before > 0))
    began = time.monotonic()
    yield
    log(f"compiled    in {time.monotonic() - began:.1f} s")


class Progress:
    """What is being done, the share of it that is done, and the time left.

    doing: what comes first. A bar is on standard error, if that is a terminal; else lines are on the stream.
    """

    def __init__(self, doing: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
        self._doing, self._stream, self._clock, self._bar = doing, stream, clock, None
        self._costs: Sequence[float] = ()
        self._pace, self._done = math.nan, 0  # seconds per unit of cost; things that are done
        self._stages: Mapping[str, float] = {}
        self._before, self._stage = 0.0, ""  # cost of the stages that are done; the present one
        self._said = self._began = self._first = clock()

    def __enter__(self) -> "Progress":
        if not sys.stderr.isatty():
            if self._stream is None:  # on standard error, bad input is the only line
                self.line(self._doing)
            return self
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.BarColumn(bar_width=16),
            progress.TimeElapsedColumn(),
            progress.TextColumn("{task.fields[owner].text}", markup=False),  # made anew whenever the bar is drawn
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # other output appears above the bar
        )
        self._bar.add_task("", total=None, owner=self)
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._first

    @property
    def share(self) -> float:
        """The share of the present thing whose stages are done."""
        return self._before / (sum(self._stages.values()) or 1.0)

    @property
    def left(self) -> float:
        """Estimated seconds until everything is done; NaN if unknown.

        From the costs at the last thing's pace, at first the expected one; once a fifth of a thing is done, from that.
        """
        if not (ahead := self._costs[self._done :]):
            return math.nan
        gone, (here, *rest), pace = self._clock() - self._began, ahead, self._pace
        now = gone * (1 - self.share) / self.share if self.share >= 0.2 else here * pace - gone
        now = now if not now < 0 else 0.0  # NaN stays
        if not rest:
            return now
        return now + sum(rest) * ((gone + now) / (here or math.nan) if math.isnan(pace) else pace)

    @property
    def next(self) -> float:
        """Estimated seconds of the next thing; 0 if unknown."""
        costs = self._costs[self._done : self._done + 1]
        return costs[0] * self._pace if costs and costs[0] * self._pace > 0 else 0.0

    @property
    def text(self) -> str:
        """What is being done, and the time left where it is known."""
        left = self.left
        said = f"{self._doing}  {self._stage}" if self._stage else self._doing
        return files.visible(said + f"  left {clock_face(left)}" * (left == left))

    def expect(self, costs: Sequence[float], pace: float = math.nan) -> None:
        """So much will be done: a cost of each thing, in any unit. pace: seconds that a unit takes, NaN if unknown."""
        self._costs, self._pace = costs, pace

    def begin(self, name: str, stages: Mapping[str, float] | None = None) -> None:
        """The next thing begins. stages: their costs, in any unit."""
        self._doing, self._began = f"[{self._done + 1}/{len(self._costs)}] {name}", self._clock()
        self._stages, self._before, self._stage = stages or {}, 0.0, ""
        self._draw()
        if self._bar is None:
            self.line(self.text)

    def tick(self, stage: str) -> None:
        """A stage begins; those that were announced before it are done."""
        self._before += self._stages.get(self._stage, 0.0)
        self._stage = stage
        self._draw()
        if self._bar is None and self._clock() - self._said > EVERY:
            self.line(self.text)

    def over(self, name: str, batches: Iterable, total: int) -> Iterator:
        """Begins the next thing, and yields its batches, each of which is a stage."""
        stages = list(map(str, range(total)))
        self.begin(f"{name}: compiling, then {total:,} batches", dict.fromkeys(stages, 1.0))
        for stage, batch in zip(stages, batches, strict=True):
            self.tick(stage)
            yield batch

    def end(self, text: str) -> None:
        """The present thing is done."""
        spent = self._clock() - self._began
        if self._done < len(self._costs) and self._costs[self._done]:
            self._pace = spent / self._costs[self._done]
        self._done, self._began = self._done + 1, self._clock()
        self.line(f"[{self._done}/{len(self._costs)}] {text}  {spent:.1f} s")

    def line(self, text: str) -> None:
        """Prints a line that stays."""
        heard()
        self._said = self._clock()
        say(text, self._bar, self._stream)

    def _draw(self) -> None:
        if self._bar is not None:
            total = len(self._costs)
            self._bar.update(self._bar.task_ids[0], total=total or None, completed=self._done + self.share)
