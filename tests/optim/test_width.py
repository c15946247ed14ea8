"""mup and mu-P^2: what widening does to the steps of bases and to perturbations, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import optim_problems as problems
from steppe import optim
from steppe.optim import ascent, masks, methods, rule
from steppe.optim.ascent import AscentInput
from steppe.optim.base import BASES, Moments
from steppe.optim.passes.two_pass import Switches, perturbation

AXES = masks.matrix_axes((("kernel", (1,), (2,)),))  # of the problems' parameters
R = 4.0
# powers of the widening, of parameters with one long axis and of matrices: Yang et al. 2021, tables 3 and 8
RATES = {"sgd": (1, 0), "muon": (0, -0.5)}


@pytest.mark.parametrize("name", BASES)
def test_first_step_of_a_widened_base(name):
    """Each kind of parameter moves as at its own rate, and what decays does so as ever."""
    params = problems.parameters()
    gradient = jax.tree.map(lambda p: jnp.cos(3 * p), params)

    def step(widening, decay=0.0):
        base = optim.base_optimizer(name, 0.01, weight_decay=decay, matrix_axes=AXES, widening=widening)
        return base.transform.update(gradient, base.transform.init(params), params)[0]

    plain, wide = step(1.0), step(R)
    vectors, matrices = RATES.get(name, (0, -1))
    for path in ("embed", "readout"):
        np.testing.assert_allclose(wide[path], R**vectors * plain[path], rtol=1e-5)
    np.testing.assert_allclose(wide["layers"]["kernel"], R**matrices * plain["layers"]["kernel"], rtol=1e-5, atol=1e-7)
    if name not in ("adam", "sgd", "muon"):  # whose decay is part of the direction, or of muon's own transform
        shrunk = jax.tree.map(jnp.subtract, step(R, 0.1), wide)
        # of the first step of schedule_free, too: the mean is the step itself
        np.testing.assert_allclose(shrunk["layers"]["kernel"], -0.001 * params["layers"]["kernel"], atol=1e-7)


def epsilon(up, widening, moments=Moments()):  # noqa: B008
    params = problems.parameters(jnp.float64)
    made = problems.language_model()
    batch = problems.batch()
    g = jax.grad(lambda p: made.readout(p, made.trunk(p, batch), batch)[0])(params)
    known = AscentInput(gradient=g, params=params, moments=moments, state=(), step=jnp.int32(0))
    switches = Switches(widening=widening, matrix_axes=AXES)
    return g, perturbation(up, known, 0.3, switches)[0]


@jax.enable_x64(True)
def test_sam_of_a_widened_model_is_that_of_haas():
    """epsilon = rho (r g, g) / |(sqrt(r) g, g)|, the former of what has one long axis, the latter of matrices."""
    g, found = epsilon(ascent.gradient(), R)
    matrices, others = g["layers"]["kernel"], {key: value for key, value in g.items() if key != "layers"}
    size = np.sqrt(R * rule.inner(others, others) + np.sum(matrices**2))
    np.testing.assert_allclose(found["layers"]["kernel"], 0.3 * matrices / size, rtol=1e-12)
    np.testing.assert_allclose(found["embed"], 0.3 * R * g["embed"] / size, rtol=1e-12)


@jax.enable_x64(True)
def test_a_direction_without_the_gradients_scale_shrinks_in_matrices():
    fresh = Moments(fresh=lambda gradient: jax.tree.map(jnp.square, gradient))  # D^-1 g is the sign of g
    _, found = epsilon(ascent.preconditioned(precond_eps=1e-30), R, fresh)
    entries = {
        key: float(np.abs(leaf).max())
        for key, leaf in (("table", found["embed"]), ("matrix", found["layers"]["kernel"]))
    }
    assert entries["matrix"] == pytest.approx(entries["table"] / R, rel=1e-12)
    assert ascent.preconditioned(precond_power=0.25).widths == (0.5, -0.5)


@jax.enable_x64(True)
@pytest.mark.parametrize("up", [ascent.gradient(), ascent.friendly(), ascent.momentum(), ascent.update()])
def test_no_direction_is_changed_at_the_base_width(up):
    vector = jax.tree.map(jnp.cos, problems.parameters(jnp.float64))
    moments = Moments(first=vector, update=lambda step, fill: vector)
    state = jax.tree.map(jnp.zeros_like, vector)
    direction = ascent.Ascent(lambda given: up.direction(given._replace(state=state)), widths=up.widths)
    _, one = epsilon(direction, 1.0, moments)
    np.testing.assert_allclose(rule.norm(one), 0.3, rtol=1e-12)
    _, near = epsilon(direction, 1 + 1e-9, moments)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(near), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)


def test_what_has_no_rule_for_widths_is_refused():
    for name in ("asam", "random_sam"):
        with pytest.raises(rule.OptionError, match=f"optim.method = '{name}': must be another method under mup"):
            optim.method(name, rho=0.1, widening=2.0)
    with pytest.raises(rule.OptionError, match=r"optim.layerwise_rho = 'norm': must be none under mup"):
        optim.method("sam", rho=0.1, widening=2.0, layerwise_rho="norm")
    for name in set(methods.METHODS) - {"asam", "random_sam"}:
        optim.method(name, **problems.needs(name), widening=2.0)
