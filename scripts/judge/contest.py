"""Who is compared and how each is tuned: by equal trials, on a seed that is not used again.

The search goes from a start to the better neighbour, one axis after the other, and takes finer steps once no neighbour
is better. It knows nothing but losses, so it continues from any runs. Axes are the peak learning
rate, rho, and the options of the contender's own, in this order.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from steppe.configs.read import UsageError

RATE, RHO = "optim.peak_learning_rate", "optim.rho"
SHARE_OF_DEFAULT = 0.4  # of a method's published rho, which comes from vision, where the search begins
STEPS = (1.0, 0.5, 0.25, 0.125)
Point = tuple[float, ...]  # steps from the start, an entry an axis


class Axis(NamedTuple):
    """What is tuned. at(steps from the start) -> the text of its key; None where that is no value of it.

    choices: how many values it has, in no order, which are at 0, 1, ...; 0 of a number.
    """

    key: str
    at: Callable[[float], str | None]
    choices: int = 0

    def near(self, at: float, step: float = 1.0) -> list[float]:
        """Where its neighbours are, a step away; all others of a choice."""
        if self.choices:
            return [float(other) for other in range(self.choices) if other != at] if step == 1 else []
        return [at - step, at + step]

    def ends(self, at: float, tried: Iterable[float]) -> bool:
        """Whether a value that it may have, on either side of this one, has none tried at it or beyond."""
        beyond = [to for to in self.near(at) if self.at(to) not in (None, self.at(at))]
        if self.choices:
            return not set(beyond) <= set(tried)
        return any(all((other - at) * (to - at) <= 0 for other in tried) for to in beyond)


class Contender(NamedTuple):
    """One who is tuned. settings: {key: text} of its config; fixed: options of its own that have no axis."""

    name: str
    settings: dict[str, str]
    axes: tuple[Axis, ...]
    fixed: tuple[str, ...] = ()

    def texts(self, point: Point) -> dict[str, str | None]:
        """{key: text} of its axes at a point; None of one that has no value there."""
        return {axis.key: axis.at(steps) for axis, steps in zip(self.axes, point, strict=True)}

    def at(self, point: Point) -> dict[str, str]:
        """{key: text} of a run at a point of its search; an option at its default is left to its method."""
        moved = {axis.key for axis, steps in zip(self.axes, point, strict=True) if steps} | {RATE, RHO}
        return self.settings | {key: text for key, text in self.texts(point).items() if text and key in moved}


def contender(name: str, config: ConfigDict) -> Contender:
    """The contender of a method's or a base's name, or of a reference, whose file is run. Raises UsageError."""
    from steppe.optim import methods, references
    from steppe.optim.base import BASES
    from steppe.optim.options import nearest, needs
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
        declared = (row.declared() if row else {}) | references.declared({"base": base})
    except OptionError as error:
        names = [*dict.fromkeys([*methods.METHODS, *methods.ALIASES, *BASES])]
        known = f"one of {', '.join(names)}, or {references.ACCEPTED}{nearest(name, names)}"
        raise UsageError(f"{name}: must be {error.accepted if references.is_reference(name) else known}") from None
    axes = [_times(RATE, float(config.optim.peak_learning_rate), 2.0)]
    if row and "rho" in declared:
        axes.append(_times(RHO, SHARE_OF_DEFAULT * row.rho, math.sqrt(10)))
    own = {option: axis(f"optim.{option}", *each) for option, each in declared.items() if option != "rho"}
    axes += [each for each in own.values() if each]
    fixed = tuple(option for option, each in own.items() if each is None)
    return Contender(name, {"optim.method": method, "optim.base": base}, tuple(axes), fixed)


def axis(key: str, kind: type, default: Any, option: Any) -> Axis | None:
    """The axis of an option by how it is declared; None where no other value follows from its default.

    Choices have all their values. A share, which lies in 0 to 1, has steps of 3 in its odds (0.25, 0.5, 0.75), away
    from 0 or 1 it halves the way to the other end. Other numbers have steps of 2, integers rounded; 0 has no scale.
    """
    values = [True, False] if kind is bool else list(option.names)
    if values:
        texts = [str(value) for value in (default, *(value for value in values if value != default))]
        return Axis(key, lambda steps: texts[int(steps)], len(texts))
    if kind not in (int, float):
        return None
    if kind is float and not option.allows(-0.5) and not option.allows(1.5):
        return Axis(key, lambda steps: _allowed(option, float(f"{_share(default, steps):.6g}")))
    if not default:
        return None
    digits = (lambda value: round(value)) if kind is int else (lambda value: float(f"{value:.3g}"))
    return Axis(key, lambda steps: _allowed(option, digits(default * 2.0**steps)))


def _times(key: str, start: float, factor: float) -> Axis:
    return Axis(key, lambda steps: f"{start * factor**steps:.3g}")


def _share(default: float, steps: float) -> float:
    if default in (0, 1):
        way = 0.5 ** (steps if default == 0 else -steps)
        return 1 - way if default == 0 else way
    odds = default / (1 - default) * 3.0**steps
    return default if steps == 0 else odds / (1 + odds)


def _allowed(option: Any, value: float) -> str | None:
    return str(value) if option.allows(value) else None


def proposals(
    axes: Sequence[Axis], losses: Mapping[Point, float], trials: int, legal: Callable[[Point], bool] = lambda _: True
) -> list[Point]:
    """The points to be tried next; none once there were `trials`. losses: inf of one that diverged.

    The neighbours of the best along one axis, then the next, then finer ones; all legal, none that says what one said.
    """
    if not losses:
        return [(0.0,) * len(axes)]
    left, best = max(0, trials - len(losses)), best_of(losses)
    texts = lambda point: tuple(axis.at(steps) for axis, steps in zip(axes, point, strict=True))  # noqa: E731
    tried = set(map(texts, losses))

    def fresh(number: int, places: Iterable[float]) -> list[Point]:
        points = {texts(point): point for at in places for point in [(*best[:number], at, *best[number + 1 :])]}
        return [point for said, point in points.items() if None not in said and said not in tried and legal(point)]

    for step in STEPS:
        for number, each in enumerate(axes):
            if missing := fresh(number, each.near(best[number], step)):
                return missing[:left]
    wider = []  # where all near ones are tried, beyond what was tried
    for number, each in enumerate(axes):
        reached = [point[number] for point in losses]
        wider += [] if each.choices else fresh(number, (min(reached) - 1, max(reached) + 1))
    return wider[:left]


def best_of(losses: Mapping[Point, float]) -> Point:
    """The point of the lowest loss, the first that was tried of several: an axis that does nothing is not walked."""
    return min(losses, key=losses.__getitem__)


def unsure(axes: Sequence[Axis], losses: Mapping[Point, float]) -> list[str]:
    """The keys of axes along which nothing beyond the best point was tried, on a side where there is something."""
    best = best_of(losses)
    tried = [{point[number] for point in losses} for number in range(len(axes))]
    return [each.key for each, at, there in zip(axes, best, tried, strict=True) if each.ends(at, there)]
