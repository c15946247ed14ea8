"""The figures of a report, each with a text for those who do not see it and the rows that it shows."""

import math

import numpy as np

from steppe.scripts import style
from steppe.scripts.report import drawing as dr
from steppe.scripts.report.numbers import analysis as an
from steppe.scripts.report.numbers import groups as gr
from steppe.scripts.report.numbers import statistics as st

_AXES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training"}


def _axes(study: gr.Study, rows: list[dict]) -> list[str]:
    """What losses are drawn against: what is known of all rows; seconds where runs that do the same take the same."""
    used = [axis for axis in _AXES if all(row[axis] > 0 for row in rows)]
    return [axis for axis in used if axis != "seconds" or an.unsteadiness(study) <= an.STEADY]


def loss_against_rho(study: gr.Study) -> dr.Drawing | None:
    """Mean loss over rho, a panel a cell; diverged runs as crosses on top, AdamW as a line and a band."""
    cells = [cell for cell in study.cells if any(rho > 0 for v in cell.variants.values() for rho in v.losses)]
    if not cells:
        return None
    styles, rows = style.of_variants(study.variants), []
    spread = dr.spread([(cell.budget, cell.scale) for cell in cells])
    figure, panels = dr.grid(spread, 3.2)
    for cell, position in zip(cells, spread, strict=True):
        axes = panels[position]
        _rho_panel(axes, cell, styles, rows)
        axes.set(xscale="log", xlabel="rho", title=cell.label)
        axes.margins(x=0.04)
        tried = {run.rho for run in cell.runs if run.rho > 0 and not math.isnan(run.loss)}
        if len(tried) <= 8:
            dr.ticks_at(axes.xaxis, sorted(tried))
        else:
            dr.si_ticks(axes.xaxis)
    dr.finish(figure, panels, "held-out loss, nats per token")
    worst = sorted({row["variant"] for row in rows if row["status"] == "diverged"})
    return dr.Drawing(
        "loss_against_rho", "Held-out loss against rho",
        "Losses are freed of their seed's own level: AdamW's mean plus the difference to AdamW of the same seed. Line: "
        "mean over the seeds that every rho of the method has; large mark: its best rho; small marks: further seeds. "
        "Black line: AdamW's mean; grey band: one standard deviation of a single such difference to either side, from "
        "the noise between seeds. Cross at the upper edge: a run at that rho diverged; hollow triangle there: its loss "
        "is above the frame.",
        f"Held-out loss against rho in {len(cells)} panels, one for each scale and budget, a line for each method. "
        + (f"Diverged at some rho: {', '.join(worst)}." if worst else "No run with a rho diverged."),
        figure, rows,
    )  # fmt: skip


def _rho_panel(axes, cell: gr.Cell, styles: dict, rows: list[dict]) -> None:
    seen, tops, lines, above = [], [], [], {}

    def on_top(rho: float, **mark) -> None:
        """Marks of one rho hang below each other."""
        above[rho] = above.get(rho, 0) + 1
        axes.plot(
            [rho], [1.02 - 0.055 * above[rho]], markersize=6, linestyle="none", transform=axes.get_xaxis_transform(),
            zorder=5, **mark,
        )  # fmt: skip

    for name, variant in cell.variants.items():
        colour, marker, dash = styles[name]
        means, few, losses = {}, [], {}
        for run in variant.runs:
            value = an.level(cell, variant, run)
            if not math.isnan(run.loss) or run.result.status == "pruned":
                rows.append(
                    {"scale": cell.scale, "budget": cell.budget, "variant": name, "rho": run.rho, "seed": run.seed,
                     "loss": run.loss, "freed_of_seed": value, "status": run.result.status}
                )  # fmt: skip
            if math.isfinite(value):
                losses.setdefault(run.rho, {})[run.seed] = value
        if variant.method == gr.BASE:
            if losses:
                middle, noise = np.mean(list(losses[0.0].values())), math.sqrt(2) * cell.sigma
                axes.axhline(middle, color=colour, linewidth=1.2, label=name)
                seen.append(middle)
                if math.isfinite(noise):
                    axes.axhspan(middle - noise, middle + noise, color="#000000", alpha=0.12, linewidth=0)
                    seen += [middle - noise, middle + noise]
            continue
        for rho, by_seed in sorted(losses.items()):
            chosen = [loss for seed, loss in by_seed.items() if variant.choice and seed in variant.choice.seeds]
            if rho > 0 and math.isfinite(variant.choice.means[rho] if variant.choice else math.nan):
                means[rho] = float(np.mean(chosen or list(by_seed.values())))
                few += [(rho, loss) for loss in by_seed.values() if len(by_seed) > 1]
        if means:
            best = min(means, key=means.get)
            axes.plot([best], [means[best]], color=colour, marker=marker, markersize=9, markeredgecolor="black")
            lines.append((name, means, few))
            seen.append(means[best])
            tops += [(rho, loss, colour) for rho, loss in means.items()]
        for rho, by_seed in variant.losses.items():
            if rho > 0 and math.inf in by_seed.values():
                on_top(rho, color=colour, marker="x", markeredgewidth=1.8)
    for name, means, few in lines:
        colour, marker, dash = styles[name]
        axes.plot(list(means), list(means.values()), color=colour, marker=marker, linestyle=dash, label=name)
        if few:
            axes.plot(*zip(*few, strict=True), color=colour, marker=marker, markersize=2.5, linestyle="none", alpha=0.6)
    if not seen:
        return
    # a method far off at large rho must not flatten what is near AdamW
    top = max(seen) + max(2.5 * (max(seen) - min(seen)), 0.02)
    for rho, loss, colour in tops:
        if loss > top:
            on_top(rho, marker="^", markerfacecolor="white", markeredgecolor=colour)
    shown = [*seen, *(loss for _, loss, _ in tops if loss <= top)]
    shown += [loss for _, _, few in lines for _, loss in few if loss <= top]
    room = (0.16 + 0.05 * max(above.values(), default=0)) * (max(shown) - min(shown))
    axes.set_ylim(min(shown) - 0.06 * (max(shown) - min(shown)) - 1e-4, max(shown) + room + 1e-4)


def best_rho(study: gr.Study, laws: dict) -> dr.Drawing | None:
    """Best rho against parameters, a panel a variant, with the fitted power law and its band."""
    every = an.optima(study)
    if not every:
        return None
    rows = [
        {"variant": name, "budget": family, "scale": cell.scale, "parameters": cell.parameters, "rho": optimum.rho,
         "low": optimum.low, "high": optimum.high, "status": optimum.status}
        for (family, name), pairs in every.items() for cell, optimum in pairs
    ]  # fmt: skip
    families = list(dict.fromkeys(family for family, _ in every))
    marks = dict(zip(families, style.series(len(families)), strict=True))
    sizes = {name: {row["parameters"] for row in rows if row["variant"] == name} for name in study.variants}
    names = [name for name in sizes if len(sizes[name]) > 1] or [name for name in sizes if sizes[name]]
    rows = [row for row in rows if row["variant"] in names]
    columns = min(3, len(names))
    figure, panels = dr.grid([(i // columns, i % columns) for i in range(len(names))], 3.1)
    for i, name in enumerate(names):
        axes, tried = panels[i // columns, i % columns], []
        for number, (family, (colour, marker, dash)) in enumerate(marks.items()):
            aside = 1.06 ** (number - (len(marks) - 1) / 2)  # marks of one size stand beside each other
            pairs = every.get((family, name), [])
            for cell, optimum in pairs:
                grid = [rho for rho in cell.variants[name].losses if rho > 0]
                tried += grid
                if math.isfinite(optimum.low):
                    bounds = max(optimum.low, min(grid) / 2), min(optimum.high, max(grid) * 2)
                    axes.plot([cell.parameters * aside] * 2, bounds, color=colour, linewidth=1)
                axes.plot(
                    [cell.parameters * aside], [optimum.rho], color=colour, marker=marker, linestyle="none",
                    markerfacecolor=colour if optimum.status == "inside" else "white",
                )  # fmt: skip
            law = laws.get((family, name))
            if law:
                fitted = [cell.parameters for cell, optimum in pairs if optimum.status == "inside"]
                x = np.geomspace(min(fitted) / 1.3, max(fitted) * 1.3, 50)
                line, low, high = st.power_law_band(law, x)
                if np.isfinite(low).all():  # a line through two points without known noise says nothing
                    axes.plot(x, line, color=colour, linestyle=dash, marker="none")
                    axes.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
            if pairs:
                axes.plot([], [], color=colour, marker=marker, linestyle=dash, label=family)
        axes.set(xscale="log", yscale="log", xlabel="non-embedding parameters", title=name)
        axes.set_ylim(min(tried) / 1.6, max(tried) * 1.6)
        axes.set_xlim(min(row["parameters"] for row in rows) / 1.4, max(row["parameters"] for row in rows) * 1.4)
        dr.si_ticks(axes.xaxis)
        dr.si_ticks(axes.yaxis)
    dr.finish(figure, panels, "best rho")
    inside = sum(row["status"] == "inside" for row in rows)
    return dr.Drawing(
        "best_rho", "Best rho against parameters",
        "Filled: the minimum of a parabola in log rho, with its 95 % Fieller interval. Hollow: "
        "the best rho of the grid, where its minimum is not bracketed (at the edge, beside a diverged or pruned rho, "
        "no minimum); left out of the fit. Line and band: power law a N^b and its pointwise 95 % interval. The "
        "frame is the grid that was tried; marks of one size are drawn side by side.",
        f"Best rho against non-embedding parameters, a panel for each of {len(names)} methods; {inside} of {len(rows)} "
        "optima lie inside their grids.",
        figure, rows,
    )  # fmt: skip


def frontier(study: gr.Study) -> dr.Drawing | None:
    """Final loss against tokens, FLOPs and seconds, a row of panels a scale: AdamW's budgets joined by a line."""
    styles, rows = style.of_variants(study.variants), []
    for cell in study.cells:
        for name, variant in cell.variants.items():
            runs = [run for run in variant.best().values() if math.isfinite(run.loss)]
            if runs:
                mean = {key: float(np.mean([getattr(run.result, key) for run in runs])) for key in _AXES}
                mean["seconds"] = an.seconds(variant)
                losses = [an.level(cell, variant, run) for run in runs]
                rows.append(
                    {"scale": cell.scale, "budget": cell.budget, "variant": name, "rho": runs[0].rho, **mean,
                     "loss": float(np.mean(losses)), "lowest": min(losses), "highest": max(losses), "seeds": len(runs)}
                )  # fmt: skip
    if not rows:
        return None
    scales, used = list(dict.fromkeys(row["scale"] for row in rows)), _axes(study, rows)
    figure, panels = dr.grid([(scale, axis) for scale in scales for axis in used], 3, sharey="row")
    for (scale, axis), axes in panels.items():
        for name, (colour, marker, dash) in styles.items():
            points = sorted((row[axis], row["loss"], row["lowest"], row["highest"]) for row in rows
                            if row["scale"] == scale and row["variant"] == name)  # fmt: skip
            if points:
                x, y, low, high = zip(*points, strict=True)
                joined = dash if name.split(",")[0] == gr.BASE else "none"
                axes.vlines(x, low, high, color=colour, linewidth=1)
                axes.plot(x, y, color=colour, marker=marker, linestyle=joined, label=name)
        axes.set(xscale="log", xlabel=_AXES[axis], title=scale)
        shown = [row[axis] for row in rows if row["scale"] == scale]
        axes.set_xlim(min(shown) / 1.1, max(shown) * 1.1)
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
        figure, rows,
    )  # fmt: skip


def curves(study: gr.Study) -> dr.Drawing | None:
    """Held-out loss during training against tokens, FLOPs and seconds, mean over seeds at the best rho."""
    styles, rows = style.of_variants(study.variants), []
    cells = [cell for cell in study.cells if any(v.method != gr.BASE for v in cell.variants.values())] or study.cells
    for cell in cells:
        rows += [row for variant in cell.variants.values() for row in _curve(cell, variant, cell)]
        longer = {}
        for variant in cell.variants.values():  # AdamW at the compute of the two-pass methods
            found = an.at_equal_compute(study, cell, variant) if variant.method != gr.BASE else None
            if found:
                longer[found.budget, variant.reference] = found
        rows += [row for (_, name), other in longer.items() for row in _curve(other, other.variants[name], cell)]
    if not rows:
        return None
    cells = [cell for cell in cells if any(row["panel"] == cell.label for row in rows)]
    used = _axes(study, rows)
    figure, panels = dr.grid([(cell.label, axis) for cell in cells for axis in used], 2.8, sharey="row")
    for (label, axis), axes in panels.items():
        own = [row for row in rows if row["panel"] == label]
        late = [row["loss"] for row in own if row["share"] >= 0.4]
        for name, budget in dict.fromkeys((row["variant"], row["budget"]) for row in own):
            colour, marker, dash = styles[name]
            line = [(row[axis], row["loss"]) for row in own if (row["variant"], row["budget"]) == (name, budget)]
            aside = not label.endswith(f", {budget}")
            kind = dict(label=f"{name}, longer", linestyle="--", markerfacecolor="white") if aside else {}
            kind = {"label": name, "linestyle": dash, **kind}
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=3.5, **kind)
        axes.set(xlabel=_AXES[axis], title=label)
        pad = 0.05 * (max(late) - min(late)) + 1e-3
        axes.set_ylim(min(late) - pad, max(late) + pad)
        axes.set_xlim(left=0)
        dr.si_ticks(axes.xaxis)
    dr.finish(figure, panels, "held-out loss, nats per token")
    return dr.Drawing(
        "curves", "Held-out loss during training",
        "At the best rho, mean over the seeds that all methods of a panel have; hollow: AdamW trained longer, for the "
        "FLOPs of the two-pass methods. The learning rate falls to its end only at each run's last step, so only last "
        "points of different lengths may be compared. The frame shows what lies after four tenths of training.",
        f"Held-out loss during training against {_listed(used)} in {len(cells)} panels of scale and budget.",
        figure, rows,
    )  # fmt: skip


def _listed(used: list[str]) -> str:
    names = [_AXES[axis] for axis in used]
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def differences(study: gr.Study) -> dr.Drawing | None:
    """Held-out loss less AdamW's of the same seed during training, at the best rho: mean and interval over seeds."""
    styles, rows = style.of_variants(study.variants), []
    for cell in study.cells:
        for variant in cell.variants.values():
            rows += [{"cell": cell.label, "variant": variant.name, **row} for row in an.on_the_way(cell, variant)]
    if not rows:
        return None
    labels = list(dict.fromkeys(row["cell"] for row in rows))
    spread = dr.spread([(0, label) for label in labels])
    figure, panels = dr.grid(spread, 3.2)
    for label, position in zip(labels, spread, strict=True):
        axes, ends = panels[position], []
        for name in dict.fromkeys(row["variant"] for row in rows if row["cell"] == label):
            own = [row for row in rows if (row["cell"], row["variant"]) == (label, name)]
            colour, marker, dash = styles[name]
            tokens, middle, low, high = zip(*((row["tokens"], *row["difference"][:3]) for row in own), strict=True)
            axes.plot(tokens, middle, color=colour, marker=marker, markersize=3, linestyle=dash, label=name)
            if all(map(math.isfinite, high)):
                axes.fill_between(tokens, low, high, color=colour, alpha=0.1, linewidth=0)
            ends += [value for row, value in zip(own, middle, strict=True) if row["share"] >= 0.4]
        axes.axhline(0, color="#000000", linewidth=1)
        least, most = min([*ends, 0.0]), max([*ends, 0.0])
        room = 0.3 * (most - least) + 1e-3
        axes.set(xlabel="tokens", title=label, ylim=(least - room, most + room))
        axes.set_xlim(left=0)
        dr.si_ticks(axes.xaxis)
    dr.finish(figure, panels, "held-out loss less AdamW's, nats per token")
    return dr.Drawing(
        "differences", "Difference to AdamW during training",
        "Of the same seed at the same step, at the best rho: mean over the seeds that both have; bands: 95 % "
        "intervals. Averages of the weights are held against AdamW's own average. Below zero is better; what counts is "
        "the end, where the learning rate has fallen. The frame shows what lies after four tenths of training.",
        f"Held-out loss less AdamW's during training, in {len(labels)} panels of scale and budget.", figure, rows,
    )  # fmt: skip


def _curve(cell: gr.Cell, variant: gr.Variant, panel: gr.Cell) -> list[dict]:
    """Mean held-out loss at the best rho over the seeds that all methods of the panel have, a row an evaluation."""
    every = [set(other.best_losses()) for other in panel.variants.values() if other.best_losses()]
    shared = set.intersection(*every) if every else set()
    runs = [run for run in variant.best().values() if math.isfinite(run.loss)]
    runs = [run for run in runs if run.seed in shared] or runs
    pace, rows = an.seconds(variant), []
    for points in zip(*(run.result.curve for run in runs), strict=False) if runs else ():
        mean = {key: float(np.mean([getattr(point, key) for point in points])) for key in (*_AXES, "loss")}
        share = points[0].step / runs[0].result.steps
        if points[0].step and math.isfinite(mean["loss"]):
            rows.append(
                {"panel": panel.label, "scale": cell.scale, "budget": cell.budget, "variant": variant.name,
                 "step": points[0].step, "share": share, **mean, "seconds": share * pace, "seeds": len(points)}
            )  # fmt: skip
    return rows


def scaling(study: gr.Study, laws: dict[str, st.ScalingLaw]) -> dr.Drawing | None:
    """Final loss against tokens with the fitted L(N, D), a panel a variant."""
    if not laws:
        return None
    columns, rows = min(3, len(laws)), []
    figure, panels = dr.grid([(i // columns, i % columns) for i in range(len(laws))], 3.4)
    for i, (name, law) in enumerate(laws.items()):
        axes, points = panels[i // columns, i % columns], an.scaling_points(study, name)
        sizes = sorted({point[0] for point in points})
        for size, (colour, marker, dash) in zip(sizes, style.series(len(sizes)), strict=True):
            own = sorted((tokens, loss) for parameters, tokens, loss in points if parameters == size)
            fitted = st.predict(law, size, np.array([tokens for tokens, _ in own]))
            rows += [
                {"variant": name, "parameters": size, "tokens": tokens, "loss": loss, "fitted": float(fit)}
                for (tokens, loss), fit in zip(own, fitted, strict=True)
            ]
            x = np.geomspace(min(own)[0], max(own)[0], 50)
            axes.plot(*zip(*own, strict=True), color=colour, marker=marker, linestyle="none")
            axes.plot(x, st.predict(law, size, x), color=colour, linestyle=dash)
            axes.plot([], [], color=colour, marker=marker, linestyle=dash, label=f"{style.si(size)} parameters")
        axes.set(xscale="log", xlabel="tokens", title=name)
        dr.si_ticks(axes.xaxis)
    dr.finish(figure, panels, "held-out loss, nats per token")
    return dr.Drawing(
        "scaling_law", "Scaling law L(N, D) = E + A/N^a + B/D^b",
        "Marks: runs at the best rho; lines: the fit.",
        f"Final held-out loss against tokens with the fitted scaling law, for {', '.join(laws)}.", figure, rows,
    )  # fmt: skip
