"""Methods, bases and averages side by side, each at its best rho and learning rate, by paired seeds.

    steppe report rivals DIR [RUN ...] [--against=NAME] [--out=DIR/report]

An entry is a method on a base, or an average of its weights, with whatever else tells its runs apart but rho, peak
learning rate and seed: of these two it takes the best, as far as its grid goes. Writes rivals.csv and rivals.png.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steppe.scripts import command

TUNED = ("optim.peak_learning_rate", "optim.rho")
_NAMED = ("optim.method", "optim.base", "seed", *TUNED)
PLAIN = "adamw"


class Entry(NamedTuple):
    """runs: {(rate, rho): {seed: loss}}, infinite where a run diverged; choice: the best of these, where there is one.

    fresh: seeds of the best that took no part in choosing it.
    """

    name: str
    runs: dict[tuple, dict[int, float]]
    choice: Any
    flops: float

    @property
    def best(self) -> dict[int, float]:
        return self.runs[self.choice.rho]

    @property
    def fresh(self) -> set[int]:
        return set(self.best) - self.choice.seeds if len(self.runs) > 1 else set(self.best)

    def edge(self) -> str:
        """Which of rate and rho is best at an end of its grid, "" for none."""
        found = []
        for axis, name in enumerate(("rate", "rho")):
            values = sorted({setting[axis] for setting in self.runs if setting[axis] is not None})
            if len(values) > 1 and self.choice.rho[axis] in (values[0], values[-1]):
                found.append(name)
        return " and ".join(found)


class Difference(NamedTuple):
    """An entry's loss less that of another, by seed; interval: over the seeds that chose neither, or over all."""

    interval: Any
    seeds: int
    fresh: bool


def entries(found: Sequence[Any]) -> dict[str, Entry]:
    """{name: Entry} of finished and diverged results, in the order of their best loss."""
    from steppe.scripts.report import statistics as st

    groups: dict[str, dict[tuple, dict[int, float]]] = {}
    flops: dict[str, float] = {}
    done = [result for result in found if result.status in ("finished", "diverged")]
    alike = {kind: [r for r in done if _kind(r) == kind] for kind in map(_kind, done)}
    for result in done:
        others = []
        for key in result.varied:
            if key not in _NAMED and len({str(r.config[key]) for r in alike[_kind(result)]}) > 1:
                others.append(f"{key.split('.')[-1]}={result.config[key]}")
        name = ", ".join([_kind(result), *others])
        setting = tuple(result.config[key] for key in TUNED)
        loss = result.loss if result.status == "finished" else math.inf
        groups.setdefault(name, {}).setdefault(setting, {})[result.config["seed"]] = loss
        flops[name] = result.flops / result.adamw_flops if result.adamw_flops else math.nan
    made = {name: Entry(name, runs, st.choose(runs), flops[name]) for name, runs in groups.items()}
    chosen = [entry for entry in made.values() if entry.choice]
    return {entry.name: entry for entry in sorted(chosen, key=lambda e: sum(e.best.values()) / len(e.best))}


def _kind(result: Any) -> str:
    """A method, its base where that is not AdamW, and the average whose loss it is."""
    method, base = result.config["optim.method"], result.config["optim.base"]
    alone = method in (PLAIN, "base")
    name = base if alone else method if base == PLAIN else f"{method} on {base}"
    return f"{name} {result.weights}".rstrip()


def difference(entry: Entry, other: Entry) -> Difference | None:
    """By the seeds that both have, of these the fresh ones where there are two or more; None where there are none."""
    from steppe.scripts.report import statistics as st

    shared = set(entry.best) & set(other.best)
    fresh = shared & entry.fresh & other.fresh
    seeds = fresh if len(fresh) >= 2 else shared
    pairs = [entry.best[seed] - other.best[seed] for seed in sorted(seeds)]
    if not pairs or not all(map(math.isfinite, pairs)):
        return None
    return Difference(st.t_interval(pairs), len(pairs), seeds is fresh)


def table(found: dict[str, Entry], against: Entry) -> tuple[list[str], list[list[str]]]:
    """(titles, rows) of all entries beside one of them."""
    titles = ["entry", "cost", "peak rate", "rho", "at the grid's edge", "loss", "seeds"]
    titles += [f"less {against.name}", "low", "high", "pairs"]
    rows = []
    for entry in found.values():
        rate, rho = entry.choice.rho
        way = difference(entry, against) if entry is not against else None
        bounds = [f"{x:+.4f}" for x in way.interval[:3]] if way else ["", "", ""]
        pairs = f"{way.seeds} {'fresh' if way.fresh else 'all'}" if way else ""
        mean = sum(entry.best.values()) / len(entry.best)
        given = [entry.name, f"{entry.flops:.2f}", f"{rate:g}", "" if rho is None else f"{rho:g}", entry.edge()]
        rows.append([*given, f"{mean:.4f}", str(len(entry.best)), *bounds, pairs])
    return titles, rows


def draw(found: dict[str, Entry], against: Entry, path: Path) -> None:
    """A line an entry: its difference by seed as dots, mean and interval in front, the best above."""
    from steppe.lm import plot

    shown = [(entry, difference(entry, against)) for entry in found.values() if entry is not against]
    shown = [(entry, way) for entry, way in shown if way is not None][::-1]
    with plot.styled(axes_grid_axis="x"):
        drawn = plot.figure(7.5, 1.2 + 0.32 * len(shown))
        axes = drawn.subplots()
        for line, (entry, way) in enumerate(shown):
            shared = sorted(set(entry.best) & set(against.best))
            points = [entry.best[seed] - against.best[seed] for seed in shared]
            axes.plot(points, [line] * len(points), "o", color=plot.PALE, markersize=3.5)
            value, low, high = way.interval[:3]
            sure = math.isfinite(low) and math.isfinite(high)
            colour = plot.BLUE if sure and high < 0 else plot.VERMILION if sure and low > 0 else plot.BLACK
            if sure:
                axes.plot([low, high], [line, line], color=colour, linewidth=2)
            axes.plot(
                [value], [line], "D" if sure else "d", color=colour, markersize=6, fillstyle="full" if sure else "none"
            )
        axes.axvline(0, color=plot.GREY, linewidth=1)
        axes.set_yticks(range(len(shown)), [f"{entry.name}  {entry.flops:.2f} ×" for entry, _ in shown], fontsize=9)
        axes.set_xlabel(f"held-out loss less that of {against.name} at its best rate, nats a token: lower is better")
        axes.set_title("dots: seeds; diamonds: means with 95% intervals", fontsize=9, loc="left")
        plot.save(drawn, path, dpi=150)


def rivals(argv: Sequence[str]) -> int:
    """`report rivals DIR [RUN ...] [--against=NAME] [--out=DIR]`; returns the exit status, 2 for bad input."""
    parser = command.parser("report rivals", __doc__, config=False)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a sweep, or workdirs of runs")
    parser.add_argument("--against", default=PLAIN, metavar="NAME", help="the entry that others are compared with")
    parser.add_argument("--out", type=command.writable_directory, metavar="OUT", help="default: DIR/report")
    options = command.options_of(argv, parser)

    from steppe.scripts import results

    if options.out is None and len(options.directories) > 1:
        return command.fail("--out is missing: of several directories it must say where the report goes")
    found = entries(results.with_averages(results.read(options.directories)))
    if options.against not in found:
        return command.fail(f"--against={options.against}: must be one of {', '.join(found) or 'no finished run'}")
    out, against = options.out or Path(options.directories[0]) / "report", found[options.against]
    out.mkdir(parents=True, exist_ok=True)
    titles, rows = table(found, against)
    with open(out / "rivals.csv", "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle, lineterminator="\n").writerows([titles, *rows])
    draw(found, against, out / "rivals.png")
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    for row in [titles, *rows]:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"wrote {out / 'rivals.csv'} and {out / 'rivals.png'}")
    return 0
