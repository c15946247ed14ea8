"""The table and the plots of steppe retention: runs side by side, those that differ only in their seed as one."""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

from steppe.data import files
from steppe.lm import plot
from steppe.scripts import results

# beyond eight groups the dash differs
_COLOURS = (*(plot.BLUE, plot.VERMILION, plot.GREEN, plot.PINK), *(plot.ORANGE, plot.SKY, plot.BLACK, plot.PALE))
_DASHES = ("-", "--", ":", "-.")
_EQUAL = {"forgetting_at_equal_gain": "equal gain", "forgetting_at_equal_loss": "equal loss"}


class Table(NamedTuple):
    """Rows to write, the same as text, and the groups: {label: names of its runs}."""

    header: list[str]
    rows: list[list]
    text: str
    groups: dict[str, list[str]]


def table(found: dict[str, dict], configs: dict[str, dict]) -> Table:
    """One row a run, then one a group of several runs: mean and standard error over its seeds.

    found: {name: record of steppe retention}; configs: {name: flat config}. Losses and increases in nats a token.
    """
    keys = list(dict.fromkeys(key for record in found.values() for key in record["summary"]))
    groups = groups_of(configs)
    header = ["run", "step", "loss", *keys]
    rows = [
        [name, record["step"], record["loss"], *(record["summary"].get(key) for key in keys)]
        for name, record in found.items()
    ]
    means = []
    for label, names in groups.items():
        if len(found) > len(groups):
            columns = [[found[name]["loss"] for name in names]]
            columns += [[found[name]["summary"].get(key) for name in names] for key in keys]
            means.append([f"{label} ({len(names)})", "", *map(mean_and_error, columns)])
    tokens = next(iter(found.values()))["held_out"]["tokens"]
    marks = [record["details"]["equal"] for record in found.values() if "equal" in record["details"]]
    text = f"\nincrease of held-out loss, nats a token, over {tokens:,} tokens\n\n" + _text(header, rows)
    if means:
        text += "\nmeans and standard errors over runs that differ in their seed alone\n\n" + _text(header, means)
    if marks:
        text += (
            f"\nequal gain: {marks[0]['gain']:.4f} nats gained on the second text; "
            f"equal loss: {marks[0]['loss']:.4f} nats reached there; all {marks[0]['runs']} runs reach both\n"
        )
    return Table(header, rows, text, groups)


def groups_of(configs: dict[str, dict]) -> dict[str, list[str]]:
    """{label: names}: runs whose flat configs differ in the seed alone, labelled by what differs between groups."""
    keys = [key for key in results.varying_keys(list(configs.values())) if key != "seed"]
    groups = {}
    for name, flat in configs.items():
        shown = [f"{key.split('.')[-1]} {flat.get(key)}" for key in keys if flat.get(key) is not None]
        shown = ", ".join(part.removeprefix("method ") for part in shown)
        groups.setdefault(shown or (name if len(configs) == 1 else "all"), []).append(name)
    return groups


def mean_and_error(values: list[float | None]) -> tuple[float, float] | None:
    """(mean, standard error) of what is known; None of nothing, an error of NaN of one value."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan


def _text(header: list[str], rows: list[list]) -> str:
    def short(key: str) -> str:
        return _EQUAL.get(key, key.replace("fine_tune_", "").replace(": lost", "").replace("embedding", "emb"))

    def cell(value) -> str:
        if isinstance(value, tuple):
            return f"{value[0]:.5f}" + (f" ±{value[1]:.5f}" if math.isfinite(value[1]) else "")
        return "-" if value is None else f"{value:.5f}" if isinstance(value, float) else str(value)

    lines = [[short(key) for key in header], *([cell(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    aligned = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join("  ".join(line) for line in aligned) + "\n"


def save(out: Path, found: dict[str, dict], made: Table) -> list[Path]:
    """Writes retention.csv and retention.png into a directory, which it makes; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    sheet = out / "retention.csv"
    files.write_csv(sheet, [made.header, *made.rows])
    return [sheet, draw(out / "retention.png", found, made.groups)]


def draw(path: Path, found: dict[str, dict], groups: dict[str, list[str]]) -> Path:
    """Draws loss against noise, quantisation as bars, and the forgetting frontier; means and errors over seeds."""
    styles = {
        label: {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _DASHES[i // len(_COLOURS) % len(_DASHES)]}
        for i, label in enumerate(groups)
    }
    tuned = any(record["fine_tune"] for record in found.values())
    with plot.styled():
        figure = plot.figure(5.2 * (2 + tuned), 4.6 + 0.16 * math.ceil(len(groups) / 3))
        axes = figure.subplots(1, 2 + tuned)
        lines = _noise(axes[0], found, groups, styles)
        _bars(axes[1], found, groups, styles)
        if tuned:
            _frontier(axes[2], found, groups, styles)
        if len(groups) > 1:
            figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=9)
        plot.save(figure, path, dpi=160)
    return path


def _columns(found, names, keys):
    """(means, errors) over the runs of a group, errors 0 where there is one run."""
    pairs = [mean_and_error([found[name]["summary"].get(key) for name in names]) for key in keys]
    known = [pair or (math.nan, math.nan) for pair in pairs]
    return [mean for mean, _ in known], [error if math.isfinite(error) else 0.0 for _, error in known]


def _keys(found, prefix: str) -> list[str]:
    return list(dict.fromkeys(key for record in found.values() for key in record["summary"] if key.startswith(prefix)))


def _noise(axes, found, groups, styles):
    keys = _keys(found, "noise_")
    scales = [float(key.removeprefix("noise_")) for key in keys]
    lines = []
    for label, names in groups.items():
        means, errors = _columns(found, names, keys)
        lines.append(axes.errorbar(scales, means, errors, label=label, marker="o", markersize=4, **styles[label]))
    if all(scale > 0 for scale in scales):
        axes.set_xscale("log")
        axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
        axes.minorticks_off()
    if all(record["summary"].get(key, 0.0) > 0 for record in found.values() for key in keys):
        axes.set_yscale("log")
    axes.set_xlabel("weight noise, in units of each tensor's rms")
    axes.set_ylabel("increase of held-out loss, nats a token")
    return lines


def _bars(axes, found, groups, styles):
    keys = _keys(found, "int")
    width = 0.8 / len(groups)
    for index, (label, names) in enumerate(groups.items()):
        means, errors = _columns(found, names, keys)
        positions = [key + (index - (len(groups) - 1) / 2) * width for key in range(len(keys))]
        axes.bar(positions, means, width * 0.92, yerr=errors, color=styles[label]["color"], linewidth=0)
    axes.set_xticks(range(len(keys)), [key.replace("_", "\n") for key in keys], fontsize=9)
    axes.set_xlabel("weights rounded to")


def _frontier(axes, found, groups, styles):
    """A line for each learning rate, thicker for higher ones: where fine-tuning leads from (0, 0)."""
    for label, names in groups.items():
        runs = [found[name]["details"]["fine_tune"]["paths"] for name in names if found[name]["fine_tune"]]
        for number, same in enumerate(zip(*runs, strict=False)):
            points = [(0.0, 0.0)]
            for each in zip(*(path["points"] for path in same), strict=False):
                gained, lost = (mean_and_error([point[key] for point in each]) for key in ("gained", "lost"))
                if gained and lost:
                    points.append((gained[0], lost[0]))
            style = {**styles[label], "linewidth": 0.8 + 0.7 * number}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **style)
            if label == next(iter(groups)):
                axes.annotate(f" {same[0]['rate']:g}", points[-1], fontsize=8, va="center")
    axes.set_xlabel("gained on the second text, nats a token")
    axes.set_ylabel("lost on the first")
