"""AdamW's tokens for a candidate's loss: the truth is covered as often as is said, and nothing is said outside."""

import math

import numpy as np
import pytest

from steppe.scripts.judge.numbers import looks, tokens

SLACK = 3 * math.sqrt(0.05 * 0.95 / 2000)


def law(factor):
    """A held-out loss, nats a byte, as the runs here fall with their length: bent in the logarithm."""
    return 1.0 + 0.6 * factor**-0.3


def drawn(random, truth, pairs, factors, own=0.006, shared=0.03):
    """(candidate, {factor: AdamW}) of seeds: each has its level, and each run its noise."""
    level = random.normal(0, shared, pairs)
    run = lambda factor: law(factor) + level + random.normal(0, own, pairs)  # noqa: E731
    return run(truth), {factor: run(factor) for factor in factors}


@pytest.mark.parametrize("truth", [0.9, 1.0, 1.08, 1.3])
@pytest.mark.parametrize("pairs", [3, 12])
def test_the_interval_covers_the_truth_as_often_as_declared(truth, pairs):
    random, covered = np.random.default_rng(7), []
    for _ in range(2000):
        found = tokens.times(*drawn(random, truth, pairs, (*tokens.LENGTHS, 1.0)), 0.05)
        covered.append((found.low or 0) <= truth <= (found.high or math.inf))
    assert np.mean(covered) == pytest.approx(0.95, abs=SLACK)


def test_it_covers_as_often_at_whatever_look_one_stops():
    random, covered = np.random.default_rng(8), []
    rule = looks.plan(0.006 * math.sqrt(2), 0.005)
    for _ in range(1000):
        candidate, adamw = drawn(random, 1.06, rule.looks[-1], (*tokens.LENGTHS, 1.0))
        finding = looks.verdict(rule, {"adamw": (candidate - adamw[1.0]).tolist()})["adamw"]
        n, error = finding.interval.n, looks.errors(rule.looks, finding.error)[finding.look - 1]
        short = {looks.BETTER: tokens.LENGTHS[1:], looks.WORSE: tokens.LENGTHS[:1]}.get(finding.state, tokens.LENGTHS)
        found = tokens.times(candidate[:n], {each: adamw[each][:n] for each in (1.0, *short)}, error)
        covered.append((found.low or 0) <= 1.06 <= (found.high or math.inf))
    assert np.mean(covered) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_the_value_is_that_of_the_law_and_its_curve_costs_little():
    for truth in (0.75, 0.9, 1.0, 1.2, 1.4):
        adamw = {each: [law(each) + seed for seed in (0.0, 0.1, 0.2)] for each in (*tokens.LENGTHS, 1.0)}
        found = tokens.times([law(truth) + seed for seed in (0.0, 0.1, 0.2)], adamw, 0.05)
        assert found.value == pytest.approx(truth, rel=0.005)


def test_outside_of_what_was_measured_nothing_is_told():
    adamw = {factor: [law(factor) + noise for noise in (-1e-4, 0.0, 2e-4)] for factor in (1.0, math.sqrt(2))}
    better = tokens.times([law(3.0)] * 3, adamw, 0.05)
    assert (better.value, better.high) == (None, None)
    assert better.low == pytest.approx(math.sqrt(2))
    worse = tokens.times([law(0.5)] * 3, adamw, 0.05)
    assert (worse.value, worse.low, worse.high) == (None, None, 1.0)
    wild = tokens.times([1.0, 2.0, 1.7], adamw, 0.05)
    assert (wild.low, wild.high) == (None, None)
    assert "cannot be told" in tokens.said(wild._asdict())
    assert tokens.said(better._asdict()) == "AdamW needs more than 1.41 x the tokens"
    assert tokens.said(worse._asdict()) == "AdamW needs less than 1 x the tokens"


def test_equal_runs_need_equal_tokens():
    plain = [1.5, 1.6, 1.55]
    found = tokens.times(
        plain, {1.0: plain, **{each: [x - math.log(each) for x in plain] for each in (0.7, 1.4)}}, 0.05
    )
    assert found[:3] == pytest.approx((1.0, 1.0, 1.0), rel=1e-9)
