"""MARS-AdamW: variance reduction by the previous gradient (Yuan et al. 2024, arXiv 2411.10438, approximate form)."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from steppe.optim.masks import dimensions, matrix_norm
from steppe.optim.options import NOT_NEGATIVE, Option
from steppe.optim.rule import Tree


class Before(NamedTuple):
    """State: the gradient of the previous step."""

    gradient: Tree


def mars(
    learning_rate,
    b1,
    b2,
    eps,
    weight_decay,
    decay_mask,
    matrix_axes,
    reduction: Annotated[float, Option("weight of the difference from the previous gradient", *NOT_NEGATIVE)] = 0.025,
) -> optax.GradientTransformation:
    """AdamW on c = g + γ b1/(1-b1) (g - previous g), clipped to norm 1, for matrices; on g for other parameters.

    Clips each matrix of a stack separately. As in the paper's approximate form, the previous g is of another batch.
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
