"""Averages of weights against NumPy, and the base that is evaluated at its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.optim.averaging import Averages
from steppe.optim.base import BASES, OptionError


def walk(steps, seed=0):
    """Parameters after each of `steps` updates, float64 in NumPy."""
    return np.cumsum(np.random.default_rng(seed).normal(size=(steps + 1, 3)), axis=0)


def run(averages, path, refused=(), first=0):
    """The averages after every update of `path`, of which those numbered in `refused` changed nothing.

    first: the updates before it.
    """
    update = jax.jit(averages.update)
    state, found, now = averages.init({"w": jnp.asarray(path[0])}), [], path[0]
    for step in range(len(path) - 1):
        now = now if step in refused else path[step + 1]
        state = update(state, {"w": jnp.asarray(now)}, jnp.int32(first + step), jnp.asarray(step not in refused))
        found.append({name: np.mean([slot["w"] for slot in slots.values()], axis=0) for name, slots in state.items()})
    return found


@jax.enable_x64(True)
def test_ema_is_the_mean_of_all_steps_and_then_forgets_the_oldest():
    path, horizon = walk(30), 8
    found = [each["ema"] for each in run(Averages(("ema",), horizon), path)]
    expected = []
    for step, params in enumerate(path[1:], 1):
        if step <= horizon:
            expected.append(path[1 : step + 1].mean(axis=0))
        else:
            expected.append((1 - 1 / horizon) * expected[-1] + params / horizon)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@jax.enable_x64(True)
def test_lawa_is_the_mean_of_the_last_snapshots():
    path = walk(30)
    found = [each["lawa"] for each in run(Averages(("lawa",), horizon=12, snapshots=4), path)]
    taken = path[3::3]  # every 12 / 4 steps, the start not among them
    for step in range(3, 31):
        known = taken[: step // 3]
        np.testing.assert_allclose(found[step - 1], known[-4:].mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found[1], path[0], rtol=1e-12)


@jax.enable_x64(True)
def test_averages_of_what_goes_on_from_other_steps_begin_there():
    path, begin = walk(20), 200
    later = Averages(("ema", "lawa"), horizon=260, snapshots=20, begin=begin)
    alone = Averages(("ema", "lawa"), horizon=260, snapshots=20)
    found, expected = run(later, path, first=begin), run(alone, path)
    for step, (one, other) in enumerate(zip(found, expected, strict=True), 1):
        for name in later.names:
            assert np.array_equal(one[name], other[name])
        np.testing.assert_allclose(one["ema"], path[1 : step + 1].mean(axis=0), rtol=1e-12)


@jax.enable_x64(True)
def test_a_refused_update_leaves_every_average_bit_for_bit():
    path = walk(12)
    averages = Averages(("ema", "lawa"), horizon=4, snapshots=2)
    found = run(averages, path, refused=(5, 7))
    for step in (5, 7):  # lawa would have taken both
        for name in averages.names:
            assert np.array_equal(found[step][name], found[step - 1][name])
    assert not np.array_equal(found[6]["ema"], found[5]["ema"])
    assert not np.array_equal(found[9]["lawa"], found[8]["lawa"])


@jax.enable_x64(True)
def test_schedule_free_is_evaluated_at_the_weighted_mean_of_its_steps():
    """x of Defazio et al. 2024, algorithm 1, by hand: z steps, x averages by rate^2, y is where gradients are taken."""
    b1, b2, eps, decay = 0.9, 0.95, 1e-9, 0.1
    rate = lambda count: 0.01 * jnp.minimum(1.0, (count + 1) / 4)  # noqa: E731
    base = optim.base_optimizer("schedule_free", rate, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    gradients = np.random.default_rng(1).normal(size=(9, 3))
    y = {"w": jnp.asarray(np.ones(3))}
    state = base.transform.init(y)
    z = x = np.ones(3)
    v, total, most = np.zeros(3), 0.0, 0.0
    for count, g in enumerate(gradients):
        at_y = (1 - b1) * z + b1 * x
        np.testing.assert_allclose(y["w"], at_y, rtol=1e-8)  # optax corrects the moment's bias in float32
        v = b2 * v + (1 - b2) * g**2
        step = g / (np.sqrt(v / (1 - b2 ** (count + 1))) + eps) + decay * at_y
        z = z - float(rate(count)) * step
        most = max(most, float(rate(count)))  # the rate that the step takes, as the official package has it
        total += most**2
        x = x + most**2 / total * (z - x)
        updates, state = base.transform.update({"w": jnp.asarray(g)}, state, y)
        y = optax.apply_updates(y, updates)
    evaluated = BASES["schedule_free"].evaluated
    assert evaluated.stored_as == "/z"
    np.testing.assert_allclose(evaluated.at(b1, y["w"], state[0].z["w"]), x, rtol=1e-8)


def test_schedule_free_needs_a_weight_for_its_average():
    with pytest.raises(OptionError, match=r"b1 = 0\.0: must be a number > 0"):
        optim.base_optimizer("schedule_free", 0.1, b1=0.0)


def test_a_refused_step_moves_the_rate_of_schedule_free_with_the_runs_count():
    from steppe.optim.base import at_step

    seen = []
    base = optim.base_optimizer("schedule_free", lambda count: seen.append(count) or 0.1)
    state = at_step(base.transform.init({"w": jnp.ones(3)}), jnp.int32(7))
    base.transform.update({"w": jnp.ones(3)}, state, {"w": jnp.ones(3)})
    assert sorted(map(int, seen)) == [7, 7]  # the step and its weight in the average take one rate
