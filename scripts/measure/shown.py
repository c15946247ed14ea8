"""What a measurement is doing, for whoever waits for it."""

import sys
import time

EVERY = 10.0  # seconds between lines, where there is no bar


class Progress:
    """What is being done: on a terminal a bar on standard error, elsewhere a line now and then on standard output."""

    def __init__(self, doing: str):
        self._total, self._done, self._bar, self._task, self._doing = 0, 0, None, None, doing
        self._said = self._began = time.monotonic()

    def __enter__(self) -> "Progress":
        if not sys.stderr.isatty():
            self.line(self._doing)
            return self
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.BarColumn(bar_width=16), progress.MofNCompleteColumn(), progress.TimeElapsedColumn(),
            progress.TextColumn("{task.description}"), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task(self._doing, total=None)
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def expect(self, total: int) -> None:
        """So many will begin."""
        self._total = total

    def begin(self, name: str, stages: int = 0) -> None:
        """One, of so many stages, is next."""
        self._doing, self._began = f"[{self._done + 1}/{self._total}] {name}", time.monotonic()
        if self._bar is None or self._task is None:
            self.line(self._doing)
        else:
            self._bar.remove_task(self._task)
            self._task = self._bar.add_task(f"{self._doing}  loading", total=stages or None)

    def tick(self, stage: str) -> None:
        """A stage begins."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, description=f"{self._doing}  {stage}")
        elif time.monotonic() - self._said > EVERY:
            self.line(f"{self._doing}  {stage}, after {time.monotonic() - self._began:.0f} s")

    def end(self, text: str) -> None:
        """It is done."""
        self._done += 1
        self.line(f"[{self._done}/{self._total}] {text}  {time.monotonic() - self._began:.1f} s")

    def line(self, text: str) -> None:
        """A line that stays."""
        self._said = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)
