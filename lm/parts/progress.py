"""How far a run has come, and the events that happen every n steps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from steppe.lm.parts.anomaly import Watch
from steppe.lm.parts.state import State


@dataclass
class Progress:
    """The changing state of a run.

    state, done: after `done` updates. seen: tokens that the loss has counted. watch: judges steps. pending: (step,
    metrics, seconds spent waiting for data) of steps whose metrics are unread, because they are read one step late.
    stop: whether to end after this step. owes_evaluation: whether an evaluation of this state is to come. ended: the
    final line.
    """

    state: State
    done: int
    seen: int
    watch: Watch
    owes_evaluation: bool = False
    stop: bool = False
    ended: str = "failed"
    pending: list[tuple[int, dict[str, jax.Array], float]] = field(default_factory=list)

    def back_to(self, before: "Progress") -> None:
        """Goes back to an earlier state of the run; batches skipped since then stay skipped."""
        before.watch.windows = self.watch.windows
        self.state, self.done, self.seen, self.watch = before.state, before.done, before.seen, before.watch


class Event(NamedTuple):
    """what(progress) is called after every step for which when(progress) holds, on all processes alike."""

    when: Callable[[Progress], bool]
    what: Callable[[Progress], None]


def each(every: int, last: int | None = None) -> Callable[[Progress], bool]:
    """when(progress) for every `every` steps (0: never) and for the step `last`."""
    return lambda at: bool(every and at.done % every == 0) or at.done == last
