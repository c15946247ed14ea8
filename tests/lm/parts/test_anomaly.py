"""What counts as a bad step, and what is decided then."""

import json
import math

import numpy as np
import pytest

from steppe.configs import base
from steppe.configs.keys import ConfigError
from steppe.lm.parts.anomaly import UPDATE, Watch, limit
from steppe.lm.parts.check import check

SOUND = {"loss": 2.0, "perturbed_loss": 2.1, "gradient_norm": 1.0, "epsilon_norm": 0.1, "nonfinite": 0.0, "spike": 0.0}
NAN = math.nan


def watch(memory=None, **train):
    config = base.get_config()
    config.train.update(**{"spike_score": 5.0, "spike_window": 8, **train})
    return Watch(config, memory)


def test_the_limit_is_robust():
    losses = [2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 50.0, 2.02]  # one old spike does not raise it
    assert limit(losses, 5.0, 8) == pytest.approx(2.01 + 5 * 1.4826 * 0.05, rel=1e-6)
    assert limit(losses[1:], 5.0, 8) == math.inf  # too little history
    assert limit([3.0] * 8, 5.0, 8) == pytest.approx(3.0 * 1.05)  # losses that stand still
    assert limit([99.0, *losses], 5.0, 8) == limit(losses, 5.0, 8)


def test_the_limit_depends_on_steps_and_not_on_when_they_were_read():
    early, late, before = watch(), watch(), None
    for step in range(1, 30):
        early_limit = early.limit(step)  # metrics of all steps before have been read
        late_limit = late.limit(step)  # one step behind, as in the loop
        assert early_limit == late_limit
        assert (early_limit == np.inf) == (step < 10)
        loss = {**SOUND, "loss": 3 / step + (step % 3) / 10}
        early.judge(step, loss)
        if before:
            late.judge(step - 1, before)
        before = loss


def test_a_restored_watch_goes_on_alike():
    one = watch()
    for step in range(1, 20):
        one.judge(step, {**SOUND, "loss": 2 + step % 5})
    one.judge(20, {**SOUND, "nonfinite": 1.0})
    other = watch(json.loads(json.dumps(one.memory())))
    assert other.memory() == one.memory()
    assert other.limit(22) == one.limit(22) < math.inf


@pytest.mark.parametrize(
    ("metrics", "where"),
    [
        ({"loss": NAN, "gradient_norm": NAN, "epsilon_norm": NAN, "perturbed_loss": NAN}, "the loss"),
        ({"gradient_norm": math.inf, "epsilon_norm": NAN, "perturbed_loss": NAN}, "the gradient at theta"),
        ({"perturbed_loss": math.inf}, "the loss at theta + epsilon"),
        ({}, "the gradient at theta + epsilon"),
        ({"nonfinite": UPDATE}, "the update"),
        ({"gradient_norm": NAN}, "the gradient at theta + epsilon"),  # a method that never looks at theta
        ({"gradient_norm": NAN, "epsilon_norm": 0.0, "perturbed_loss": NAN}, "the gradient at theta"),  # no method
    ],
)
def test_the_diagnosis_names_the_pass(metrics, where):
    found = watch().judge(3, {**SOUND, "nonfinite": 1.0, **metrics})
    assert (found["what"], found["where"], found["decision"]) == ("nonfinite", where, "stop")


def test_skipping_ends_after_so_many_in_a_row():
    one = watch(on_spike="skip", max_skips=3)
    bad = {**SOUND, "spike": 1.0}
    decisions = [one.judge(step, bad)["decision"] for step in (1, 2)]
    assert one.judge(3, SOUND) is None
    decisions += [one.judge(step, bad)["decision"] for step in (4, 5, 6)]
    assert decisions == ["skip", "skip", "skip", "skip", "stop"]


def test_a_rollback_leaves_out_the_batches_since():
    one = watch(max_skips=2)
    assert one.roll_back(10, 13)  # batches of steps 11, 12, 13
    assert [one.batch_index(step) for step in (9, 10, 11, 20)] == [9, 13, 14, 23]
    assert one.roll_back(20, 21)
    assert [one.batch_index(step) for step in (10, 19, 20)] == [13, 22, 24]
    assert one.roll_back(20, 22)
    assert one.batch_index(20) == 26
    assert not one.roll_back(20, 21)  # three times from the same place


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("train.on_spike", "pray", "one of stop, skip, rollback"),
        ("train.on_nonfinite", "", "one of stop, skip, rollback"),
        ("train.spike_score", -1.0, "a finite number >= 0"),
        ("train.spike_window", 1, "an integer >= 2"),
        ("checkpoint.minutes", math.inf, "a finite number >= 0"),
        ("checkpoint.keep_every", "often", "a duration such as"),
    ],
)
def test_settings_out_of_range_are_refused(key, value, accepted):
    config = base.get_config()
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(ConfigError, match=f"config.{key} = .*must be {accepted}"):
        check(config, device_count=1)


def test_a_cosine_that_leaves_its_usual_value_at_once_is_said_and_a_slow_fall_is_not():
    one = watch()
    for step in range(20):
        assert one.parted({"cosine": 0.999 - 0.0001 * step, "epsilon_norm": 0.02}) is None
    assert one.parted({"cosine": 1.0, "epsilon_norm": 0.0}) is None  # a step that does not perturb says nothing
    assert one.parted({"cosine": 0.1, "epsilon_norm": 0.02}) == pytest.approx(0.998, abs=1e-3)
    assert one.parted({"cosine": -0.05, "epsilon_norm": 0.02})  # and so is the next: bad steps are not what is usual
    assert one.parted({"cosine": 0.997, "epsilon_norm": 0.02}) is None
    slow = watch()
    assert not any(slow.parted({"cosine": 0.999 - 0.02 * step, "epsilon_norm": 0.3}) for step in range(45))
