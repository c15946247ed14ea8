"""Differences of entries from AdamW in all that was measured, as frames: at equal tokens and equal compute, by seed."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from steppe.lm.measure import frontier
from steppe.scripts.report.numbers import entries as en
from steppe.scripts.report.numbers import statistics as st
from steppe.scripts.report.numbers.analysis import NOTHING, spread

BITS = (4, 3)  # of steppe retention, to the nearest, a scale an output channel
FREE = 1.05  # FLOPs of a token, in AdamW's, up to which a method costs no further pass
ITSELF = "AdamW itself"  # a value, no difference
LONG = 12  # rows of a group that are taken in at a glance
ARROW = {"lower": " ↓", "upper": " ↑", "": ""}  # which way the grid of an entry should go on
PAIRS = (3, 5, 10)  # of seeds, that a study may have


class Aspect(NamedTuple):
    """A number of a run in which entries are compared; title: over its panel; clause: in a sentence, of the better."""

    title: str
    clause: str


ASPECTS = {
    "loss": Aspect("held-out loss", "beat AdamW"),
    "forgetting": Aspect("forgotten, at equal fine-tuning loss", "forget less"),
    **{f"int{bits}": Aspect(f"held-out loss in {bits} bits", f"are better in {bits} bits") for bits in BITS},
}


def measured(shown: Sequence[en.Entry]) -> dict[str, str | Callable]:
    """{aspect: see Entry.value} for entries that are compared: forgetting depends on the loss they all reach."""
    tuned = [fine_tune for entry in shown for fine_tune in _tuned(entry)]
    known = {name for entry in shown for result in entry.best["result"] for name in result.retention}
    return {
        "loss": "loss", "forgetting": en.forgotten(frontier.equal_loss(tuned)),
        **{f"int{bits}": f"{'q' if f'q{bits}_channel' in known else 'int'}{bits}_channel" for bits in BITS},
    }  # fmt: skip


def _tuned(entry: en.Entry) -> list[dict]:
    return [result.fine_tune for result in entry.best["result"] if result.fine_tune]


class Answer(NamedTuple):
    """What the entries of a study say.

    rows: group (the scale and budget it is shown under), name, entry, tokens and flops (whom it is compared with),
    rank (0 what perturbs nothing, 1 what does at no further pass, 2 the rest), aside (AdamW on more tokens); in each
    group by rank and loss. ways: the differences of the rows, `row` their place in them; see entries.ways.
    """

    rows: pd.DataFrame
    ways: pd.DataFrame

    @property
    def aspects(self) -> list[str]:
        """Those in which some row differs from its reference."""
        return [aspect for aspect in ASPECTS if (self.ways["measure"] == aspect).any()]

    @property
    def first(self) -> str:
        """The scale and budget with most pairs."""
        return self.ways.groupby(self.ways["row"].map(self.rows["group"]), sort=False)["n"].sum().idxmax()

    def known(self, aspect: str, basis: str) -> pd.DataFrame:
        """The differences in an aspect on a basis, with their rows."""
        return self.ways[(self.ways["measure"] == aspect) & (self.ways["basis"] == basis)].join(self.rows, on="row")

    @property
    def parted(self) -> list[tuple[list[int], list[int]]]:
        """Group by group, the rows that are drawn first, and the rest: averages of one pair only where nothing has
        more; of a long group what is known in fewer aspects than other rows is drawn apart."""
        sure = self.ways[st.finite(self.ways["high"])].groupby("row")["measure"].nunique()
        found = []
        for _, own in self.rows.groupby("group", sort=False):
            known = sure.reindex(own.index, fill_value=0)
            most = known.max()
            drawn = known[(known > 0) | own["entry"].map(lambda entry: not entry.weights) | (most == 0)]
            first = drawn >= (most if len(drawn) > LONG else 0)
            found.append((list(drawn.index[first]), list(drawn.index[~first])))
        return found


def answer(found: Sequence[en.Entry]) -> Answer:
    """What the entries of a study say; without AdamW to compare with, no rows."""
    rows, ways = [], []
    cells = dict.fromkeys((entry.cell for entry in found), False) | {e.cell: True for e in found if not e.adamw}
    # where AdamW is alone it only serves other cells, if these have methods
    for cell in [cell for cell, methods in cells.items() if methods] or cells:
        inside = [entry for entry in found if entry.cell == cell]
        longer = {e.flops.label: e.flops for e in inside if e.flops is not None and e.flops.cell != cell}
        if not any(entry.plain for entry in inside) or len(inside) + len(longer) < 2:
            continue
        for entry in (*longer.values(), *inside):
            aside = entry.cell != cell  # AdamW on more tokens too is compared with AdamW of this budget
            others = {"tokens": en.at_equal_tokens(inside, entry, cell)} | ({} if aside else {"flops": entry.flops})
            of = measured([entry, *filter(None, others.values())])
            own = en.ways(entry, others, of)
            if own:
                name = f"{entry.name}, {entry.budget}" if aside else entry.name
                rank = entry.perturbs + (entry.perturbs and entry.cost > FREE)
                ways += [{**way, "row": len(rows)} for way in own]
                rows.append({"group": cell, "name": name, "entry": entry, "tokens": None, "flops": None, **others,
                             "rank": rank, "aside": aside, "adamw": entry.adamw})  # fmt: skip
    if not rows:
        return Answer(pd.DataFrame(), pd.DataFrame())
    frame = pd.DataFrame(rows)
    order = frame["group"].map({group: place for place, group in enumerate(frame["group"].unique())})
    frame = frame.assign(_=order).sort_values(["_", "rank"], kind="stable").drop(columns="_")
    return Answer(frame, pd.DataFrame(ways))


def counts(made: Answer) -> pd.DataFrame:
    """A row a group, aspect and basis: how many methods are known by an interval, and how many of these are better than
    AdamW, how many worse, and of how many Holm's correction over all the groups, aspects and bases leaves p < 0.05."""
    if made.rows.empty:
        return pd.DataFrame()
    ways = made.ways.join(made.rows[["group", "adamw"]], on="row")
    ways = ways[~ways["adamw"].astype(bool)].rename(columns={"measure": "aspect"})
    shown = {"known": st.finite(ways["high"]), "better": ways["sign"] < 0, "worse": ways["sign"] > 0}
    shown["survives"] = st.holm(ways["p"]) < 1 - st.LEVEL
    return ways.assign(**shown).groupby(["group", "aspect", "basis"], sort=False)[[*shown]].sum().reset_index()


def in_words(found: pd.DataFrame) -> pd.DataFrame:
    """Counts with the titles of aspects and bases."""
    titles = {key: aspect.title for key, aspect in ASPECTS.items()}
    return found.replace({"aspect": titles, "basis": en.BASES})


def power(made: Answer) -> pd.DataFrame:
    """A row a group, aspect and basis: the noise of a pair, and the smallest difference that these pairs show."""
    rows = []
    groups = made.rows["group"].unique() if len(made.rows) else ()
    for group, aspect, basis in itertools.product(groups, ASPECTS, en.BASES):
        known = made.known(aspect, basis)
        known = known.loc[known["group"] == group, list(st.Interval._fields)]
        noise = st.pooled([st.Interval(*way) for way in known.itertuples(index=False)])
        if noise.df:
            shown = {f"pairs_{pairs}": st.detectable(noise.sigma, pairs) for pairs in PAIRS}
            rows.append({"group": group, "aspect": ASPECTS[aspect].title, "basis": en.BASES[basis],
                         **noise._asdict(), **shown})  # fmt: skip
    return pd.DataFrame(rows)


def table(made: Answer, asked: Sequence[str], of_answer: Sequence[str] = ()) -> pd.DataFrame:
    """A row an entry and basis: measures less AdamW's, as intervals; above those of a group AdamW's own values.

    of_answer: aspects that the answer has; asked: measures, see Entry.value.
    """
    rows, itself = [], {}  # itself: a row a group
    of = {key: key for key in asked}

    def given(group: str, name: str, entry: en.Entry, basis: str, against: str, fresh: bool) -> dict:
        return {"adamw": against, "group": group, "entry": name, "basis": basis, "cost": entry.cost,
                "rho": entry.chosen("rho"), "fresh": fresh}  # fmt: skip

    for row in made.rows.itertuples():
        if row.tokens is not None and row.tokens.plain:
            itself[row.group] = given(row.group, row.tokens.name, row.tokens, ITSELF, "", False)
            for key in (*(key for key in of_answer if key == "loss"), *asked):
                known = [value for value in row.tokens.value(key).values() if math.isfinite(value)]
                itself[row.group] |= spread(key, st.t_interval(known))
        # of one pass a step both are the same AdamW
        others = {"tokens": row.tokens} | ({"flops": row.flops} if row.flops is not row.tokens else {})
        answered = made.ways[(made.ways["row"] == row.Index) & made.ways["measure"].isin(of_answer)]
        ways = answered.to_dict("records") + en.ways(row.entry, others, of)
        for basis, other in others.items():
            if other and (known := [way for way in ways if way["basis"] == basis]):
                against = other.name if other.budget == row.entry.budget else f"{other.name}, {other.budget}"
                fresh = all(way["fresh"] for way in known)
                rows.append(given(row.group, row.name, row.entry, en.BASES[basis], against, fresh))
                for way in known:
                    rows[-1] |= spread(way["measure"], st.Interval(*(way[part] for part in st.Interval._fields)))
    ordered = [
        each
        for group, own in itertools.groupby(rows, lambda row: row["group"])
        for each in [*([itself[group]] if group in itself else []), *own]
    ]
    frame = pd.DataFrame(ordered)
    counts = [f"{key}_n" for key in (*of_answer, *asked) if key in frame]
    return frame.fillna(dict.fromkeys(counts, NOTHING.n)).astype(dict.fromkeys(counts, int))


def disturbances(made: Answer) -> list[str]:
    """The losses of disturbed weights that are known of some row."""
    known = dict.fromkeys(key for entry in made.rows.get("entry", ()) for key in entry.values)
    return [key for key in known if key.startswith(en.DISTURBED)]


def fine_tunings(made: Answer) -> list[str]:
    """The measures of fine-tuning at one rate that are known of some row."""
    paths = [[path for tuned in _tuned(entry) for path in tuned["paths"]] for entry in made.rows.get("entry", ())]
    return list(dict.fromkeys(key for own in paths for key in frontier.at_rates({"paths": own})))


def column(aspect: str, basis: str) -> str:
    """Of `shown`."""
    return aspect if basis == "tokens" else f"{aspect}_at_equal_{basis}"


def shown(made: Answer) -> pd.DataFrame:
    """A row a row: its setting, and its differences as columns."""
    rows = []
    for row in made.rows.itertuples():
        entry = row.entry
        found = {"group": row.group, "entry": row.name, "cost": entry.cost, "rho": entry.chosen("rho"),
                 "rate": entry.chosen("rate"), "rho_edge": entry.edge("rho"), "rate_edge": entry.edge("rate"),
                 "loss": entry.loss, "seeds": len(entry.best)}  # fmt: skip
        for way in made.ways[made.ways["row"] == row.Index].itertuples():
            key = column(way.measure, way.basis)
            found |= {key: way.value, f"{key}_low": way.low, f"{key}_high": way.high, f"{key}_pairs": way.n,
                      f"{key}_fresh": way.fresh}  # fmt: skip
        rows.append(found)
    frame = pd.DataFrame(rows)
    return frame.astype({key: "Int64" for key in frame if key.endswith("_pairs")})


# -------------------------------------------------------------------------------------------------------- over settings
def kept_against_rho(found: Sequence[en.Entry]) -> pd.DataFrame:
    """A row an entry, rho and aspect, at the entry's best rate: less AdamW's of the same seeds; of entries of which
    more than the loss is known at several rho."""
    rows = []
    for entry in found:
        if not (entry.of_choice and entry.perturbs and entry.tokens):
            continue
        settings = entry.grid[entry.grid["loss"].notna() & (entry.grid["rho"] > 0)]
        settings = settings.sort_values("rho").drop_duplicates("setting")
        settings = settings[st.finite(settings["setting"].map(entry.choice.means))]  # not where it diverged
        known = {row.rho: entry.at(row.setting) for row in settings.itertuples()}
        of = measured([*known.values(), entry.tokens])
        for rho, alone in known.items():
            given = {"cell": entry.cell, "entry": entry.name, "rho": rho}
            rows += [way | given for way in en.ways(alone, {"tokens": entry.tokens}, of)]
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    frame["aspect"] = frame["measure"].map({key: aspect.title for key, aspect in ASPECTS.items()})
    frame = frame[frame.groupby(["cell", "entry", "aspect"])["rho"].transform("size") > 1]
    frame = frame[frame.groupby(["cell", "entry"])["aspect"].transform("nunique") > 1]
    aspects = frame["measure"].map({key: number for number, key in enumerate(ASPECTS)})
    frame = frame.iloc[np.lexsort((aspects, frame.groupby(["cell", "entry"], sort=False).ngroup()))]
    frame = frame.drop(columns="pairs").rename(columns={"value": "less_adamw", "n": "pairs"})
    return frame[["cell", "aspect", "entry", "rho", "less_adamw", "low", "high", "pairs"]]


def forgetting(made: Answer) -> pd.DataFrame:
    """A row an entry and loss on the second text: the least that is forgotten there, mean over seeds, and less AdamW's
    of as many tokens. Of long groups the entries that the answer's first figure shows."""
    rows = []
    for first, _ in made.parted if len(made.rows) else ():
        own = made.rows.loc[first]
        members = {other.name: (other, None) for other in own["tokens"] if other is not None and other.plain}
        members |= {row.name: (row.entry, row.tokens) for row in own.itertuples()}
        members = {name: pair for name, pair in members.items() if _tuned(pair[0])}
        if not members:
            continue
        tuned = [each for entry, _ in members.values() for each in _tuned(entry)]
        highest = frontier.equal_loss(tuned)
        most = max(each["loss"] - frontier.best_gain(frontier.paths_of(each)) for each in tuned)
        for name, (entry, other) in members.items():
            for mark in (highest + (most - highest) * share / 8 for share in range(-8, 9)):
                at = entry.best["result"][[bool(result.fine_tune) for result in entry.best["result"]]]
                at = at.map(en.forgotten(mark)).astype(float)
                if st.finite(at).all():
                    way = en.difference(entry, other, en.forgotten(mark))
                    given = {"group": own["group"].iloc[0], "entry": name, "second_loss": mark, "forgotten": at.mean()}
                    bounds = way.interval if way else NOTHING
                    rows.append(given | dict(zip(("less_adamw", "low", "high", "n"), bounds, strict=False)))
    return pd.DataFrame(rows)
