"""The display of a running sweep: a live table on a terminal, otherwise one line per run that ends."""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from steppe.data import files
from steppe.lm.keep.exits import STOPPED
from steppe.lm.track.waiting import clock_face, columns, say
from steppe.scripts.sweep.launch import Job
from steppe.scripts.sweep.plan import Run, Speed, makespan, progress

EVERY = 30.0  # seconds between lines, where there is no terminal


class View:
    """Shows the runs of a sweep. jobs: runs at a time; until: {name: step} at which a run stops for now."""

    def __init__(
        self,
        runs: Sequence[Run],
        speed: Speed,
        jobs: int,
        until: Mapping[str, int] | None = None,
        *,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.time,
    ):
        self._total, self._speed, self._slots, self._now = len(runs), speed, jobs, now
        self._stream = stream or sys.stderr
        self._until = until or {}
        self._statuses = {run.name: outcome["status"] for run in runs if (outcome := run.outcome)}
        self._begun: dict[str, tuple[float, int]] = {}  # {name: (time, step)} of a start here
        self._marks: dict[str, tuple[float, int]] = {}  # where its first step since then was seen
        self._ended: list[tuple[float, float]] = []  # what `_made` said of runs that finished here
        self._running: list[Job] = []
        self._waiting: list[Run] = []
        self._shown, self._live = 0.0, None
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream)
            self._live = Live(console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live.start()

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.update("", refresh=True)
            self._live.stop()

    def started(self, job: Job) -> None:
        self._begun[job.run.name] = job.began, progress(job.run.directory)[0]
        self._marks.pop(job.run.name, None)
        self._running.append(job)

    def ended(self, run: Run, outcome: dict[str, Any], status: int) -> None:
        """Counts and prints the end of a run. outcome: {} if the run is to resume; status: its exit status."""
        self._running = [job for job in self._running if job.run.name != run.name]
        named = outcome.get("status", "unfinished")
        why = outcome.get("why", f"exit status {status}")
        if not outcome and run.name in self._until and status == STOPPED:
            named, why = "waiting", f"at step {self._until[run.name]}, to be compared"
        self._statuses[run.name] = named
        began, _ = self._begun.get(run.name, (self._now(), 0))
        self._ended += [self._made(run)] if named == "finished" else []
        loss = f"  loss {outcome['loss']:.4f}" if outcome.get("loss") is not None else ""
        line = f"[{len(self._statuses)}/{self._total}] {named:<10} {run.name}{loss}  {clock_face(self._now() - began)}"
        say(line + f"  {why}" * bool(why) + f"  (left {clock_face(self._left())})", self._live, self._stream)

    def tick(self, running: Sequence[Job], waiting: Sequence[Run]) -> None:
        """Call often: redraws the table at most once a second, or says where it stands once in a while."""
        self._running, self._waiting = list(running), list(waiting)
        for run in [job.run for job in running]:
            if run.name not in self._marks and (step := progress(run.directory)[0]) > self._begun[run.name][1]:
                self._marks[run.name] = self._now(), step
        if self._now() - self._shown < (EVERY if self._live is None else 1.0):
            return
        self._shown = self._now()
        if self._live is None:
            say(self._stand(), None, self._stream)
        else:
            from rich.text import Text

            self._live.update(Text(self._table(self._live.console.width)), refresh=True)

    def _cost(self, run: Run, steps: int) -> float:
        """Estimated seconds of some of a run's steps; their FLOPs where the speed is unknown."""
        rate = self._speed.rate(run)
        return max(0, steps) / run.steps * run.flops / (1.0 if math.isnan(rate) else rate)

    def _made(self, run: Run) -> tuple[float, float]:
        """Seconds since the first step of a run was seen here, and the cost of the steps since then."""
        if run.name not in self._marks:
            return 0.0, 0.0
        at, step = self._marks[run.name]
        return self._now() - at, self._cost(run, progress(run.directory)[0] - step)

    @property
    def _pace(self) -> float:
        """Seconds that a unit of cost took here so far; 1 before that is known, NaN where the speed is unknown too."""
        made = [*self._ended, *(self._made(job.run) for job in self._running)]
        seconds, costs = (sum(each[part] for each in made) for part in (0, 1))
        return seconds / costs if costs else 1.0 if self._speed.startup >= 0 else math.nan

    def _seconds(self, run: Run, pace: float) -> float:
        """Estimated seconds of what a run still has to do: its start, and the steps ahead."""
        began, _ = self._begun.get(run.name, (self._now(), 0))
        startup = self._speed.startup - (self._now() - began) if run.name not in self._marks else 0.0
        steps = self._until.get(run.name, run.steps) - progress(run.directory)[0]
        return max(0.0, startup if startup == startup else 0.0) + pace * self._cost(run, steps)

    def _left(self) -> float:
        """Estimated seconds until the last run ends."""
        pace, runs = self._pace, [job.run for job in self._running] + self._waiting
        return makespan([self._seconds(run, pace) for run in runs], self._slots)

    def _table(self, width: float) -> str:
        rows, pace = [("run", "step", "loss", "ETA")], self._pace
        for job in self._running:
            step, loss = progress(job.run.directory)
            left = clock_face(self._seconds(job.run, pace))
            shown = f"{loss:.4f}" if step else ""
            rows.append((files.visible(job.run.name), f"{step}/{job.run.steps}", shown, left))
        return f"{columns(rows, width)}\n{self._stand()}"

    def _stand(self) -> str:
        """How many runs there are of each kind, and the time left."""
        counts = ", ".join(f"{count} {status}" for status, count in sorted(Counter(self._statuses.values()).items()))
        running = f"{len(self._running)} running, {len(self._waiting)} waiting{', ' + counts if counts else ''}"
        return f"{running} of {self._total}; left {clock_face(self._left())}"
