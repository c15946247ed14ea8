"""What a reader wants first: does it help, at equal tokens and at equal compute, in loss, in what is kept; how sure.

Every entry at its best setting beside AdamW at its own, by paired seeds: a figure, three sentences, a line an entry.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from steppe.lm import plot
from steppe.lm.measure import frontier
from steppe.scripts.report import drawing as dr
from steppe.scripts.report.numbers import entries as en
from steppe.scripts.results import Result

FOUR_BITS = "int4_channel"  # of steppe retention: a scale an output channel
MOST = 3  # entries that a sentence names


class Aspect(NamedTuple):
    """One way to compare: its column in the figure, and how a sentence begins. other: whom an entry is held against."""

    key: str
    title: str
    clause: str
    other: Callable[[en.Entry], en.Entry | None]
    of: Callable[[Result], float] = en.loss_of


class Row(NamedTuple):
    """An entry with its difference in each aspect that is known; group: the scale and budget it is shown under."""

    group: str
    name: str
    entry: en.Entry
    ways: dict[str, en.Difference]


class Answer(NamedTuple):
    """Rows by group, each group's best loss first, and the aspects in which some row differs from its reference."""

    rows: list[Row]
    aspects: list[Aspect]

    def known(self, key: str) -> list[tuple[Row, en.Difference]]:
        """The rows that have a difference in an aspect."""
        return [(row, row.ways[key]) for row in self.rows if key in row.ways]


def answer(runs: Sequence) -> Answer:
    """What the runs of a study (groups.Run) say; without AdamW beside anything, no rows."""
    found = en.entries(runs)
    rows: list[Row] = []
    used: dict[str, Aspect] = {}
    for cell in dict.fromkeys((entry.scale, entry.budget) for entry in found):
        inside = [entry for entry in found if (entry.scale, entry.budget) == cell]
        reference = next((entry for entry in inside if entry.plain), None)
        matched = [en.at_equal_compute(found, entry) for entry in inside]
        longer = {entry.label: entry for entry in matched if entry is not None and entry not in inside}
        if reference is None or len(inside) + len(longer) < 2:
            continue
        aspects = _aspects(found, inside, [*inside, *longer.values()])
        for entry in (*longer.values(), *inside):
            aside = entry not in inside
            ways = {
                aspect.key: way for aspect in aspects
                if not (aside and aspect.key == "compute")
                and (way := en.difference(entry, aspect.other(entry), aspect.of))
            }  # fmt: skip
            if ways:
                name = f"{entry.name}, {entry.budget}" if aside else entry.name
                rows.append(Row(", ".join(cell), name, entry, ways))
                used |= {aspect.key: aspect for aspect in aspects if aspect.key in ways and aspect.key not in used}
    order = [aspect.key for aspect in _aspects(found, [], [])]
    return Answer(rows, sorted(used.values(), key=lambda aspect: order.index(aspect.key)))


def _aspects(found: Sequence[en.Entry], inside: Sequence[en.Entry], shown: Sequence[en.Entry]) -> list[Aspect]:
    """Aspects of a scale and budget, whose own entries are `inside`; AdamW on more tokens is `shown` beside them."""
    tuned = [result.fine_tune for entry in shown for result in entry.best.values() if result.fine_tune]
    mark = frontier.equal_loss(tuned)

    def same(entry: en.Entry) -> en.Entry | None:
        beside = entry if entry in inside else entry._replace(budget=inside[0].budget)
        return en.at_equal_tokens(inside, beside)

    return [
        Aspect("tokens", "loss, equal tokens", "At equal tokens", same),
        Aspect("compute", "loss, equal FLOPs", "At equal FLOPs", lambda entry: en.at_equal_compute(found, entry)),
        Aspect("forgetting", f"forgotten, fine-tuned to {mark:.3f}", "In what fine-tuning to one loss costs", same,
               en.forgotten(mark)),
        Aspect("four_bits", "lost under 4 bits", "In what 4 bits cost", same, en.retained(FOUR_BITS)),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- words
def signed(way: en.Difference) -> str:
    """+0.0030 [-0.0360, +0.0420], with a true minus sign; without bounds where there are none."""
    value, low, high = way.interval[:3]
    bounds = f" [{low:+.4f}, {high:+.4f}]" if math.isfinite(low) else " (one pair)"
    return f"{value:+.4f}{bounds}".replace("-", "−")


def sentences(made: Answer) -> list[str]:
    """Three sentences: loss, what is kept, and how sure. Of several scales and budgets together."""
    if not made.rows:
        return []
    several = len({row.group for row in made.rows}) > 1
    clauses = {aspect.key: _clause(aspect, made.known(aspect.key), several) for aspect in made.aspects}
    loss = [clauses[key] for key in ("tokens", "compute") if key in clauses]
    kept = [clauses[key] for key in ("forgetting", "four_bits") if key in clauses]
    kept = kept or ["What the models forget under fine-tuning and lose under 4 bits was not measured"]
    return ["; ".join(parts) + "." for parts in (_as_one(loss), _as_one(kept))] + [_sureness(made)]


def _as_one(clauses: list[str]) -> list[str]:
    """Clauses of one sentence: those after the first begin small."""
    return [*clauses[:1], *(clause[0].lower() + clause[1:] for clause in clauses[1:])]


def _clause(aspect: Aspect, known: list[tuple[Row, en.Difference]], several: bool) -> str:
    own = [(row, way) for row, way in known if row.entry.adamw and row.name == row.entry.name and way.sign < 0]
    known = [(row, way) for row, way in known if not row.entry.adamw]
    if not known and not own:
        return f"{aspect.clause} nothing stands beside AdamW"

    def named(row: Row, way: en.Difference) -> str:
        return f"{row.name} {f'({row.group}) ' if several else ''}{signed(way)}"

    gained = f"; averaging AdamW's own weights is ({', '.join(named(*pair) for pair in own)})" if own else ""
    if not known:
        return f"{aspect.clause} there is no method beside AdamW{gained}"
    nearest = min(known, key=lambda pair: pair[1].interval.value)
    if not any(math.isfinite(way.interval.high) for _, way in known):
        return f"{aspect.clause} there is one pair of seeds of each, and no interval: the lowest is {named(*nearest)}"
    better, worse = ([(row, way) for row, way in known if way.sign == sign] for sign in (-1, 1))
    better.sort(key=lambda pair: pair[1].interval.value)

    if better:
        shown = ", ".join(named(*pair) for pair in better[:MOST]) + (", …" if len(better) > MOST else "")
        return (
            f"{aspect.clause} {len(better)} of {len(known)} are better than AdamW by an interval without zero "
            f"({shown}), {len(worse)} worse, {len(known) - len(better) - len(worse)} cannot be told{gained}"
        )
    return (
        f"{aspect.clause} none of {len(known)} is better than AdamW by an interval without zero, {len(worse)} are "
        f"worse; the best is {named(*nearest)}{gained}"
    )


def _sureness(made: Answer) -> str:
    ways = [way for row in made.rows for way in row.ways.values()]
    counts = sorted({way.interval.n for way in ways})
    fresh = sum(way.fresh for way in ways)
    halves = [(w.interval.high - w.interval.low) / 2 for _, w in made.known("tokens") if math.isfinite(w.interval.high)]
    pairs = "one pair" if counts == [1] else f"{'–'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} pairs"
    said = f"Each difference is of {pairs} of seeds, "
    said += {len(ways): "all of which", 0: "none of which"}.get(fresh, f"in {fresh} of {len(ways)} of which all")
    said += " had no part in choosing rho or rate" if fresh else " was kept from choosing rho or rate, which flatters"
    if halves:
        said += (
            f"; at equal tokens such pairs can show a difference of {min(halves):.4f} to {max(halves):.4f} nats "
            f"(the half-widths, {statistics.median(halves):.4f} in the middle)"
        )
    counted = sum(math.isfinite(way.interval.high) for way in ways)
    if counted:
        said += (
            f"; of {counted} intervals {0.05 * counted:.1f} would exclude zero by chance alone, several at once, since "
            "all of a group are against the same AdamW runs"
        )
    return said + "."


def lines(made: Answer) -> list[str]:
    """A line an entry: its best setting and what to try next, its differences, and on what they rest."""
    said, several = [], len({row.group for row in made.rows}) > 1
    for row in made.rows:
        entry = row.entry
        head = f"{row.name}{f' ({row.group})' if several else ''}, {entry.cost:.2f} × a token:"
        parts = [part for part in (_setting(entry, "rho", "rho"), _setting(entry, "rate", "peak rate")) if part]
        alike = row.ways.get("compute") == row.ways.get("tokens")  # one pass a step: the same AdamW
        parts += [
            f"{'loss, equal tokens and FLOPs' if alike and aspect.key == 'tokens' else aspect.title} "
            f"{signed(row.ways[aspect.key])}"
            for aspect in made.aspects if aspect.key in row.ways and not (alike and aspect.key == "compute")
        ]  # fmt: skip
        way = next(iter(row.ways.values()))
        parts.append(f"{way.interval.n} {'fresh ' if way.fresh else ''}pair{'s' if way.interval.n > 1 else ''}")
        said.append(f"{head} {'; '.join(parts)}.")
    return said


def _setting(entry: en.Entry, axis: str, called: str) -> str:
    best, tried = entry.chosen(axis), entry.tried(axis)
    if best is None:
        return ""
    edge = entry.edge(axis)
    way = {"lower": "downwards", "upper": "upwards"}.get(edge)
    of = f" of {len(tried)}" if len(tried) > 1 else ""
    return f"{called} {best:g}{of}" + (f" at the grid's {edge} edge: extend {way}" if edge else "")


# --------------------------------------------------------------------------------------------------------------- figure
def figure(made: Answer) -> dr.Drawing | None:
    """A row an entry, a panel an aspect: seeds as dots, mean and interval before them, zero as a line."""
    if not made.rows:
        return None
    groups = list(dict.fromkeys(row.group for row in made.rows))
    heights = [sum(row.group == group for row in made.rows) for group in groups]
    drawn = plot.figure(dr.WIDTH, 0.8 + sum(0.27 * height + 0.45 for height in heights))
    panels = drawn.subplots(
        len(groups), len(made.aspects), squeeze=False, sharex="col", sharey="row", height_ratios=heights
    )
    for line, group in enumerate(groups):
        own = [row for row in made.rows if row.group == group][::-1]
        for column, aspect in enumerate(made.aspects):
            axes = panels[line][column]
            axes.margins(x=0.08)
            draw_rows(axes, [row.ways.get(aspect.key) for row in own])
            if line == 0:
                axes.set_title(aspect.title, fontsize=10, loc="left")
            if line == len(groups) - 1:
                axes.set_xlabel("less AdamW's, nats a token", fontsize=9)
        panels[line][0].set_yticks(range(len(own)), [label_of(row.name, row.entry) for row in own], fontsize=9)
        if len(groups) > 1:
            panels[line][0].set_ylabel(group.replace(", ", "\n"), fontsize=9)
    return dr.Drawing(
        "answer", "Beside AdamW at its best: left of zero is better",
        "Diamonds: means with 95 % intervals over paired seeds; blue: better by an interval without zero; red: worse; "
        "black: cannot be told; hollow: one pair. Dots: seeds. An average of a method's weights is held against the "
        "same average of AdamW's. Behind each name its cost in AdamW's FLOPs a token and its best rho; an arrow where "
        "that lies at the end of the grid.",
        f"Differences to AdamW of {len(made.rows)} entries in {len(made.aspects)} aspects. {' '.join(sentences(made))}",
        drawn, [_as_row(row) for row in made.rows],
    )  # fmt: skip


def label_of(name: str, entry: en.Entry) -> str:
    """What stands beside an entry's row: name, cost, best rho and which way its grid ends there."""
    rho, arrow = entry.chosen("rho"), {"lower": " ↓", "upper": " ↑"}.get(entry.edge("rho"), "")
    return f"{name}   {entry.cost:.2f} ×" + (f"   ρ {rho:g}{arrow}" if rho is not None else "")


def draw_rows(axes, ways: Sequence[en.Difference | None]) -> None:
    """A line a difference, from below: pale dots, a diamond, the interval."""
    for line, way in enumerate(ways):
        if way is None:
            continue
        value, low, high = way.interval[:3]
        colour = {-1: plot.BLUE, 1: plot.VERMILION}.get(way.sign, plot.BLACK)
        axes.plot(list(way.pairs.values()), [line] * len(way.pairs), "o", color=plot.PALE, markersize=3.5)
        sure = math.isfinite(low) and math.isfinite(high)
        if sure:
            axes.plot([low, high], [line, line], color=colour, linewidth=2)
        axes.plot([value], [line], "D", color=colour, markersize=5.5, fillstyle="full" if sure else "none")
    axes.axvline(0, color=plot.GREY, linewidth=1)
    axes.set_ylim(-0.7, len(ways) - 0.3)
    axes.xaxis.set_major_locator(dr.ticker().MaxNLocator(4))
    axes.grid(axis="y", visible=False)


def _as_row(row: Row) -> dict:
    found = {"group": row.group, "entry": row.name, "cost": row.entry.cost, "rho": row.entry.chosen("rho"),
             "rate": row.entry.chosen("rate"), "rho_edge": row.entry.edge("rho"), "rate_edge": row.entry.edge("rate"),
             "loss": row.entry.loss, "seeds": len(row.entry.best)}  # fmt: skip
    for key, way in row.ways.items():
        found |= {key: way.interval.value, f"{key}_low": way.interval.low, f"{key}_high": way.interval.high,
                  f"{key}_pairs": way.interval.n, f"{key}_fresh": way.fresh}  # fmt: skip
    return found
