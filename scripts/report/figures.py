"""The figures of a report, each of a frame, with a text for those who do not see it."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from steppe.scripts import style
from steppe.scripts.report import drawing as dr
from steppe.scripts.report.numbers import statistics as st

_AXES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}
_LATE = 0.4  # share of training after which losses are in the frame


def _axes(frame: pd.DataFrame, steady: bool) -> list[str]:
    """What losses are drawn against: what is known of all rows; seconds where runs that do the same take the same."""
    return [axis for axis in _AXES if (frame[axis] > 0).all() and (steady or axis != "seconds")]


def _listed(used: Sequence[str]) -> str:
    names = [_AXES[axis] for axis in used]
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def loss_against_rho(frame: pd.DataFrame, styles: dict) -> dr.Drawing | None:
    """Mean loss over rho, a panel a cell; diverged runs as crosses on top, AdamW as a line and a band."""
    if frame.empty:
        return None
    places = dr.spread([*frame[["budget", "scale"]].drop_duplicates().itertuples(index=False, name=None)])
    figure, panels = dr.grid(places, 3.2)
    for (label, own), place in zip(frame.groupby("cell", sort=False), places, strict=True):
        axes = panels[place]
        _rho_panel(axes, own, styles)
        axes.set(xscale="log", xlabel="rho", title=label)
        axes.margins(x=0.04)
        tried = sorted(own.loc[(own["rho"] > 0) & own["loss"].notna(), "rho"].unique())
        dr.ticks_at(axes.xaxis, tried) if len(tried) <= 8 else dr.si_ticks(axes.xaxis)
    dr.finish(figure, panels, "held-out loss, nats per token")
    worst = sorted(frame.loc[frame["status"] == "diverged", "variant"].unique())
    return dr.Drawing(
        "loss_against_rho", "Held-out loss against rho",
        "At each method's best peak rate. Losses are freed of their seed's own level: AdamW's mean plus the difference "
        "to AdamW of the same seed (an average's to the same average of AdamW). Line: "
        "mean over the seeds that every rho of the method has; large mark: its best rho; small marks: further seeds. "
        "Black line: AdamW's mean; grey band: one standard deviation of a single such difference to either side, from "
        "the noise between seeds. Cross at the upper edge: a run at that rho diverged; hollow triangle there: its loss "
        "is above the frame.",
        f"Held-out loss against rho in {len(places)} panels, one for each scale and budget, a line for each method. "
        + (f"Diverged at some rho: {', '.join(worst)}." if worst else "No run with a rho diverged."),
        figure, frame,
    )  # fmt: skip


def _rho_panel(axes, frame: pd.DataFrame, styles: dict) -> None:
    known = frame[st.finite(frame["freed_of_seed"])]
    seen, above = [], {}

    def on_top(rho: float, **mark) -> None:
        """Marks of one rho hang below each other."""
        above[rho] = above.get(rho, 0) + 1
        axes.plot(
            [rho], [1.02 - 0.055 * above[rho]], markersize=6, linestyle="none", transform=axes.get_xaxis_transform(),
            zorder=5, **mark,
        )  # fmt: skip

    for name, own in known[known["rho"] == 0].groupby("variant", sort=False):
        middle, noise = own["freed_of_seed"].mean(), own["noise"].iloc[0]
        axes.axhline(middle, color=styles[name][0], linewidth=1.2, label=name)
        seen.append(middle)
        if math.isfinite(noise):
            axes.axhspan(middle - noise, middle + noise, color="#000000", alpha=0.12, linewidth=0)
            seen += [middle - noise, middle + noise]
    diverged = frame[(frame["status"] == "diverged") & (frame["rho"] > 0)].drop_duplicates(["variant", "rho"])
    for row in diverged.itertuples():
        on_top(row.rho, color=styles[row.variant][0], marker="x", markeredgewidth=1.8)
    lines = known[known["rho"] > 0].merge(diverged[["variant", "rho"]], how="left", indicator="apart")
    lines = lines[lines["apart"] == "left_only"]
    means = {
        name: own[own["chose"] | ~own.groupby("rho")["chose"].transform("any")].groupby("rho")["freed_of_seed"].mean()
        for name, own in lines.groupby("variant", sort=False)
    }
    for name, mean in means.items():
        colour, marker, dash = styles[name]
        axes.plot([mean.idxmin()], [mean.min()], color=colour, marker=marker, markersize=9, markeredgecolor="black")
        seen.append(mean.min())
    few = lines[lines.groupby(["variant", "rho"])["seed"].transform("size") > 1]
    for name, mean in means.items():
        colour, marker, dash = styles[name]
        axes.plot(mean.index, mean, color=colour, marker=marker, linestyle=dash, label=name)
        marks = few[few["variant"] == name]
        kept = {"markersize": 2.5, "linestyle": "none", "alpha": 0.6}
        axes.plot(marks["rho"], marks["freed_of_seed"], color=colour, marker=marker, **kept)
    if not seen:
        return
    # a method far off at large rho must not flatten what is near AdamW
    top = max(seen) + max(2.5 * (max(seen) - min(seen)), 0.02)
    for name, mean in means.items():
        for rho in mean.index[mean > top]:
            on_top(rho, marker="^", markerfacecolor="white", markeredgecolor=styles[name][0])
    shown = pd.concat([pd.Series(seen), *means.values(), few["freed_of_seed"]])
    least, most = shown.min(), shown[shown <= top].max()
    room = (0.16 + 0.05 * max(above.values(), default=0)) * (most - least)
    axes.set_ylim(least - 0.06 * (most - least) - 1e-4, most + room + 1e-4)


def best_rho(frame: pd.DataFrame, laws: Mapping, names: Sequence[str]) -> dr.Drawing | None:
    """Best rho against parameters, a panel a name, with the fitted power law and its band."""
    frame = frame[frame["tried"] > 1] if len(frame) else frame
    if frame.empty:
        return None
    marks = dict(zip(families := frame["family"].unique(), style.series(len(families)), strict=True))
    sizes = frame.groupby("variant")["parameters"].nunique()
    names = [name for name in names if sizes.get(name, 0) > 1] or [name for name in names if name in sizes]
    frame = frame[frame["variant"].isin(names)]
    columns = min(3, len(names))
    figure, panels = dr.grid([(i // columns, i % columns) for i in range(len(names))], 3.1)
    for name, axes in zip(names, panels.values(), strict=True):
        own = frame[frame["variant"] == name]
        for number, (family, (colour, marker, dash)) in enumerate(marks.items()):
            aside = 1.06 ** (number - (len(marks) - 1) / 2)  # marks of one size stand beside each other
            rows = own[own["family"] == family]
            bounded = rows[st.finite(rows["optimum_low"])]
            axes.vlines(
                bounded["parameters"] * aside, bounded["optimum_low"].clip(lower=bounded["least"] / 2),
                bounded["optimum_high"].clip(upper=bounded["most"] * 2), color=colour, linewidth=1,
            )  # fmt: skip
            for inside, filled in rows.groupby(rows["state"] == "inside"):
                axes.plot(
                    filled["parameters"] * aside, filled["optimum"], color=colour, marker=marker, linestyle="none",
                    markerfacecolor=colour if inside else "white",
                )  # fmt: skip
            if law := laws.get((family, name)):
                fitted = rows.loc[rows["state"] == "inside", "parameters"]
                x = np.geomspace(fitted.min() / 1.3, fitted.max() * 1.3, 50)
                line, low, high = st.power_law_band(law, x)
                if np.isfinite(low).all():  # a line through two points says nothing
                    axes.plot(x, line, color=colour, linestyle=dash, marker="none")
                    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            if len(rows):
                axes.plot([], [], color=colour, marker=marker, linestyle=dash, label=family)
        axes.set(xscale="log", yscale="log", xlabel="non-embedding parameters", title=name)
        axes.set_ylim(own["least"].min() / 1.6, own["most"].max() * 1.6)
        axes.set_xlim(frame["parameters"].min() / 1.4, frame["parameters"].max() * 1.4)
        dr.si_ticks(axes.xaxis)
        dr.si_ticks(axes.yaxis)
    dr.finish(figure, panels, "best rho")
    names_of = {"family": "budget", "optimum": "rho", "optimum_low": "low", "optimum_high": "high", "state": "status"}
    shown = frame.drop(columns=["budget", "status"]).rename(columns=names_of)
    return dr.Drawing(
        "best_rho", "Best rho against parameters",
        "Filled: the minimum of a parabola in log rho, with its 95 % Fieller interval. Hollow: "
        "the best rho of the grid, where its minimum is not bracketed (at the edge, beside a diverged or pruned rho, "
        "no minimum); left out of the fit. Line and band: power law a N^b and its pointwise 95 % interval. The "
        "frame is the grid that was tried; marks of one size are drawn side by side.",
        f"Best rho against non-embedding parameters, a panel for each of {len(names)} methods; "
        f"{(frame['state'] == 'inside').sum()} of {len(frame)} optima lie inside their grids.",
        figure, shown[["variant", "budget", "scale", "parameters", "rho", "low", "high", "status"]],
    )  # fmt: skip


def frontier(frame: pd.DataFrame, styles: dict, steady: bool) -> dr.Drawing | None:
    """Final loss against tokens, FLOPs and seconds, a row of panels a scale: AdamW's budgets joined by a line."""
    if frame.empty:
        return None
    used, scales = _axes(frame, steady), frame["scale"].unique()
    figure, panels = dr.grid([(scale, axis) for scale in scales for axis in used], 3, sharey="row")
    for (scale, axis), axes in panels.items():
        own = frame[frame["scale"] == scale].sort_values(axis)
        for name in [name for name in styles if name in set(own["variant"])]:
            points, (colour, marker, dash) = own[own["variant"] == name], styles[name]
            joined = dash if name.split(",")[0] == "adamw" else "none"
            axes.vlines(points[axis], points["lowest"], points["highest"], color=colour, linewidth=1)
            axes.plot(points[axis], points["loss"], color=colour, marker=marker, linestyle=joined, label=name)
        axes.set(xscale="log", xlabel=_AXES[axis], title=scale)
        axes.set_xlim(own[axis].min() / 1.1, own[axis].max() * 1.1)
        dr.si_ticks(axes.xaxis)
    dr.finish(figure, panels, "held-out loss, nats per token")
    return dr.Drawing(
        "frontier", f"Final loss against {_listed(used)}",
        "One mark a method and budget, at its best rho: mean over seeds, line from the lowest seed to the highest, "
        "each freed of its seed's own level where AdamW has that seed. "
        "AdamW's budgets are joined: a method below that line at the same FLOPs is worth its cost, one above is not."
        + " Seconds: of training, as measured, median over all runs of a method and budget." * ("seconds" in used),
        f"Final held-out loss against {_listed(used)} for {len(scales)} scales, AdamW's budgets "
        "joined by a line.",
        figure, frame,
    )  # fmt: skip


def curves(frame: pd.DataFrame, styles: dict, steady: bool) -> dr.Drawing | None:
    """Held-out loss during training against tokens, FLOPs and seconds, mean over seeds at the best rho."""
    if frame.empty:
        return None
    used, labels = _axes(frame, steady), frame["panel"].unique()
    figure, panels = dr.grid([(label, axis) for label in labels for axis in used], 2.8, sharey="row")
    for (label, axis), axes in panels.items():
        own = frame[frame["panel"] == label]
        for (name, aside, _), line in own.groupby(["variant", "aside", "budget"], sort=False):
            colour, marker, dash = styles[name]
            kind = {"label": f"{name}, longer", "linestyle": "--", "markerfacecolor": "white"} if aside else {}
            kind = {"label": name, "linestyle": dash, **kind}
            axes.plot(line[axis], line["loss"], color=colour, marker=marker, markersize=3.5, **kind)
        axes.set(xlabel=_AXES[axis], title=label, ylim=dr.around(own.loc[own["share"] >= _LATE, "loss"], 0.05))
        axes.set_xlim(left=0)
        dr.si_ticks(axes.xaxis)
    dr.finish(figure, panels, "held-out loss, nats per token")
    return dr.Drawing(
        "curves", "Held-out loss during training",
        "At the best rho, mean over the seeds that all methods of a panel have; hollow: AdamW trained longer, for the "
        "FLOPs of the two-pass methods. The learning rate falls to its end only at each run's last step, so only last "
        "points of different lengths may be compared. The frame shows what lies after four tenths of training.",
        f"Held-out loss during training against {_listed(used)} in {len(labels)} panels of scale and budget.",
        figure, frame.drop(columns="aside"),
    )  # fmt: skip


def differences(frame: pd.DataFrame, styles: dict) -> dr.Drawing | None:
    """Held-out loss less AdamW's of the same seed during training, at the best rho: mean and interval over seeds."""
    if frame.empty:
        return None
    labels = frame["cell"].unique()
    places = dr.spread([(0, label) for label in labels])
    figure, panels = dr.grid(places, 3.2)
    for (label, own), place in zip(frame.groupby("cell", sort=False), places, strict=True):
        axes = panels[place]
        for name, line in own.groupby("variant", sort=False):
            colour, marker, dash = styles[name]
            kept = {"markersize": 3, "linestyle": dash, "label": name}
            axes.plot(line["tokens"], line["difference"], color=colour, marker=marker, **kept)
            if st.finite(line["difference_high"]).all():
                bounds = line["difference_low"], line["difference_high"]
                axes.fill_between(line["tokens"], *bounds, color=colour, alpha=0.1, linewidth=0)
        axes.axhline(0, color="#000000", linewidth=1)
        late = own.loc[own["share"] >= _LATE, "difference"]
        axes.set(xlabel="tokens", title=label, ylim=dr.around([*late, 0.0], 0.3))
        axes.set_xlim(left=0)
        dr.si_ticks(axes.xaxis)
    dr.finish(figure, panels, "held-out loss less AdamW's, nats per token")
    return dr.Drawing(
        "differences", "Difference to AdamW during training",
        "Of the same seed at the same step, at the best rho: mean over the seeds by which the tables compare, AdamW at "
        "its best; bands: 95 % intervals. Averages of the weights are held against AdamW's own average. Below zero is "
        "better; what counts is the end, where the learning rate has fallen. The frame shows what lies after four "
        "tenths of training.",
        f"Held-out loss less AdamW's during training, in {len(labels)} panels of scale and budget.", figure, frame,
    )  # fmt: skip


def scaling(frame: pd.DataFrame, laws: Mapping[str, st.ScalingLaw]) -> dr.Drawing | None:
    """Final loss against tokens with the fitted L(N, D), a panel a name."""
    if frame.empty:
        return None
    columns = min(3, len(laws))
    figure, panels = dr.grid([(i // columns, i % columns) for i in range(len(laws))], 3.4)
    for (name, law), axes in zip(laws.items(), panels.values(), strict=True):
        own = frame[frame["variant"] == name].groupby("parameters")
        for (size, runs), (colour, marker, dash) in zip(own, style.series(len(own)), strict=True):
            x = np.geomspace(runs["tokens"].min(), runs["tokens"].max(), 50)
            axes.plot(runs["tokens"], runs["loss"], color=colour, marker=marker, linestyle="none")
            axes.plot(x, st.predict(law, size, x), color=colour, linestyle=dash)
            axes.plot([], [], color=colour, marker=marker, linestyle=dash, label=f"{style.si(size)} parameters")
        axes.set(xscale="log", xlabel="tokens", title=name)
        dr.si_ticks(axes.xaxis)
    dr.finish(figure, panels, "held-out loss, nats per token")
    return dr.Drawing(
        "scaling_law", "Scaling law L(N, D) = E + A/N^a + B/D^b",
        "Marks: runs at the best rho; lines: the fit.",
        f"Final held-out loss against tokens with the fitted scaling law, for {', '.join(laws)}.", figure, frame,
    )  # fmt: skip
