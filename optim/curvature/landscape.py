"""The rise of the loss around theta: the worst in a ball, along directions, and split by parts of the model.

Each function is pure and makes one evaluation; jit it and loop over it in the caller.
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

    Moves epsilon by rho along the normalised gradient, then projects onto the ball. From 0 this is SAM's perturbation.
    """
    loss, gradient = plain_gradient(objective, jax.tree.map(jnp.add, params, epsilon), batch, microbatches)
    pace = ratio(rho, norm(gradient), 0.0)
    further = jax.tree.map(lambda e, g: e + (pace * g).astype(e.dtype), epsilon, gradient)
    back = jnp.minimum(1.0, ratio(rho, norm(further)))
    return loss, gradient, jax.tree.map(lambda e: (back * e).astype(e.dtype), further)


def rise(
    objective: Objective, params: Tree, batch: Tree, gradient: Tree, epsilon: Tree, microbatches: int = 1
) -> dict[str, jax.Array]:
    """The rise of the loss from params to params + epsilon, and three parts that sum to it.

    gradient: of the loss at params. first_order: <gradient, epsilon>. functional: the rise of the frozen readout beyond
    first_order, which comes from the curvature of the model; eps^T NME eps / 2 to second order. logit: the rest, the
    Bregman divergence of the loss between both outputs; eps^T GGN eps / 2 to second order.
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
