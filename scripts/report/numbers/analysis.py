"""What a report says of entries, as frames: comparisons, costs, fits, and measures of other commands."""

import collections
import itertools
import math
from collections.abc import Mapping, Sequence

import pandas as pd

from steppe.scripts import style
from steppe.scripts.report.numbers import statistics as st
from steppe.scripts.report.numbers.entries import Cell, Difference, Entry, Study, difference, paired

# measures that are drawn and shown at once where there are many; tables of data and correlations have all
_FIRST = (
    *("lambda_max", "trace", "ggn_lambda_max", "nme_lambda_max"),
    *("sam_sharpness", "functional_sharpness", "average_sharpness", "delta_func_share"),
)
_FOLLOWED = ("delta_func_share", "lambda_max", "nme_lambda_max", "trace", "functional_sharpness")
_STATUS = {
    "edge": "edge of the grid",
    "diverged": "next to a diverged rho",
    "pruned": "next to a pruned rho",
    "flat": "no minimum in rho",
}
NOTHING = st.Interval(math.nan, math.nan, math.nan, 0)


def spread(key: str, found: st.Interval) -> dict[str, float]:
    """An interval as columns of a frame: KEY, KEY_low, KEY_high, KEY_n."""
    return dict(zip((key, f"{key}_low", f"{key}_high", f"{key}_n"), found, strict=False))


def of_entries(study: Study) -> list[tuple[Cell, Entry]]:
    """(cell, entry), cells by size, entries by name, AdamW's first, other settings than the best after it."""
    place = {name: number for number, name in enumerate(study.names)}
    return [
        (cell, entry)
        for cell in study.cells
        for entry in sorted(
            (entry for entry in study.entries if entry.cell == cell.label),
            key=lambda entry: (place[entry.runs["name"].iloc[0]], not entry.of_choice, entry.name),
        )
    ]


# ------------------------------------------------------------------------------------------------------------- entries
def comparison(study: Study) -> pd.DataFrame:
    """A row an entry: its loss at its best, its difference to AdamW at equal tokens, and its cost.

    difference: that of entries.difference; difference_pooled: the same with the noise of all entries of the cell.
    """
    rows = []
    for cell, entry in of_entries(study):
        way, ended = difference(entry, entry.tokens), st.finite(entry.runs["loss"])
        rows.append(
            {"cell": f"{cell.label}: {cell.parameters:,} parameters, {style.si(cell.tokens)} tokens",
             "scale": cell.scale, "budget": cell.budget, "parameters": cell.parameters, "tokens": cell.tokens,
             "variant": entry.name, "rate": entry.chosen("rate"), "rho": entry.best["rho"].iloc[0],
             "where": _where(entry), "tried": len(entry.means) if entry.perturbs else 0, "finished": int(ended.sum()),
             "runs": len(entry.runs), "seeds": len(entry.best), "loss": entry.loss,
             "bits_per_byte": entry.best["bits_per_byte"].mean(),
             "against": entry.tokens.name if way and entry.tokens else "",
             **spread("difference", way.interval if way else NOTHING), "fresh": bool(way and way.fresh),
             **spread("difference_pooled", _with_noise_of_all(study, entry, way)),
             "selection": gain_of_selection(cell, entry), "flops_ratio": entry.cost, "seconds_ratio": pace(cell, entry)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _where(entry: Entry) -> str:
    if not entry.perturbs or not entry.of_choice:
        return ""
    return "one rho tried" if len(entry.means) == 1 else _STATUS.get(entry.optimum.status, "") if entry.optimum else ""


def _with_noise_of_all(study: Study, entry: Entry, way: Difference | None) -> st.Interval:
    """The difference of an entry to AdamW with bounds from the noise of all entries of its cell on the same seeds."""
    if way is None or entry.tokens is None or way.interval.n < 2:
        return NOTHING
    seeds, _ = paired(entry, entry.tokens, way.pairs)
    inside = [each for each in study.entries if each.cell == entry.cell]
    losses = {(each.name, seed): loss for each in inside for seed, loss in each.value("loss").items() if seed in seeds}
    return st.with_noise(way.interval, st.additive({key: each for key, each in losses.items() if math.isfinite(each)}))


def pace(cell: Cell, entry: Entry) -> float:
    """Seconds of training of a token over those of AdamW, medians of the finished runs; NaN where not measured."""
    plain = [each for each in cell.entries.values() if each.plain]
    if entry.adamw or not plain:
        return 1.0 if plain else math.nan
    return seconds_a_token(entry.grid).median() / (seconds_a_token(plain[0].grid).median() or math.nan)


def seconds_a_token(runs: pd.DataFrame) -> pd.Series:
    """Of runs that have finished and counted tokens."""
    known = runs[(runs["status"] == "finished") & (runs["tokens"] > 0)]
    return known["seconds"] / known["tokens"]


def costs(compared: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """A row a name: FLOPs and seconds of a token in AdamW's, over the cells."""
    if compared.empty:
        return compared
    compared = compared.assign(variant=in_order(compared["variant"], names))
    known = compared.dropna(subset=["variant", "flops_ratio"]).groupby("variant", observed=True)
    found = known.agg(
        flops=("flops_ratio", "median"), seconds=("seconds_ratio", "median"), lowest=("seconds_ratio", "min"),
        highest=("seconds_ratio", "max"), cells=("flops_ratio", "size"),
    )  # fmt: skip
    return found.reset_index()


STEADY = 1.5  # seconds a token of runs that do the same work may differ by this factor and still be shown


def unsteadiness(study: Study) -> float:
    """Largest ratio of seconds a token between finished runs of one model and entry, which all do the same work."""
    known = seconds_a_token(study.runs).loc[lambda pace: pace > 0]
    groups = known.groupby([study.runs["scale"], study.runs["variant"]])
    return float((groups.max() / groups.min()).max()) if len(known) else 1.0


def gain_of_selection(cell: Cell, entry: Entry) -> float:
    """Upper bound of what choosing the best rho on its seeds flatters it by, nats a token; NaN with unknown noise."""
    if not entry.perturbs or not entry.of_choice or len(entry.means) < 2:
        return 0.0
    return st.selection_gain(len(entry.means), cell.sigma, max(1, len(entry.choice.seeds)))


def freed(entry: Entry, runs: pd.DataFrame) -> pd.Series:
    """Losses freed of their seed's own level: AdamW's mean over seeds plus the difference to AdamW of that seed.

    The loss itself where AdamW has no run of that seed.
    """
    base = pd.Series(entry.tokens.value("loss") if entry.tokens else {}, dtype=float)
    base = base[st.finite(base)]
    return runs["loss"] - (runs["seed"].map(base) - base.mean()).fillna(0.0)


# --------------------------------------------------------------------------------------------------------- rho and size
def loss_against_rho(study: Study) -> pd.DataFrame:
    """A row a run of entries with a rho, at their best rate, and of AdamW by itself, in cells where some rho was tried.

    freed_of_seed: see `freed`; chose: whether its seed took part in choosing rho; noise: sd of a difference, nats.
    """
    rows = []
    for cell in study.cells:
        shown = [each for each in cell.entries.values() if each.perturbs or not each.weights]
        for entry in shown if any(each.perturbs for each in shown) else ():
            runs = entry.grid[entry.grid["loss"].notna() | (entry.grid["status"] == "pruned")]
            runs = runs[runs["rho"].notna()]
            rows.append(
                runs[["scale", "budget", "cell"]].assign(
                    variant=entry.name, rho=runs["rho"], seed=runs["seed"], loss=runs["loss"],
                    freed_of_seed=freed(entry, runs), status=runs["status"],
                    chose=runs["seed"].isin(entry.choice.seeds), noise=math.sqrt(2) * cell.sigma,
                )
            )  # fmt: skip
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def best_rho(study: Study) -> pd.DataFrame:
    """A row an optimum in rho, of entries of which several rho were tried; family: a budget of models of one kind,
    which differ in size alone; a budget of one ratio of tokens to parameters also takes in a cell of that ratio that
    bears another name.

    state: st.Optimum's status. low, high: Fieller's interval, n: points. error, df: of log rho.
    """
    rows = []
    known = [cell for cell in study.cells if cell.parameters]
    budgets = dict.fromkeys(cell.budget for cell in study.cells)
    for budget, kind in itertools.product(budgets, dict.fromkeys(cell.kind for cell in known)):
        alike = [cell for cell in known if cell.kind == kind]
        cells = [cell for cell in alike if cell.budget == budget]
        ratios = [cell.tokens / cell.parameters for cell in cells]
        if len(cells) > 1 and max(ratios) <= 1.03 * min(ratios):
            own = {cell.scale for cell in cells}
            near = (min(ratios) / 1.03, 1.03 * max(ratios))
            cells += [c for c in alike if c.scale not in own and near[0] <= c.tokens / c.parameters <= near[1]]
        for cell in sorted(cells, key=lambda cell: cell.parameters):
            rows += [
                {"family": ", ".join(filter(None, [budget, kind])), **row}
                for entry in cell.entries.values() for row in _optimum(cell, entry)
            ]  # fmt: skip
    found = pd.DataFrame(rows)
    return (
        found.iloc[found.groupby(["family", "variant"], sort=False).ngroup().argsort(kind="stable")] if rows else found
    )


def optima_table(optima: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Each optimum once, without what only fits and figures need."""
    if optima.empty:
        return optima
    found = optima.assign(variant=in_order(optima["variant"], names)).drop_duplicates(["variant", "scale", "budget"])
    found = found.sort_values(["variant", "parameters", "scale", "budget"])
    return found.drop(columns=["family", "state", "error", "least", "most", "tried", "step"])


def _optimum(cell: Cell, entry: Entry) -> list[dict]:
    """The optimum in rho of an entry as a row; none where there is none."""
    found, grid = entry.optimum, sorted(rho for rho in entry.means if rho > 0)
    if found is None or not found.rho > 0:
        return []
    steps = [b / a for a, b in itertools.pairwise(grid)]
    return [
        {"variant": entry.name, "budget": cell.budget, "scale": cell.scale, "parameters": cell.parameters,
         "grid_best": entry.best["rho"].iloc[0],
         **spread("optimum", st.Interval(found.rho, found.low, found.high, len(found.points))),
         "status": _STATUS.get(found.status, "inside the grid"), "state": found.status,
         "noise": cell.sigma, "noise_df": cell.df, "noise_of": "all cells" if cell.pooled else "this cell",
         "error": found.error, "least": min(grid), "most": max(grid), "tried": len(grid),
         "step": max(steps, default=1.0)}
    ]  # fmt: skip


def power_laws(optima: pd.DataFrame) -> dict[tuple[str, str], st.PowerLaw]:
    """{(family, name): best rho against parameters}, through the optima that lie inside their grids."""
    several = optima[optima["tried"] > 1] if len(optima) else optima
    laws = {key: _law(own) for key, own in several.groupby(["family", "variant"], sort=False)} if len(several) else {}
    return {key: law for key, law in laws.items() if law}


def _law(optima: pd.DataFrame) -> st.PowerLaw | None:
    """None for fewer than two scales."""
    inside = optima[optima["state"] == "inside"]
    if not len(inside):
        return None
    return st.power_law(inside["parameters"], inside["optimum"], inside["error"], inside["noise_df"].min())


def foretold(optima: pd.DataFrame) -> dict:
    """A power law of best rho fitted without the largest scale, checked there, as columns; unknown with fewer than two
    others.

    optima: of one family and name. The others count where their optimum lies inside their grid; at the largest the
    best of the grid does, and hits if it is within one step of that grid.
    """
    last = optima.loc[optima["parameters"].idxmax()]
    law = _law(optima[optima["parameters"] < last["parameters"]])
    if law is None or not last["grid_best"] > 0:
        return {"checked_at": "", "foretold": math.nan, "best_there": math.nan, "check": "—"}
    rho, best = law.factor * last["parameters"] ** law.exponent.value, last["grid_best"]
    hit = abs(math.log(rho / best)) <= math.log(last["step"]) * (1 + 1e-6)
    verdict = "within a step of the grid" if hit else "more than a step of the grid off"
    check = f"{last['scale']}: {rho:.3g} foretold, {best:.3g} best, {verdict}"
    return {"checked_at": last["scale"], "foretold": rho, "best_there": best, "check": check}


def laws_table(optima: pd.DataFrame, laws: Mapping[tuple[str, str], st.PowerLaw]) -> pd.DataFrame:
    """A row a power law, with its check at the largest scale."""
    rows = []
    for (family, name), law in laws.items():
        own = optima[(optima["family"] == family) & (optima["variant"] == name) & (optima["tried"] > 1)]
        left_out = int((own["state"] != "inside").sum())
        rows.append(
            {"variant": name, "budget": family, "factor": law.factor, **spread("exponent", law.exponent),
             "left_out": left_out, "interval_from": law.how, **foretold(own)}
        )  # fmt: skip
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------ tokens, compute, time
def frontier(study: Study) -> pd.DataFrame:
    """A row an entry at its best: mean over seeds of its cost and its loss, freed of the seeds' levels."""
    rows = []
    for cell, entry in [(each, entry) for each in study.cells for entry in each.entries.values()]:
        runs = entry.best[st.finite(entry.best["loss"])]
        losses = freed(entry, runs)
        rows.append(
            {"scale": cell.scale, "budget": cell.budget, "variant": entry.name, "rho": runs["rho"].iloc[0],
             "tokens": runs["tokens"].mean(), "flops": runs["flops"].mean(), "seconds": seconds(entry),
             "loss": losses.mean(), "lowest": losses.min(), "highest": losses.max(), "seeds": len(runs)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def seconds(entry: Entry) -> float:
    """Seconds of training of a run: the median, since at times something else keeps the machine busy."""
    return entry.grid.loc[entry.grid["status"] == "finished", "seconds"].median()


def curves(study: Study) -> pd.DataFrame:
    """A row an entry and evaluation: mean held-out loss at its best over the seeds that all entries of the panel have;
    a panel a cell, with AdamW of its scale at the compute of the others (aside)."""
    rows = []
    cells = [cell for cell in study.cells if any(entry.perturbs for entry in cell.entries.values())]
    for cell in cells or study.cells:
        longer = [entry.flops for entry in cell.entries.values() if entry.flops and entry.flops.cell != cell.label]
        shared = set.intersection(*([set(entry.best.index) for entry in cell.entries.values()] or [set()]))
        for entry in [*cell.entries.values(), *{each.label: each for each in longer}.values()]:
            runs = entry.best[st.finite(entry.best["loss"])]
            runs = runs if not shared & set(runs.index) else runs[runs.index.isin(shared)]
            own = entry.points[entry.points["seed"].isin(runs.index)]
            mean = own.groupby(["step", "share"], as_index=False).agg(
                **{key: (key, "mean") for key in ("tokens", "flops", "loss")}, seeds=("seed", "size")
            )  # fmt: skip
            mean = mean[(mean["seeds"] == len(runs)) & st.finite(mean["loss"])]
            given = {"panel": cell.label, "scale": entry.scale, "budget": entry.budget, "variant": entry.name}
            rows.append(mean.assign(**given, seconds=mean["share"] * seconds(entry), aside=entry.cell != cell.label))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def on_the_way(study: Study) -> pd.DataFrame:
    """A row an entry and evaluation: held-out loss at its best less AdamW's of the same seed and step, over the seeds
    by which they are compared; the last is the difference that tables have."""
    rows = []
    for cell, entry in of_entries(study):
        way = difference(entry, entry.tokens)
        if way is None or entry.tokens is None:
            continue
        seeds, _ = paired(entry, entry.tokens, way.pairs)
        own, base = (each.points[each.points["seed"].isin(seeds)] for each in (entry, entry.tokens))
        both = own.merge(base[["seed", "step", "loss"]], on=["seed", "step"], suffixes=("", "_base"))
        both["difference"] = both["loss"] - both["loss_base"]
        table = both[st.finite(both["difference"])].pivot_table("difference", "step", "seed", "last").dropna()
        if len(table) and table.shape[1] == len(seeds):
            first = both.drop_duplicates("step").set_index("step").loc[table.index, ["share", "tokens"]].reset_index()
            bounds = [spread("difference", st.t_interval(values)) for values in table.to_numpy()]
            rows.append(first.assign(cell=cell.label, variant=entry.name).join(pd.DataFrame(bounds)))
    keys = ["cell", "variant", "step", "share", "tokens", *spread("difference", NOTHING)]
    return pd.concat(rows, ignore_index=True)[keys] if rows else pd.DataFrame()


# --------------------------------------------------------------------------------------------------------- scaling laws
def scaling_points(study: Study, name: str) -> pd.DataFrame:
    """The finished runs of an entry at its best, of the kind of model of most runs."""
    usual = collections.Counter(study.runs["kind"]).most_common(1)[0][0]
    found = [cell.entries[name].best for cell in study.cells if name in cell.entries and cell.kind == usual]
    best = pd.concat(found) if found else study.runs[:0]
    return best.loc[st.finite(best["loss"]), ["parameters", "tokens", "loss"]]


def scaling_laws(study: Study) -> tuple[dict[str, st.ScalingLaw], dict[str, str]]:
    """({name: L(N, D) through its runs at its best, of one kind of model}, {name: why there is none})."""
    found, refused = {}, {}
    for name in study.names:
        runs = scaling_points(study, name)
        if reason := st.scaling_law_refusal(runs["parameters"], runs["tokens"]):
            refused[name] = reason
        else:
            found[name] = st.scaling_law(runs["parameters"], runs["tokens"], runs["loss"])
    return found, refused


def scaling_table(laws: Mapping[str, st.ScalingLaw]) -> pd.DataFrame:
    """A row a law: its constants, and how far it is from the runs."""
    rows = []
    for name, law in laws.items():
        constants = [spread(key, found) for key, found in law.intervals.items()]
        numbers = {key: value for part in constants for key, value in part.items()}
        rows.append({"variant": name, "points": law.intervals["E"].n, **numbers, "rms": law.rms})
    return pd.DataFrame(rows)


def scaling(study: Study, laws: Mapping[str, st.ScalingLaw]) -> pd.DataFrame:
    """A row a run that a law was fitted to."""
    rows = []
    for name, law in laws.items():
        runs = scaling_points(study, name).sort_values(["parameters", "tokens", "loss"])
        fitted = st.predict(law, runs["parameters"], runs["tokens"])
        rows.append(runs.assign(variant=name, fitted=fitted)[["variant", *runs.columns, "fitted"]])
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


# ------------------------------------------------------------------------------------------- measures of other commands
def measures(study: Study) -> pd.DataFrame:
    """A row a run and measure of a measurement at its newest checkpoint, or of retention: source, measure, value.

    The loss that they measure too, standard errors and residuals are left out: they measure nothing of a minimum.
    """
    rows = [
        (source, run.Index, run.cell, run.variant, run.rho, run.seed, run.loss, measure, float(value))
        for run in study.runs.itertuples()
        for source, numbers in {
            "curvature": (run.result.curvature or ({},))[-1], "retention": run.result.retention, **run.result.measured
        }.items()
        for measure, value in numbers.items()
        if measure not in ("loss", "step") and not measure.endswith(("_error", "_residual"))
        and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]  # fmt: skip
    found = pd.DataFrame(rows, columns=["source", "run", "cell", "variant", "rho", "seed", "loss", "measure", "value"])
    order = {
        "cell": [cell.label for cell in study.cells], "variant": variants(study), "measure": None,
        "source": list(dict.fromkeys(["curvature", "retention", *found["source"]])),
    }  # fmt: skip
    return found.assign(**{key: in_order(found[key], names) for key, names in order.items()})


def in_order(values: pd.Series, names: Sequence[str] | None = None) -> pd.Categorical:
    """Values that sort and group in the order of names, others unknown; or as they come."""
    names = values.unique() if names is None else names
    return pd.Categorical(values.astype(object).where(values.isin(names)), names, ordered=True)


def means(measured: pd.DataFrame) -> pd.DataFrame:
    """A row a setting of which one source measured runs: means over these, a column a measure."""
    keys = ["cell", "variant", "rho"]
    runs = measured.drop_duplicates("run").assign(loss=lambda runs: runs["loss"].where(st.finite(runs["loss"])))
    found = runs.groupby(keys, dropna=False, observed=True).agg(seeds=("seed", "nunique"), loss=("loss", "mean"))
    by_measure = measured.groupby([*keys, "measure"], dropna=False, observed=True)["value"].mean()
    return found.join(by_measure.unstack("measure")).reset_index()


def variants(study: Study) -> list[str]:
    """The names of entries, AdamW's first, each before those of its other settings."""
    named = dict.fromkeys([*zip(study.runs["name"], study.runs["variant"], strict=True)])
    named |= dict.fromkeys((entry.runs["name"].iloc[0], entry.name) for entry in study.entries)
    return list(dict.fromkeys(each for name in study.names for each in (name, *(v for n, v in named if n == name))))


def over_training(study: Study) -> pd.DataFrame:
    """A row a measure and checkpoint of the runs of which curvature was measured more than once."""
    rows = [
        {"cell": run.cell, "variant": run.variant, "run": run.run, "measure": measure,
         "tokens": found["step"] / run.steps * run.tokens, "value": found[measure]}
        for cell in study.cells for run in study.runs[study.runs["cell"] == cell.label].itertuples()
        for found in run.result.curvature if len(run.result.curvature) > 1 and run.steps
        for measure in _FOLLOWED if isinstance(found.get(measure), (int, float))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def shown(names: Sequence[str]) -> list[str]:
    """The measures to draw: all where they are few, else the best known of them, eight at most."""
    if len(names) <= len(_FIRST):
        return list(names)
    return [name for name in _FIRST if name in names] or list(names)[: len(_FIRST)]


def runs(study: Study) -> pd.DataFrame:
    """All runs, as a table shows them."""
    keys = (
        "run status why scale budget variant rate rho seed parameters tokens flops seconds goodput loss bits_per_byte"
    )
    return study.runs[keys.split()].replace({"loss": {math.inf: math.nan}})


def correlations(measured: pd.DataFrame) -> pd.DataFrame:
    """A row a measure and cell: Spearman's correlation with held-out loss over the runs that have both."""
    known = measured[st.finite(measured["loss"])]
    rows = [
        {"source": source, "measure": measure, "cell": cell,
         **spread("correlation", st.rank_correlation(own["value"], own["loss"]))}
        for (source, measure, cell), own in known.groupby(["source", "measure", "cell"], observed=True)
    ]  # fmt: skip
    return pd.DataFrame(rows)
