"""Coordinate check: do activations, updates and perturbations keep their size as a model is widened?

steppe coordinates --config=NAME --out=DIR [--widths=64,128,256,512,1024] [--steps=4] [--config.key=value ...]

Each width is a model of the config's head width and ratio of MLP to width, trained for a few steps, in the standard
parametrisation and in mup with the first width as its base. Writes coordinates.csv and coordinates.png: under mup the
lines are flat.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from steppe.data import files
from steppe.scripts import command, process

NAME = "coordinates"


def _widths(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= 1 << 16 for part in parts) or len(set(parts)) < 2:
        raise argparse.ArgumentTypeError(f"{text or 'nothing'}: must be two or more widths, with commas between them")
    return tuple(sorted({int(part) for part in parts}))


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Measures, writes a table and a plot, prints slopes; returns the exit status, 2 for bad input."""
    parser = command.parser(NAME, command.headline(__doc__))
    parser.add_argument("--out", required=True, type=command.writable_directory, metavar="DIR", help="where both go")
    parser.add_argument(
        "--widths", type=_widths, default="64,128,256,512,1024", metavar="N,N,...", help="default 64 to 1024"
    )
    parser.add_argument("--steps", type=command.integer(1), default=4, metavar="N", help="of training (default 4)")
    config, options = command.parse(argv, parser)

    process.ready_to_compute()
    import jax

    from steppe.lm.parts.check import check

    configs = [
        (parametrisation, width, at_width(config, width, parametrisation, options.widths[0]))
        for parametrisation in ("standard", "mup")
        for width in options.widths
    ]
    for _, _, each in configs:
        check(each, device_count=len(jax.devices()), backend=jax.default_backend())
    rows = []
    for parametrisation, width, each in configs:
        found = measured(each, options.steps)
        rows += [(parametrisation, width, name, value) for name, value in found.items()]
        shown = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        print(f"{parametrisation:<9} {width:>6}  {shown}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = ["parametrisation,width,quantity,rms", *(f"{p},{w},{name},{value:.6g}" for p, w, name, value in rows)]
    files.write(options.out / f"{NAME}.csv", "\n".join(lines) + "\n")
    picture = draw(rows, options.out / f"{NAME}.png")
    print("\npower of the width with which each grows, standard and mup:")
    for name in dict.fromkeys(row[2] for row in rows):
        powers = [slope(rows, name, parametrisation) for parametrisation in ("standard", "mup")]
        print(f"  {name:<20} {powers[0]:+.2f} {powers[1]:+.2f}")
    print(f"wrote {options.out / NAME}.csv and {picture}")
    return 0


def at_width(config, width: int, parametrisation: str, base: int):
    """A copy of a config at another width, of the same head width and ratio of MLP to width."""
    from steppe.configs import sizes

    made = sizes.resolve(config.copy_and_resolve_references())
    model = made.model
    head = model.head_width or model.width // model.heads
    grouped = model.kv_heads and model.heads // model.kv_heads
    heads = width // head
    if heads * head != width:
        raise command.UsageError(f"--widths = {width}: must be multiples of {head}, the head width of the config")
    model.mlp_width = max(1, round(model.mlp_width * width / model.width))
    model.update(size="", width=width, heads=heads, kv_heads=heads // grouped if grouped else 0, head_width=0)
    model.update(parametrisation=parametrisation, base_width=base)
    return made


def measured(config, steps: int) -> dict[str, float]:
    """The coordinates of a config after so many steps, on its own text."""
    from steppe.lm.measure import coordinates
    from steppe.lm.parts.assembly import batch_reader, open_parts

    corpus, parts, _ = open_parts(config, lambda line: None)
    read = batch_reader(config, corpus, parts, lambda step: step)
    return coordinates.measure(parts, [read(step) for step in range(steps)])


def slope(rows: list[tuple], name: str, parametrisation: str) -> float:
    """The least-squares power of the width of a quantity."""
    points = [
        (math.log(width), math.log(value))
        for p, width, of, value in rows
        if (p, of) == (parametrisation, name) and value
    ]
    if len(points) < 2:
        return math.nan
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    over = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / over


def draw(rows: list[tuple], path: Path) -> Path:
    """A panel a quantity: its size over the width, both parametrisations."""
    from steppe.lm import plot

    names = list(dict.fromkeys(row[2] for row in rows))
    columns = 2
    with plot.styled():
        drawn = plot.figure(7.5, 2.4 * math.ceil(len(names) / columns))
        panels = drawn.subplots(math.ceil(len(names) / columns), columns, squeeze=False, sharex=True)
        for axes, name in zip(panels.flat, names, strict=False):
            for parametrisation, colour, marker in (("standard", plot.VERMILION, "s"), ("mup", plot.BLUE, "o")):
                points = [(w, value) for p, w, of, value in rows if (p, of) == (parametrisation, name)]
                power = slope(rows, name, parametrisation)
                label = f"{parametrisation}: width^{power:+.2f}"
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=label)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks([point[0] for point in points], [str(point[0]) for point in points], fontsize=8)
            axes.minorticks_off()
            low, high = axes.get_ylim()
            if high < 10 * low:  # a flat line is to look flat
                middle = math.sqrt(low * high)
                axes.set_ylim(middle / 10**0.5, middle * 10**0.5)
            axes.set_title(name, fontsize=10, loc="left")
            axes.legend(fontsize=8)
        for axes in panels[-1]:
            axes.set_xlabel("width")
        for axes in panels[:, 0]:
            axes.set_ylabel("root mean square")
        plot.save(drawn, path, dpi=150)
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
