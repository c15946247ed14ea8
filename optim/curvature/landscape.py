"""How the loss rises around theta: at worst in a ball, on average, along lines; and through which part of the model.

Pure functions of one evaluation each, to be jitted; the loops over them are the caller's.
"""

import jax
import jax.numpy as jnp

from steppe.optim.rule import Anchor, Objective, Tree, accumulate, inner, microbatched, norm, plain_gradient, ratio


def loss_at(
    objective: Objective, params: Tree, batch: Tree, directions: tuple[Tree, ...], lengths: jax.Array,
    microbatches: int = 1,
) -> jax.Array:  # fmt: skip
    """The loss at params + sum_i lengths[i] * directions[i]."""
    moved = params
    for i, direction in enumerate(directions):
        moved = jax.tree.map(lambda p, d, i=i: p + (lengths[i] * d).astype(p.dtype), moved, direction)

    def one(state, part):
        return state, objective.readout(moved, objective.trunk(moved, part), part)[0], ()

    return accumulate(one, (), *microbatched(objective, batch, microbatches))[1]


def ascend(
    objective: Objective, params: Tree, batch: Tree, epsilon: Tree, rho: jax.Array, microbatches: int = 1
) -> tuple[jax.Array, Tree, Tree]:
    """One step of projected ascent in the ball of radius rho: (loss at params + epsilon, gradient there, next epsilon).

    The step is rho along the normalised gradient, then back onto the ball: from 0 it lands on SAM's perturbation.
    """
    loss, gradient = plain_gradient(objective, jax.tree.map(jnp.add, params, epsilon), batch, microbatches)
    pace = ratio(rho, norm(gradient), 0.0)
    further = jax.tree.map(lambda e, g: e + (pace * g).astype(e.dtype), epsilon, gradient)
    back = jnp.minimum(1.0, ratio(rho, norm(further)))
    return loss, gradient, jax.tree.map(lambda e: (back * e).astype(e.dtype), further)


def rise(
    objective: Objective, params: Tree, batch: Tree, gradient: Tree, epsilon: Tree, microbatches: int = 1
) -> dict[str, jax.Array]:
    """What the loss rises by from params to params + epsilon, and the three parts that add up to it.

    first_order: <gradient, epsilon>, gradient being that of the loss at params. functional: the frozen readout's rise
    beyond first_order, eps^T NME eps / 2 to second order: the model bends under a loss derivative that stays. logit:
    the rest, the Bregman divergence of the loss between outputs here and there, eps^T GGN eps / 2 to second order.
    """
    moved = jax.tree.map(jnp.add, params, epsilon)

    def one(state, part):
        here, there = objective.trunk(params, part), objective.trunk(moved, part)
        change = objective.readout(moved, there, part)[0] - objective.readout(params, here, part)[0]
        frozen = objective.frozen_readout(moved, there, Anchor(params, here), part)
        return state, (change, frozen), ()

    change, frozen = accumulate(one, (), *microbatched(objective, batch, microbatches))[1]
    first = inner(gradient, epsilon)
    return {"rise": change, "first_order": first, "functional": frozen - first, "logit": change - frozen}
