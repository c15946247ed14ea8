"""Descent paths: which gradient is taken once the perturbation is known, and how it joins the gradient at theta.

A path maps At to (perturbed loss, vectors). The loss is exact on the full path and a first-order estimate on the
others, which never form perturbed logits (for a loss convex in the outputs: from below on the functional path, from
above on the logit path).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from steppe.optim.first_pass import Looked
from steppe.optim.rule import Anchor, Objective, Tree, backward, inner, norm, ratio


class At(NamedTuple):
    """Everything a path may use on one (micro)batch. pull is None when the pass at theta can no longer be reused."""

    objective: Objective
    params: Tree
    epsilon: Tree
    perturbed: Tree
    batch: Tree
    anchor: Anchor
    loss: jax.Array
    pull: Callable | None


class Descent(NamedTuple):
    """path(At) -> (perturbed loss, vectors); combine(looks.Looked, vectors) -> gradient.

    anchored: the path needs the hidden state at theta.
    combine None: the vectors are the gradient. Otherwise the clean gradient of the whole batch takes part.
    remember(clean gradient, gradient) -> memory and reuse(clean gradient, memory) -> gradient serve the steps between
    perturbed ones (LookSAM); None: those steps return the clean gradient.
    """

    path: Callable[[At], tuple[jax.Array, Tree]]
    combine: Callable[[Looked, Tree], Tree] | None = None
    anchored: bool = False
    remember: Callable[[Tree, Tree], Tree] | None = None
    reuse: Callable[[Tree, Tree], Tree] | None = None


def _full(at: At, params: Tree) -> tuple[jax.Array, Tree]:
    def loss(p):
        return at.objective.readout(p, at.objective.trunk(p, at.batch), at.batch)[0]

    return jax.value_and_grad(loss)(params)


def _functional(at: At, hidden: Tree, pull: Callable) -> tuple[jax.Array, Tree]:
    """hidden, pull: the trunk at theta + epsilon."""
    difference, gradient = backward(at.objective.frozen_readout, pull, at.perturbed, hidden, at.anchor, at.batch)
    return at.loss + difference, gradient


def _logit(at: At, perturbed_hidden: Tree) -> tuple[jax.Array, Tree]:
    frozen = Anchor(at.perturbed, perturbed_hidden)
    # With several parts the pass at theta was not kept: its forward runs again.
    pull = at.pull or jax.vjp(lambda p: at.objective.trunk(p, at.batch), at.params)[1]
    difference, gradient = backward(at.objective.frozen_readout, pull, at.params, at.anchor.hidden, frozen, at.batch)
    return at.loss - difference, gradient


def full() -> Descent:
    """J(theta+eps)^T dl(F(theta+eps)): the whole gradient at the perturbed point."""
    return Descent(lambda at: _full(at, at.perturbed))


def functional() -> Descent:
    """J(theta+eps)^T dl(F(theta)): perturbed Jacobian, loss derivative frozen at theta (Functional-SAM)."""

    def path(at):
        return _functional(at, *jax.vjp(lambda p: at.objective.trunk(p, at.batch), at.perturbed))

    return Descent(path, anchored=True)


def logit() -> Descent:
    """J(theta)^T dl(F(theta+eps)): perturbed loss derivative, Jacobian at theta; the complement of functional()."""
    return Descent(lambda at: _logit(at, at.objective.trunk(at.perturbed, at.batch)), anchored=True)


def mixture(alpha: float = 0.5) -> Descent:
    """alpha * functional + (1 - alpha) * logit."""

    def path(at):
        hidden, pull = jax.vjp(lambda p: at.objective.trunk(p, at.batch), at.perturbed)
        (loss_f, functional_gradient), (loss_l, logit_gradient) = _functional(at, hidden, pull), _logit(at, hidden)
        # l + alpha (f - l), not alpha f + (1 - alpha) l: exact where the two agree.
        mixed = jax.tree.map(lambda f, l: l + alpha * (f - l), functional_gradient, logit_gradient)
        return loss_l + alpha * (loss_f - loss_l), mixed

    return Descent(path, anchored=True)


def penalty() -> Descent:
    """g + H eps by an exact Hessian-vector product: the gradient of L + eps^T g with eps held fixed."""

    def path(at):
        def value_and_gradient(p):
            return _full(at, p)

        (loss, _), (slope, product) = jax.jvp(value_and_gradient, (at.params,), (at.epsilon,))
        return loss + slope + 0.5 * inner(at.epsilon, product), product

    return Descent(path, lambda looked, product: jax.tree.map(jnp.add, looked.clean, product))


def _orthogonal(vector: Tree, along: Tree) -> Tree:
    share = ratio(inner(vector, along), inner(along, along), 0.0)
    return jax.tree.map(lambda v, a: v - share * a, vector, along)


def surrogate_gap(alpha: float = 0.4) -> Descent:
    """g_p - alpha * (part of g orthogonal to g_p): lowers the gap L_p - L too (GSAM, Zhuang et al. 2022, alg. 1)."""

    def combine(looked, perturbed):
        return jax.tree.map(lambda p, o: p - alpha * o, perturbed, _orthogonal(looked.clean, perturbed))

    return Descent(lambda at: _full(at, at.perturbed), combine)


def look(alpha: float = 0.7) -> Descent:
    """The full path, whose part orthogonal to g is reused on the steps between (LookSAM, Liu et al. 2022, alg. 1)."""

    def reuse(clean, memory):
        share = alpha * ratio(norm(clean), norm(memory), 0.0)
        return jax.tree.map(lambda g, v: g + share * v, clean, memory)

    return Descent(
        lambda at: _full(at, at.perturbed), remember=lambda clean, gradient: _orthogonal(gradient, clean), reuse=reuse
    )


def curvature_regularized(gamma: float = 0.1, beta: float = 0.01) -> Descent:
    """g+ + gamma (g+ + g- - 2g) + beta (g+ - g-), gradients at theta +- eps (CR-SAM, Wu, Luo, Wunsch 2024)."""

    def path(at):
        loss, up = _full(at, at.perturbed)
        # The barrier orders the two passes, so that their activations are never held together.
        opposite, up = lax.optimization_barrier((jax.tree.map(jnp.subtract, at.params, at.epsilon), up))
        return loss, (up, _full(at, opposite)[1])

    def combine(looked, vectors):
        return jax.tree.map(lambda g, u, d: u + gamma * (u + d - 2 * g) + beta * (u - d), looked.clean, *vectors)

    return Descent(path, combine)


def focused() -> Descent:
    """g + (the focused gradient at theta+eps, less that at theta): Focal-SAM, on looks.focal (Li et al. 2025)."""

    def path(at):
        loss, gradient = _full(at, at.perturbed)
        return at.loss + loss, gradient

    def combine(looked, perturbed):
        return jax.tree.map(lambda g, a, p: g + (p - a), looked.clean, looked.ascent, perturbed)

    return Descent(path, combine)
