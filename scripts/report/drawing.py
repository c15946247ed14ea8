"""What the figures of a report share: panels, their one legend, and saving as SVG and PNG."""

import re
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd

from steppe.lm import plot
from steppe.scripts import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 11.0  # inches of every figure: the page's


class Drawing(NamedTuple):
    """name: stem of its files. alt: what it shows, in words. frame: the data, a row a point."""

    name: str
    title: str
    caption: str
    alt: str
    figure: "Figure"
    frame: pd.DataFrame


def styled(**changes):
    """The context in which the figures of a report are made and saved."""
    return plot.styled(
        font_size=9,
        axes_titlesize=9,
        axes_titlelocation="left",
        axes_grid_axis="both",
        grid_color="#e4e4e4",
        lines_linewidth=1.4,
        lines_markersize=5,
        legend_fontsize=8.5,
        svg_fonttype="path",
        **changes,
    )


def save(drawing: Drawing, directory: Path) -> str:
    """Writes NAME.png and returns the figure as an <svg> element that stands alone in a page."""
    with styled(svg_hashsalt=drawing.name):  # ids differ between figures, not between calls
        plot.save(drawing.figure, directory / f"{drawing.name}.png", dpi=140)
        drawing.figure.set_layout_engine("none")  # it stays as it has been laid out
        text = StringIO()
        plot.save(drawing.figure, text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # within HTML the namespaces are known; ids of glyphs are shared by all figures and mean the same in each
    return re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)


def ticker():
    from matplotlib import ticker

    return ticker


def grid(cells: list[tuple], height: float, sharey: bool | Literal["row"] = False):
    """(figure, {(row, column): axes}), as wide as the page, with a panel for each (row, column), `height` inches high;
    empty corners stay empty."""
    down, across = (list(dict.fromkeys(cell[axis] for cell in cells)) for axis in (0, 1))
    figure = plot.figure(WIDTH, height * len(down) + 0.6)
    made = figure.subplots(len(down), len(across), squeeze=False, sharey=sharey)
    panels = {(row, column): made[i, j] for i, row in enumerate(down) for j, column in enumerate(across)}
    for cell, axes in panels.items():
        axes.set_visible(cell in cells)
    return figure, {cell: axes for cell, axes in panels.items() if cell in cells}


def spread(wanted: list[tuple]) -> list[tuple]:
    """(row, column) for each wanted (row, column): those of a full matrix as they are, else one after the other."""
    down, across = len({row for row, _ in wanted}), len({column for _, column in wanted})
    if len(wanted) == down * across and across <= 4:
        return wanted
    columns = min(3, len(wanted))
    return [(i // columns, i % columns) for i in range(len(wanted))]


def finish(figure, panels: dict, ylabel: str) -> None:
    """The label of all y axes, and one legend of all panels below them."""
    labels = {}
    for axes in panels.values():
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    figure.supylabel(ylabel, fontsize=9)
    if labels:
        longest = max(map(len, labels))
        columns = max(1, min(len(labels), 4, 150 // (longest + 8)))  # so many characters are as wide as the page
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=columns)


def around(values: Iterable[float], share: float) -> tuple[float, float]:
    """Bounds of an axis that show all values, with a share of their range to either side."""
    low, high = min(values), max(values)
    pad = share * (high - low) + 1e-3
    return low - pad, high + pad


def ticks_at(axis, values: list[float]) -> None:
    """A tick at each of these values and nowhere else."""
    formats = ticker()
    axis.set_major_locator(formats.FixedLocator(values))
    axis.set_major_formatter(formats.FuncFormatter(lambda value, _: style.si(value)))
    axis.set_minor_locator(formats.NullLocator())


def si_ticks(axis) -> None:
    """Numbers as 442k; on a logarithmic axis at 1, 2 and 5, closer where it is short, at 1 and 3 where it is long."""
    formats = ticker()
    axis.set_major_formatter(formats.FuncFormatter(lambda value, _: style.si(value)))
    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        wide = high / low
        steps = [1, 2, 5] if wide > 5 else [1, 1.5, 2, 3, 4, 6, 8] if wide > 2 else list(np.arange(1, 10, 0.5))
        axis.set_major_locator(formats.LogLocator(10, subs=[1, 3] if wide > 300 else steps))
        axis.set_minor_formatter(formats.NullFormatter())
        axis.set_minor_locator(formats.NullLocator())
    else:
        axis.set_major_locator(formats.MaxNLocator(5))
