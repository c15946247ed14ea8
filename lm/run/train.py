"""A training run from a config: data, step, evaluate, log, checkpoint, stop. `run` opens, trains, closes."""

import math
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from steppe.configs import packages
from steppe.configs.keys import ConfigError
from steppe.data import baselines, files, loader
from steppe.data.errors import StorageError
from steppe.lm import plot
from steppe.lm.hub.load import initial_params
from steppe.lm.keep import branch, checkpoint, code, mirror, record, workdir
from steppe.lm.keep.exits import ANOMALY, FINISHED, REFUSALS, STOPPED
from steppe.lm.keep.weights import LAST, of_state, weights_of
from steppe.lm.measure import choices
from steppe.lm.measure.evaluate import evaluate, make_evaluation_step
from steppe.lm.measure.in_training import make_measurement
from steppe.lm.measure.recheck import Recheck
from steppe.lm.model.mesh import local_rows, place_batch
from steppe.lm.model.ordered import ordered
from steppe.lm.parts import anomaly, chips
from steppe.lm.parts import corpus as corpora
from steppe.lm.parts.assembly import Parts, abstract_batch, batch_reader, open_parts, program_key, report_parts
from steppe.lm.parts.check import described
from steppe.lm.parts.leg import WHOLE, Leg, leg_of, seen
from steppe.lm.parts.memo import Memo
from steppe.lm.parts.state import State, create, create_from
from steppe.lm.parts.step import lower_step, with_scalars
from steppe.lm.run import generate
from steppe.lm.run.signals import StopSignals
from steppe.lm.track import profile
from steppe.lm.track.goodput import Goodput
from steppe.lm.track.tracker import Tracker
from steppe.optim.schedules import duration_steps


class Compiled(NamedTuple):
    """What a run repeats, compiled. measurement: of the curvature in training, None where there is none."""

    step: Callable
    evaluation: Callable
    scores: Callable
    measurement: Callable | None


def run(
    config: ConfigDict,
    directory: str,
    allow_change: Collection[str] = (),
    until: int | None = None,
    memo: Memo | None = None,
    trust: bool = False,
) -> int:
    """Runs or continues the run of `directory`, which may be an address, to its end; returns the exit status, see
    lm.keep.exits.

    allow_change: config keys (or "corpus", "code") that may differ from what the run had so far. until: stops after
    this step, as if asked to; schedules stay those of the whole run. memo: of a process that has run after run. trust:
    the config that the run of config.branch_from has stored. Raises, before anything is compiled, one of
    exits.REFUSALS for what cannot run; and OSError when the workdir or the checkpoints cannot be written any more.
    """
    primary = jax.process_index() == 0
    log = (lambda text: print(text, flush=True)) if primary else (lambda text: None)
    config.data.update(described(config))
    memo, goodput = memo or Memo(), Goodput()
    questions = choices.read(config.evaluate.choices)
    if files.is_remote(directory) and jax.process_count() > 1 and not config.checkpoint.directory:
        accepted = "storage that all processes write to, such as gs://…, where --workdir is an address"
        raise ConfigError("checkpoint.directory", "", accepted)
    with ExitStack() as stack:
        directory = stack.enter_context(mirror.kept(directory, primary, log))
        workdir.adopt(directory, config)
        corpus, parts, counts = open_parts(config, log, directory=directory, memo=memo)
        # before the workdir is taken, in case one of them cannot be used
        place, given = checkpoint.place(checkpoint.directory_of(config, directory)), None
        if workdir.is_new(directory):
            given = begin(config, parts, log, trust) if config.init_from or config.branch_from else None
            branched, total = (given[2].step if given and given[2] else 0), parts.budget.steps
            if profile.outside(config.log.profile, branched + 1, total):
                raise ConfigError(
                    "log.profile", config.log.profile, f"steps of the run, from {branched + 1} to {total}"
                )
        run_id = stack.enter_context(workdir.claim(directory, config, primary, allow_change))
        stopping = stack.enter_context(StopSignals())
        here = Run(
            config,
            directory,
            corpus=corpus,
            parts=parts,
            stopping=stopping,
            questions=questions,
            until=until,
            memo=memo,
            goodput=goodput,
            log=log,
            trust=trust,
        )
        here.checkpoints = stack.enter_context(here.open_checkpoints(place, run_id))
        here.restore(given)
        del given
        changed = (
            record.changes(here.meta, here.now, {"corpus", "code"} if here.parent else allow_change)
            if here.meta
            else {}
        )
        here.follow(here.leg_now() if here.meta else WHOLE)
        report_parts(config, here.parts, corpus, log)
        if here.done:
            here.say_where()
        if until is not None and until <= here.done < here.total:
            log(f"stopped     after step {here.done} already, and it was to be {until}; without --until it goes on")
            return FINISHED
        if primary:
            corpora.keep(directory, corpus)
            code.keep(directory, config)
            if here.parent:
                branch.copy_record(here.parent, directory)
        here.tracker = here.open_tracker()
        stack.callback(lambda: here.tracker.close(here.ended))
        here.begin(counts, changed)
        if here.parent:
            here.save()  # from now on it needs its parent no more
        here.compile()
        stack.callback(here.end_profile)
        with goodput.spending("other"):
            return here.train()


def begin(
    config: ConfigDict, parts: Parts, log: Callable[[str], None], trust: bool = False
) -> tuple[State, dict, branch.Parent | None]:
    """(State before anything of a run is saved, meta and parent where it branches off another)."""
    if config.branch_from:
        return branch.take(config.branch_from, parts.abstract, parts.optimizer, log, trust)
    if config.init_from:
        return create_from(parts.abstract, parts.optimizer, initial_params(config, parts, log)), {}, None
    return create(parts.mesh, parts.initialise), {}, None


class Run:
    """A run under way: what it is made of, and how far it has come.

    state, done: after so many updates. pending: steps whose metrics have not been read, which is done one step late.
    watch: judges steps. meta: of the checkpoint that it continues. events: what happens between steps.
    """

    checkpoints: checkpoint.Checkpoints
    tracker: Tracker
    state: State

    def __init__(
        self,
        config: ConfigDict,
        directory: str,
        *,
        corpus: loader.Corpus,
        parts: Parts,
        stopping: StopSignals,
        questions: dict[str, list[choices.Item]],
        until: int | None = None,
        memo: Memo,
        goodput: Goodput,
        log: Callable[[str], None] = print,
        trust: bool = False,
    ):
        self.config, self.directory, self.corpus, self.parts = config, directory, corpus, parts
        self.stopping, self.until, self.memo, self.goodput, self.log = stopping, until, memo, goodput, log
        self.primary = jax.process_index() == 0
        self.now = {"config": config.to_dict(), "versions": record.versions(), "corpus": corpus.fingerprint}
        self.now["code"] = code.digests(config)
        self.pending, self.latest, self.measured = [], {}, []
        self.stop = self.owes_evaluation = False
        self.ended, self.parent, self.trust = "failed", None, trust
        tokenizer, length = corpus.tokenizer, config.data.sequence_length
        self.weights = weights_of(config)
        self.judged = next(iter(self.weights))
        self.questions = {name: (items, choices.rows(items, tokenizer, length)) for name, items in questions.items()}
        self.profile = profile.Profile(config.log.profile, directory, log)
        self.timer = checkpoint.Timer(config.checkpoint.minutes, config.log.every)
        self.plan(WHOLE)

    # ------------------------------------------------------------------------------------------------------- opening
    def plan(self, leg: Leg) -> None:
        """Where the run ends, and what it does on the way, given the leg that it is on."""
        config, self.leg, self.total = self.config, leg, self.parts.budget.steps
        self.checkpoint_every = max(1, self.steps(config.checkpoint.every))
        self.keep_every = self.steps(config.checkpoint.keep_every)
        # (when, what): what is done after a step for which when(step) holds, in this order
        self.events = [
            (self.each(config.curvature.every), self.measure),
            (self.each(max(1, self.steps(config.evaluate.every)), last=True), self.evaluate),
            (self.saves, self.save),
            (self.profile.ends, self.end_profile),
            (self.profile.starts, lambda: self.profile.start(self.done)),
        ]

    def follow(self, leg: Leg) -> None:
        """Goes on with sizes that are not those of all steps before: the parts count and schedule by what happened."""
        if leg != self.leg:
            _, self.parts, _ = open_parts(self.config, lambda text: None, leg, self.directory, self.memo)
            self.plan(leg)
            self.checkpoints.retain(self.keep_every, self.checkpoint_every)

    def say_where(self) -> None:
        """Says where the run goes on, and what jumps there."""
        self.log(f"continuing  after step {self.done} of {self.total}, {self.seen:,} tokens")
        for name, before in self.meta.get("next", {}).items():
            now = self.following()[name]
            if abs(now - before) > 1e-6 * max(abs(now), abs(before)):
                self.log(f"changed     {name}: {before:.3g} would have come next, now {now:.3g} does")

    def following(self) -> dict[str, float]:
        """The learning rate and rho of the next step."""
        optimizer, step = self.parts.optimizer, jnp.asarray(self.done, jnp.int32)
        return {name: float(getattr(optimizer, name)(step)) for name in ("learning_rate", "rho")}

    def steps(self, duration: str) -> int:
        """A duration in steps of this run."""
        return duration_steps(duration, tokens_per_step=self.parts.budget.tokens_per_step, total_steps=self.total)

    def each(self, every: int, last: bool = False) -> Callable[[int], bool]:
        """when(step) for every so many steps, 0 for none, and for the last one."""
        return lambda step: bool(every and step % every == 0) or (last and step == self.total)

    def open_checkpoints(self, place, run_id: str) -> checkpoint.Checkpoints:
        """The run's checkpoints."""
        return checkpoint.Checkpoints(
            place,
            keep=self.config.checkpoint.keep,
            keep_every=self.keep_every,
            period=self.checkpoint_every,
            run=run_id,
            log=self.log,
        )

    def restore(self, given: tuple | None = None, before: int | None = None) -> None:
        """Takes the newest sound checkpoint (before a step), or what `begin` gave, or gives now."""
        newest = self.checkpoints.newest(before)
        if newest is not None:
            self.state, meta = self.checkpoints.restore(newest, self.parts.abstract)
            self.meta = record.meta_of(meta, self.checkpoints.directory / str(newest))
        else:
            self.state, self.meta, self.parent = given or begin(self.config, self.parts, self.log, self.trust)
        self.done = int(self.state.step)
        self.seen = seen(self.done, self.meta) if self.meta else 0
        self.watch = anomaly.Watch(self.config, self.meta["watch"] if self.meta else None)

    def leg_now(self) -> Leg:
        """The part of the run that begins here; on other text than its parent's, a branch reads from its beginning."""
        leg = leg_of(self.done, self.meta, self.now["config"], branched=self.parent is not None)
        other = self.parent is not None and self.meta["corpus"] != self.now["corpus"]
        return leg._replace(rows=0) if other else leg

    def open_tracker(self) -> Tracker:
        """The run's record, continued."""
        return Tracker(
            self.directory,
            self.config,
            total_steps=self.total,
            tokens_per_step=self.parts.budget.tokens_per_step,
            tokens_seen=self.seen,
            start_step=self.done,
            flops_per_step=self.parts.budget.flops,
            peak_flops=chips.peak_flops(self.parts.mesh),
            wandb_id=self.meta["wandb_id"] if self.meta else "",
            primary=self.primary,
            goodput=self.goodput,
        )

    def begin(self, counts: np.ndarray, changed: dict[str, list]) -> None:
        """Records what the run is, and what has changed since the checkpoint that it continues."""
        names = self.corpus.held_out if self.primary else ()
        self.references = self.memo.once(
            "references",
            (self.corpus.fingerprint, self.primary),
            lambda: {name: baselines.baselines(self.corpus, name, counts) for name in names},
        )
        self.tracker.run(self.done, record.of_run(self.config, self.parts, self.references))
        for key, (before, after) in changed.items():
            self.tracker.note(f"changed     {key}: {before!r} until step {self.done}, {after!r} from here on")
            self.tracker.event("change", self.done, {"key": key, "before": before, "after": after})

    def compile(self) -> None:
        """Compiles what the run repeats, unless a run before it in this process did, and opens its batches."""
        began, parts, size = time.monotonic(), self.parts, self.config.train.batch_size
        self.origin = self.began_from()
        key = (*program_key(self.config, self.corpus.fingerprint, self.leg), self.origin is None)
        with self.goodput.spending("compile"):
            compiled = self.memo.once("compiled", key, self.compiled)
        self.step, self.scores = with_scalars(compiled.step, parts), compiled.scores
        self.evaluation_step, self.measurement = compiled.evaluation, compiled.measurement
        self.recheck = Recheck(parts)
        if self.measurement:
            rows, first = local_rows(parts.mesh, size), next(iter(self.corpus.held_out))
            batch = loader.held_out_rows(self.corpus, first, 0, size, rows)
            batch.pop("bytes")
            self.held_out_batch = lambda: place_batch(parts.mesh, size, rows, batch)
        self.read = batch_reader(self.config, self.corpus, parts, self.watch.batch_index, self.leg)
        self.log(f"compiled    in {time.monotonic() - began:.1f} s")

    def began_from(self) -> Any:
        """The given parameters that the run began from, to measure how the loss bends on the way from there; None where
        it began from none, or they are gone by now, which is said: the run itself needs them no more."""
        if not (self.config.curvature.every and self.config.init_from):
            return None
        try:
            return initial_params(self.config, self.parts, lambda line: None)
        except (*REFUSALS, OSError) as error:
            self.tracker.note(f"curvature   without the displacement from where the run began: {error}")
            return None

    def compiled(self) -> Compiled:
        """The programs that the run repeats."""
        parts, curvature = self.parts, self.config.curvature
        like, measurement = abstract_batch(parts, self.corpus, self.config.train.batch_size), None
        if curvature.every:
            microbatches = self.config.train.microbatches
            measurement = make_measurement(parts, curvature.groups, microbatches)
            params = None if self.judged == LAST else parts.abstract.params
            origin = None if self.origin is None else parts.abstract.params
            measurement = measurement.lower(params, parts.abstract, origin, like, parts.scalars).compile()
            measurement = ordered(measurement, parts.mesh, "curvature of the run")
        return Compiled(
            ordered(lower_step(parts, like).compile(), parts.mesh, "training step"),
            make_evaluation_step(parts),
            choices.make_scores(parts),
            measurement,
        )

    # ------------------------------------------------------------------------------------------------------ training
    def train(self) -> int:
        """Trains to the end, or to where it is to stop; the exit status."""
        self.timer.restart()
        self.began = time.monotonic()
        self.goodput.mark(self.done)
        if self.done == 0 or self.meta["owes_evaluation"]:
            self.evaluate()
            if self.owes_evaluation:
                return self.stopped()
        if self.profile.starts(self.done):
            self.profile.start(self.done)
        while self.done < self.total:  # once, and once more after every rollback
            bad = self.advance()
            if bad and not self.roll_back(bad):
                self.draw()
                self.tracker.spent(self.done)
                return ANOMALY
            if self.stop and (self.done < self.total or self.owes_evaluation):
                self.checkpoints.wait()
                return self.stopped()
        self.conclude()
        return FINISHED

    def advance(self) -> dict | None:
        """Takes step after step until the end, a stop, or a bad step that is not simply skipped, which it returns."""
        data = self.config.data
        with (
            loader.prefetch(self.read, self.done, self.total, data.prefetch, data.workers) as batches,
            self.goodput.spending("step"),
        ):
            for index, batch in batches:
                again = self.again(index)
                self.state, metrics = self.step(self.state, batch, self.watch.limit(index + 1))
                bad = self.settle() or (self.compare(index + 1, again, metrics) if again else None)
                self.pending.append((index + 1, metrics, batches.last_wait))
                self.goodput.move(batches.last_wait, "step", "data")
                self.done = index + 1
                self.stop, self.owes_evaluation = self.stopping.requested() or self.done == self.until, False
                due = [what for when, what in self.events if when(self.done)]
                bad = bad or (self.settle() if due else None)
                if bad:
                    return bad
                for what in due:
                    what()
                if self.stop:
                    if self.save not in due:  # an evaluation was interrupted
                        self.save()
                    return None
        return None

    def again(self, index: int) -> dict | None:
        """The metrics of the step after `index` updates by one device, where config.mesh.check_every asks for them."""
        every = self.config.mesh.check_every
        if not every or (index + 1) % every or self.parts.mesh.size == 1:
            return None
        return self.recheck.metrics(self.state, self.rows(index), self.watch.limit(index + 1))

    def compare(self, number: int, one: dict, mesh: dict) -> dict | None:
        """What must end the run where a step by one device and by the mesh differ."""
        differing = self.recheck.differing(one, jax.device_get(mesh))
        if not differing:
            return None
        said = ", ".join(f"{name} {a:.6g} by one device, {b:.6g} by the mesh" for name, (a, b) in differing.items())
        self.tracker.note(f"step {number}: {said}")
        found = {"what": "mismatch", "differing": differing, "decision": "stop"}
        self.tracker.event("anomaly", number, found)
        return {"step": number, **found}

    def rows(self, index: int) -> dict[str, np.ndarray]:
        """The whole batch of the step after `index` updates."""
        number, size = self.watch.batch_index(index) - self.leg.batches, self.config.train.batch_size
        return loader.training_rows(self.corpus, self.config.seed, number, size, before=self.leg.rows)

    def settle(self) -> dict | None:
        """Records the metrics of the step before, which the device has finished by now; what must end this attempt.

        That is what Watch.judge says, with the step, of a bad step that is not simply skipped.
        """
        if not self.pending:
            return None
        number, metrics, waited = self.pending.pop()
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        counted, budget = metrics.pop("tokens", math.nan), self.parts.budget
        self.seen += int(counted) if budget.tokens_per_step < budget.positions_per_step else budget.positions_per_step
        self.tracker.step(number, {**metrics, "data_wait": waited}, self.seen)
        if usual := self.watch.parted(metrics):
            cosine = metrics["cosine"]
            self.tracker.note(
                f"step {number}: the gradients at theta and at theta + epsilon have cosine {cosine:.3f}, after "
                f"{usual:.3f}: no small rho explains this, a device or what the devices exchange may be wrong"
            )
            self.tracker.event("parted", number, {"cosine": cosine, "usual": usual})
        found = self.watch.judge(number, metrics)
        if found is None:
            return None
        self.tracker.note(anomaly.describe(number, found))
        if self.primary:
            found["batch"] = anomaly.save_batch(self.directory, number, self.rows(number - 1))
        self.tracker.event("anomaly", number, found)
        return None if found["decision"] == "skip" else {"step": number, **found}

    def roll_back(self, bad: dict) -> bool:
        """Goes back to before a bad step and leaves out the data since; False if the run is to stop instead."""
        self.pending.clear()
        again = bad["decision"] == "rollback"
        if again:
            windows = self.watch.windows
            del self.state
            # to a multiple of the period, so that saves for other reasons change nothing of what the run does, or to
            # where this leg began
            regular = (bad["step"] - 1) // self.checkpoint_every * self.checkpoint_every
            self.restore(before=max(regular, self.leg.step) + 1)
            self.watch.windows = windows
            again = self.watch.roll_back(self.done, bad["step"])
        if not again:
            self.ended = (
                f"stopped: {bad['what']} at step {bad['step']}; what is on disk is sound. "
                f"--replay_step={bad['step']} looks into it"
            )
            if f"on_{bad['what']}" in self.config.train:
                self.ended += f", --allow_change=train.on_{bad['what']} may set another policy"
            return False
        self.goodput.back(self.done)
        self.read = batch_reader(self.config, self.corpus, self.parts, self.watch.batch_index, self.leg)
        self.checkpoints.forget(self.done)
        self.tracker.roll_back(self.done, self.seen)
        windows = self.watch.windows
        self.tracker.event("rollback", self.done + 1, {"to": self.done, "because": bad, "windows": windows})
        self.tracker.note(f"rolled back to step {self.done}; {windows[-1][1]} batches are left out")
        return True

    # ------------------------------------------------------------------------------------------------- between steps
    def evaluate(self) -> None:
        """Evaluates all weights of the run, every set or, if a signal to stop comes first, none: it then owes it."""
        with self.goodput.spending("evaluate"):
            self._evaluate()

    def _evaluate(self) -> None:
        found, config = {}, self.config
        sequences, batches = config.evaluate.batch_size or config.train.batch_size, config.evaluate.batches
        for kind in self.weights:
            params = self.params(kind)
            for name in self.corpus.held_out:
                found[kind, name] = evaluate(
                    self.evaluation_step,
                    params,
                    self.corpus,
                    name,
                    mesh=self.parts.mesh,
                    batch_size=sequences,
                    batches=0 if self.done == self.total else batches,
                    stop=self.stopping.asked,
                )
                if found[kind, name] is None:
                    self.stop = self.owes_evaluation = True
                    return
        for (kind, name), values in found.items():
            self.tracker.evaluation(self.done, name, values, "" if kind == self.judged else kind)
        self.latest.update(found)
        params, mesh = self.params(self.judged), self.parts.mesh
        for name, (items, rows) in self.questions.items():
            self.tracker.choices(self.done, name, choices.measure(self.scores, params, items, rows, mesh, sequences))

    def params(self, kind: str) -> Any:
        """The parameters of this name now, of those that lm.keep.weights knows."""
        return of_state(self.weights[kind], self.state._asdict(), self.state.params)

    def end_profile(self) -> None:
        """Writes the trace of steps that is under way, if one is."""
        jax.block_until_ready(self.state)
        self.profile.end(self.done)

    def measure(self) -> None:
        """Records how the loss bends at theta on one held-out batch, the same all through the run."""
        jax.block_until_ready(self.state)  # steps still under way are not the measurement's
        since = time.monotonic()
        with self.goodput.spending("curvature"):
            params = None if self.judged == LAST else self.params(self.judged)
            measured = self.measurement(params, self.state, self.origin, self.held_out_batch(), self.parts.scalars)
            found = jax.tree.map(float, jax.device_get(measured))
        self.measured.append(time.monotonic() - since)
        self.tracker.measurement("curvature", self.done, {**found, "seconds": self.measured[-1]})

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows this step; every process gives the same answer and must ask after every step."""
        regular = self.each(self.checkpoint_every, last=True)(step) or self.each(self.keep_every)(step) or self.stop
        return regular or self.timer.due(step)

    def save(self) -> None:
        """Begins a checkpoint; one that cannot fit is left out where the run goes on, an error where it ends."""
        self.tracker.sync()
        problem, place = self.checkpoints.room(self.state), self.checkpoints.directory
        if problem:
            self.tracker.note(f"NO CHECKPOINT AT STEP {self.done}: {place} has no room for it ({problem})")
            if self.stop or self.done == self.total:
                raise StorageError(f"{place}: {problem}; make room, then run again")
            return
        budget = self.parts.budget
        meta = {
            **self.now,
            "wandb_id": self.tracker.wandb_id,
            "watch": self.watch.memory(),
            "leg": self.leg._asdict(),
            "tokens": self.seen,
            "tokens_per_step": budget.tokens_per_step,
            "flops_per_step": [budget.flops, budget.adamw_flops],
            "next": self.following(),
        }
        with self.goodput.spending("save"):
            stall = self.checkpoints.save(self.done, self.state, {**meta, "owes_evaluation": self.owes_evaluation})
        self.goodput.mark(self.done)
        self.tracker.checkpoint(self.done, {"stall": stall})
        self.timer.restart()

    # -------------------------------------------------------------------------------------------------------- ending
    def stopped(self) -> int:
        """Draws what there is, and says where the run stopped; the exit status."""
        self.draw()
        self.tracker.spent(self.done)
        if self.done == self.until and not self.owes_evaluation:
            self.ended = f"stopped after step {self.done}, as --until says; without it the same command goes on"
            return FINISHED
        self.ended = f"stopped after step {self.done}; run the same command again to continue"
        return STOPPED

    def conclude(self) -> None:
        """Shows what the model has learned."""
        with self.goodput.spending("save"):
            self.checkpoints.wait()
        if self.measured:
            spent = sum(self.measured)
            share = spent / (time.monotonic() - self.began)
            self.tracker.note(
                f"curvature   {len(self.measured)} times, {spent:.1f} s, {share:.1%} of this start's time"
            )
        for (kind, name), values in self.latest.items():
            known = self.references.get(name, {})
            beside = ", ".join(f"{of} {known[key]:.3f}" for key, of in baselines.NAMES.items() if known)
            whose = "" if kind == self.judged else f" with {kind}"
            self.tracker.note(f"result      {name}{whose}: {values['bits_per_byte']:.3f} bits per byte ({beside})")
        if self.config.sample.tokens:
            self.tracker.note(f"\nsample\n------\n{self.sample()}\n------")
        self.draw()
        self.tracker.spent(self.done)
        self.ended = "finished"

    def draw(self) -> None:
        """The loss curve of the run so far."""
        if self.primary and (lacking := packages.lacking("matplotlib")):
            self.tracker.note(f"loss curve  {lacking}; then: steppe plot {self.directory}")
        elif self.primary and (picture := plot.loss_curve(self.directory)):
            self.tracker.note(f"loss curve  {picture}")

    def sample(self) -> str:
        """A text by the model, after config.sample.prompt."""
        sample, vocabulary = self.config.sample, self.corpus.tokenizer.vocab_size
        cap = self.config.model.logit_soft_cap
        (text,) = generate.generate(
            generate.make_decoder(self.parts.shape, vocabulary, self.parts.mesh, cap),
            self.params(self.judged),
            self.corpus.tokenizer,
            [sample.prompt],
            tokens=sample.tokens,
            temperature=sample.temperature,
            seed=self.config.seed,
        )
        return text
