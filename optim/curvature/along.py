"""How the loss goes along one direction: the critical step along an update, the curvature along a displacement."""

import jax
import jax.numpy as jnp
from jax import lax

from steppe.optim.curvature.landscape import loss_at
from steppe.optim.curvature.products import hessian_product, nme_product
from steppe.optim.rule import Objective, Tree, inner, norm, plain_gradient, ratio

REACH = 16  # doublings or halvings after which no critical step is looked for any further
FINE = 1 / 16  # of a doubling, to which it is bisected


def critical_step(
    objective: Objective, params: Tree, batch: Tree, update: Tree, microbatches: int = 1
) -> dict[str, jax.Array]:
    """{"critical_steps", "critical_forwards"}: the s at which the loss at params + s * update is that at params again.

    Critical sharpness (arXiv 2601.16979): with `update` a step of the optimizer at learning rate eta, s eta is the
    critical learning rate and 2 / (s eta) the sharpness along what the optimizer does, at the cost of a few forward
    passes: s is doubled, or halved, until the loss crosses its value at params, and the crossing bisected in the
    logarithm to within a factor of 2^(1/16). s < 1: the step that comes raises the loss. NaN where none of so many
    doublings crosses, and where already 2^-16 steps rise. In the dtype of the parameters.
    """

    def going(carry):
        count, _, low, high = carry
        return (count < 1) | ((high - low > FINE) & (low < REACH) & (high > -REACH))

    def further(carry):
        count, before, low, high = carry
        middle = jnp.where(jnp.isinf(low), jnp.where(jnp.isinf(high), 0.0, high - 1), (low + high) / 2)
        power = jnp.where(jnp.isinf(high) & ~jnp.isinf(low), low + 1, middle)
        scale = jnp.where(count < 1, 0.0, jnp.exp2(power))  # first of all the loss at params
        loss = loss_at(objective, params, batch, (update,), scale[None], microbatches)
        risen = ~(loss <= before)  # what is not finite has risen
        low, high = jnp.where(risen | (count < 1), low, power), jnp.where(risen & (count >= 1), power, high)
        return count + 1, jnp.where(count < 1, loss, before), low, high

    # One loss in one loop: compiled once. low and high are powers of two at which the loss has not, and has, risen.
    kind = jax.eval_shape(lambda: loss_at(objective, params, batch, (), jnp.zeros(0), microbatches)).dtype
    start = jnp.int32(0), jnp.zeros((), kind), jnp.float32(-jnp.inf), jnp.float32(jnp.inf)
    count, _, low, high = lax.while_loop(going, further, start)
    crossed = jnp.isfinite(low) & jnp.isfinite(high)
    return {"critical_steps": jnp.where(crossed, jnp.exp2(low), jnp.nan), "critical_forwards": count}


def critical(rate: jax.Array | float, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What critical_step found of an update at this learning rate, as the critical learning rate and sharpness."""
    most = found["critical_steps"] * rate
    forwards = found["critical_forwards"]
    return {"critical_learning_rate": most, "critical_sharpness": 2 / most, "critical_forwards": forwards}


def along(objective: Objective, params: Tree, batch: Tree, direction: Tree, microbatches: int = 1) -> dict:
    """What the loss does from params to params + direction, v = direction: scalars.

    norm |v|; slope g^T v / |v|; curvature v^T H v / |v|^2, of which functional_curvature is the NME's part; rise, of
    the loss from one end to the other; quadratic, what g and H say of that, g^T v + v^T H v / 2. With v what
    fine-tuning has done to params and batch of the text before it, that is the mechanism of forgetting.
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
