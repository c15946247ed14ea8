"""Ascent directions: where to look for a sharper point. Each is a few lines; a new one needs nothing outside this file.

A direction maps what was seen at theta to (vector, length, state); the perturbation is rho * vector / length. A length
of None means the vector's global l2 norm, so that |epsilon|_2 = rho.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from steppe.optim.rule import Tree, inner, norm


class Seen(NamedTuple):
    """What a direction may look at. `moments` is optim.base.Moments, its fields None where the base has none."""

    gradient: Tree
    params: Tree
    moments: Any
    state: Tree
    step: jax.Array


class Ascent(NamedTuple):
    """direction(Seen) -> (vector, length | None, state); `needs` names what must exist: gradient, first, second."""

    direction: Callable[[Seen], tuple[Tree, jax.Array | None, Tree]]
    needs: tuple[str, ...] = ("gradient",)
    init: Callable[[Tree], Tree] = lambda params: ()


def gradient() -> Ascent:
    """g: steepest ascent in the l2 norm (SAM, Foret et al. 2021)."""
    return Ascent(lambda seen: (seen.gradient, None, seen.state))


def preconditioner(second: Tree, unseen: jax.Array | bool, power: float = 0.5, eps: float = 1e-8) -> Tree:
    """D = v^power + eps of a bias-corrected second moment, 1 where none has been seen yet."""
    return jax.tree.map(lambda v: jnp.where(unseen, 1.0, v**power + eps), second)


def preconditioned(power: float = 0.5, eps: float = 1e-8, norm: str = "l2", moment: str = "stale") -> Ascent:
    """D^-1 g with D = v^power + eps, v the base's bias-corrected second moment; D = 1 before its first update.

    moment: "stale" takes v from before this step, "fresh" includes this gradient.
    norm: "l2" gives |epsilon|_2 = rho; "ellipsoid" divides by sqrt(g^T D^-1 g), the maximiser of g^T epsilon under
    sqrt(epsilon^T D epsilon) <= rho.
    """

    def direction(seen):
        if moment == "fresh":
            second, unseen = seen.moments.fresh(seen.gradient), False
        else:
            second, unseen = seen.moments.second, seen.moments.count == 0
        vector = jax.tree.map(jnp.divide, seen.gradient, preconditioner(second, unseen, power, eps))
        length = jnp.sqrt(inner(seen.gradient, vector)) if norm == "ellipsoid" else None
        return vector, length, seen.state

    return Ascent(direction, ("gradient", "second"))


def momentum() -> Ascent:
    """-m, against the base's first moment: costs no gradient (Momentum-SAM, Becker, Altrock, Risse 2024)."""
    return Ascent(lambda seen: (jax.tree.map(jnp.negative, seen.moments.first), None, seen.state), ("first",))


def adaptive(offset: float = 0.01) -> Ascent:
    """T^2 g / |T g| with T = |theta| + offset: invariant to rescaling of parameters (ASAM, Kwon et al. 2021, eq. 8)."""

    def direction(seen):
        scaled = jax.tree.map(lambda g, p: (jnp.abs(p) + offset) * g, seen.gradient, seen.params)
        vector = jax.tree.map(lambda s, p: (jnp.abs(p) + offset) * s, scaled, seen.params)
        return vector, norm(scaled), seen.state

    return Ascent(direction)


def friendly(sigma: float = 1.0, decay: float = 0.9) -> Ascent:
    """g - sigma * EMA(g): ascent along the batch's own noise (Friendly-SAM, Li et al. 2024). State: the average."""

    def direction(seen):
        average = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, seen.state, seen.gradient)
        return jax.tree.map(lambda g, m: g - sigma * m, seen.gradient, average), None, average

    return Ascent(direction, init=lambda params: jax.tree.map(jnp.zeros_like, params))


def random(seed: int = 0) -> Ascent:
    """A Gaussian direction, the same at a given step for a given seed: the control for every other one."""

    def direction(seen):
        leaves, structure = jax.tree.flatten(seen.params)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), seen.step), len(leaves))
        noise = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, noise), None, seen.state

    return Ascent(direction, ())
