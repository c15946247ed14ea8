"""What bends the loss while a run trains: the logit and the functional part of the Hessian along the gradient."""

from collections.abc import Callable, Sequence

import jax
import optax

from optim import Objective
from optim.curvature import split_directions
from optim.rule import norm, plain_gradient, ratio

LAYERS = r"^layers/"  # stacked parameters: each layer is one, "layers/mlp/up/kernel/0", so that a group can name layers


def make_measurement(objective: Objective, groups: Sequence[str], microbatches: int = 1) -> Callable:
    """measure(params, batch) -> {group: {logit_norm, functional_norm, logit_share, functional_share, cosine}}.

    delta_logit = GGN u and delta_func = NME u for u = g / |g|, the unit ascent direction of SAM on this batch; groups
    are "name=regex", "all" is always there. Costs about five gradients.
    """
    named = dict(group.split("=", 1) for group in groups)

    def measure(params, batch):
        _, gradient = plain_gradient(objective, params, batch, microbatches)
        direction = optax.tree.scale(ratio(1.0, norm(gradient), 0.0), gradient)
        return split_directions(objective, params, batch, direction, named, stacked=LAYERS, microbatches=microbatches)

    return jax.jit(measure)
