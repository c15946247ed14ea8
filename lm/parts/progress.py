"""How far a run has come, and what happens on its way every so many steps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax

from steppe.lm.parts.anomaly import Watch
from steppe.lm.parts.state import State


@dataclass
class Progress:
    """All of a run that changes.

    state, done: after so many updates. seen: tokens that the loss has seen by then. watch: judges steps. pending:
    (step, metrics, seconds it waited for data) of steps whose metrics have not been read, which is done one step late.
    stop: whether to end after this step. owes_evaluation: whether that was interrupted. ended: what is said at the end.
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
        """Goes back to where the run was before; data that was left out since then stays left out."""
        before.watch.windows = self.watch.windows
        self.state, self.done, self.seen, self.watch = before.state, before.done, before.seen, before.watch


class Event(NamedTuple):
    """what(progress): done after every step for which when(progress), on all processes alike."""

    when: Callable[[Progress], bool]
    what: Callable[[Progress], None]


def each(every: int, last: int | None = None) -> Callable[[Progress], bool]:
    """when(progress) for every so many steps, 0 for none, and for the step `last`."""
    return lambda at: bool(every and at.done % every == 0) or at.done == last
