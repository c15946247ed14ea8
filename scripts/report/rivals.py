"""Methods, bases and averages beside any one of them, each at its best rho and learning rate, by paired seeds.

    steppe report rivals DIR [RUN ...] [--only=KEY=V,V] [--against=NAME] [--out=DIR/report]

An entry is a method on a base, or an average of its weights, with whatever else tells its runs apart but rho, peak
learning rate and seed: of these two it takes the best, as far as its grid goes. Writes rivals.csv and rivals.png.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from steppe.data import files
from steppe.scripts import command, process


def table(found: Sequence, against):
    """A frame with a row an entry beside one of them."""
    import pandas as pd

    from steppe.scripts.report.numbers import entries as en

    rows, less = [], f"less {against.name}"
    for entry in found:
        edges = " and ".join(axis for axis in ("rate", "rho") if entry.edge(axis))
        row = {"entry": entry.name, "cost": entry.cost, "peak rate": entry.chosen("rate"), "rho": entry.chosen("rho"),
               "at the grid's edge": edges, "loss": entry.loss, "seeds": len(entry.best)}  # fmt: skip
        for way in en.differences(entry, {"": against}, {"loss": "loss"}).itertuples():
            pairs = f"{way.n} {'fresh' if way.fresh else 'all'}"
            row |= {less: way.value, "low": way.low, "high": way.high, "pairs": pairs}
        rows.append(row)
    shown = {"cost": ".2f", "peak rate": "g", "rho": "g", "loss": ".4f", less: "+.4f", "low": "+.4f", "high": "+.4f"}
    given = ["entry", "cost", "peak rate", "rho", "at the grid's edge", "loss", "seeds"]
    frame = pd.DataFrame(rows, columns=[*given, less, "low", "high", "pairs"])
    for key, form in shown.items():
        frame[key] = ["" if pd.isna(value) else format(value, form) for value in frame[key]]
    return frame.astype(object).fillna("")


def draw(found: Sequence, against, path: Path) -> None:
    """A line an entry: its difference by seed as dots, mean and interval in front, the best above."""
    import pandas as pd

    from steppe.lm import plot
    from steppe.scripts.report import answer
    from steppe.scripts.report.numbers import entries as en

    made = [(entry, ways) for entry in found if len(ways := en.differences(entry, {"": against}, {"loss": "loss"}))][
        ::-1
    ]
    with plot.styled(axes_grid_axis="x"):
        drawn = plot.figure(7.5, 1.2 + 0.32 * len(made))
        axes = drawn.subplots()
        ways = pd.concat([ways.assign(at=line) for line, (_, ways) in enumerate(made)]) if made else pd.DataFrame()
        answer.draw_rows(axes, ways, len(made), {"": "D"})
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
    against = (
        next((each for each in found if each.plain), None) if options.against is None else names.get(options.against)
    )
    if against is None:
        given = options.against or "adamw"
        return process.fail(f"--against={given}: must be one of {', '.join(names) or 'no finished run'}")
    out.mkdir(parents=True, exist_ok=True)
    frame = table(found, against)
    files.write(out / "rivals.csv", frame.to_csv(index=False, lineterminator="\n"))
    draw(found, against, out / "rivals.png")
    padded = frame.astype(str).apply(lambda column: column.str.ljust(max(map(len, [column.name, *column]))))
    print(padded.to_string(index=False, justify="left"))
    print(f"wrote {out / 'rivals.csv'} and {out / 'rivals.png'}")
    return 0
