"""The figures of what curvature and retention measured of runs, each of a frame."""

import pandas as pd

from steppe.lm import plot
from steppe.scripts import style
from steppe.scripts.report import drawing as dr
from steppe.scripts.report.numbers import analysis as an
from steppe.scripts.report.numbers import statistics as st

PART = 4  # measures in one drawing
MARKED = 4  # points of a frontier between its markers


def sharpness(source: str, frame: pd.DataFrame, styles: dict) -> list[dr.Drawing]:
    """Held-out loss against each measure, a row a cell, a column a measure; at most PART measures a drawing."""
    names = an.shown(list(dict.fromkeys(frame["measure"])))
    parts = [names[first : first + PART] for first in range(0, len(names), PART)]
    made = [
        _sharpness(source, frame, part, styles, number if len(parts) > 1 else 0) for number, part in enumerate(parts, 1)
    ]
    return [each for each in made if each is not None]


def _sharpness(source: str, frame: pd.DataFrame, names: list[str], styles: dict, number: int) -> dr.Drawing | None:
    frame = frame.assign(measure=an.in_order(frame["measure"], names))[st.finite(frame["loss"])]
    frame = frame.dropna(subset="measure").sort_values(["measure", "cell"], kind="stable")
    if frame.empty:
        return None
    labels = frame["cell"].unique()
    figure, panels = dr.grid([(label, measure) for label in labels for measure in names], 2.7, sharey="row")
    for (label, measure), axes in panels.items():
        own = frame[(frame["cell"] == label) & (frame["measure"] == measure)]
        for name, runs in own.groupby("variant", observed=True):
            colour, marker, _ = styles[name]
            kept = {"linestyle": "none", "label": name, "alpha": 0.85}
            axes.plot(runs["value"], runs["loss"], color=colour, marker=marker, **kept)
        axes.set(xlabel=style.in_words(measure), title=label)
        if own["value"].min() > 0 and own["value"].max() > 10 * own["value"].min():
            axes.set_xscale("log")
        elif len(own):
            axes.xaxis.set_major_locator(dr.ticker().MaxNLocator(4))
    dr.finish(figure, panels, "held-out loss, nats per token")
    return dr.Drawing(
        f"{source}_{number}" if number else source,
        f"Held-out loss beside {source}" + (f", part {number}" if number else ""),
        "One mark a run, all rho and seeds that were measured." + f" {style.INCREASES}" * (source == "retention"),
        f"Held-out loss against {', '.join(map(style.in_words, names))}, a row of panels for each scale and budget.",
        figure, frame[["cell", "variant", "rho", "seed", "measure", "value", "loss"]],
    )  # fmt: skip


def curvature_over_training(frame: pd.DataFrame, styles: dict) -> dr.Drawing | None:
    """Curvature of checkpoints against tokens, a row a cell, a column a measure, a line a run."""
    if frame.empty:
        return None
    labels, measures = (frame[key].unique() for key in ("cell", "measure"))
    figure, panels = dr.grid([(label, measure) for label in labels for measure in measures], 2.7)
    for (label, measure), axes in panels.items():
        own = frame[(frame["cell"] == label) & (frame["measure"] == measure)]
        for (name, _), line in own.groupby(["variant", "run"], sort=False):
            colour, marker, dash = styles[name]
            kept = {"linestyle": dash, "label": name, "alpha": 0.85}
            axes.plot(line["tokens"], line["value"], color=colour, marker=marker, **kept)
        axes.set(xlabel="tokens", title=f"{style.in_words(measure)}\n{label}")
        axes.margins(x=0.08)
        dr.si_ticks(axes.xaxis)
    dr.finish(figure, panels, "of the held-out loss")
    return dr.Drawing(
        "curvature_over_training", "Curvature over training",
        "One line a run, of runs of which several checkpoints were measured. The functional share is that of "
        "|NME ε|² in |GGN ε|² + |NME ε|², ε along the gradient.",
        f"{', '.join(map(style.in_words, measures))} against tokens, a row of panels for each scale and budget.",
        figure, frame,
    )  # fmt: skip


def kept_against_rho(frame: pd.DataFrame) -> dr.Drawing | None:
    """Loss, forgetting and loss in few bits over rho at the best rate, less AdamW's of the same seeds."""
    if frame.empty:
        return None
    styles = style.of_variants(frame["entry"].unique())
    cells, titles = (frame[key].unique() for key in ("cell", "aspect"))
    drawn, panels = dr.grid([(cell, title) for cell in cells for title in titles], 3.2)
    for (cell, title), axes in panels.items():
        own = frame[(frame["cell"] == cell) & (frame["aspect"] == title)]
        if own.empty:
            axes.set_axis_off()
            continue
        for name, line in own.groupby("entry", sort=False):
            colour, marker, dash = styles[name]
            kept = {"markersize": 4, "linestyle": dash, "label": name}
            axes.plot(line["rho"], line["less_adamw"], color=colour, marker=marker, **kept)
            axes.vlines(line["rho"], line["low"], line["high"], color=colour, linewidth=1)
        axes.axhline(0, color="#000000", linewidth=1)
        axes.set(xscale="log", xlabel="rho", title=title if len(cells) == 1 else f"{title}\n{cell}")
        dr.ticks_at(axes.xaxis, sorted(own["rho"].unique()))
    dr.finish(drawn, panels, "less AdamW's, nats per token")
    return dr.Drawing(
        "kept_against_rho", "What is kept, against rho",
        "At each method's best rate, less AdamW's of the same seed and as many tokens (the black line), averages of "
        "weights less AdamW's own: mean over seeds; lines up and down: 95 % intervals where there are several. Below "
        "the line is better.",
        f"Loss and what is kept of it over rho for {len(styles)} entries, less AdamW's.", drawn, frame,
    )  # fmt: skip


def forgetting(frame: pd.DataFrame) -> dr.Drawing | None:
    """What is forgotten against the loss reached on the second text: the frontier of each entry, and less AdamW's."""
    if frame.empty:
        return None
    styles, groups = style.of_variants(frame["entry"].unique()), frame["group"].unique()
    drawn, panels = dr.grid([(group, column) for group in groups for column in ("forgotten", "less_adamw")], 3.8)
    for (group, column), axes in panels.items():
        for name, own in frame[frame["group"] == group].groupby("entry", sort=False):
            colour, marker, dash = styles[name]
            line, kept = own.dropna(subset=column), {"marker": marker, "markevery": MARKED, "markersize": 4}
            axes.plot(line["second_loss"], line[column], color=colour, linestyle=dash, label=name, **kept)
            if column == "less_adamw" and len(line) and (line["n"] > 2).all():
                bounds = line["low"], line["high"]
                axes.fill_between(line["second_loss"], *bounds, color=colour, alpha=0.1, linewidth=0)
        label = {"forgotten": "forgotten", "less_adamw": "less AdamW's"}[column]
        axes.set(xlabel="loss on the second text, nats a token", ylabel=f"{label}, nats a token")
        axes.set_title(group if len(groups) > 1 else "")
        axes.invert_xaxis()
        if column == "less_adamw":
            axes.axhline(0, color=plot.GREY, linewidth=1)
    dr.finish(drawn, panels, "")
    return dr.Drawing(
        "forgetting", "What fine-tuning costs on the first text",
        "Left: the least that any learning rate and length forgets where the second text reaches a loss, mean over "
        "seeds; fine-tuning goes from left to right. Right: less AdamW's of as many tokens, paired by seed; bands: "
        "95 % intervals of three pairs or more.",
        f"Forgetting against the loss on a second text for {len(frame.groupby(['group', 'entry']))} entries.",
        drawn, frame.drop(columns="n"),
    )  # fmt: skip
