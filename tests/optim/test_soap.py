"""SOAP against NumPy, and the purpose of its eigenbases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.optim import masks, soap

B1, B2, EPS = 0.9, 0.95, 1e-8


def oracle(gradients):
    """The directions of one matrix [m, n] of rank m, by the algorithm as scale_by_soap writes it down."""
    (m, n), found = gradients[0].shape, []
    q_left, q_right = np.eye(m), np.eye(n)
    left, right, first, second = np.zeros((m, m)), np.zeros((n, n)), np.zeros((m, n)), np.zeros((m, n))
    for count, g in enumerate(gradients):
        if count:
            first = B1 * first + (1 - B1) * g
            second = B2 * second + (1 - B2) * (q_left.T @ g @ q_right) ** 2
            scale = np.sqrt(1 - B2**count) / (1 - B1**count)
            turned = scale * (q_left.T @ first @ q_right) / (np.sqrt(second) + EPS)
            found.append(q_left @ turned @ q_right.T)
        else:
            found.append(np.zeros((m, n)))
        left, right = B2 * left + (1 - B2) * g @ g.T, B2 * right + (1 - B2) * g.T @ g
        if count == 0:
            q_left, q_right = (np.linalg.eigh(factor)[1][:, ::-1] for factor in (left, right))
        elif count % soap.EVERY == 0:
            rows, columns = (
                np.argsort(-np.einsum("ij,ij->j", q, factor @ q)) for q, factor in ((q_left, left), (q_right, right))
            )
            q_left, q_right = np.linalg.qr((left @ q_left)[:, rows])[0], np.linalg.qr((right @ q_right)[:, columns])[0]
            second = second[rows][:, columns]
    return found


@jax.enable_x64(True)
def test_soap_is_the_paper_s_algorithm_on_each_of_stacked_matrices():
    """25 steps with two refreshes; [stack, in, head, width] as an attention kernel has them, and a vector."""
    drawn = np.random.default_rng(0).normal(size=(25, 2, 4, 2, 2))
    gradients = [{"kernel": jnp.asarray(g), "scale": jnp.asarray(g[0, :, 0, 0])} for g in drawn]
    axes = masks.matrix_axes((("kernel", (1,), (2, 3)),))
    transform = soap.scale_by_soap(B1, B2, EPS, axes)
    adam = optax.scale_by_adam(B1, B2, 0.0)
    state, plain, update = transform.init(gradients[0]), adam.init(gradients[0]), jax.jit(transform.update)
    expected = [oracle([g[layer].reshape(4, 4) for g in drawn]) for layer in range(2)]
    for step, gradient in enumerate(gradients):
        found, state = update(gradient, state)
        if step:  # of the first gradient nothing enters the moments
            second, plain = adam.update(gradient, plain)
        for layer in range(2):
            # bias corrections are in float32, as optax has them
            np.testing.assert_allclose(
                found["kernel"][layer].reshape(4, 4), expected[layer][step], rtol=2e-5, atol=1e-6
            )
        np.testing.assert_allclose(found["scale"], second["scale"] if step else 0.0, rtol=1e-6)


@jax.enable_x64(True)
def test_a_turned_problem_is_solved_by_turned_steps():
    """The direction goes with a rotation of the gradients, which Adam's does not."""
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(6, 4, 3))
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]

    def last(transform, turned):
        state, update = transform.init(jnp.zeros((4, 3))), jax.jit(transform.update)
        for g in gradients:
            found, state = update(jnp.asarray(turned @ g), state)
        return found

    made = soap.scale_by_soap(B1, B2, EPS)
    np.testing.assert_allclose(last(made, turn), turn @ last(made, np.eye(4)), atol=1e-6)
    adam = optax.scale_by_adam(B1, B2, EPS)
    assert not np.allclose(last(adam, turn), turn @ last(adam, np.eye(4)), atol=0.1)


def test_a_side_that_is_too_long_keeps_its_basis(monkeypatch):
    monkeypatch.setattr(soap, "MOST", 3)
    base = optim.base_optimizer("soap", 0.01)
    params = {"w": jnp.ones((5, 3))}
    state = base.transform.init(params)
    assert [bool(side) for side in state[0].sides[0]] == [False, True]
    updates, _ = base.transform.update({"w": jnp.cos(jnp.arange(15.0)).reshape(5, 3)}, state, params)
    assert np.isfinite(updates["w"]).all()
    assert base.moments(state, params).first["w"].shape == (5, 3)


def test_directions_are_the_same_on_every_mesh():
    """On 8 devices as on one, and with other rounding errors: gradients of less rank than sides, as real ones are.

    Beyond the rank the eigenvectors of the grams would be noise, and the direction with them.
    """
    rng, spectrum = np.random.default_rng(2), np.exp(-0.5 * np.arange(8))

    def rotation(side):
        return np.linalg.qr(rng.normal(size=(side, side)))[0]

    gradients = [np.float32((rotation(8) * spectrum) @ rotation(32)[:8]) * 1e-3 for _ in range(23)]
    transform = soap.scale_by_soap(B1, B2, EPS)
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))

    def directions(place, noise):
        state, update, found = transform.init(jax.device_put(gradients[0], place)), jax.jit(transform.update), []
        for g in gradients:
            rounded = g * (1 + noise * np.float32(rng.uniform(-1, 1, g.shape)))
            direction, state = update(jax.device_put(rounded, place), state)
            found.append(np.asarray(direction))
        return np.stack(found)

    one = directions(jax.devices()[0], 0.0)
    assert np.sqrt(np.mean(one[1] ** 2)) == pytest.approx(1, rel=0.01)  # of the size of Adam's
    for other in (directions(split, 0.0), directions(jax.devices()[0], 1e-7)):
        assert np.max(np.linalg.norm(other - one, axis=(1, 2))) < 1e-3 * np.linalg.norm(one[1])
