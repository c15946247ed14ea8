"""What a reader wants first: does it help, at equal tokens and at equal compute, in loss, in what is kept; how sure.

Every entry at its best setting beside AdamW at its own, by paired seeds: a figure, three sentences, a line an entry.
"""

import collections
import itertools
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from steppe.lm import plot
from steppe.lm.measure import frontier
from steppe.scripts import style
from steppe.scripts.report import drawing as dr
from steppe.scripts.report import tables
from steppe.scripts.report.numbers import analysis as an
from steppe.scripts.report.numbers import entries as en
from steppe.scripts.report.numbers import statistics as st
from steppe.scripts.results import Result

BITS = (4, 3)  # of steppe retention, to the nearest, a scale an output channel
MOST = 3  # entries that a sentence names


class Aspect(NamedTuple):
    """A number of a run in which entries are compared; title: over its panel; clause: how a sentence begins."""

    key: str
    title: str
    clause: str
    of: Callable[[Result], float]


ITSELF = "AdamW itself"  # a value, no difference
FREE = 1.05  # FLOPs of a token, in AdamW's, up to which a method costs no further pass
BASES = {"tokens": "at equal tokens", "flops": "at equal FLOPs"}  # whom an entry is held against


class Row(NamedTuple):
    """An entry with what is known of its differences; group: the scale and budget it is shown under.

    others: {key of BASES: whom it is held against}; ways: {(key of an aspect, key of BASES): difference}.
    """

    group: str
    name: str
    entry: en.Entry
    others: dict[str, en.Entry | None]
    ways: dict[tuple[str, str], en.Difference]

    @property
    def rank(self) -> int:
        """Where it stands in its group: what perturbs nothing, what does so at no further pass, the rest."""
        return self.entry.perturbs + (self.entry.perturbs and self.entry.cost > FREE)


class Answer(NamedTuple):
    """Rows by group, in each by rank and loss, and the aspects in which some row differs from its reference."""

    rows: list[Row]
    aspects: list[Aspect]

    def known(self, aspect: str, basis: str) -> list[tuple[Row, en.Difference]]:
        """The rows that have a difference in an aspect on a basis."""
        return [(row, row.ways[aspect, basis]) for row in self.rows if (aspect, basis) in row.ways]

    @property
    def parted(self) -> list[tuple[list[Row], list[Row]]]:
        """Group by group, the rows that are drawn first, and the rest."""
        return [parted(list(own)) for _, own in itertools.groupby(self.rows, lambda row: row.group)]


def answer(found: Sequence[en.Entry]) -> Answer:
    """What the entries of a study say; without AdamW beside anything, no rows."""
    rows: list[Row] = []
    titled: dict[str, Aspect] = {}
    cells = dict.fromkeys(((entry.scale, entry.budget) for entry in found), False)
    cells |= {(entry.scale, entry.budget): True for entry in found if not entry.adamw}
    # where AdamW is alone it is only what stands beside methods elsewhere, if there are any
    for cell in [cell for cell, methods in cells.items() if methods] or cells:
        inside = [entry for entry in found if (entry.scale, entry.budget) == cell]
        matched = [en.at_equal_compute(found, entry) for entry in inside]
        longer = {entry.label: entry for entry in matched if entry is not None and entry not in inside}
        if not any(entry.plain for entry in inside) or len(inside) + len(longer) < 2:
            continue
        for entry in (*longer.values(), *inside):
            aside = entry not in inside
            beside = entry._replace(budget=cell[1])  # AdamW on more tokens too is held against AdamW of this budget
            others = {"tokens": en.at_equal_tokens(inside, beside)}
            others |= {} if aside else {"flops": en.at_equal_compute(found, entry)}
            ways = {}
            for aspect in aspects([entry, *filter(None, others.values())]):
                for basis, other in others.items():
                    if way := en.difference(entry, other, aspect.of):
                        ways[aspect.key, basis] = way
                        titled.setdefault(aspect.key, aspect)
            if ways:
                name = f"{entry.name}, {entry.budget}" if aside else entry.name
                rows.append(Row(", ".join(cell), name, entry, others, ways))
    groups = list(dict.fromkeys(row.group for row in rows))
    rows.sort(key=lambda row: (groups.index(row.group), row.rank))
    return Answer(rows, [titled[aspect.key] for aspect in aspects([]) if aspect.key in titled])


def aspects(shown: Sequence[en.Entry]) -> list[Aspect]:
    """The aspects of entries that are compared: what is forgotten depends on the loss that all of them reach."""
    tuned = [result.fine_tune for entry in shown for result in entry.best.values() if result.fine_tune]
    mark = frontier.equal_loss(tuned)
    return [
        Aspect("loss", "held-out loss", "In held-out loss", en.loss_of),
        Aspect("forgetting", "forgotten, at equal fine-tuning loss", "In what fine-tuning costs", en.forgotten(mark)),
        *(
            Aspect(f"int{bits}", f"held-out loss in {bits} bits", f"In the loss in {bits} bits",
                   en.rounded_loss(f"int{bits}_channel"))
            for bits in BITS
        ),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- words
def signed(way: en.Difference) -> str:
    """+0.0030 [-0.0360, +0.0420], with a true minus sign; without bounds where there are none."""
    value, low, high = way.interval[:3]
    bounds = f" [{low:+.4f}, {high:+.4f}]" if math.isfinite(low) else " (one pair)"
    return f"{value:+.4f}{bounds}".replace("-", "−")


def sentences(made: Answer) -> list[str]:
    """Three: loss, what is kept, how sure. They speak of the scale and budget with most pairs, and count the others."""
    if not made.rows:
        return []
    said = {aspect.key: _of_aspect(aspect, made) for aspect in made.aspects}
    kept = [text for key, text in said.items() if key != "loss"]
    kept = kept or ["What the models forget under fine-tuning and lose in 4 bits was not measured."]
    return [said["loss"], " ".join(kept), _sureness(made)]


def _of_aspect(aspect: Aspect, made: Answer) -> str:
    pairs = collections.Counter({row.group: 0 for row in made.rows})
    for basis in BASES:
        for row, way in made.known(aspect.key, basis):
            pairs[row.group] += way.interval.n
    first = max(pairs, key=pairs.get)
    clauses, counted = [], []
    for basis, words in BASES.items():
        of_first, others = [], []
        for row, way in made.known(aspect.key, basis):
            (of_first if row.group == first else others).append((row, way))
        clauses.append(_clause(words, of_first, basis))
        if count := _counted(others):
            counted.append(f"{words} {count}")
    where = f" ({first})" if len(pairs) > 1 else ""
    said = f"{aspect.clause}{where}, {'; '.join(filter(None, clauses))}."
    return f"{said} Elsewhere {'; '.join(counted)}." if counted else said


def _counted(known: list[tuple[Row, en.Difference]]) -> str:
    """How many methods are better, how many worse, of those with an interval."""
    signs = [way.sign for row, way in known if not row.entry.adamw and math.isfinite(way.interval.high)]
    return f"{signs.count(-1)} of {len(signs)} better, {signs.count(1)} worse" if signs else ""


def _clause(words: str, known: list[tuple[Row, en.Difference]], basis: str) -> str:
    def named(row: Row, way: en.Difference) -> str:
        return f"{row.name} {signed(way)}"

    own = [(row, way) for row, way in known if row.entry.adamw and row.name == row.entry.name and way.sign < 0]
    gained = f"; of AdamW's own runs these are ({', '.join(named(*pair) for pair in own)})" if own else ""
    known = [(row, way) for row, way in known if not row.entry.adamw]
    if not known:
        return f"{words} no method stands beside AdamW" + gained * (basis == "tokens")
    alone = [pair for pair in known if not math.isfinite(pair[1].interval.high)]
    if len(alone) == len(known):
        nearest = min(known, key=lambda pair: pair[1].interval.value)
        return f"{words} there is one pair of seeds of each, and no interval: the lowest is {named(*nearest)}"
    known = [pair for pair in known if pair not in alone]
    nearest = min(known, key=lambda pair: pair[1].interval.value)
    gained = f" ({len(alone)} more have one pair)" * bool(alone) + gained * (basis == "tokens")
    better, worse = ([(row, way) for row, way in known if way.sign == sign] for sign in (-1, 1))
    better.sort(key=lambda pair: pair[1].interval.value)
    if better:
        shown = ", ".join(named(*pair) for pair in better[:MOST]) + (", …" if len(better) > MOST else "")
        rest = len(known) - len(better) - len(worse)
        return (
            f"{words} {len(better)} of {len(known)} are better than AdamW by an interval without zero ({shown}), "
            f"{len(worse)} worse, {rest} cannot be told{gained}"
        )
    return (
        f"{words} none of {len(known)} is better than AdamW by an interval without zero, {len(worse)} are worse; the "
        f"best is {named(*nearest)}{gained}"
    )


def _sureness(made: Answer) -> str:
    ways = [way for row in made.rows for way in row.ways.values()]
    counts = sorted({way.interval.n for way in ways})
    fresh = sum(way.fresh for way in ways)
    known = [way.interval for _, way in made.known("loss", "tokens") if math.isfinite(way.interval.high)]
    halves = [(interval.high - interval.low) / 2 for interval in known]
    pairs = "one pair" if counts == [1] else f"{'–'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} pairs"
    said = f"Each difference is of {pairs} of seeds, "
    said += {len(ways): "all of which", 0: "none of which"}.get(fresh, f"in {fresh} of {len(ways)} of which all")
    said += " had no part in choosing rho or rate" if fresh else " was kept from choosing rho or rate, which flatters"
    if halves:
        said += (
            f"; in the loss at equal tokens such pairs can show a difference of {min(halves):.4f} to {max(halves):.4f} "
            f"nats (the half-widths, {statistics.median(halves):.4f} in the middle)"
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
        for aspect in made.aspects:
            at = {basis: row.ways[aspect.key, basis] for basis in BASES if (aspect.key, basis) in row.ways}
            if len(at) == 2 and at["tokens"] == at["flops"]:  # one pass a step: the same AdamW
                parts.append(f"{aspect.title} {signed(at['tokens'])} at equal tokens and FLOPs")
            elif at:
                each = ", ".join(f"{signed(way)} {BASES[basis]}" for basis, way in at.items())
                parts.append(f"{aspect.title} {each}")
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


PAIRS = (3, 5, 10)  # of seeds, that a study may have


def power(made: Answer) -> tables.Table:
    """A row a group, aspect and basis: the noise of a pair, and the smallest difference that so many pairs show."""
    rows = []
    for group, aspect, basis in itertools.product(dict.fromkeys(row.group for row in made.rows), made.aspects, BASES):
        known = [way for row, way in made.known(aspect.key, basis) if row.group == group]
        noise = st.pooled([way.interval for way in known])
        if noise.df:
            found = {f"pairs_{pairs}": st.detectable(noise.sigma, pairs) for pairs in PAIRS}
            rows.append({"group": group, "aspect": aspect.title, "basis": BASES[basis], "sigma": noise.sigma,
                         "df": noise.df, **found})  # fmt: skip
    nats = tables.decimals(4)
    return tables.Table(
        "power", "The smallest difference that pairs of seeds could show",
        "Standard deviation of the difference of one pair of seeds, pooled over the entries that have two pairs or "
        "more, and the true difference, in nats a token, whose 95 % interval would exclude zero with probability 0.8. "
        "What is smaller than this cannot be told with so many pairs, whichever way it comes out.",
        [
            tables.Column("aspect", "in", number=False), tables.Column("basis", "held against AdamW", number=False),
            tables.Column("sigma", "sd of a pair", nats), tables.Column("df", "degrees of freedom"),
            *(tables.Column(f"pairs_{pairs}", f"{pairs} pairs", nats) for pairs in PAIRS),
        ],
        rows, "group",
    )  # fmt: skip


def beside(made: Answer) -> tables.Table:
    """A row an entry and basis: its loss, and what was measured of its weights when disturbed, less AdamW's."""
    return _differences(
        "beside", "Beside AdamW at its best",
        "Loss, and where it was measured what fine-tuning costs and the loss of the weights as rounded or disturbed, "
        "less AdamW's at its best of the same seeds (an average's less the same average's), nats a token, with 95 % "
        "intervals: below zero is better. What a user of the rounded model gets, not what rounding takes from it. "
        f"Equal FLOPs: of AdamW's runs within {en.EQUAL_FLOPS:.0%}, which see more tokens. AdamW's own row has values.",
        made, {key: of for row in made.rows for key, of in en.disturbances(row.entry).items()}, ("loss", "forgetting"),
    )  # fmt: skip


def fine_tuning(made: Answer) -> tables.Table:
    """A row an entry and basis: gained, lost and bent at each rate of fine-tuning, less AdamW's at that rate."""
    return _differences(
        "fine_tuning", "Fine-tuning at one rate",
        "What the second text gains and the first loses by the last step, nats a token, and the curvature of the "
        "first's loss before fine-tuning in the direction that this then takes: less AdamW's at the same rate, paired "
        "by seed, with 95 % intervals. A model that loses less at one rate may only have learned less: the first "
        "table compares at one loss on the second text. AdamW's own row has values.",
        made, {key: of for row in made.rows for key, of in en.fine_tunings(row.entry).items()},
    )  # fmt: skip


def _differences(
    name: str,
    title: str,
    caption: str,
    made: Answer,
    asked: dict[str, Callable[[Result], float]],
    of_answer: tuple = (),
) -> tables.Table:
    """A row an entry and basis, less AdamW's: of_answer: aspects that the answer has; asked: {measure: of a run}."""
    itself_too = {key: en.loss_of for key in of_answer if key == "loss"} | asked
    first, rows, itself = next(iter(BASES)), [], {}  # itself: a row a group
    for row in made.rows:
        if (other := row.others[first]) and other.plain:
            itself[row.group] = _beside_row(row.group, other, ITSELF, values(other, itself_too))
    for row, basis in itertools.product(made.rows, BASES):
        other = row.others.get(basis)
        if basis != first and other is row.others[first]:
            continue  # one pass a step: the same AdamW
        ways = {key: way for key in of_answer if (way := row.ways.get((key, basis)))}
        ways |= {key: way for key, of in asked.items() if (way := en.difference(row.entry, other, of))}
        if ways:
            named = row.entry._replace(name=row.name)
            found = {key: way.interval for key, way in ways.items()}
            found["adamw"] = other.name if other.budget == row.entry.budget else f"{other.name}, {other.budget}"
            rows.append(_beside_row(row.group, named, BASES[basis], found, all(way.fresh for way in ways.values())))
    ordered = []
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        ordered += [itself[group], *own] if group in itself else own
    known = [key for key in (*of_answer, *asked) if any(key in row for row in rows)]
    rows = [{"adamw": "", **row, **{key: row.get(key, an.NOTHING) for key in known}} for row in ordered]
    titles = {aspect.key: aspect.title for aspect in aspects([])} | {key: style.in_words(key) for key in asked}
    return tables.Table(
        name, title, caption,
        [
            tables.Column("entry", "entry", number=False), tables.Column("basis", "held against AdamW", number=False),
            tables.Column("adamw", "which is", number=False),
            tables.Column("cost", "FLOPs of a token, in AdamW's", tables.decimals(2)),
            *(tables.Column(key, titles[key], tables.interval(3)) for key in known),
        ],
        rows, "group",
    )  # fmt: skip


def values(entry: en.Entry, asked: dict[str, Callable[[Result], float]]) -> dict[str, st.Interval]:
    """{key: mean over seeds} of what is asked of an entry's runs at its best, where it is known."""
    found = {key: [of(result) for result in entry.best.values()] for key, of in asked.items()}
    return {key: st.t_interval([value for value in each if math.isfinite(value)]) for key, each in found.items()}


def _beside_row(group: str, entry: en.Entry, basis: str, found: dict[str, st.Interval], fresh: bool = False) -> dict:
    known = {"group": group, "entry": entry.name, "basis": basis, "cost": entry.cost, "rho": entry.chosen("rho")}
    return {**known, "fresh": fresh, **found}


# --------------------------------------------------------------------------------------------------------------- figure
def figures(made: Answer) -> list[dr.Drawing]:
    """A row an entry, a panel an aspect: seeds as dots, mean and interval before them, zero as a line.

    Scales that are too many for one drawing are in several, of which the first has most pairs. Of groups with more
    rows than a reader takes in, those on which less is known than on others are in drawings of their own, at the end.
    """
    names = {"answer": [first for first, _ in made.parted], "answer_rest": [rest for _, rest in made.parted if rest]}
    return [
        _figure(made, part, f"{name}_{number}" if number > 1 else name)
        for name, groups in names.items()
        for number, part in enumerate(_packed(groups), 1)
    ]


TALL = 28  # rows of a drawing
LONG = 12  # rows of a group that are taken in at a glance
LABEL = 36  # letters of a name in a line


def parted(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of a group that are drawn first, and the rest: averages of one pair only where nothing has more."""
    sure = [len({aspect for (aspect, _), way in row.ways.items() if math.isfinite(way.interval.high)}) for row in rows]
    most = max(sure)
    drawn = [pair for pair in zip(rows, sure, strict=True) if pair[1] or not pair[0].entry.weights or not most]
    least = most if len(drawn) > LONG else 0
    return [row for row, known in drawn if known >= least], [row for row, known in drawn if known < least]


def _packed(groups: list[list[Row]]) -> list[list[list[Row]]]:
    """The groups of each drawing: those of a scale together, as many scales as it has room for; most pairs first."""
    parts: list[list[list[Row]]] = []
    for _, same in itertools.groupby(groups, lambda rows: rows[0].entry.scale):
        own = list(same)
        if parts and sum(map(len, [*parts[-1], *own])) <= TALL:
            parts[-1] += own
        else:
            parts.append(own)
    return sorted(
        parts, key=lambda part: -sum(way.interval.n for rows in part for row in rows for way in row.ways.values())
    )


def _figure(made: Answer, groups: list[list[Row]], name: str) -> dr.Drawing:
    drawn = plot.figure(dr.WIDTH, 0.8 + sum(0.33 * len(rows) + 0.45 for rows in groups))
    panels = drawn.subplots(
        len(groups), len(made.aspects), squeeze=False, sharex="col", sharey="row", height_ratios=[*map(len, groups)]
    )
    for line, rows in enumerate(groups):
        own = rows[::-1]
        for column, aspect in enumerate(made.aspects):
            axes = panels[line][column]
            ways = {basis: [row.ways.get((aspect.key, basis)) for row in own] for basis in BASES}
            apart = [a is not None and b is not None and a != b for a, b in zip(*ways.values(), strict=True)]
            draw_rows(axes, ways["tokens"], "D", [0.17 * both for both in apart])
            only = [None if a == b else b for a, b in zip(*ways.values(), strict=True)]
            draw_rows(axes, only, "s", [-0.17 * both for both in apart])
            for below, (row, above) in enumerate(itertools.pairwise(own)):
                if row.rank != above.rank:
                    axes.axhline(below + 0.5, color=plot.GREY, linewidth=0.6)
            if line == 0:
                axes.set_title(aspect.title.replace(", ", "\n").replace(" in ", "\nin "), fontsize=9.5, loc="left")
            if line == len(groups) - 1:
                axes.set_xlabel("← better    worse →\nless AdamW's,\nnats a token", fontsize=9)
            axes.set_xlim(*_frame(aspect.key, groups))
        panels[line][0].set_yticks(range(len(own)), [label_of(row.name, row.entry) for row in own], fontsize=9)
        if len({row.group for row in made.rows}) > 1:
            panels[line][0].set_ylabel(rows[0].group.replace(", ", "\n"), fontsize=9)
    shown = list(itertools.chain(*groups))
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
        f"Differences to AdamW of {len(shown)} entries in {len(made.aspects)} aspects. {' '.join(sentences(made))}",
        drawn, [_as_row(row) for row in shown],
    )  # fmt: skip


def _frame(aspect: str, groups: list[list[Row]]) -> tuple[float, float]:
    """From the lowest to the highest pair and interval; not intervals of two pairs, beside which nothing is seen."""
    shown = [0.0]
    for row in itertools.chain(*groups):
        for way in filter(None, (row.ways.get((aspect, basis)) for basis in BASES)):
            shown += [*way.pairs.values(), *(way.interval[1:3] if way.interval.n > 2 else ())]
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


def draw_rows(axes, ways: Sequence[en.Difference | None], marker: str = "D", shifts: Sequence[float] = ()) -> None:
    """A line a difference, from below: pale dots, a mark, the interval. shifts: how far each lies above its line."""
    for line, way in enumerate(ways):
        if way is None:
            continue
        value, low, high = way.interval[:3]
        at = line + (shifts[line] if shifts else 0.0)
        colour = {-1: plot.BLUE, 1: plot.VERMILION}.get(way.sign, plot.BLACK)
        axes.plot(list(way.pairs.values()), [at] * len(way.pairs), "o", color=plot.PALE, markersize=3)
        sure = math.isfinite(low) and math.isfinite(high)
        if sure:
            axes.plot([low, high], [at, at], color=colour, linewidth=1.8)
        axes.plot([value], [at], marker, color=colour, markersize=5, fillstyle="full" if sure else "none")
    axes.axvline(0, color=plot.GREY, linewidth=1)
    axes.set_ylim(-0.7, len(ways) - 0.3)
    axes.xaxis.set_major_locator(dr.ticker().MaxNLocator(3))
    axes.grid(axis="y", visible=False)


def _as_row(row: Row) -> dict:
    found = {"group": row.group, "entry": row.name, "cost": row.entry.cost, "rho": row.entry.chosen("rho"),
             "rate": row.entry.chosen("rate"), "rho_edge": row.entry.edge("rho"), "rate_edge": row.entry.edge("rate"),
             "loss": row.entry.loss, "seeds": len(row.entry.best)}  # fmt: skip
    for (aspect, basis), way in row.ways.items():
        key = aspect if basis == "tokens" else f"{aspect}_at_equal_{basis}"
        found |= {key: way.interval.value, f"{key}_low": way.interval.low, f"{key}_high": way.interval.high,
                  f"{key}_pairs": way.interval.n, f"{key}_fresh": way.fresh}  # fmt: skip
    return found
