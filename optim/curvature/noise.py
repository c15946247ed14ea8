"""The gradient noise scale, and the expected effect of a perturbation at batch sizes below it.

Source: McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv 1812.06162, section 2.2 and appendix A.1.
"""

import jax
import jax.numpy as jnp

from steppe.optim.curvature.products import ggn_product, nme_product
from steppe.optim.rule import Objective, Tree, accumulate, inner, no_square, norm, plain_gradient, ratio, split


def noise_scale(objective: Objective, params: Tree, batch: Tree, parts: int) -> dict[str, jax.Array]:
    """The noise of the gradient, and the change of the gradient under SAM's perturbation, over parts of a batch.

    batch: [B, ...], rows in random order; part k has rows k, k + parts ... parts: at least 2, a divisor of B.
    Returns scalars; g_i is the gradient of part i, u_i = g_i / |g_i|, W the weight (tokens) of the whole batch:
    gradient_square: |G|^2 of the mean gradient G. noise_square: tr(S) / W, S the covariance of one token's gradient.
    scale: tr(S) / (W |G|^2), the noise scale in units of this batch; inf if noise hides |G|^2.
    logit_norm, functional_norm: root mean square norms of delta_logit = GGN_i u_i and delta_func = NME_i u_i.
    expected_logit_norm, expected_functional_norm: norms of their expectations over parts.
    Squares are unbiased if rows are independent; negative expected squares become 0. Costs about six gradients.
    """
    cut, shares = split(objective, batch, parts)

    def one(state, part):
        _, gradient = plain_gradient(objective, objective.after(params, state), part)
        unit = jax.tree.map(lambda g: g * ratio(1.0, norm(gradient), 0.0).astype(g.dtype), gradient)
        logit = ggn_product(objective, objective.after(params, norm(unit)), part, unit)
        functional = nme_product(objective, objective.after(params, norm(logit)), part, unit)
        trees = gradient, logit, functional
        squares = jnp.stack([inner(tree, tree) for tree in trees])
        return jnp.sum(squares), trees, squares

    _, means, squares = accumulate(one, no_square(params), cut, shares)
    square = jnp.stack([inner(mean, mean) for mean in means])
    each = jnp.sum(shares[:, None] * squares, axis=0)
    spread = (each - square) / (parts - 1)
    gradient, *expected = square - spread
    return {
        "gradient_square": gradient,
        "noise_square": spread[0],
        "scale": jnp.where(gradient > 0, spread[0] / jnp.where(gradient > 0, gradient, 1), jnp.inf),
        "logit_norm": jnp.sqrt(each[1]),
        "functional_norm": jnp.sqrt(each[2]),
        "expected_logit_norm": jnp.sqrt(jnp.maximum(expected[0], 0)),
        "expected_functional_norm": jnp.sqrt(jnp.maximum(expected[1], 0)),
    }


def from_norms(gradient_norm: float, microbatch_norm: float, parts: int) -> tuple[float, float]:
    """(gradient_square, noise_square) of `noise_scale` from two norms of a step's report, in units of its batch."""
    spread = (microbatch_norm**2 - gradient_norm**2) / (parts - 1)
    return gradient_norm**2 - spread, spread
