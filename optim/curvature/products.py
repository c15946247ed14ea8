"""Products of a vector with the Hessian and its two parts, for any objective: H = GGN + NME.

The GGN is the curvature of the loss in the outputs. The NME (nonlinear modelling error, or functional Hessian) is the
curvature of the model under a frozen loss derivative. All use forward over reverse mode, because custom reverse rules
in trunk or readout allow no other order. They compute in the dtype of the parameters.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from steppe.optim.masks import mask, path_names
from steppe.optim.rule import Anchor, Objective, Tree, accumulate, cosine, microbatched, norm, ratio

Product = Callable[[Tree], Tree]


def hessian_product(objective: Objective, params: Tree, batch: Tree, vector: Tree, microbatches: int = 1) -> Tree:
    """H v at params, computed in `microbatches` parts."""

    def one(state, part):
        def loss(p):
            return objective.readout(p, objective.trunk(p, part), part)[0]

        return state, jax.jvp(jax.grad(loss), (params,), (vector,))[1], ()

    return accumulate(one, (), *microbatched(objective, batch, microbatches))[1]


def nme_product(objective: Objective, params: Tree, batch: Tree, vector: Tree, microbatches: int = 1) -> Tree:
    """NME v: the derivative along v of the functional gradient with its anchor fixed at params."""

    def one(state, part):
        anchor = Anchor(params, objective.trunk(params, part))

        def frozen(p):
            return objective.frozen_readout(p, objective.trunk(p, part), anchor, part)

        return state, jax.jvp(jax.grad(frozen), (params,), (vector,))[1], ()

    return accumulate(one, (), *microbatched(objective, batch, microbatches))[1]


def ggn_product(objective: Objective, params: Tree, batch: Tree, vector: Tree, microbatches: int = 1) -> Tree:
    """GGN v = J^T l'' J v with the trunk's tangent and pullback, without second derivatives of the trunk.

    An objective hides the outputs, so l'' is the curvature of the readout minus the curvature of the frozen readout,
    at params. If the trunk returns the outputs, the frozen readout is linear and its curvature 0.
    """

    def one(state, part):
        def trunk(p):
            return objective.trunk(p, part)

        hidden, pull = jax.vjp(trunk, params)
        # The tangent of vjp's result, not of the trunk: its custom reverse rules have no forward rules.
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
    """l'' v: the Hessian of the loss with respect to the trunk's result, times a vector of its shape.

    For optim.objective(forward, loss) the trunk's result is the outputs, so this is the logit Hessian. For an objective
    split before its readout it is the curvature of the readout in the hidden state.
    """
    hidden = objective.trunk(params, batch)
    return jax.jvp(jax.grad(lambda h: objective.readout(params, h, batch)[0]), (hidden,), (vector,))[1]


PRODUCTS = {"hessian": hessian_product, "ggn": ggn_product, "nme": nme_product}


def restricted(product: Product, keep: Tree) -> Product:
    """P A P, with P the projection onto the parameters for which `keep` (masks.mask) is true."""

    def project(vector):
        return jax.tree.map(lambda v, chosen: v if chosen else jnp.zeros_like(v), vector, keep)

    return lambda vector: project(product(project(vector)))


def preconditioned(product: Product, scale: Tree) -> Product:
    """D^-1/2 A D^-1/2: the curvature for steps D^-1 g. scale: D, from ascent.preconditioner."""

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
    """First-order changes of the gradient under epsilon, delta_logit = GGN eps and delta_func = NME eps, per group.

    groups: name -> regex over parameter paths; the group "all" is added. stacked: regex of parameters whose first axis
    is the layer; each counts as one parameter per layer, with path suffix "/0", "/1" ...
    Returns group -> logit_norm, functional_norm, their shares of the total squared norms, and the cosine between both.
    Raises ValueError for a regex that matches no path.
    """
    logit = ggn_product(objective, params, batch, epsilon, microbatches)
    functional = nme_product(objective, objective.after(params, norm(logit)), batch, epsilon, microbatches)
    return compare(logit, functional, groups, stacked=stacked)


def compare(logit: Tree, functional: Tree, groups: dict[str, str], *, stacked: str = "") -> dict:
    """The result of split_directions for given delta_logit and delta_func."""
    logit, functional = _by_layer(logit, stacked), _by_layer(functional, stacked)
    compared = {}
    for name, pattern in {"all": "", **groups}.items():
        chosen = mask(logit, (pattern,))
        a, b = ({path: tree[path] for path in tree if chosen[path]} for tree in (logit, functional))
        compared[name] = {
            "logit_norm": norm(a),
            "functional_norm": norm(b),
            "logit_share": ratio(norm(a), norm(logit), 0.0) ** 2,
            "functional_share": ratio(norm(b), norm(functional), 0.0) ** 2,
            "cosine": cosine(a, b),
        }
    return compared


def _by_layer(tree: Tree, stacked: str) -> dict[str, jax.Array]:
    leaves = dict(zip(jax.tree.leaves(path_names(tree)), jax.tree.leaves(tree), strict=True))
    layered = mask(leaves, (stacked,)) if stacked else dict.fromkeys(leaves, False)
    split = {}
    for path, leaf in leaves.items():
        split |= {f"{path}/{i}": part for i, part in enumerate(leaf)} if layered[path] else {path: leaf}
    return split
