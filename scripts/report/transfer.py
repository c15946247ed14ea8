"""What a sweep of widths says of transfer: the best learning rate and rho at each width, standard beside mup.

    steppe sweep --config=study --sweep=transfer --out=sweeps/transfer
    steppe report transfer sweeps/transfer [--out=DIR]

Writes transfer.csv (every run) and transfer.png: held-out loss over the learning rate, at the best rho of each, and
over rho at the best rate; a line a width.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from steppe.data import files
from steppe.scripts import command

KEYS = {
    "model.parametrisation": "parametrisation",
    "model.width": "width",
    "optim.peak_learning_rate": "rate",
    "optim.rho": "rho",
}


def read(directory: str) -> list[dict]:
    """A row a run: the values of KEYS, and its loss; infinite where it diverged."""
    from steppe.scripts import results

    rows = []
    for result in results.read(directory):
        if result.status in ("finished", "diverged"):
            loss = result.loss if result.status == "finished" else math.inf
            if result.config["optim.rho"] is None:
                raise command.UsageError(f"{directory}: {result.name}: config.optim.rho must be a number in every run")
            rows.append({**{short: result.config[key] for key, short in KEYS.items()}, "loss": loss})
    return sorted(rows, key=lambda row: tuple(row.values()))


def best(rows: list[dict], axis: str) -> list[tuple[float, float]]:
    """(value of an axis, the least loss there over the other axis), in order."""
    values = sorted({row[axis] for row in rows})
    return [(value, min(row["loss"] for row in rows if row[axis] == value)) for value in values]


def regret(rows: list[dict], chosen: dict) -> float:
    """What it costs a width to take the rate and rho that are best at another."""
    loss = next(row["loss"] for row in rows if all(row[key] == chosen[key] for key in ("rate", "rho")))
    return loss - min(row["loss"] for row in rows)


def draw(rows: list[dict], path: Path) -> None:
    from steppe.lm import plot

    colours = [plot.SKY, plot.BLUE, plot.GREEN, plot.VERMILION, plot.PINK, plot.BLACK]
    kinds, widths = ["standard", "mup"], sorted({row["width"] for row in rows})
    with plot.styled():
        drawn = plot.figure(8, 6)
        panels = drawn.subplots(2, 2, sharey="row")
        for column, kind in enumerate(kinds):
            for line, (axis, title) in enumerate((("rate", "peak learning rate"), ("rho", "rho"))):
                axes = panels[line][column]
                for width, colour, marker in zip(widths, colours, "osD^vP", strict=False):
                    mine = [row for row in rows if (row["parametrisation"], row["width"]) == (kind, width)]
                    points = best(mine, axis)
                    least = min(points, key=lambda point: point[1])
                    axes.plot(
                        *zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=f"width {width}"
                    )
                    axes.plot(*least, color=colour, marker=marker, markersize=10, fillstyle="none")
                axes.set_xscale("log")
                values = sorted({row[axis] for row in rows})
                axes.set_xticks(values, [f"{value:g}" for value in values])
                axes.minorticks_off()
                axes.set_xlabel(title)
                axes.set_title(f"{kind}: best {title} of each width circled", fontsize=9, loc="left")
            panels[0][column].legend(fontsize=8)
        for row in panels:
            row[0].set_ylabel("held-out loss, nats")
        plot.save(drawn, path, dpi=150)


def transfer(argv: Sequence[str]) -> int:
    """`report transfer SWEEP [--out=DIR]`; returns the exit status, 2 for bad input."""
    parser = command.parser("report transfer", __doc__, config=False)
    parser.add_argument("sweep", metavar="SWEEP", help="a sweep's directory")
    parser.add_argument("--out", type=command.writable_directory, metavar="DIR", help="default: SWEEP/report")
    options = command.options_of(argv, parser)
    from steppe.scripts import results

    out = results.report_place([options.sweep], options.out)
    rows = read(options.sweep)
    kinds = {(row["parametrisation"], row["width"]) for row in rows}
    if len(kinds) < 2:
        return command.fail(f"{options.sweep}: must hold finished runs of several widths or parametrisations")
    out.mkdir(parents=True, exist_ok=True)
    titles = [*KEYS.values(), "loss"]
    shown = [{**row, "loss": f"{row['loss']:.5f}"} for row in rows]
    files.write_csv(out / "transfer.csv", [titles, *([row[title] for title in titles] for row in shown)])
    draw(rows, out / "transfer.png")
    for kind in dict.fromkeys(row["parametrisation"] for row in rows):
        mine: dict[int, list[dict]] = {}
        for row in rows:
            if row["parametrisation"] == kind:
                mine.setdefault(row["width"], []).append(row)
        chosen = min(mine[min(mine)], key=lambda row: row["loss"])
        for width in sorted(mine):
            own, costs = min(mine[width], key=lambda row: row["loss"]), regret(mine[width], chosen)
            print(
                f"{kind:<9} width {width:>4}: best rate {own['rate']:g}, rho {own['rho']:g}, loss {own['loss']:.4f}; "
                f"with those of width {min(mine)} {costs:+.4f}"
            )
    print(f"wrote {out / 'transfer.csv'} and {out / 'transfer.png'}")
    return 0
