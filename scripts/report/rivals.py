"""Methods, bases and averages beside any one of them, each at its best rho and learning rate, by paired seeds.

    steppe report rivals DIR [RUN ...] [--only=KEY=V,V] [--against=NAME] [--out=DIR/report]

An entry is a method on a base, or an average of its weights, with whatever else tells its runs apart but rho, peak
learning rate and seed: of these two it takes the best, as far as its grid goes. Writes rivals.csv and rivals.png.
"""

from collections.abc import Sequence
from pathlib import Path

from steppe.data import files
from steppe.scripts import command


def table(found: Sequence, against) -> tuple[list[str], list[list[str]]]:
    """(titles, rows) of all entries beside one of them."""
    from steppe.scripts.report.numbers import entries as en

    titles = ["entry", "cost", "peak rate", "rho", "at the grid's edge", "loss", "seeds"]
    titles += [f"less {against.name}", "low", "high", "pairs"]
    rows = []
    for entry in found:
        rate, rho = entry.chosen("rate"), entry.chosen("rho")
        way = en.difference(entry, against)
        bounds = [f"{x:+.4f}" for x in way.interval[:3]] if way else ["", "", ""]
        pairs = f"{way.interval.n} {'fresh' if way.fresh else 'all'}" if way else ""
        edges = " and ".join(axis for axis in ("rate", "rho") if entry.edge(axis))
        given = [entry.name, f"{entry.cost:.2f}", f"{rate:g}", "" if rho is None else f"{rho:g}", edges]
        rows.append([*given, f"{entry.loss:.4f}", str(len(entry.best)), *bounds, pairs])
    return titles, rows


def draw(found: Sequence, against, path: Path) -> None:
    """A line an entry: its difference by seed as dots, mean and interval in front, the best above."""
    from steppe.lm import plot
    from steppe.scripts.report import answer
    from steppe.scripts.report.numbers import entries as en

    shown = [(entry, way) for entry in found if (way := en.difference(entry, against))][::-1]
    with plot.styled(axes_grid_axis="x"):
        drawn = plot.figure(7.5, 1.2 + 0.32 * len(shown))
        axes = drawn.subplots()
        answer.draw_rows(axes, [way for _, way in shown])
        axes.set_yticks(range(len(shown)), [answer.label_of(entry.name, entry) for entry, _ in shown], fontsize=9)
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
    from steppe.scripts.report.numbers import groups

    out = results.report_place(options.directories, options.out)
    found = results.with_averages(results.read(options.directories, options.only))
    found = en.entries(groups.analyse(found).runs)
    if len({(entry.scale, entry.budget) for entry in found}) > 1:
        found = [entry._replace(name=entry.label) for entry in found]
    names = {entry.name: entry for entry in found}
    against = (
        next((each for each in found if each.plain), None) if options.against is None else names.get(options.against)
    )
    if against is None:
        given = options.against or "adamw"
        return command.fail(f"--against={given}: must be one of {', '.join(names) or 'no finished run'}")
    out.mkdir(parents=True, exist_ok=True)
    titles, rows = table(found, against)
    files.write_csv(out / "rivals.csv", [titles, *rows])
    draw(found, against, out / "rivals.png")
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    for row in [titles, *rows]:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"wrote {out / 'rivals.csv'} and {out / 'rivals.png'}")
    return 0
