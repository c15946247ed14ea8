"""The sequential rule: its errors and its power, simulated with the noise of pairs that was measured on real runs.

Shares of simulations are held against what is promised with three standard errors of the share, `slack`;
`exhaustive` repeats families more often. Noise: sd of a pair, nats a byte, normal or Student's with 4
degrees of freedom.
"""

import functools
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from steppe.scripts.judge.numbers import looks
from steppe.scripts.report.numbers import statistics as st

EFFECT, SD = 0.005, (0.004, 0.010, 0.017)


def slack(share, repeats):
    return 3 * math.sqrt(share * (1 - share) / repeats)


def runs(random, shape, sd, tails):
    """Noise of runs, whose difference has this sd."""
    scale = sd / math.sqrt(2)
    return scale * (random.standard_t(4, shape) / math.sqrt(2) if tails else random.normal(size=shape))


def simulated(rule, means, sd, tails=False, repeats=500, seed=0):
    """Findings of repeated verdicts; the comparisons share the runs of the candidate, so they are correlated."""
    random, pairs = np.random.default_rng(seed), rule.looks[-1]
    for _ in range(repeats):
        own = runs(random, pairs, sd, tails)
        rivals = runs(random, (len(means), pairs), sd, tails)
        values = np.array(means)[:, None] + own - rivals
        yield list(looks.verdict(rule, dict(enumerate(values.tolist()))).values())


def false(mean, state):
    """Whether a claim is not true of the true difference; to be undecided claims nothing."""
    return {looks.BETTER: mean >= 0, looks.WORSE: mean <= 0, looks.WITHIN: abs(mean) >= EFFECT}.get(state, False)


@functools.cache
def plan(sd, comparisons=1):
    return looks.plan(sd, EFFECT, comparisons=comparisons)


# ----------------------------------------------------------------------------------------------------- one comparison
@pytest.mark.parametrize("alpha", [0.05, 0.01])
@pytest.mark.parametrize("sizes", [(3, 5, 8, 12, 18, 27, 39), (3, 4, 5, 6, 7), (2, 30), (12,)])
def test_the_intervals_of_all_looks_together_miss_as_often_as_declared(sizes, alpha):
    """Each look spends its share of the error, here of 200,000 repeats."""
    repeats, spent = 200_000, np.diff([0.0, *(alpha * (np.array(sizes) / sizes[-1]) ** 1.5)])
    values = np.random.default_rng(1).normal(size=(repeats, sizes[-1])).astype(np.float32)
    fine, missed = np.ones(repeats, bool), []
    for size, error in zip(sizes, looks.errors(sizes, alpha), strict=True):
        seen = values[:, :size]
        outside = np.abs(seen.mean(1)) * math.sqrt(size) > stats.t.isf(error / 2, size - 1) * seen.std(1, ddof=1)
        missed.append((fine & outside).mean())
        fine &= ~outside
    assert sum(missed) == pytest.approx(alpha, abs=slack(alpha, repeats))
    assert missed == pytest.approx(spent, abs=slack(alpha, repeats))


def test_one_look_has_student_s_interval_and_more_error_never_a_wider_one():
    assert looks.errors((7,), 0.03) == pytest.approx((0.03,))
    shares = [looks.errors(plan(0.010).looks, alpha) for alpha in (0.01, 0.0125, 0.02, 0.05)]
    assert (np.diff(shares, axis=0) > 0).all()  # Holm needs it: what is told at a small share is told at a larger one


@pytest.mark.parametrize(
    ("sd", "tails"), [(0.004, False), (0.010, False), (0.017, False), (0.004, True), (0.010, True)]
)
def test_no_difference_is_told_from_zero_at_most_as_often_as_declared(sd, tails):
    """With tails of t4 the error is below: the spread of a wild pair widens its own interval."""
    found = [each.state for (each,) in simulated(plan(sd), [0.0], sd, tails)]
    assert np.mean([false(0.0, state) for state in found]) <= 0.05 + slack(0.05, 500)


@pytest.mark.parametrize("sd", SD)
def test_a_difference_of_the_effect_is_told_with_the_power(sd):
    found = [each.state for (each,) in simulated(plan(sd), [-EFFECT], sd)]
    assert np.mean([state == looks.BETTER for state in found]) >= 0.8 - slack(0.8, 500)
    assert np.mean([false(-EFFECT, state) for state in found]) <= 0.05 + slack(0.05, 500)


@pytest.mark.parametrize("tails", [False, True], ids=["normal", "t4"])
@pytest.mark.parametrize("mean", [EFFECT, -EFFECT])
def test_a_difference_of_just_the_effect_is_called_within_it_at_most_as_often_as_declared(mean, tails):
    found = [each.state for (each,) in simulated(plan(0.010), [mean], 0.010, tails)]
    assert np.mean([state == looks.WITHIN for state in found]) <= 0.05 + slack(0.05, 500)


@pytest.mark.parametrize("mean", [0.0, EFFECT / 2, EFFECT, 4 * EFFECT])
def test_the_interval_at_the_stop_covers_the_truth(mean):
    intervals = [each.interval for (each,) in simulated(plan(0.010), [mean], 0.010)]
    covered = np.mean([each.low <= mean <= each.high for each in intervals])
    assert covered >= 0.95 - slack(0.05, 500)


def test_large_differences_need_few_pairs():
    used = [each.interval.n for (each,) in simulated(plan(0.010), [10 * EFFECT], 0.010, repeats=200)]
    assert np.mean(used) < 6


# -------------------------------------------------------------------------------------------------- several comparisons
def false_families(sd, means, tails, repeats):
    found = simulated(plan(sd, len(means)), means, sd, tails, repeats)
    return np.mean([any(false(mean, each.state) for mean, each in zip(means, row, strict=True)) for row in found])


FAMILIES = [
    (0.004, [0.0] * 5),
    (0.004, [-0.05, -0.05, 0.0, EFFECT]),  # the others get what the first two release
    (0.004, [-0.02, 0.02, 0.0, 0.0, -EFFECT]),
    (0.010, [0.0] * 3),
    (0.010, [0.0] * 4),
    (0.017, [0.0, -EFFECT, -0.05]),
]


@pytest.mark.parametrize("tails", [False, True], ids=["normal", "t4"])
@pytest.mark.parametrize(("sd", "means"), FAMILIES[:3])
def test_any_false_claim_of_a_family_is_as_rare_as_declared(sd, means, tails):
    assert false_families(sd, means, tails, 400) <= 0.05 + slack(0.05, 400)


@pytest.mark.exhaustive
@pytest.mark.parametrize("tails", [False, True], ids=["normal", "t4"])
@pytest.mark.parametrize(("sd", "means"), FAMILIES)
def test_any_false_claim_of_many_families_is_as_rare_as_declared(sd, means, tails):
    assert false_families(sd, means, tails, 6000) <= 0.05 + slack(0.05, 6000)


def test_each_difference_of_the_effect_is_told_with_the_power_also_among_others():
    means = [-EFFECT, EFFECT, 0.0]
    found = list(simulated(plan(0.004, 3), means, 0.004))
    assert np.mean([row[0].state == looks.BETTER for row in found]) >= 0.8 - slack(0.8, 500)
    assert np.mean([row[1].state == looks.WORSE for row in found]) >= 0.8 - slack(0.8, 500)


def test_better_and_worse_release_error_to_the_others_and_within_does_not():
    rule = looks.Rule(EFFECT, 0.05, 0.8, (3, 5, 8), 3)
    clear, same = [-1.0, -1.01, -0.99], [0.0, 1e-5, -1e-5]
    found = looks.verdict(rule, {"a": clear, "b": same, "c": [0.003, 0.004, -0.02]})
    assert [each.state for each in found.values()] == [looks.BETTER, looks.WITHIN, looks.UNDECIDED]
    assert [each.error for each in found.values()] == pytest.approx([0.05 / 3, 0.05 / 3, 2 * 0.05 / 5])
    found = looks.verdict(rule, {"b": same, "c": [0.003, 0.004, -0.02]})  # of a family declared as three
    assert {each.error for each in found.values()} == {0.05 / 3}


# ------------------------------------------------------------------------------------------------- what is told, how
def test_what_is_told_stays_told_and_does_not_hang_on_order_or_unit():
    random = np.random.default_rng(3)
    for _ in range(20):
        rule = plan(0.010, 3)
        values = {name: random.normal(random.normal(0, 0.01), 0.01, rule.looks[-1]).tolist() for name in "abc"}
        whole = looks.verdict(rule, values)
        for pairs in range(0, rule.looks[-1] + 1, 5):
            part = looks.verdict(rule, {name: each[:pairs] for name, each in values.items()})
            for name, found in part.items():
                assert found == whole[name] or found.state == looks.UNDECIDED
                assert not found.look or rule.looks[found.look - 1] == found.interval.n <= pairs
        assert looks.verdict(rule, dict(reversed(values.items()))) == whole
        mirrored = looks.verdict(rule, {name: [-x for x in each] for name, each in values.items()})
        turned = {looks.BETTER: looks.WORSE, looks.WORSE: looks.BETTER}
        assert [f.state for f in mirrored.values()] == [turned.get(f.state, f.state) for f in whole.values()]
        scaled = looks.verdict(
            rule._replace(effect=8 * EFFECT), {name: [8 * x for x in each] for name, each in values.items()}
        )
        assert [f.state for f in scaled.values()] == [f.state for f in whole.values()]


def test_states():
    rule = looks.Rule(EFFECT, 0.05, 0.8, (3, 5), 1)

    def told(values, **options):
        return looks.verdict(rule, {"adamw": values}, **options)["adamw"]

    assert told([]) == looks.Finding(looks.UNDECIDED)
    assert told([], ended=True) == looks.Finding(looks.CANNOT)
    same = told([0.0, 0.0, 0.0])  # another name of the same method
    assert (same.state, same.interval[:4]) == (looks.WITHIN, (0.0, 0.0, 0.0, 3))
    assert told([-0.0030, -0.0031, -0.0029]).state == looks.BETTER  # and by less than the effect
    assert told([0.1, 0.1, 0.1]).state == looks.WORSE
    wide = [0.03, -0.01, -0.02, 0.01, 0.02]
    assert told(wide[:4]).state == looks.UNDECIDED
    assert told(wide[:4]).interval.n == 3
    assert told(wide[:4], ended=True).state == looks.CANNOT
    last = told(wide)
    assert (last.state, last.look) == (looks.CANNOT, 2)
    assert last.sd == pytest.approx(np.std(wide, ddof=1))
    assert told([*wide, -9.0]) == told(wide)  # pairs after the last look are not used


def test_what_it_would_take_decides_it_with_the_power():
    """A fresh plan of one look, of the mean and sd seen; the claim may be any that is true."""
    random = np.random.default_rng(5)
    for mean in (0.0001, 0.0024, 0.004, 0.006):
        rule = looks.Rule(EFFECT, 0.05, 0.8, (3, 5), 1)
        values = random.normal(size=5)
        values = mean + 0.012 * (values - values.mean()) / values.std(ddof=1)
        found = looks.verdict(rule, {"adamw": values.tolist()})["adamw"]
        assert found.needed > 5
        again = looks.Rule(EFFECT, 0.05, 0.8, (found.needed,), 1)
        drawn = random.normal(mean, 0.012, (400, found.needed))
        states = [looks.verdict(again, {"adamw": each.tolist()})["adamw"].state for each in drawn]
        assert np.mean([state != looks.CANNOT for state in states]) >= 0.8 - slack(0.8, 400)
        assert np.mean([false(mean, state) for state in states]) <= 0.05 + slack(0.05, 400)


@pytest.mark.parametrize(("effect", "pairs"), [(0.8, 15), (0.5, 34), (0.2, 199)])
def test_pairs_needed_are_those_of_published_tables(effect, pairs):
    """Of the paired t test at alpha 0.05 and power 0.8 (G*Power 3.1, means of two dependent groups)."""
    assert looks.pairs_needed(1.0, effect) == pairs
    assert st.detectable(1.0, pairs) <= effect < st.detectable(1.0, pairs - 1)


def test_pairs_needed_of_no_effect_are_refused():
    with pytest.raises(ValueError, match="effect 0"):
        looks.pairs_needed(0.01, 0.0)


@pytest.mark.parametrize("sd", SD)
def test_what_a_plan_can_tell_is_what_it_tells(sd):
    rule, repeats = plan(sd), 20_000
    least = looks.detectable(rule, sd)
    assert least <= EFFECT
    n, error = rule.looks[-1], looks.errors(rule.looks, 0.05)[-1]
    values = np.random.default_rng(4).normal(0, sd, (repeats, n))
    half = stats.t.isf(error / 2, n - 1) * values.std(1, ddof=1) / math.sqrt(n)
    means = values.mean(1)
    assert np.mean(means + EFFECT > half) >= 0.8 - slack(0.8, repeats)
    assert np.mean(means + least > half) == pytest.approx(0.8, abs=slack(0.8, repeats))


def test_a_budget_of_pairs_ends_a_plan_and_lets_it_tell_less():
    short = looks.plan(0.010, most=10)
    assert short.looks == (3, 5, 8, 10)
    assert looks.detectable(short, 0.010) > 0.010
    assert looks.plan(0.0, most=40).looks == (3,)


@pytest.mark.parametrize("most", [3, 4, 5, 7, 8, 13, 40, 200])
def test_looks_rise_to_the_last_pair(most):
    found = looks.sizes(most)
    assert found[0] == 3
    assert found[-1] == most
    assert all(a < b for a, b in itertools.pairwise(found))


def test_bad_numbers_are_refused():
    rule = looks.Rule(EFFECT, 0.05, 0.8, (3, 5), 1)
    with pytest.raises(ValueError, match="at least 3"):
        looks.sizes(2)
    with pytest.raises(ValueError, match="muon: differences must be finite"):
        looks.verdict(rule, {"muon": [0.1, math.inf]})
    with pytest.raises(ValueError, match="2 comparisons"):
        looks.verdict(rule, {"muon": [], "soap": []})
