"""How a candidate's difference from its rivals goes with size: verdicts at several sizes, and the slope through them.

The slope is that of least squares through the mean differences over the logarithm of the parameters, with equal
weights. It needs no straight line: it is a number of the true differences at these sizes, and says nothing of others.
Each size stopped at a look of its own, so each enters with its interval of all looks; the half-width of the slope is
the root of the sum of squares of theirs, weighed as the means are (Zou, Donner: Stat. Med. 27, 2008). Pairs of one size
are taken as independent of those of another.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steppe.data import files
from steppe.lm import plot
from steppe.scripts.judge.numbers import looks
from steppe.scripts.judge.stages import file_name
from steppe.scripts.report.numbers import statistics as st

TRENDS = "trends"
ALPHA = 0.05


def slope(parameters: Sequence[float], intervals: Sequence[st.Interval]) -> st.Interval:
    """What is added to a difference by ten times the size; parameters: two different ones at least."""
    logs = np.log10(np.asarray(parameters, float))
    weights = (logs - logs.mean()) / ((logs - logs.mean()) ** 2).sum()
    value = float(weights @ [each.value for each in intervals])
    half = math.hypot(*(weights * [(each.high - each.low) / 2 for each in intervals]))
    return st.Interval(value, value - half, value + half, len(logs))


def at_stop(rule: Mapping[str, Any], differences: Sequence[float]) -> st.Interval | None:
    """The interval of all looks of one comparison by itself, where it stopped; None before the first look."""
    sizes = tuple(rule["looks"])
    if len(differences) not in sizes:
        return None
    return st.t_interval(differences, 1 - looks.errors(sizes, ALPHA)[sizes.index(len(differences))])


def trends(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{rival: its intervals at each size, nats a byte, and the slope} of those that were compared at every size."""
    parameters = [each["parameters"] for each in found]
    said = {}
    for rival in found[0]["comparisons"]:
        rows = [each["comparisons"].get(rival, {}).get("differences", ()) for each in found]
        intervals = [at_stop(each["rule"], row) for each, row in zip(found, rows, strict=True)]
        known = [each for each in intervals if each]
        if len(known) == len(found) and len(set(parameters)) > 1:
            through = slope(parameters, known)
            said[rival] = {
                "sizes": [{"parameters": n, "difference": each.value, "low": each.low, "high": each.high}
                          for n, each in zip(parameters, known, strict=True)],
                "tenfold": {"difference": through.value, "low": through.low, "high": through.high},
            }  # fmt: skip
    return said


def text(candidate: str, found: Mapping[str, Any]) -> str:
    """A line a rival."""
    if not found:
        return f"{candidate}: no trend: no rival was compared at two sizes or more"
    sizes = next(iter(found.values()))["sizes"]
    between = f"from {sizes[0]['parameters']:,} to {sizes[-1]['parameters']:,} parameters, and nothing beyond"
    lines = [f"{candidate} over sizes, nats a byte for ten times the parameters, {between}:"]
    for rival, each in found.items():
        tenfold = each["tenfold"]
        bounds = f"{tenfold['low']:+.4f} to {tenfold['high']:+.4f}"
        way = "falls" if tenfold["high"] < 0 else "rises" if tenfold["low"] > 0 else "no trend told"
        lines.append(f"less {rival:<22} {tenfold['difference']:+.4f}  {bounds:>20}  {way}")
    return "\n".join(lines)


def keep(directory: Path, found: Sequence[Mapping[str, Any]]) -> str:
    """Writes a candidate's trends and their figure; returns their text."""
    candidate, said = found[0]["candidate"], trends(sorted(found, key=lambda each: each["parameters"]))
    stem = directory / TRENDS / file_name(candidate)
    stem.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(f"{stem}.json", said)
    if said:
        draw(candidate, said, found[0]["rule"]["effect"], Path(f"{stem}.png"))
    return f"{text(candidate, said)}\nwrote {stem}.json" + f" and {stem.name}.png" * bool(said)


def draw(candidate: str, found: Mapping[str, Any], effect: float, path: Path) -> None:
    """A panel a rival: the difference at each size with its interval, the effect as a band."""
    with plot.styled():
        drawn = plot.figure(2.4 * len(found), 2.6)
        panels = np.atleast_1d(drawn.subplots(1, len(found), sharey=True))
        for axes, (rival, each) in zip(panels, found.items(), strict=True):
            x, y, low, high = (
                np.array([size[key] for size in each["sizes"]]) for key in ("parameters", "difference", "low", "high")
            )
            axes.axhspan(-effect, effect, color="0.9", zorder=0)
            axes.axhline(0, color="0.4", linewidth=1)
            axes.errorbar(x, y, [y - low, high - y], fmt="D", color="0.1", markersize=5)
            axes.set_xscale("log")
            axes.set_title(f"less {rival}", fontsize=9, loc="left")
            axes.set_xlabel("parameters")
        panels[0].set_ylabel(f"{candidate}\nnats a byte: below is better", fontsize=8)
        plot.save(drawn, path, dpi=150)
