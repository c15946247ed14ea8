"""Float64: products of optim.curvature against dense matrices made from second derivatives of the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from helpers import optim_problems as problems
from helpers.optim_problems import close, unit
from steppe.optim.ascent import preconditioner
from steppe.optim.curvature import products
from steppe.optim.masks import mask
from steppe.optim.rule import Anchor

pytestmark = pytest.mark.usefixtures("float64")


def test_products_are_those_of_the_dense_matrices(problem, matrices):
    vector = np.random.default_rng(0).normal(size=problem.theta.size)
    split = problems.split_language_model()
    for objective in (problem.objective, split):
        for product, matrix in zip(
            (products.hessian_product, products.ggn_product, products.nme_product), matrices, strict=True
        ):
            got = jax.jit(product, static_argnums=0)(
                objective, problem.params, problem.batch, problem.tree(jnp.asarray(vector))
            )
            close(np.asarray(ravel_pytree(got)[0]), matrix @ vector, 1e-12)


def test_the_output_product_is_the_logit_hessian(problem):
    logits = problem.objective.trunk(problem.params, problem.batch)
    vector = jnp.asarray(np.random.default_rng(2).normal(size=logits.shape))
    shares = problem.batch["weights"].astype(jnp.float64) / jnp.sum(problem.batch["weights"] > 0)
    p = jax.nn.softmax(logits)
    wanted = shares[..., None] * (p * vector - p * jnp.sum(p * vector, -1, keepdims=True))
    got = jax.jit(products.output_product, static_argnums=0)(problem.objective, problem.params, problem.batch, vector)
    close(np.asarray(got), np.asarray(wanted), 1e-13)
    # split before the readout, it is that seen from the hidden state: W^T l'' W
    split, readout = problems.split_language_model(), problem.params["readout"]
    hidden = jnp.asarray(np.random.default_rng(3).normal(size=(*logits.shape[:2], problems.D)))
    moved = hidden @ readout
    wanted = (shares[..., None] * (p * moved - p * jnp.sum(p * moved, -1, keepdims=True))) @ readout.T
    got = jax.jit(products.output_product, static_argnums=0)(split, problem.params, problem.batch, hidden)
    close(np.asarray(got), np.asarray(wanted), 1e-13)


def test_restricted_and_preconditioned_products(problem, matrices):
    rng = np.random.default_rng(4)
    vector, moment = rng.normal(size=problem.theta.size), rng.uniform(size=problem.theta.size)
    product = lambda v: products.nme_product(problem.objective, problem.params, problem.batch, v)  # noqa: E731
    keep = mask(problem.params, ("^layers", "norm"))
    chosen = np.asarray(ravel_pytree(jax.tree.map(lambda p, k: jnp.full(p.shape, k), problem.params, keep))[0])
    got = jax.jit(products.restricted(product, keep))(problem.tree(jnp.asarray(vector)))
    close(np.asarray(ravel_pytree(got)[0]), chosen * (matrices[2] @ (chosen * vector)), 1e-12)
    scale = preconditioner(problem.tree(jnp.asarray(moment)), False, 0.5, 1e-3)
    got = jax.jit(products.preconditioned(product, scale))(problem.tree(jnp.asarray(vector)))
    half = (np.sqrt(moment) + 1e-3) ** -0.5
    close(np.asarray(ravel_pytree(got)[0]), half * (matrices[2] @ (half * vector)), 1e-12)
    ones = preconditioner(problem.tree(jnp.asarray(moment)), True)
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(ones))


def test_split_directions_by_group(problem, matrices):
    _, ggn, nme = matrices
    epsilon = np.random.default_rng(1).normal(size=problem.theta.size)
    logit, func = ggn @ epsilon, nme @ epsilon
    groups = {"trunk": "^layers", "second layer": "^layers/kernel/1$", "readout": "^readout"}
    got = jax.jit(
        lambda e: products.split_directions(
            problem.objective, problem.params, problem.batch, e, groups, stacked="^layers"
        )
    )(problem.tree(jnp.asarray(epsilon)))
    edges = np.cumsum([problems.V * problems.D, problems.D**2, problems.D**2, problems.D])
    chosen = {
        "all": slice(None), "trunk": slice(edges[0], edges[2]), "second layer": slice(edges[1], edges[2]),
        "readout": slice(edges[3], None),
    }  # fmt: skip
    for name, rows in chosen.items():
        a, b = logit[rows], func[rows]
        wanted = {
            "logit_norm": np.linalg.norm(a), "functional_norm": np.linalg.norm(b),
            "logit_share": (a @ a) / (logit @ logit), "functional_share": (b @ b) / (func @ func),
            "cosine": unit(a) @ unit(b) if np.linalg.norm(b) > 1e-12 else 1.0,
        }  # fmt: skip
        assert set(got[name]) == set(wanted)
        for key, value in wanted.items():
            assert np.isclose(float(got[name][key]), value, rtol=1e-9), (name, key)
    with pytest.raises(ValueError, match="matches no parameter"):
        products.split_directions(
            problem.objective, problem.params, problem.batch, problem.params, {"none": "^nothing"}
        )


def test_products_average_over_microbatches(problem, matrices):
    vector = np.random.default_rng(0).normal(size=problem.theta.size)
    tree = problem.tree(jnp.asarray(vector))
    product = jax.jit(products.nme_product, static_argnums=(0, 4))
    got = product(problem.objective, problem.params, problem.batch, tree, 4)
    close(np.asarray(ravel_pytree(got)[0]), matrices[2] @ vector, 1e-12)


def test_frozen_readout_is_the_first_order_change_of_the_loss(problem):
    hidden = problem.objective.trunk(problem.params, problem.batch)
    moved = jax.tree.map(lambda p: p + 1e-5, problem.params)
    anchor = Anchor(problem.params, hidden)
    change = problem.objective.frozen_readout(
        moved, problem.objective.trunk(moved, problem.batch), anchor, problem.batch
    )
    exact = problems.loss_of(moved, problem.batch) - problems.loss_of(problem.params, problem.batch)
    assert abs(float(change - exact)) < 1e-8 < 1e-5 < abs(float(exact))
