"""Products with the Hessian and its two parts, for any objective: H = GGN + NME.

The GGN bends the loss through the logits, the NME (nonlinear modelling error, the functional Hessian) bends the model
under a frozen loss derivative. One product costs about as much as two gradients, in the dtype of the parameters.
"""

import jax
import jax.numpy as jnp

from optim.masks import mask, path_names
from optim.rule import Anchor, Objective, Tree, accumulate, cosine, microbatched, norm, ratio


def hessian_product(objective: Objective, params: Tree, batch: Tree, vector: Tree, microbatches: int = 1) -> Tree:
    """H v at params, forward over reverse; the batch taken in `microbatches` parts."""

    def one(state, part):
        def loss(p):
            return objective.readout(p, objective.trunk(p, part), part)[0]

        return state, jax.jvp(jax.grad(loss), (params,), (vector,))[1], ()

    return accumulate(one, (), *microbatched(objective, batch, microbatches))[1]


def nme_product(objective: Objective, params: Tree, batch: Tree, vector: Tree, microbatches: int = 1) -> Tree:
    """NME v: the derivative along v of the functional gradient, its anchor staying at params."""

    def one(state, part):
        anchor = Anchor(params, objective.trunk(params, part))

        def frozen(p):
            return objective.frozen_readout(p, objective.trunk(p, part), anchor, part)

        return state, jax.jvp(jax.grad(frozen), (params,), (vector,))[1], ()

    return accumulate(one, (), *microbatched(objective, batch, microbatches))[1]


def ggn_product(objective: Objective, params: Tree, batch: Tree, vector: Tree, microbatches: int = 1) -> Tree:
    """GGN v = H v - NME v: the seam hides the logits, so a GGN far smaller than the NME loses digits."""
    whole = hessian_product(objective, params, batch, vector, microbatches)
    return jax.tree.map(jnp.subtract, whole, nme_product(objective, params, batch, vector, microbatches))


def split_directions(
    objective: Objective,
    params: Tree,
    batch: Tree,
    epsilon: Tree,
    groups: dict[str, str],
    *,
    stacked: str = "",
    microbatches: int = 1,
) -> dict[str, dict[str, jax.Array]]:
    """The first-order changes of the gradient under epsilon, delta_logit = GGN eps and delta_func = NME eps, by group.

    groups: name -> regex over parameter paths; "all" is always there. stacked: regex of parameters whose first axis is
    the layer; each then counts as one parameter per layer, its path followed by "/0", "/1" ...
    Returns group -> logit_norm, functional_norm, their shares of the whole squared norms, and cosine, the one between
    the two. ValueError for a regex that matches nothing.
    """
    functional = nme_product(objective, params, batch, epsilon, microbatches)
    total = hessian_product(objective, params, batch, epsilon, microbatches)
    logit = jax.tree.map(jnp.subtract, total, functional)
    logit, functional = _by_layer(logit, stacked), _by_layer(functional, stacked)
    found = {}
    for name, pattern in {"all": "", **groups}.items():
        chosen = mask(logit, (pattern,))
        a, b = ({path: tree[path] for path in tree if chosen[path]} for tree in (logit, functional))
        found[name] = {
            "logit_norm": norm(a),
            "functional_norm": norm(b),
            "logit_share": ratio(norm(a), norm(logit), 0.0) ** 2,
            "functional_share": ratio(norm(b), norm(functional), 0.0) ** 2,
            "cosine": cosine(a, b),
        }
    return found


def _by_layer(tree: Tree, stacked: str) -> dict[str, jax.Array]:
    leaves = dict(zip(jax.tree.leaves(path_names(tree)), jax.tree.leaves(tree), strict=True))
    layered = mask(leaves, (stacked,)) if stacked else dict.fromkeys(leaves, False)
    split = {}
    for path, leaf in leaves.items():
        split |= {f"{path}/{i}": part for i, part in enumerate(leaf)} if layered[path] else {path: leaf}
    return split
