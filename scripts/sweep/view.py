"""The display of a running sweep: a live table on a terminal, otherwise one line per run that ends."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from steppe.data import files
from steppe.data.errors import DataError
from steppe.lm.keep.exits import STOPPED
from steppe.lm.track import lines
from steppe.lm.track.waiting import clock_face
from steppe.scripts import results
from steppe.scripts.sweep.launch import Job
from steppe.scripts.sweep.plan import Run, Speed, makespan

EVERY = 30.0  # seconds between lines, where there is no terminal


class View:
    """Shows the runs of a sweep.

    jobs: runs at a time. until: {name: step} at which a run stops for now.
    """

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
        outcomes = {run.name: results.read_json(run.directory / results.OUTCOME, results.Outcome) for run in runs}
        self._statuses = {name: outcome["status"] for name, outcome in outcomes.items() if outcome}
        self._began: dict[str, float] = {}
        self._spent = self._expected = 0.0  # seconds of the runs that ended here, measured and estimated
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
        self._began[job.run.name] = job.began
        self._running.append(job)

    def ended(self, run: Run, outcome: dict[str, Any], status: int) -> None:
        """Counts and prints the end of a run. outcome: {} if the run is to resume; status: its exit status."""
        self._running = [job for job in self._running if job.run.name != run.name]
        named = outcome.get("status", "unfinished")
        why = outcome.get("why", f"exit status {status}")
        if not outcome and run.name in self._until and status == STOPPED:
            named, why = "waiting", f"at step {self._until[run.name]}, to be compared"
        self._statuses[run.name] = named
        seconds = self._now() - self._began.get(run.name, self._now())
        if named == "finished" and run.name in self._began:
            self._spent += seconds
            self._expected += self._seconds(run)
        loss = f"  loss {outcome['loss']:.4f}" if outcome.get("loss") is not None else ""
        self._print(
            f"[{len(self._statuses)}/{self._total}] {named:<10} {run.name}{loss}  {clock_face(seconds)}"
            + (f"  {why}" if why else "")
            + f"  (left {clock_face(self._left())})"
        )

    def tick(self, running: Sequence[Job], waiting: Sequence[Run]) -> None:
        """Call often: redraws the table at most once a second, or says where it stands once in a while."""
        self._running, self._waiting = list(running), list(waiting)
        if self._now() - self._shown < (EVERY if self._live is None else 1.0):
            return
        self._shown = self._now()
        if self._live is None:
            self._print(self._stand())
        else:
            self._live.update(self._table(), refresh=True)

    def _seconds(self, run: Run) -> float:
        return self._speed.seconds(run, self._until.get(run.name, run.steps) / run.steps)

    def _left(self) -> float:
        """Estimated seconds until the last run ends, corrected by the errors of earlier estimates."""
        pace = self._spent / self._expected if self._expected else 1.0
        rest = [
            max(0.0, self._seconds(job.run) * pace - (self._now() - self._began[job.run.name])) for job in self._running
        ]
        return makespan(rest + [self._seconds(run) * pace for run in self._waiting], self._slots)

    def _table(self):
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for title in ("run", "step", "loss", "ETA"):
            table.add_column(title, justify="left" if title == "run" else "right", no_wrap=title != "run")
        for job in self._running:
            step, loss = progress(job.run.directory)
            elapsed = self._now() - job.began
            left = max(0.0, self._seconds(job.run) - elapsed)
            name, shown = files.visible(job.run.name), f"{loss:.4f}" if step else ""
            table.add_row(name, f"{step}/{job.run.steps}", shown, clock_face(left))
        table.caption, table.caption_justify = self._stand(), "left"
        return table

    def _stand(self) -> str:
        """How many runs there are of each kind, and the time left."""
        counts = ", ".join(f"{count} {status}" for status, count in sorted(Counter(self._statuses.values()).items()))
        running = f"{len(self._running)} running, {len(self._waiting)} waiting{', ' + counts if counts else ''}"
        return f"{running} of {self._total}; left {clock_face(self._left())}"

    def _print(self, text: str) -> None:
        text = files.visible(text)
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


def progress(directory: Path) -> tuple[int, float]:
    """(last recorded step, its training loss) of a running run, from the end of metrics.jsonl; (0, nan) if none."""
    try:
        last = lines.latest(directory, ("train",)).get("train", {})
    except DataError:
        last = {}
    return last.get("step", 0), last.get("loss", float("nan"))
