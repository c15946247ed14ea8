"""What a judgement will cost and be able to tell, stage by stage, before its first run."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from scipy import stats

from steppe.lm.track.waiting import clock_face, columns
from steppe.scripts.judge import board
from steppe.scripts.judge.contest import Contender
from steppe.scripts.judge.numbers import looks, tokens
from steppe.scripts.judge.stages import Arena, Cost
from steppe.scripts.judge.tuning import begin, tune
from steppe.scripts.judge.verdict import Case, case_of


class Stage(NamedTuple):
    """A row. there: runs that have ended already; cost: of all its runs."""

    name: str
    runs: int
    there: int
    cost: Cost
    tells: str


def plan(arena: Arena, contenders: list[Contender], options: Any) -> str:
    """The stages for a reader: runs, cost, and what each tells; the cost is at most this, and less as looks end it."""
    made, speed = arena.estimate(list(map(begin, contenders)))
    prices = {each.name: Cost(run.flops, speed.seconds(run)) for each, run in zip(contenders, made, strict=True)}
    tuned = [tune(arena, each, options.trials, make=False) for each in contenders]
    steps = next(run.steps for each, run in zip(contenders, made, strict=True) if each.name == "adamw")
    case = case_of(arena, tuned, prices, steps=steps, seed=made[0].flat["seed"], options=options)
    verdicts = [each for found in board.read(arena.directory) for each in found["comparisons"].values()]
    known = [each["sd"] for each in verdicts if each.get("sd")]
    sd, source = options.noise, "assumed, as --noise says"
    if known:
        sd, source = max(known), f"the largest of {len(known)} comparisons here"
    rows = [
        Stage(f"tuning {each.name}", options.trials, len(done.trials), Cost().plus(prices[each.name], options.trials),
              "its rate" + "".join(f", {axis.key.removeprefix('optim.')}" for axis in each.axes[1:]))
        for each, done in zip(contenders, tuned, strict=True)
    ]  # fmt: skip
    pairs, (low, high) = case.rule.looks[-1], tokens.LENGTHS
    cost = Cost().plus(case.rivals["adamw"].price, pairs * sum(tokens.LENGTHS))
    said = f"AdamW's tokens for the same loss, from {low:.2f} to {high:.2f} x"
    rows += [*_looks(case, sd, options), Stage("tokens", 2 * pairs, 0, cost, said)]
    if options.retention:
        said = "forgetting, rounding, noise, of as many models; its time is not foretold"
        rows.append(Stage("retention", 2 * pairs, 0, Cost(), said))
    return "\n".join([_table(rows, arena), "", f"noise       {sd:.2g} nats a byte, sd of a pair: {source}",
                      f"speed       {speed.source}", *_budget(rows, options.budget, arena)])  # fmt: skip


def _looks(case: Case, sd: float, options: Any) -> Iterator[Stage]:
    before, rule = 0, case.rule
    errors = looks.errors(rule.looks, rule.alpha / rule.comparisons)
    different = {str(each.settings): each.settings for each in case.rivals.values()}
    settings = [case.tuned[0].settings, *different.values()]
    tuned = all(len(each.trials) == options.trials for each in case.tuned)
    find = case.arena.read()
    for number, pairs in enumerate(rule.looks):
        runs = [each for one in settings for each in case.seeds(one, pairs)[before:]]
        there = sum(find(each) is not None for each in runs) if tuned else 0
        cost = Cost().plus(case.price(list(case.rivals)), pairs - before)
        # what this look by itself tells of the comparison that is told first
        said = f"a difference of {looks.detectable(rule, sd, number):.2g} nats a byte with probability {rule.power:g}"
        half = float(stats.t.isf(errors[number] / 2, pairs - 1)) * sd / pairs**0.5
        said += f", or that it is within {rule.effect:g}" * (half < rule.effect)
        yield Stage(f"look at {pairs} pairs", len(runs), there, cost, said)
        before = pairs


def _table(rows: list[Stage], arena: Arena) -> str:
    cost = functools.reduce(Cost.plus, (each.cost for each in rows))
    total = Stage("at most", sum(each.runs for each in rows), sum(each.there for each in rows), cost, "")
    cells = [["stage", "runs", "there", "FLOPs", "time"]] + [
        [each.name, str(each.runs), str(each.there), f"{each.cost.flops:.2g}",
         clock_face(each.cost.seconds / arena.jobs)] for each in [*rows, total]
    ]  # fmt: skip
    tells = ["tells", *(each.tells for each in rows), ""]
    lines = zip(columns(cells).splitlines(), tells, strict=True)
    return "\n".join(f"{line}  {said}".rstrip() for line, said in lines)


def _budget(rows: list[Stage], budget: Any, arena: Arena) -> list[str]:
    """Which look a budget pays for, if all before it are made."""
    if budget is None:
        return []
    spent = itertools.accumulate((each.cost for each in rows), Cost.plus)
    paid = sum(budget.allows(each, arena.jobs) for each in spent)  # costs only rise
    last = f"as far as {rows[paid - 1].name}" if paid else "not the first stage"
    return [f"budget      {budget.amount:g} {budget.unit}: {last}; what is decided sooner costs less"]
