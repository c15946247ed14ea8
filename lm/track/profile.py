"""A trace of some steps, as xprof and TensorBoard's profile plugin read it: config.log.profile = "steps 20-25"."""

from collections.abc import Callable
from pathlib import Path

FOLDER = "profile"


def steps_of(text: str) -> tuple[int, int] | None:
    """(first, last) of "steps 20-25"; None of ""."""
    first, _, last = text.removeprefix("steps ").partition("-")
    return (int(first), int(last)) if text else None


def outside(text: str, first: int, last: int) -> bool:
    """Whether `text` names steps that a run does not take: it takes steps `first` to `last`."""
    named = steps_of(text)
    return named is not None and not first <= named[0] <= named[1] <= last


class Profile:
    """Traces the steps that `text` names into WORKDIR/profile; of a run that goes on among them, those that are left.

    note(line): what a reader must know.
    """

    def __init__(self, text: str, workdir: str, note: Callable[[str], None]):
        self._steps, self._folder, self._note = steps_of(text), str(Path(workdir) / FOLDER), note
        self._first: int | None = None  # the first step that is traced, while it is

    def starts(self, done: int) -> bool:
        """Whether a trace begins after so many steps."""
        return self._steps is not None and self._first is None and self._steps[0] - 1 <= done < self._steps[1]

    def ends(self, done: int) -> bool:
        """Whether it ends after so many steps."""
        return self._steps is not None and self._first is not None and done >= self._steps[1]

    def start(self, done: int) -> None:
        """Begins a trace after so many steps."""
        import jax

        jax.profiler.start_trace(self._folder)
        self._first = done + 1

    def end(self, done: int) -> None:
        """Writes the trace that was begun, if one was; the steps must be done."""
        if self._first is not None:
            import jax

            jax.profiler.stop_trace()
            where = f"{self._folder}; see it with xprof --logdir={self._folder}"
            self._note(f"profile     steps {self._first} to {done} in {where}")
            self._first = None
