"""What a report says of grouped runs: differences to AdamW, costs, fits, and measures of other commands."""

import collections
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from steppe.scripts.report.numbers import statistics as st
from steppe.scripts.report.numbers.entries import EQUAL_FLOPS
from steppe.scripts.report.numbers.groups import Cell, Run, Study, Variant

# measures that are drawn and shown at once where there are many; tables of data and correlations have all
_FIRST = (
    *("lambda_max", "trace", "ggn_lambda_max", "nme_lambda_max"),
    *("sam_sharpness", "functional_sharpness", "average_sharpness", "delta_func_share"),
)
_FOLLOWED = ("delta_func_share", "lambda_max", "nme_lambda_max", "trace", "functional_sharpness")
Interval = st.Interval
NOTHING = Interval(math.nan, math.nan, math.nan, 0)


def differences(cell: Cell, variant: Variant) -> dict[str, Interval]:
    """Loss at the best rho minus AdamW's of the same seed: over all seeds, over fresh ones, and with pooled noise.

    pooled: noise taken from all variants of the cell together, over fresh seeds where there are two, else over all.
    """
    reference = cell.variants.get(variant.reference)
    if variant.choice is None or reference is None or reference.choice is None:
        return {"all": NOTHING, "fresh": NOTHING, "pooled": NOTHING}
    own, base = variant.best_losses(), reference.best_losses()
    shared = [seed for seed in sorted(own) if seed in base]
    fresh = [seed for seed in shared if seed in variant.fresh()]
    only = fresh if len(fresh) >= 2 else shared
    table = {
        (v.name, seed): loss for v in cell.variants.values() for seed, loss in v.best_losses().items() if seed in only
    }
    pooled = st.contrast(st.additive(table), variant.name, reference.name) if only else NOTHING
    return {
        "all": st.t_interval([own[seed] - base[seed] for seed in shared]),
        "fresh": st.t_interval([own[seed] - base[seed] for seed in fresh]),
        "pooled": pooled if len(only) >= 2 else NOTHING,
    }


def at_equal_compute(study: Study, cell: Cell, variant: Variant) -> Cell | None:
    """AdamW's cell of the same scale with the FLOPs of this variant's runs; None where it was not run there."""
    flops = _flops(variant)
    for other in study.cells:
        reference = other.variants.get(variant.reference)
        known = other is not cell and other.scale == cell.scale and reference is not None and reference.choice
        if known and abs(_flops(reference) / flops - 1) <= EQUAL_FLOPS:
            return other
    return None


def _flops(variant: Variant) -> float:
    """FLOPs of a run at the best rho; NaN where none is known (a run not yet begun has none)."""
    known = [run.result.flops for run in variant.best().values() if run.result.flops]
    return statistics.median(known) if known else math.nan


def costs(cell: Cell, variant: Variant) -> tuple[float, float]:
    """(FLOPs, seconds of training) per token of a variant over those of AdamW in the cell; NaN where not measured."""
    ran = [run.result for run in variant.runs if run.result.adamw_flops]
    flops = statistics.median(result.flops / result.adamw_flops for result in ran) if ran else math.nan
    reference = cell.variants.get(variant.reference)

    def pace(runs: list[Run]) -> float:
        found = [
            run.result.seconds / (run.result.tokens or math.nan) for run in runs if run.result.status == "finished"
        ]
        return statistics.median(found) if found else math.nan

    return flops, pace(variant.runs) / (pace(reference.runs) or math.nan) if reference else math.nan


def optima(study: Study) -> dict[tuple[str, str], list[tuple[Cell, st.Optimum]]]:
    """{(family, variant): [(cell, optimum), ...]}, an entry a scale where several rho were tried.

    A family is a budget of models of one kind, which differ in size alone. A budget of one ratio of tokens to
    parameters also takes in a cell of that ratio that bears another name.
    """
    found = {}
    known = [cell for cell in study.cells if cell.parameters]
    for budget, kind in itertools.product(study.budgets, dict.fromkeys(cell.kind for cell in known)):
        alike = [cell for cell in known if cell.kind == kind]
        cells = [cell for cell in alike if cell.budget == budget]
        ratios = [cell.tokens / cell.parameters for cell in cells]
        if len(cells) > 1 and max(ratios) <= 1.03 * min(ratios):
            cells += [
                cell for cell in alike
                if cell.scale not in {own.scale for own in cells}
                and min(ratios) / 1.03 <= cell.tokens / cell.parameters <= 1.03 * max(ratios)
            ]  # fmt: skip
        family = ", ".join(filter(None, [budget, kind]))
        for cell in sorted(cells, key=lambda cell: cell.parameters):
            for name, variant in cell.variants.items():
                grid = [rho for rho in variant.losses if rho > 0]
                if variant.optimum is not None and variant.optimum.rho > 0 and len(grid) > 1:
                    found.setdefault((family, name), []).append((cell, variant.optimum))
    return found


def seconds(variant: Variant) -> float:
    """Seconds of training of a run of a variant: the median, since at times something else keeps the machine busy."""
    found = [run.result.seconds for run in variant.runs if run.result.status == "finished"]
    return statistics.median(found) if found else math.nan


STEADY = 1.5  # seconds a token of runs that do the same work may differ by this factor and still be shown


def unsteadiness(study: Study) -> float:
    """Largest ratio of seconds a token between finished runs of one model and variant, which all do the same work."""
    paces = {}
    for run in study.runs:
        if run.result.status == "finished" and run.result.seconds:
            paces.setdefault((run.scale, run.variant), []).append(run.result.seconds / (run.result.tokens or math.nan))
    return max((max(found) / min(found) for found in paces.values()), default=1.0)


def power_laws(study: Study) -> dict[tuple[str, str], st.PowerLaw]:
    """{(family, variant): best rho against parameters}, through the optima that lie inside their grids."""
    every = optima(study)
    families = dict.fromkeys(family for family, _ in every)
    laws = {key: _law_through(every.get(key, ())) for key in itertools.product(families, study.variants)}
    return {key: law for key, law in laws.items() if law}


def _law_through(pairs: Sequence[tuple[Cell, st.Optimum]]) -> st.PowerLaw | None:
    """Best rho against parameters through the optima that lie inside their grids; None for fewer than two scales."""
    inside = [(cell, optimum) for cell, optimum in pairs if optimum.status == "inside"]
    if not inside:
        return None
    return st.power_law(
        [cell.parameters for cell, _ in inside], [optimum.rho for _, optimum in inside],
        [optimum.error for _, optimum in inside], min(cell.df for cell, _ in inside),
    )  # fmt: skip


class Foretold(NamedTuple):
    """The best rho of the largest scale, from a power law through the smaller ones, and what was best there.

    step: the ratio of neighbours in the grid there; hit: whether they lie within one such step.
    """

    scale: str
    rho: float
    best: float
    step: float

    @property
    def hit(self) -> bool:
        return abs(math.log(self.rho / self.best)) <= math.log(self.step) * (1 + 1e-6)


def foretold(study: Study, family: str, name: str) -> Foretold | None:
    """A power law of best rho fitted without the largest scale, checked there; None with fewer than two others.

    The others count where their optimum lies inside their grid; at the largest the best of the grid does.
    """
    pairs = sorted(optima(study).get((family, name), ()), key=lambda pair: pair[0].parameters)
    if not pairs:
        return None
    cell, _ = pairs[-1]
    law = _law_through([pair for pair in pairs if pair[0].parameters < cell.parameters])
    variant = cell.variants[name]
    grid = sorted(rho for rho in variant.losses if rho > 0)
    if law is None or len(grid) < 2 or variant.choice is None or not variant.choice.rho > 0:
        return None
    rho = law.factor * cell.parameters**law.exponent.value
    return Foretold(cell.scale, rho, variant.choice.rho, max(b / a for a, b in itertools.pairwise(grid)))


def on_the_way(cell: Cell, variant: Variant) -> list[dict]:
    """A row an evaluation: held-out loss at the best rho minus AdamW's of the same seed and step, over such seeds.

    AdamW's with the same average of the weights, where it has that.
    """
    weights = variant.runs[0].result.weights
    reference = cell.variants.get(f"{variant.reference} {weights}", cell.variants.get(variant.reference))
    if variant is reference or variant.choice is None or reference is None or reference.choice is None:
        return []
    own, base = ({seed: run for seed, run in v.best().items() if math.isfinite(run.loss)} for v in (variant, reference))
    shared = [seed for seed in sorted(own) if seed in base]
    if not shared:
        return []
    rows = []
    for points in zip(*(runs[seed].result.curve for seed in shared for runs in (own, base)), strict=False):
        if points[0].step and len({point.step for point in points}) == 1:
            found = [a.loss - b.loss for a, b in zip(points[::2], points[1::2], strict=True)]
            if all(map(math.isfinite, found)):
                share = points[0].step / own[shared[0]].result.steps
                rows.append({"step": points[0].step, "share": share, "tokens": points[0].tokens,
                             "difference": st.t_interval(found)})  # fmt: skip
    return rows


def scaling_laws(study: Study) -> tuple[dict[str, st.ScalingLaw], dict[str, str]]:
    """({variant: L(N, D) through its runs at the best rho, of one kind of model}, {variant: why there is none})."""
    found, refused = {}, {}
    for name in study.variants:
        points = scaling_points(study, name)
        reason = st.scaling_law_refusal([point[0] for point in points], [point[1] for point in points])
        if reason:
            refused[name] = reason
        else:
            found[name] = st.scaling_law(*zip(*points, strict=True))
    return found, refused


def scaling_points(study: Study, name: str) -> list[tuple[int, int, float]]:
    """(parameters, tokens, loss) of the finished runs of a variant at its best rho, of the kind of most runs."""
    usual = collections.Counter(run.kind for run in study.runs).most_common(1)[0][0]
    return [
        (run.result.parameters, run.result.tokens, run.loss)
        for cell in study.cells
        if name in cell.variants and cell.kind == usual
        for run in cell.variants[name].best().values()
        if math.isfinite(run.loss)
    ]


def measures(study: Study) -> dict[str, dict[str, dict[str, float]]]:
    """{"curvature" | "retention": {measure: {run name: value}}} of what other commands measured of finished runs.

    The loss they measure beside it, standard errors and residuals are left out: they measure nothing of a minimum.
    """
    found = {"curvature": {}, "retention": {}}
    for run in study.runs:
        newest = run.result.curvature[-1] if run.result.curvature else {}
        for source, numbers in (("curvature", newest), ("retention", run.result.retention)):
            for measure, value in numbers.items():
                if measure in ("loss", "step") or measure.endswith(("_error", "_residual")):
                    continue
                if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                    found[source].setdefault(measure, {})[run.result.name] = float(value)
    return found


def over_training(study: Study) -> list[dict]:
    """One row for each measure and checkpoint of the runs of which curvature was measured more than once."""
    rows = []
    for cell in study.cells:
        for run in cell.runs:
            found = run.result.curvature
            if len(found) < 2 or not run.result.steps:
                continue
            rows += [
                {"cell": cell.label, "variant": run.variant, "run": run.result.name, "measure": measure,
                 "tokens": f["step"] / run.result.steps * run.result.tokens, "value": f[measure]}
                for f in found for measure in _FOLLOWED if isinstance(f.get(measure), (int, float))
            ]  # fmt: skip
    return rows


def shown(by_measure: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The measures to draw: all where they are few, else the best known of them, eight at most."""
    if len(by_measure) <= len(_FIRST):
        return by_measure
    known = [measure for measure in _FIRST if measure in by_measure]
    return {measure: by_measure[measure] for measure in known or list(by_measure)[: len(_FIRST)]}


def correlation(cell: Cell, values: dict[str, float]) -> Interval:
    """Spearman's correlation of a measure with held-out loss over the finished runs of a cell that have it."""
    runs = [run for run in cell.runs if math.isfinite(run.loss) and run.result.name in values]
    return st.rank_correlation([values[run.result.name] for run in runs], [run.loss for run in runs])


def gain_of_selection(cell: Cell, variant: Variant) -> float:
    """Upper bound of what choosing the best rho on its seeds flatters it by, nats a token; NaN with unknown noise."""
    if variant.choice is None or len(variant.losses) < 2:
        return 0.0
    return st.selection_gain(len(variant.losses), cell.sigma, max(1, len(variant.choice.seeds)))


def level(cell: Cell, variant: Variant, run: Run) -> float:
    """A run's loss freed of its seed's own level: AdamW's mean over seeds plus the difference to AdamW of that seed.

    The loss itself where the cell has no AdamW run of that seed.
    """
    reference = cell.variants.get(variant.reference)
    base = reference.best_losses() if reference else {}
    return run.loss - base[run.seed] + statistics.mean(base.values()) if run.seed in base else run.loss
