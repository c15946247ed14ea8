"""The style of figures, and a run's loss curve, drawn from its metrics.jsonl alone."""

import itertools
import math
import os
from pathlib import Path
from typing import Any

from steppe.data import files
from steppe.lm.track import lines

# Okabe and Ito's colours: distinct for colour-blind readers and, by lightness and dash, in grey print
BLUE, VERMILION, GREEN, PINK, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
BLACK, GREY, PALE = "#000000", "#555555", "#999999"
DRAWN = 10_000  # most points of a line
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


def styled(**changes):
    """The context to make and save figures in. changes: to STYLE, with `_` for the dots of its names."""
    import matplotlib

    given = {name if "." in name else name.replace("_", "."): value for name, value in changes.items()}
    style: Any = {**STYLE, **given}
    return matplotlib.rc_context(style)


def figure(width: float, height: float):
    """An empty figure with automatic layout; sizes in inches."""
    from matplotlib.figure import Figure  # draws off screen; pyplot would choose a backend for the whole process

    return Figure(figsize=(width, height), layout="constrained")


def save(drawn, path, **options) -> None:
    """Writes a figure to a path or an open file.

    Dollar signs are not parsed as mathematics, because names of runs and files contain them.
    """
    from matplotlib.text import Text

    for text in drawn.findobj(Text):
        if "$" in text.get_text() and "mathdefault" not in text.get_text():  # not matplotlib's own tick labels
            text.set_parse_math(False)
    if not isinstance(path, (str, os.PathLike)):
        drawn.savefig(path, **options)
        return
    with files.replacing(path) as aside:
        drawn.savefig(aside, format=Path(path).suffix[1:], **options)


def loss_curve(workdir: str | os.PathLike) -> Path | None:
    """Draws loss.png in the workdir and returns its path; None if no step has been recorded."""
    records = lines.read(workdir)
    if not len(records.train.step):
        return None
    path = Path(workdir) / "loss.png"
    with styled():
        save(losses_of(records, Path(workdir).resolve().name), path, dpi=160)
    return path


def losses_of(records: lines.Records, name: str):
    """The figure of a run's losses. name: its title, if the run recorded none.

    Left the whole run, right the part after the first quarter, whose losses near log(vocabulary) flatten the rest.
    Above: training loss (faint) and its running mean, held-out losses (also of averaged weights), and each baseline of
    the run's record (`baselines`: {name: nats per token}) as a line. Below, if the method perturbs: perturbed minus
    clean loss, which is the sharpness that the method sees. Losses are nats per token.
    """
    train, runs = records.train, records.of("run")
    recorded = runs[-1].get("baselines", {}) if runs else {}
    baselines = {name: value for name, value in recorded.items() if value is not None and math.isfinite(value)}
    title = runs[-1]["title"] if runs and "title" in runs[-1] else name

    gap = train.perturbed_loss - train.loss
    known = gap == gap  # NaN where a step did not perturb
    perturbed = bool((gap[known] != 0).any())
    drawn = figure(9, 5.2 if perturbed else 4)
    ratios = [3, 1] if perturbed else [1]
    axes = drawn.subplots(len(ratios), 2, sharex="col", squeeze=False, height_ratios=ratios, width_ratios=[2, 3])
    averages = [{**r, "name": f"{r['name']} {r['weights']}"} for r in records.of("average")]
    for column, begin in enumerate((0, train.step[len(train.step) // 4])):
        _losses(axes[0, column], train, [*records.of("evaluate"), *averages], baselines, begin)
        if perturbed:
            _sharpness(axes[1, column], train.step[known], gap[known], begin)
        axes[-1, column].set_xlabel("step")
        axes[-1, column].set_xlim(begin, train.step[-1] + max(1, 0.01 * (train.step[-1] - begin)))
    axes[0, 0].set_ylabel("loss, nats per token")
    axes[-1, 0].set_ylabel("perturbed\n− clean" if perturbed else "loss, nats per token")
    axes[0, 1].legend(fontsize=9)
    drawn.suptitle(title, fontsize=10, x=0.01, ha="left")
    return drawn


def running_mean(values, share: float):
    """Exponential average [n], corrected for the bias of its start; skips NaN and infinities. share: of a new value."""
    import numpy as np  # by hand: to import pandas takes longer than to draw

    values = np.asarray(values, float)
    known = np.isfinite(values)
    steps = itertools.accumulate(values[known], lambda mean, new: mean + share * (new - mean), initial=0.0)
    sums = np.fromiter(steps, float)
    means = sums / np.maximum(1 - (1 - share) ** np.arange(len(sums)), share)
    means[0] = math.nan  # before the first
    return means[np.cumsum(known)]


def _curve(axes, steps, values, color, label=""):
    """Draws values, faint, and their running mean over about a fiftieth of them; returns the mean."""
    smooth, thin = running_mean(values, 1 / max(1.0, len(values) / 50)), slice(None, None, -(-len(steps) // DRAWN))
    axes.plot(steps[thin], values[thin], color=color, alpha=0.25, linewidth=0.7)
    axes.plot(steps[thin], smooth[thin], color=color, label=label and f"{label} {smooth[-1]:.3f}")
    return smooth


def _losses(axes, train, evaluations, baselines, begin):
    """Draws the losses; the limits of the axis are those of the losses from step `begin` on, of 0 with baselines."""
    smooth = _curve(axes, train.step, train.loss, BLUE, "training")
    names = dict.fromkeys(record["name"] for record in evaluations)
    markers, colours = itertools.cycle("osD^vP*X"), itertools.cycle((VERMILION, GREEN, PINK, ORANGE, SKY, BLACK))
    for name, marker, colour in zip(names, markers, colours, strict=False):
        found = [r for r in evaluations if r["name"] == name]
        label = f"held-out {name} {found[-1]['loss']:.3f}"
        part = [(r["step"], r["loss"]) for r in found if r.get("tokens") == found[0].get("tokens")]
        whole = [(r["step"], r["loss"]) for r in found if r.get("tokens") != found[0].get("tokens")]
        style = {"color": colour, "marker": marker, "markersize": 4}
        axes.plot(*zip(*part, strict=True), **style, linestyle="--", label=label if not whole else None)
        if whole:  # measured on more of the set than the others, so not a point of the same line
            style |= {"markersize": 7, "fillstyle": "none", "label": f"{label}, whole set"}
            axes.plot(*zip(*whole, strict=True), **style, linestyle="")
    for (name, value), dash in zip(
        baselines.items(), itertools.cycle((":", "-.", (0, (6, 2)), (0, (1, 3)))), strict=False
    ):
        axes.axhline(value, color=GREY, linewidth=1.1, linestyle=dash, label=f"{name} {value:.3f}")

    trained = smooth[train.step >= begin] if begin else train.loss
    held_out = [record["loss"] for record in evaluations if record["step"] >= begin]
    _limit(axes, [*trained, *held_out, *(() if begin else baselines.values())], 0.08)


def _limit(axes, values, margin):
    """Sets the limits of the vertical axis to the finite values with a margin, a share of their range."""
    shown = [value for value in values if math.isfinite(value)]
    if shown:
        low, high = min(shown), max(shown)
        axes.set_ylim(low - margin * (high - low) - 1e-9, high + margin * (high - low) + 1e-9)


def _sharpness(axes, steps, values, begin):
    smooth = _curve(axes, steps, values, GREEN)
    _limit(axes, [0.0, *(smooth[steps >= begin] if begin else values)], 0.1)
