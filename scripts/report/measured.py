"""The figures of what curvature and retention measured of runs."""

import itertools
import math
import statistics
from collections.abc import Sequence

from steppe.lm import plot
from steppe.lm.measure import frontier
from steppe.scripts import style
from steppe.scripts.report import answer
from steppe.scripts.report import drawing as dr
from steppe.scripts.report.numbers import analysis as an
from steppe.scripts.report.numbers import entries as en
from steppe.scripts.report.numbers import groups as gr

PART = 4  # measures in one drawing


def sharpness(study: gr.Study, source: str, found: dict[str, dict[str, float]], part: int = 0) -> dr.Drawing | None:
    """Held-out loss against each measure, a row a cell, a column a measure; at most PART measures a drawing."""
    chosen = dict(list(found.items())[PART * part : PART * (part + 1)])
    styles, rows = style.of_variants(study.variants), []
    for measure, values in chosen.items():
        for cell in study.cells:
            rows += [
                {"cell": cell.label, "variant": run.variant, "rho": run.rho, "seed": run.seed,
                 "measure": measure, "value": values[run.result.name], "loss": run.loss}
                for run in cell.runs if run.result.name in values and math.isfinite(run.loss)
            ]  # fmt: skip
    if not rows:
        return None
    labels = list(dict.fromkeys(row["cell"] for row in rows))
    figure, panels = dr.grid([(label, measure) for label in labels for measure in chosen], 2.7, sharey="row")
    for (label, measure), axes in panels.items():
        values = []
        for name, (colour, marker, _) in styles.items():
            own = [
                (row["value"], row["loss"]) for row in rows
                if (row["measure"], row["cell"], row["variant"]) == (measure, label, name)
            ]  # fmt: skip
            if own:
                values += [value for value, _ in own]
                axes.plot(
                    *zip(*own, strict=True), color=colour, marker=marker, linestyle="none", label=name, alpha=0.85
                )
        axes.set(xlabel=style.in_words(measure), title=label)
        if values and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_xscale("log")
        elif values:
            axes.xaxis.set_major_locator(dr.ticker().MaxNLocator(4))
    dr.finish(figure, panels, "held-out loss, nats per token")
    several = len(found) > PART
    return dr.Drawing(
        f"{source}_{part + 1}" if several else source,
        f"Held-out loss beside {source}" + (f", part {part + 1}" if several else ""),
        "One mark a run, all rho and seeds that were measured." + f" {style.INCREASES}" * (source == "retention"),
        f"Held-out loss against {', '.join(map(style.in_words, chosen))}, a row of panels for each scale and budget.",
        figure, rows,
    )  # fmt: skip


def curvature_over_training(study: gr.Study) -> dr.Drawing | None:
    """Curvature of checkpoints against tokens, a row a cell, a column a measure, a line a run."""
    rows, styles = an.over_training(study), style.of_variants(study.variants)
    if not rows:
        return None
    labels, measures = (list(dict.fromkeys(row[key] for row in rows)) for key in ("cell", "measure"))
    figure, panels = dr.grid([(label, measure) for label in labels for measure in measures], 2.7)
    for (label, measure), axes in panels.items():
        own = [row for row in rows if (row["cell"], row["measure"]) == (label, measure)]
        for name, run in dict.fromkeys((row["variant"], row["run"]) for row in own):
            colour, marker, dash = styles[name]
            line = [(row["tokens"], row["value"]) for row in own if row["run"] == run]
            axes.plot(*zip(*line, strict=True), color=colour, marker=marker, linestyle=dash, label=name, alpha=0.85)
        axes.set(xlabel="tokens", title=f"{style.in_words(measure)}\n{label}")
        axes.margins(x=0.08)
        dr.si_ticks(axes.xaxis)
    dr.finish(figure, panels, "of the held-out loss")
    return dr.Drawing(
        "curvature_over_training", "Curvature over training",
        "One line a run, of runs of which several checkpoints were measured. The functional share is that of "
        "|NME ε|² in |GGN ε|² + |NME ε|², ε along the gradient.",
        f"{', '.join(map(style.in_words, measures))} against tokens, a row of panels for each scale and budget.",
        figure, rows,
    )  # fmt: skip


def kept_against_rho(found: Sequence[en.Entry]) -> dr.Drawing | None:
    """Loss, forgetting and loss in few bits over rho at the best rate, less AdamW's of the same seeds."""
    rows = []
    for cell in dict.fromkeys((entry.scale, entry.budget) for entry in found):
        inside = [entry for entry in found if (entry.scale, entry.budget) == cell and entry.of_choice]
        for entry in inside:
            other = en.at_equal_tokens(inside, entry)
            by_rho = {
                rho: entry.at({rho: by_seed})
                for (rate, rho), by_seed in sorted(entry.runs.items(), key=lambda item: item[0][1] or 0.0)
                if rho and rate == entry.chosen("rate")
            }
            if other is None or len(by_rho) < 2:
                continue
            known = {rho: alone for rho, alone in by_rho.items() if alone.choice}  # not where it diverged
            for aspect in answer.aspects([*known.values(), other]):
                ways = {rho: way for rho, alone in known.items() if (way := en.difference(alone, other, aspect.of))}
                if len(ways) < 2:
                    continue
                for rho, way in ways.items():
                    rows.append({"cell": ", ".join(cell), "aspect": aspect.title, "entry": entry.name, "rho": rho,
                                 "less_adamw": way.interval.value, "low": way.interval.low,
                                 "high": way.interval.high, "pairs": way.interval.n})  # fmt: skip
    measured: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        measured.setdefault((row["cell"], row["entry"]), set()).add(row["aspect"])
    rows = [row for row in rows if len(measured[row["cell"], row["entry"]]) > 1]  # the loss alone is drawn elsewhere
    if not rows:
        return None
    styles = style.of_variants(dict.fromkeys(row["entry"] for row in rows))
    cells, titles = (list(dict.fromkeys(row[key] for row in rows)) for key in ("cell", "aspect"))
    drawn, panels = dr.grid([(cell, title) for cell in cells for title in titles], 3.2)
    for (cell, title), axes in panels.items():
        own = [row for row in rows if (row["cell"], row["aspect"]) == (cell, title)]
        if not own:
            axes.set_axis_off()
            continue
        for name in dict.fromkeys(row["entry"] for row in own):
            colour, marker, dash = styles[name]
            line = [row for row in own if row["entry"] == name]
            x, y = [row["rho"] for row in line], [row["less_adamw"] for row in line]
            axes.plot(x, y, color=colour, marker=marker, markersize=4, linestyle=dash, label=name)
            for row in line:
                if math.isfinite(row["high"]):
                    axes.plot([row["rho"]] * 2, [row["low"], row["high"]], color=colour, linewidth=1)
        axes.axhline(0, color="#000000", linewidth=1)
        axes.set(xscale="log", xlabel="rho", title=title if len(cells) == 1 else f"{title}\n{cell}")
        dr.ticks_at(axes.xaxis, sorted({row["rho"] for row in own}))
    dr.finish(drawn, panels, "less AdamW's, nats per token")
    return dr.Drawing(
        "kept_against_rho", "What is kept, against rho",
        "At each method's best rate, less AdamW's of the same seed and as many tokens (the black line), averages of "
        "weights less AdamW's own: mean over seeds; lines up and down: 95 % intervals where there are several. Below "
        "the line is better.",
        f"Loss and what is kept of it over rho for {len(styles)} entries, less AdamW's.", drawn, rows,
    )  # fmt: skip


MARKED = 4  # points of a frontier between its markers


def forgetting(made: answer.Answer) -> dr.Drawing | None:
    """What is forgotten against the loss reached on the second text: the frontier of each entry, and less AdamW's.

    Of long groups the entries that the answer's first figure shows.
    """
    groups: dict[str, dict[str, tuple[en.Entry, en.Entry | None]]] = {}
    for row in itertools.chain(*(first for first, _ in made.parted)):
        members, other = groups.setdefault(row.group, {}), row.others["tokens"]
        if other and other.plain:
            members.setdefault(other.name, (other, None))
        members[row.name] = row.entry, other
    groups = {
        group: {name: pair for name, pair in members.items() if any(r.fine_tune for r in pair[0].best.values())}
        for group, members in groups.items()
    }
    groups = {group: members for group, members in groups.items() if members}
    if not groups:
        return None
    styles = style.of_variants(dict.fromkeys(name for members in groups.values() for name in members))
    rows: list[dict] = []
    drawn, panels = dr.grid([(group, column) for group in groups for column in range(2)], 3.8)
    for group, members in groups.items():
        tuned = [result.fine_tune for entry, _ in members.values() for result in entry.best.values()]
        tuned = [each for each in tuned if each]
        highest = frontier.equal_loss(tuned)
        gains = [each["loss"] - frontier.best_gain(frontier.paths_of(each)) for each in tuned]
        marks = [highest + (max(gains) - highest) * share / 8 for share in range(-8, 9)]
        for name, (entry, other) in members.items():
            colour, marker, dash = styles[name]
            marked = {"color": colour, "linestyle": dash, "marker": marker, "markevery": MARKED, "markersize": 4}
            found = {}
            for mark in marks:
                at = [en.forgotten(mark)(result) for result in entry.best.values() if result.fine_tune]
                if all(map(math.isfinite, at)):
                    least = {"second_loss": mark, "forgotten": statistics.fmean(at)}
                    found[mark] = {"group": group, "entry": name, **least}
            if found:
                line = [row["forgotten"] for row in found.values()]
                panels[group, 0].plot([*found], line, label=name, **marked)
            ways = {mark: en.difference(entry, other, en.forgotten(mark)) for mark in marks}
            ways = {mark: way.interval for mark, way in ways.items() if way}
            if ways:
                middle, low, high = zip(*(way[:3] for way in ways.values()), strict=True)
                panels[group, 1].plot([*ways], middle, label=name, **marked)
                if all(way.n > 2 for way in ways.values()):
                    panels[group, 1].fill_between([*ways], low, high, color=colour, alpha=0.1, linewidth=0)
            for mark, row in found.items():
                if mark in ways:
                    row |= dict(zip(("less_adamw", "low", "high"), ways[mark][:3], strict=True))
            rows += found.values()
        for column, label in enumerate(("forgotten, nats a token", "less AdamW's, nats a token")):
            panels[group, column].set(xlabel="loss on the second text, nats a token", ylabel=label)
            panels[group, column].set_title(group if len(groups) > 1 else "")
            panels[group, column].invert_xaxis()
        panels[group, 1].axhline(0, color=plot.GREY, linewidth=1)
    dr.finish(drawn, panels, "")
    return dr.Drawing(
        "forgetting", "What fine-tuning costs on the first text",
        "Left: the least that any learning rate and length forgets where the second text reaches a loss, mean over "
        "seeds; fine-tuning goes from left to right. Right: less AdamW's of as many tokens, paired by seed; bands: "
        "95 % intervals of three pairs or more.",
        f"Forgetting against the loss on a second text for {sum(map(len, groups.values()))} entries.", drawn, rows,
    )  # fmt: skip
