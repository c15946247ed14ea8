"""When a run saves, and the metadata of its checkpoints."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
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
    """The saves of a run: every n steps, every n minutes, at its end, and when it stops.

    place: the directory of its checkpoints. run: its id. facts: config, versions and corpus, stored in each checkpoint.
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
        """Whether to save after this step. All processes get the same answer and must ask after every step."""
        return at.stop or any(when(at) for when in self._regular) or self.timer.due(at.done)

    def save(self, at: Progress) -> None:
        """Starts a checkpoint. If it does not fit, it is skipped during the run and raises StorageError at the end."""
        tracker, checkpoints, budget = self._tracker, self.checkpoints, self._parts.budget
        tracker.sync()
        problem, place = checkpoints.room(at.state), checkpoints.directory
        if problem:
            tracker.note(f"NO CHECKPOINT AT STEP {at.done}: {place} has too little space ({problem})")
            if at.stop or at.done == budget.steps:
                raise StorageError(f"{place}: {problem}; free some space, then run again")
            return
        meta = {
            **self._facts,
            "wandb_id": tracker.wandb_id,
            "watch": at.watch.memory(),
            "leg": asdict(self._parts.leg),
            "tokens": at.seen,
            "tokens_per_step": budget.tokens_per_step,
            "flops_per_step": [budget.flops, budget.adamw_flops],
            "next": self._parts.optimizer.following(at.done),
            "owes_evaluation": at.owes_evaluation,
        }
        with tracker.goodput.spending("save"):
            stall = checkpoints.save(at.done, at.state, meta)
        tracker.goodput.mark(at.done)
        tracker.measurement("checkpoint", at.done, {"stall": stall, "goodput": tracker.goodput.seconds()})
        self.timer.restart()

    def conclude(self) -> None:
        """Returns once all saves are finished."""
        with self._tracker.goodput.spending("save"):
            self.checkpoints.wait()


class Timer:
    """Tells when `minutes` of wall time have passed since the last save; 0: never. clock: monotonic seconds.

    Several processes follow process 0's clock, which they read every `every` steps.
    """

    def __init__(self, minutes: float, every: int, clock: Callable[[], float] = time.monotonic):
        self._seconds, self._every, self._clock = minutes * 60, every, clock
        self.restart()

    def restart(self) -> None:
        """Call when a save starts."""
        self._last = self._clock()

    def due(self, step: int) -> bool:
        """Whether to save after this step; all processes get the same answer."""
        if not self._seconds or (jax.process_count() > 1 and step % self._every):
            return False
        return agreed(jax.process_index() == 0 and self._clock() - self._last >= self._seconds)
