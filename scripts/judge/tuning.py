"""Tuning by equal trials, on a seed that is not used again, and what AdamW's trials say of the setting.

Halving: once AdamW is tuned by whole trials, their ranks at half of the run are compared with those at its end. Where
they agree, a trial of the other contenders stops there if the best so far and the trials next to it do better.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from steppe.scripts import process
from steppe.scripts.judge.contest import Contender, Point, best_of, proposals
from steppe.scripts.judge.stages import Arena, Stopped, file_name, loss
from steppe.scripts.measure.__main__ import main as measure
from steppe.scripts.results import Result

EMA = {"average.weights": "ema"}
RUNG, AGREE, ENOUGH = 0.5, 0.9, 6  # of a run; least rank correlation, and least trials it is taken over


class Tuned(NamedTuple):
    """A contender at its best. trials: {point: nats a byte}; runs: theirs."""

    contender: Contender
    trials: dict[Point, float]
    runs: list[Result]

    @property
    def name(self) -> str:
        """The contender's."""
        return self.contender.name

    @property
    def best(self) -> Point:
        """Of its trials; where it starts before there are any."""
        return best_of(self.trials) if self.trials else (0.0,) * len(self.contender.axes)

    @property
    def settings(self) -> dict[str, str]:
        """{key: text} of its best trial."""
        return self.contender.at(self.best)

    @property
    def run(self) -> Result:
        """Its best trial."""
        return self.runs[list(self.trials).index(self.best)]


def begin(contender: Contender) -> dict[str, str]:
    """The overrides of its first trial."""
    return contender.at((0.0,) * len(contender.axes)) | EMA


def named(tuned: Sequence[Tuned], name: str) -> Tuned:
    """The one of this name."""
    return next(each for each in tuned if each.name == name)


def tune(arena: Arena, contender: Contender, trials: int, halve: bool = False, make: bool = True) -> Tuned:
    """Tries points of a contender's axes on the config's seed until there were that many trials.

    halve: a trial may stop at RUNG, its loss is then inf. make: trials that lack are made, else the search ends there.
    """
    known: dict[Point, Result] = {}
    losses: dict[Point, float] = {}
    legal = lambda point: arena.can(contender.at(point) | EMA)  # noqa: E731
    halving = {"rungs": [RUNG], "over": [axis.key for axis in contender.axes]} if halve else {}
    find = arena.read()
    while more := proposals(contender.axes, losses, trials, legal):
        runs = {point: contender.at(point) | EMA for point in more}
        if any(find(run) is None for run in runs.values()):
            if not make:
                break
            said = f"trials {len(known) + 1} to {len(known) + len(more)} of {trials}"
            process.say(f"tuning      {contender.name}: {said}")
            best = [contender.at(best_of(losses)) | EMA] if losses else []
            find = arena.make(f"tune_{file_name(contender.name)}_{len(known)}", [*best, *runs.values()], halving)
        for point, run in runs.items():
            found = find(run)
            assert found is not None
            known[point], losses[point] = found, loss(found)
    return Tuned(contender, losses, list(known.values()))


def rung(adamw: Tuned) -> dict[str, Any]:
    """Whether AdamW's trials have the same order at RUNG as at their end: {"step", "correlation", "trials", "holds"}.

    {} of a config without an evaluation on the way.
    """
    steps = adamw.run.steps
    on_the_way = [point.step for point in adamw.run.curve if 0 < point.step < steps]
    if not on_the_way:
        return {}
    step = min(on_the_way, key=lambda each: abs(each - RUNG * steps))
    reached = [[point.loss for point in run.curve if point.step == step] for run in adamw.runs]
    there = [min(filter(math.isfinite, losses), default=math.inf) for losses in reached]
    correlation, holds = agreement(there, list(adamw.trials.values()))
    return {"step": step, "correlation": correlation, "trials": len(there), "holds": holds}


def agreement(there: Sequence[float], ends: Sequence[float]) -> tuple[float, bool]:
    """(Spearman's correlation of losses at a rung and at the end, whether a rung may stop trials by it).

    It may if the correlation is at least AGREE over ENOUGH trials, and the best is in the better half at the rung.
    """
    several = len(set(there)) > 1 < len(set(ends))
    correlation = float(pd.Series(there).corr(pd.Series(ends), method="spearman")) if several else 0.0
    better = sum(loss < there[ends.index(min(ends))] for loss in there)
    return correlation, len(ends) >= ENOUGH and correlation >= AGREE and better < len(ends) / 2


def said(rung: dict[str, Any]) -> str:
    """What the trials at the rung say, for a reader."""
    if not rung:
        return "every trial is a whole run: there is no evaluation on the way"
    way = "losing trials stop there" if rung["holds"] else "every trial is a whole run"
    ranks = f"ranks of AdamW's {rung['trials']} trials correlate by {rung['correlation']:.2f}"
    return f"at step {rung['step']} and at the end, {ranks}: {way}"


def regime(arena: Arena, adamw: Tuned) -> dict[str, float]:
    """{"batch_tokens", "noise_scale"} at the end of AdamW's best trial, in tokens; {} where the noise hides it."""
    run = adamw.run
    if not run.curvature:
        process.say("batch       measuring the gradient noise scale at the end of AdamW's best trial")
        if status := measure(["curvature", f"--workdir={run.directory}", "--noise_alone"]):
            raise Stopped(status)
        again = arena.read()(adamw.settings | EMA)
        assert again is not None
        run = again
    numbers = run.curvature[-1]
    return {name: numbers[name] for name in ("batch_tokens", "noise_scale") if "noise_scale" in numbers}
