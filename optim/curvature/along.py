"""The loss along one direction: the critical step of an update, and the curvature along a displacement."""

import jax
import jax.numpy as jnp
from jax import lax

from steppe.optim.curvature.landscape import loss_at
from steppe.optim.curvature.products import hessian_product, nme_product
from steppe.optim.rule import Objective, Tree, inner, norm, plain_gradient, ratio

REACH = 16  # the search stops after this many doublings or halvings
FINE = 1 / 16  # bisection ends at this fraction of a doubling


def critical_step(
    objective: Objective, params: Tree, batch: Tree, update: Tree, microbatches: int = 1
) -> dict[str, jax.Array]:
    """Finds the step s > 0 at which the loss at params + s * update equals the loss at params.

    Returns {"critical_steps": s, "critical_forwards": forward passes used}. If `update` is an optimizer step with
    learning rate eta, s eta is the critical learning rate and 2 / (s eta) the critical sharpness (arXiv 2601.16979).
    Doubles or halves s until the loss crosses its value at params. Then bisects log s to within a factor of 2^(1/16).
    s < 1 means that this step raises the loss. s is NaN without a crossing between 2^-16 and 2^16. Computes in the
    dtype of the parameters.
    """

    def going(carry):
        count, _, low, high = carry
        return (count < 1) | ((high - low > FINE) & (low < REACH) & (high > -REACH))

    def further(carry):
        count, before, low, high = carry
        middle = jnp.where(jnp.isinf(low), jnp.where(jnp.isinf(high), 0.0, high - 1), (low + high) / 2)
        power = jnp.where(jnp.isinf(high) & ~jnp.isinf(low), low + 1, middle)
        scale = jnp.where(count < 1, 0.0, jnp.exp2(power))  # the first turn gives the loss at params
        loss = loss_at(objective, params, batch, (update,), scale[None], microbatches)
        risen = ~(loss <= before)  # a non-finite loss counts as risen
        low, high = jnp.where(risen | (count < 1), low, power), jnp.where(risen & (count >= 1), power, high)
        return count + 1, jnp.where(count < 1, loss, before), low, high

    # One call in one loop compiles once. At 2^low the loss has not risen, at 2^high it has.
    kind = jax.eval_shape(lambda: loss_at(objective, params, batch, (), jnp.zeros(0), microbatches)).dtype
    start = jnp.int32(0), jnp.zeros((), kind), jnp.float32(-jnp.inf), jnp.float32(jnp.inf)
    count, _, low, high = lax.while_loop(going, further, start)
    crossed = jnp.isfinite(low) & jnp.isfinite(high)
    return {"critical_steps": jnp.where(crossed, jnp.exp2(low), jnp.nan), "critical_forwards": count}


def critical(rate: jax.Array | float, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The critical learning rate and sharpness, from the result of critical_step and the update's learning rate."""
    most = found["critical_steps"] * rate
    forwards = found["critical_forwards"]
    return {"critical_learning_rate": most, "critical_sharpness": 2 / most, "critical_forwards": forwards}


def along(objective: Objective, params: Tree, batch: Tree, direction: Tree, microbatches: int = 1) -> dict:
    """Scalars about the loss from params to params + v, v = direction.

    norm: |v|. slope: g^T v / |v|. curvature: v^T H v / |v|^2. functional_curvature: the part of the NME in it. rise:
    the loss at params + v minus the loss at params. quadratic: its second-order estimate, g^T v + v^T H v / 2. If v is
    the change by fine-tuning and the batch is pretraining text, rise measures forgetting.
    """
    loss, gradient = plain_gradient(objective, params, batch, microbatches)
    there = loss_at(objective, objective.after(params, loss), batch, (direction,), jnp.ones(1), microbatches)
    length = norm(direction)
    unit = jax.tree.map(lambda v: (ratio(1.0, length, 0.0) * v).astype(v.dtype), direction)
    slope = inner(gradient, unit)
    known, bends = there, []
    for product in (hessian_product, nme_product):
        known = inner(unit, product(objective, objective.after(params, known), batch, unit, microbatches))
        bends.append(known)
    curvature, functional = bends
    return {
        "norm": length,
        "slope": slope,
        "curvature": curvature,
        "functional_curvature": functional,
        "rise": there - loss,
        "quadratic": slope * length + curvature * length**2 / 2,
    }
