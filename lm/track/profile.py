"""A trace of some steps, as xprof and TensorBoard's profile plugin read it: config.log.profile = "steps 20-25"."""

from collections.abc import Callable
from pathlib import Path

FOLDER = "profile"


def steps_of(text: str) -> tuple[int, int] | None:
    """(first, last) of "steps 20-25"; None of ""."""
    first, _, last = text.removeprefix("steps ").partition("-")
    return (int(first), int(last)) if text else None


class Profile:
    """Traces the steps that `text` names into WORKDIR/profile. note(line): what a reader must know."""

    def __init__(self, text: str, workdir: str, note: Callable[[str], None]):
        self._steps, self._folder, self._note, self._on = steps_of(text), str(Path(workdir) / FOLDER), note, False

    def starts(self, done: int) -> bool:
        """Whether the trace begins after so many steps."""
        return self._steps is not None and done == self._steps[0] - 1

    def ends(self, done: int) -> bool:
        """Whether it ends after so many steps."""
        return self._on and done >= self._steps[1]

    def start(self) -> None:
        """Begins the trace."""
        import jax

        jax.profiler.start_trace(self._folder)
        self._on = True

    def end(self, ready: Callable[[], object] = lambda: None) -> None:
        """Writes it, if it was begun; ready(): returns once the steps are done."""
        if self._on:
            import jax

            ready()
            jax.profiler.stop_trace()
            self._on = False
            first, last = self._steps
            self._note(
                f"profile     steps {first} to {last} in {self._folder}; see it with xprof --logdir={self._folder}"
            )
