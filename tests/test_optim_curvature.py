"""Float64: products of optim.curvature against dense matrices made from second derivatives of the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optim_problems as problems
import pytest
from jax.flatten_util import ravel_pytree
from optim_problems import close, unit

from optim import curvature
from optim.rule import Anchor


@pytest.fixture(autouse=True, scope="module")
def float64():
    jax.config.update("jax_disable_most_optimizations", True)  # halves the time to compile
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def problem(float64):
    return problems.Problem()


@pytest.fixture(scope="module")
def matrices(problem):
    return problem.matrices()


def test_products_are_those_of_the_dense_matrices(problem, matrices):
    vector = np.random.default_rng(0).normal(size=problem.theta.size)
    split = problems.split_language_model()
    for objective in (problem.objective, split):
        for product, matrix in zip(
            (curvature.hessian_product, curvature.ggn_product, curvature.nme_product), matrices, strict=True
        ):
            got = jax.jit(product, static_argnums=0)(
                objective, problem.params, problem.batch, problem.tree(jnp.asarray(vector))
            )
            close(np.asarray(ravel_pytree(got)[0]), matrix @ vector, 1e-12)


def test_split_directions_by_group(problem, matrices):
    _, ggn, nme = matrices
    epsilon = np.random.default_rng(1).normal(size=problem.theta.size)
    logit, func = ggn @ epsilon, nme @ epsilon
    groups = {"trunk": "^layers", "second layer": "^layers/kernel/1$", "readout": "^readout"}
    got = jax.jit(
        lambda e: curvature.split_directions(
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
        curvature.split_directions(
            problem.objective, problem.params, problem.batch, problem.params, {"none": "^nothing"}
        )


def test_products_average_over_microbatches(problem, matrices):
    vector = np.random.default_rng(0).normal(size=problem.theta.size)
    tree = problem.tree(jnp.asarray(vector))
    product = jax.jit(curvature.nme_product, static_argnums=(0, 4))
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
