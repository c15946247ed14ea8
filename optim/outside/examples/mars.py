"""MARS-AdamW: variance reduction by the gradient before (Yuan et al. 2024, arXiv 2411.10438, their approximation)."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from steppe.optim.masks import dimensions, matrix_norm
from steppe.optim.options import NOT_NEGATIVE, Option
from steppe.optim.rule import Tree


class Before(NamedTuple):
    """The gradient of the step before."""

    gradient: Tree


def mars(
    learning_rate,
    b1,
    b2,
    eps,
    weight_decay,
    decay_mask,
    matrix_axes,
    reduction: Annotated[float, Option("share of the difference from the gradient before", *NOT_NEGATIVE)] = 0.025,
) -> optax.GradientTransformation:
    """AdamW of c = g + γ b1/(1-b1) (g - g of the step before), cut to norm 1, in matrices; of g elsewhere.

    Each matrix of a stack is cut by itself. As in their approximation the gradient before is of another batch.
    """

    def update(updates, state, params=None):
        def corrected(g, before, dims):
            if dims is None:
                return g
            c = g + reduction * b1 / (1 - b1) * (g - before)
            return c / jnp.maximum(matrix_norm(c, dims), 1.0)

        leaves, structure = jax.tree.flatten(updates)
        known = jax.tree.leaves(state.gradient)
        found = map(corrected, leaves, known, dimensions(updates, matrix_axes))
        return jax.tree.unflatten(structure, list(found)), Before(updates)

    variance = optax.GradientTransformation(lambda params: Before(jax.tree.map(jnp.zeros_like, params)), update)
    decay = optax.add_decayed_weights(weight_decay, decay_mask)
    return optax.chain(variance, optax.scale_by_adam(b1, b2, eps), decay, optax.scale_by_learning_rate(learning_rate))
