"""Compare methods, bases and averages with any one of them, each at its best rho and learning rate, by paired seeds.

    steppe report rivals DIR [RUN ...] [--only=KEY=V,V] [--against=NAME] [--out=DIR/report]

An entry is a method on a base, or an average of its weights, at the best rho and peak learning rate of its grid. Runs
that differ in other keys than these and the seed are other entries. Writes rivals.csv and rivals.png.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from steppe.data import files
from steppe.scripts import command, process


def table(found: Sequence, against):
    """A frame with a row an entry, compared with one of them."""
    import pandas as pd

    from steppe.scripts.report.numbers import entries as en

    less = f"less {against.name}"
    form = lambda value, spec: "" if value is None else format(value, spec)  # noqa: E731
    rows = []
    for entry in found:
        edges = " and ".join(axis for axis in ("rate", "rho") if entry.edge(axis))
        way = en.difference(entry, against)
        bounds = [form(value, "+.4f") if value == value else "" for value in way.interval[:3]] if way else [""] * 3
        pairs = f"{way.interval.n} {'fresh' if way.fresh else 'all'}" if way else ""
        settings = [form(entry.chosen(axis), "g") for axis in ("rate", "rho")]
        rows.append(
            [entry.name, f"{entry.cost:.2f}", *settings, edges, f"{entry.loss:.4f}", len(entry.best), *bounds, pairs]
        )
    columns = ["entry", "cost", "peak rate", "rho", "at the grid's edge", "loss", "seeds", less, "low", "high", "pairs"]
    return pd.DataFrame(rows, columns=columns)


def draw(found: Sequence, against, path: Path) -> None:
    """A line an entry: its difference by seed as dots, mean and interval in front, the best above."""
    import pandas as pd

    from steppe.lm import plot
    from steppe.scripts.report import answer
    from steppe.scripts.report.numbers import entries as en

    made = [(entry, ways) for entry in found[::-1] if (ways := en.ways(entry, {"": against}, {"loss": "loss"}))]
    with plot.styled(axes_grid_axis="x"):
        drawn = plot.figure(7.5, 1.2 + 0.32 * len(made))
        axes = drawn.subplots()
        rows = [{**way, "at": line} for line, (_, ways) in enumerate(made) for way in ways]
        answer.draw_rows(axes, pd.DataFrame(rows, columns=[*(rows or [{}])[0]]), len(made), {"": "D"})
        axes.set_yticks(range(len(made)), [answer.label_of(entry.name, entry) for entry, _ in made], fontsize=9)
        axes.set_xlabel(f"held-out loss less that of {against.name} at its best, nats a token: lower is better")
        axes.set_title("dots: seeds; diamonds: means with 95% intervals", fontsize=9, loc="left")
        plot.save(drawn, path, dpi=150)


def rivals(argv: Sequence[str]) -> int:
    """`report rivals DIR [RUN ...] [--only=...] [--against=NAME] [--out=DIR]`; the exit status, 2 for bad input."""
    parser = command.parser("report rivals", __doc__, config=False)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a sweep, a file of pack, or workdirs of runs")
    parser.add_argument("--against", metavar="NAME", help="the entry that others are compared with (default: adamw)")
    command.add_only(parser)
    parser.add_argument("--out", type=command.writable_directory, metavar="OUT", help="default: DIR/report")
    options = command.options_of(argv, parser)

    from steppe.scripts import results
    from steppe.scripts.report.numbers import entries as en

    out = results.report_place(options.directories, options.out)
    found = results.with_averages(results.read(options.directories, options.only))
    found = en.analyse(found).entries
    if len({entry.cell for entry in found}) > 1:
        found = [dataclasses.replace(entry, name=entry.label) for entry in found]
    names = {entry.name: entry for entry in found}
    plain = next((each for each in found if each.plain), None)
    against = plain if options.against is None else names.get(options.against)
    if against is None:
        given = options.against or "adamw"
        return process.fail(f"--against={given}: must be one of {', '.join(names) or 'no finished run'}")
    out.mkdir(parents=True, exist_ok=True)
    frame = table(found, against)
    files.write(out / "rivals.csv", frame.to_csv(index=False, lineterminator="\n"))
    draw(found, against, out / "rivals.png")
    padded = frame.astype(str).apply(lambda column: column.str.ljust(max(map(len, [column.name, *column]))))
    process.say(padded.to_string(index=False, justify="left"))
    process.say(f"wrote {out / 'rivals.csv'} and {out / 'rivals.png'}")
    return 0
