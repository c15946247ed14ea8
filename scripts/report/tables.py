"""The tables of a report: a frame, and how each of its columns is shown in the page."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from steppe.scripts import style
from steppe.scripts.report.numbers import analysis as an
from steppe.scripts.report.numbers import entries as en


class Column(NamedTuple):
    """key of the frame, header with its unit, how a value is shown; numbers stand to the right.

    also: keys whose values are shown with it.
    """

    key: str
    header: str
    show: Callable[..., str] = str
    number: bool = True
    also: Sequence[str] = ()

    def of(self, row: dict[str, Any]) -> str:
        """A cell as text."""
        return self.show(*(row[key] for key in (self.key, *self.also)))


class Table(NamedTuple):
    """name: stem of its CSV. caption: plain text. group: key whose equal values share a heading, or ""."""

    name: str
    title: str
    caption: str
    columns: list[Column]
    frame: pd.DataFrame
    group: str = ""


def to_csv(frame: pd.DataFrame) -> str:
    """A frame as CSV; what is not known stays empty."""
    return frame.to_csv(index=False, lineterminator="\n")


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


def interval(key: str, header: str, digits: int = 4, count: str = "n") -> Column:
    """Shows "value (n 3)" and "[low, high]" below it; one value says that it has no interval."""
    shown = decimals(digits)

    def show(value: float, low: float, high: float, n: float) -> str:
        if not n > 0 or math.isnan(value):
            return "—"
        bounds = f"[{shown(low)}, {shown(high)}]" if math.isfinite(high) else "no interval"
        return shown(value) + (f" ({count} {n:g})" if count else "") + f"\n{bounds}"

    return Column(key, header, show, also=_bounds(key))


def _bounds(key: str) -> list[str]:
    return [f"{key}_{end}" for end in ("low", "high", "n")]


def rho(value: float) -> str:
    """A radius, three digits; "default" where the method's own was used."""
    return "default" if math.isnan(value) else f"{value:.3g}"


def words(key: str, header: str, show: Callable[[Any], str] = str) -> Column:
    """A column of text."""
    return Column(key, header, show, number=False)


# -------------------------------------------------------------------------------------------------------------- tables
def comparison(found: pd.DataFrame) -> Table:
    return Table(
        "comparison", "Method by scale and budget",
        "Loss: held-out, nats per token, mean over the seeds at the best rho and peak rate. Difference: loss minus "
        "that of AdamW at its best on as many tokens (an average's minus the same average's), paired by seed, negative "
        "is better; where a method has fewer seeds than AdamW, compare them, not the losses. It is over fresh seeds, "
        "which took no part in choosing a setting, where there are two, else over all. Pooled: the same difference "
        "with the noise shared by all methods of the group, which assumes that it is alike. Brackets: 95 % Student "
        "intervals; one pair has none. Flattery: upper bound of what choosing rho on its seeds lowers that loss by.",
        [
            words("variant", "method"), Column("rate", "peak rate", significant),
            Column("rho", "best rho", _chosen, also=["where"]), Column("seeds", "seeds"),
            Column("loss", "loss, nats per token", decimals(4)), words("against", "held against"),
            interval("difference", "difference (n pairs)"),
            words("fresh", "fresh seeds", lambda value: {True: "yes"}.get(value, "")),
            interval("difference_pooled", "difference, pooled noise (n pairs)"),
            Column("selection", "flattery, nats", lambda value: decimals(4)(value or math.nan)),
            Column("flops_ratio", "FLOPs / AdamW", decimals(2)),
        ],
        found, "cell",
    )  # fmt: skip


def costs(compared: pd.DataFrame, names: Sequence[str]) -> Table:
    return Table(
        "cost", "Cost of a token, AdamW = 1",
        "FLOPs as counted; seconds of training as measured: median of the finished runs of a scale and budget over "
        "AdamW's median there, whatever else the machine did; then median, lowest and highest over scales and budgets.",
        [
            words("variant", "method"), Column("flops", "FLOPs / AdamW", decimals(2)),
            Column("seconds", "seconds / AdamW", decimals(2)), Column("lowest", "lowest", decimals(2)),
            Column("highest", "highest", decimals(2)), Column("cells", "scales and budgets"),
        ],
        an.costs(compared, names),
    )  # fmt: skip


def optima(found: pd.DataFrame, names: Sequence[str]) -> Table:
    if len(found):
        found = found.assign(variant=an.in_order(found["variant"], names)).drop_duplicates(
            ["variant", "scale", "budget"]
        )
        found = found.sort_values(["variant", "parameters", "scale", "budget"])
    return Table(
        "best_rho", "Best rho",
        "Optimum: minimum of a parabola in log rho through the best rho of the grid and its neighbours (and all within "
        "a factor of 4), with Fieller's 95 % interval, cut off where the grid ends; n points. Where the grid does not "
        "bracket it, the best of the grid stands there, without an interval, and is left out of the power law. Noise: "
        "standard deviation of one loss beside its seed's own level, nats, which needs several seeds, and its df.",
        [
            words("budget", "budget"), words("scale", "scale"), Column("parameters", "parameters", "{:,}".format),
            Column("grid_best", "best of the grid", rho),
            Column("optimum", "optimum (n points)", _rho_interval, also=_bounds("optimum")), words("status", "where"),
            Column("noise", "noise, nats", decimals(4)), Column("noise_df", "its df"), words("noise_of", "noise from"),
        ],
        found.drop(columns=[*an.OF_FIT, "family"], errors="ignore"), "variant",
    )  # fmt: skip


def power_laws(found: pd.DataFrame) -> Table:
    return Table(
        "power_law", "Best rho = a N^b",
        "b with its 95 % interval, which takes three scales: it rests on their scatter about the line. N non-embedding "
        "parameters. n scales whose optimum lies inside the grid; scales "
        "without one are left out, which biases b if they are at one end. Check: a law fitted without the largest "
        "scale, beside the best of the grid there.",
        [
            words("variant", "method"), words("budget", "budget"), Column("factor", "a", significant),
            interval("exponent", "b (n scales)", 2), Column("left_out", "scales left out"),
            words("interval_from", "interval from"), words("check", "check at the largest scale"),
        ],
        found,
    )  # fmt: skip


def scaling_laws(found: pd.DataFrame) -> Table:
    digits = {"E": 3, "A": 1, "B": 1, "a": 3, "b": 3}
    return Table(
        "scaling_law", "L(N, D) = E + A/N^a + B/D^b",
        "Huber loss on log loss, several starts; runs at the best rho; N non-embedding parameters, D tokens, losses in "
        "nats per token. 95 % intervals of profile likelihood, if the form holds; the seeds of a size and length "
        "are one point.",
        [
            words("variant", "method"), Column("points", "points"),
            *(interval(key, key, count, "") for key, count in digits.items()),
            Column("rms", "rms of log loss", significant),
        ],
        found,
    )  # fmt: skip


def sharpness(source: str, measured: pd.DataFrame) -> Table:
    names = list(dict.fromkeys(measured["measure"]))
    shown = an.shown(names)
    more = f" {len(names)} measures in all, in the CSV." if len(shown) < len(names) else ""
    unit = f" {style.INCREASES}" * (source == "retention")
    return Table(
        source, source.capitalize(), f"Mean over the seeds that were measured.{unit}{more}",
        [
            words("variant", "method"), Column("rho", "rho", rho), Column("seeds", "seeds"),
            Column("loss", "held-out loss, nats per token", decimals(4)),
            *(Column(measure, style.in_words(measure), significant) for measure in shown),
        ],
        an.means(measured), "cell",
    )  # fmt: skip


def correlations(measured: pd.DataFrame) -> Table:
    return Table(
        "rank_correlation", "Rank correlation with held-out loss",
        "Spearman's, over the finished runs of one scale and budget, all methods, rho and seeds that were measured; "
        "positive: less of it goes with lower loss. 95 % percentile bootstrap over runs; none below 8 runs. Runs share "
        "seeds and methods, so they are less independent than the bootstrap takes them to be.",
        [
            words("measure", "measure", style.in_words), words("cell", "scale and budget"),
            interval("correlation", "correlation (n runs)", 2),
        ],
        an.correlations(measured), "source",
    )  # fmt: skip


def runs(study: en.Study) -> Table:
    keys = [
        "run",
        "status",
        "why",
        "scale",
        "budget",
        "variant",
        "rate",
        "rho",
        "seed",
        "parameters",
        "tokens",
        "flops",
    ]
    return Table(
        "runs", "All runs",
        "Failed, diverged and missing runs are listed too; seconds are those of training, goodput is their share of "
        "the wall-clock of all starts: the rest went into compiling, evaluations, checkpoints and steps done again.",
        [
            words("run", "run"), words("status", "status"), words("why", "why"), Column("rho", "rho", rho),
            Column("seed", "seed"), Column("tokens", "tokens", style.si), Column("flops", "FLOPs", style.si),
            Column("seconds", "seconds", decimals(0)), Column("goodput", "goodput", decimals(2)),
            Column("loss", "loss, nats per token", decimals(4)),
        ],
        study.runs[[*keys, "seconds", "goodput", "loss", "bits_per_byte"]].replace({"loss": {math.inf: math.nan}}),
    )  # fmt: skip


def _rho_interval(value: float, low: float, high: float, n: int) -> str:
    bounds = f"[{rho(low) if low else 'below grid'}, {rho(high) if math.isfinite(high) else 'above grid'}]"
    return f"{rho(value)} (n {n})\n{'no interval' if math.isnan(low) else bounds}"


def _chosen(value: float, where: str) -> str:
    return "—" if value == 0 and not where else rho(value) + (f"\n{where}" if where else "")
