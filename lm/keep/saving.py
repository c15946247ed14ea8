"""When a run saves, and what its checkpoints hold beside its state."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from steppe.data.errors import StorageError
from steppe.lm.keep.checkpoint import Checkpoints, agreed
from steppe.lm.parts.assembly import Parts
from steppe.lm.parts.progress import Event, Progress, each
from steppe.lm.track.tracker import Tracker


class Saves:
    """The saves of a run: every so many steps and minutes, at its end, and where it is to stop.

    place: of its checkpoints. run: its id. facts: config, versions and corpus, as every checkpoint holds them.
    """

    def __init__(
        self,
        config: ConfigDict,
        parts: Parts,
        tracker: Tracker,
        *,
        place: epath.Path,
        run: str,
        facts: Mapping[str, Any],
        log: Callable[[str], None],
    ):
        self._parts, self._tracker, self._facts, kept = parts, tracker, facts, config.checkpoint
        self.period, keep_every = max(1, parts.budget.steps_of(kept.every)), parts.budget.steps_of(kept.keep_every)
        self.checkpoints = Checkpoints(
            place, keep=kept.keep, keep_every=keep_every, period=self.period, run=run, log=log
        )
        self._regular = each(self.period, parts.budget.steps), each(keep_every)
        self.timer = Timer(kept.minutes, config.log.every)
        self.events = [Event(self.due, self.save)]

    def due(self, at: Progress) -> bool:
        """Whether a checkpoint follows this step; every process gives the same answer and must ask after every step."""
        return at.stop or any(when(at) for when in self._regular) or self.timer.due(at.done)

    def save(self, at: Progress) -> None:
        """Begins a checkpoint; one that cannot fit is left out where the run goes on, an error where it ends."""
        tracker, checkpoints, budget = self._tracker, self.checkpoints, self._parts.budget
        tracker.sync()
        problem, place = checkpoints.room(at.state), checkpoints.directory
        if problem:
            tracker.note(f"NO CHECKPOINT AT STEP {at.done}: {place} has no room for it ({problem})")
            if at.stop or at.done == budget.steps:
                raise StorageError(f"{place}: {problem}; make room, then run again")
            return
        meta = {
            **self._facts,
            "wandb_id": tracker.wandb_id,
            "watch": at.watch.memory(),
            "leg": self._parts.leg._asdict(),
            "tokens": at.seen,
            "tokens_per_step": budget.tokens_per_step,
            "flops_per_step": [budget.flops, budget.adamw_flops],
            "next": self._parts.optimizer.following(at.done),
            "owes_evaluation": at.owes_evaluation,
        }
        with tracker.goodput.spending("save"):
            stall = checkpoints.save(at.done, at.state, meta)
        tracker.goodput.mark(at.done)
        tracker.checkpoint(at.done, {"stall": stall})
        self.timer.restart()

    def conclude(self) -> None:
        """Returns once all are finished."""
        with self._tracker.goodput.spending("save"):
            self.checkpoints.wait()


class Timer:
    """Says when minutes of wall time since the last save have passed; 0 minutes: never. clock: seconds that only grow.

    Several processes follow the clock of process 0, which they hear every `every` steps.
    """

    def __init__(self, minutes: float, every: int, clock: Callable[[], float] = time.monotonic):
        self._seconds, self._every, self._clock = minutes * 60, every, clock
        self.restart()

    def restart(self) -> None:
        """A save was begun."""
        self._last = self._clock()

    def due(self, step: int) -> bool:
        """Whether to save after this step; every process gives the same answer."""
        if not self._seconds or (jax.process_count() > 1 and step % self._every):
            return False
        return agreed(jax.process_index() == 0 and self._clock() - self._last >= self._seconds)
