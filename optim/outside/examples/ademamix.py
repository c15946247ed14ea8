"""AdEMAMix: Adam with a second, slow average of gradients (Pagliardini, Ablin, Grangier 2024, arXiv 2409.03137)."""

import math
from typing import Annotated

import jax.numpy as jnp
import optax

from steppe.optim.options import NATURAL, NOT_NEGATIVE, SHARE, Option


def ademamix(
    learning_rate,
    b1,
    b2,
    eps,
    weight_decay,
    decay_mask,
    slow_decay: Annotated[float, Option("decay of the slow average", *SHARE)] = 0.999,
    slow_weight: Annotated[float, Option("weight of the slow average next to the fast one", *NOT_NEGATIVE)] = 5.0,
    slow_warmup: Annotated[int, Option("warm-up of weight and decay, steps; 0: none", *NATURAL)] = 1000,
) -> optax.GradientTransformation:
    """(m₁/(1-b1ᵗ) + α m₂) / (√(v/(1-b2ᵗ)) + eps), m₂ the average with decay β₃; decoupled weight decay.

    During the warm-up α grows linearly from 0, and β₃ from b1 with a linear half-life (section 3 of the paper). The
    paper's defaults suit hundreds of thousands of steps (β₃ 0.9999, warm-up of the whole run); these suit thousands.
    """

    def done(count):  # weakly typed, so that states keep their dtypes
        return jnp.minimum((count + 1) * (1 / slow_warmup), 1.0)

    def weight(count):
        return slow_weight * done(count)

    def decay(count):
        fast, slow = math.log(b1), math.log(slow_decay)
        return jnp.exp(fast * slow / ((1 - done(count)) * slow + done(count) * fast))

    warm = slow_warmup > 0 and b1 > 0 and slow_decay > 0
    return optax.contrib.ademamix(
        learning_rate,
        b1,
        b2,
        b3=decay if warm else slow_decay,
        alpha=weight if warm else slow_weight,
        eps=eps,
        weight_decay=weight_decay,
        mask=decay_mask,
    )
