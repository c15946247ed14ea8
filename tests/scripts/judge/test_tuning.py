"""Whether a rung may stop trials: by the ranks of those that went to their end."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steppe.scripts.judge.tuning import AGREE, ENOUGH, agreement, said

LOSS = st.one_of(st.floats(1, 3), st.just(math.inf))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(LOSS, LOSS), min_size=2, max_size=14))
def test_a_rung_may_stop_trials_only_where_their_ranks_agree(trials):
    there, ends = map(list, zip(*trials, strict=True))
    correlation, holds = agreement(there, ends)
    if len(set(there)) > 1 and len(set(ends)) > 1:
        ranks = [stats.rankdata(losses) for losses in (there, ends)]  # scipy has no rank of inf
        assert correlation == pytest.approx(stats.pearsonr(*ranks)[0], abs=1e-12)
    assert not holds or (correlation >= AGREE and len(trials) >= ENOUGH)
    best = there[ends.index(min(ends))]
    assert not holds or sorted(there).index(best) < len(there) / 2  # halving keeps it


def test_the_same_order_holds_and_the_opposite_or_too_few_trials_do_not():
    losses = [1.0 + i / 10 for i in range(ENOUGH)]
    assert agreement([2 * loss for loss in losses], losses) == (pytest.approx(1), True)
    assert agreement(losses[::-1], losses) == (pytest.approx(-1), False)
    assert agreement(losses[:-1], losses[:-1]) == (pytest.approx(1), False)
    assert agreement([math.inf] * 8, [1.0] * 8) == (0, False)


def test_what_is_said_of_it():
    told = {"step": 50, "correlation": 0.944, "trials": 6, "holds": True}
    assert said(told).endswith("AdamW's 6 trials correlate by 0.94: losing trials stop there")
    assert "every trial is a whole run" in said(told | {"holds": False})
    assert "no evaluation on the way" in said({})
