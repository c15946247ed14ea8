"""The figures of a report: each is a frame and how its columns are drawn."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from steppe.scripts import style
from steppe.scripts.report import drawing as dr
from steppe.scripts.report.numbers import analysis as an
from steppe.scripts.report.numbers import statistics as st

_LATE = 0.4  # share of training after which losses are in the frame
_PART = 4  # measures in one drawing
_LOSS = "held-out loss, nats per token"


def _drawing(
    name: str, title: str, caption: str, frame: pd.DataFrame, styles: dict, seen: pd.DataFrame | None = None, **mapping
) -> dr.Drawing | None:
    """A drawing of a frame, or of what is `seen` of it; None of none."""
    if frame.empty:
        return None
    drawn = frame if seen is None else seen
    over, names = mapping["labels"], dict.fromkeys(map(str, drawn[mapping.get("by", "variant")]))
    alt = f"{title}: {over[1]} against {over[0] or 'the measure'}, of {', '.join([*names][: dr.NAMED])}"
    return dr.Drawing(name, title, caption, alt, dr.panels(drawn, styles, **mapping), frame)


def _over(frame: pd.DataFrame, key: str, steady: bool) -> pd.DataFrame:
    """A row a point and axis: tokens, FLOPs, and seconds where runs that do the same take the same; by key and axis."""
    used = [axis for axis in dr.AXES if (frame[axis] > 0).all() and (steady or axis != "seconds")]
    kept = [column for column in frame if column not in dr.AXES]
    long = frame.melt(kept, used, "axis", "at")
    order = {each: pd.Categorical(long[each], names) for each, names in ((key, frame[key].unique()), ("axis", used))}
    return long.assign(**order).sort_values([key, "axis", "at"], kind="stable", ignore_index=True)


def _axis_aside(key: str) -> str:
    return "" if key in dr.AXES else str(key)


def loss_against_rho(frame: pd.DataFrame, styles: dict) -> dr.Drawing | None:
    """Mean loss over rho, a panel a cell; diverged runs as crosses on top, AdamW as a line and a band."""
    if frame.empty:
        return None
    keys = ["cell", "variant", "rho"]
    perturbed = frame[frame["rho"] > 0]
    diverged = perturbed[perturbed["status"] == "diverged"].drop_duplicates(keys)
    known = perturbed[st.finite(perturbed["freed_of_seed"])].merge(diverged[keys], how="left", indicator="apart")
    known = known[known["apart"] == "left_only"]
    known = known[known["chose"] | ~known.groupby(keys)["chose"].transform("any")]
    means = known.groupby(keys, sort=False)["freed_of_seed"].mean().reset_index(name="mean").sort_values("rho")
    means = means.assign(cell=pd.Categorical(means["cell"], frame["cell"].unique())).sort_values("cell", kind="stable")

    def then(axes, own: pd.DataFrame, look) -> None:
        cell = own["cell"].iloc[0]
        best = own.loc[own.groupby("variant")["mean"].idxmin()]
        for row in best.itertuples():
            axes.plot(row.rho, row.mean, look(row.variant)[1], color=look(row.variant)[0], ms=9, mec="black")
        base = frame[(frame["cell"] == cell) & (frame["rho"] == 0) & st.finite(frame["freed_of_seed"])]
        seen = [*best["mean"]]
        for name, runs in base.groupby("variant", sort=False):
            middle, noise = runs["freed_of_seed"].mean(), np.nan_to_num(runs["noise"].iloc[0])
            label = "others" if look(name) == dr.REST else name
            axes.axhline(middle, color=look(name)[0], label=label, linewidth=1.2)
            axes.axhspan(middle - noise, middle + noise, color="#000000", alpha=0.12, linewidth=0)
            seen += [middle - noise, middle + noise]
        # a method far off at large rho must not flatten what is near AdamW
        top = max(seen) + max(2.5 * (max(seen) - min(seen)), 0.02)
        crosses, above = diverged[diverged["cell"] == cell].assign(mark="x"), own[own["mean"] > top].assign(mark="^")
        outside = pd.concat([crosses, above])[["rho", "variant", "mark"]]
        for row, below in zip(outside.itertuples(), outside.groupby("rho").cumcount(), strict=True):
            where = {"transform": axes.get_xaxis_transform(), "markersize": 6, "markerfacecolor": "white"}
            axes.plot([row.rho], [0.965 - 0.055 * below], row.mark, color=look(row.variant)[0], **where)
        least, most = min(seen), max([*seen, *own.loc[own["mean"] <= top, "mean"]])
        room = 0.1 + 0.06 * outside.groupby("rho").size().max() if len(outside) else 0.06
        axes.set_ylim(least - 0.06 * (most - least) - 1e-4, most + room * (most - least) + 1e-4)

    return _drawing(
        "loss_against_rho", "Held-out loss against rho",
        "Mean over the seeds that every rho has, each less its seed's own level; large mark: the best. Line and band: "
        "AdamW and the noise of a difference. Cross: diverged; triangle: above the frame.",
        frame, styles, means, x="rho", y="mean", labels=("rho", _LOSS), log="x", then=then,
    )  # fmt: skip


def best_rho(frame: pd.DataFrame, laws: Mapping, names: Sequence[str]) -> dr.Drawing | None:
    """Best rho against parameters, a panel a name, with the fitted power law and its band."""
    frame = frame[frame["tried"] > 1] if len(frame) else frame
    if frame.empty:
        return None
    sizes = frame.groupby("variant")["parameters"].nunique()
    names = [name for name in names if sizes.get(name, 0) > 1] or [name for name in names if name in sizes]
    frame = frame[frame["variant"].isin(names)]
    styles = dict(zip(families := frame["family"].unique(), style.series(len(families)), strict=True))
    seen = frame.assign(variant=pd.Categorical(frame["variant"], names)).sort_values("variant", kind="stable")

    def then(axes, own: pd.DataFrame, look) -> None:
        for family, rows in own.groupby("family"):
            colour, marker, dash = look(family)
            bounded, open_ = rows[st.finite(rows["optimum_low"])], rows[rows["state"] != "inside"]
            low = bounded["optimum_low"].clip(bounded["least"] / 2)
            high = bounded["optimum_high"].clip(None, bounded["most"] * 2)
            axes.vlines(bounded["parameters"], low, high, color=colour, linewidth=1)
            axes.plot(open_["parameters"], open_["optimum"], marker, color=colour, markerfacecolor="white", ms=4)
            if law := laws.get((family, own["variant"].iloc[0])):
                fitted = rows.loc[rows["state"] == "inside", "parameters"]
                x = np.geomspace(fitted.min(), fitted.max(), 50)
                line, low, high = st.power_law_band(law, x)
                if np.isfinite(low).all():  # a line through two points says nothing
                    axes.plot(x, line, color=colour, linestyle=dash)
                    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.set_ylim(own["least"].min() / 1.6, own["most"].max() * 1.6)

    of = {"family": "budget", "optimum": "rho", "optimum_low": "low", "optimum_high": "high", "state": "status"}
    shown = frame.drop(columns=["budget", "status"]).rename(columns=of)
    return _drawing(
        "best_rho", "Best rho against parameters",
        "Filled: minimum of a parabola in log rho with Fieller's 95 % interval; hollow: best of a grid that does not "
        "bracket it, left out of the fit. Line and band: power law a N^b, 95 %.",
        shown[["variant", "budget", "scale", "parameters", "rho", "low", "high", "status"]], styles, seen,
        x="parameters", y="optimum", by="family", panel=["variant"], joined=lambda name: False, log="xy",
        labels=("non-embedding parameters", "best rho"), then=then,
    )  # fmt: skip


def frontier(frame: pd.DataFrame, styles: dict, steady: bool) -> dr.Drawing | None:
    """Final loss against tokens, FLOPs and seconds, a row of panels a scale: AdamW's budgets joined by a line."""
    return None if frame.empty else _drawing(
        "frontier", "Final loss against its cost",
        "A mark a method and budget, at its best rho: mean and range of seeds, freed of their levels. AdamW's budgets "
        "are joined: a method below that line at the same FLOPs is worth its cost.",
        frame, styles, _over(frame, "scale", steady), x="at", y="loss", panel=["scale", "axis"], log="x",
        bounds=["lowest", "highest"], joined=lambda name: name.split(",")[0] == "adamw", labels=("axis", _LOSS),
        named=_axis_aside,
    )  # fmt: skip


def curves(frame: pd.DataFrame, styles: dict, steady: bool) -> dr.Drawing | None:
    """Held-out loss during training against tokens, FLOPs and seconds, mean over seeds at the best rho."""
    if frame.empty:
        return None
    long = _over(frame, "panel", steady)
    long["variant"] = long["variant"] + np.where(long["aside"], ", longer", "")
    longer = {f"{name}, longer": (colour, marker, "--") for name, (colour, marker, _) in styles.items()}
    return _drawing(
        "curves", "Held-out loss during training",
        "At the best rho, mean over the seeds that all have; longer: AdamW for the FLOPs of two passes. Rates fall to "
        "their end at each run's last step: only last points of different lengths compare.",
        frame.drop(columns="aside"), styles | longer, long, x="at", y="loss", panel=["panel", "axis"], marks=False,
        late=long["share"] >= _LATE, labels=("axis", _LOSS), named=_axis_aside,
    )  # fmt: skip


def differences(frame: pd.DataFrame, styles: dict) -> dr.Drawing | None:
    """Held-out loss less AdamW's of the same seed during training, at the best rho: mean and interval over seeds."""
    return None if frame.empty else _drawing(
        "differences", "Difference to AdamW during training",
        "Of the same seed and step, at the best rho, mean with 95 % band; averages less AdamW's average. What counts "
        "is the end, where the learning rate has fallen. Below zero is better.",
        frame, styles, x="tokens", y="difference", bounds=["difference_low", "difference_high"], band=True, zero=True,
        marks=False, late=frame["share"] >= _LATE, labels=("tokens", "less AdamW's, nats per token"),
    )  # fmt: skip


def scaling(frame: pd.DataFrame) -> dr.Drawing | None:
    """Final loss against tokens with the fitted L(N, D), a panel a name."""
    if frame.empty:
        return None
    seen = frame.assign(size=[f"{style.si(number)} parameters" for number in frame["parameters"]])
    styles = dict(zip(sizes := seen["size"].unique(), style.series(len(sizes)), strict=True))

    def then(axes, own: pd.DataFrame, look) -> None:
        for size, runs in own.groupby("size"):
            axes.plot(runs["tokens"], runs["fitted"], color=look(size)[0], linestyle=look(size)[2])

    return _drawing(
        "scaling_law", "Scaling law L(N, D) = E + A/N^a + B/D^b", "Marks: runs at the best rho; lines: the fit.",
        frame, styles, seen, x="tokens", y="loss", by="size", panel=["variant"], joined=lambda name: False, log="x",
        labels=("tokens", _LOSS), then=then,
    )  # fmt: skip


def sharpness(source: str, frame: pd.DataFrame, styles: dict) -> list[dr.Drawing | None]:
    """Held-out loss against each measure, a panel a cell and measure; at most _PART measures a drawing."""
    names = an.shown(list(dict.fromkeys(frame["measure"])))
    parts = [names[first : first + _PART] for first in range(0, len(names), _PART)]
    known = frame[st.finite(frame["loss"])]
    found = []
    for number, part in enumerate(parts, 1):
        own = known.assign(measure=an.in_order(known["measure"], part)).dropna(subset="measure")
        own = own.sort_values(["measure", "cell"], kind="stable")
        several = f", part {number}" if len(parts) > 1 else ""
        shown = own[["cell", "variant", "rho", "seed", "measure", "value", "loss"]]
        found.append(
            _drawing(
                f"{source}_{number}" if several else source, f"Held-out loss against {source}{several}",
                "One mark a run, of all rho and seeds measured." + f" {style.INCREASES}" * (source == "retention"),
                shown, styles, x="value", y="loss", panel=["cell", "measure"], joined=lambda name: False,
                labels=("", _LOSS), named=_measure_named,
            )
        )  # fmt: skip
    return found


def _measure_named(key: str) -> str:
    return style.in_words(key) if "," not in key else key


def curvature_over_training(frame: pd.DataFrame, styles: dict) -> dr.Drawing | None:
    """Curvature of checkpoints against tokens, a panel a cell and measure, a line a run."""
    return None if frame.empty else _drawing(
        "curvature_over_training", "Curvature over training",
        "One line a run, of runs of which several checkpoints were measured. The functional share is that of |NME ε|² "
        "in |GGN ε|² + |NME ε|², ε along the gradient.",
        frame, styles, x="tokens", y="value", panel=["cell", "measure"], each=["run"],
        labels=("tokens", "of the held-out loss"), named=_measure_named,
    )  # fmt: skip


def kept_against_rho(frame: pd.DataFrame, styles: dict) -> dr.Drawing | None:
    """Loss, forgetting and loss in few bits over rho at the best rate, less AdamW's of the same seeds."""
    return None if frame.empty else _drawing(
        "kept_against_rho", "Kept of the loss, against rho",
        "At each method's best rate, less AdamW's of the same seed and tokens (the line at zero), averages less "
        "AdamW's own: mean over seeds with 95 % intervals. Below zero is better.",
        frame, styles, x="rho", y="less_adamw", by="entry", panel=["cell", "aspect"], bounds=["low", "high"], log="x",
        zero=True, labels=("rho", "less AdamW's, nats per token"),
    )  # fmt: skip


def forgetting(frame: pd.DataFrame, styles: dict) -> dr.Drawing | None:
    """Forgotten against the loss reached on the second text: the frontier of each entry, and less AdamW's."""
    if frame.empty:
        return None
    sure = frame["n"].where(frame["n"] > 2) * 0
    parts = {"forgotten": frame["forgotten"], "forgotten less AdamW's": frame["less_adamw"]}
    seen = pd.concat([frame.assign(kind=kind, y=values, low=frame["low"] + sure) for kind, values in parts.items()])
    order = {each: pd.Categorical(seen[each], seen[each].unique()) for each in ("group", "kind")}
    seen = seen.assign(**order).sort_values(["group", "kind"], kind="stable", ignore_index=True)
    seen.loc[seen["kind"] == "forgotten", "low"] = math.nan
    return _drawing(
        "forgetting", "Cost of fine-tuning on the first text",
        "The least that any rate and length forgets where the second text reaches a loss, mean over seeds, and less "
        "AdamW's of as many tokens with 95 % bands of three pairs or more. Fine-tuning goes to the right.",
        frame.drop(columns="n"), styles, seen, x="second_loss", y="y", by="entry", panel=["group", "kind"],
        bounds=["low", "high"], band=True, marks=False,
        labels=("loss on the second text, nats a token", "nats a token"),
        then=lambda axes, own, look: axes.invert_xaxis(),
    )  # fmt: skip
