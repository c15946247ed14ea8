"""A training run from a config: `open_run` makes it whole, `run` trains it and closes it."""

import math
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial

import jax
from ml_collections import ConfigDict

from steppe.configs import packages
from steppe.configs.keys import ConfigError
from steppe.data import files, loader
from steppe.lm import plot
from steppe.lm.keep import branch, code, record
from steppe.lm.keep.exits import ANOMALY, FINISHED, STOPPED
from steppe.lm.keep.saving import Saves
from steppe.lm.keep.weights import LAST, readers
from steppe.lm.measure import choices
from steppe.lm.measure.evaluate import Evaluations
from steppe.lm.measure.in_training import Curvature
from steppe.lm.measure.recheck import Recheck
from steppe.lm.parts import anomaly, assembly, chips
from steppe.lm.parts import corpus as corpora
from steppe.lm.parts.assembly import batch_reader, rows_reader
from steppe.lm.parts.check import described
from steppe.lm.parts.memo import once
from steppe.lm.parts.progress import Event, Progress
from steppe.lm.parts.step import compiled, with_scalars
from steppe.lm.run import begin
from steppe.lm.run.begin import Ground, Start
from steppe.lm.run.generate import sample
from steppe.lm.run.profile import Profile
from steppe.lm.track.goodput import Goodput
from steppe.lm.track.tracker import Tracker


def run(
    config: ConfigDict,
    directory: str,
    allow_change: Collection[str] = (),
    until: int | None = None,
    trust: bool = False,
) -> int:
    """Runs or continues the run of `directory`, as open_run says, to its end; the exit status, see lm.keep.exits.
    OSError when the workdir or the checkpoints cannot be written any more."""
    opened = open_run(config, directory, allow_change, until, trust)
    if opened is None:
        return FINISHED
    with opened.closing, opened.tracker.goodput.spending("other"):
        return opened.train()


def open_run(
    config: ConfigDict,
    directory: str,
    allow_change: Collection[str] = (),
    until: int | None = None,
    trust: bool = False,
) -> "Run | None":
    """The run of `directory`, which may be an address, ready for its next step; None where it is past `until` already.

    allow_change: config keys (or "corpus", "code") that may differ from what the run had so far. until: stops after
    this step, as if asked to; schedules stay those of the whole run. trust: the config that the run of
    config.branch_from has stored. Raises, before anything is compiled, one of exits.REFUSALS for what cannot run.
    """
    log, goodput = (lambda text: print(text, flush=True) if jax.process_index() == 0 else None), Goodput()
    config.data.update(described(config))
    questions = choices.read(config.evaluate.choices)
    if files.is_remote(directory) and jax.process_count() > 1 and not config.checkpoint.directory:
        accepted = "storage that all processes write to, such as gs://…, where --workdir is an address"
        raise ConfigError("checkpoint.directory", "", accepted)
    with ExitStack() as stack:
        ground = begin.prepare(config, directory, allow_change, trust, stack, log)
        at, parts = ground.start.progress(config), ground.parts
        assembly.report_parts(config, parts, ground.corpus, log)
        if at.done:
            begin.say_where(at, ground.start.meta, parts, log)
        if until is not None and until <= at.done < parts.budget.steps:
            log(f"stopped     after step {at.done} already, and it was to be {until}; without --until it goes on")
            return None
        tracker, references = _recorded(config, ground, at, goodput)
        stack.callback(lambda: tracker.close(at.ended))
        saves = Saves(config, parts, tracker, place=ground.place, run=ground.run, facts=ground.facts, log=log)
        stack.callback(saves.checkpoints.close)
        if ground.start.parent:
            saves.save(at)  # from now on it needs its parent no more
        began, first = time.monotonic(), partial(begin.begin, config, parts, log, trust)
        given = {"questions": questions, "references": references, "until": until, "first": first}
        made = Run(config, ground, at, tracker, saves, **given, closing=(closing := ExitStack()))
        log(f"compiled    in {time.monotonic() - began:.1f} s")
        closing.enter_context(stack.pop_all())
        closing.callback(lambda: made.profile.end(at))
        return made


def _recorded(config: ConfigDict, ground: Ground, at: Progress, goodput: Goodput) -> tuple[Tracker, dict[str, dict]]:
    """(the run's record, continued with what the run is and what has changed since its checkpoint; baselines)."""
    primary, budget, start = jax.process_index() == 0, ground.parts.budget, ground.start
    if primary:
        corpora.keep(ground.directory, ground.corpus)
        code.keep(ground.directory, config)
        if start.parent:
            branch.copy_record(start.parent, ground.directory)
    tracker = Tracker(
        ground.directory,
        config,
        total_steps=budget.steps,
        tokens_per_step=budget.tokens_per_step,
        tokens_seen=at.seen,
        start_step=at.done,
        flops_per_step=budget.flops,
        peak_flops=chips.peak_flops(ground.parts.mesh),
        wandb_id=start.meta["wandb_id"] if start.meta else "",
        primary=primary,
        goodput=goodput,
    )
    references = record.references(ground.corpus, ground.counts, primary)
    tracker.run(at.done, record.of_run(config, ground.parts, references))
    for key, (before, after) in ground.changed.items():
        tracker.note(f"changed     {key}: {before!r} until step {at.done}, {after!r} from here on")
        tracker.event("change", at.done, {"key": key, "before": before, "after": after})
    return tracker, references


class Run:
    """A run under way: what it is made of, each of it set once, and `at`, which is all that changes.

    first(): what it began with, for a rollback to before its first checkpoint. closing: gives back what it has taken.
    events: what happens between steps, in this order.
    """

    def __init__(
        self,
        config: ConfigDict,
        ground: Ground,
        at: Progress,
        tracker: Tracker,
        saves: Saves,
        *,
        questions: dict[str, list[choices.Item]],
        references: dict[str, dict],
        until: int | None,
        first: Callable[[], Start],
        closing: ExitStack,
    ):
        parts, corpus = ground.parts, ground.corpus
        self.config, self.directory, self.parts, self.tokenizer = config, ground.directory, parts, corpus.tokenizer
        self.at, self.tracker, self.saves, self.stopping = at, tracker, saves, ground.stopping
        self.until, self.first, self.closing, self.total = until, first, closing, parts.budget.steps
        batch_index = lambda step: at.watch.batch_index(step)  # noqa: E731 - a rollback changes the watch
        self.read = batch_reader(config, corpus, parts, batch_index)
        self.rows = rows_reader(config, corpus, parts, batch_index)
        self.recheck = Recheck(parts, tracker, config.mesh.check_every, self.rows)
        self.profile = Profile(config, ground.directory, tracker)
        weights = readers(config)
        name, self.judged = next(iter(weights.items()))
        with tracker.goodput.spending("compile"):
            like = partial(assembly.abstract_batch, parts, corpus, config.train.batch_size)
            self.step = with_scalars(once("step", parts.key, lambda: compiled(parts, like())), parts)
            asked = {"questions": questions, "references": references, "asked": ground.stopping.asked}
            self.evaluations = Evaluations(config, corpus, parts, tracker, weights=weights, **asked)
            of = {"judged": None if name == LAST else self.judged, "origin": begin.origin(config, parts, tracker)}
            measured = config.curvature.every
            self.curvature = Curvature(config, corpus, parts, tracker, **of) if measured else None
        owners = (self.curvature, self.evaluations, saves, self.profile)
        self.events: list[Event] = [event for owner in owners if owner for event in owner.events]

    # ------------------------------------------------------------------------------------------------------ training
    def train(self) -> int:
        """Trains to the end, or to where it is to stop; the exit status."""
        at = self.at
        self.saves.timer.restart()
        self.tracker.goodput.mark(at.done)
        if at.done == 0 or at.owes_evaluation:
            at.owes_evaluation = False
            self.evaluations.evaluate(at)
            if at.owes_evaluation:
                return self.stopped()
        if self.profile.starts(at):
            self.profile.start(at)
        while at.done < self.total:  # once, and once more after every rollback
            bad = self.advance()
            if bad and not self.roll_back(bad):
                return self.end(at.ended, ANOMALY)
            if at.stop and (at.done < self.total or at.owes_evaluation):
                self.saves.conclude()
                return self.stopped()
        return self.finished()

    def advance(self) -> dict | None:
        """Takes step after step until the end, a stop, or a bad step that is not simply skipped, which it returns."""
        at, data, goodput = self.at, self.config.data, self.tracker.goodput
        with (
            loader.prefetch(self.read, at.done, self.total, data.prefetch, data.workers) as batches,
            goodput.spending("step"),
        ):
            for index, batch in batches:
                one = self.recheck.metrics(at)
                at.state, metrics = self.step(at.state, batch, at.watch.limit(index + 1))
                bad = self.settle() or (self.recheck.differing(index + 1, one, metrics) if one else None)
                at.pending.append((index + 1, metrics, batches.last_wait))
                goodput.move(batches.last_wait, "step", "data")
                at.done = index + 1
                at.stop, at.owes_evaluation = self.stopping.requested() or at.done == self.until, False
                due = [event.what for event in self.events if event.when(at)]
                bad = bad or (self.settle() if due else None)
                if bad:
                    return bad
                for what in due:
                    what(at)
                if at.stop:
                    if self.saves.save not in due:  # an evaluation was interrupted
                        self.saves.save(at)
                    return None
        return None

    def settle(self) -> dict | None:
        """Records the metrics of the step before, which the device has finished by now; what must end this attempt.

        That is what Watch.judge says, with the step, of a bad step that is not simply skipped.
        """
        at, tracker, budget = self.at, self.tracker, self.parts.budget
        if not at.pending:
            return None
        number, metrics, waited = at.pending.pop()
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        counted = metrics.pop("tokens", math.nan)
        at.seen += int(counted) if budget.tokens_per_step < budget.positions_per_step else budget.positions_per_step
        tracker.step(number, {**metrics, "data_wait": waited}, at.seen)
        if usual := at.watch.parted(metrics):
            tracker.note(anomaly.describe_parted(number, metrics["cosine"], usual))
            tracker.event("parted", number, {"cosine": metrics["cosine"], "usual": usual})
        found = at.watch.judge(number, metrics)
        if found is None:
            return None
        tracker.note(anomaly.describe(number, found))
        if jax.process_index() == 0:
            found["batch"] = anomaly.save_batch(self.directory, number, self.rows(number - 1))
        tracker.event("anomaly", number, found)
        return None if found["decision"] == "skip" else {"step": number, **found}

    def roll_back(self, bad: dict) -> bool:
        """Goes back to before a bad step and leaves out the data since; False if the run is to stop instead."""
        at, tracker, checkpoints = self.at, self.tracker, self.saves.checkpoints
        at.pending.clear()
        again = bad["decision"] == "rollback"
        if again:
            del at.state
            # to a multiple of the period, so that saves for other reasons change nothing of what the run does, or to
            # where this leg began
            regular = (bad["step"] - 1) // self.saves.period * self.saves.period
            before = max(regular, self.parts.leg.step) + 1
            at.back_to(begin.restore(checkpoints, self.parts, self.first, before).progress(self.config))
            again = at.watch.roll_back(at.done, bad["step"])
        if not again:
            at.ended = anomaly.describe_end(bad, self.config)
            return False
        tracker.goodput.back(at.done)
        checkpoints.forget(at.done)
        tracker.roll_back(at.done, at.seen)
        windows = at.watch.windows
        tracker.event("rollback", at.done + 1, {"to": at.done, "because": bad, "windows": windows})
        tracker.note(f"rolled back to step {at.done}; {windows[-1][1]} batches are left out")
        return True

    # -------------------------------------------------------------------------------------------------------- ending
    def stopped(self) -> int:
        """Says where the run stopped; the exit status."""
        done = self.at.done
        if done == self.until and not self.at.owes_evaluation:
            return self.end(
                f"stopped after step {done}, as --until says; without it the same command goes on", FINISHED
            )
        return self.end(f"stopped after step {done}; run the same command again to continue", STOPPED)

    def finished(self) -> int:
        """Shows what the model has learned; the exit status."""
        for owner in (self.saves, self.curvature, self.evaluations):
            if owner:
                owner.conclude()
        if self.config.sample.tokens:
            text = sample(self.config, self.parts, self.tokenizer, self.judged(self.at.state))
            self.tracker.note(f"\nsample\n------\n{text}\n------")
        return self.end("finished", FINISHED)

    def end(self, said: str, status: int) -> int:
        """Draws the loss curve of the run so far, and takes down what is said when it is closed; the exit status."""
        if jax.process_index() == 0:
            if lacking := packages.lacking("matplotlib"):
                self.tracker.note(f"loss curve  {lacking}; then: steppe plot {self.directory}")
            elif picture := plot.loss_curve(self.directory):
                self.tracker.note(f"loss curve  {picture}")
        self.tracker.spent(self.at.done)
        self.at.ended = said
        return status
