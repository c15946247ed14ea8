"""Products with the Hessian and its two parts, for any objective: H = GGN + NME.

The GGN bends the loss through the outputs, the NME (nonlinear modelling error, the functional Hessian) bends the model
under a frozen loss derivative. All are forward over reverse, in the dtype of the parameters: a trunk or a readout with
custom reverse rules can be differentiated no other way.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from steppe.optim.masks import mask, path_names
from steppe.optim.rule import Anchor, Objective, Tree, accumulate, cosine, microbatched, norm, ratio

Product = Callable[[Tree], Tree]


def hessian_product(objective: Objective, params: Tree, batch: Tree, vector: Tree, microbatches: int = 1) -> Tree:
    """H v at params; the batch taken in `microbatches` parts."""

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
    """GGN v = J^T l'' J v, the trunk's tangent forth and its pullback back: no second derivative of the trunk.

    The seam hides the outputs, so l'' is what the readout has beyond the frozen readout, both bent at params; where the
    trunk's result is the outputs themselves, the frozen readout is linear and nothing is subtracted.
    """

    def one(state, part):
        def trunk(p):
            return objective.trunk(p, part)

        hidden, pull = jax.vjp(trunk, params)
        # The tangent of vjp's result, not of the trunk: a custom reverse rule in it has no forward one.
        moved = jax.jvp(lambda p: jax.vjp(trunk, p)[0], (params,), (vector,))[1]

        def bend(readout, at):
            return jax.jvp(jax.grad(readout, argnums=(0, 1)), at, (vector, moved))[1]

        whole = bend(lambda p, h: objective.readout(p, h, part)[0], (params, hidden))
        at = objective.after((params, hidden), whole)
        frozen = bend(lambda p, h: objective.frozen_readout(p, h, Anchor(*at), part), at)
        direct, cotangent = jax.tree.map(jnp.subtract, whole, frozen)
        return state, jax.tree.map(jnp.add, pull(cotangent)[0], direct), ()

    return accumulate(one, (), *microbatched(objective, batch, microbatches))[1]


def output_product(objective: Objective, params: Tree, batch: Tree, vector: Tree) -> Tree:
    """l'' v, the Hessian of the loss in the trunk's result, times a vector of its shape.

    For optim.objective(forward, loss) the trunk's result are the outputs, so this is the logit Hessian. An objective
    split before its readout hides the logits; then it is the readout's curvature in the hidden state.
    """
    hidden = objective.trunk(params, batch)
    return jax.jvp(jax.grad(lambda h: objective.readout(params, h, batch)[0]), (hidden,), (vector,))[1]


PRODUCTS = {"hessian": hessian_product, "ggn": ggn_product, "nme": nme_product}


def restricted(product: Product, keep: Tree) -> Product:
    """P A P, with P the projection onto the parameters where `keep` (masks.mask) is true."""

    def project(vector):
        return jax.tree.map(lambda v, chosen: v if chosen else jnp.zeros_like(v), vector, keep)

    return lambda vector: project(product(project(vector)))


def preconditioned(product: Product, scale: Tree) -> Product:
    """D^-1/2 A D^-1/2: curvature as a step D^-1 g meets it. scale: D, as ascent.preconditioner gives it."""

    def half(vector):
        return jax.tree.map(lambda v, d: v / jnp.sqrt(d), vector, scale)

    return lambda vector: half(product(half(vector)))


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
    logit = ggn_product(objective, params, batch, epsilon, microbatches)
    functional = nme_product(objective, objective.after(params, norm(logit)), batch, epsilon, microbatches)
    return compare(logit, functional, groups, stacked=stacked)


def compare(logit: Tree, functional: Tree, groups: dict[str, str], *, stacked: str = "") -> dict:
    """What split_directions returns, of delta_logit and delta_func themselves."""
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
