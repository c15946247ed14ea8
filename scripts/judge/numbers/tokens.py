"""An effect in tokens: how many times the tokens AdamW would need for the candidate's loss.

AdamW is run on the same seeds at other lengths, each with its whole schedule, at the rate that was best at its own
length. Between two lengths the loss is taken as linear in the logarithm of the tokens. Then for each factor the
differences of pairs, AdamW at that factor less the candidate, are Student's if losses are normal; those factors at
which their interval, of the error of the look, holds zero are the interval of the factor (Fieller's way). It covers the
truth as often as the look's own interval does, at whatever look one stops. Outside the lengths nothing is told.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LENGTHS = (1 / math.sqrt(2), math.sqrt(2))  # times the tokens of the comparison
_POINTS = 2000  # of a grid of factors


class Times(NamedTuple):
    """AdamW's tokens over the candidate's; None of a value or bound outside what was measured, from least to most."""

    value: float | None
    low: float | None
    high: float | None
    least: float
    most: float


def times(candidate: Sequence[float], adamw: Mapping[float, Sequence[float]], error: float) -> Times:
    """The factor at which AdamW has the candidate's loss, with the interval of a two-sided error.

    candidate: a loss a seed; adamw: {factor: a loss a seed, in the same order}, at two factors or more.
    """
    factors = sorted(adamw)
    logs, losses = np.log(factors), np.array([adamw[each] for each in factors], float)
    grid = np.union1d(np.linspace(logs[0], logs[-1], _POINTS), logs)
    at = np.apply_along_axis(lambda seed: np.interp(grid, logs, seed), 0, losses)  # [grid, seeds]
    gaps = at - np.asarray(candidate, float)
    n, means = gaps.shape[1], gaps.mean(1)
    half = stats.t.isf(error / 2, n - 1) * gaps.std(1, ddof=1) / math.sqrt(n)
    inside = np.abs(means) <= half
    below, value = np.flatnonzero(means <= 0), None
    if len(below) and means[0] >= 0:  # where AdamW's mean loss falls to the candidate's
        sides = [below[0], below[0] - 1]
        value = math.exp(grid[0] if below[0] == 0 else np.interp(0.0, means[sides], grid[sides]))
    ends = grid[inside]
    if not len(ends):  # told from zero everywhere: beyond one end, or between two points of the grid
        ends = grid[-1:] if means[-1] > 0 else grid[:1] if means[0] < 0 else grid[means <= 0][:1]
    low = math.exp(ends[0]) if ends[0] > logs[0] else None
    high = math.exp(ends[-1]) if ends[-1] < logs[-1] else None
    return Times(value, low, high, factors[0], factors[-1])


def said(found: Mapping[str, Any]) -> str:
    """ "AdamW needs 1.08 x the tokens (1.05 to 1.12)", for a reader."""
    value, low, high = found["value"], found["low"], found["high"]
    below, above = f"below {found['least']:.3g}", f"above {found['most']:.3g}"
    if low is None and high is None:
        return f"how many tokens AdamW needs cannot be told: {below} to {above} x"
    if value is None:
        return f"AdamW needs {f'more than {low:.3g}' if low else f'less than {high:.3g}'} x the tokens"
    bounds = f"{f'{low:.3g}' if low else below} to {f'{high:.3g}' if high else above}"
    return f"AdamW needs {value:.3g} x the tokens ({bounds})"
