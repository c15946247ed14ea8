"""The state that a run starts or resumes from: its newest sound checkpoint, another run, given or fresh parameters."""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from steppe.data.loader import Corpus
from steppe.lm.hub.load import initial_params
from steppe.lm.keep import branch, checkpoint, mirror, record, workdir
from steppe.lm.keep.checkpoint import Checkpoints
from steppe.lm.keep.exits import REFUSALS
from steppe.lm.parts.anomaly import Watch
from steppe.lm.parts.assembly import Parts, open_parts, parts_of
from steppe.lm.parts.leg import WHOLE, Leg, leg_of, seen
from steppe.lm.parts.progress import Progress
from steppe.lm.parts.state import State, create, create_from
from steppe.lm.run import profile
from steppe.lm.run.signals import StopSignals
from steppe.lm.track.tracker import Tracker


class Ground(NamedTuple):
    """All that a run needs when it starts or resumes.

    counts: of each token in the training text [V]. place: the directory of its checkpoints. run: its id. facts: of
    record.facts. changed: of record.changes.
    """

    directory: str
    corpus: Corpus
    counts: np.ndarray
    parts: Parts
    place: epath.Path
    run: str
    stopping: StopSignals
    start: "Start"
    facts: dict[str, Any]
    changed: dict[str, list]


class Start(NamedTuple):
    """The state that a run resumes from. meta: of its checkpoint, {} if none. parent: the run that it branches from,
    until it has saved a checkpoint of its own."""

    state: State
    meta: Mapping[str, Any] = {}
    parent: branch.Parent | None = None

    def progress(self, config: ConfigDict) -> Progress:
        """The run's Progress at this start."""
        done, meta = int(self.state.step), self.meta
        if not meta:
            return Progress(self.state, done, 0, Watch(config))
        return Progress(self.state, done, seen(done, meta), Watch(config, meta["watch"]), meta["owes_evaluation"])

    def leg(self, facts: Mapping[str, Any]) -> Leg:
        """The leg that starts here. A branch onto other text reads it from the start. facts: of record.facts."""
        if not self.meta:
            return WHOLE
        leg = leg_of(int(self.state.step), self.meta, facts["config"], branched=self.parent is not None)
        return replace(leg, rows=0) if self.parent and self.meta["corpus"] != facts["corpus"] else leg


def prepare(
    config: ConfigDict,
    directory: str,
    allow: Collection[str],
    trust: bool,
    stack: ExitStack,
    log: Callable[[str], None],
) -> Ground:
    """Prepares a run of this config; `stack` releases its locks. See train.run."""
    primary = jax.process_index() == 0
    directory = stack.enter_context(mirror.kept(directory, primary, log))
    workdir.adopt(directory, config)
    workdir.check(directory, config, allow)
    place = checkpoint.place(checkpoint.directory_of(config, directory))
    corpus, parts, counts = open_parts(
        config, log, directory, before=lambda parts: _given(config, directory, parts, lambda line: None, trust)
    )
    given = _given(config, directory, parts, log, trust)  # before the workdir is locked, in case it cannot be used
    before = given.parent.step if given and given.parent else 0
    if workdir.is_new(directory):
        profile.check(config.log.profile, before + 1, parts.budget.steps)
    run = stack.enter_context(workdir.claim(directory, config, primary, allow))
    stopping = stack.enter_context(StopSignals())
    with Checkpoints(place, run=run, log=log) as checkpoints:
        start = restore(checkpoints, parts, lambda: given or begin(config, parts, log, trust))
    facts = record.facts(config, corpus)
    changed = record.changes(start.meta, facts, {"corpus", "code"} if start.parent else allow)
    leg = start.leg(facts)
    if leg != WHOLE:  # counts and schedules continue from the earlier legs
        parts = parts_of(config, corpus, counts, leg)
    return Ground(directory, corpus, counts, parts, place, run, stopping, start, facts, changed)


def begin(config: ConfigDict, parts: Parts, log: Callable[[str], None], trust: bool = False) -> Start:
    """A new run's start. trust: whether to use URLs and code in the stored config of config.branch_from."""
    if config.branch_from:
        return Start(*branch.take(config.branch_from, parts.abstract, parts.optimizer, log, trust))
    if config.init_from:
        return Start(create_from(parts.abstract, parts.optimizer, initial_params(config, parts, log)))
    return Start(create(parts.mesh, parts.initialise))


def _given(config: ConfigDict, directory: str, parts: Parts, log: Callable[[str], None], trust: bool) -> Start | None:
    """A new run's given start; None if there is none."""
    given = workdir.is_new(directory) and (config.init_from or config.branch_from)
    return begin(config, parts, log, trust) if given else None


def restore(checkpoints: Checkpoints, parts: Parts, first: Callable[[], Start], before: int | None = None) -> Start:
    """The newest sound checkpoint (before a step), otherwise first()."""
    newest = checkpoints.newest(before)
    if newest is None:
        return first()
    state, meta = checkpoints.restore(newest, parts.abstract)
    return Start(state, record.meta_of(meta, checkpoints.directory / str(newest)))


def say_where(at: Progress, meta: Mapping[str, Any], parts: Parts, log: Callable[[str], None]) -> None:
    """Logs where the run resumes, and which scheduled values jump there."""
    log(f"resuming    after step {at.done} of {parts.budget.steps}, {at.seen:,} tokens")
    for name, now in parts.optimizer.following(at.done).items():
        before = meta.get("next", {}).get(name, now)
        if abs(now - before) > 1e-6 * max(abs(now), abs(before)):
            log(f"changed     {name}: would have been {before:.3g} in the next step, is now {now:.3g}")


def origin(config: ConfigDict, parts: Parts, tracker: Tracker) -> Any:
    """The given parameters that the run started from, to measure curvature along the displacement from them. None if
    there were none, or, with a note, if they are gone: the run itself no longer needs them."""
    if not (config.curvature.every and config.init_from):
        return None
    try:
        return initial_params(config, parts, lambda line: None)
    except (*REFUSALS, OSError) as error:
        tracker.note(f"curvature   without the displacement from the initial parameters: {error}")
        return None
