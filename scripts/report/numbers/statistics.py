"""The statistics of a report: plain functions of numbers, each saying what its interval means.

Intervals are confidence intervals at level 0.95 unless told otherwise: over many repetitions of the whole experiment
they cover the truth that often, if the stated assumptions hold. A bound that the data do not give is NaN.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from scipy import optimize, special, stats

LEVEL = 0.95
K = TypeVar("K", bound=float)
_HUBER = 1e-3  # in log loss, as Hoffmann et al. (arXiv 2203.15556) take it; wider where the noise is


class Interval(NamedTuple):
    """An estimate and its bounds; n: the pairs or points behind it, df: degrees of freedom of its noise."""

    value: float
    low: float
    high: float
    n: int
    df: float = math.nan


def finite(values: pd.Series) -> pd.Series:
    """Where values are numbers, and not infinite."""
    return values.astype(float).abs() < math.inf


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean of independent values and its Student interval; one value has no bounds."""
    n, found = len(values), np.asarray(values, float)
    if n < 2:
        return Interval(float(found.mean()) if n else math.nan, math.nan, math.nan, n)
    half = _t(level, n - 1) * found.std(ddof=1) / math.sqrt(n)
    return Interval(float(found.mean()), float(found.mean() - half), float(found.mean() + half), n, n - 1)


def p_value(found: Interval) -> float:
    """Of Student's two-sided test that the mean behind an interval of t_interval is zero; NaN without bounds."""
    if not found.df > 0:
        return math.nan
    error = (found.high - found.low) / 2 / _t(LEVEL, found.df)
    return float(2 * stats.t.sf(abs(found.value) / error, found.df)) if error else float(found.value == 0)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values of one family by Holm's step-down (Scand. J. Statist. 6, 1979): below alpha are those that survive.

    What is unknown stays so and counts for nothing.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    found = np.full(len(p), math.nan)
    found[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return found


class Noise(NamedTuple):
    """sigma: standard deviation of one value, NaN at df 0."""

    sigma: float
    df: int


def pooled(intervals: Sequence[Interval], level: float = LEVEL) -> Noise:
    """The noise of one value behind Student intervals of several means, as if all had the same."""
    known = [each for each in intervals if each.n > 1]
    df = sum(each.n - 1 for each in known)
    squares = sum((each.n - 1) * each.n * ((each.high - each.low) / 2 / _t(level, each.n - 1)) ** 2 for each in known)
    return Noise(math.sqrt(squares / df) if df else math.nan, df)


def power_of(difference: float, sigma: float, pairs: int, level: float = LEVEL) -> float:
    """How often the Student interval of this many pairs lies on the side of zero on which the true difference lies.

    sigma: standard deviation of one pair's difference. By the noncentral t distribution, exact for normal differences.
    """
    if not sigma > 0:
        return float(difference != 0)
    return float(1 - special.nctdtr(pairs - 1, abs(difference) * math.sqrt(pairs) / sigma, _t(level, pairs - 1)))


def detectable(sigma: float, pairs: int, power: float = 0.8, level: float = LEVEL) -> float:
    """The smallest true difference whose Student interval lies on its side of zero so often; NaN for one pair.

    sigma: standard deviation of one pair's difference; power: how often, a probability; see power_of.
    """
    if pairs < 2 or not math.isfinite(sigma):
        return math.nan

    def missing(shift: float) -> float:
        return power_of(shift, 1.0, pairs, level) - power

    highest = 2 * _t(level, pairs - 1) / math.sqrt(pairs)
    return optimize.root_scalar(missing, bracket=(0.0, highest)).root * sigma


def additive(losses: Mapping[tuple[Any, Any], float]) -> Noise:
    """The noise in {(treatment, seed): loss}, loss = treatment + seed + noise, by least squares.

    Losses need not be complete; treatments that share no seed with the others are fitted all the same.
    """
    treatments, seeds = (list(dict.fromkeys(key[axis] for key in losses)) for axis in (0, 1))
    y = np.array(list(losses.values()), float)
    design = np.zeros((len(y), len(treatments) + len(seeds)))
    for row, (treatment, seed) in enumerate(losses):
        design[row, treatments.index(treatment)] = design[row, len(treatments) + seeds.index(seed)] = 1
    fitted, _, rank, _ = np.linalg.lstsq(design, y)
    df = len(y) - int(rank)
    return Noise(math.sqrt(float(((y - design @ fitted) ** 2).sum()) / df) if df else math.nan, df)


def with_noise(found: Interval, noise: Noise) -> Interval:
    """A mean of differences with bounds from the noise of one loss, that of all; exact if it is normal and alike."""
    half = _t(LEVEL, noise.df) * noise.sigma * math.sqrt(2 / found.n) if noise.df else math.nan
    return Interval(found.value, found.value - half, found.value + half, found.n, noise.df)


class Choice(NamedTuple, Generic[K]):
    """The best rho: seeds that took part in choosing it; means {rho: mean loss over them}, infinite if one diverged."""

    rho: K
    seeds: frozenset
    means: dict[K, float]


def choose(losses: Mapping[K, Mapping[Any, float]]) -> Choice[K] | None:
    """The rho of the lowest mean loss in {rho: {seed: loss}}; a diverged run's loss is infinite, its rho not eligible.

    The mean is over the seeds that all rho share: a rho that got more seeds because it looked best would otherwise be
    compared with others judged by one lucky seed. Where there is none, over the seeds each has.
    """
    if not losses:
        return None
    shared = frozenset.intersection(*(frozenset(by_seed) for by_seed in losses.values()))
    means = {}
    for rho in sorted(losses):
        used = [loss for seed, loss in losses[rho].items() if not shared or seed in shared]
        bad = any(not math.isfinite(loss) for loss in losses[rho].values())
        means[rho] = math.inf if bad else float(np.mean(used))
    best = min(means, key=means.__getitem__)
    if not math.isfinite(means[best]):
        return None
    return Choice(best, shared or frozenset(seed for by_seed in losses.values() for seed in by_seed), means)


def selection_gain(candidates: int, sigma: float, seeds: int = 1) -> float:
    """How far below its true value the best of this many equally good candidates is expected to look, in sigma's unit.

    sigma: sd of one measurement; seeds: measurements averaged per candidate. An upper bound when they are not equal.
    """
    if candidates < 2:
        return 0.0
    grid = np.linspace(-8, 8, 4001)
    density = candidates * stats.norm.pdf(grid) * stats.norm.cdf(grid) ** (candidates - 1)
    return float(np.trapezoid(grid * density, grid)) * sigma / math.sqrt(seeds)


class Optimum(NamedTuple):
    """Where a parabola in log rho has its minimum.

    status: inside; edge (best at an end of the grid); diverged, pruned (the next rho did, so its loss is not
    known); flat (no parabola with a minimum there).
    rho: the vertex where inside, else the best of the grid. low, high: NaN where unknown; 0 and infinity where they lie
    outside the grid, of which the data say nothing. error: standard error of log rho. points: (rho, loss) fitted.
    """

    status: str
    rho: float
    low: float
    high: float
    error: float
    points: tuple[tuple[float, float], ...]


def optimum(means: Mapping[float, float], sigma: float, df: float, seeds: int = 1) -> Optimum:
    """The minimum of {rho: mean loss} by a parabola in log rho through the best value and its surroundings.

    The surroundings are both neighbours and whatever lies within a factor of 4, no further, since losses are no
    parabola over the whole grid (they meet AdamW's at rho 0). sigma, df: sd of one loss around its seed's own level,
    and its degrees of freedom (inf: known). The interval is Fieller's.
    A loss is infinite where the run diverged, NaN where it was pruned.
    """
    finite = sorted(rho for rho, loss in means.items() if math.isfinite(loss))
    if not finite:
        return Optimum("edge", math.nan, math.nan, math.nan, math.nan, ())
    best = min(finite, key=lambda rho: means[rho])
    grid = sorted(means)
    around = [means[rho] for rho in grid[max(0, grid.index(best) - 1) : grid.index(best) + 2] if rho > 0]
    status = "" if len(around) == 3 else "edge"
    status = "pruned" if any(map(math.isnan, around)) else "diverged" if math.inf in around else status
    if status:
        return Optimum(status, best, math.nan, math.nan, math.nan, ((best, means[best]),))
    finite = [rho for rho in finite if rho > 0]
    middle = finite.index(best)
    close = math.log(4) * (1 + 1e-6)
    near = [rho for i, rho in enumerate(finite) if abs(i - middle) <= 1 or abs(math.log(rho / best)) <= close]
    u, y = np.log(np.array(near) / best), np.array([means[rho] for rho in near])
    design = np.stack([np.ones_like(u), u, u * u], 1)
    inverse = np.linalg.inv(design.T @ design)
    _, c1, c2 = (float(c) for c in inverse @ design.T @ y)
    points = tuple((rho, means[rho]) for rho in near)
    if not (c2 > 0 and u[0] <= -c1 / (2 * c2) <= u[-1]):
        return Optimum("flat", best, math.nan, math.nan, math.nan, points)
    vertex, v = -c1 / (2 * c2), inverse * sigma**2 / seeds
    error = math.sqrt(v[1, 1] + 4 * vertex * v[1, 2] + 4 * vertex**2 * v[2, 2]) / (2 * c2)
    low = high = math.nan
    if df > 0 and math.isfinite(sigma):
        t2 = _t(LEVEL, df) ** 2  # the vertices x with (c1 + 2 c2 x)^2 <= t^2 var(c1 + 2 c2 x)
        a, b, c = 4 * (c2**2 - t2 * v[2, 2]), 4 * (c1 * c2 - t2 * v[1, 2]), c1**2 - t2 * v[1, 1]
        root = math.sqrt(max(0.0, b * b - 4 * a * c)) if a > 0 else math.inf
        low, high = (best * math.exp(min(500.0, (-b + sign * root) / (2 * abs(a) or 1))) for sign in (-1, 1))
        low, high = low if low >= finite[0] else 0.0, high if high <= finite[-1] else math.inf
    return Optimum("inside", best * math.exp(vertex), low, high, error, points)


class PowerLaw(NamedTuple):
    """y = factor * x^exponent, through `centre` = (x, y); how: what the interval of the exponent rests on."""

    factor: float
    exponent: Interval
    centre: tuple[float, float]
    centre_error: float
    exponent_error: float
    how: str


def power_law(x: Sequence[float], y: Sequence[float], errors: Sequence[float], df: float) -> PowerLaw | None:
    """Fits log y = log factor + exponent log x; errors: standard errors of log y, all NaN where unknown.

    Points scatter about the line by more than their errors. How much more is estimated (Paule, Mandel: J. Res. NBS 87,
    1982) and weighs them. The interval is Knapp and Hartung's (Stat. Med. 22, 2003), from the scatter left, with n - 2
    degrees of freedom or the errors' where they have fewer; never narrower than the errors alone make it (Röver et al.:
    BMC Med. Res. Methodol. 15, 2015). Two points have none, since their scatter is unknown. None for fewer than two
    different x.
    """
    log_x, log_y, own = np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), np.asarray(errors, float)
    n = len(log_x)
    if n < 2 or np.ptp(log_x) == 0:
        return None
    known = bool(np.isfinite(own).all() and (own > 0).all())
    own = own**2 if known else np.ones(n)
    free, line = n - 2, _line(log_x, log_y, 1 / own)
    if known and free and line.misfit > free:
        most = _line(log_x, log_y, np.ones(n)).misfit / free

        def missing(between: float) -> float:
            return _line(log_x, log_y, 1 / (own + between)).misfit - free

        line = _line(log_x, log_y, 1 / (own + optimize.root_scalar(missing, bracket=(0.0, most)).root))
    scale, freedom = math.nan, math.nan
    how = "none: two points show no scatter about a line"
    if free:
        scale, freedom = line.misfit / free, float(free)
        how = f"scatter of {n} points about the line"
    if free and known:
        scale, freedom, how = max(1.0, scale), min(freedom, df), f"noise between seeds and {how}"
    error = math.sqrt(scale / line.spread)
    half = _t(LEVEL, freedom) * error if freedom > 0 else math.nan
    return PowerLaw(
        math.exp(line.level - line.slope * line.middle),
        Interval(line.slope, line.slope - half, line.slope + half, n, freedom),
        (math.exp(line.middle), math.exp(line.level)), math.sqrt(scale / line.weight), error, how,
    )  # fmt: skip


class _Line(NamedTuple):
    """A weighted line: level + slope (x - middle); spread, misfit: weighted sums of squares of x and of the rest."""

    middle: float
    level: float
    slope: float
    weight: float
    spread: float
    misfit: float


def _line(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> _Line:
    middle, level = np.average(x, weights=w), np.average(y, weights=w)
    spread = (w * (x - middle) ** 2).sum()
    slope = (w * (x - middle) * y).sum() / spread
    misfit = (w * (y - level - slope * (x - middle)) ** 2).sum()
    return _Line(*map(float, (middle, level, slope, w.sum(), spread, misfit)))


def power_law_band(law: PowerLaw, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(line, lower, upper) of a power law at x, pointwise; NaN bounds where it has none."""
    u = np.log(x / law.centre[0])
    line = np.log(law.centre[1]) + law.exponent.value * u
    freedom = law.exponent.df
    half = (_t(LEVEL, freedom) if freedom > 0 else math.nan) * np.hypot(law.centre_error, u * law.exponent_error)
    return np.exp(line), np.exp(line - half), np.exp(line + half)


class ScalingLaw(NamedTuple):
    """loss = E + A / N^a + B / D^b; intervals of E, A, B, a, b; rms of the residuals of log loss of single runs."""

    intervals: dict[str, Interval]
    rms: float


def scaling_law_refusal(parameters: Sequence[float], tokens: Sequence[float]) -> str:
    """Why L(N, D) cannot be fitted to these runs; "" if it can."""
    n, d = len(set(parameters)), len(set(tokens))
    pairs = len(set(zip(parameters, tokens, strict=True)))
    if n < 3 or d < 3:
        return f"it takes at least 3 model sizes and 3 token counts; there are {n} and {d}"
    if pairs < 7:
        return f"5 unknowns take at least 7 different (size, tokens) pairs; there are {pairs}"
    return ""


def scaling_law(parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """Fits L(N, D) = E + A/N^a + B/D^b by Huber loss on log loss from several starts (as arXiv 2203.15556).

    Seeds of one (N, D) are averaged first: what a size is off the law by is common to them, so they are no evidence of
    their own. Huber's loss turns linear at 1e-3, or at 1.345 robust standard deviations of the residuals where that is
    more. Intervals are of profile likelihood: the values at which the best fit of the other four loses no more than
    F(1, pairs - 5) allows (Bates, Watts: Nonlinear Regression Analysis, 1988, ch. 6). Assumes pairs independent and the
    form true. A bound that the data do not give is zero or infinite.
    """
    runs = [np.log(np.asarray(values, float)) for values in (parameters, tokens, losses)]
    n, d, y = pd.DataFrame(np.transpose(runs)).groupby([0, 1])[2].mean().reset_index().to_numpy().T
    centre = n.mean(), d.mean()
    u, v = n - centre[0], d - centre[1]  # exponents and factors are nearly independent there
    low = float(np.exp(y.min()))
    starts = [
        (math.log(low * share), math.log(low * (1 - share) / 2), math.log(low * (1 - share) / 2), a, b)
        for share in (0.3, 0.7, 0.95) for a in (0.2, 0.6) for b in (0.2, 0.6)
    ]  # fmt: skip
    free = len(y) - 5
    begun = sorted((_fit_law(u, v, y, start, _HUBER, most=20) for start in starts), key=lambda found: found.cost)
    best = min((_fit_law(u, v, y, found.x, _HUBER) for found in begun[:3]), key=lambda found: found.cost)
    noise = 1.4826 * float(np.median(np.abs(y - _law(best.x, u, v)[0]))) * math.sqrt(len(y) / free)
    delta = max(_HUBER, 1.345 * noise)  # much narrower than the noise it would be the median's poor efficiency
    best = _fit_law(u, v, y, best.x, delta)
    allowed = _t(LEVEL, free) ** 2 / free * best.cost
    rows, found = np.eye(5), {}  # row @ p being log E, log A, log B, a or b
    rows[1, 3], rows[2, 4] = centre
    for name, row in zip("EABab", rows, strict=True):
        low, high = (_bound(u, v, y, best, delta, row, side, _ENDS[name][side > 0], allowed) for side in (-1, 1))
        bounds = (float(row @ best.x), low, high)
        value, low, high = map(math.exp, bounds) if name in "EAB" else (bounds[0], max(0.0, low), high)
        found[name] = Interval(value, low, high, len(y), free)
    rest = runs[2] - _law(best.x, runs[0] - centre[0], runs[1] - centre[1])[0]
    return ScalingLaw(found, float(np.sqrt(np.mean(rest**2))))


def predict(law: ScalingLaw, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The fitted loss at numbers of parameters and tokens, nats per token."""
    E, A, B, a, b = (law.intervals[name].value for name in ("E", "A", "B", "a", "b"))
    return E + A * np.asarray(parameters, float) ** -a + B * np.asarray(tokens, float) ** -b


def rank_correlation(x: Sequence[float], y: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """Spearman's correlation of paired values, percentile bootstrap over pairs, which it takes as independent draws.

    No bounds below 8 pairs, of which the bootstrap's intervals are too short, nor where all ranks agree: every resample
    of these agrees too. Pairs with a non-finite member are left out.
    """
    pairs = np.asarray([x, y], float)
    a, b = pairs[:, np.isfinite(pairs).all(0)]
    n = len(a)
    if n < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Interval(math.nan, math.nan, math.nan, n)
    rows = np.random.default_rng(seed).integers(0, n, (resamples, n))
    value = _row_correlation(stats.rankdata(a)[None], stats.rankdata(b)[None])[0]
    if n < 8 or abs(value) > 1 - 1e-9:
        return Interval(float(value), math.nan, math.nan, n)
    many = _row_correlation(stats.rankdata(a[rows], axis=1), stats.rankdata(b[rows], axis=1))
    low, high = np.nanquantile(many, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high), n)


@functools.cache
def _t(level: float, df: float) -> float:
    return float(stats.t.ppf((1 + level) / 2, df)) if math.isfinite(df) else float(stats.norm.ppf((1 + level) / 2))


def _row_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a resample of one pair alone has no correlation
        return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def _law(p: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log loss, its derivatives [n, 5]) of p = (log E, log A', log B', a, b), A' and B' at the centre of the data."""
    terms = np.exp(np.stack([np.full_like(u, p[0]), p[1] - p[3] * u, p[2] - p[4] * v], 1))
    total = terms.sum(1)
    share = terms / total[:, None]
    return np.log(total), np.concatenate([share, (-share[:, 1] * u)[:, None], (-share[:, 2] * v)[:, None]], 1)


_LEAST, _MOST = np.array([-12.0, -12, -12, 0, 0]), np.array([12.0, 12, 12, 3, 3])  # of p, so that no term runs off


def _fit_law(
    u: np.ndarray, v: np.ndarray, y: np.ndarray, start, delta: float, row: np.ndarray | None = None,
    value: float = 0.0, most: int = 200,
) -> optimize.OptimizeResult:  # fmt: skip
    """The best p, or the best of those with row @ p = value, after at most `most` evaluations; x: all five of it."""
    keep, into, fixed = list(range(5)), np.eye(5), np.zeros(5)
    if row is not None:
        first = int(np.flatnonzero(row)[0])  # row is 1 there
        keep.remove(first)
        into = np.delete(into, first, 1)
        into[first], fixed[first] = -row[keep], value
    found = optimize.least_squares(
        lambda q: _law(fixed + into @ q, u, v)[0] - y, np.clip(start, _LEAST + 1e-9, _MOST - 1e-9)[keep],
        jac=lambda q: _law(fixed + into @ q, u, v)[1] @ into,  # pyright: ignore[reportArgumentType]  a text by default
        loss="huber", f_scale=delta,
        bounds=(_LEAST[keep], _MOST[keep]), x_scale=np.array([1, 1, 1, 0.3, 0.3])[keep], max_nfev=most,
    )  # fmt: skip
    found.x = fixed + into @ found.x
    return found


_ENDS = {"E": (-12.0, 12.0), "A": (-60.0, 60.0), "B": (-60.0, 60.0), "a": (0.0, 3.0), "b": (0.0, 3.0)}


def _bound(
    u: np.ndarray, v: np.ndarray, y: np.ndarray, best: optimize.OptimizeResult, delta: float, row: np.ndarray,
    side: int, end: float, allowed: float,
) -> float:  # fmt: skip
    """Where row @ p, falling or rising to its end, makes the best fit lose more than allowed; infinite if nowhere."""
    inside = float(row @ best.x)
    known = {inside: (best.x, -math.sqrt(allowed))}

    def excess(value: float) -> float:
        if value not in known:
            start, _ = known[min(known, key=lambda other: abs(other - value))]
            found = _fit_law(u, v, y, start, delta, row, value)
            known[value] = found.x, math.sqrt(max(0.0, found.cost - best.cost)) - math.sqrt(allowed)
        return known[value][1]

    # of a parabola the bound is one step away
    step = math.sqrt(2 * allowed * max(0.0, float(row @ np.linalg.pinv(best.jac.T @ best.jac) @ row))) + 1e-9
    while (outside := inside + side * step) * side < end * side:
        if excess(outside) > 0:
            return float(optimize.root_scalar(excess, bracket=(inside, outside), xtol=3e-3 * step).root)
        inside, step = outside, 1.5 * step
    return side * math.inf
