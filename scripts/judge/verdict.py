"""From contenders to a verdict: tuning, the looks at fresh seeds, and the numbers of every comparison."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from steppe.scripts import process
from steppe.scripts.judge import retention
from steppe.scripts.judge.contest import unsure
from steppe.scripts.judge.numbers import looks, tokens
from steppe.scripts.judge.stages import Arena, Budget, Cost, Find, average, cost, costs, file_name, loss
from steppe.scripts.judge.tuning import EMA, Tuned, named
from steppe.scripts.results import Result

SHORT = {"optim.schedule": "wsd", "optim.cooldown": "20%"}  # the rival's decay
DEARER = 1.02  # times AdamW's FLOPs, from which a candidate is also compared with AdamW with as many
BEYOND = 1000  # the config's own seed, which tuned: the first of those that decide
EQUAL, BOTH = "adamw, as many FLOPs", "adamw, both by ema"


class Rival(NamedTuple):
    """Who a candidate is compared with. settings: of its runs; price: of one; mine, theirs: averages that are compared,
    "" for the weights themselves."""

    settings: dict[str, str]
    price: Cost
    mine: str = ""
    theirs: str = ""


def rivals_of(tuned: Sequence[Tuned], prices: Mapping[str, Cost], steps: int) -> dict[str, Rival]:
    """{name: Rival} of the first of the tuned. prices: {name of a contender: of a run}; steps: of AdamW's."""
    candidate, *others = tuned
    settings, price = named(others, "adamw").settings, prices["adamw"]
    found = {each.name: Rival(each.settings, prices[each.name]) for each in others}
    found["adamw, short decay"] = Rival(settings | SHORT, price)
    times = prices[candidate.name].flops / price.flops
    if times > DEARER:
        found[EQUAL] = Rival(settings | longer(steps, times), Cost().plus(price, times))
    found["adamw, ema"] = Rival(settings, price, theirs="ema")
    if not candidate.runs or average(candidate.run, "ema"):
        found[BOTH] = Rival(settings, price, mine="ema", theirs="ema")
    return found


def longer(steps: int, times: float) -> dict[str, str]:
    """{key: text} of a run of another length."""
    return {"train.duration": f"{math.ceil(steps * times)} steps"}


class Case(NamedTuple):
    """What a verdict is sought of. own: price of a candidate's run; first: fresh seed; used: {run: cost}, by `runs`."""

    arena: Arena
    tuned: list[Tuned]
    rivals: dict[str, Rival]
    rule: looks.Rule
    own: Cost
    first: int
    budget: Budget | None
    used: dict[Any, Cost]

    def seeds(self, settings: Mapping[str, str], pairs: int) -> list[dict[str, str]]:
        """The runs of fresh seeds, beyond the one that was tuned on."""
        return [{**settings, **EMA, "seed": str(self.first + i)} for i in range(pairs)]

    def runs(self, find: Find, settings: Mapping[str, str], pairs: int) -> list[Result]:
        """Those of the fresh seeds that have ended, counted as used."""
        found = [run for each in self.seeds(settings, pairs) if (run := find(each))]
        self.used.update(costs(found))
        return found

    def spent(self) -> Cost:
        """Of all runs used."""
        return functools.reduce(Cost.plus, self.used.values(), Cost())

    def affords(self, more: Cost) -> bool:
        """Whether the budget allows some more."""
        return self.budget is None or self.budget.allows(self.spent().plus(more), self.arena.jobs)

    def price(self, names: Sequence[str]) -> Cost:
        """Of a pair more of these rivals; one run serves as the weights and as their average."""
        different = {str(self.rivals[name].settings): self.rivals[name].price for name in names}
        return functools.reduce(Cost.plus, different.values(), self.own)


def case_of(
    arena: Arena, tuned: list[Tuned], prices: Mapping[str, Cost], *, steps: int, seed: int, options: Any
) -> Case:
    """The Case of the first of the tuned. prices, steps: as of rivals_of; seed: that tuned."""
    rivals = rivals_of(tuned, prices, steps)
    rule = looks.plan(options.noise, options.effect, comparisons=len(rivals), most=options.pairs)
    used = costs(run for each in tuned for run in each.runs)
    return Case(arena, tuned, rivals, rule, prices[tuned[0].name], seed + BEYOND, options.budget, used)


def compare(arena: Arena, tuned: list[Tuned], options: Any) -> dict[str, Any]:
    """Adds fresh seeds, look by look, until every comparison is decided or no pairs are left; the whole verdict."""
    candidate, adamw = tuned[0], named(tuned, "adamw")
    if not all(math.isfinite(loss(each.run)) for each in (candidate, adamw)):
        remedy = "give a lower config.optim.peak_learning_rate"
        raise ValueError(f"{arena.directory}: AdamW's best trial diverged: {remedy}")
    prices = {each.name: cost(each.run) for each in tuned}
    seed = int(candidate.run.config["seed"])
    case = case_of(arena, tuned, prices, steps=adamw.run.steps, seed=seed, options=options)
    mine, differences, bad, ended = look(case)
    found = record(case, candidate.run) | {"ended": ended, "pairs": len(mine), "comparisons": {}}
    own = [each.config["seed"] for each in mine if not math.isfinite(loss(each))]
    if own:
        return found | {"diverged": own, "cost": spending(case)}
    last = looks.verdict(case.rule, differences, ended=True)
    needs = in_tokens(case, last, mine)
    for name in case.rivals:
        lost = {"state": looks.BETTER, "pairs": len(mine), "diverged": bad[name]} if name in bad else None
        found["comparisons"][name] = lost or comparison(case, name, last[name], differences.get(name, []), mine)
        if not lost and last[name].interval:
            found["comparisons"][name]["tokens"] = needs.get(name)
    levels = {f"{name}nats_a_byte": level(mine, name.rstrip("_")) for name in ("", "ema_")} if mine else {}
    if options.retention:
        pairs = found["comparisons"]["adamw"]["pairs"]
        found["retention"] = retention.compared(case, pairs, options.retention)
    return found | levels | {"cost": spending(case)}


def look(case: Case) -> tuple[list[Result], dict[str, list[float]], dict[str, list], str]:
    """Until all is decided: the candidate's runs, {rival: differences}, {rival: seeds on which it diverged}, and why it
    ended before its last look, if it did."""
    candidate, differences, bad = case.tuned[0], {name: [] for name in case.rivals}, {}
    mine: list[Result] = []
    for pairs in case.rule.looks:
        found = looks.verdict(case.rule, differences)
        wanted = [name for name in differences if found[name].state == looks.UNDECIDED]
        if not wanted:
            break
        if not case.affords(Cost().plus(case.price(wanted), pairs - len(mine))):
            return mine, differences, bad, f"the budget ended before the look at {pairs} pairs"
        process.say(f"verdict     look at {pairs} pairs of seeds: {', '.join(wanted)}")
        settings = [candidate.settings, *(case.rivals[name].settings for name in wanted)]
        stage = f"verdict_{file_name(candidate.name)}_{pairs}"
        find = case.arena.make(stage, [run for each in settings for run in case.seeds(each, pairs)])
        mine = case.runs(find, candidate.settings, pairs)
        if any(not math.isfinite(loss(each)) for each in mine):
            break
        for name in wanted:
            theirs = case.runs(find, case.rivals[name].settings, pairs)
            if lost := [run.config["seed"] for run in theirs if not math.isfinite(loss(run))]:
                bad[name] = lost
                del differences[name]
            else:
                levels = losses(mine, case.rivals[name].mine), losses(theirs, case.rivals[name].theirs)
                differences[name] = [a - b for a, b in zip(*levels, strict=True)]
    return mine, differences, bad, ""


def losses(runs: Sequence[Result], weights: str) -> list[float]:
    """Nats a byte of each run, by its weights or an average of them."""
    return [loss(average(each, weights)) for each in runs]


def level(runs: Sequence[Result], weights: str) -> float:
    """The mean loss of runs, nats a byte."""
    return sum(losses(runs, weights)) / len(runs)


def in_tokens(case: Case, found: Mapping[str, looks.Finding], mine: Sequence[Result]) -> dict[str, dict]:
    """{rival: tokens.Times} of those that are AdamW of the same length, from runs of others, which are made now.

    Told better, only longer ones are made, told worse only shorter ones. {} where the budget does not allow them.
    """
    adamw = named(case.tuned, "adamw")
    rows = {n: each for n, each in found.items() if each.interval and case.rivals[n].settings == adamw.settings}
    sides = {looks.BETTER: tokens.LENGTHS[1:], looks.WORSE: tokens.LENGTHS[:1]}
    factors = sorted({side for each in rows.values() for side in sides.get(each.state, tokens.LENGTHS)})
    pairs = max((each.interval.n for each in rows.values() if each.interval), default=0)
    if not pairs or not case.affords(Cost().plus(case.rivals["adamw"].price, pairs * sum(factors))):
        return {}
    settings = [adamw.settings | longer(adamw.run.steps, factor) for factor in factors]
    process.say(f"tokens      AdamW at {', '.join(f'{each:.3g}' for each in factors)} x the tokens")
    find = case.arena.make("tokens", [run for each in settings for run in case.seeds(each, pairs)])
    lengths = [case.runs(find, each, pairs) for each in (adamw.settings, *settings)]
    needs = {}
    for name, each in rows.items():
        assert each.interval
        assert each.error
        n, weights = each.interval.n, case.rivals[name].theirs
        known = {runs[0].tokens / adamw.run.tokens: losses(runs[:n], weights) for runs in lengths}
        known = {factor: values for factor, values in known.items() if all(map(math.isfinite, values))}
        error = looks.errors(case.rule.looks, each.error)[each.look - 1]
        if len(known) > 1:
            needs[name] = tokens.times(losses(mine[:n], case.rivals[name].mine), known, error)._asdict()
    return needs


def comparison(
    case: Case, name: str, finding: looks.Finding, differences: list[float], mine: Sequence[Result]
) -> dict[str, Any]:
    """What is kept of a comparison: the difference and its bounds are in nats a byte, and follow in other units."""
    pairs, interval = finding.needed, finding.interval
    if finding.state == looks.CANNOT and not interval:
        pairs = case.rule.looks[-1]
    hours = pairs and pairs * case.price([name]).seconds / case.arena.jobs / 3600
    found = {"state": finding.state, "pairs": len(differences), "sd": finding.sd, "differences": differences}
    found |= {"pairs_needed": pairs, "hours_needed": hours}
    if interval:
        value, own = interval.value, level(mine[: interval.n], case.rivals[name].mine)
        found |= {"difference": value, "low": interval.low, "high": interval.high}
        found |= {"nats_a_token": value * mine[0].loss / loss(mine[0]), "bits_a_byte": value / math.log(2)}
        found["share_of_loss"] = value / (own - value)
    return found


def spending(case: Case) -> dict[str, float]:
    """What the runs took that the verdict rests on, whoever asked for them first."""
    spent = case.spent()
    return {"runs": len(case.used), "flops": spent.flops, "hours": spent.seconds / 3600}


def record(case: Case, run: Result) -> dict[str, Any]:
    """What is kept of a verdict whatever it says."""
    return {
        "candidate": case.tuned[0].name,
        "parameters": run.parameters,
        "tokens_a_parameter": run.tokens / max(1, run.parameters),
        "flops_of_adamw": case.own.flops / case.rivals["adamw"].price.flops,
        "rule": case.rule._asdict(),
        "tuned": {
            each.name: {
                "settings": each.settings,
                "axes": each.contender.texts(each.best),
                "not_tuned": list(each.contender.fixed),
                "trials": [[*point, value] for point, value in each.trials.items()],
                "at_the_end_of_the_grid": unsure(each.contender.axes, each.trials),
            }
            for each in case.tuned
        },
    }
