"""Traces some steps for xprof and TensorBoard's profile plugin: config.log.profile = "steps 20-25"."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from steppe.configs.keys import ConfigError
from steppe.lm.parts.progress import Event, Progress
from steppe.lm.track.tracker import Tracker

KEY = "log.profile"


def check(text: str, first: int, last: int) -> None:
    """Raises ConfigError if `text` names steps outside of `first` to `last`, which the run executes."""
    named = _steps_of(text)
    if text and not (named and first <= named[0] and named[-1] <= last):
        raise ConfigError(KEY, text, f"steps of the run, from {first} to {last}")


class Profile:
    """Traces the named steps into WORKDIR/profile; a run that resumes among them traces the remaining ones."""

    def __init__(self, config: ConfigDict, workdir: str, tracker: Tracker):
        self._steps, self._tracker = _steps_of(config.log.profile), tracker
        self._folder = str(Path(workdir) / "profile")
        self._first: int | None = None  # the first traced step, during a trace
        self.events = [Event(self._ends, self.end), Event(self.starts, self.start)]

    def starts(self, at: Progress) -> bool:
        """Whether to start a trace now."""
        return self._first is None and at.done + 1 in self._steps

    def _ends(self, at: Progress) -> bool:
        return self._first is not None and at.done + 1 >= self._steps.stop

    def start(self, at: Progress) -> None:
        """Starts a trace."""
        jax.profiler.start_trace(self._folder)
        self._first = at.done + 1

    def end(self, at: Progress) -> None:
        """Writes the current trace, if there is one."""
        if self._first is not None:
            jax.block_until_ready(at.state)
            jax.profiler.stop_trace()
            where = f"{self._folder}; view it with xprof --logdir={self._folder}"
            self._tracker.note(f"profile     steps {self._first} to {at.done} in {where}")
            self._first = None


def _steps_of(text: str) -> range:
    first, _, last = text.removeprefix("steps ").partition("-")
    return range(int(first), int(last) + 1) if text else range(0)
