"""The search of a contender's best: as many trials as are given, none twice, and the optimum of a bowl within them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steppe.configs.read import UsageError, read_config
from steppe.optim.options import AT_LEAST_ONE, FINITE, NATURAL, PART, PATTERN, SHARE, Option, one_of
from steppe.scripts.judge.contest import RATE, RHO, Axis, axis, best_of, contender, proposals, unsure


def lines(axes):
    """Axes of numbers without bounds."""
    return [Axis(f"x{number}", str) for number in range(axes)]


def searched(axes, loss, trials, legal=lambda _: True):
    """({point: loss}, the rounds) of a search to its end."""
    axes = lines(axes) if isinstance(axes, int) else axes
    known, rounds = {}, []
    while more := proposals(axes, known, trials, legal):
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
    best = best_of(known)
    assert not unsure(lines(axes), known)
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
    assert unsure(lines(1), known) == ["x0"]


def option(kind, default, accepted):
    return axis("optim.o", kind, default, Option("", *accepted))


def reached(made, steps=(-2, -1, 0, 0.5, 1, 2)):
    return [made.at(each) for each in steps]


def test_the_values_of_an_option_follow_from_its_declaration():
    assert reached(option(float, 0.7, FINITE)) == ["0.175", "0.35", "0.7", "0.99", "1.4", "2.8"]
    assert reached(option(float, -0.5, FINITE)) == ["-0.125", "-0.25", "-0.5", "-0.707", "-1.0", "-2.0"]
    assert reached(option(float, 0.5, SHARE)) == ["0.1", "0.25", "0.5", "0.633975", "0.75", "0.9"]
    assert reached(option(float, 0.0, SHARE)) == [None, None, "0.0", "0.292893", "0.5", "0.75"]
    assert reached(option(float, 1.0, PART)) == ["0.25", "0.5", "1.0", None, None, None]
    assert reached(option(int, 4, AT_LEAST_ONE)) == ["1", "2", "4", "6", "8", "16"]
    assert option(int, 1, AT_LEAST_ONE).at(-2) is None
    bounded = option(float, 3.0, ("a number from 1 to 4", lambda value: 1 <= value <= 4))
    assert reached(bounded) == [None, "1.5", "3.0", None, None, None]
    flag = option(bool, False, ("true or false", lambda value: True))
    assert (flag.choices, flag.at(0), flag.at(1), flag.near(1)) == (2, "False", "True", [0])
    mode = option(str, "b", one_of("a", "b", "c"))
    assert ([mode.at(at) for at in range(3)], mode.near(0), mode.near(0, 0.5)) == (["b", "a", "c"], [1, 2], [])
    assert option(int, 0, NATURAL) is option(str, "x", PATTERN) is option(float, 0.0, FINITE) is None


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-6, 1 - 1e-6), st.floats(-12, 12))
def test_a_share_stays_one(default, steps):
    text = option(float, default, SHARE).at(steps)
    assert text is None or 0 <= float(text) < 1


def test_the_best_choice_and_integer_are_found_without_a_trial_twice():
    axes = [Axis("rate", str), option(str, "a", one_of("a", "b", "c")), option(int, 3, AT_LEAST_ONE)]
    said = []

    def loss(point):
        texts = [each.at(at) for each, at in zip(axes, point, strict=True)]
        said.append(tuple(texts))
        return (float(texts[0]) - 1) ** 2 + "bca".index(texts[1]) + abs(math.log(int(texts[2])))

    known, _ = searched(axes, loss, 40)
    assert [each.at(at) for each, at in zip(axes, best_of(known), strict=True)] == ["1.0", "b", "1"]
    assert len(set(said)) == len(known) == 40
    assert not unsure(axes, known)  # 1 is as low as the integer goes, and all choices were tried
    few, _ = searched(axes, loss, 8)
    assert unsure(axes, few)


def test_an_axis_that_does_nothing_is_not_walked():
    known, _ = searched(2, lambda point: (point[1] - 2) ** 2, 12)
    assert {point[0] for point in known} <= {-1, -0.5, 0, 0.5, 1}
    assert best_of(known) == (0, 2)


def test_what_cannot_run_is_not_tried():
    known, _ = searched(2, lambda point: -point[1], 20, legal=lambda point: point[1] <= 1)
    assert len(known) == 20
    assert max(point[1] for point in known) == 1


def keys(made):
    return [each.key for each in made.axes]


def test_contenders_by_name_with_the_axes_that_they_have():
    config = read_config("quickstart")
    assert keys(contender("adamw", config)) == [RATE]
    assert keys(contender("msam", config)) == [RATE, RHO]
    muon = contender("muon", config)
    assert (muon.settings["optim.base"], muon.settings["optim.method"]) == ("muon", "adamw")
    assert contender("steppe.optim.outside.examples.mars:mars", config).settings["optim.method"] == "adamw"
    mine = contender("steppe.optim.outside.examples.half_sign:half_sign", config)
    assert keys(mine) == [RATE, RHO, "optim.mix"]
    assert "optim.mix" not in mine.at((0.0, 1.0, 0.0))  # its default is left to it
    assert mine.at((0.0, 0.0, -1.0))["optim.mix"] == "0.25"
    friendly = contender("friendly_sam", config)
    assert keys(friendly)[2:] == ["optim.sigma", "optim.decay"]
    assert (contender("asam", config).fixed, contender("random_sam", config).fixed) == (("unscaled",), ("seed",))
    assert contender("sam", config).at((1.0, -2.0))[RATE] == f"{2 * config.optim.peak_learning_rate:.3g}"
    for name in ("adamm", "nowhere.py:f", ""):
        with pytest.raises(UsageError, match="must be"):
            contender(name, config)
