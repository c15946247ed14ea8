"""The real Transformer in float64: gradient rules against vjps of whole logits, curvature against dense matrices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from steppe import optim
from steppe.lm.model.mesh import Placement, batch_sharding, make_mesh, parameter_shardings
from steppe.lm.model.objective import objective, readout_kernel
from steppe.lm.model.parameters import TABLE, of
from steppe.lm.model.readout import Options
from steppe.lm.model.transformer import Shape, Trunk
from steppe.optim.curvature import products, spectra
from steppe.optim.masks import path_names
from steppe.optim.rule import cosine, norm

B, T, V, REAL, RHO = 16, 8, 32, 29, 0.3
METHODS = ("sam", "functional_sam", "logit_sam")
# (style, tied, options of the readout, packed, microbatches, mesh): every value of each at least twice
PLAIN, EXTRAS = {}, {"z_loss": 0.05, "soft_cap": 2.0, "smoothing": 0.2}
CASES = {
    "nanodo tied": ("nanodo", True, PLAIN, False, 1, None),
    "nanodo untied, packed, kept": ("nanodo", False, {"keep": True, "kept_dtype": "float64"}, True, 1, None),
    "modern tied, extras, in parts": ("modern", True, EXTRAS, False, 4, None),
    "modern untied, extras, packed, kept, in parts": (
        "modern", False, {**EXTRAS, "keep": True, "kept_dtype": "float64"}, True, 4, None,
    ),
    "modern untied, extras, packed, 2 x 2 x 2": ("modern", False, EXTRAS, True, 1, (2, 2, 2)),
    "nanodo tied, packed, in parts, 2 x 2 x 2": ("nanodo", True, PLAIN, True, 4, (2, 2, 2)),
}  # fmt: skip

SOME = ("modern untied, extras, packed, 2 x 2 x 2",)


def shape_of(style, tied, dtype):
    return Shape(
        style, layers=2, width=16, heads=4, kv_heads=4 if style == "nanodo" else 2, mlp_width=32, vocabulary=V,
        sequence_length=T, qk_norm=style == "modern", tie_embeddings=tied, dtype=dtype,
    )  # fmt: skip


def batch_of(packed):
    keys = jax.random.split(jax.random.key(3), 3)
    batch = {
        "inputs": jax.random.randint(keys[0], (B, T), 0, REAL),
        "targets": jax.random.randint(keys[1], (B, T), 0, REAL),
        "weights": jax.random.bernoulli(keys[2], 0.8, (B, T)).astype(jnp.float32).at[5].set(0),
    }
    if packed:  # two documents a row, the second shorter by what is padded
        first = np.arange(T) < np.arange(2, 2 + B)[:, None] % T
        batch["segments"] = jnp.where(first, 1, 2).astype(jnp.int32)
        batch["positions"] = jnp.asarray(np.where(first, np.arange(T), np.arange(T) - first.sum(1, keepdims=True)))
        batch["positions"] = batch["positions"].astype(jnp.int32)
    return batch


def whole_loss(logits, batch, z_loss=0.0, soft_cap=0.0, smoothing=0.0, **_):
    """The loss of all logits [B, T, V] by its definition."""
    logits = logits[..., :REAL]
    logits = soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_p = logits - log_z[..., None]
    hit = jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
    token = -(1 - smoothing) * hit - smoothing * log_p.mean(-1) + z_loss * log_z**2
    return jnp.sum(batch["weights"] * token) / jnp.sum(batch["weights"] > 0)


def logits_of(shape, tree, batch):
    """The logits [B, T, V] as a function of the flat parameters."""

    def logits(x):
        p = tree(x)
        hidden = Trunk(shape).apply({"params": p}, batch["inputs"], batch.get("positions"), batch.get("segments"))
        return hidden @ readout_kernel(p, shape).T

    return logits


def drawn(shape, batch, dtype=jnp.float64):
    params = Trunk(shape).init(jax.random.key(1), batch["inputs"])["params"]
    return jax.tree.map(lambda p: p.astype(dtype), params)


def exact_objective(shape, options, mesh=None):
    """Steppe's objective with its readout in chunks, nothing of it below the shape's precision."""
    exact = Options(REAL, 4, place=Placement(mesh), **options)
    made = objective(shape, exact, Placement(mesh))
    # Parts are weighed in float32 otherwise, which their shares keep to 1e-8.
    return made._replace(weight=lambda part: jnp.sum(part["weights"] > 0).astype(shape.dtype))


def oracle(shape, params, batch, extras):
    """{method: gradient} by vjps of the whole logits, on flat vectors."""
    theta, tree = ravel_pytree(params)
    logits = logits_of(shape, tree, batch)
    slope = jax.grad(lambda out: whole_loss(out, batch, **extras))
    here, pull = jax.vjp(logits, theta)
    (g,) = pull(slope(here))
    there, pull_there = jax.vjp(logits, theta + RHO * g / jnp.linalg.norm(g))
    found = pull_there(slope(there)), pull_there(slope(here)), pull(slope(there))
    return {name: tree(gradient) for name, (gradient,) in zip(METHODS, found, strict=True)}


def gradients(shape, params, batch, options, microbatches=1, mesh=None):
    """{method: gradient} by Steppe's rules and chunked readout."""
    made = exact_objective(shape, options, mesh)
    rules = {name: optim.method(name, rho=RHO, microbatches=microbatches) for name in METHODS}

    def all_of(params, batch):
        return {
            name: rule.gradient(made, params, batch, None, rule.init(params), jnp.int32(0))[0]
            for name, rule in rules.items()
        }

    return jax.jit(all_of)(params, batch)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in SOME else pytest.mark.exhaustive) for case in CASES]
)
def test_against_vjps_of_the_whole_logits(case, float64):
    """1e-10 of the gradient's norm: float64, other orders of sums."""
    style, tied, options, packed, microbatches, axes = CASES[case]
    shape, batch = shape_of(style, tied, "float64"), batch_of(packed)
    params = drawn(shape, batch)
    want = jax.jit(lambda p, b: oracle(shape, p, b, options))(params, batch)
    mesh = None
    if axes:
        mesh = make_mesh(axes, jax.devices()[:8])
        params = jax.device_put(params, parameter_shardings(mesh, params))
        batch = jax.device_put(batch, batch_sharding(mesh))
    got = gradients(shape, params, batch, options, microbatches, mesh)
    for name in METHODS:
        difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), got[name], want[name])
        assert norm(difference) < 1e-10 * norm(want[name]), name
        others = [norm(jax.tree.map(jnp.subtract, want[name], want[other])) for other in METHODS if other != name]
        assert min(others) > 1e-3 * norm(want[name])  # the three are told apart


@pytest.mark.exhaustive  # of a small model: optim/test_contract.py
def test_bfloat16_stays_near_float32():
    """Of the gradient: length within 5 %, cosine above 0.99. bfloat16 keeps 8 bits, 0.4 % a rounding, over 2 layers."""
    style, batch = "modern", batch_of(packed=False)
    params = drawn(shape_of(style, True, "float32"), batch, jnp.float32)
    exact, low = (gradients(shape_of(style, True, dtype), params, batch, {}) for dtype in ("float32", "bfloat16"))
    for name in METHODS:
        assert float(cosine(exact[name], low[name])) > 0.99, name
        assert float(norm(low[name]) / norm(exact[name])) == pytest.approx(1, abs=0.05)


@pytest.mark.exhaustive  # products and spectra of a small model: optim/test_curvature.py
@pytest.mark.parametrize(
    ("style", "tied", "packed", "microbatches"), [("nanodo", True, False, 1), ("modern", False, True, 2)]
)
def test_curvature_against_a_dense_eigendecomposition(style, tied, packed, microbatches, float64):
    """Products to 1e-10 of the largest eigenvalue, lambda_max by Lanczos to 1e-8, traces within three errors."""
    shape, batch = (
        shape_of(style, tied, "float64")._replace(width=8, heads=2, kv_heads=2, mlp_width=16),
        batch_of(packed),
    )
    batch = {name: values[:2] for name, values in batch.items()}
    params = drawn(shape, batch)
    theta, tree = ravel_pytree(params)
    view, logits = spectra.flat(params), logits_of(shape, tree, batch)

    @jax.jit
    def dense():
        def columns(loss):
            return jax.lax.map(lambda v: jax.jvp(jax.grad(loss), (theta,), (v,))[1], jnp.eye(theta.size))

        here, pull = jax.vjp(logits, theta)
        of_logits = lambda out: whole_loss(out.reshape(here.shape), batch)  # noqa: E731
        jacobian = jax.lax.map(lambda row: pull(row.reshape(here.shape))[0], jnp.eye(here.size))
        slope, outer = jax.grad(of_logits)(here.ravel()), jax.hessian(of_logits)(here.ravel())
        return {
            "hessian": columns(lambda x: whole_loss(logits(x), batch)),
            "ggn": jacobian.T @ outer @ jacobian,
            "nme": columns(lambda x: jnp.vdot(slope, logits(x))),
        }

    matrices = jax.tree.map(np.asarray, dense())
    made = exact_objective(shape, {})
    for name, matrix in matrices.items():

        def product(vector, name=name):
            return products.PRODUCTS[name](made, params, batch, vector, microbatches)

        @jax.jit
        def walk(key, product=product):
            krylov = spectra.lanczos(product, view, spectra.signs(view, key), 60)
            return krylov, view.flatten(product(view.unflatten(jnp.sin(jnp.arange(theta.size) + 1.0))))

        values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        walks = [walk(key) for key in jax.random.split(jax.random.key(0), 5)]
        image = np.asarray(walks[0][1])
        assert np.max(np.abs(image - matrix @ np.sin(np.arange(theta.size) + 1.0))) < 1e-10 * values[-1], name
        assert spectra.ritz(walks[0][0]).values[-1] == pytest.approx(values[-1], rel=1e-8), name
        trace = spectra.estimate([float(krylov.diagonal[0] * krylov.square) for krylov, _ in walks])
        assert abs(trace.mean - values.sum()) < 3 * trace.error, name
        assert trace.error < 0.2 * np.abs(values).sum(), name
    gap = np.abs(matrices["hessian"] - matrices["ggn"] - matrices["nme"]).max()
    assert gap < 1e-12 * np.abs(matrices["hessian"]).max() + 1e-14
    assert np.abs(matrices["nme"]).max() > 1e-3 * np.abs(matrices["hessian"]).max()  # the three are told apart


@pytest.mark.parametrize(("style", "tied"), [("nanodo", False), ("modern", True)])
def test_the_groups_measured_by_default_are_those_of_the_table(style, tied):
    from steppe.configs import base
    from steppe.lm.measure.in_training import named_groups

    shape = shape_of(style, tied, "float32")
    groups = named_groups(base.get_config().curvature.groups)
    assert set(groups) == {line.group for line in TABLE}
    params = jax.eval_shape(lambda: drawn(shape, batch_of(False), jnp.float32))
    for path in jax.tree.leaves(path_names(params)):
        assert [name for name, pattern in groups.items() if re.search(pattern, f"{path}/0")] == [of(path).group], path
