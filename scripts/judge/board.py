"""All verdicts of a directory as one page: a leaderboard against AdamW at equal compute, then each verdict."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from steppe.data import files, stored
from steppe.lm import plot
from steppe.scripts.judge import page, retention
from steppe.scripts.judge.numbers import looks, tokens
from steppe.scripts.judge.verdict import EQUAL
from steppe.scripts.report import drawing as dr
from steppe.scripts.report import page as whole
from steppe.scripts.report.tables import Column, Table, number

PAGE = "index.html"
EMA = "adamw, ema"
LESS = {"flops": "AdamW at equal FLOPs", "ema": "AdamW's EMA"}


def read(directory: Path) -> list[dict[str, Any]]:
    """The verdicts of a directory, by size, the lowest loss first; those without a loss last."""
    found = [stored.read(path, dict[str, Any]) for path in sorted((directory / page.VERDICTS).glob("*.json"))]
    return sorted(found, key=lambda each: (each["parameters"], each.get("nats_a_byte", math.inf), each["candidate"]))


def _row(found: dict[str, Any]) -> dict[str, Any]:
    """A verdict's loss, and its difference from each of LESS with bounds and state."""
    rows = found["comparisons"]
    against = {"flops": rows.get(EQUAL) or rows.get("adamw", {}), "ema": rows.get(EMA, {})}
    row = {name: found[name] for name in ("candidate", "parameters", "tokens_a_parameter", "flops_of_adamw")}
    row |= {"nats_a_byte": found.get("nats_a_byte", math.nan), "diverged": len(found.get("diverged", ()))}
    for name, each in against.items():
        keys = {"": "difference", "_low": "low", "_high": "high", "_n": "pairs"}
        row |= {f"{name}{end}": each.get(key, math.nan) for end, key in keys.items()}
        row[f"{name}_state"] = "diverged" if row["diverged"] else each.get("state", "")
    need = rows.get("adamw", {}).get("tokens") or {}
    told = need.get("low") is not None or need.get("high") is not None
    row["tokens"] = tokens.said(need).removeprefix("AdamW needs ") if told else "cannot be told"
    return row | {"hours": found["cost"]["hours"], "effect": found["rule"]["effect"]}


def text(made: pd.DataFrame) -> str:
    """The leaderboard on a terminal."""
    titles = ("candidate", "parameters", "nats a byte", "less adamw", "95% over all looks")
    rows: list[tuple] = [(*titles, "verdict against adamw at equal FLOPs")]
    for row in made.to_dict("records"):
        bounds = f"{row['flops_low']:+.4f} to {row['flops_high']:+.4f}" if row["flops_n"] > 0 else "-"
        level, less = f"{row['nats_a_byte']:.4f}", f"{row['flops']:+.4f}"
        cells = [cell if "nan" not in cell else "-" for cell in (level, less)]
        rows.append((row["candidate"], f"{row['parameters']:,}", *cells, bounds, row["flops_state"]))
    return "\n".join("{:<32} {:>11}  {:>11}  {:>10}  {:>20}  {}".format(*row) for row in rows)


def sentences(made: pd.DataFrame) -> list[str]:
    """Three on the verdicts of one size: against AdamW at equal FLOPs, the best of these, against AdamW's EMA."""
    effect = made["effect"].max()
    counts = [f"{n} {word}" for word, n in _counts(made["flops_state"], effect)]
    said = [f"Of {len(made)} candidate{'s' * (len(made) != 1)}, against AdamW at equal FLOPs: {', '.join(counts)}."]
    known = made[made["flops_n"] > 0]
    if len(known):
        best = known.loc[known["flops"].idxmin()]
        bounds = f"[{number(best['flops_low'], '+.4f')}, {number(best['flops_high'], '+.4f')}]"
        said.append(f"The lowest is {best['candidate']}: {number(best['flops'], '+.4f')} {bounds} nats a byte.")
    counts = [f"{n} {word}" for word, n in _counts(made["ema_state"], effect)]
    return [*said, f"Against the EMA of AdamW's weights, which costs nothing: {', '.join(counts)}."]


def _counts(states: pd.Series, effect: float) -> list[tuple[str, int]]:
    words = {looks.BETTER: "better", looks.WITHIN: f"within {effect:g}", looks.CANNOT: "not told apart",
             looks.WORSE: "worse", "diverged": "diverged"}  # fmt: skip
    return [(word, int((states == state).sum())) for state, word in words.items() if (states == state).any()]


def figure(made: pd.DataFrame, name: str) -> dr.Drawing:
    """A line a candidate, against both of LESS."""
    drawn = plot.figure(dr.WIDTH, 1.2 + 0.42 * len(made))
    axes = drawn.subplots()
    axes.grid(visible=False, axis="y")
    effect = made["effect"].max()
    axes.axvspan(-effect, effect, color="0.92", zorder=0)
    axes.axvline(0, color="0.4", linewidth=1)
    for (key, words), colour, shift in zip(LESS.items(), (plot.BLUE, plot.ORANGE), (0.14, -0.14), strict=True):
        at = [len(made) - 1 - number + shift for number in range(len(made))]
        widths = [made[key] - made[f"{key}_low"], made[f"{key}_high"] - made[key]]
        axes.errorbar(made[key], at, xerr=widths, fmt="o", color=colour, markersize=5, label=f"less {words}")
    axes.set_yticks(range(len(made)), [name.rpartition(":")[2] for name in made["candidate"][::-1]])
    axes.set_ylim(-0.6, len(made) - 0.4)
    axes.set_xscale("symlog", linthresh=10 * effect)
    low, high = axes.get_xlim()
    ticks = [sign * times * effect for times in (0, 5, 10, 100, 1000) for sign in (-1, 1)]
    ticks = sorted({tick for tick in ticks if low <= tick <= high})
    axes.set_xticks(ticks, [number(tick, "+g") if tick else "0" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("held-out loss, nats a byte: left is better")
    drawn.legend(loc="outside upper left", ncols=2)
    caption = (
        f"Mean difference of paired seeds with its interval, 95 % over all looks and rivals. Grey: within {effect:g}, "
        f"which does not matter. Beyond {10 * effect:g} the axis is logarithmic."
    )
    alt = "; ".join(f"{row.candidate} {row.flops:+.4f}, {row.ema:+.4f}" for row in made.itertuples())
    return dr.Drawing(name, "Every candidate", caption, f"Differences of loss: {alt}", drawn, made)


def table(made: pd.DataFrame, name: str) -> Table:
    """The same, in numbers."""
    columns = [
        ("candidate", "candidate"), ("nats_a_byte", "nats a byte", ".4f"), ("flops", f"less {LESS['flops']}", "±4"),
        ("flops_state", "verdict"), ("ema", f"less {LESS['ema']}", "±4"), ("ema_state", "verdict"),
        ("tokens", "AdamW needs"), ("flops_of_adamw", "FLOPs / AdamW", ".2f"),
    ]  # fmt: skip
    caption = "Nats a byte, n paired seeds, interval of 95 % over all looks and rivals: below zero is better."
    return Table(f"{name}_table", "In numbers", caption, [Column(*each) for each in columns], made)


def write(directory: Path) -> str:
    """Writes the page and its figures; returns the leaderboard for a terminal."""
    verdicts = read(directory)
    if not verdicts:
        return f"{directory}: no verdict yet; steppe judge CANDIDATE --config=NAME --out={directory} makes one"
    made, sections = pd.DataFrame(map(_row, verdicts)), []
    with dr.styled():
        for size, rows in made.groupby("parameters", sort=True):
            name = f"leaderboard_{size}"
            drawing = figure(rows, name)
            opening = whole.Section(f"At {size:,} parameters").text(*sentences(rows), kind="answer")
            sections.append(opening.figure(drawing, dr.save(drawing, directory)).table(table(rows, name)))
        sections += [_section(each, directory) for each in verdicts]
    introduction = (
        "Every candidate and AdamW were tuned by equal trials on one seed, then compared on fresh paired seeds by a "
        "group-sequential rule. Losses are held-out, after the last step."
    )
    files.write(directory / PAGE, whole.page(f"{directory.resolve().name}: verdicts", introduction, sections))
    return f"{text(made)}\nwrote {directory / PAGE}"


def _section(found: dict[str, Any], directory: Path) -> whole.Section:
    """A verdict: its sentence, figure, table, and how it was reached."""
    section = whole.Section(found["candidate"] + f" at {found['size']}" * bool(found["size"]))
    section.text(*page.line(found).splitlines())
    drawing = page.drawing(found)
    if drawing is not None:
        section.figure(drawing, dr.save(drawing, directory / page.VERDICTS), folded=True)
        section.table(page.table(found), folded=True)
    if kept := found.get("retention"):
        section.code(retention.text(kept))
    return section.points(page.protocol(found))
