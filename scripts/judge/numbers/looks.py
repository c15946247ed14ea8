"""When paired seeds are enough: a group-sequential rule over differences, candidate minus rival, nats a byte.

The differences of one comparison are taken as independent and normal, of unknown mean and spread, one a fresh seed.
They are looked at after declared numbers of pairs. Each look has a repeated confidence interval (Jennison, Turnbull:
J. R. Statist. Soc. B 51, 1989): the interval misses the true difference at *any* look with the declared probability.
So a rule may stop at whatever look it likes, and for whatever reason.

- Spending: alpha t^1.5 is spent by the look at the share t of all pairs (Kim, DeMets: Biometrika 74, 1987). That lies
  between Pocock's and O'Brien and Fleming's: a large difference is seen at 3 to 7 pairs, and the last look has at most
  15 % more pairs than a single look would take.
- Bounds: exact for Student's t of normal differences, see `errors`; no normal approximation at few pairs.
- Comparisons: Holm's step-down over the two one-sided bounds of each of m comparisons. Every comparison begins with the
  error alpha / m; after k of them are told better or worse, the rest have 2 alpha / (2m - k). Then any false claim of
  better, worse or within the effect, at any look, has at most probability alpha, however the comparisons depend on each
  other: before the first false claim no released bound was a false one, so at least as many bounds as the divisor
  says can be missed. Within the effect releases nothing, since it does not refute that the difference is zero.
- A plan is declared before its first look. A longer one takes fresh seeds. A budget may end before the last look;
  what was found then holds, and the plan may be gone on with later.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from steppe.scripts.report.numbers import statistics as st

BETTER, WORSE, WITHIN = "better", "worse", "within the effect"
UNDECIDED, CANNOT = "undecided", "cannot be told"
FIRST = 3  # pairs of the first look: two leave the spread to one degree of freedom
_GROWTH = 1.5  # of pairs from look to look: more looks save few pairs
_NODES, _ANGLES = 600, 40  # of `errors`: its probabilities are right to 1e-4


class Rule(NamedTuple):
    """What is declared before the first look. effect: nats a byte; alpha: two-sided error of the whole family.

    power: probability, at the true difference `effect`; looks: pairs at each, rising; comparisons: of the family.
    """

    effect: float
    alpha: float
    power: float
    looks: tuple[int, ...]
    comparisons: int


class Finding(NamedTuple):
    """What one comparison tells.

    state: BETTER (interval below zero), WORSE, WITHIN (inside -effect to effect), UNDECIDED (more pairs) or CANNOT.
    interval: the repeated one at its last look, error: its two-sided error over all looks; look: its number, from 1.
    sd: of one pair. needed: pairs that a fresh plan of one look takes with the rule's power if mean and sd are those
    seen. None where there is no such number.
    """

    state: str
    interval: st.Interval | None = None
    look: int = 0
    error: float | None = None
    sd: float | None = None
    needed: int | None = None


def sizes(most: int) -> tuple[int, ...]:
    """Pairs at each look, from 3 to most, each half as many again; the last but one is at most 0.85 of the last."""
    if most < FIRST:
        raise ValueError(f"{most} pairs are too few to look at: at least {FIRST}")
    found = [FIRST]
    while (following := max(found[-1] + 2, math.ceil(found[-1] * _GROWTH))) <= 0.85 * most:
        found.append(following)
    return tuple(found) if found[-1] == most else (*found, most)


@functools.lru_cache(256)
def errors(looks: tuple[int, ...], alpha: float) -> tuple[float, ...]:
    """Two-sided error of the Student interval of each look, so that one of them misses with probability alpha.

    Exact up to quadrature. About the true mean, the direction of the n differences is uniform on a sphere, and the
    angle phi between it and the plane of mean zero has tan(phi) = t / sqrt(n - 1). One more difference turns it to
    sin(phi') = (sqrt(n) sin(phi) cos(psi) + sin(psi)) / sqrt(n + 1), with psi of density cos(psi)^(n - 1), whatever
    came before. So the density of phi where no look has missed is carried from pair to pair, on a grid.
    """
    edges = np.linspace(0, math.pi / 2, _NODES + 1)
    width, middles = edges[1], (edges[1:] + edges[:-1]) / 2
    nodes, weights = np.polynomial.legendre.leggauss(_ANGLES)
    n = looks[0]
    mass = np.diff(1 - 2 * stats.t.sf(np.tan(edges) * math.sqrt(n - 1), n - 1))
    found, spent = [], 0.0
    for size in looks:
        while n < size:
            psi = (nodes * min(math.pi / 2, 7 / math.sqrt(n)))[:, None]  # outside, the density is nothing
            share = weights * np.cos(psi[:, 0]) ** (n - 1)
            turned = (math.sqrt(n) * np.sin(middles) * np.cos(psi) + np.sin(psi)) / math.sqrt(n + 1)
            place = np.abs(np.arcsin(np.clip(turned, -1, 1))) / width - 0.5
            near = np.rint(place).astype(int)
            rest, carried, mass = place - near, (share / share.sum())[:, None] * mass, np.zeros(_NODES)
            # to three nodes, so that mean and variance of what is carried stay
            for step, part in ((-1, (rest**2 - rest) / 2), (0, 1 - rest**2), (1, (rest**2 + rest) / 2)):
                to = near + step
                to = np.minimum(np.where(to < 0, -1 - to, to), _NODES - 1)
                mass += np.bincount(to.ravel(), (carried * part).ravel(), _NODES)
            n += 1
        due = alpha * (size / looks[-1]) ** 1.5 - spent
        spent += due
        above = np.append(np.cumsum(mass[::-1])[::-1], 0.0)
        angle = np.interp(due, above[::-1], edges[::-1])
        error = 2 * stats.t.sf(math.tan(angle) * math.sqrt(size - 1), size - 1)
        found.append(due if size == looks[0] else max(due, float(error)))  # never less than if no look had missed
        angle = math.atan(stats.t.isf(found[-1] / 2, size - 1) / math.sqrt(size - 1))
        mass = mass * np.clip((angle - edges[:-1]) / width, 0, 1)
    return tuple(found)


def pairs_needed(sd: float, effect: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Fewest pairs of which one Student interval of error alpha tells a true difference from zero with the power.

    sd: of one pair's difference; effect > 0: the true difference, in its unit. Exact for normal differences.
    """
    if not (effect > 0 and sd >= 0 and math.isfinite(sd)):
        raise ValueError(f"sd {sd} and effect {effect}: a spread, and a difference above zero")
    return _fewest(lambda pairs: st.power_of(effect, sd, pairs, 1 - alpha) >= power, sd / effect, alpha, power)


def plan(
    sd: float, effect: float = 0.005, alpha: float = 0.05, power: float = 0.8, comparisons: int = 1,
    most: int | None = None,
) -> Rule:  # fmt: skip
    """The rule whose last look tells a difference of the effect from zero with the power, in whichever comparison.

    sd: of one pair's difference, the largest of the comparisons, nats a byte; most: pairs that are there at most.
    """
    pairs = max(FIRST, pairs_needed(sd, effect, alpha / comparisons, power))
    while True:
        rule = Rule(effect, alpha, power, sizes(min(pairs, most or pairs)), comparisons)
        if rule.looks[-1] == most or (short := detectable(rule, sd) / effect) <= 1:
            return rule
        pairs = max(pairs + 1, math.ceil(pairs * short))


def detectable(rule: Rule, sd: float, number: int = -1) -> float:
    """Smallest true difference that a look, by itself, tells with the rule's power, of the comparison told first."""
    error = errors(rule.looks, rule.alpha / rule.comparisons)[number]
    return st.detectable(sd, rule.looks[number], rule.power, 1 - error)


def verdict(rule: Rule, differences: Mapping[str, Sequence[float]], ended: bool = False) -> dict[str, Finding]:
    """What the pairs so far tell of each comparison; the same pairs tell the same however often they are asked.

    differences: {rival: candidate minus rival, a number a pair, in the order of the seeds}, nats a byte, finite; one
    that is decided needs no more pairs, and its pairs are not used. A look is taken once all that are undecided have
    its pairs. ended: there will be no more pairs. ValueError of a number that is not finite.
    """
    if len(differences) > rule.comparisons:
        raise ValueError(f"{len(differences)} comparisons, the rule was declared for {rule.comparisons}")
    for name, values in differences.items():
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{name}: differences must be finite, a run that diverged is judged by itself: {values}")
    found = {name: Finding(UNDECIDED) for name in differences}
    told = 0  # better or worse
    for number, pairs in enumerate(rule.looks):
        rest = [name for name in found if found[name].state == UNDECIDED]
        if any(len(differences[name]) < pairs for name in rest):
            break
        while rest:
            error = 2 * rule.alpha / (2 * rule.comparisons - told)
            for name in rest:
                found[name] = _look(rule, differences[name], number, error)
            now = sum(found[name].state in (BETTER, WORSE) for name in rest)
            rest, told = [name for name in rest if found[name].state == UNDECIDED], told + now
            if not now:
                break
    ended = ended or max((each.look for each in found.values()), default=0) == len(rule.looks)
    return {name: _needed(rule, each, ended) if each.state == UNDECIDED else each for name, each in found.items()}


def _look(rule: Rule, values: Sequence[float], number: int, error: float) -> Finding:
    """One comparison at one look, by the pairs of that look."""
    used = values[: rule.looks[number]]
    level = 1 - errors(rule.looks, error)[number]
    interval = st.t_interval(used, level)
    small = -rule.effect < interval.low and interval.high < rule.effect
    state = BETTER if interval.high < 0 else WORSE if interval.low > 0 else WITHIN if small else UNDECIDED
    return Finding(state, interval, number + 1, error, st.pooled([interval], level).sigma)


def _needed(rule: Rule, found: Finding, ended: bool) -> Finding:
    """An undecided finding with the pairs that would decide it."""
    found = found._replace(state=CANNOT if ended else UNDECIDED)
    if found.interval is None or found.sd is None or found.error is None:
        return found
    mean, sd, level = abs(found.interval.value), found.sd, 1 - found.error

    def enough(pairs: int) -> bool:
        if mean >= rule.effect / 2:  # the nearer claim: that it is not zero, or that it is within the effect
            return st.power_of(mean, sd, pairs, level) >= rule.power
        bounds = (st.power_of(rule.effect + side * mean, sd, pairs, level) for side in (-1, 1))
        return sum(bounds) - 1 >= rule.power

    return found._replace(needed=_fewest(enough, sd / max(mean, rule.effect - mean), found.error, rule.power))


def _fewest(enough: Callable[[int], bool], ratio: float, error: float, power: float) -> int:
    """The fewest pairs that are enough, by bisection; ratio: of the sd to the difference that is to be told."""
    # of a known sd, never more than of an estimated one
    high = max(2, math.ceil(((stats.norm.isf(error / 2) + stats.norm.ppf(power)) * ratio) ** 2))
    low = high - 1
    while not enough(high):
        low, high = high, math.ceil(1.1 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
