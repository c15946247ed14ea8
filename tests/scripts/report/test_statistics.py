"""Statistics of a report: what they estimate is recovered, and intervals cover the truth as often as they say."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from steppe.scripts.report.numbers import statistics as st

GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


def covers(interval, truth):
    return interval.low <= truth <= interval.high


def test_a_mean_and_its_student_interval():
    found = st.t_interval([1.0, 2.0, 4.0])
    expected = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert found == pytest.approx((7 / 3, *expected, 3, 2))
    assert st.t_interval([0.5])[0] == 0.5
    assert math.isnan(st.t_interval([0.5]).low)
    assert st.t_interval([]).n == 0


def test_pooled_noise_is_the_two_way_analysis_of_variance():
    random = np.random.default_rng(0)
    table = random.normal(size=(4, 3)) + 10 * random.normal(size=3)
    fit = st.additive({(method, seed): table[method, seed] for method in range(4) for seed in range(3)})
    rest = table - table.mean(0) - table.mean(1)[:, None] + table.mean()
    assert fit.df == 6
    assert fit.sigma == pytest.approx(math.sqrt((rest**2).sum() / 6))
    found = st.with_noise(st.t_interval(table[2] - table[0]), fit)
    half = stats.t.ppf(0.975, 6) * fit.sigma * math.sqrt(2 / 3)
    middle = (table[2] - table[0]).mean()
    assert found == pytest.approx((middle, middle - half, middle + half, 3, 6))


@pytest.mark.parametrize("pairs", [3, 5, 10])
def test_what_pairs_can_show_is_shown_as_often_as_said(pairs):
    random, many = np.random.default_rng(pairs), 4000
    values = st.detectable(0.5, pairs) + 0.5 * random.normal(size=(many, pairs))
    shown = sum(found.low > 0 or found.high < 0 for found in map(st.t_interval, values)) / many
    assert shown == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / many))  # of a binomial count, four of its sd
    assert math.isnan(st.detectable(0.5, 1))


def test_the_p_value_of_an_interval_is_that_of_student_s_test():
    values = np.random.default_rng(0).normal(0.3, 1.0, 6)
    assert st.p_value(st.t_interval(values)) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert math.isnan(st.p_value(st.t_interval([1.0])))
    assert [st.p_value(st.t_interval([each, each])) for each in (0.0, 1.0)] == [1.0, 0.0]


def test_holm_rejects_what_closed_testing_by_bonferroni_rejects():
    """A hypothesis is rejected where every set of hypotheses with it is: its adjusted p-value is the largest there."""
    random = np.random.default_rng(0)
    for count in (1, 2, 5, 7):
        p = np.round(random.uniform(size=count) ** 3, 2)  # with ties
        sets = [c for n in range(1, count + 1) for c in itertools.combinations(range(count), n)]
        closed = [max(min(1.0, len(s) * min(p[list(s)])) for s in sets if i in s) for i in range(count)]
        assert st.holm(p) == pytest.approx(closed)
    assert st.holm([0.02, math.nan, 0.03])[[0, 2]] == pytest.approx([0.04, 0.04])
    assert math.isnan(st.holm([0.02, math.nan])[1])
    assert st.holm([]).size == 0


def test_noise_behind_several_intervals_is_pooled():
    groups = [[1.0, 2.0, 4.0], [0.5], [7.0, 7.5]]
    found = st.pooled([st.t_interval(values) for values in groups])
    assert found == pytest.approx((math.sqrt((2 * np.var(groups[0], ddof=1) + np.var(groups[2], ddof=1)) / 3), 3))
    assert math.isnan(st.pooled([st.t_interval([1.0])]).sigma)


def test_noise_does_not_depend_on_what_a_seed_does_to_all():
    losses = {("a", 0): 2.0, ("a", 1): 2.1, ("b", 0): 1.9, ("b", 1): 2.0, ("c", 0): 3.0}  # c has one seed: no noise
    moved = {(method, seed): loss + 7.0 * seed for (method, seed), loss in losses.items()}
    fits = [st.additive(values) for values in (losses, moved)]
    assert [fit.df for fit in fits] == [1, 1]
    assert fits[0].sigma == pytest.approx(fits[1].sigma, abs=1e-12)
    assert math.isnan(st.additive({("a", 0): 1.0, ("b", 1): 2.0}).sigma)


def test_intervals_of_differences_cover_the_truth():
    random = np.random.default_rng(1)
    paired = pooled = 0
    for _ in range(400):
        seeds = random.normal(0, 0.02, 3)
        table = {(m, s): 2 - 0.01 * m + seeds[s] + random.normal(0, 0.004) for m in range(5) for s in range(3)}
        paired += covers(st.t_interval([table[1, s] - table[0, s] for s in range(3)]), -0.01)
        pooled += covers(
            st.with_noise(st.t_interval([table[1, s] - table[0, s] for s in range(3)]), st.additive(table)), -0.01
        )
    assert 0.92 <= paired / 400 <= 0.98
    assert 0.92 <= pooled / 400 <= 0.98


def test_the_best_rho_is_chosen_on_the_seeds_that_all_rho_have():
    losses = {0.01: {0: 2.00, 1: 2.30, 2: 2.30}, 0.03: {0: 2.01}, 0.1: {0: 2.5}}  # 0.03 has but one, lucky seed
    choice = st.choose(losses)
    assert (choice.rho, choice.seeds) == (0.01, {0})
    assert choice.means[0.01] == 2.0
    disjoint = st.choose({0.01: {0: 2.0}, 0.03: {1: 1.9}})
    assert (disjoint.rho, disjoint.seeds) == (0.03, {0, 1})


def test_a_rho_that_diverged_once_is_not_chosen():
    choice = st.choose({0.01: {0: 2.0}, 0.03: {0: 1.9, 1: math.inf}})
    assert choice.rho == 0.01
    assert choice.means[0.03] == math.inf
    assert st.choose({0.1: {0: math.inf}}) is None
    assert st.choose({}) is None


def test_how_much_the_best_of_several_flatters():
    draws = np.random.default_rng(2).normal(size=(200_000, 5))
    assert st.selection_gain(5, 0.01) == pytest.approx(-0.01 * draws.min(1).mean(), rel=0.01)
    assert st.selection_gain(5, 0.01, 4) == pytest.approx(st.selection_gain(5, 0.01) / 2)
    assert st.selection_gain(1, 0.01) == 0


def test_the_minimum_of_a_parabola_is_found():
    found = st.optimum({rho: 2 + 0.02 * math.log(rho / 0.017) ** 2 for rho in GRID}, 1e-3, 10)
    assert found.status == "inside"
    assert found.rho == pytest.approx(0.017)
    assert found.low < 0.017 < found.high
    assert {rho for rho, _ in found.points} == {0.003, 0.01, 0.03} | ({0.1} if 0.1 / 0.01 <= 4 else set())


@pytest.mark.parametrize(
    ("means", "status", "rho"),
    [
        ({0.01: 2.0, 0.03: 2.1, 0.1: 2.2}, "edge", 0.01),
        ({0.01: 2.2, 0.03: 2.1, 0.1: 2.0}, "edge", 0.1),
        ({0.01: 2.2, 0.03: 2.1, 0.1: math.inf}, "diverged", 0.03),
        ({0.01: math.nan, 0.03: 2.1, 0.1: 2.2}, "pruned", 0.03),
        ({0.0: 1.9, 0.01: 2.0, 0.03: 1.95, 0.1: 2.1}, "edge", 0.0),
        ({0.01: 2.0}, "edge", 0.01),
    ],
)
def test_a_minimum_that_is_not_bracketed_is_said_to_be_so(means, status, rho):
    found = st.optimum(means, 0.01, 5)
    assert (found.status, found.rho) == (status, rho)
    assert math.isnan(found.low)


def test_bounds_are_where_the_slope_leaves_its_noise():
    """At Fieller's bounds the slope of the parabola is t standard errors from zero; here on a lopsided grid."""
    means = {0.01: 2.04, 0.02: 2.0, 0.06: 2.03, 0.3: 2.2}
    found = st.optimum(means, 0.004, 6, seeds=2)
    u, y = np.log([0.01, 0.02, 0.06]) - math.log(0.02), [2.04, 2.0, 2.03]
    design = np.stack([np.ones(3), u, u * u], 1)
    coefficients, inverse = np.linalg.solve(design, y), np.linalg.inv(design.T @ design)
    for bound in (found.low, found.high):
        slope = np.array([0, 1, 2 * math.log(bound / 0.02)])
        error = 0.004 / math.sqrt(2) * math.sqrt(slope @ inverse @ slope)
        assert abs(slope @ coefficients) == pytest.approx(stats.t.ppf(0.975, 6) * error)
    assert found.low < found.rho < found.high


def test_bounds_outside_the_grid_are_open():
    found = st.optimum({0.01: 2.0005, 0.03: 2.0, 0.1: 2.0004}, 0.01, 4)  # no curvature above this noise
    assert (found.status, found.low, found.high) == ("inside", 0.0, math.inf)
    assert math.isnan(st.optimum({0.01: 2.1, 0.03: 2.0, 0.1: 2.1}, math.nan, 0).low)


@pytest.mark.parametrize(("sigma", "seeds"), [(0.001, 3), (0.004, 3), (0.01, 3), (0.004, 1)])
def test_optima_and_the_exponent_of_their_power_law_are_covered(sigma, seeds):
    """True best rho 0.02 (N / 4e5)^-0.3; losses quadratic in log rho, with noise and a level of each seed."""
    random = np.random.default_rng(3)
    repeats, optima, exponents = 120, [], []
    for _ in range(repeats):
        sizes, radii, errors = (1e5, 4e5, 1.8e6), [], []
        for size in sizes:
            true = 0.02 * (size / 4e5) ** -0.3
            level = random.normal(0, 0.02, seeds)
            losses = {
                rho: {
                    s: 2 + 0.02 * math.log(rho / true) ** 2 + level[s] + random.normal(0, sigma) for s in range(seeds)
                }
                for rho in GRID
            }
            choice = st.choose(losses)
            fit = st.additive({(rho, s): loss for rho, by_seed in losses.items() for s, loss in by_seed.items()})
            noise, df = (fit.sigma, fit.df) if seeds > 1 else (sigma, math.inf)
            found = st.optimum(choice.means, noise, df, len(choice.seeds))
            assert found.status == "inside"
            optima.append(covers(found, true))
            radii.append(found.rho)
            errors.append(found.error)
        exponents.append(covers(st.power_law(sizes, radii, errors, df).exponent, -0.3))
    assert 0.9 <= np.mean(optima) <= 0.99
    assert 0.9 <= np.mean(exponents) <= 1.0


def test_a_power_law_without_known_noise_rests_on_its_scatter():
    random = np.random.default_rng(4)
    x, hits = np.geomspace(1e5, 1e7, 4), 0
    for _ in range(400):
        y = 0.3 * x**-0.25 * np.exp(random.normal(0, 0.1, 4))
        hits += covers(st.power_law(x, y, [math.nan] * 4, 0).exponent, -0.25)
    assert 0.92 <= hits / 400 <= 0.98


@pytest.mark.parametrize("unlike", [(1, 1), (1, 3)], ids=["like", "unlike"])
@pytest.mark.parametrize("between", [0.0, 0.3, 2.0])
@pytest.mark.parametrize(("sizes", "df"), [(3, 12), (4, 4), (6, 4)])
def test_a_power_law_covers_the_truth_however_sizes_scatter(sizes, df, between, unlike):
    """Points of known errors 0.1, or 0.1 and 0.3 in turn, each estimated with df; they scatter as well.

    Errors of the share of 400: 0.011. Measured of 1,000: 0.93 to 1.00, the least with unlike errors of few df.
    """
    random, x, repeats = np.random.default_rng(8), np.geomspace(1e5, 1e7, sizes), 400
    errors, exponent, band = 0.1 * np.resize(unlike, sizes), 0, 0
    for _ in range(repeats):
        noise = random.normal(size=sizes) * np.hypot(errors, between)
        y = 0.3 * x**-0.25 * np.exp(noise)
        law = st.power_law(x, y, errors * np.sqrt(random.chisquare(df, sizes) / df), df)
        exponent += covers(law.exponent, -0.25)
        _, low, high = st.power_law_band(law, x[-1:])
        band += low[0] <= 0.3 * x[-1] ** -0.25 <= high[0]
    assert exponent / repeats >= 0.91
    assert band / repeats >= 0.91


def test_a_power_law_in_numbers():
    x = np.array([1e5, 4e5, 1.6e6])
    law = st.power_law(x, 3.0 * x**-0.5, [0.1] * 3, 10)
    assert law.factor == pytest.approx(3.0)
    assert law.exponent.value == pytest.approx(-0.5)
    line, low, high = st.power_law_band(law, np.array([4e5]))
    half = stats.t.ppf(0.975, 1) * 0.1 / math.sqrt(3)  # at the centre, of three points alike
    assert [*line, *low, *high] == pytest.approx(3.0 * 4e5**-0.5 * np.exp([0, -half, half]))
    bent = st.power_law(x, 3.0 * x**-0.5 * np.array([1, 2, 1]), [0.1] * 3, 10)  # far more scatter than the errors say
    assert bent.exponent_error > 3 * law.exponent_error
    assert st.power_law([1e5], [0.1], [0.1], 10) is None
    assert math.isnan(st.power_law([1e5, 1e6], [0.1, 0.05], [0.1] * 2, 10).exponent.low)  # nobody knows their scatter
    two = st.power_law([1e5, 1e6], [0.1, 0.05], [math.nan] * 2, 0)
    assert math.isnan(two.exponent.low)
    assert two.exponent.value == pytest.approx(math.log10(0.5))


TRUTH = {"E": 1.2, "A": 40.0, "B": 60.0, "a": 0.35, "b": 0.33}


SIZES, LENGTHS = np.geomspace(1e5, 1e7, 4), np.geomspace(1e6, 3e8, 4)
DESIGNS = {
    "4x4": [axis.ravel() for axis in np.meshgrid(SIZES, LENGTHS)],
    "7": [np.array([1e5, 1e6, 1e7, 1e5, 1e6, 1e7, 1e6]), np.array([1e6, 1e6, 1e6, 3e7, 3e7, 3e8, 3e8])],
    "narrow": [axis.ravel() for axis in np.meshgrid(np.geomspace(2e4, 7e4, 3), np.geomspace(3e5, 2.4e6, 3))],
}


def _study(design, random, noise=0.0, between=0.0, seeds=1):
    """Runs of a known law; noise, between: sd of log loss from seed to seed, and of what all seeds of a pair share."""
    n, d = DESIGNS[design]
    losses = TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["a"] + TRUTH["B"] * d ** -TRUTH["b"]
    shared = np.repeat(np.log(losses) + random.normal(0, between, len(n)), seeds)
    return np.repeat(n, seeds), np.repeat(d, seeds), np.exp(shared + random.normal(0, noise, len(shared)))


def _covered(repeats, design, *noise):
    random, hits = np.random.default_rng(5), []
    for _ in range(repeats):
        law = st.scaling_law(*_study(design, random, *noise))
        hits += [covers(law.intervals[name], truth) for name, truth in TRUTH.items()]
    return np.mean(hits)


def test_a_scaling_law_without_noise_is_found_exactly():
    n, d, losses = _study("4x4", np.random.default_rng(0))
    law = st.scaling_law(n, d, losses)
    assert {name: law.intervals[name].value for name in TRUTH} == pytest.approx(TRUTH, rel=1e-3)
    assert st.predict(law, n, d) == pytest.approx(losses, rel=1e-6)


def test_the_bounds_of_a_scaling_law_are_where_its_profile_leaves_f():
    """On noise so small that the law is a plane in its constants, they are those of linear regression."""
    n, d, losses = _study("4x4", np.random.default_rng(2), 1e-5)
    law = st.scaling_law(n, d, losses)
    u, v, point = np.log(n), np.log(d), [law.intervals[name].value for name in TRUTH]
    terms = np.stack([np.full(len(n), point[0]), point[1] * n ** -point[3], point[2] * d ** -point[4]], 1)
    share = terms / terms.sum(1, keepdims=True)  # of the derivatives in log E, log A, log B
    jacobian = np.concatenate([share, (-share[:, 1] * u)[:, None], (-share[:, 2] * v)[:, None]], 1)
    rest = np.log(losses) - np.log(terms.sum(1))
    error = np.sqrt(np.diag(np.linalg.inv(jacobian.T @ jacobian)) * (rest**2).sum() / 11)
    for i, name in enumerate(TRUTH):
        own = [law.intervals[name].low, law.intervals[name].high]
        low, high = np.log(own) if name in "EAB" else own
        assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 11) * error[i], rel=0.02)


def test_intervals_of_a_scaling_law_cover_the_truth_also_where_seeds_share_what_they_are_off():
    """A bootstrap over single runs covered 0.68 here; the error of a share of 6 laws is about 0.05."""
    assert _covered(6, "4x4", 0.003, 0.01, 3) >= 0.87


@pytest.mark.exhaustive
@pytest.mark.parametrize("noise", [(0.003,), (0.01,), (0.003, 0.01, 3)], ids=str)
@pytest.mark.parametrize("design", DESIGNS)
def test_intervals_of_a_scaling_law_cover_the_truth_in_all_designs(design, noise):
    assert _covered(100, design, *noise) >= 0.91


@pytest.mark.parametrize(
    ("parameters", "tokens", "said"),
    [
        ([1, 2, 1, 2, 1, 2, 1], [1, 1, 2, 2, 3, 3, 4], "there are 2 and 4"),
        ([1, 2, 3, 1, 2, 3], [1, 1, 1, 2, 2, 3], "there are 6"),
        ([1, 2, 3, 1, 2, 3, 1], [1, 1, 1, 2, 2, 2, 3], ""),
    ],
)
def test_a_scaling_law_takes_enough_sizes_and_lengths(parameters, tokens, said):
    found = st.scaling_law_refusal(parameters, tokens)
    assert said in found
    assert bool(said) == bool(found)


def test_rank_correlation_is_spearmans():
    random = np.random.default_rng(6)
    x = random.normal(size=12)
    y = np.round(x + random.normal(size=12), 1)  # with ties
    found = st.rank_correlation([*x, math.nan], [*y, 1.0])
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.n == 12
    assert -1 <= found.low < found.value < found.high <= 1
    assert math.isnan(st.rank_correlation(x[:7], y[:7]).low)
    assert math.isnan(st.rank_correlation(x, 2 * x).low)  # no bootstrap shows how far from 1 it may be
    assert math.isnan(st.rank_correlation([1, 2, 3], [1, 1, 1]).value)


@pytest.mark.parametrize(("pairs", "share"), [(8, 0.0), (8, 0.9), (8, 0.97), (12, -0.97), (20, 0.6)])
def test_intervals_of_rank_correlations_cover_the_truth(pairs, share):
    random, hits = np.random.default_rng(7), []
    for repeat in range(150):
        x = random.normal(size=pairs)
        y = share * x + math.sqrt(1 - share**2) * random.normal(size=pairs)
        found = st.rank_correlation(x, y, 300, repeat)
        if math.isfinite(found.low):
            hits.append(covers(found, 6 / math.pi * math.asin(share / 2)))
    assert np.mean(hits) >= 0.9
