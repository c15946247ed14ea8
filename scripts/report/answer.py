"""What a reader wants first: does it help, at equal tokens and at equal compute, in loss, in what is kept; how sure.

Every entry at its best setting beside AdamW at its own, by paired seeds: a figure, three sentences, a line an entry.
"""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd

from steppe.lm import plot
from steppe.scripts import style
from steppe.scripts.report import drawing as dr
from steppe.scripts.report import tables
from steppe.scripts.report.numbers import beside as bs
from steppe.scripts.report.numbers import entries as en
from steppe.scripts.report.numbers import statistics as st

MOST = 3  # entries that a sentence names
TALL = 28  # rows of a drawing
LABEL = 36  # letters of a name in a line


# ---------------------------------------------------------------------------------------------------------------- words
def signed(way) -> str:
    """+0.0030 [-0.0360, +0.0420], with a true minus sign; without bounds where there are none."""
    bounds = f" [{way.low:+.4f}, {way.high:+.4f}]" if math.isfinite(way.low) else " (one pair)"
    return f"{way.value:+.4f}{bounds}".replace("-", "−")


def sentences(made: bs.Answer) -> list[str]:
    """Three: loss, what is kept, how sure. They speak of the scale and budget with most pairs, and count the others."""
    if made.rows.empty:
        return []
    said = {aspect: _of_aspect(aspect, made) for aspect in made.aspects}
    kept = [text for key, text in said.items() if key != "loss"]
    kept = kept or ["What the models forget under fine-tuning and lose in 4 bits was not measured."]
    return [said["loss"], " ".join(kept), _sureness(made)]


def _of_aspect(aspect: str, made: bs.Answer) -> str:
    known = {basis: made.known(aspect, basis) for basis in en.BASES}
    groups = made.rows["group"].unique()
    pairs = pd.concat(known.values()).groupby("group")["n"].sum().reindex(groups, fill_value=0)
    first = pairs.idxmax()
    clauses, counted = [], []
    for basis, words in en.BASES.items():
        of_first = known[basis]["group"] == first
        clauses.append(_clause(words, known[basis][of_first], basis))
        if count := _counted(known[basis][~of_first]):
            counted.append(f"{words} {count}")
    where = f" ({first})" if len(groups) > 1 else ""
    said = f"{bs.ASPECTS[aspect].clause}{where}, {'; '.join(clauses)}."
    return f"{said} Elsewhere {'; '.join(counted)}." if counted else said


def _counted(known: pd.DataFrame) -> str:
    """How many methods are better, how many worse, of those with an interval."""
    signs = known.loc[~known["adamw"].astype(bool) & st.finite(known["high"]), "sign"]
    return f"{(signs < 0).sum()} of {len(signs)} better, {(signs > 0).sum()} worse" if len(signs) else ""


def _clause(words: str, known: pd.DataFrame, basis: str) -> str:
    def named(ways: pd.DataFrame) -> str:
        return ", ".join(f"{way.name} {signed(way)}" for way in ways.itertuples(index=False))

    of_adamw = known["adamw"].astype(bool)
    own = known[of_adamw & ~known["aside"].astype(bool) & (known["sign"] < 0)]
    gained = f"; of AdamW's own runs these are ({named(own)})" if len(own) and basis == "tokens" else ""
    known = known[~of_adamw].sort_values("value", kind="stable")
    if known.empty:
        return f"{words} no method stands beside AdamW" + gained
    sure = known[st.finite(known["high"])]
    if sure.empty:
        return f"{words} there is one pair of seeds of each, and no interval: the lowest is {named(known[:1])}"
    alone = len(known) - len(sure)
    gained = f" ({alone} more have one pair)" * bool(alone) + gained
    better, worse = sure[sure["sign"] < 0], (sure["sign"] > 0).sum()
    if better.empty:
        return (
            f"{words} none of {len(sure)} is better than AdamW by an interval without zero, {worse} are worse; the "
            f"best is {named(sure[:1])}{gained}"
        )
    listed = named(better[:MOST]) + (", …" if len(better) > MOST else "")
    return (
        f"{words} {len(better)} of {len(sure)} are better than AdamW by an interval without zero ({listed}), "
        f"{worse} worse, {len(sure) - len(better) - worse} cannot be told{gained}"
    )


def _sureness(made: bs.Answer) -> str:
    ways, fresh = made.ways, made.ways["fresh"].sum()
    known = made.known("loss", "tokens")
    halves = ((known["high"] - known["low"]) / 2).dropna()
    pairs = "–".join(f"{count}" for count in dict.fromkeys((ways["n"].min(), ways["n"].max())))
    said = f"Each difference is of {'one pair' if pairs == '1' else f'{pairs} pairs'} of seeds, "
    said += {len(ways): "all of which", 0: "none of which"}.get(fresh, f"in {fresh} of {len(ways)} of which all")
    said += " had no part in choosing rho or rate" if fresh else " was kept from choosing rho or rate, which flatters"
    if len(halves):
        said += (
            f"; in the loss at equal tokens such pairs can show a difference of {halves.min():.4f} to "
            f"{halves.max():.4f} nats (the half-widths, {halves.median():.4f} in the middle)"
        )
    if counted := st.finite(ways["high"]).sum():
        said += (
            f"; of {counted} intervals {0.05 * counted:.1f} would exclude zero by chance alone, several at once, since "
            "all of a group are against the same AdamW runs"
        )
    return said + "."


def lines(made: bs.Answer) -> list[str]:
    """A line an entry: its best setting and what to try next, its differences, and on what they rest."""
    said = []
    for row in made.rows.itertuples():
        entry, own = row.entry, made.ways[made.ways["row"] == row.Index]
        where = f" ({row.group})" if made.rows["group"].nunique() > 1 else ""
        parts = [part for part in (_setting(entry, "rho", "rho"), _setting(entry, "rate", "peak rate")) if part]
        for aspect, ways in own.groupby("measure", sort=False):
            title = bs.ASPECTS[aspect].title
            if len(ways) == 2 and row.tokens is row.flops:  # one pass a step: the same AdamW
                parts.append(f"{title} {signed(next(ways.itertuples()))} at equal tokens and FLOPs")
            else:
                each = ", ".join(f"{signed(way)} {en.BASES[way.basis]}" for way in ways.itertuples())
                parts.append(f"{title} {each}")
        way = own.iloc[0]
        parts.append(f"{way['n']} {'fresh ' if way['fresh'] else ''}pair{'s' if way['n'] > 1 else ''}")
        said.append(f"{row.name}{where}, {entry.cost:.2f} × a token: {'; '.join(parts)}.")
    return said


def _setting(entry: en.Entry, axis: str, called: str) -> str:
    best, tried = entry.chosen(axis), entry.tried(axis)
    if best is None:
        return ""
    edge = entry.edge(axis)
    way = {"lower": "downwards", "upper": "upwards"}.get(edge)
    of = f" of {len(tried)}" if len(tried) > 1 else ""
    return f"{called} {best:g}{of}" + (f" at the grid's {edge} edge: extend {way}" if edge else "")


# --------------------------------------------------------------------------------------------------------------- tables
def power(made: bs.Answer) -> tables.Table:
    nats = tables.decimals(4)
    return tables.Table(
        "power", "The smallest difference that pairs of seeds could show",
        "Standard deviation of the difference of one pair of seeds, pooled over the entries that have two pairs or "
        "more, and the true difference, in nats a token, whose 95 % interval would exclude zero with probability 0.8. "
        "What is smaller than this cannot be told with so many pairs, whichever way it comes out.",
        [
            tables.words("aspect", "in"), tables.words("basis", "held against AdamW"),
            tables.Column("sigma", "sd of a pair", nats), tables.Column("df", "degrees of freedom"),
            *(tables.Column(f"pairs_{pairs}", f"{pairs} pairs", nats) for pairs in bs.PAIRS),
        ],
        bs.power(made), "group",
    )  # fmt: skip


def beside(made: bs.Answer) -> tables.Table:
    """A row an entry and basis: its loss, and what was measured of its weights when disturbed, less AdamW's."""
    return _differences(
        "beside", "Beside AdamW at its best",
        "Loss, and where it was measured what fine-tuning costs and the loss of the weights as rounded or disturbed, "
        "less AdamW's at its best of the same seeds (an average's less the same average's), nats a token, with 95 % "
        "intervals: below zero is better. What a user of the rounded model gets, not what rounding takes from it. "
        f"Equal FLOPs: of AdamW's runs within {en.EQUAL_FLOPS:.0%}, which see more tokens. AdamW's own row has values.",
        made, bs.disturbances(made), ("loss", "forgetting"),
    )  # fmt: skip


def fine_tuning(made: bs.Answer) -> tables.Table:
    """A row an entry and basis: gained, lost and bent at each rate of fine-tuning, less AdamW's at that rate."""
    return _differences(
        "fine_tuning", "Fine-tuning at one rate",
        "What the second text gains and the first loses by the last step, nats a token, and the curvature of the "
        "first's loss before fine-tuning in the direction that this then takes: less AdamW's at the same rate, paired "
        "by seed, with 95 % intervals. A model that loses less at one rate may only have learned less: the first "
        "table compares at one loss on the second text. AdamW's own row has values.",
        made, bs.fine_tunings(made),
    )  # fmt: skip


def _differences(
    name: str, title: str, caption: str, made: bs.Answer, asked: Sequence[str], of_answer: Sequence[str] = ()
) -> tables.Table:
    frame = bs.table(made, asked, of_answer)
    titles = {key: aspect.title for key, aspect in bs.ASPECTS.items()}
    return tables.Table(
        name, title, caption,
        [
            tables.words("entry", "entry"), tables.words("basis", "held against AdamW"),
            tables.words("adamw", "which is"),
            tables.Column("cost", "FLOPs of a token, in AdamW's", tables.decimals(2)),
            *(
                tables.interval(key, style.in_words(key) if key in asked else titles[key], 3)
                for key in (*of_answer, *asked) if key in frame
            ),
        ],
        frame, "group",
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- figures
def figures(made: bs.Answer) -> list[dr.Drawing]:
    """A row an entry, a panel an aspect: seeds as dots, mean and interval before them, zero as a line.

    Scales that are too many for one drawing are in several, of which the first has most pairs. Of groups with more
    rows than a reader takes in, those on which less is known than on others are in drawings of their own, at the end.
    """
    parted = made.parted if len(made.rows) else []
    names = {"answer": [first for first, _ in parted], "answer_rest": [rest for _, rest in parted if rest]}
    return [
        _figure(made, made.only(part), f"{name}_{number}" if number > 1 else name)
        for name, groups in names.items()
        for number, part in enumerate(_packed(made, groups), 1)
    ]


def _packed(made: bs.Answer, groups: list[list[int]]) -> list[list[int]]:
    """The rows of each drawing: groups of a scale together, as many scales as it has room for; most pairs first."""
    parts: list[list[int]] = []
    for _, alike in itertools.groupby(groups, lambda rows: made.rows["entry"][rows[0]].scale):
        own = list(itertools.chain(*alike))
        if parts and len(parts[-1]) + len(own) <= TALL:
            parts[-1] += own
        else:
            parts.append(own)
    pairs = made.ways.groupby("row")["n"].sum() if parts else {}
    return sorted(parts, key=lambda rows: -sum(pairs[row] for row in rows))


def _figure(made: bs.Answer, part: bs.Answer, name: str) -> dr.Drawing:
    groups = [rows.iloc[::-1] for _, rows in part.rows.groupby("group", sort=False)]
    drawn = plot.figure(dr.WIDTH, 0.8 + sum(0.33 * len(rows) + 0.45 for rows in groups))
    panels = drawn.subplots(
        len(groups), len(made.aspects), squeeze=False, sharex="col", sharey="row", height_ratios=[*map(len, groups)]
    )
    for line, rows in enumerate(groups):
        height = dict(zip(rows.index, range(len(rows)), strict=True))
        for axes, aspect in zip(panels[line], made.aspects, strict=True):
            own = part.ways[(part.ways["measure"] == aspect) & part.ways["row"].isin(rows.index)]
            both = own.groupby("row")["against"].transform("nunique") > 1
            own = own.assign(at=own["row"].map(height) + 0.17 * both * (1 - 2 * (own["basis"] == "flops")))
            own = own[both | ~own.duplicated("row")]  # of one pass a step both are the same
            draw_rows(axes, own, len(rows), {"tokens": "D", "flops": "s"})
            for below, (rank, above) in enumerate(itertools.pairwise(rows["rank"])):
                if rank != above:
                    axes.axhline(below + 0.5, color=plot.GREY, linewidth=0.6)
            if line == 0:
                title = bs.ASPECTS[aspect].title.replace(", ", "\n").replace(" in ", "\nin ")
                axes.set_title(title, fontsize=9.5, loc="left")
            if line == len(groups) - 1:
                axes.set_xlabel("← better    worse →\nless AdamW's,\nnats a token", fontsize=9)
            axes.set_xlim(*_frame(part.ways[part.ways["measure"] == aspect]))
        labels = [label_of(row.name, row.entry) for row in rows.itertuples()]
        panels[line][0].set_yticks(range(len(rows)), labels, fontsize=9)
        if made.rows["group"].nunique() > 1:
            panels[line][0].set_ylabel(rows["group"].iloc[0].replace(", ", "\n"), fontsize=9)
    return dr.Drawing(
        name, "Beside AdamW at its best: left of zero is better",
        "Diamonds: at equal tokens (and FLOPs, where there is no square); squares: at equal FLOPs, AdamW having more "
        "tokens. Means with 95 % intervals over paired seeds, dots: seeds; blue: better by an interval without zero; "
        "red: worse; black: cannot be told; hollow: one pair. Intervals of two pairs may leave the frame. An average "
        "of a method's weights is held against the same average of AdamW's. Forgotten: where the second text reaches "
        "the lowest loss that an entry and AdamW both reach. Behind each name its cost in AdamW's FLOPs a token and "
        "its best rho; an arrow where that lies at the end of the grid. Lines part what perturbs nothing, what does "
        "at no further pass, and the rest. Averages of one pair are drawn only where there is nothing else; of a long "
        "group what is known in fewer aspects than other rows has a figure of its own.",
        f"Differences to AdamW of {len(part.rows)} entries in {len(made.aspects)} aspects. {' '.join(sentences(made))}",
        drawn, bs.shown(part),
    )  # fmt: skip


def _frame(ways: pd.DataFrame) -> tuple[float, float]:
    """From the lowest to the highest pair and interval; not intervals of two pairs, beside which nothing is seen."""
    sure = ways[ways["n"] > 2]
    shown = [0.0, *sure["low"], *sure["high"], *(value for pairs in ways["pairs"] for value in pairs.values())]
    low, high = min(shown), max(shown)
    aside = 0.08 * (high - low) or 0.1  # nothing was measured
    return low - aside, high + aside


def label_of(name: str, entry: en.Entry) -> str:
    """What stands beside an entry's row: name, cost, best rho and which way its grid ends there."""
    rho, arrow = entry.chosen("rho"), {"lower": " ↓", "upper": " ↑"}.get(entry.edge("rho"), "")
    if rho is None:
        return f"{textwrap.fill(name, LABEL)}   {entry.cost:.2f} ×"
    named = textwrap.fill(name.replace(f", rho {rho:g}", ""), LABEL)  # said once
    return f"{named}   {entry.cost:.2f} ×   ρ {rho:g}{arrow}"


def draw_rows(axes, ways: pd.DataFrame, count: int, markers: Mapping[str, str]) -> None:
    """Pale dots, a mark and the interval of each difference, at the height `at`; the marker is that of its basis."""
    for way in ways.itertuples():
        colour = {-1: plot.BLUE, 1: plot.VERMILION}.get(way.sign, plot.BLACK)
        axes.plot(list(way.pairs.values()), [way.at] * len(way.pairs), "o", color=plot.PALE, markersize=3)
        sure = math.isfinite(way.low) and math.isfinite(way.high)
        if sure:
            axes.plot([way.low, way.high], [way.at] * 2, color=colour, linewidth=1.8)
        marker = markers[way.basis]
        axes.plot([way.value], [way.at], marker, color=colour, markersize=5, fillstyle="full" if sure else "none")
    axes.axvline(0, color=plot.GREY, linewidth=1)
    axes.set_ylim(-0.7, count - 0.3)
    axes.xaxis.set_major_locator(dr.ticker().MaxNLocator(3))
    axes.grid(axis="y", visible=False)
