"""What the figures of a report share: the look of each variant, panels, and saving as SVG, PNG and CSV.

Colours are Okabe and Ito's; every variant also has a marker and a dash of its own, for colour-blind readers and print.
"""

import re
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from steppe.scripts.report import analysis as an
from steppe.scripts.report import groups as gr

_STYLES = {
    "adamw": ("#000000", "o", "-"),
    "sam": ("#D55E00", "s", "--"),
    "functional_sam": ("#0072B2", "^", "-."),
    "logit_sam": ("#E69F00", "v", (0, (4, 1, 1, 1, 1, 1))),
    "precond_sam": ("#CC79A7", "D", (0, (5, 2))),
    "precond_functional_sam": ("#009E73", "P", (0, (1, 1))),
    "msam": ("#56B4E9", "X", (0, (3, 1, 1, 1))),
}
_SPARE = [
    ("#999999", "<", "--"),
    ("#7A5C00", ">", "-."),
    ("#004D40", "*", ":"),
    ("#8B0000", "h", "-"),
    ("#4B0082", "p", "--"),
]
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "path",
}


class Drawing(NamedTuple):
    """name: stem of its files. alt: what it shows, in words. rows: the data, one dict a point."""

    name: str
    title: str
    caption: str
    alt: str
    figure: object
    rows: list[dict]


def styled():
    """The context in which figures are made and saved."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def styles(study: gr.Study) -> dict[str, tuple]:
    """{variant: (colour, marker, dash)}; the seven methods of the study always look alike."""
    spare, found = list(_SPARE), {}
    for name in study.variants:
        known = _STYLES.get(name)
        found[name] = known if known else spare[len(found) % len(spare)]
        if not known:
            spare.remove(found[name])
            spare = spare or list(_SPARE)
    return found


def save(drawing: Drawing, directory: Path) -> str:
    """Writes NAME.png and returns the figure as an <svg> element that stands alone in a page."""
    import matplotlib

    # ids differ between figures, not between calls
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": drawing.name}):
        drawing.figure.savefig(directory / f"{drawing.name}.png", dpi=140)
        drawing.figure.set_layout_engine("none")  # it stays as it has been laid out
        text = StringIO()
        drawing.figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # within HTML the namespaces are known; ids of glyphs are shared by all figures and mean the same in each
    return re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)


def ticker():
    from matplotlib import ticker

    return ticker


def grid(places: list[tuple], width: float, height: float, sharey=False):
    """(figure, {(row, column): axes}) with a panel for each place; empty corners stay empty."""
    from matplotlib.figure import Figure

    down, across = (list(dict.fromkeys(place[axis] for place in places)) for axis in (0, 1))
    size = max(width * len(across), 5.5), height * len(down) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    made = figure.subplots(len(down), len(across), squeeze=False, sharey=sharey)
    panels = {}
    for i, row in enumerate(down):
        for j, column in enumerate(across):
            if (row, column) in places:
                panels[row, column] = made[i, j]
            else:
                made[i, j].set_visible(False)
    return figure, panels


def places(wanted: list[tuple]) -> list[tuple]:
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
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=min(4, len(labels)))


def series(count: int) -> list[tuple]:
    known = [style for name, style in _STYLES.items() if name != "logit_sam"]
    return [known[i % len(known)] for i in (*range(1, count + 1),)]


def si_ticks(axis) -> None:
    """Numbers as 442k; on a logarithmic axis at 1, 2 and 5, or closer where it is short."""
    formats = ticker()
    axis.set_major_formatter(formats.FuncFormatter(lambda value, _: an.si(value)))
    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        wide = high / low
        steps = (1, 2, 5) if wide > 5 else (1, 1.5, 2, 3, 4, 6, 8) if wide > 2 else np.arange(1, 10, 0.5)
        axis.set_major_locator(formats.LogLocator(10, subs=[1] if wide > 300 else steps))
        axis.set_minor_formatter(formats.NullFormatter())
        axis.set_minor_locator(formats.NullLocator())
    else:
        axis.set_major_locator(formats.MaxNLocator(5))
