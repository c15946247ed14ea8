"""The first screen of a report: does it help, at equal tokens and at equal compute, in loss, in what is kept; how sure.

Three sentences, a figure of twelve rows, and further figures of the rest: every entry at its best setting less AdamW at
its own, by paired seeds.
"""

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd

from steppe.lm import plot
from steppe.scripts.report import drawing as dr
from steppe.scripts.report.numbers import differences as diff
from steppe.scripts.report.numbers import entries as en
from steppe.scripts.report.numbers import statistics as st

ROWS, TALL = 12, 30  # of the first drawing, and of another
LABEL = 32  # letters of a name in a line
NAME = 4  # words of a name in a sentence
UNMEASURED = "Fine-tuning and few bits were not measured: what the methods keep is not known."


def signed(way) -> str:
    """+0.0030 [-0.0360, +0.0420], with a true minus sign; without bounds where there are none."""
    bounds = f" [{way.low:+.4f}, {way.high:+.4f}]" if math.isfinite(way.low) else ""
    return f"{way.value:+.4f}{bounds}".replace("-", "−")


def sentences(made: diff.Answer) -> list[str]:
    """Three: loss, what is kept, how sure. They speak of the scale and budget with most pairs."""
    if made.rows.empty:
        return []
    counted = diff.counts(made)
    counted = counted[counted["group"] == made.first].set_index(["aspect", "basis"])
    return [_of_loss(made, counted), _of_kept(counted), _sureness(made)]


def _of(counted: pd.DataFrame, aspect: str, basis: str) -> str:
    """How many are better of those with an interval: "" of none."""
    found = counted.loc[(aspect, basis)] if (aspect, basis) in counted.index else None
    return f"{found['better']} of {found['known']}" if found is not None and found["known"] else ""


def _of_loss(made: diff.Answer, counted: pd.DataFrame) -> str:
    known = made.known("loss", "tokens")
    known = known[(known["group"] == made.first) & ~known["adamw"].astype(bool)]
    if known.empty:
        return "No method has a seed in common with AdamW on as many tokens."
    sure = known[st.finite(known["high"])]
    best = next((known if sure.empty else sure).nsmallest(1, "value").itertuples())
    words = best.name.split()
    name = " ".join(words[:NAME]) + "…" * (len(words) > NAME)
    if sure.empty:
        return (
            f"Loss: one pair of seeds each has no interval; the lowest at equal tokens is {name}, {signed(best)} nats."
        )
    flops = _of(counted, "loss", "flops")
    also = f", {flops} at equal FLOPs" if flops else ""
    return (
        f"Loss: {_of(counted, 'loss', 'tokens')} beat AdamW at equal tokens{also}; best is {name}, {signed(best)} nats."
    )


def _of_kept(counted: pd.DataFrame) -> str:
    measured = [aspect for aspect in diff.ASPECTS if aspect != "loss" and aspect in counted.index.get_level_values(0)]
    said = [f"{count} {diff.ASPECTS[key].clause}" for key in measured if (count := _of(counted, key, "tokens"))]
    if said:
        return f"Kept at equal tokens: {', '.join(said)}."
    return "Kept: one pair of seeds each has no interval." if measured else UNMEASURED


def _sureness(made: diff.Answer) -> str:
    ways, known = made.ways, made.known("loss", "tokens")
    halves, sure = ((known["high"] - known["low"]) / 2).dropna(), int(st.finite(ways["high"]).sum())
    pairs = "–".join(f"{count}" for count in dict.fromkeys((ways["n"].min(), ways["n"].max())))
    said = [f"Differences are of {'one pair' if pairs == '1' else f'{pairs} pairs'} of seeds"]
    said += [f"{ways['fresh'].sum()} of {len(ways)} by fresh seeds"]
    said += [f"they resolve {halves.median():.4f} nats"] if len(halves) else []
    said += [f"{0.05 * sure:.1f} of {sure} intervals exclude zero by chance"] if sure else []
    return "; ".join(said) + "."


# -------------------------------------------------------------------------------------------------------------- figures
def figures(made: diff.Answer) -> list[dr.Drawing]:
    """A row an entry, a panel an aspect: seeds as dots, mean and interval before them, zero as a line.

    The first has the best of the scale and budget with most pairs; what is known in fewer aspects comes after them.
    """
    if made.rows.empty:
        return []
    groups = {made.rows["group"][first[0]]: (first, rest) for first, rest in made.parted}
    loss = made.known("loss", "tokens")["value"].groupby(made.ways["row"]).first()
    every = [row for first, _ in groups.values() for row in first]
    leading = every if len(every) <= ROWS else groups[made.first][0]
    best = loss.reindex(leading).sort_values(kind="stable", na_position="last").index[:ROWS]
    parts = [[row for row in leading if row in best]]
    pairs = made.ways.groupby(made.ways["row"].map(made.rows["group"]))["n"].sum()
    order = pairs.sort_values(ascending=False, kind="stable").index
    rest = [row for group in order for part in groups[group] for row in part if row not in best]
    parts += [rest[begin : begin + TALL] for begin in range(0, len(rest), TALL)]
    names = ["answer", "answer_rest", *(f"answer_rest_{number}" for number in range(2, len(parts)))]
    return [_figure(made, rows, name) for rows, name in zip(parts, names, strict=False)]


def _figure(made: diff.Answer, rows: Sequence[int], name: str) -> dr.Drawing:
    part = diff.Answer(made.rows.loc[rows], made.ways[made.ways["row"].isin(rows)])
    several = made.rows["group"].nunique() > 1
    height, labels = {}, []
    for group, own in part.rows.iloc[::-1].groupby("group", sort=False):
        for row in own.itertuples():
            height[row.Index] = len(labels)
            labels.append(label_of(row.name, row.entry))
        labels += [f"{group}:"] * several
    across = min(dr.ACROSS, len(made.aspects))
    down = -(-len(made.aspects) // across)
    drawn = plot.figure(dr.WIDTH, 0.2 + down * (0.9 + 0.27 * len(labels)))
    panels = drawn.subplots(down, across, squeeze=False, sharey=True)
    for axes, aspect in itertools.zip_longest(panels.flat, made.aspects):
        axes.set_visible(aspect is not None)
        if aspect is None:
            continue
        own = part.ways[part.ways["measure"] == aspect]
        both = own.groupby("row")["against"].transform("nunique") > 1
        own = own.assign(at=own["row"].map(height) + 0.17 * both * (1 - 2 * (own["basis"] == "flops")))
        own = own[both | ~own.duplicated("row")]  # of one pass a step both are the same
        draw_rows(axes, own, len(labels), {"tokens": "D", "flops": "s"})
        axes.set_title(textwrap.fill(diff.ASPECTS[aspect].title, 26))
        axes.set_xlabel("nats a token\n← better      worse →")
        axes.set_xlim(*_frame(own))
    for axes in panels[:, 0]:
        axes.set_yticks(range(len(labels)), labels, fontsize=8, linespacing=0.9)
    shown = ", ".join(part.rows["name"][:ROWS])
    return dr.Drawing(
        name, "Less AdamW at its best" + ("" if name == "answer" else f": the others {name[12:]}").rstrip(),
        "Mean and 95 % interval over paired seeds (dots). Diamond: at equal tokens; square: at equal FLOPs. Blue: "
        "better, red: worse, hollow: one pair. Behind a name: cost in AdamW's, best ρ, arrow: its grid ends there.",
        f"Differences to AdamW in {', '.join(diff.ASPECTS[aspect].title for aspect in made.aspects)}, of {shown}.",
        drawn, diff.shown(part),
    )  # fmt: skip


def _frame(ways: pd.DataFrame) -> tuple[float, float]:
    """From the lowest to the highest pair and interval; not intervals of two pairs, which would dwarf the rest."""
    sure = ways[ways["n"] > 2]
    shown = [0.0, *sure["low"], *sure["high"], *(value for pairs in ways["pairs"] for value in pairs.values())]
    low, high = min(shown), max(shown)
    aside = 0.08 * (high - low) or 0.1  # nothing was measured
    return low - aside, high + aside


def label_of(name: str, entry: en.Entry) -> str:
    """How an entry's row is labelled: name, cost, best rho and which way its grid ends there."""
    rho, arrow = entry.chosen("rho"), diff.ARROW[entry.edge("rho")]
    named = name if rho is None else name.replace(f", rho {rho:g}", "")  # said once
    return f"{textwrap.fill(named, LABEL)}   {entry.cost:.2f} ×" + ("" if rho is None else f"   ρ {rho:g}{arrow}")


def draw_rows(axes, ways: pd.DataFrame, count: int, markers: Mapping[str, str]) -> None:
    """Pale dots, a mark and the interval of each difference, at the height `at`; the marker is that of its basis."""
    dots = [(value, way.at) for way in ways.itertuples() for value in way.pairs.values()]
    axes.plot(*zip(*dots, strict=True) if dots else ([], []), "o", color=plot.PALE, markersize=3)
    sure = st.finite(ways["low"]) & st.finite(ways["high"])
    for (sign, basis, known), own in ways.groupby([ways["sign"], ways["basis"], sure]):
        colour = {-1: plot.BLUE, 1: plot.VERMILION}.get(sign, plot.BLACK)
        if known:
            axes.hlines(own["at"], own["low"], own["high"], color=colour, linewidth=1.8)
        kept = {"linestyle": "none", "markersize": 5, "fillstyle": "full" if known else "none"}
        axes.plot(own["value"], own["at"], marker=markers[basis], color=colour, **kept)
    axes.axvline(0, color=plot.GREY, linewidth=1)
    axes.set_ylim(-0.7, count - 0.3)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="y", visible=False)
