"""Hyperball: Adam and Muon with matrices of constant norm (Wen, Dang, Lyu, Ma, Liang 2026, arXiv 2606.16899)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax

from steppe.optim.masks import dimensions, matrix_norm
from steppe.optim.rule import Tree, ratio


def adam_hyperball(learning_rate, b1, b2, eps, weight_decay, decay_mask, matrix_axes) -> optax.GradientTransformation:
    """AdamH: W ← R N(W - η R N(u)) for matrices, N(x) = x/‖x‖, R = ‖W‖, u Adam's direction; AdamW for the rest."""
    return _on_balls(optax.scale_by_adam(b1, b2, eps), learning_rate, weight_decay, decay_mask, matrix_axes)


def muon_hyperball(learning_rate, b1, b2, eps, weight_decay, decay_mask, matrix_axes) -> optax.GradientTransformation:
    """MuonH: the same with Muon's direction u; AdamW for the rest."""
    muon = optax.contrib.muon(1.0, beta=b1, eps=eps, adam_b1=b1, adam_b2=b2, muon_weight_dimension_numbers=matrix_axes)
    inner = optax.chain(muon, optax.scale(-1.0))
    return _on_balls(inner, learning_rate, weight_decay, decay_mask, matrix_axes)


def _on_balls(
    inner: optax.GradientTransformation,
    learning_rate: Any,
    weight_decay: float,
    decay_mask: Any,
    matrix_axes: Callable | None,
) -> optax.GradientTransformation:
    """Steps on spheres for matrices, and plain steps with decoupled decay for other parameters.

    The radius is the current norm of a matrix, which its steps preserve up to rounding.
    """

    def on_matrices(function: Callable) -> optax.GradientTransformation:
        """Applies function(update, matrix, norm) to every matrix; norm(x) is the norm of each matrix in a stack."""

        def update(updates: Tree, params: Tree) -> Tree:
            leaves, structure = jax.tree.flatten(updates)
            rows = zip(leaves, jax.tree.leaves(params), dimensions(params, matrix_axes), strict=True)
            new = [u if dims is None else function(u, w, partial(matrix_norm, dims=dims)) for u, w, dims in rows]
            return jax.tree.unflatten(structure, new)

        return optax.stateless(update)

    def on_sphere(update, matrix, norm):
        return norm(matrix) * update * ratio(1.0, norm(update), 0.0)

    def projected(update, matrix, norm):
        return norm(matrix) * (matrix + update) * ratio(1.0, norm(matrix + update), 0.0) - matrix

    def elsewhere(params: Tree) -> Tree:
        chosen = decay_mask(params) if callable(decay_mask) else decay_mask
        chosen = jax.tree.map(lambda _: True, params) if chosen is None else chosen
        leaves, structure = jax.tree.flatten(chosen)
        plain = [dims is None for dims in dimensions(params, matrix_axes)]
        return jax.tree.unflatten(structure, [a and b for a, b in zip(leaves, plain, strict=True)])

    return optax.chain(
        inner,
        on_matrices(on_sphere),
        optax.add_decayed_weights(weight_decay, elsewhere),
        optax.scale_by_learning_rate(learning_rate),
        on_matrices(projected),
    )
