"""The tables of a report: a frame, and how each of its columns is shown in the page."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from steppe.scripts import style
from steppe.scripts.report.numbers import analysis as an
from steppe.scripts.report.numbers import differences as diff
from steppe.scripts.report.numbers import entries as en

Row = Mapping[str, Any]


class Column(NamedTuple):
    """key of the frame, header with its unit, and how a value is shown: "" as text, a format of numbers, "si", "rho",
    "±4" an interval with KEY_low, KEY_high and KEY_n to four decimals, or a function of the row."""

    key: str
    header: str
    form: str | Callable[[Row], str] = ""

    def of(self, row: Row) -> str:
        """A cell as text."""
        value = row[self.key]
        if callable(self.form):
            return self.form(row)
        if self.form.startswith("±"):
            return interval(row, self.key, self.form[1:])
        if self.form == "rho":
            return rho(value)
        return number(value, self.form) if self.form else "" if pd.isna(value) else str(value)


class Table(NamedTuple):
    """name: stem of its CSV. caption: plain text. group: key whose equal values share a heading, or ""."""

    name: str
    title: str
    caption: str
    columns: Sequence[Column]
    frame: pd.DataFrame
    group: str = ""


def to_csv(frame: pd.DataFrame) -> str:
    """A frame as CSV; what is not known stays empty."""
    return frame.to_csv(index=False, lineterminator="\n")


# -------------------------------------------------------------------------------------------------------------- values
def number(value: float, form: str) -> str:
    """A number with a true minus sign; an em dash where it is not known."""
    if pd.isna(value):
        return "—"
    return "∞" if math.isinf(value) else (style.si(value) if form == "si" else format(value, form)).replace("-", "−")


def interval(row: Row, key: str, digits: str) -> str:
    """ "value (n 3)" and "[low, high]" below it; one value has no interval."""
    value, low, high = (row[each] for each in (key, f"{key}_low", f"{key}_high"))
    n = row[f"{key}_n" if f"{key}_n" in row else f"{key}_pairs"]
    if pd.isna(value) or not n > 0:
        return "—"
    shown = [number(each, f".{digits}f") for each in (value, low, high)]
    return f"{shown[0]} (n {n:g})\n" + (f"[{shown[1]}, {shown[2]}]" if math.isfinite(high) else "no interval")


def rho(value: float | None) -> str:
    """A radius, three digits; "default" where the method's own was used."""
    return "default" if value is None or math.isnan(value) else f"{value:.3g}"


def _best_rho(row: Row) -> str:
    return "—" if row["rho"] == 0 and not row["where"] else "\n".join(filter(None, [rho(row["rho"]), row["where"]]))


def _optimum(row: Row) -> str:
    low, high = row["optimum_low"], row["optimum_high"]
    bounds = f"[{rho(low) if low else 'below grid'}, {rho(high) if math.isfinite(high) else 'above grid'}]"
    return f"{rho(row['optimum'])} (n {row['optimum_n']})\n{'no interval' if math.isnan(low) else bounds}"


def _setting(axis: str) -> Callable[[Row], str]:
    return lambda row: "" if pd.isna(row[axis]) else f"{row[axis]:g}{diff.ARROW[row[f'{axis}_edge']]}"


# -------------------------------------------------------------------------------------------------------------- tables
_AGAINST = [
    ("entry", "entry"), ("basis", "compared with AdamW"), ("adamw", "which is"), ("cost", "FLOPs / AdamW", ".2f"),
]  # fmt: skip
# {name: (title, caption, columns, group)}
TABLES: dict[str, tuple[str, str, Sequence[tuple], str]] = {
    "answer": (
        "Every entry less AdamW at its best",
        "Nats a token, mean over n paired seeds with its 95 % interval: below zero is better. Best rho and rate "
        "tried; an arrow where the best ends its grid: extend it that way. A click on a heading sorts.",
        [("entry", "entry"),
         *((diff.column(key, basis), f"{aspect.title}, {compared}", "±4")
           for key, aspect in diff.ASPECTS.items() for basis, compared in en.BASES.items()),
         ("cost", "FLOPs / AdamW", ".2f"), ("rho", "best rho", _setting("rho")),
         ("rate", "peak rate", _setting("rate"))],
        "group",
    ),
    "counts": (
        "Better and worse than AdamW",
        "By a 95 % interval without zero, of the methods of which several pairs of seeds are known. After Holm: how "
        "many have p < 0.05 corrected for all tests of this table.",
        [("aspect", "in"), ("basis", "compared with AdamW"), ("known", "methods", ".0f"), ("better", "better", ".0f"),
         ("worse", "worse", ".0f"), ("survives", "after Holm", ".0f")],
        "group",
    ),
    "power": (
        "The smallest difference that pairs of seeds could show",
        "Standard deviation of one pair's difference, pooled over entries of two pairs or more, and the true "
        "difference in nats a token whose 95 % interval would exclude zero with probability 0.8.",
        [("aspect", "in"), ("basis", "compared with AdamW"), ("sigma", "sd of a pair", ".4f"),
         ("df", "degrees of freedom", ".0f"), *((f"pairs_{n}", f"{n} pairs", ".4f") for n in diff.PAIRS)],
        "group",
    ),
    "against_adamw": (
        "Loss, plain and disturbed, less AdamW's",
        "Nats a token, by seed, with 95 % intervals; an average less AdamW's average: what a user of the rounded model "
        f"gets. Equal FLOPs: AdamW within {en.EQUAL_FLOPS:.0%}, on more tokens. AdamW's own row has values.",
        _AGAINST, "group",
    ),
    "fine_tuning": (
        "Fine-tuning at one rate, less AdamW's",
        "What the second text gains, the first loses, and the first's curvature in the direction taken, nats a token. "
        "To lose less at one rate may be to learn less. AdamW's own row has values.",
        _AGAINST, "group",
    ),
    "comparison": (
        "Method by scale and budget",
        "Loss at the best rho and rate, mean over seeds. Difference to AdamW at equal tokens by fresh seeds, where two "
        "are, else all; pooled: with the noise of all methods. Flattery: at most, by choosing rho.",
        [("variant", "method"), ("rate", "peak rate", ".3g"), ("rho", "best rho", _best_rho), ("seeds", "seeds", ".0f"),
         ("loss", "loss, nats per token", ".4f"), ("against", "compared with"),
         ("difference", "difference (n pairs)", "±4"), ("fresh", "fresh seeds", lambda row: "yes" * row["fresh"]),
         ("difference_pooled", "difference, pooled noise (n pairs)", "±4"),
         ("selection", "flattery, nats", lambda row: number(row["selection"] or math.nan, ".4f")),
         ("flops_ratio", "FLOPs / AdamW", ".2f")],
        "cell",
    ),
    "cost": (
        "Cost of a token, AdamW = 1",
        "FLOPs as counted. Seconds of training as measured, whatever else the machine did: medians of the finished "
        "runs of a scale and budget over AdamW's, then median and range over scales and budgets.",
        [("variant", "method"), ("flops", "FLOPs / AdamW", ".2f"), ("seconds", "seconds / AdamW", ".2f"),
         ("lowest", "lowest", ".2f"), ("highest", "highest", ".2f"), ("cells", "scales and budgets", ".0f")],
        "",
    ),
    "best_rho": (
        "Best rho",
        "Optimum: minimum of a parabola in log rho about the grid's best, with Fieller's 95 % interval from n points; "
        "else the grid's best. Noise: sd of a loss around its seed's level.",
        [("budget", "budget"), ("scale", "scale"), ("parameters", "parameters", ",.0f"),
         ("grid_best", "best of the grid", "rho"), ("optimum", "optimum (n points)", _optimum), ("status", "where"),
         ("noise", "noise, nats", ".4f"), ("noise_df", "its df", ".0f"), ("noise_of", "noise from")],
        "variant",
    ),
    "power_law": (
        "Best rho = a N^b",
        "b over n scales with its 95 % interval, from their scatter about the line; scales without an optimum inside "
        "the grid are left out. Check: a law without the largest scale, compared with its best.",
        [("variant", "method"), ("budget", "budget"), ("factor", "a", ".3g"), ("exponent", "b (n scales)", "±2"),
         ("left_out", "scales left out", ".0f"), ("interval_from", "interval from"),
         ("check", "check at the largest scale")],
        "",
    ),
    "scaling_law": (
        "Constants of the scaling law",
        "Huber's loss on log loss; N non-embedding parameters, D tokens, nats per token. 95 % intervals of profile "
        "likelihood, if the form holds; the seeds of a size and length are one point.",
        [("variant", "method"), ("points", "points", ".0f"), ("E", "E", "±3"), ("A", "A", "±1"), ("B", "B", "±1"),
         ("a", "a", "±3"), ("b", "b", "±3"), ("rms", "rms of log loss", ".3g")],
        "",
    ),
    "rank_correlation": (
        "Rank correlation with held-out loss",
        "Spearman's, over the measured runs of one scale and budget; positive: less of it goes with lower loss. "
        "95 % percentile bootstrap over runs, from 8 on, as if they shared no seeds and methods.",
        [("measure", "measure", lambda row: style.in_words(row["measure"])), ("cell", "scale and budget"),
         ("correlation", "correlation (n runs)", "±2")],
        "source",
    ),
    "runs": (
        "All runs",
        "Failed, diverged and missing ones too. Seconds: of training; goodput: their share of the wall-clock of all "
        "starts.",
        [("run", "run"), ("status", "status"), ("why", "why"), ("rho", "rho", "rho"), ("seed", "seed", ".0f"),
         ("tokens", "tokens", "si"), ("flops", "FLOPs", "si"), ("seconds", "seconds", ".0f"),
         ("goodput", "goodput", ".2f"), ("loss", "loss, nats per token", ".4f")],
        "",
    ),
}  # fmt: skip


def of(name: str, frame: pd.DataFrame, measures: Sequence[tuple] = ()) -> Table:
    """A table of TABLES with those of its columns that the frame has, then further ones."""
    title, caption, columns, group = TABLES[name]
    shown = [Column(*column) for column in (*columns, *measures) if column[0] in frame]
    return Table(name, title, caption, shown, frame, group)


def against_adamw(made: diff.Answer) -> Table:
    """A row an entry and basis: its loss, and what was measured of its weights when disturbed, less AdamW's."""
    return _less_adamw("against_adamw", made, diff.disturbances(made), ("loss", "forgetting"))


def fine_tuning(made: diff.Answer) -> Table:
    """A row an entry and basis: gained, lost and bent at each rate of fine-tuning, less AdamW's at that rate."""
    return _less_adamw("fine_tuning", made, diff.fine_tunings(made))


def _less_adamw(name: str, made: diff.Answer, asked: Sequence[str], of_answer: Sequence[str] = ()) -> Table:
    measures = [(key, diff.ASPECTS[key].title, "±3") for key in of_answer]
    measures += [(key, style.in_words(key), "±3") for key in asked]
    return of(name, diff.table(made, asked, of_answer), measures)


def sharpness(source: str, measured: pd.DataFrame) -> Table:
    """Means over the seeds of a setting of what a source measured."""
    names = list(dict.fromkeys(measured["measure"]))
    shown = an.shown(names)
    more = f" {len(names)} measures in all, in the CSV." if len(shown) < len(names) else ""
    unit = f" {style.INCREASES}" * (source == "retention")
    heads = [("variant", "method"), ("rho", "rho", "rho"), ("seeds", "seeds", ".0f")]
    heads += [("loss", "held-out loss, nats per token", ".4f"), *((key, style.in_words(key), ".3g") for key in shown)]
    return Table(
        source, f"Measured: {source}", f"Mean over the seeds that were measured.{unit}{more}",
        [Column(*head) for head in heads], an.means(measured), "cell",
    )  # fmt: skip
