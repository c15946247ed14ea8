"""A judgement's budget, and the cost of its runs."""

from argparse import ArgumentTypeError

import pytest

from steppe.scripts.judge.stages import Budget, Cost, budget


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("6 hours", Budget(6, "hours")),
        ("1hour", Budget(1, "hours")),
        ("90 minutes", Budget(1.5, "hours")),
        ("2 days", Budget(48, "hours")),
        ("1e15", Budget(1e15, "FLOPs")),
        ("2.5e+12 FLOPs", Budget(2.5e12, "FLOPs")),
    ],
)
def test_a_budget_is_a_time_or_flops(text, meant):
    assert budget(text) == meant


@pytest.mark.parametrize("text", ["", "hours", "0", "-1 hours", "1.2.3", "6 years", "inf", "1e999", "nan hours"])
def test_any_other_budget_is_refused(text):
    with pytest.raises(ArgumentTypeError, match="must be a time above zero like '6 hours', or FLOPs"):
        budget(text)


def test_hours_are_those_of_the_machine_and_flops_those_of_the_runs():
    cost = Cost().plus(Cost(2e9, 3600.0), 3).plus(Cost(1e9, 1800.0))
    assert cost == Cost(7e9, 3.5 * 3600)
    assert not Budget(3, "hours").allows(cost, jobs=1)
    assert Budget(3, "hours").allows(cost, jobs=2)
    assert Budget(7e9, "FLOPs").allows(cost, jobs=1)
    assert not Budget(6.9e9, "FLOPs").allows(cost, jobs=8)
