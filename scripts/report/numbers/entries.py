"""Methods, bases and averages of the weights, each at its best radius and learning rate, paired by seeds.

An entry is a method on a base, or an average of its weights, at one scale and budget, with whatever else tells its runs
apart but rho, peak learning rate and seed: of these two it takes the best, as far as its grid goes. A setting that got
seeds of its own without being the best is an entry beside it.
"""

import collections
import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from steppe.lm.measure import frontier
from steppe.scripts.report.numbers import groups as gr
from steppe.scripts.report.numbers import statistics as st
from steppe.scripts.results import Result

TUNED = {"optim.peak_learning_rate": "rate", "optim.rho": "rho"}
EQUAL_FLOPS = 0.1  # runs within this share of each other's FLOPs count as equal compute
OWN = 2  # fresh seeds that make a setting an entry


class Entry(NamedTuple):
    """runs: {(rate, rho): {seed: Result}} of finished and diverged runs; choice: the best of these settings.

    cost: FLOPs of a token, in those of AdamW. weights: the average that it is, "" for the last ones. adamw: whether
    it is AdamW by itself, or an average of its weights.
    """

    name: str
    scale: str
    budget: str
    runs: dict[tuple, dict[int, Result]]
    choice: st.Choice
    cost: float
    weights: str
    adamw: bool

    @property
    def plain(self) -> bool:
        """Whether it is the last weights of AdamW at its best."""
        return self.adamw and self.of_choice and not self.weights

    @property
    def perturbs(self) -> bool:
        """Whether its method perturbs the weights, whatever its base: nadamw by itself does not."""
        return not _alone(next(iter(self.best.values())))

    @property
    def best(self) -> dict[int, Result]:
        """{seed: Result} at the best setting."""
        return self.runs[self.choice.rho]

    @property
    def of_choice(self) -> bool:
        """Whether its setting is the best of all that were tried, not one of several with seeds of their own."""
        return self.choice.rho == min(self.choice.means, key=self.choice.means.get)

    def at(self, by_rho: dict[float, dict[int, Result]]) -> "Entry":
        """The entry as if one rho, {rho: {seed: Result}}, had been all that was tried."""
        runs = {(None, rho): by_seed for rho, by_seed in by_rho.items()}
        return self._replace(runs=runs, choice=st.choose({key: _losses(by_seed) for key, by_seed in runs.items()}))

    @property
    def losses(self) -> dict[int, float]:
        """{seed: loss} at the best setting."""
        return {seed: loss_of(result) for seed, result in self.best.items()}

    @property
    def loss(self) -> float:
        """Mean of `losses`."""
        return statistics.fmean(self.losses.values())

    @property
    def fresh(self) -> set[int]:
        """Seeds of the best setting that took no part in choosing it."""
        return set(self.best) - self.choice.seeds if len(self.runs) > 1 else set(self.best)

    @property
    def flops(self) -> float:
        """FLOPs of a run at the best setting."""
        return statistics.median(result.flops for result in self.best.values())

    @property
    def label(self) -> str:
        """Scale, budget and name: what tells it from every other entry."""
        return f"{self.scale}, {self.budget}: {self.name}"

    def tried(self, axis: str) -> list[float]:
        """The values of "rate" or "rho" that were tried, in order."""
        found = {setting[list(TUNED.values()).index(axis)] for setting in self.runs}
        return sorted(value for value in found if value is not None)

    def chosen(self, axis: str) -> float | None:
        """The best value of "rate" or "rho"; None where the method has none, or its default was taken."""
        return self.choice.rho[list(TUNED.values()).index(axis)]

    def edge(self, axis: str) -> str:
        """Where the best value lies at an end of its grid: lower | upper | "" (inside, nothing was tried, or it is not
        the best)."""
        tried, best = self.tried(axis), self.chosen(axis)
        return "" if len(tried) < 2 or not self.of_choice else {tried[0]: "lower", tried[-1]: "upper"}.get(best, "")


class Difference(NamedTuple):
    """An entry less another, by seed; fresh: whether over seeds that chose neither, not over all.

    pairs: {seed: difference} of all that both have.
    """

    interval: st.Interval
    fresh: bool
    pairs: dict[int, float]

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies wholly below or above zero, else 0."""
        low, high = self.interval.low, self.interval.high
        return -1 if high < 0 else 1 if low > 0 else 0


def loss_of(result: Result) -> float:
    """The last held-out loss, infinite of a diverged run."""
    return result.loss if result.status == "finished" else math.inf


def entries(runs: Sequence[gr.Run]) -> list[Entry]:
    """The entries of the runs of a study, by scale and budget, in each in the order of their loss."""
    done = [run for run in runs if run.result.status in ("finished", "diverged")]
    found = []
    for cell in dict.fromkeys((run.scale, run.budget) for run in done):
        found += _of_cell([run for run in done if (run.scale, run.budget) == cell], *cell)
    return found


def _of_cell(runs: list[gr.Run], scale: str, budget: str) -> list[Entry]:
    groups: dict[str, dict[tuple, dict[int, Result]]] = {}
    kinds = collections.defaultdict(list)
    for run in runs:
        kinds[_kind(run.result)].append(run.result)
    keys = [key for key in gr.telling(runs) if key not in (*TUNED, "optim.base")]
    usual = {key: gr.usual(run.result.config[key] for run in runs) for key in keys}
    for kind, alike in kinds.items():
        telling = [key for key in keys if len({json.dumps(result.config[key]) for result in alike}) > 1]
        for result in alike:
            others = [key for key in telling if json.dumps(result.config[key]) != usual[key]]
            name = ", ".join([kind, *(f"{key.split('.')[-1]}={result.config[key]}" for key in others)])
            setting = tuple(result.config[key] for key in TUNED)
            groups.setdefault(name, {}).setdefault(setting, {})[result.config["seed"]] = result
    found = []
    for name, by_setting in groups.items():
        choice = st.choose({setting: _losses(by_seed) for setting, by_seed in by_setting.items()})
        if choice is None:
            continue
        found.append(_entry(name, scale, budget, by_setting, choice))
        for setting, by_seed in by_setting.items():
            if setting != choice.rho and len(set(by_seed) - choice.seeds) >= OWN:
                axes = zip(TUNED.values(), setting, choice.rho, strict=True)
                aside = [f"{axis} {value:g}" for axis, value, best in axes if value != best]
                if math.isfinite(choice.means[setting]):
                    own = choice._replace(rho=setting)  # seeds that every setting has were there to choose it too
                    found.append(_entry(", ".join([name, *aside]), scale, budget, by_setting, own))
    return sorted(found, key=lambda entry: entry.loss)


def _entry(name: str, scale: str, budget: str, runs: dict, choice: st.Choice) -> Entry:
    some = next(iter(runs[choice.rho].values()))
    cost = some.flops / some.adamw_flops if some.adamw_flops else math.nan
    adamw = _alone(some) and some.config["optim.base"] == gr.BASE
    return Entry(name, scale, budget, runs, choice, cost, some.weights, adamw)


def _alone(result: Result) -> bool:
    """Whether a run is its base by itself."""
    return result.config["optim.method"] in (gr.BASE, "base")


def _losses(by_seed: dict[int, Result]) -> dict[int, float]:
    return {seed: loss_of(result) for seed, result in by_seed.items()}


def _kind(result: Result) -> str:
    """A method, its base where that is not AdamW, and the average whose loss it is."""
    method, base = result.config["optim.method"], result.config["optim.base"]
    name = base if _alone(result) else method if base == gr.BASE else f"{method} on {base}"
    return f"{name} {result.weights}".rstrip()


# ------------------------------------------------------------------------------------------------ one beside another
def at_equal_tokens(found: Sequence[Entry], entry: Entry) -> Entry | None:
    """AdamW at its best in the scale and budget of an entry; None where it was not run there.

    Of a method's average that is the same average of AdamW's weights, where there is one: else whatever the average
    gives would be taken for the method's. AdamW's own averages are held against its last weights.
    """
    same = [each for each in found if (each.scale, each.budget) == (entry.scale, entry.budget)]
    return _counterpart(same, entry)


def at_equal_compute(found: Sequence[Entry], entry: Entry) -> Entry | None:
    """The same among runs of the scale with this entry's FLOPs, within EQUAL_FLOPS."""
    near = [each for each in found if each.scale == entry.scale and entry.flops]
    return _counterpart([each for each in near if abs(each.flops / entry.flops - 1) <= EQUAL_FLOPS], entry)


def _counterpart(found: list[Entry], entry: Entry) -> Entry | None:
    own = [each for each in found if each.adamw and each.weights == entry.weights and not entry.adamw]
    shared = [each for each in own if each.best.keys() & entry.best.keys()]
    alike = [each for each in shared if each.of_choice] or shared  # another rate, where the best was not run beside it
    alike = alike if own else [each for each in found if each.plain]
    losses = {index: each.losses for index, each in enumerate(alike)}
    chosen = st.choose(losses)  # on the seeds that all of them have
    return alike[chosen.rho] if chosen else None


def difference(entry: Entry, other: Entry | None, of: Callable[[Result], float] = loss_of) -> Difference | None:
    """A number of an entry less another's: by the seeds that both have, of these the fresh ones where there are two.

    None where the number is known of no common seed, or is not finite.
    """
    if other is None or entry is other:
        return None
    values = [{seed: of(result) for seed, result in each.best.items()} for each in (entry, other)]
    known = [{seed for seed, value in each.items() if not math.isnan(value)} for each in values]
    shared = sorted(known[0] & known[1])
    fresh = [seed for seed in shared if seed in entry.fresh & other.fresh]
    seeds = fresh if len(fresh) >= 2 else shared
    pairs = {seed: values[0][seed] - values[1][seed] for seed in shared}
    if not seeds or not all(map(math.isfinite, pairs.values())):
        return None
    return Difference(st.t_interval([pairs[seed] for seed in seeds]), seeds is fresh, pairs)


# ----------------------------------------------------------------------------------------------------- what is measured
def rounded_loss(measure: str) -> Callable[[Result], float]:
    """The last held-out loss with what a rounding of steppe retention adds to it; NaN where that was not measured."""
    return lambda result: loss_of(result) + float(result.retention.get(measure, math.nan))


def disturbances(entry: Entry) -> dict[str, Callable[[Result], float]]:
    """{measure of steppe retention: the loss that it leaves}, of those known of an entry at its best setting."""
    found = dict.fromkeys(key for result in entry.best.values() for key in result.retention)
    return {key: rounded_loss(key) for key in found if key.startswith(("int", "noise_"))}


def fine_tunings(entry: Entry) -> dict[str, Callable[[Result], float]]:
    """{measure of frontier.at_rates: its number of a run}, of those known of an entry at its best setting."""

    def of(key: str) -> Callable[[Result], float]:
        return lambda result: frontier.at_rates(result.fine_tune).get(key, math.nan)

    every = [path for result in entry.best.values() for path in result.fine_tune.get("paths", ())]
    return {key: of(key) for key in frontier.at_rates({"paths": every})}


def forgotten(loss: float) -> Callable[[Result], float]:
    """What fine-tuning costs on the first text where it reaches a loss on the second, nats a token, at the best rate
    and length; NaN where that was not measured, or is not reached."""

    def of(result: Result) -> float:
        if not result.fine_tune:
            return math.nan
        return frontier.lost_at(frontier.paths_of(result.fine_tune), result.fine_tune["loss"] - loss)

    return of
