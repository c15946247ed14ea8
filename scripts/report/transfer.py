"""Draw the best learning rate and rho at each width of a sweep, for the standard parametrisation and mup.

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
    """A panel a parametrisation and axis, a line a width: the least loss over the other axis, the best circled."""
    import pandas as pd

    from steppe.lm import plot
    from steppe.scripts import style
    from steppe.scripts.report import drawing as dr

    axes = {"rate": "peak learning rate", "rho": "rho"}
    parts = [
        runs.groupby(["parametrisation", "width", axis], as_index=False)["loss"].min()
        .rename(columns={axis: "at"}).assign(panel=f"over {words}")
        for axis, words in axes.items()
    ]  # fmt: skip
    frame = pd.concat(parts).sort_values(["panel", "parametrisation"], ascending=False, kind="stable")
    frame["width"] = "width " + frame["width"].astype(str)
    styles = dict(zip(widths := frame["width"].unique(), style.series(len(widths)), strict=True))

    def then(axes, own, look) -> None:
        for row in own.loc[own.groupby("width")["loss"].idxmin()].itertuples():
            axes.plot(row.at, row.loss, "o", color=look(row.width)[0], markersize=10, fillstyle="none")

    with dr.styled():
        drawn = dr.panels(
            frame.reset_index(drop=True), styles, x="at", y="loss", by="width", panel=["panel", "parametrisation"],
            log="x", labels=("", "held-out loss, nats"), then=then,
        )  # fmt: skip
        plot.save(drawn or plot.figure(dr.WIDTH, 1), path, dpi=150)


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
        process.say(
            f"{kind:<9} width {width:>4}: best rate {own['rate']:g}, rho {own['rho']:g}, loss {own['loss']:.4f}; "
            f"with those of width {narrowest[kind]} {costs[kind, width]:+.4f}"
        )
    process.say(f"wrote {out / 'transfer.csv'} and {out / 'transfer.png'}")
    return 0
