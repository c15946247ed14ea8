"""From contenders to a verdict: tuning, the looks at fresh seeds, and the numbers of every comparison."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from steppe.scripts.judge import looks
from steppe.scripts.judge.contest import Contender, Point, best_of, proposals, unsure
from steppe.scripts.judge.stages import Arena, Stopped, average, duration, file_name, loss
from steppe.scripts.results import Result

EMA = {"average.weights": "ema"}
SHORT = {"optim.schedule": "wsd", "optim.cooldown": "20%"}  # the rival's decay
DEARER = 1.02  # times AdamW's FLOPs, from which a candidate is also held against AdamW with as many
BEYOND = 1000  # the config's own seed, which tuned: the first of those that decide
BOTH = "adamw, both by ema"


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
    def settings(self) -> dict[str, str]:
        """{key: text} of its best trial."""
        return self.contender.at(best_of(self.trials))

    @property
    def run(self) -> Result:
        """Its best trial."""
        return self.runs[list(self.trials).index(best_of(self.trials))]


class Rival(NamedTuple):
    """Who a candidate is held against. settings: of its runs; mine, theirs: averages compared, "" for the weights."""

    settings: dict[str, str]
    mine: str = ""
    theirs: str = ""


def tune(arena: Arena, contender: Contender, trials: int) -> Tuned:
    """Tries points of a contender's axes on the config's seed until there were so many trials."""
    known: dict[Point, Result] = {}
    losses: dict[Point, float] = {}
    legal = lambda point: arena.can(contender.at(point) | EMA)  # noqa: E731
    while more := proposals(contender.axes, losses, trials, legal):
        runs = {point: contender.at(point) | EMA for point in more}
        find = arena.read()
        if any(find(run) is None for run in runs.values()):
            said = f"trials {len(known) + 1} to {len(known) + len(more)} of {trials}"
            print(f"tuning      {contender.name}: {said}", flush=True)
            arena.make(f"tune_{file_name(contender.name)}_{len(known)}", list(runs.values()))
            find = arena.read()
        for point, run in runs.items():
            found = find(run)
            assert found is not None
            known[point], losses[point] = found, loss(found)
    return Tuned(contender, losses, list(known.values()))


# of steppe curvature: the gradient noise scale, and as little else as it allows
NOISE = ("--probes=1", "--densities=1", "--lanczos=2", "--ascent=0", "--draws=1", "--slices=0")


def regime(arena: Arena, adamw: Tuned) -> dict[str, float]:
    """{"batch_tokens", "noise_scale"} at the end of AdamW's best trial, in tokens; {} where the noise hides it."""
    from steppe.scripts.measure.__main__ import main as measure

    run = adamw.run
    if not run.curvature:
        print("batch       measuring the gradient noise scale at the end of AdamW's best trial", flush=True)
        if status := measure(["curvature", f"--workdir={run.directory}", *NOISE]):
            raise Stopped(status)
        again = arena.read()(adamw.settings | EMA)
        assert again is not None
        run = again
    numbers = run.curvature[-1]
    return {name: numbers[name] for name in ("batch_tokens", "noise_scale") if "noise_scale" in numbers}


def rivals_of(tuned: Sequence[Tuned]) -> dict[str, Rival]:
    """{name: Rival} of the first of the tuned."""
    candidate, *others = tuned
    adamw = named(others, "adamw")
    found = {each.name: Rival(each.settings) for each in others}
    found["adamw, short decay"] = Rival(adamw.settings | SHORT)
    times = candidate.run.flops / adamw.run.flops
    if times > DEARER:
        longer = {"train.duration": duration(adamw.run.steps, times)}
        found["adamw, as many FLOPs"] = Rival(adamw.settings | longer)
    found["adamw, ema"] = Rival(adamw.settings, theirs="ema")
    if average(candidate.run, "ema"):
        found[BOTH] = Rival(adamw.settings, mine="ema", theirs="ema")
    return found


def named(tuned: Sequence[Tuned], name: str) -> Tuned:
    """The one of this name."""
    return next(each for each in tuned if each.name == name)


def seeds(run: Result, settings: Mapping[str, str], pairs: int) -> list[dict[str, str]]:
    """The runs of fresh seeds, beyond the one that a run tuned on."""
    first = int(run.config["seed"]) + BEYOND
    return [{**settings, **EMA, "seed": str(first + i)} for i in range(pairs)]


def compare(arena: Arena, tuned: list[Tuned], options: Any) -> dict[str, Any]:
    """Adds fresh seeds, look by look, until every comparison is decided or no pairs are left; the whole verdict."""
    candidate, adamw = tuned[0], named(tuned, "adamw")
    if not all(math.isfinite(loss(each.run)) for each in (candidate, adamw)):
        raise ValueError(
            f"{arena.directory}: AdamW's best trial diverged: give a lower config.optim.peak_learning_rate"
        )
    rivals = rivals_of(tuned)
    rule = looks.plan(options.noise, options.effect, comparisons=len(rivals), most=options.pairs)
    found: dict[str, looks.Finding] = {}
    differences: dict[str, list[float]] = {}
    mine: list[Result] = []
    for pairs in rule.looks:
        wanted = [name for name in rivals if name not in found or found[name].state == looks.UNDECIDED]
        print(f"verdict     look at {pairs} pairs of seeds: {', '.join(wanted)}", flush=True)
        settings = [candidate.settings, *(rivals[name].settings for name in wanted)]
        runs = [run for each in settings for run in seeds(candidate.run, each, pairs)]
        arena.make(f"verdict_{file_name(candidate.name)}_{pairs}", runs)
        find = arena.read()
        mine = [run for each in seeds(candidate.run, candidate.settings, pairs) if (run := find(each))]
        bad = [result for result in mine if not math.isfinite(loss(result))]
        if bad:
            return record(tuned, rule) | {"diverged": [each.config["seed"] for each in bad], "comparisons": {}}
        for name in wanted:
            theirs = [run for each in seeds(candidate.run, rivals[name].settings, pairs) if (run := find(each))]
            differences[name] = values(rivals[name], mine, theirs)
        found = looks.verdict(rule, differences)
        if all(each.state != looks.UNDECIDED for each in found.values()):
            break
    last = looks.verdict(rule, differences, ended=True, seconds=2 * sum(each.seconds for each in mine) / len(mine))
    return record(tuned, rule) | {
        "nats_a_byte": level(mine, ""),
        "ema_nats_a_byte": level(mine, "ema"),
        "pairs": len(mine),
        "comparisons": {
            name: comparison(last[name], differences[name], level(mine, rival.mine)) for name, rival in rivals.items()
        },
    }


def values(rival: Rival, mine: Sequence[Result], theirs: Sequence[Result]) -> list[float]:
    """The difference of each pair, nats a byte."""
    pairs = zip(mine, theirs, strict=True)
    return [loss(average(a, rival.mine)) - loss(average(b, rival.theirs)) for a, b in pairs]


def level(runs: Sequence[Result], weights: str) -> float:
    """The mean loss of runs, nats a byte."""
    return sum(loss(average(each, weights)) for each in runs) / len(runs)


def comparison(finding: looks.Finding, differences: list[float], level: float) -> dict[str, Any]:
    """What is kept of a comparison; level: the candidate's loss."""
    interval = finding.interval
    assert interval is not None
    return {
        "state": finding.state,
        "difference": interval.value,
        "low": interval.low,
        "high": interval.high,
        "bits_a_byte": interval.value / math.log(2),
        "share_of_loss": interval.value / level,
        "pairs": len(differences),
        "sd": finding.sd,
        "differences": differences,
        "pairs_needed": finding.needed,
        "hours_needed": finding.hours,
    }


def record(tuned: list[Tuned], rule: looks.Rule) -> dict[str, Any]:
    """What is kept of a verdict whatever it says."""
    run = tuned[0].run
    return {
        "candidate": tuned[0].name,
        "parameters": run.parameters,
        "tokens_a_parameter": run.tokens / max(1, run.parameters),
        "flops_of_adamw": run.flops / named(tuned, "adamw").run.flops,
        "rule": rule._asdict(),
        "tuned": {
            each.name: {
                "settings": each.settings,
                "axes": each.contender.texts(best_of(each.trials)),
                "not_tuned": list(each.contender.fixed),
                "trials": [[*point, value] for point, value in each.trials.items()],
                "at_the_end_of_the_grid": unsure(each.contender.axes, each.trials),
            }
            for each in tuned
        },
    }
