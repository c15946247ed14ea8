"""Who is compared and how each is tuned: by equal trials, on a seed that is not used again.

The search goes from a start to the better neighbour, one axis after the other, and takes finer steps once no neighbour
is better. It knows nothing but losses, so that it goes on from whatever runs there are.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from steppe.configs.read import UsageError

RATE, RHO = "optim.peak_learning_rate", "optim.rho"
STEPS = {RATE: 2.0, RHO: math.sqrt(10)}  # factor of one step of the search
SHARE_OF_DEFAULT = 0.4  # of a method's published rho, which comes from vision, where the search begins
Point = tuple[float, ...]  # steps from the start, an entry an axis


class Contender(NamedTuple):
    """One who is tuned. settings: {key: text} of its config; start: {axis: value} where its search begins."""

    name: str
    settings: dict[str, str]
    start: dict[str, float]

    def at(self, point: Point) -> dict[str, str]:
        """{key: text} of a run at a point of its search."""
        axes = zip(self.start.items(), point, strict=True)
        return self.settings | {key: f"{value * STEPS[key] ** steps:.3g}" for (key, value), steps in axes}


def contender(name: str, config: ConfigDict) -> Contender:
    """The contender of a method's or a base's name, or of a reference, whose file is run. Raises UsageError."""
    from steppe.optim import methods, references
    from steppe.optim.base import BASES
    from steppe.optim.options import needs
    from steppe.optim.rule import OptionError

    method = base = "adamw"
    try:
        if references.is_reference(name):
            is_base = "learning_rate" in needs(references.load("method", name).made)
            method, base = ("adamw", name) if is_base else (name, "adamw")
        elif name in BASES:
            base = name
        else:
            method = methods.canonical(name)
        row = methods.row_of(method)
    except OptionError as error:
        raise UsageError(f"{name}: must be {error.accepted}, or a base: {', '.join(BASES)}") from None
    start = {RATE: float(config.optim.peak_learning_rate)}
    if row and "rho" in row.declared():
        start[RHO] = SHARE_OF_DEFAULT * row.rho
    return Contender(name, {"optim.method": method, "optim.base": base}, start)


def proposals(axes: int, losses: Mapping[Point, float], trials: int) -> list[Point]:
    """The points to be tried next; none once there were `trials`. losses: inf of one that diverged.

    The neighbours of the best along one axis, then the next; finer ones where none is missing, down to an eighth.
    """
    origin = (0.0,) * axes
    if not losses:
        return [origin]
    left, step = trials - len(losses), 1.0
    best = min(losses, key=lambda point: (losses[point], point))
    while left > 0 and step > 0.1:
        for axis in range(axes):
            missing = [each for each in neighbours(best, axis, step) if each not in losses]
            if missing:
                return missing[:left]
        step /= 2
    wider = []  # where all near ones are tried, beyond what was tried
    for axis in range(axes):
        tried = [point[axis] for point in losses]
        wider += [(*best[:axis], at, *best[axis + 1 :]) for at in (min(tried) - 1, max(tried) + 1)]
    return wider[: max(0, left)]


def neighbours(point: Point, axis: int, step: float = 1.0) -> list[Point]:
    """The two points a step away along an axis."""
    return [(*point[:axis], point[axis] + side * step, *point[axis + 1 :]) for side in (-1, 1)]


def unsure(axes: int, losses: Mapping[Point, float]) -> list[int]:
    """The axes along which nothing beyond the best point was tried, on one side or on both: its grid ends there."""
    best = min(losses, key=lambda point: (losses[point], point))
    tried = [[point[axis] for point in losses] for axis in range(axes)]
    return [axis for axis in range(axes) if not min(tried[axis]) < best[axis] < max(tried[axis])]
