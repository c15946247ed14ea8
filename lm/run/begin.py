"""Where a run begins or goes on: from its newest sound checkpoint, another run, given parameters, or fresh ones."""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
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
    """What a run stands on when it begins or goes on.

    counts: of each token in the training text [V]. place: of its checkpoints. run: its id. facts: of record.facts.
    changed: of record.changes.
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
    """What a run goes on from. meta: of the checkpoint, {} where there is none. parent: the run that it branches off,
    while it has saved nothing of its own."""

    state: State
    meta: Mapping[str, Any] = {}
    parent: branch.Parent | None = None

    def progress(self, config: ConfigDict) -> Progress:
        """How far the run has come."""
        done, meta = int(self.state.step), self.meta
        if not meta:
            return Progress(self.state, done, 0, Watch(config))
        return Progress(self.state, done, seen(done, meta), Watch(config, meta["watch"]), meta["owes_evaluation"])

    def leg(self, facts: Mapping[str, Any]) -> Leg:
        """The part of the run that begins here; on other text than its parent's, a branch reads from its beginning.
        facts: of record.facts."""
        if not self.meta:
            return WHOLE
        leg = leg_of(int(self.state.step), self.meta, facts["config"], branched=self.parent is not None)
        return leg._replace(rows=0) if self.parent and self.meta["corpus"] != facts["corpus"] else leg


def prepare(
    config: ConfigDict,
    directory: str,
    allow: Collection[str],
    trust: bool,
    stack: ExitStack,
    log: Callable[[str], None],
) -> Ground:
    """What a run of this config stands on; what it takes for itself, `stack` gives back. See train.open_run."""
    primary = jax.process_index() == 0
    directory = stack.enter_context(mirror.kept(directory, primary, log))
    workdir.adopt(directory, config)
    corpus, parts, counts = open_parts(config, log, directory)
    # before the workdir is taken, in case one of them cannot be used
    place = checkpoint.place(checkpoint.directory_of(config, directory))
    given = _given(config, directory, parts, log, trust)
    run = stack.enter_context(workdir.claim(directory, config, primary, allow))
    stopping = stack.enter_context(StopSignals())
    with Checkpoints(place, run=run, log=log) as checkpoints:
        start = restore(checkpoints, parts, lambda: given or begin(config, parts, log, trust))
    facts = record.facts(config, corpus)
    changed = record.changes(start.meta, facts, {"corpus", "code"} if start.parent else allow)
    leg = start.leg(facts)
    if leg != WHOLE:  # the parts count and schedule by what happened
        parts = parts_of(config, corpus, counts, leg)
    return Ground(directory, corpus, counts, parts, place, run, stopping, start, facts, changed)


def begin(config: ConfigDict, parts: Parts, log: Callable[[str], None], trust: bool = False) -> Start:
    """What a run begins with before anything of it is saved. trust: the config that config.branch_from has stored."""
    if config.branch_from:
        return Start(*branch.take(config.branch_from, parts.abstract, parts.optimizer, log, trust))
    if config.init_from:
        return Start(create_from(parts.abstract, parts.optimizer, initial_params(config, parts, log)))
    return Start(create(parts.mesh, parts.initialise))


def _given(config: ConfigDict, directory: str, parts: Parts, log: Callable[[str], None], trust: bool) -> Start | None:
    """What a new run is given to begin with: read before it takes its workdir, in case it cannot be used."""
    if not workdir.is_new(directory):
        return None
    found = begin(config, parts, log, trust) if config.init_from or config.branch_from else None
    before = found.parent.step if found and found.parent else 0
    profile.check(config.log.profile, before + 1, parts.budget.steps)
    return found


def restore(checkpoints: Checkpoints, parts: Parts, first: Callable[[], Start], before: int | None = None) -> Start:
    """The newest sound checkpoint (before a step), or else what the run began with."""
    newest = checkpoints.newest(before)
    if newest is None:
        return first()
    state, meta = checkpoints.restore(newest, parts.abstract)
    return Start(state, record.meta_of(meta, checkpoints.directory / str(newest)))


def say_where(at: Progress, meta: Mapping[str, Any], parts: Parts, log: Callable[[str], None]) -> None:
    """Says where the run goes on, and what jumps there."""
    log(f"continuing  after step {at.done} of {parts.budget.steps}, {at.seen:,} tokens")
    for name, now in parts.optimizer.following(at.done).items():
        before = meta.get("next", {}).get(name, now)
        if abs(now - before) > 1e-6 * max(abs(now), abs(before)):
            log(f"changed     {name}: {before:.3g} would have come next, now {now:.3g} does")


def origin(config: ConfigDict, parts: Parts, tracker: Tracker) -> Any:
    """The given parameters that the run began from, to measure how the loss bends on the way from there; None where it
    began from none, or they are gone by now, which is said: the run itself needs them no more."""
    if not (config.curvature.every and config.init_from):
        return None
    try:
        return initial_params(config, parts, lambda line: None)
    except (*REFUSALS, OSError) as error:
        tracker.note(f"curvature   without the displacement from where the run began: {error}")
        return None
