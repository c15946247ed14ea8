"""Runs in groups: cells of one scale and budget, the variants in them, the best rho of each.

A cell holds the runs of one model and one budget (`train.duration`). In it a variant is a method, with the values of
other keys beside it where runs of that method differ in them, unless most runs have that value; the peak rate only in
cells where they differ in it. Diverged runs count as a loss of infinity.
"""

import collections
import json
import math
from collections.abc import Iterable
from typing import NamedTuple

from steppe.scripts.report.numbers import statistics as st
from steppe.scripts.results import OF_SIZE, Result

BASE = "adamw"  # the method that perturbs nothing
RATE = "optim.peak_learning_rate"  # tuned for each size: another one there makes no other variant
_OF_SECOND_TEXT = ("fine_tune", "forgetting")  # where a measure of retention begins so
_SCALE = ("model.", "data.sequence_length", "data.vocabulary")  # where a key begins so
_BUDGET = ("train.duration", "train.tokens_per_parameter", "train.parameter_count")
# neither changes what a run computes, beyond the order of sums; or it is the axis of a sweep
_ASIDE = ("log.", "mesh.", "checkpoint.", "curvature.", "sample.", "evaluate.", *_SCALE)
_ASIDE_KEYS = {
    *("data.directory", "data.cache", "data.verify", "data.prefetch", "data.workers", "average.weights"),
    *("optim.method", "optim.rho", "seed", *_BUDGET),
}
_OWN = ("alpha", "beta", "gamma", "lam", "sigma", "decay", "k", "precond_")  # keys of optim that only some methods have


class Run(NamedTuple):
    """A Result as the study groups it. loss: infinite if diverged, NaN if there is none (yet).

    scale: the size of the model and its kind, which is what it has beside its size that most runs have not.
    """

    result: Result
    scale: str
    kind: str
    budget: str
    method: str
    variant: str
    rho: float
    seed: int
    loss: float


class Variant(NamedTuple):
    """The runs of one variant in a cell; choice and optimum are None where nothing finished, or nothing has a rho."""

    name: str
    method: str
    reference: str  # the variant of plain AdamW it is compared with; "" if there is none
    runs: list[Run]
    losses: dict[float, dict[int, float]]
    choice: st.Choice | None
    optimum: st.Optimum | None

    def best(self) -> dict[int, Run]:
        """{seed: run} at the best rho."""
        return {run.seed: run for run in self.runs if self.choice and same(run.rho, self.choice.rho)}

    def best_losses(self) -> dict[int, float]:
        """{seed: loss} at the best rho, finished runs alone."""
        return {seed: run.loss for seed, run in self.best().items() if math.isfinite(run.loss)}

    def fresh(self) -> set[int]:
        """Seeds at the best rho that took no part in choosing it."""
        return set(self.best()) - self.choice.seeds if self.choice and len(self.losses) > 1 else set(self.best())


class Cell(NamedTuple):
    """One scale and budget. sigma, df: noise of one loss beside its seed's level, in this cell or over all of them."""

    scale: str
    kind: str
    budget: str
    parameters: int
    tokens: int
    runs: list[Run]
    variants: dict[str, Variant]
    sigma: float
    df: float
    pooled: bool

    @property
    def label(self) -> str:
        return f"{self.scale}, {self.budget}"


class Study(NamedTuple):
    """Everything read, cells in the order of scale and tokens; notes: what a reader must know of how runs differ."""

    runs: list[Run]
    cells: list[Cell]
    variants: list[str]
    budgets: list[str]
    notes: list[str]

    @property
    def trained(self) -> list[Run]:
        """The runs, without the averages of their weights."""
        return [run for run in self.runs if not run.result.weights]


def same(a: float, b: float) -> bool:
    """Whether two rho are the same; NaN (the method's default) is only itself."""
    return a == b or (math.isnan(a) and math.isnan(b))


def telling(runs: list[Run]) -> list[str]:
    """The keys in which runs differ that tell variants of a method apart."""
    return [key for key in runs[0].result.varied if not key.startswith(_ASIDE) and key not in _ASIDE_KEYS]


def analyse(results: list[Result]) -> Study:
    """Groups results and chooses the best rho of each variant in each cell."""
    results, aside = _of_one_second_text(results)
    of_model = _usual_of_model(results)
    runs = [_run(result, of_model) for result in results]
    keys = telling(runs)
    extras, notes = _extras(runs, keys)
    common = {key: usual(run.result.config[key] for run in runs) for key in keys}
    runs = _families([run._replace(variant=_variant(run, extras[_place(run)], common)) for run in runs])
    left_out = of_model | {key: common[key] for keys in extras.values() for key in keys}
    if left_out:
        left_out = ", ".join(f"{key.split('.')[-1]}={json.loads(value)}" for key, value in left_out.items())
        notes.insert(0, f"Names leave out what most runs have: {left_out}.")
    padded = [run for run in runs if run.result.config.get("train.counted") == "positions"]
    if padded:
        notes.append(f"{len(padded)} runs recorded positions, padding included, where others have tokens.")
    if aside:
        notes.append(f"{aside} models were fine-tuned on another text than most: what they forget is left out.")
    cells = [_cell([run for run in runs if (run.scale, run.budget) == cell], cell) for cell in _names_of_cells(runs)]
    cells.sort(key=lambda cell: (cell.parameters or math.inf, cell.scale, cell.tokens or math.inf, cell.budget))
    total = sum(cell.df for cell in cells)
    sigma = math.sqrt(sum(cell.df * cell.sigma**2 for cell in cells if cell.df) / total) if total else math.nan
    finished = [_with_optima(cell, sigma, total) for cell in cells]
    order = sorted({run.variant for run in runs}, key=lambda name: (not name.startswith(BASE), _first(runs, name)))
    return Study(runs, finished, order, list(dict.fromkeys(cell.budget for cell in finished)), notes)


def _of_one_second_text(results: list[Result]) -> tuple[list[Result], int]:
    """The results without what was measured on other second texts than that of most, and how many had such."""
    texts = collections.Counter(result.fine_tune.get("text", "") for result in results if result.fine_tune)
    most = max(texts, key=texts.get, default="")

    def kept(result: Result) -> Result:
        if result.fine_tune.get("text", "") == most:
            return result
        others = {key: value for key, value in result.retention.items() if not key.startswith(_OF_SECOND_TEXT)}
        return result._replace(fine_tune={}, retention=others)

    return [kept(result) if result.fine_tune else result for result in results], sum(texts.values()) - texts[most]


def _run(result: Result, of_model: dict[str, str]) -> Run:
    config = result.config
    method = {"base": BASE}.get(config["optim.method"], config["optim.method"])
    alone = method == BASE
    method = f"{method} {result.weights}" if result.weights else method
    rho = 0.0 if alone else math.nan if config["optim.rho"] is None else float(config["optim.rho"])
    duration = str(config["train.duration"])
    if duration == "chinchilla":
        duration = f"{config['train.tokens_per_parameter']:g} tokens a parameter"
    loss = {"finished": result.loss, "diverged": math.inf}.get(result.status, math.nan)
    kind = _kind(result, of_model)
    return Run(
        result=result,
        scale=", ".join(filter(None, [_size(result), kind])),
        kind=kind,
        budget=duration,
        method=method,
        variant=method,
        rho=rho,
        seed=config["seed"],
        loss=loss,
    )


def _usual_of_model(results: list[Result]) -> dict[str, str]:
    """{key of the model, beside its size, in which runs differ: the value, as JSON, that most have}."""
    varied = results[0].varied if results else {}
    keys = [key for key in varied if key.startswith(_SCALE) and key != "model.size" and key not in OF_SIZE]
    return {key: usual(result.varied[key] for result in results) for key in keys}


def _size(result: Result) -> str:
    """The name of a model's size."""
    config = result.config
    return config["model.size"] or ("x".join(str(config[key]) for key in OF_SIZE[:2]) + " (layers x width)")


def _kind(result: Result, of_model: dict[str, str]) -> str:
    """What a model has beside its size that most runs have not; "" for none."""
    shown = {key: result.varied[key] for key, value in of_model.items() if json.dumps(result.varied[key]) != value}
    return ", ".join(f"{key.split('.')[1]} {value}" for key, value in shown.items())


def _families(runs: list[Run]) -> list[Run]:
    """Budgets that only one scale has each, but of one ratio of tokens to parameters (within 3 %), as one budget."""
    scales, ratios = {}, {}
    for run in runs:
        scales.setdefault(run.budget, set()).add(run.scale)
        if run.result.parameters:
            ratios[run.budget] = run.result.tokens / run.result.parameters
    single = sorted((ratio, budget) for budget, ratio in ratios.items() if len(scales[budget]) == 1)
    groups = []
    for ratio, budget in single:
        if groups and ratio <= 1.03 * groups[-1][0][0]:
            groups[-1].append((ratio, budget))
        else:
            groups.append([(ratio, budget)])
    names = {}
    for group in groups:
        covered = [scale for _, budget in group for scale in scales[budget]]
        if len(group) > 1 and len(set(covered)) == len(covered):
            names.update({budget: f"{group[0][0]:.3g} tokens a parameter" for _, budget in group})
    return [run._replace(budget=names.get(run.budget, run.budget)) for run in runs]


def _names_of_cells(runs: list[Run]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((run.scale, run.budget) for run in runs))


def _extras(runs: list[Run], keys: list[str]) -> tuple[dict[tuple[str, str, str], list[str]], list[str]]:
    """({a method's place: keys that tell its variants apart there}, notes on keys in which methods differ).

    These are the keys in which its own runs differ within a cell, whichever: the peak rate only in those cells.
    """
    extras, notes = {_place(run): [] for run in runs}, []
    for key in keys:
        values: dict[tuple[str, str, str], set[str]] = {}
        for run in runs:
            values.setdefault(_place(run), set()).add(str(run.result.config[key]))
        several = [place for place, found in values.items() if len(found) > 1]
        methods = {method for _, _, method in several}
        places = [place for place in values if place[-1] in methods]
        told = several if key == RATE else places
        for place in told:
            extras[place].append(key)
        if len(told) < len(places):
            notes.append("Names leave out the peak rate where a method has no other in a scale and budget.")
        between = set()
        for cell in _names_of_cells(runs):
            inside = {place[-1]: found for place, found in values.items() if place[:-1] == cell}
            alike = {tuple(sorted(found)) for found in inside.values()}
            if len(alike) > 1 and not key.removeprefix("optim.").startswith(_OWN):
                between |= {f"{method}: {', '.join(sorted(found))}" for method, found in inside.items()}
        if between and not several:  # else the names of variants say it
            notes.append(f"Methods differ in {key} within a scale and budget ({'; '.join(sorted(between))}).")
    return extras, notes


def usual(values: Iterable) -> str:
    """The value, as JSON, that most runs have; of several the first."""
    return collections.Counter(map(json.dumps, values)).most_common(1)[0][0]


def _place(run: Run) -> tuple[str, str, str]:
    return run.scale, run.budget, run.method


def _variant(run: Run, extras: list[str], common: dict[str, str]) -> str:
    values = {key: run.result.config[key] for key in extras}
    shown = [f"{key.split('.')[-1]}={value}" for key, value in values.items() if json.dumps(value) != common[key]]
    return ", ".join([run.method, *shown])


def _first(runs: list[Run], name: str) -> int:
    return next(i for i, run in enumerate(runs) if run.variant == name)


def _cell(runs: list[Run], label: tuple[str, str]) -> Cell:
    names = list(dict.fromkeys(run.variant for run in runs))
    plain = {run.variant: run.result.config for run in runs if run.method == BASE}
    keys = telling(runs)
    variants = {}
    for name in names:
        own = [run for run in runs if run.variant == name]
        losses = {}
        for run in own:
            if not math.isnan(run.loss):
                losses.setdefault(run.rho, {})[run.seed] = run.loss
        config = own[0].result.config  # the plain variant that it differs from in the fewest keys; of several the first
        apart = {other: sum(config[key] != flat[key] for key in keys) for other, flat in plain.items()}
        reference = name if name in plain else min(apart, key=apart.get, default="")
        variants[name] = Variant(
            name=name,
            method=own[0].method,
            reference=reference,
            runs=own,
            losses=losses,
            choice=st.choose(losses),
            optimum=None,
        )
    near = {}
    for variant in variants.values():
        for rho in _near(variant):
            near.update({((variant.name, rho), seed): loss for seed, loss in variant.losses[rho].items()})
    near = {key: loss for key, loss in near.items() if math.isfinite(loss)}
    fit = st.additive(near) if near else None
    known = [run.result for run in runs if run.result.parameters]
    scale, budget = label
    return Cell(
        scale=scale,
        kind=runs[0].kind,
        budget=budget,
        parameters=max((result.parameters for result in known), default=0),
        tokens=max((result.tokens for result in known), default=0),
        runs=runs,
        variants=variants,
        sigma=fit.sigma if fit and fit.df else math.nan,
        df=fit.df if fit else 0,
        pooled=False,
    )


def _near(variant: Variant) -> list[float]:
    """The best rho and its neighbours in the grid, where the noise that matters is measured."""
    if variant.choice is None:
        return []
    grid = sorted(variant.losses)
    best = next(i for i, rho in enumerate(grid) if same(rho, variant.choice.rho))
    return grid[max(0, best - 1) : best + 2]


def _with_optima(cell: Cell, sigma: float, df: int) -> Cell:
    pooled = cell.df < 4
    if pooled:
        cell = cell._replace(sigma=sigma, df=df, pooled=True)
    variants = {}
    for name, variant in cell.variants.items():
        optimum = None
        if variant.choice is not None and variant.method != BASE:
            means = dict(variant.choice.means)
            for run in variant.runs:  # stopped by successive halving: known to be no better, its loss unknown
                if run.result.status == "pruned":
                    means.setdefault(run.rho, math.nan)
            if any(rho > 0 for rho in means):
                optimum = st.optimum(means, cell.sigma, cell.df, max(1, len(variant.choice.seeds)))
        variants[name] = variant._replace(optimum=optimum)
    return cell._replace(variants=variants)
