"""Two runs side by side: the config keys that differ, the first step where their losses do, and both curves."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steppe.data import files
from steppe.scripts import command, process

LONGEST = 48  # characters of a run's name where it stands beside another


def compare(argv: Sequence[str]) -> int:
    """`report compare RUN_A RUN_B [--out=FILE.html]`; returns the exit status, 2 for bad input."""
    parser = command.parser("report compare", __doc__, config=False)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="a workdir")
    parser.add_argument(
        "--out", type=_page_path, metavar="FILE.html", help="also draw both curves there; a PNG beside it"
    )
    options = command.options_of(argv, parser)

    from steppe.scripts import results

    try:
        pair = _told_apart(*(_one(results, workdir) for workdir in options.runs))
    except results.ResultsError as error:
        return process.fail(error)
    keys, facts = differing(*pair), numbers(*pair)
    print(text(pair, keys, facts))
    if options.out is not None:
        print(f"wrote {_page(options.out, pair, keys, facts)}")
    return 0


def _told_apart(a, b) -> list:
    """Both, with names short enough to stand over a column and in a legend: else what their configs differ in."""
    if max(len(a.name), len(b.name)) <= LONGEST and a.name != b.name:
        return [a, b]
    keys = [(key.split(".")[-1], *values) for key, *values in differing(a, b) if not key.startswith("log.")]
    names = [", ".join(f"{key}={values[i]}" for key, *values in keys)[:LONGEST] for i in (0, 1)]
    return [run._replace(name=name or f"run {letter}") for run, name, letter in zip((a, b), names, "AB", strict=True)]


def differing(a, b) -> list[tuple[str, str, str]]:
    """(key, value in a, value in b) of every config key in which two Results differ."""
    own, other = ({**dict.fromkeys((*a.config, *b.config), "absent"), **run.config} for run in (a, b))
    return [(key, str(own[key]), str(other[key])) for key in own if own[key] != other[key]]


def first_difference(a, b) -> tuple[int | None, int]:
    """(first step whose training losses differ in any bit, steps that both have); None if no common step does."""
    common, own, other = np.intersect1d(a.train_curve.step, b.train_curve.step, return_indices=True)
    x, y = a.train_curve.loss[own], b.train_curve.loss[other]
    differ = np.flatnonzero((x != y) & ~(np.isnan(x) & np.isnan(y)))
    return (int(common[differ[0]]) if len(differ) else None), len(common)


def apart_by_step(a, b, kind: str) -> list[tuple[int, float]]:
    """(step, loss of b minus that of a) where both have it: held-out, or training, averaged over a hundredth of it."""
    if kind == "held-out":
        known = {point.step: point.loss for point in a.curve}
        return [(p.step, p.loss - known[p.step]) for p in b.curve if p.step and p.step in known]
    common, own, other = np.intersect1d(a.train_curve.step, b.train_curve.step, return_indices=True)
    difference = b.train_curve.loss[other] - a.train_curve.loss[own]
    window = max(1, len(common) // 100)
    ends = range(window, len(common) + 1, window)
    return [(int(common[end - 1]), float(difference[end - window : end].mean())) for end in ends]


def numbers(a, b) -> list[tuple[str, str, str, str]]:
    """(what, in a, in b, b beside a) for the table."""
    step, common = first_difference(a, b)
    differ = f"step {step}" if step is not None else f"nowhere in {common} common steps" if common else "no common step"
    last = [run.curve[-1] for run in (a, b) if run.curve]
    shared = sorted({point.step for point in a.curve} & {point.step for point in b.curve})
    losses = [{point.step: point.loss for point in run.curve} for run in (a, b)]
    rows = [("status", a.status, b.status, ""), ("training losses differ from", "", "", differ)]
    if len(last) == 2:
        rows.append(
            ("last held-out loss, nats per token", *(f"{point.loss:.4f} (step {point.step})" for point in last),
             _signed(last[1].loss - last[0].loss))
        )  # fmt: skip
    if shared and len(last) == 2 and last[0].step != last[1].step:
        pair = [loss[shared[-1]] for loss in losses]
        rows.append(
            (f"held-out loss at step {shared[-1]}", *(f"{loss:.4f}" for loss in pair), _signed(pair[1] - pair[0]))
        )
    paces = [run.seconds / max(1, len(run.train_curve.step)) for run in (a, b)]
    rows.append(("seconds a step", *(f"{pace:.3g}" for pace in paces), _ratio(paces[1], paces[0])))
    rows.append(("seconds of training", *(f"{run.seconds:.1f}" for run in (a, b)), _ratio(b.seconds, a.seconds)))
    rows.append(("FLOPs", *(f"{run.flops:.3g}" for run in (a, b)), _ratio(b.flops, a.flops)))
    rows.append(("tokens", *(f"{run.tokens:,}" for run in (a, b)), _ratio(b.tokens, a.tokens)))
    return rows


def text(pair, keys, facts) -> str:
    """The comparison as aligned columns."""
    cut = lambda value: value if len(value) <= LONGEST else value[: LONGEST - 1] + "…"  # noqa: E731
    rows = [("", pair[0].name, pair[1].name, "B beside A"), *facts, ("", "", "", "")]
    rows += [(key, cut(a), cut(b), "") for key, a, b in keys] or [("configs", "the same", "the same", "")]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _page_path(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".html" or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text or 'nothing'}: must be a file that ends in .html")
    command.writable_directory(str(path.parent))
    return path


def _one(results, workdir: str):
    found = results.read([workdir])
    if len(found) > 1:
        raise results.ResultsError(f"{workdir}: must be the workdir of one run; it holds {len(found)}")
    return found[0]._replace(name=Path(workdir).resolve().name)


def _page(path: Path, pair, keys, facts) -> Path:
    import pandas as pd

    from steppe.scripts.report import drawing as report_drawing
    from steppe.scripts.report import page as report_page
    from steppe.scripts.report.tables import Table, words

    path.parent.mkdir(parents=True, exist_ok=True)
    heads = [words(key, header) for key, header in zip("wabd", ("", "A", "B", "B beside A"), strict=True)]
    numbered, differing = pd.DataFrame(facts, columns=[*"wabd"]), pd.DataFrame(keys, columns=[*"wab"])
    section = report_page.Section("Numbers").table(Table("numbers", "Numbers", "", heads, numbered))
    config = report_page.Section("Config keys that differ").table(Table("config", "Config", "", heads[:3], differing))
    if not keys:
        config.text("None.")
    with report_drawing.styled():
        drawing = _drawing(path.stem, pair)
        curves = report_page.Section("Curves").figure(drawing, report_drawing.save(drawing, path.parent))
    title = f"{pair[0].name} (A) and {pair[1].name} (B)"
    files.write(path, report_page.page(title, "", [section, curves, config]))
    return path


def curves(pair):
    """A frame with a row a point: run (A, B, or B - A), kind (training or held-out), step, loss."""
    import pandas as pd

    found = []
    for letter, run in zip("AB", pair, strict=True):
        train, thin = run.train_curve, slice(None, None, max(1, len(run.train_curve.step) // 400))
        found += [(letter, "training", *each) for each in zip(train.step[thin], train.loss[thin], strict=True)]
        found += [(letter, "held-out", point.step, point.loss) for point in run.curve]
    found += [
        ("B - A", kind, *each) for kind in ("training", "held-out") for each in apart_by_step(pair[0], pair[1], kind)
    ]
    return pd.DataFrame(found, columns=["run", "kind", "step", "loss"])


def _drawing(name: str, pair):
    from steppe.scripts import style
    from steppe.scripts.report import drawing as dr
    from steppe.scripts.report.numbers import statistics as st

    figure, panels = dr.grid([(0, "loss"), (0, "difference")], 3.9)
    frame, titles = curves(pair), {"A": f"A: {pair[0].name}", "B": f"B: {pair[1].name}", "B - A": "B − A"}
    looks = dict(zip(titles, (*style.series(2), ("#000000", "o", "-")), strict=True))
    known = frame[frame["step"] > 0]
    for (run, kind), line in known.groupby(["run", "kind"], sort=False):
        colour, marker, dash = looks[run]
        faint = {"alpha": 0.35, "linewidth": 0.8}
        kept = faint if kind == "training" else {"marker": marker, "linestyle": dash}
        axes = panels[0, "difference" if run == "B - A" else "loss"]
        thin = line[:: max(1, len(line) // 400)]
        axes.plot(thin["step"], thin["loss"], color=colour, label=f"{titles[run]}, {kind}", **kept)
    panels[0, "difference"].axhline(0, color="#000000", linewidth=0.8)
    known = known[st.finite(known["loss"])]
    apart = known["run"] == "B - A"
    last = known.groupby(["run", "kind"])["step"].transform("max")
    late = known.loc[~apart & (known["step"] > known["step"].max() / 20), "loss"]
    panels[0, "difference"].set_ylim(dr.around([0.0, *known.loc[apart & (known["step"] >= 0.2 * last), "loss"]], 0.1))
    if len(late):
        panels[0, "loss"].set_ylim(dr.around(late, 0.05))
    for (_, what), axes in panels.items():
        axes.set(xlabel="step", ylabel="loss, nats per token" if what == "loss" else "B − A: below zero B is better")
        axes.set_xlim(left=0)
        dr.si_ticks(axes.xaxis)
    dr.finish(figure, panels, "")
    caption = (
        "Training loss faint, held-out loss with marks; the frames show what lies after a twentieth and a fifth of "
        "training. B − A is at the same step, of the training loss averaged over windows of a hundredth of the run."
    )
    alt = f"Training and held-out loss of {pair[0].name} and {pair[1].name} against the step, and their difference."
    return dr.Drawing(name, "Loss of both runs", caption, alt, figure, frame.assign(run=frame["run"].replace(titles)))


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.3g} x" if base else ""
