"""Two runs side by side: the config keys that differ, the first step where their losses do, and both curves."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steppe.data import files
from steppe.scripts import command, process

LONGEST = 48  # characters of a run's name next to another


def compare(argv: Sequence[str]) -> int:
    """`report compare RUN_A RUN_B [--out=FILE.html]`; returns the exit status, 2 for bad input."""
    parser = command.parser("report compare", __doc__, config=False)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="a workdir")
    parser.add_argument(
        "--out", type=_page_path, metavar="FILE.html", help="also draw both curves there; and a PNG next to it"
    )
    options = command.options_of(argv, parser)

    from steppe.scripts import results

    try:
        pair = _told_apart(*(_one(results, workdir) for workdir in options.runs))
    except results.ResultsError as error:
        return process.fail(error)
    keys, facts = differing(*pair), numbers(*pair)
    process.say(text(pair, keys, facts))
    if options.out is not None:
        process.say(f"wrote {_page(options.out, pair, keys, facts)}")
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
    """(what, in a, in b, b against a) for the table."""
    step, common = first_difference(a, b)
    differ = f"step {step}" if step is not None else f"nowhere in {common} common steps" if common else "no common step"
    rows = [("status", a.status, b.status, ""), ("training losses differ from", "", "", differ)]
    if a.curve and b.curve:
        last = a.curve[-1], b.curve[-1]
        shown = (f"{point.loss:.4f} (step {point.step})" for point in last)
        rows.append(("last held-out loss, nats per token", *shown, _signed(last[1].loss - last[0].loss)))
        losses = [{point.step: point.loss for point in run.curve} for run in (a, b)]
        shared = max(losses[0].keys() & losses[1].keys(), default=None)
        if shared is not None and last[0].step != last[1].step:
            x, y = (loss[shared] for loss in losses)
            rows.append((f"held-out loss at step {shared}", f"{x:.4f}", f"{y:.4f}", _signed(y - x)))
    paces = [run.seconds / max(1, len(run.train_curve.step)) for run in (a, b)]
    spent = [("seconds a step", ".3g", *paces), ("seconds of training", ".1f", a.seconds, b.seconds)]
    spent += [("FLOPs", ".3g", a.flops, b.flops), ("tokens", ",", a.tokens, b.tokens)]
    ratio = lambda x, y: f"{y / x:.3g} x" if x else ""  # noqa: E731
    return rows + [(what, format(x, form), format(y, form), ratio(x, y)) for what, form, x, y in spent]


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def text(pair, keys, facts) -> str:
    """The comparison as aligned columns."""
    cut = lambda value: value if len(value) <= LONGEST else value[: LONGEST - 1] + "…"  # noqa: E731
    rows = [("", pair[0].name, pair[1].name, "B against A"), *facts, ("", "", "", "")]
    rows += [(key, cut(a), cut(b), "") for key, a, b in keys] or [("configs", "the same", "the same", "")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


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

    from steppe.scripts.report import drawing as dr
    from steppe.scripts.report import page
    from steppe.scripts.report.tables import Column, Table

    path.parent.mkdir(parents=True, exist_ok=True)
    heads = [Column(*head) for head in zip("wabd", ("of", "A", "B", "B against A"), strict=True)]
    facts = Table("numbers", "Numbers", "", heads, pd.DataFrame(facts, columns=[*"wabd"]))
    config = Table("config", "Config keys that differ", "", heads[:3], pd.DataFrame(keys, columns=[*"wab"]))
    section = page.Section("Two runs").table(facts).table(config)
    with dr.styled():
        drawing = _drawing(path.stem, pair)
        if drawing.figure is not None:
            section.figure(drawing, dr.save(drawing, path.parent))
    files.write(path, page.page(f"{pair[0].name} (A) and {pair[1].name} (B)", "", [section]))
    return path


def _drawing(name: str, pair):
    """Of a frame with a row a point: run (A, B, or B - A), kind (training or held-out), step, loss."""
    import pandas as pd

    from steppe.scripts import style
    from steppe.scripts.report import drawing as dr

    found = []
    for letter, run in zip("AB", pair, strict=True):
        train, thin = run.train_curve, slice(None, None, max(1, len(run.train_curve.step) // 400))
        found += [(letter, "training", *each) for each in zip(train.step[thin], train.loss[thin], strict=True)]
        found += [(letter, "held-out", point.step, point.loss) for point in run.curve]
    for kind in ("training", "held-out"):
        found += [("B - A", kind, *each) for each in apart_by_step(pair[0], pair[1], kind)]
    frame = pd.DataFrame(found, columns=["run", "kind", "step", "loss"])
    titles = {"A": f"A: {pair[0].name}", "B": f"B: {pair[1].name}", "B - A": "B − A"}
    looks = zip(titles.values(), (*style.series(2), ("#000000", "o", "-")), strict=True)
    styles = {
        f"{title}, {kind}": (colour + faint, marker, dash)
        for title, (colour, marker, dash) in looks for kind, faint in (("training", "55"), ("held-out", ""))
    }  # fmt: skip
    apart = frame["run"] == "B - A"
    seen = frame.assign(
        label=frame["run"].map(titles) + ", " + frame["kind"],
        panel=apart.map({False: "both", True: "B − A: below zero B is better"}),
    )[frame["step"] > 0]
    figure = dr.panels(
        seen, styles, x="step", y="loss", by="label", panel=["panel"], labels=("step", "loss, nats per token"),
        late=seen["step"] > seen["step"].max() * apart[seen.index].map({False: 0.05, True: 0.2}), marks=False,
    )  # fmt: skip
    return dr.Drawing(
        name, "Loss of both runs",
        "Training loss is pale. The frames show what lies after a twentieth and a fifth of training. B − A is at the "
        "same step, of the training loss averaged over windows of a hundredth of the run.",
        f"Training and held-out loss of {pair[0].name} and {pair[1].name} against the step, and their difference.",
        figure, frame.assign(run=frame["run"].replace(titles)),
    )  # fmt: skip
