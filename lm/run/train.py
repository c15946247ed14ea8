"""A training run: `run` builds it from a config and trains it to its end."""

import math
from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial

import jax
from ml_collections import ConfigDict

from steppe.configs import packages
from steppe.configs.keys import ConfigError
from steppe.data import files, loader
from steppe.lm import plot
from steppe.lm.keep import branch, checkpoint, record
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
from steppe.lm.parts.progress import Event, Progress
from steppe.lm.parts.step import compile_step
from steppe.lm.run import begin
from steppe.lm.run.begin import Ground, Start
from steppe.lm.run.generate import sample
from steppe.lm.run.profile import Profile
from steppe.lm.track.goodput import Goodput
from steppe.lm.track.tracker import Tracker
from steppe.lm.track.waiting import compiling


def run(
    config: ConfigDict,
    directory: str,
    allow_change: Collection[str] = (),
    until: int | None = None,
    trust: bool = False,
) -> int:
    """Starts or resumes the run of `directory`, a path or URL, and trains to its end; returns a status of keep.exits.

    allow_change: config keys (or "corpus", "code") that may differ from the stored run. until: stop after this step;
    schedules remain those of the whole run. trust: whether to use URLs and code in the stored config of the run that
    config.branch_from names. Raises one of exits.REFUSALS before compiling if the run is not possible, and OSError if
    the workdir or the checkpoints can no longer be written.
    """
    goodput = Goodput()
    log = lambda text: print(files.visible(text), flush=True) if jax.process_index() == 0 else None  # noqa: E731
    config.data.update(described(config))
    questions = choices.read(config.evaluate.choices)
    if files.is_remote(directory) and jax.process_count() > 1 and not config.checkpoint.directory:
        accepted = "storage that all processes can write to, such as gs://…, because --workdir is a URL"
        raise ConfigError("checkpoint.directory", "", accepted)
    with ExitStack() as stack:
        ground = begin.prepare(config, directory, allow_change, trust, stack, log)
        at, parts = ground.start.progress(config), ground.parts
        assembly.report_parts(config, parts, ground.corpus, log)
        if at.done:
            begin.say_where(at, ground.start.meta, parts, log)
        if until is not None and until <= at.done < parts.budget.steps:
            log(f"stopped     already after step {at.done}, past --until={until}; run without --until to resume")
            return FINISHED
        owed = at.owes_evaluation * (len(readers(config)) * len(ground.corpus.held_out) + len(questions))
        tracker, references = _recorded(config, ground, at, goodput, owed)
        stack.callback(lambda: tracker.close(at.ended))
        saves = Saves(config, parts, tracker, place=ground.place, run=ground.run, facts=ground.facts, log=log)
        stack.callback(saves.checkpoints.close)
        if ground.start.parent:
            saves.save(at)  # after this save it no longer needs its parent
        first = partial(begin.begin, config, parts, log, trust)
        before = goodput.seconds()["compile"] if at.done else 0.0
        given = {"questions": questions, "references": references, "until": until, "first": first}
        with compiling("the training step", tracker.note, before):
            made = Run(config, ground, at, tracker, saves, **given)
        stack.callback(lambda: made.profile.end(at))
        with goodput.spending("other"):
            return made.train()


def _recorded(
    config: ConfigDict, ground: Ground, at: Progress, goodput: Goodput, owed: int
) -> tuple[Tracker, dict[str, dict]]:
    """(the run's record, with its facts and with changes since its checkpoint added; baselines). owed: see Tracker."""
    primary, budget, start = jax.process_index() == 0, ground.parts.budget, ground.start
    if primary:
        corpora.keep(ground.directory, ground.corpus)
        record.keep_code(ground.directory, config)
        if start.parent:
            branch.copy_record(start.parent, ground.directory)
    tracker = Tracker(
        ground.directory,
        config,
        total_steps=budget.steps,
        tokens_per_step=budget.tokens_per_step,
        tokens_seen=at.seen,
        start_step=at.done,
        owed=owed,
        flops_per_step=budget.flops,
        peak_flops=chips.peak_flops(ground.parts.mesh),
        wandb_id=start.meta["wandb_id"] if start.meta else "",
        primary=primary,
        goodput=goodput,
    )
    at.owes_evaluation = checkpoint.agreed(tracker.owes)
    references = record.references(ground.corpus, ground.counts, primary)
    tracker.run(at.done, record.of_run(config, ground.parts, references))
    for key, (before, after) in ground.changed.items():
        tracker.note(f"changed     {key}: {before!r} until step {at.done}, {after!r} from here on")
        tracker.event("change", at.done, {"key": key, "before": before, "after": after})
    return tracker, references


class Run:
    """A run in progress. Its parts are set once; only `at` changes.

    first(): its initial state, for a rollback to before any checkpoint. events: what happens between steps, in order.
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
    ):
        parts, corpus = ground.parts, ground.corpus
        self.config, self.directory, self.parts, self.corpus = config, ground.directory, parts, corpus
        self.at, self.tracker, self.saves, self.stopping = at, tracker, saves, ground.stopping
        self.until, self.first, self.total = until, first, parts.budget.steps
        batch_index = lambda step: at.watch.batch_index(step)  # noqa: E731 - a rollback changes the watch
        self.read = batch_reader(config, corpus, parts, batch_index)
        self.rows = rows_reader(config, corpus, parts, batch_index)
        self.recheck = Recheck(parts, tracker, config.mesh.check_every, self.rows)
        self.profile = Profile(config, ground.directory, tracker)
        weights = readers(config)
        name, self.judged = next(iter(weights.items()))
        with tracker.goodput.spending("compile"):
            self.step = compile_step(parts, assembly.abstract_batch(parts, corpus, config.train.batch_size))
            asked = {"questions": questions, "references": references, "asked": ground.stopping.requested}
            self.evaluations = Evaluations(config, corpus, parts, tracker, weights=weights, **asked)
            of = {"judged": None if name == LAST else self.judged, "origin": begin.origin(config, parts, tracker)}
            measured = config.curvature.every
            self.curvature = Curvature(config, corpus, parts, tracker, **of) if measured else None
        # An evaluation may take long: what is saved before it owes it.
        owners = (self.curvature, saves, self.evaluations, self.profile)
        self.events: list[Event] = [event for owner in owners if owner for event in owner.events]

    # ------------------------------------------------------------------------------------------------------ training
    def train(self) -> int:
        """Trains to the end or to the requested stop; returns the exit status."""
        at = self.at
        self.saves.timer.restart()
        self.tracker.goodput.mark(at.done)
        if at.done == 0 or at.owes_evaluation:
            self.evaluations.evaluate(at)
            if at.owes_evaluation:
                return self.stopped()
        if self.profile.starts(at):
            self.profile.start(at)
        while at.done < self.total:  # repeats only after a rollback
            bad = self.advance()
            if bad and not self.roll_back(bad):
                return self.end(at.ended, ANOMALY)
            if at.stop and (at.done < self.total or at.owes_evaluation):
                self.saves.conclude()
                return self.stopped()
        return self.finished()

    def advance(self) -> dict | None:
        """Takes steps until the end, a stop, or a bad step that must not be skipped, which it returns."""
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
                at.stop = self.stopping.requested() or at.done == self.until
                due = [event.what for event in self.events if event.when(at)]
                at.owes_evaluation = self.evaluations.evaluate in due
                bad = bad or (self.settle() if due else None)
                if bad:
                    return bad
                for what in due:
                    what(at)
                if at.stop:
                    if self.saves.save not in due:  # a signal interrupted an evaluation
                        self.saves.save(at)
                    return None
        return None

    def settle(self) -> dict | None:
        """Records the metrics of the previous step, which the device has finished by now.

        Returns Watch.judge's result and the step for a bad step that must not be skipped, otherwise None.
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
        """Goes back to before a bad step and skips the data since; False if the run must stop instead."""
        at, tracker, checkpoints = self.at, self.tracker, self.saves.checkpoints
        at.pending.clear()
        again = bad["decision"] == "rollback"
        if again:
            del at.state
            # Go back to a multiple of the period, so that additional saves do not change the run, or to the start of
            # this leg.
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
        tracker.note(f"rolled back to step {at.done}; {windows[-1][1]} batches are skipped")
        return True

    # -------------------------------------------------------------------------------------------------------- ending
    def stopped(self) -> int:
        """Logs where the run stopped; returns the exit status."""
        done = self.at.done
        if done == self.until and not self.at.owes_evaluation:
            return self.end(
                f"stopped after step {done}, as --until asks; run the command without it to resume", FINISHED
            )
        return self.end(f"stopped after step {done}; run the same command again to resume", STOPPED)

    def finished(self) -> int:
        """Logs results and a sample; returns the exit status."""
        for owner in (self.saves, self.curvature, self.evaluations):
            if owner:
                owner.conclude()
        if self.config.sample.tokens:
            self.tracker.note(f"sampling    {self.config.sample.tokens} tokens")
            text = sample(self.config, self.parts, self.corpus, self.judged(self.at.state))
            self.tracker.note(f"\nsample\n------\n{text}\n------")
        return self.end("finished", FINISHED)

    def end(self, said: str, status: int) -> int:
        """Draws the loss curve and sets the final line, logged when the run closes; returns the exit status."""
        if jax.process_index() == 0:
            if lacking := packages.lacking("matplotlib"):
                self.tracker.note(f"loss curve  {lacking}; then: steppe plot {self.directory}")
            elif picture := plot.loss_curve(self.directory):
                self.tracker.note(f"loss curve  {picture}")
        self.tracker.spent(self.at.done)
        self.at.ended = said
        return status
