"""The search of a contender's best: as many trials as are given, none twice, and the optimum of a bowl within them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steppe.configs.read import UsageError, read_config
from steppe.scripts.judge.contest import RATE, RHO, contender, proposals, unsure


def searched(axes, loss, trials):
    """({point: loss}, the rounds) of a search to its end."""
    known, rounds = {}, []
    while more := proposals(axes, known, trials):
        assert not set(more) & set(known)
        rounds.append(more)
        known |= {point: loss(point) for point in more}
    return known, rounds


CENTRES = st.tuples(st.floats(-3, 3), st.floats(-3, 3))


@settings(max_examples=60, deadline=None)
@given(CENTRES, st.sampled_from([1, 2]), st.floats(0.2, 5))
def test_a_bowl_s_bottom_is_found_inside_its_grid(centre, axes, stretch):
    def loss(point):
        return sum(stretch**i * (x - c) ** 2 for i, (x, c) in enumerate(zip(point, centre, strict=False)))

    known, _ = searched(axes, loss, 40)
    best = min(known, key=known.get)
    assert not unsure(axes, known)
    for x, c in zip(best, centre, strict=False):
        assert abs(x - c) <= 0.25


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 15), st.randoms(use_true_random=False), st.sampled_from([1, 2, 3]))
def test_every_contender_gets_its_trials_and_the_same_losses_lead_the_same_way(trials, random, axes):
    noise = {}

    def loss(point):
        return noise.setdefault(point, random.choice([random.random(), math.inf]))

    known, rounds = searched(axes, loss, trials)
    assert len(known) == trials
    assert searched(axes, noise.__getitem__, trials)[1] == rounds


def test_the_end_of_a_grid_is_said():
    known, _ = searched(1, lambda point: point[0], 5)  # lower is ever better
    assert unsure(1, known) == [0]


def test_contenders_by_name_with_the_axes_that_they_have():
    config = read_config("quickstart")
    assert set(contender("adamw", config).start) == {RATE}
    assert set(contender("msam", config).start) == {RATE, RHO}
    muon = contender("muon", config)
    assert (muon.settings["optim.base"], muon.settings["optim.method"]) == ("muon", "adamw")
    assert contender("steppe.optim.outside.examples.mars:mars", config).settings["optim.method"] == "adamw"
    assert set(contender("steppe.optim.outside.examples.half_sign:half_sign", config).start) == {RATE, RHO}
    assert contender("sam", config).at((1.0, -2.0))[RATE] == f"{2 * config.optim.peak_learning_rate:.3g}"
    for name in ("adamm", "nowhere.py:f", ""):
        with pytest.raises(UsageError, match="must be"):
            contender(name, config)
