"""How a report draws: panels of a frame, two side by side, their one legend, and saving as SVG and PNG."""

import contextlib
import multiprocessing
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from steppe.data import files
from steppe.lm import plot
from steppe.scripts import style
from steppe.scripts.report.numbers.statistics import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 6.2, 2.6  # inches of a figure, and of a row of its panels: letters stay legible on a phone
ACROSS, MOST = 2, 8  # panels side by side, and in all: those with most points
DPI = 130
NAMED = 10  # entries of a legend; the rest is grey
REST = ("#b8b8b8", ".", "-")
AXES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}


class Drawing(NamedTuple):
    """name: stem of its files. alt: its content in words. frame: the data, a row a point; figure: None where these
    are too few to be drawn."""

    name: str
    title: str
    caption: str
    alt: str
    figure: "Figure | None"
    frame: pd.DataFrame


def styled(**changes):
    """The context in which the figures of a report are made and saved."""
    return plot.styled(
        font_size=9.5, axes_titlesize=9.5, axes_titlelocation="left", axes_grid_axis="both", grid_color="#e4e4e4",
        axes_titley=1.0,  # else each draw seeks it anew
        lines_linewidth=1.4, lines_markersize=5, legend_fontsize=9, svg_fonttype="none",
        **{"text.parse_math": False}, **changes,
    )  # fmt: skip


@contextlib.contextmanager
def saving(aside: bool) -> Iterator[Callable[[Drawing, Path], "str | Callable[[], str]"]]:
    """Yields `save`. aside: one that draws in a second process while this one goes on; starting it takes a second. It
    returns a function that waits for the element."""
    if not aside:
        yield save
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), plot.figure, (1, 1)) as pool:
        pool.submit(around, [0.0], 0.0)  # starts the process: its imports take as long as the first numbers
        yield lambda drawing, directory: pool.submit(save, drawing, directory).result


def save(drawing: Drawing, directory: Path) -> str:
    """Writes NAME.png and returns the figure as an <svg> element that stands alone in a page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure = drawing.figure
    assert figure is not None
    with styled(svg_hashsalt=drawing.name):  # ids differ between figures, not between calls
        figure.set_dpi(DPI)
        with files.replacing(directory / f"{drawing.name}.png") as aside:
            FigureCanvasAgg(figure).print_png(aside)  # savefig would draw everything twice
        if figure.get_layout_engine():
            figure.set_layout_engine("none")  # it stays as it has been laid out
        FigureCanvasSVG(figure).print_svg(text := StringIO(), metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->| font-family: [^;\"]*;?|^\s+", "", svg, flags=re.MULTILINE)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    shorter = lambda tag: re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", tag[0])  # noqa: E731
    svg = re.sub(r"<[^>]*>", shorter, svg)  # places, not text, to 1/7200 inch
    # within HTML the namespaces are known; ids of glyphs are shared by all figures and mean the same in each
    return re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)


def panels(
    frame: pd.DataFrame, styles: dict[str, tuple], *, x: str, y: str, labels: tuple[str, str], by: str = "variant",
    panel: Sequence[str] = ("cell",), each: Sequence[str] = (), bounds: Sequence[str] = (), band: bool = False,
    joined: Callable[[str], bool] = bool, marks: bool = True, log: str = "", zero: bool = False,
    late: pd.Series | None = None, then: Callable[[Any, pd.DataFrame, Callable[[str], tuple]], None] | None = None,
    named: Callable[[str], str] = str,
) -> "Figure | None":  # fmt: skip
    """A panel for each value of the keys `panel`, in it a line for each `by` and `each`; None where no panel has two
    places on its x axis.

    labels: of x and y, "axis" for x taking that of AXES. bounds: keys of low and high, drawn as bars or as a band.
    joined: which names are more than marks ("-": those that share the grey). log: axes that are logarithmic. zero: a
    line there. late: which rows set the frame of y. then: draws more into a panel, given the look of a name. named: the
    words of a panel's key.
    """
    from matplotlib.figure import Figure

    known = frame[finite(frame[y])]
    groups = [(key, own) for key, own in known.groupby([*panel], sort=False, observed=True) if own[x].nunique() > 1]
    if not groups:
        return None
    most = sorted((len(own) for _, own in groups), reverse=True)[:MOST][-1]
    groups = [group for group in groups if len(group[1]) >= most][:MOST]
    some = {name for _, own in groups for name in own[by]}
    look = {name: styles[name] for name in [name for name in styles if name in some][:NAMED]}
    rows = -(-len(groups) // ACROSS)
    figure = Figure(figsize=(WIDTH, HEIGHT * rows))  # panels are alike: to find room for each costs more than to draw
    made = figure.subplots(rows, min(ACROSS, len(groups)), squeeze=False).ravel()
    for axes, (key, own) in zip(made, groups, strict=False):
        lines = [(name[0], line) for name, line in own.groupby([by, *each], sort=False, observed=True)]
        lines = [(name, line) for name, line in lines if not joined(name) or line[x].nunique() > 1]
        rest = [line for name, line in lines if name not in look]
        grey = [("", _broken(rest, x, y))] if rest else []
        for name, line in grey + [each for each in lines if each[0] in look]:
            colour, marker, dash = look.get(name, REST)
            kept = {"marker": marker if marks else None, "linestyle": dash if joined(name or "-") else "none"}
            axes.plot(line[x], line[y], color=colour, label=name or "others", markersize=4, **kept)
            if name and bounds and len(sure := line.dropna(subset=[*bounds])):
                ends = [sure[end].clip(own[y].min() - 9, own[y].max() + 9) for end in bounds]
                kind = {"alpha": 0.1, "linewidth": 0} if band else {"linewidth": 1}
                (axes.fill_between if band else axes.vlines)(sure[x], *ends, color=colour, **kind)
        axes.set_title("\n".join(textwrap.wrap(", ".join(filter(None, map(named, key))), 34)))
        axes.set_xlabel(labels[0] if labels[0] != "axis" else AXES[own["axis"].iloc[0]])
        if log:
            axes.set(**{f"{axis}scale": "log" for axis in log})
        if zero:
            axes.axhline(0, color=plot.GREY, linewidth=1)
        if late is not None and (values := [*own[y][late.reindex(own.index)], *[0.0] * zero]):
            axes.set_ylim(around(values, 0.2 if zero else 0.05))
        if then:
            then(axes, own, lambda name: look.get(name, REST))
        si_ticks(axes.xaxis)
        if "y" in log:
            si_ticks(axes.yaxis)
    for axes in made[len(groups) :]:
        axes.set_visible(False)
    below = legend(figure)
    height = HEIGHT * rows + below
    figure.set_figheight(height)
    figure.supylabel(labels[1], fontsize=9.5, x=0.005)
    edges = {"left": 0.72 / WIDTH, "right": 1 - 0.1 / WIDTH, "top": 1 - 0.4 / height, "bottom": (below + 0.5) / height}
    figure.subplots_adjust(**edges, hspace=0.9 / (HEIGHT - 0.9), wspace=0.26)
    return figure


def _broken(lines: Sequence[pd.DataFrame], x: str, y: str) -> pd.DataFrame:
    """Many lines as one, with gaps between them."""
    gap = pd.DataFrame({x: [np.nan], y: [np.nan]})
    return pd.concat([part for line in lines for part in (line[[x, y]], gap)])


def legend(figure: "Figure") -> float:
    """One legend of all panels below them, what is grey at its end; returns its height in inches."""
    found = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label if len(label) < 72 else f"{label[:70]}…": handle for handle, label in found}
    names = sorted(handles, key=lambda name: name == "others")
    columns = max(1, min(len(names), 4, 80 // (max(map(len, names), default=1) + 8)))  # of letters in the page's width
    figure.legend([handles[name] for name in names], names, loc="lower center", ncols=columns)
    return 0.18 * -(-len(names) // columns) + 0.1


def around(values: Iterable[float], share: float) -> tuple[float, float]:
    """Bounds of an axis that show all values, with a share of their range to either side."""
    low, high = min(values), max(values)
    pad = share * (high - low) + 1e-3
    return low - pad, high + pad


def si_ticks(axis) -> None:
    """Numbers as 442k; on a logarithmic axis at 1, 2 and 5, closer where it is short, at 1 and 3 where it is long."""
    from matplotlib import ticker

    axis.set_major_formatter(ticker.FuncFormatter(_si))
    axis.set_major_locator(ticker.MaxNLocator(5))
    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        wide = high / low
        steps = [1, 2, 5] if wide > 5 else [1, 1.5, 2, 3, 4, 6, 8] if wide > 2 else list(np.arange(1, 10, 0.5))
        axis.set_major_locator(ticker.LogLocator(10, subs=[1, 3] if wide > 30 else steps))
        axis.set_minor_formatter(ticker.NullFormatter())
        axis.set_minor_locator(ticker.NullLocator())


def _si(value: float, _) -> str:
    return style.si(value)
