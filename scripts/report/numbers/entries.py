"""The one grouping of runs: entries, each at its best radius and learning rate, compared with AdamW by paired seeds.

An entry is a method on a base, or an average of its weights, at one scale and budget, with whatever else tells its runs
apart but rho, peak learning rate and seed: of these two it takes the best, as far as its grid goes. A setting that got
seeds of its own without being the best is an entry of its own. Everything that a report says of runs is of entries.
"""

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd

from steppe.lm.measure import frontier
from steppe.scripts.report.numbers import statistics as st
from steppe.scripts.results import OF_SIZE, Point, Result

BASE = "adamw"  # the method that perturbs nothing, and the base that all are compared with
TUNED = {"optim.peak_learning_rate": "rate", "optim.rho": "rho"}
BASES = {"tokens": "at equal tokens", "flops": "at equal FLOPs"}  # whom an entry is compared with
EQUAL_FLOPS = 0.1  # runs within this share of each other's FLOPs count as equal compute
OWN = 2  # fresh seeds that make a setting an entry
_OF_SECOND_TEXT = ("fine_tune", "forgetting")  # where a measure of retention begins so
_SCALE = ("model.", "data.sequence_length", "data.vocabulary")  # where a key begins so
_BUDGET = ("train.duration", "train.tokens_per_parameter", "train.parameter_count")
# neither changes what a run computes, beyond the order of sums; or it is the axis of a sweep
_ASIDE = ("log.", "mesh.", "checkpoint.", "curvature.", "sample.", "evaluate.", *_SCALE)
_ASIDE_KEYS = {
    *("data.directory", "data.cache", "data.verify", "data.prefetch", "data.workers", "average.weights"),
    *("optim.method", "optim.base", "optim.rho", "seed", *_BUDGET),
}
# where a key of optim begins so, only some methods have it
_OWN_KEYS = ("alpha", "beta", "gamma", "lam", "sigma", "decay", "k", "precond_")


@dataclasses.dataclass(eq=False)
class Entry:
    """One entry of a cell, which is a scale and budget.

    runs: of the frame of the study, whatever their status, a row a run. choice: the best of its settings, by number.
    optimum: where a parabola in log rho at its best rate has its minimum; None where it has no rho. tokens, flops: whom
    it is compared with at equal tokens and at equal compute, as `analyse` finds them.

    cell: scale and budget; label: what tells it from every other entry. best: the runs at the best setting that have
    ended, by seed; fresh: their seeds that took no part in choosing it; loss: their mean; flop: FLOPs of such a run;
    cost: FLOPs of a token, in those of AdamW. of_choice: whether the setting is the best of all that were tried, not
    one of several with seeds of their own. weights: the average that it is, "" for the last weights. perturbs: whether
    its method perturbs the weights, whatever its base: nadamw by itself does not. adamw: whether it is AdamW by itself,
    or an average of its weights; plain: whether it is the last weights of AdamW at its best.
    grid: the runs at the best rate, those over rho; means: {rho: mean loss} there, over the seeds that chose it,
    infinite where a run diverged.
    """

    name: str
    scale: str
    budget: str
    runs: pd.DataFrame
    choice: st.Choice[int]
    optimum: st.Optimum | None = None
    tokens: "Entry | None" = None
    flops: "Entry | None" = None

    def __post_init__(self) -> None:
        some, means = self.runs.iloc[0], self.choice.means
        self.cell = f"{self.scale}, {self.budget}"
        self.label = f"{self.cell}: {self.name}"
        ended = self.runs[(self.runs["setting"] == self.choice.rho) & self.runs["loss"].notna()]
        self.best = ended.drop_duplicates("seed", keep="last").set_index("seed", drop=False)
        self.fresh = set(self.best.index) - (self.choice.seeds if len(means) > 1 else set())
        self.loss, self.flop = self.best["loss"].mean(), self.best["flops"].median()
        self.cost = float((self.best["flops"] / self.best["adamw_flops"].replace(0, math.nan)).iloc[0])
        self.of_choice = self.choice.rho == min(means, key=means.__getitem__)
        self.weights, self.perturbs = some["weights"], not some["alone"]
        self.adamw = not self.perturbs and some["base"] == BASE
        self.plain = self.adamw and self.of_choice and not self.weights
        self.grid = self.runs[self.runs["rate"] == self.chosen("rate")]
        rho = dict(zip(self.grid["setting"], self.grid["rho"], strict=True))
        self.means = {rho[setting]: mean for setting, mean in means.items() if setting in rho}

    @functools.cached_property
    def values(self) -> dict[str, dict[int, float]]:
        """{measure: {seed: what is known of the best run}}, nats a token: the last held-out loss, the loss that each
        rounding or disturbance of steppe retention leaves, and those of frontier.at_rates."""
        found: dict[str, dict[int, float]] = {}
        for seed, loss, result in zip(self.best.index, self.best["loss"], self.best["result"], strict=True):
            disturbed = {key: loss + value for key, value in result.retention.items() if key.startswith(DISTURBED)}
            for key, value in {"loss": loss, **disturbed, **frontier.at_rates(result.fine_tune)}.items():
                found.setdefault(key, {})[seed] = float(value)
        return found

    def value(self, of: str | Callable[[Result], float]) -> dict[int, float]:
        """{seed: a number of the best run} where it is known: one of `values`, or what a function says."""
        known = (
            {seed: of(result) for seed, result in self.best["result"].items()}
            if callable(of)
            else self.values.get(of, {})
        )
        return {seed: value for seed, value in known.items() if not math.isnan(value)}

    @functools.cached_property
    def points(self) -> pd.DataFrame:
        """A row a held-out loss on the way of the best runs: seed, share of the steps, and what a Point has."""
        rows = [
            (seed, point.step / result.steps, *point)
            for seed, result in self.best["result"].items() for point in result.curve if point.step and result.steps
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=["seed", "share", *Point._fields])

    def at(self, setting: int) -> "Entry":
        """The entry at another of its settings: seeds that every setting has were there to choose it too."""
        return dataclasses.replace(self, choice=self.choice._replace(rho=setting))

    def chosen(self, axis: str) -> float | None:
        """The best value of "rate" or "rho"; None where the method has none, or its default was taken."""
        value = self.best[axis].iloc[0]
        return None if axis == "rho" and (not self.perturbs or math.isnan(value)) else float(value)

    def edge(self, axis: str) -> str:
        """Where the best value lies at an end of its grid: lower | upper | "" (inside, nothing was tried, or it is not
        the best)."""
        ended = self.runs[self.runs["loss"].notna() & ~(self.runs["alone"] & (axis == "rho"))]
        tried, best = sorted(ended[axis].dropna().unique()), self.chosen(axis)
        if best is None or len(tried) < 2 or not self.of_choice:
            return ""
        return {tried[0]: "lower", tried[-1]: "upper"}.get(best, "")


class Difference(NamedTuple):
    """An entry less another; fresh: over seeds that chose neither, not over all; pairs: {seed: difference} of all."""

    interval: st.Interval
    fresh: bool
    pairs: dict[int, float]

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies wholly below or above zero, else 0."""
        return int(self.interval.low > 0) - int(self.interval.high < 0)


class Cell(NamedTuple):
    """One scale and budget. entries: {name: entry} at its best, in the order of runs; sigma, df: noise of one loss
    around its seed's level, in this cell or (pooled) over all of them."""

    scale: str
    kind: str
    budget: str
    parameters: int
    tokens: int
    runs: pd.DataFrame
    entries: dict[str, Entry]
    sigma: float
    df: float
    pooled: bool

    @property
    def label(self) -> str:
        return f"{self.scale}, {self.budget}"


class Study(NamedTuple):
    """Everything read.

    runs: a row a run and average: result, run (its name), scale, kind (of the model), budget, cell, method, name (of
    its entry), variant (and its rate where the entry's best is another), rate, rho (0 of a base by itself, NaN of a
    method's default), setting (rate and rho as a number), seed, loss (infinite if it diverged, NaN if there is none
    yet), and what Result has. entries: by cell, as they come in the runs, in each in the order of their loss. cells:
    in the order of size and tokens. names: of entries, AdamW's first. notes: what a reader must know of them.
    """

    runs: pd.DataFrame
    entries: list[Entry]
    cells: list[Cell]
    names: list[str]
    notes: list[str]

    @property
    def trained(self) -> pd.DataFrame:
        """The runs, without the averages of their weights."""
        return self.runs[self.runs["weights"] == ""]


# ------------------------------------------------------------------------------------------------------------- grouping
def analyse(results: Sequence[Result]) -> Study:
    """Groups results into entries, chooses the best setting of each, and whom each is compared with."""
    results, aside = _of_one_second_text(results)
    of_model = _usual_of_model(results)
    runs = _families(pd.DataFrame([_row(result, of_model) for result in results]))
    runs["cell"] = runs["scale"] + ", " + runs["budget"]
    runs["name"], left_out, notes = _names(runs)
    runs["setting"] = runs.groupby(["cell", "name", "rate", "rho"], dropna=False).ngroup()
    if left_out := of_model | left_out:
        shown = ", ".join(f"{key.split('.')[-1]}={json.loads(value)}" for key, value in left_out.items())
        notes.insert(0, f"Names leave out what most runs have: {shown}.")
    padded = sum(result.config.get("train.counted") == "positions" for result in results)
    if padded:
        notes.append(f"{padded} runs recorded positions, padding included, where others have tokens.")
    if aside:
        notes.append(f"{aside} models were fine-tuned on another text than most: what they forget is left out.")
    cells = _cells(runs)
    entries = [entry for cell in cells for entry in _of_cell(cell)]
    for entry in entries:
        entry.tokens, entry.flops = at_equal_tokens(entries, entry), at_equal_compute(entries, entry)
    best = {entry.label: entry.chosen("rate") for entry in entries if entry.of_choice}
    at = (runs["cell"] + ": " + runs["name"]).map(best)
    other = runs["rate"].where(at.notna() & (runs["rate"] != at))
    runs["variant"] = [
        name if math.isnan(rate) else f"{name}, rate {rate:g}" for name, rate in zip(runs["name"], other, strict=True)
    ]
    for cell in cells:
        own = {entry.name: entry for entry in entries if entry.cell == cell.label and entry.of_choice}
        cell.entries.update({name: own[name] for name in dict.fromkeys(cell.runs["name"]) if name in own})
    cells.sort(key=lambda cell: (cell.parameters or math.inf, cell.scale, cell.tokens or math.inf, cell.budget))
    first = {name: place for place, name in reversed([*enumerate(runs["name"])])}
    return Study(runs, entries, cells, sorted(first, key=lambda name: (not name.startswith(BASE), first[name])), notes)


def _of_one_second_text(results: Sequence[Result]) -> tuple[list[Result], int]:
    """The results without what was measured on other second texts than that of most, and how many had such."""
    texts = collections.Counter(result.fine_tune.get("text", "") for result in results if result.fine_tune)
    most = max(texts, key=texts.__getitem__, default="")

    def kept(result: Result) -> Result:
        if not result.fine_tune or result.fine_tune.get("text", "") == most:
            return result
        others = {key: value for key, value in result.retention.items() if not key.startswith(_OF_SECOND_TEXT)}
        return result._replace(fine_tune={}, retention=others)

    return [kept(result) for result in results], sum(texts.values()) - texts[most]


def _row(result: Result, of_model: Mapping[str, str]) -> dict:
    config = result.config
    alone, base = config["optim.method"] in (BASE, "base"), config["optim.base"]
    method = base if alone else config["optim.method"] if base == BASE else f"{config['optim.method']} on {base}"
    duration = str(config["train.duration"])
    if duration == "chinchilla":
        duration = f"{config['train.tokens_per_parameter']:g} tokens a parameter"
    size = config["model.size"] or ("x".join(str(config[key]) for key in OF_SIZE[:2]) + " (layers x width)")
    apart = {key: result.varied[key] for key, value in of_model.items() if json.dumps(result.varied[key]) != value}
    kind = ", ".join(f"{key.split('.')[1]} {value}" for key, value in apart.items())  # what most runs have not
    fields = ("status", "why", "weights", "parameters", "steps", "tokens", "flops", "adamw_flops", "seconds")
    return {
        "result": result, "run": result.name, "scale": ", ".join(filter(None, [size, kind])), "kind": kind,
        "budget": duration, "alone": alone, "base": base, "method": f"{method} {result.weights}".rstrip(),
        "rate": float(config["optim.peak_learning_rate"]),
        "rho": 0.0 if alone else math.nan if config["optim.rho"] is None else float(config["optim.rho"]),
        "seed": config["seed"], **{field: getattr(result, field) for field in fields},
        "goodput": result.goodput, "bits_per_byte": result.bits_per_byte,
        "loss": {"finished": result.loss, "diverged": math.inf}.get(result.status, math.nan),
    }  # fmt: skip


def _usual_of_model(results: Sequence[Result]) -> dict[str, str]:
    """{key of the model, except its size, in which runs differ: the value, as JSON, that most have}."""
    varied = results[0].varied if results else {}
    keys = [key for key in varied if key.startswith(_SCALE) and key != "model.size" and key not in OF_SIZE]
    return {key: _usual(json.dumps(result.varied[key]) for result in results) for key in keys}


def _usual(values: Iterable[str]) -> str:
    """The value that most runs have; of several the first."""
    return collections.Counter(values).most_common(1)[0][0]


def _families(runs: pd.DataFrame) -> pd.DataFrame:
    """Budgets that only one scale has each, but of one ratio of tokens to parameters (within 3 %), as one budget."""
    scales = runs.groupby("budget")["scale"].agg(set)
    known = runs[runs["parameters"] > 0]
    ratios = (known["tokens"] / known["parameters"]).groupby(known["budget"]).last()
    groups: list[list[tuple[float, str]]] = []
    for ratio, budget in sorted((ratio, budget) for budget, ratio in ratios.items() if len(scales[budget]) == 1):
        if groups and ratio <= 1.03 * groups[-1][0][0]:
            groups[-1].append((ratio, budget))
        else:
            groups.append([(ratio, budget)])
    names = {}
    for group in groups:
        covered = [scale for _, budget in group for scale in scales[budget]]
        if len(group) > 1 and len(set(covered)) == len(covered):
            names |= {budget: f"{group[0][0]:.3g} tokens a parameter" for _, budget in group}
    return runs.assign(budget=runs["budget"].replace(names))


def _names(runs: pd.DataFrame) -> tuple[list[str], dict[str, str], list[str]]:
    """(the name of each run's entry, {key that names leave out where a run has it: value as JSON}, notes on keys in
    which methods differ).

    A name tells the keys in which runs of a method differ within some cell, unless most runs have that value.
    """
    first = runs["result"].iloc[0].varied
    keys = [key for key in first if not key.startswith(_ASIDE) and key not in _ASIDE_KEYS]
    values = pd.DataFrame({key: [json.dumps(result.config[key]) for result in runs["result"]] for key in keys})
    places = [runs["cell"], runs["method"]]
    several = (values.groupby(places).nunique() > 1).groupby(level="method").any()
    told = [key for key in keys if key not in TUNED and several[key].any()]
    usual = {key: _usual(values[key]) for key in told}
    names = []
    for row, method in enumerate(runs["method"]):
        apart = [key for key in told if several.loc[method, key] and values[key][row] != usual[key]]
        names.append(", ".join([method, *(f"{key.split('.')[-1]}={json.loads(values[key][row])}" for key in apart)]))
    notes = []
    for key in keys:
        if several[key].any() or key.removeprefix("optim.").startswith(_OWN_KEYS):
            continue  # else names or the tuning say it
        inside = values.groupby(places, sort=False)[key].agg(
            lambda each: ", ".join(sorted(map(str, map(json.loads, set(each)))))
        )
        apart = inside[inside.groupby(level="cell").transform("nunique") > 1].droplevel("cell")
        between = sorted({f"{method}: {each}" for method, each in apart.items()})
        if between:
            notes.append(f"Methods differ in {key} within a scale and budget ({'; '.join(between)}).")
    return names, usual, notes


def _losses(runs: pd.DataFrame) -> dict[int, dict[int, float]]:
    """{setting: {seed: loss}} of the runs that have ended, settings in the order of rate and rho."""
    ended = runs[runs["loss"].notna()]
    return {setting: dict(zip(own["seed"], own["loss"], strict=True)) for setting, own in ended.groupby("setting")}


def _of_cell(cell: Cell) -> list[Entry]:
    """The entries of a cell, in the order of their loss."""
    found = []
    settings = cell.runs.drop_duplicates("setting").set_index("setting")[[*TUNED.values()]]
    for name, own in cell.runs.groupby("name", sort=False):
        losses = _losses(own)
        choice = st.choose(losses)
        if choice is None:
            continue
        entry = Entry(name, cell.scale, cell.budget, own, choice)
        entry.optimum = _optimum(entry, cell)
        found.append(entry)
        for setting, by_seed in losses.items():
            own_seeds = len(set(by_seed) - choice.seeds) >= OWN and math.isfinite(choice.means[setting])
            if setting != choice.rho and own_seeds:
                values, best = settings.loc[setting], settings.loc[choice.rho]
                aside = [f"{axis} {values[axis]:g}" for axis in values.index if values[axis] != best[axis]]
                found.append(dataclasses.replace(entry.at(setting), name=", ".join([name, *aside])))
    return sorted(found, key=lambda entry: entry.loss)


def _cells(runs: pd.DataFrame) -> list[Cell]:
    """The cells as they come in the runs, with their noise, yet without entries."""
    found = []
    for _, own in runs.groupby("cell", sort=False):
        near = {key: loss for key, loss in _near(own).items() if math.isfinite(loss)}
        noise = st.additive(near) if near else st.Noise(math.nan, 0)
        known, some = own[own["parameters"] > 0], own.iloc[0]
        parameters, tokens = (int(known[key].max()) if len(known) else 0 for key in ("parameters", "tokens"))
        given = (some["scale"], some["kind"], some["budget"], parameters, tokens)
        found.append(Cell(*given, own, {}, noise.sigma, noise.df, pooled=False))
    total = sum(cell.df for cell in found)
    sigma = math.sqrt(sum(cell.df * cell.sigma**2 for cell in found if cell.df) / total) if total else math.nan
    return [cell if cell.df >= 4 else cell._replace(sigma=sigma, df=total, pooled=True) for cell in found]


def _near(runs: pd.DataFrame) -> dict[tuple[int, int], float]:
    """{(setting, seed): loss} at the best rho of each rate and its neighbours, where the noise that matters is."""
    found = {}
    for _, own in runs.groupby(["name", "rate"]):
        losses = _losses(own)
        choice = st.choose(losses)
        if choice is not None:
            grid = sorted(losses)
            best = grid.index(choice.rho)
            near = grid[max(0, best - 1) : best + 2]
            found |= {(setting, seed): loss for setting in near for seed, loss in losses[setting].items()}
    return found


def _optimum(entry: Entry, cell: Cell) -> st.Optimum | None:
    pruned = entry.grid[entry.grid["status"] == "pruned"]  # known to be no better, its loss unknown
    means = dict.fromkeys(pruned["rho"], math.nan) | entry.means
    if not entry.perturbs or not any(rho > 0 for rho in means):
        return None
    return st.optimum(means, cell.sigma, cell.df, max(1, len(entry.choice.seeds)))


# ------------------------------------------------------------------------------------------------ comparing two
def at_equal_tokens(found: Sequence[Entry], entry: Entry, cell: str = "") -> Entry | None:
    """AdamW at its best in the cell of an entry, or another cell; None where it was not run there.

    Of a method's average that is the same average of AdamW's weights, where there is one: else whatever the average
    gives would be taken for the method's. AdamW's own averages are compared with its last weights.
    """
    return _counterpart([each for each in found if each.cell == (cell or entry.cell)], entry)


def at_equal_compute(found: Sequence[Entry], entry: Entry) -> Entry | None:
    """The same among runs of the scale with this entry's FLOPs, within EQUAL_FLOPS."""
    near = [each for each in found if each.scale == entry.scale and entry.flop]
    return _counterpart([each for each in near if abs(each.flop / entry.flop - 1) <= EQUAL_FLOPS], entry)


def _counterpart(found: Sequence[Entry], entry: Entry) -> Entry | None:
    own = [each for each in found if each.adamw and each.weights == entry.weights and not entry.adamw]
    shared = [each for each in own if set(each.best.index) & set(entry.best.index)]
    alike = [each for each in shared if each.of_choice] or shared  # another rate, where the best was not run with it
    alike = alike if own else [each for each in found if each.plain]
    # on the seeds all of them have
    chosen = st.choose({i: each.best["loss"].to_dict() for i, each in enumerate(alike)})
    return alike[chosen.rho] if chosen else None


def difference(entry: Entry, other: Entry | None, of: str | Callable[[Result], float] = "loss") -> Difference | None:
    """A number of an entry less another's: by the seeds that both have, of these the fresh ones where there are two.

    of: see Entry.value. None where the number is known of no common seed, or is not finite.
    """
    if other is None or entry.label == other.label:
        return None
    own, base = entry.value(of), other.value(of)
    pairs = {seed: own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())}
    seeds, fresh = paired(entry, other, pairs)
    if not seeds or not all(map(math.isfinite, pairs.values())):
        return None
    return Difference(st.t_interval([pairs[seed] for seed in seeds]), fresh, pairs)


def paired(entry: Entry, other: Entry, known: Iterable[int]) -> tuple[list[int], bool]:
    """(the seeds by which two entries are compared, whether they chose neither): the fresh ones where there are two."""
    seeds, both = list(known), entry.fresh & other.fresh
    fresh = [seed for seed in seeds if seed in both]
    return (fresh, True) if len(fresh) >= 2 else (seeds, False)


def ways(entry: Entry, others: Mapping[str, Entry | None], of: Mapping[str, str | Callable]) -> list[dict]:
    """A row a measure and basis where an entry has a difference: basis, against (an Entry), measure, value, low, high,
    n, df, fresh, pairs, sign and p, that of Student's test.

    others: {basis: whom it is compared with}; of: {measure: see Entry.value}.
    """
    return [
        {"basis": basis, "against": other, "measure": measure, **way.interval._asdict(), "fresh": way.fresh,
         "pairs": way.pairs, "sign": way.sign, "p": st.p_value(way.interval)}
        for measure, what in of.items() for basis, other in others.items() if (way := difference(entry, other, what))
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- what is measured
DISTURBED = ("q", "int", "noise_")  # prefixes of measures of retention that are rises of the loss


def forgotten(loss: float) -> Callable[[Result], float]:
    """What fine-tuning costs on the first text where it reaches a loss on the second, nats a token, at the best rate
    and length; NaN where that was not measured, or is not reached."""

    def of(result: Result) -> float:
        if not result.fine_tune:
            return math.nan
        return frontier.lost_at(frontier.paths_of(result.fine_tune), result.fine_tune["loss"] - loss)

    return of
