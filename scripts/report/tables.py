"""The tables of a report: rows of numbers and intervals, as CSV text, and with what each column shows in the page."""

import csv
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from steppe.scripts import style
from steppe.scripts.report.numbers import analysis as an
from steppe.scripts.report.numbers import groups as gr
from steppe.scripts.report.numbers import statistics as st

Interval = st.Interval
_STATUS = {
    "edge": "edge of the grid",
    "diverged": "beside a diverged rho",
    "pruned": "beside a pruned rho",
    "flat": "no minimum in rho",
}


class Column(NamedTuple):
    """key of the row, header with its unit, how a value is shown; numbers stand to the right."""

    key: str
    header: str
    show: Callable[[Any], str] = str
    number: bool = True


class Table(NamedTuple):
    """name: stem of its CSV. caption: plain text. group: key whose equal values share a heading, or ""."""

    name: str
    title: str
    caption: str
    columns: list[Column]
    rows: list[dict]
    group: str = ""


def to_csv(rows: list[dict]) -> str:
    """Rows as CSV; an Interval becomes columns KEY, KEY_low, KEY_high, KEY_n; what is not known stays empty."""
    flat = []
    for row in rows:
        found = {}
        for key, value in row.items():
            if isinstance(value, Interval):
                found.update(
                    {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high, f"{key}_n": value.n}
                )
            elif not isinstance(value, tuple):  # made of other columns, to be shown
                found[key] = value
        flat.append({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()})
    text = io.StringIO()
    names = list(dict.fromkeys(key for row in flat for key in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


# -------------------------------------------------------------------------------------------------------------- values
def decimals(digits: int) -> Callable[[float], str]:
    """Shows a float with so many decimals and a true minus sign; an em dash where it is not known."""

    def show(value: float) -> str:
        if value is None or math.isnan(value):
            return "—"
        return "∞" if math.isinf(value) else f"{value:.{digits}f}".replace("-", "−")

    return show


def significant(value: float) -> str:
    """Three digits."""
    return "—" if value is None or math.isnan(value) else f"{value:.3g}".replace("-", "−")


def interval(digits: int = 4, count: str = "n") -> Callable[[Interval], str]:
    """Shows "value (n 3)" and "[low, high]" below it; one value says that it has no interval."""

    def show(found: Interval) -> str:
        if not found.n or math.isnan(found.value):
            return "—"
        shown = decimals(digits)
        bounds = f"[{shown(found.low)}, {shown(found.high)}]" if math.isfinite(found.high) else "no interval"
        return shown(found.value) + (f" ({count} {found.n})" if count else "") + f"\n{bounds}"

    return show


def rho(value: float) -> str:
    """A radius, three digits; "default" where the method's own was used."""
    return "default" if math.isnan(value) else f"{value:.3g}"


# -------------------------------------------------------------------------------------------------------------- tables
def comparison(study: gr.Study) -> Table:
    rows = []
    for cell in study.cells:
        for name in study.variants:
            if name not in cell.variants:
                continue
            variant = cell.variants[name]
            best = [run for run in variant.best().values() if math.isfinite(run.loss)]
            flops, seconds = an.costs(cell, variant)
            found = an.differences(cell, variant) if variant.method != gr.BASE else {}
            best_rho = variant.choice.rho if variant.choice else math.nan
            where = _STATUS.get(variant.optimum.status, "") if variant.optimum else ""
            where = "one rho tried" if variant.method != gr.BASE and len(variant.losses) == 1 else where
            where = where if variant.choice else "none finished"
            rows.append(
                {"cell": f"{cell.label}: {cell.parameters:,} parameters, {style.si(cell.tokens)} tokens",
                 "scale": cell.scale, "budget": cell.budget, "parameters": cell.parameters, "tokens": cell.tokens,
                 "variant": name, "rho": best_rho, "where": where, "chosen": (best_rho, where),
                 "tried": len(variant.losses) if variant.method != gr.BASE else 0,
                 "finished": sum(math.isfinite(run.loss) for run in variant.runs), "runs": len(variant.runs),
                 "seeds": len(best), "loss": _mean([run.loss for run in best]),
                 "bits_per_byte": _mean([run.result.bits_per_byte for run in best]),
                 **{f"difference_{key}": found.get(key, an.NOTHING) for key in ("all", "fresh", "pooled")},
                 "selection": an.gain_of_selection(cell, variant), "flops_ratio": flops, "seconds_ratio": seconds}
            )  # fmt: skip
    return Table(
        "comparison", "Method by scale and budget",
        "Loss: held-out, nats per token, mean over the seeds at the best rho. Differences: loss minus AdamW's of the "
        "same seed, negative is better; where a method has fewer seeds than AdamW, compare them, not the losses. All "
        "seeds: paired, with those that chose rho. Fresh seeds: paired, only seeds that took no part in choosing rho; "
        "the honest one. Pooled: noise shared by all methods of the group, which assumes that it is alike; over fresh "
        "seeds where there are two, else over all. Brackets: 95 % Student intervals; one pair has none. Flattery: "
        "upper bound of what choosing rho on its seeds lowers that loss by.",
        [
            Column("variant", "method", number=False), Column("chosen", "best rho", _chosen), Column("seeds", "seeds"),
            Column("loss", "loss, nats per token", decimals(4)),
            Column("difference_all", "difference, all seeds (n pairs)", interval()),
            Column("difference_fresh", "difference, fresh seeds (n pairs)", interval()),
            Column("difference_pooled", "difference, pooled noise (n pairs)", interval()),
            Column("selection", "flattery, nats", lambda value: decimals(4)(value or math.nan)),
            Column("flops_ratio", "FLOPs / AdamW", decimals(2)),
        ],
        rows, "cell",
    )  # fmt: skip


def costs(study: gr.Study) -> Table:
    rows = []
    for name in study.variants:
        found = [an.costs(cell, cell.variants[name]) for cell in study.cells if name in cell.variants]
        flops, seconds = ([value for value in values if math.isfinite(value)] for values in zip(*found, strict=True))
        if flops:
            middle = float(np.median(seconds)) if seconds else math.nan
            rows.append(
                {"variant": name, "flops": float(np.median(flops)), "seconds": middle,
                 "lowest": min(seconds, default=math.nan), "highest": max(seconds, default=math.nan),
                 "cells": len(flops)}
            )  # fmt: skip
    return Table(
        "cost", "Cost of a token, AdamW = 1",
        "FLOPs as counted; seconds of training as measured: median of the finished runs of a scale and budget over "
        "AdamW's median there, whatever else the machine did; then median, lowest and highest over scales and budgets.",
        [
            Column("variant", "method", number=False), Column("flops", "FLOPs / AdamW", decimals(2)),
            Column("seconds", "seconds / AdamW", decimals(2)), Column("lowest", "lowest", decimals(2)),
            Column("highest", "highest", decimals(2)), Column("cells", "scales and budgets"),
        ],
        rows,
    )  # fmt: skip


def optima(study: gr.Study) -> Table:
    rows = []
    for name in study.variants:
        for cell in study.cells:
            optimum = cell.variants[name].optimum if name in cell.variants else None
            if optimum and math.isfinite(optimum.rho):
                found = Interval(optimum.rho, optimum.low, optimum.high, len(optimum.points))
                rows.append(
                    {"variant": name, "budget": cell.budget, "scale": cell.scale, "parameters": cell.parameters,
                     "grid_best": cell.variants[name].choice.rho, "optimum": found,
                     "status": _STATUS.get(optimum.status, "inside the grid"), "noise": cell.sigma, "noise_df": cell.df,
                     "noise_of": "all cells" if cell.pooled else "this cell"}
                )  # fmt: skip
    return Table(
        "best_rho", "Best rho",
        "Optimum: minimum of a parabola in log rho through the best rho of the grid and its neighbours (and all within "
        "a factor of 4), with Fieller's 95 % interval, cut off where the grid ends; n points. Where the grid does not "
        "bracket it, the best of the grid stands there, without an interval, and is left out of the power law. Noise: "
        "standard deviation of one loss beside its seed's own level, nats, which needs several seeds, and its df.",
        [
            Column("budget", "budget", number=False), Column("scale", "scale", number=False),
            Column("parameters", "parameters", "{:,}".format),
            Column("grid_best", "best of the grid", rho),
            Column("optimum", "optimum (n points)", _rho_interval), Column("status", "where", number=False),
            Column("noise", "noise, nats", decimals(4)), Column("noise_df", "its df"),
            Column("noise_of", "noise from", number=False),
        ],
        rows, "variant",
    )  # fmt: skip


def power_laws(study: gr.Study, laws: dict) -> Table:
    rows = []
    every = an.optima(study)
    for (family, name), law in laws.items():
        edges = sum(optimum.status != "inside" for _, optimum in every[family, name])
        told = an.foretold(study, family, name)
        rows.append(
            {"variant": name, "budget": family, "factor": law.factor, "exponent": law.exponent,
             "left_out": edges, "interval_from": law.how, "checked_at": told.scale if told else "",
             "foretold": told.rho if told else math.nan, "best_there": told.best if told else math.nan,
             "check": _foretold(told)}
        )  # fmt: skip
    return Table(
        "power_law", "Best rho = a N^b",
        "b with its 95 % interval; N non-embedding parameters. n scales whose optimum lies inside the grid; scales "
        "without one are left out, which biases b if they are at one end. Check: a law fitted without the largest "
        "scale, beside the best of the grid there.",
        [
            Column("variant", "method", number=False), Column("budget", "budget", number=False),
            Column("factor", "a", significant), Column("exponent", "b (n scales)", interval(2)),
            Column("left_out", "scales left out"), Column("interval_from", "interval from", number=False),
            Column("check", "check at the largest scale", number=False),
        ],
        rows,
    )  # fmt: skip


def scaling_laws(laws: dict[str, st.ScalingLaw]) -> Table:
    names = ("E", "A", "B", "a", "b")
    rows = [
        {"variant": name, "points": law.intervals["E"].n, **{key: law.intervals[key] for key in names}, "rms": law.rms}
        for name, law in laws.items()
    ]
    digits = {"E": 3, "A": 1, "B": 1, "a": 3, "b": 3}
    return Table(
        "scaling_law", "L(N, D) = E + A/N^a + B/D^b",
        "Huber loss on log loss, several starts; runs at the best rho; N non-embedding parameters, D tokens, losses in "
        "nats per token. 95 % intervals from a residual bootstrap, if the form holds and runs are independent.",
        [
            Column("variant", "method", number=False), Column("points", "runs"),
            *(Column(key, key, interval(digits[key], "")) for key in names),
            Column("rms", "rms of log loss", significant),
        ],
        rows,
    )  # fmt: skip


def sharpness(study: gr.Study, source: str, found: dict[str, dict[str, float]]) -> Table:
    rows = []
    for cell in study.cells:
        measured = [run for run in cell.runs if any(run.result.name in values for values in found.values())]
        for name, tried in dict.fromkeys((run.variant, str(run.rho)) for run in measured):  # text: NaN is itself
            alike = [run for run in measured if (run.variant, str(run.rho)) == (name, tried)]
            means = {
                measure: _mean([values[run.result.name] for run in alike if run.result.name in values])
                for measure, values in found.items()
            }
            rows.append(
                {"cell": cell.label, "variant": name, "rho": alike[0].rho, "seeds": len({run.seed for run in alike}),
                 "loss": _mean([run.loss for run in alike if math.isfinite(run.loss)]), **means}
            )  # fmt: skip
    cells = [cell.label for cell in study.cells]
    rows.sort(key=lambda row: (cells.index(row["cell"]), study.variants.index(row["variant"]), row["rho"]))
    more = f" {len(found)} measures in all, in the CSV." if len(an.shown(found)) < len(found) else ""
    unit = f" {style.INCREASES}" * (source == "retention")
    return Table(
        source, source.capitalize(), f"Mean over the seeds that were measured.{unit}{more}",
        [
            Column("variant", "method", number=False), Column("rho", "rho", rho), Column("seeds", "seeds"),
            Column("loss", "held-out loss, nats per token", decimals(4)),
            *(Column(measure, style.in_words(measure), significant) for measure in an.shown(found)),
        ],
        rows, "cell",
    )  # fmt: skip


def correlations(study: gr.Study, found: dict[str, dict[str, dict[str, float]]]) -> Table:
    rows = []
    for source, by_measure in found.items():
        for measure, values in by_measure.items():
            for cell in study.cells:
                value = an.correlation(cell, values)
                if value.n:
                    rows.append({"source": source, "measure": measure, "cell": cell.label, "correlation": value})
    return Table(
        "rank_correlation", "Rank correlation with held-out loss",
        "Spearman's, over the finished runs of one scale and budget, all methods, rho and seeds that were measured; "
        "positive: less of it goes with lower loss. 95 % percentile bootstrap over runs; none below 5 runs. Runs share "
        "seeds and methods, so they are less independent than the bootstrap takes them to be.",
        [
            Column("measure", "measure", style.in_words, number=False),
            Column("cell", "scale and budget", number=False),
            Column("correlation", "correlation (n runs)", interval(2)),
        ],
        rows, "source",
    )  # fmt: skip


def runs(study: gr.Study) -> Table:
    rows = [
        {"run": run.result.name, "status": run.result.status, "why": run.result.why, "scale": run.scale,
         "budget": run.budget, "variant": run.variant, "rho": run.rho, "seed": run.seed,
         "parameters": run.result.parameters, "tokens": run.result.tokens, "flops": run.result.flops,
         "seconds": run.result.seconds, "goodput": run.result.goodput, "loss": run.result.loss,
         "bits_per_byte": run.result.bits_per_byte}
        for run in study.runs
    ]  # fmt: skip
    return Table(
        "runs", "All runs",
        "Failed, diverged and missing runs are listed too; seconds are those of training, goodput is their share of "
        "the wall-clock of all starts: the rest went into compiling, evaluations, checkpoints and steps done again.",
        [
            Column("run", "run", number=False), Column("status", "status", number=False),
            Column("why", "why", number=False), Column("rho", "rho", rho), Column("seed", "seed"),
            Column("tokens", "tokens", style.si), Column("flops", "FLOPs", style.si),
            Column("seconds", "seconds", decimals(0)), Column("goodput", "goodput", decimals(2)),
            Column("loss", "loss, nats per token", decimals(4)),
        ],
        rows,
    )  # fmt: skip


def _foretold(told: an.Foretold | None) -> str:
    if told is None:
        return "—"
    verdict = "within a step of the grid" if told.hit else "more than a step of the grid off"
    return f"{told.scale}: {rho(told.rho)} foretold, {rho(told.best)} best, {verdict}"


def _rho_interval(found: Interval) -> str:
    low = rho(found.low) if found.low else "below grid"
    high = rho(found.high) if math.isfinite(found.high) else "above grid"
    bounds = "no interval" if math.isnan(found.low) else f"[{low}, {high}]"
    return f"{rho(found.value)} (n {found.n})\n{bounds}"


def _chosen(value: tuple[float, str]) -> str:
    return "—" if value[0] == 0 and not value[1] else rho(value[0]) + (f"\n{value[1]}" if value[1] else "")


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _mean_best(variant: gr.Variant) -> float:
    return _mean([run.loss for run in variant.best().values() if math.isfinite(run.loss)])
