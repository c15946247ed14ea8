"""The critical step and the curvature along a direction, on losses whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import optim_problems as problems
from steppe import optim
from steppe.optim.curvature.along import along, critical, critical_step
from steppe.optim.curvature.products import hessian_product, nme_product
from steppe.optim.rule import inner, norm, plain_gradient

CURVATURES = jnp.asarray([1.0, 4.0, 9.0])
QUADRATIC = optim.objective(lambda params, batch: params["w"], lambda w, batch: jnp.sum(CURVATURES * w**2) / 2)


@jax.enable_x64(True)
@pytest.mark.parametrize("rate", [1e-3, 0.07, 0.9, 30.0])
def test_critical_sharpness_of_a_quadratic_is_its_curvature_along_the_step(rate):
    """The loss w^T A w / 2 is back after s = 2 g^T g / (rate g^T A g) steps of -rate g: 2 / s rate is sharpness."""
    params = {"w": jnp.asarray([1.0, -2.0, 0.5])}
    g = CURVATURES * params["w"]
    expected = float(g @ (CURVATURES * g) / (g @ g))
    found = critical(rate, jax.jit(lambda p: critical_step(QUADRATIC, p, None, {"w": -rate * g}))(params))
    # the bisection ends within a sixteenth of an octave, below the crossing
    assert expected <= found["critical_sharpness"] * (1 + 1e-9) <= expected * 2 ** (1 / 16) * (1 + 2e-9)
    assert found["critical_learning_rate"] == pytest.approx(2 / found["critical_sharpness"])
    assert found["critical_forwards"] <= 2 + 16 + 4


@jax.enable_x64(True)
def test_a_direction_with_no_crossing_has_no_critical_step():
    params = {"w": jnp.asarray([1.0, -2.0, 0.5])}
    uphill = {"w": CURVATURES * params["w"]}
    assert np.isnan(critical_step(QUADRATIC, params, None, uphill)["critical_steps"])
    linear = optim.objective(lambda params, batch: params["w"], lambda w, batch: jnp.sum(w))
    assert np.isnan(critical_step(linear, params, None, {"w": -jnp.ones(3)})["critical_steps"])


@jax.enable_x64(True)
def test_a_loss_that_is_not_finite_has_risen():
    walled = optim.objective(lambda params, batch: params["w"], lambda w, batch: jnp.sum(jnp.log(w)))
    found = critical_step(walled, {"w": jnp.ones(3)}, None, {"w": -jnp.full(3, 0.3)})
    assert 2.5 < found["critical_steps"] <= 1 / 0.3  # log of less than 0


@jax.enable_x64(True)
def test_along_is_made_of_products_with_the_hessian():
    params, batch = problems.parameters(jnp.float64), problems.batch()
    objective = problems.language_model()
    way = jax.tree.map(lambda p: 1e-3 * jnp.cos(5 * p), params)
    found = {name: float(value) for name, value in along(objective, params, batch, way, microbatches=2).items()}
    _, g = plain_gradient(objective, params, batch)
    size = float(norm(way))
    assert found["norm"] == pytest.approx(size)
    assert found["slope"] == pytest.approx(float(inner(g, way)) / size, rel=1e-10)
    for name, product in (("curvature", hessian_product), ("functional_curvature", nme_product)):
        assert found[name] == pytest.approx(
            float(inner(way, product(objective, params, batch, way))) / size**2, rel=1e-10
        )
    assert found["rise"] == pytest.approx(found["quadratic"], rel=1e-3)  # what is of third order in a way this short
    still = along(objective, params, batch, jax.tree.map(jnp.zeros_like, params))
    assert (still["norm"], still["curvature"], still["rise"]) == (0, 0, 0)
