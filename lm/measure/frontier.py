"""The forgetting frontier: loss on the first text versus gain on a second, over learning rates and lengths.

Imports no jax, because reports use it on stored measurements.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Required, TypedDict

from msgspec import Meta

from steppe.data import stored

SHARE = 0.8  # of the gain that every run reaches; at the full gain the weakest run would only just arrive
Paths = Sequence[Sequence[tuple[float, float]]]


class Tuned(TypedDict, total=False):
    """A point during fine-tuning, nats a token."""

    step: stored.Count
    gained: Required[float | None]
    lost: Required[float | None]


class TunedPath(TypedDict, total=False):
    """Fine-tuning at one peak learning rate."""

    rate: Required[stored.Amount]
    points: Required[Annotated[list[Tuned], Meta(min_length=1)]]
    along: dict[str, float | None]


class FineTune(TypedDict, total=False):
    """Gains and losses of fine-tuning on a second text; loss: before it, nats a token; text: its fingerprint."""

    loss: Required[float | None]
    paths: Required[list[TunedPath]]
    text: str


class Details(TypedDict, total=False):
    """Further fields of a measurement, as far as they are read."""

    fine_tune: FineTune | None


def paths_of(fine_tune: Mapping[str, Any]) -> list[list[tuple[float, float]]]:
    """The (gained, lost) points of each path of a fine-tuning record, {"paths": [{"points": [...]}]}."""
    number = lambda value: math.nan if value is None else value  # noqa: E731
    return [
        [(number(point["gained"]), number(point["lost"])) for point in path["points"]] for path in fine_tune["paths"]
    ]


def at_rates(fine_tune: Mapping[str, Any], asked: Sequence[str] = ("gained", "lost", "curvature")) -> dict[str, float]:
    """{"fine_tune_lr=RATE: KIND": number} for the paths of a fine-tuning record, without unknown numbers.

    KIND, one of `asked`: gained on the second text or lost on the first, nats a token; or curvature along the path.
    """
    ends = {path["rate"]: {**path["points"][-1], **path.get("along", {})} for path in fine_tune.get("paths", ())}
    found = {f"fine_tune_lr={rate:g}: {kind}": ends[rate].get(kind) for kind in asked for rate in sorted(ends)}
    return {key: float(value) for key, value in found.items() if value is not None}


def best_gain(paths: Paths) -> float:
    """The largest gain of any point, at least 0; non-finite points are ignored."""
    return max((gain for path in paths for gain, lost in path if math.isfinite(gain + lost)), default=0.0)


def equal_loss(fine_tunes: Sequence[Mapping[str, Any]]) -> float:
    """A loss on the second text that all runs which gain reach: the highest after SHARE of a best gain; NaN of none."""
    gains = [(each["loss"], best_gain(paths_of(each))) for each in fine_tunes]
    return max((loss - SHARE * gain for loss, gain in gains if gain > 0), default=math.nan)


def lost_at(paths: Sequence[Sequence[tuple[float, float]]], gain: float) -> float:
    """The least loss given up on the first text for a gain on the second: the forgetting frontier at `gain`.

    paths: for each learning rate the (gained, lost) points during fine-tuning, nats a token. A path starts at (0, 0)
    and is interpolated linearly up to where it first reaches `gain`. 0 for a gain of 0; NaN if no path reaches it.
    """
    if gain <= 0:
        return 0.0
    reached = []
    for path in paths:
        before = (0.0, 0.0)
        for point in path:
            if not all(map(math.isfinite, point)):
                break
            if point[0] >= gain:
                share = (gain - before[0]) / (point[0] - before[0])
                reached.append(before[1] + share * (point[1] - before[1]))
                break
            before = point
    return min(reached, default=math.nan)
