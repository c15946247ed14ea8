"""The gradient noise scale: known noise of a quadratic, two batch sizes, and a loop over the parts in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import optim_problems as problems
from steppe import optim
from steppe.optim.curvature.noise import from_norms, noise_scale

CURVATURES = np.array([1.0, 4.0, 9.0])
SPREADS = np.array([2.0, 0.5, 0.3])  # standard deviations of the data


def _loss(w, batch):
    """Mean over rows x of (w - x)^T A (w - x) / 2: a row's gradient is A (w - x)."""
    return jnp.mean(jnp.sum(CURVATURES * (w - batch["x"]) ** 2, axis=1)) / 2


QUADRATIC = optim.objective(
    lambda params, batch: params["w"], _loss, weight=lambda batch: jnp.float64(batch["x"].shape[0])
)


@jax.enable_x64(True)
def test_on_a_quadratic_with_known_noise_both_squares_are_unbiased():
    w, rows, parts, times = np.array([0.3, -0.2, 0.5]), 32, 4, 4000
    exact = {
        "gradient_square": np.sum((CURVATURES * w) ** 2),
        "noise_square": np.sum((CURVATURES * SPREADS) ** 2) / rows,
    }
    measured = jax.jit(jax.vmap(lambda x: noise_scale(QUADRATIC, {"w": jnp.asarray(w)}, {"x": x}, parts)))
    found = measured(jnp.asarray(np.random.default_rng(0).normal(size=(times, rows, 3)) * SPREADS))
    for name, value in exact.items():
        drawn = np.asarray(found[name])
        assert abs(drawn.mean() - value) < 4 * drawn.std() / times**0.5, name  # four standard errors
        assert drawn.std() / times**0.5 < 0.02 * value, "the test would see an error of a tenth"


@jax.enable_x64(True)
def test_the_squares_are_those_of_two_batch_sizes():
    """McCandlish et al., appendix A.1: from |g|^2 at b and at B."""
    rows, parts, w = 24, 6, np.array([0.3, -0.2, 0.5])
    x = np.random.default_rng(1).normal(size=(rows, 3)) * SPREADS
    gradients = CURVATURES * (w - x)
    small = np.mean([np.sum(gradients[k::parts].mean(0) ** 2) for k in range(parts)])
    big, b, B = np.sum(gradients.mean(0) ** 2), rows // parts, rows
    square, trace = (B * big - b * small) / (B - b), (small - big) / (1 / b - 1 / B)
    found = noise_scale(QUADRATIC, {"w": jnp.asarray(w)}, {"x": jnp.asarray(x)}, parts)
    assert float(found["gradient_square"]) == pytest.approx(square, rel=1e-12)
    assert float(found["noise_square"]) == pytest.approx(trace / B, rel=1e-12)
    assert float(found["scale"]) == pytest.approx(trace / B / square if square > 0 else np.inf, rel=1e-12)
    units = [g / np.linalg.norm(g) for g in (gradients[k::parts].mean(0) for k in range(parts))]
    bent = CURVATURES * np.array(units)  # the quadratic's GGN is A, its NME nothing
    assert float(found["logit_norm"]) == pytest.approx(np.mean(np.sum(bent**2, 1)) ** 0.5, rel=1e-12)
    expected = np.sum(bent.mean(0) ** 2) - np.sum(bent.var(0, ddof=1)) / parts
    assert float(found["expected_logit_norm"]) == pytest.approx(max(expected, 0) ** 0.5, rel=1e-9)
    assert float(found["functional_norm"]) == float(found["expected_functional_norm"]) == 0


@jax.enable_x64(True)
@pytest.mark.parametrize(
    "made", [pytest.param(problems.language_model, marks=pytest.mark.exhaustive), problems.split_language_model]
)
def test_parts_of_a_language_model_are_those_of_a_plain_loop(made):
    """Tokens of weight 0 count nowhere: the parts, of other numbers of tokens, are weighed by them."""
    params, batch, parts = problems.parameters(jnp.float64), problems.batch(rows=8), 4
    found = noise_scale(made(), params, batch, parts)
    cut = [{name: value[k::parts] for name, value in batch.items()} for k in range(parts)]
    shares = np.array([float(problems.tokens_of(part)) for part in cut])
    assert len(set(shares)) > 1
    shares /= shares.sum()
    rows = {"gradient": [], "logit": [], "functional": []}
    for part in cut:
        flat, back = jax.flatten_util.ravel_pytree(params)
        loss = lambda v, part=part, back=back: problems.loss_of(back(v), part)  # noqa: E731
        g = jax.grad(loss)(flat)
        u = g / jnp.linalg.norm(g)
        hessian = jax.hessian(loss)(flat) @ u
        outputs = lambda v, part=part, back=back: problems.language_model().trunk(back(v), part)  # noqa: E731
        bend = jax.hessian(lambda o, part=part: problems.token_loss(o, part)[0])(outputs(flat))
        moved = jax.jvp(outputs, (flat,), (u,))[1]
        logit = jax.vjp(outputs, flat)[1](jnp.tensordot(bend, moved, axes=moved.ndim))[0]
        for name, value in (("gradient", g), ("logit", logit), ("functional", hessian - logit)):
            rows[name].append(np.asarray(value))
    for name, values in rows.items():
        each = np.sum(shares * np.sum(np.square(values), 1))
        mean = np.sum((shares @ np.array(values)) ** 2)
        spread = (each - mean) / (parts - 1)
        if name == "gradient":
            assert float(found["gradient_square"]) == pytest.approx(mean - spread, rel=1e-9)
            assert float(found["noise_square"]) == pytest.approx(spread, rel=1e-9)
        else:
            assert float(found[f"{name}_norm"]) == pytest.approx(each**0.5, rel=1e-9)
            assert float(found[f"expected_{name}_norm"]) == pytest.approx(max(mean - spread, 0) ** 0.5, rel=1e-7)


@jax.enable_x64(True)
@pytest.mark.parametrize("method", ["adamw", "sam", "functional_sam"])
def test_the_norms_of_a_step_s_report_give_the_same_squares(method):
    """A step in microbatches measures what noise_scale measures of its batch, at theta."""
    params, batch, parts = {"w": jnp.array([0.3, -0.2, 0.5])}, {"x": jax.random.normal(jax.random.key(0), (24, 3))}, 6
    rule = optim.method(method, microbatches=parts, **({} if method == "adamw" else {"rho": 0.05}))
    _, _, report = rule.gradient(QUADRATIC, params, batch, None, rule.init(params), jnp.int32(0))
    found = from_norms(float(report["gradient_norm"]), float(report["microbatch_norm"]), parts)
    exact = noise_scale(QUADRATIC, params, batch, parts)
    assert found == pytest.approx((float(exact["gradient_square"]), float(exact["noise_square"])), rel=1e-5)
    alone = optim.method("adamw")
    assert np.isnan(alone.gradient(QUADRATIC, params, batch, None, (), jnp.int32(0))[2]["microbatch_norm"])
