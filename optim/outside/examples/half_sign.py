"""A custom direction in fifteen lines."""

from typing import Annotated

import jax
import jax.numpy as jnp

from steppe.optim.ascent import Ascent
from steppe.optim.options import SHARE, Option


def half_sign(mix: Annotated[float, Option("share of the sign", *SHARE)] = 0.5) -> Ascent:
    """sam with ε along (1 - mix) g + mix mean|g| sign(g), the mean over each parameter."""

    def one(g):
        return (1 - mix) * g + mix * jnp.mean(jnp.abs(g)) * jnp.sign(g)

    return Ascent(lambda given: (jax.tree.map(one, given.gradient), None, given.state))
