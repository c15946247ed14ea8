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
from steppe.scripts import command, process

KEYS = {
    "model.parametrisation": "parametrisation",
    "model.width": "width",
    "optim.peak_learning_rate": "rate",
    "optim.rho": "rho",
}


def read(directory: str):
    """A frame with a row a run: the values of KEYS, and its loss; infinite where it diverged."""
    import pandas as pd

    from steppe.scripts import results

    rows = []
    for result in results.read(directory):
        if result.status in ("finished", "diverged"):
            loss = result.loss if result.status == "finished" else math.inf
            if result.config["optim.rho"] is None:
                raise command.UsageError(f"{directory}: {result.name}: config.optim.rho must be a number in every run")
            rows.append({**{short: result.config[key] for key, short in KEYS.items()}, "loss": loss})
    columns = [*KEYS.values(), "loss"]
    return pd.DataFrame(rows, columns=columns).sort_values(columns)


def best(runs):
    """{(parametrisation, width): the run of the least loss} as a frame."""
    return runs.loc[runs.groupby(["parametrisation", "width"])["loss"].idxmin()].set_index(["parametrisation", "width"])


def regret(runs):
    """What it costs each width of a parametrisation to take the rate and rho that are best at the narrowest."""
    chosen = best(runs).groupby("parametrisation").head(1).reset_index()[["parametrisation", "rate", "rho"]]
    taken = runs.merge(chosen).groupby(["parametrisation", "width"])["loss"].min()
    return taken - best(runs)["loss"]


def draw(runs, path: Path) -> None:
    """A panel a parametrisation and axis, a line a width: the least loss over the other axis."""
    from steppe.lm import plot

    colours = [plot.SKY, plot.BLUE, plot.GREEN, plot.VERMILION, plot.PINK, plot.BLACK]
    looks = dict(zip(sorted(runs["width"].unique()), zip(colours, "osD^vP", strict=True), strict=False))
    with plot.styled():
        drawn = plot.figure(8, 6)
        panels = drawn.subplots(2, 2, sharey="row")
        for column, kind in enumerate(("standard", "mup")):
            mine = runs[runs["parametrisation"] == kind]
            for line, (axis, title) in enumerate((("rate", "peak learning rate"), ("rho", "rho"))):
                axes = panels[line][column]
                for width, points in mine.groupby(["width", axis])["loss"].min().groupby("width"):
                    colour, marker = looks[width]
                    points = points.droplevel("width")
                    kept = {"color": colour, "marker": marker}
                    axes.plot(points.index, points, markersize=4, label=f"width {width}", **kept)
                    axes.plot(points.idxmin(), points.min(), markersize=10, fillstyle="none", **kept)
                axes.set_xscale("log")
                values = sorted(runs[axis].unique())
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
    runs = read(options.sweep)
    if len(runs[["parametrisation", "width"]].drop_duplicates()) < 2:
        return process.fail(f"{options.sweep}: must hold finished runs of several widths or parametrisations")
    out.mkdir(parents=True, exist_ok=True)
    shown = runs.assign(loss=runs["loss"].map("{:.5f}".format))
    files.write(out / "transfer.csv", shown.to_csv(index=False, lineterminator="\n"))
    draw(runs, out / "transfer.png")
    costs, narrowest = regret(runs), runs.groupby("parametrisation")["width"].min()
    for (kind, width), own in best(runs).sort_index(ascending=[False, True]).iterrows():
        print(
            f"{kind:<9} width {width:>4}: best rate {own['rate']:g}, rho {own['rho']:g}, loss {own['loss']:.4f}; "
            f"with those of width {narrowest[kind]} {costs[kind, width]:+.4f}"
        )
    print(f"wrote {out / 'transfer.csv'} and {out / 'transfer.png'}")
    return 0
