"""Ascent directions: where to look for a sharper point. Each is a few lines; a new one needs nothing outside this file.

A direction maps what is known at theta to (vector, length, state); the perturbation is rho * vector / length. A length
of None means the vector's global l2 norm, so that |epsilon|_2 = rho.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from steppe.optim.options import FINITE, NATURAL, NOT_NEGATIVE, POSITIVE, SHARE, Option, one_of
from steppe.optim.rule import Tree, inner, norm


class AscentInput(NamedTuple):
    """What a direction is made from. `moments` is optim.base.Moments, its fields None where the base has none."""

    gradient: Tree
    params: Tree
    moments: Any
    state: Tree
    step: jax.Array


class Direction(Protocol):
    """Where theta + epsilon lies from theta."""

    def __call__(self, given: AscentInput) -> tuple[Tree, jax.Array | None, Tree]:
        """(vector, its length, state): epsilon is rho * vector / length; a length of None is the vector's l2 norm."""


class Ascent(NamedTuple):
    """A direction; `needs` names what must exist for it: gradient, first, second; init(params) -> its state."""

    direction: Direction
    needs: tuple[str, ...] = ("gradient",)
    init: Callable[[Tree], Tree] = lambda params: ()


def gradient() -> Ascent:
    """g: steepest ascent in the l2 norm (SAM, Foret et al. 2021)."""
    return Ascent(lambda given: (given.gradient, None, given.state))


def preconditioner(second: Tree, unseen: jax.Array | bool, power: float = 0.5, eps: float = 1e-8) -> Tree:
    """D = v^power + eps of a bias-corrected second moment, 1 where none has been given yet."""
    return jax.tree.map(lambda v: jnp.where(unseen, 1.0, v**power + eps), second)


def preconditioned(
    precond_power: Annotated[float, Option("exponent of the second moment in D", *NOT_NEGATIVE)] = 0.5,
    precond_eps: Annotated[float, Option("added to D", *POSITIVE)] = 1e-8,
    precond_norm: Annotated[str, Option("the norm in which rho is measured", *one_of("l2", "ellipsoid"))] = "l2",
    precond_moment: Annotated[
        str, Option("second moment before or after this gradient", *one_of("stale", "fresh"))
    ] = "stale",
) -> Ascent:
    """D^-1 g with D = v^power + eps, v the base's bias-corrected second moment; D = 1 before its first update.

    precond_moment: "stale" takes v from before this step, "fresh" includes this gradient.
    precond_norm: "l2" gives |epsilon|_2 = rho; "ellipsoid" divides by sqrt(g^T D^-1 g), the maximiser of g^T epsilon
    under sqrt(epsilon^T D epsilon) <= rho.
    """

    def direction(given):
        if precond_moment == "fresh":
            second, unseen = given.moments.fresh(given.gradient), False
        else:
            second, unseen = given.moments.second, given.moments.count == 0
        vector = jax.tree.map(jnp.divide, given.gradient, preconditioner(second, unseen, precond_power, precond_eps))
        length = jnp.sqrt(inner(given.gradient, vector)) if precond_norm == "ellipsoid" else None
        return vector, length, given.state

    return Ascent(direction, ("gradient", "second"))


def momentum() -> Ascent:
    """-m, against the base's first moment: costs no gradient (Momentum-SAM, Becker, Altrock, Risse 2024)."""
    return Ascent(lambda given: (jax.tree.map(jnp.negative, given.moments.first), None, given.state), ("first",))


def adaptive() -> Ascent:
    """T^2 g / |T g| with T = |theta| + 0.01: invariant to rescaling of parameters (ASAM, Kwon et al. 2021, eq. 8)."""

    def direction(given):
        scaled = jax.tree.map(lambda g, p: (jnp.abs(p) + 0.01) * g, given.gradient, given.params)
        vector = jax.tree.map(lambda s, p: (jnp.abs(p) + 0.01) * s, scaled, given.params)
        return vector, norm(scaled), given.state

    return Ascent(direction)


def friendly(
    sigma: Annotated[float, Option("share of the average gradient removed", *FINITE)] = 1.0,
    decay: Annotated[float, Option("decay of the average gradient", *SHARE)] = 0.9,
) -> Ascent:
    """g - sigma * EMA(g): ascent along the batch's own noise (Friendly-SAM, Li et al. 2024). State: the average."""

    def direction(given):
        average = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, given.state, given.gradient)
        return jax.tree.map(lambda g, m: g - sigma * m, given.gradient, average), None, average

    return Ascent(direction, init=lambda params: jax.tree.map(jnp.zeros_like, params))


def random(seed: Annotated[int, Option("of the random direction", *NATURAL)] = 0) -> Ascent:
    """A Gaussian direction, the same at a given step for a given seed: the control for every other one."""

    def direction(given):
        leaves, structure = jax.tree.flatten(given.params)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), given.step), len(leaves))
        noise = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, noise), None, given.state

    return Ascent(direction, ())
