"""The slope of a difference over sizes: its interval covers the truth as often as is said, wherever the sizes stop."""

import math

import numpy as np
import pytest

from steppe.scripts.judge import trend
from steppe.scripts.judge.numbers import looks
from steppe.scripts.report.numbers import statistics as st

SIZES = (16_000, 40_000, 130_000)


def stopped(random, rule, mean, sd):
    """The differences until a size's verdict."""
    values = random.normal(mean, sd, rule.looks[-1]).tolist()
    found = looks.verdict(rule, {"adamw": values})["adamw"]
    return values[: found.interval.n]


@pytest.mark.parametrize("sizes", [SIZES[:2], SIZES])
@pytest.mark.parametrize("means", [(0.0, 0.0, 0.0), (-0.005, -0.006, 0.004), (-0.02, 0.0, -0.003)])
def test_the_interval_covers_the_slope_of_the_true_differences_at_whatever_looks_the_sizes_stop(sizes, means):
    random, repeats, means = np.random.default_rng(11), 500, means[: len(sizes)]
    truth = np.polyfit(np.log10(sizes), means, 1)[0]
    rules = [looks.plan(sd, 0.005) for sd in (0.006, 0.009, 0.006)[: len(sizes)]]
    covered = []
    for _ in range(repeats):
        intervals = [
            trend.at_stop(rule._asdict(), stopped(random, rule, mean, sd))
            for rule, mean, sd in zip(rules, means, (0.006, 0.009, 0.006), strict=False)
        ]
        found = trend.slope(sizes, intervals)
        covered.append(found.low <= truth <= found.high)
    assert np.mean(covered) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / repeats)


def test_two_sizes_of_equal_spread_have_the_interval_of_their_difference():
    intervals = [st.Interval(0.01, 0.006, 0.014, 8), st.Interval(0.04, 0.036, 0.044, 8)]
    found = trend.slope((1e4, 1e5), intervals)
    assert found[:3] == pytest.approx((0.03, 0.03 - 0.004 * math.sqrt(2), 0.03 + 0.004 * math.sqrt(2)))


def verdict(parameters, **differences):
    rule = looks.Rule(0.005, 0.05, 0.8, (3, 5, 8), 2)._asdict()
    compared = {name: {"differences": each} for name, each in differences.items()}
    return {"candidate": "mine.py:f", "parameters": parameters, "rule": rule, "comparisons": compared}


def test_a_trend_is_of_what_was_compared_at_every_size_and_is_kept(tmp_path):
    found = [
        verdict(30_000, adamw=[-0.03, -0.031, -0.029], muon=[0.1, 0.11, 0.12]),
        verdict(10_000, adamw=[-0.01, -0.011, -0.009], muon=[]),
    ]
    said = trend.keep(tmp_path, found)
    assert "from 10,000 to 30,000 parameters, and nothing beyond" in said
    assert "less adamw" in said
    assert "falls" in said
    assert "muon" not in said
    assert {path.name for path in (tmp_path / "trends").iterdir()} == {"mine.py_f.json", "mine.py_f.png"}
    assert "no rival was compared" in trend.keep(tmp_path, [found[0], found[0]])
