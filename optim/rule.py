"""The seam between a model and a gradient rule, and the plain rule.

A rule is handed an objective, never a model. Splitting the model at its last hidden state keeps arrays of shape
[batch, seq, vocabulary] out of memory and lets the functional path freeze the loss derivative without ever forming
perturbed logits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Tree = Any
REPORT = (
    *("loss", "perturbed_loss", "gradient_norm", "epsilon_norm", "cosine"),
    *("survival_norm", "survival_cosine", "nonfinite"),
)


class Anchor(NamedTuple):
    """Where a loss derivative is frozen: parameters, hidden state, and what the readout kept there (or None)."""

    params: Tree
    hidden: Tree
    kept: Tree = None


class Objective(NamedTuple):
    """A loss as functions of (params, batch), split before the readout.

    trunk(params, batch) -> hidden
    readout(params, hidden, batch) -> (loss, aux): scalar mean loss of the batch; aux is a dict that may hold
        `per_sequence_loss` [B], and `kept`, handed to frozen_readout in the anchor
    frozen_readout(params, hidden, anchor, batch) -> scalar <dl/dF at the anchor, F(params, hidden) - F(anchor)>: its
        gradient in (params, hidden) is the functional path, its value the first-order change of the loss
    weight(batch) -> scalar: the weight of this batch's mean loss among other microbatches (e.g. its token count)
    compute_dtype: the dtype parameters are cast to inside trunk and readout, None when they are not
    """

    trunk: Callable
    readout: Callable
    frozen_readout: Callable
    weight: Callable = lambda batch: 1.0
    compute_dtype: Any = None


class Rule(NamedTuple):
    """A gradient rule as a pair of pure functions.

    init(params) -> rule_state
    gradient(objective, params, batch, optimizer_state, rule_state, step) -> (gradient, rule_state, report)
    report: dict of float32 scalars with the keys REPORT, NaN where the method does not compute one. nonfinite is 0 when
        every loss and gradient of the step was finite; otherwise the gradient must not be used. rule_state then holds
        the old state, so a caller only has to keep the optimizer's.
    """

    init: Callable
    gradient: Callable


def objective(forward: Callable, loss: Callable, *, has_aux: bool = False, weight: Callable | None = None) -> Objective:
    """Makes an objective of any model: forward(params, batch) -> outputs, loss(outputs, batch) -> scalar.

    With has_aux, loss returns (scalar, dict). weight(batch) -> scalar weighs unequal microbatches (default: equally).
    """

    def readout(params, outputs, batch):
        value = loss(outputs, batch)
        return value if has_aux else (value, {})

    def frozen_readout(params, outputs, anchor, batch):
        at_anchor = lax.stop_gradient(anchor.hidden)
        derivative = jax.grad(lambda o: readout(None, o, batch)[0])(at_anchor)
        return inner(lax.stop_gradient(derivative), jax.tree.map(jnp.subtract, outputs, at_anchor))

    return Objective(forward, readout, frozen_readout, weight or (lambda batch: 1.0))


class Clean(NamedTuple):
    """The pass at theta: loss, aux, gradient, the anchor, and the trunk's pullback hidden-cotangent -> parameters."""

    loss: jax.Array
    aux: dict
    gradient: Tree
    anchor: Anchor
    pull: Callable


def clean_pass(objective: Objective, params: Tree, batch: Tree) -> Clean:
    """One forward and one backward at theta, keeping what later passes can reuse."""
    hidden, pull = jax.vjp(lambda p: objective.trunk(p, batch), params)
    readout_gradient = jax.value_and_grad(objective.readout, argnums=(0, 1), has_aux=True)
    (loss, aux), (direct, cotangent) = readout_gradient(params, hidden, batch)
    gradient = jax.tree.map(jnp.add, pull(cotangent)[0], direct)
    return Clean(loss, aux, gradient, Anchor(params, hidden, aux.get("kept")), pull)


def split(objective: Objective, batch: Tree, microbatches: int) -> tuple[Tree, jax.Array]:
    """Cuts a batch [B, ...] into [K, B/K, ...] and gives each part's share [K] of the total weight.

    Rows are dealt out in turn (row i goes to part i mod K), so a batch axis split over devices stays where it is.
    """
    parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
    weights = jnp.asarray([objective.weight(jax.tree.map(lambda x, k=k: x[k], parts)) for k in range(microbatches)])
    return parts, weights / jnp.sum(weights)


def accumulate(function: Callable, state: Tree, parts: Tree, shares: jax.Array | None) -> tuple[Tree, Tree, Tree]:
    """Runs function(state, part) -> (state, total, kept) over the parts in turn.

    Returns (last state, sum of share-weighted totals, kept stacked). With shares None, `parts` is the one whole batch.
    """
    if shares is None:
        return function(state, parts)

    def body(carry, part):
        state, sums = carry
        state, total, kept = function(state, part[0])
        return (state, jax.tree.map(lambda s, t: s + part[1] * t, sums, total)), kept

    first = jax.tree.map(lambda x: x[0], parts)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, state, first)[1])
    (state, sums), kept = lax.scan(body, (state, zeros), (parts, shares))
    return state, sums, kept


def microbatched(objective: Objective, batch: Tree, microbatches: int) -> tuple[Tree, jax.Array | None]:
    """(parts, shares) for accumulate: the batch itself when there is only one part."""
    return (batch, None) if microbatches == 1 else split(objective, batch, microbatches)


def report(loss: jax.Array, gradient_norm: jax.Array | None, returned: Tree, **others) -> dict:
    """Every key of REPORT as a float32 scalar, NaN where not given; gradient_norm None if there is none."""
    checked = [loss, norm(returned)] + ([] if gradient_norm is None else [gradient_norm])
    values = {"loss": loss, "nonfinite": ~jnp.all(jnp.isfinite(jnp.stack(checked))), **others}
    if gradient_norm is not None:
        values["gradient_norm"] = gradient_norm
    return {key: jnp.asarray(values.get(key, jnp.nan), jnp.float32) for key in REPORT}


def plain_gradient(objective: Objective, params: Tree, batch: Tree, microbatches: int = 1) -> tuple[jax.Array, Tree]:
    """(mean loss, its gradient at theta), the batch taken in `microbatches` parts."""

    def one(state, part):
        clean = clean_pass(objective, params, part)
        return state, (clean.loss, clean.gradient), ()

    _, (loss, gradient), _ = accumulate(one, (), *microbatched(objective, batch, microbatches))
    return loss, gradient


def inner(a: Tree, b: Tree) -> jax.Array:
    """Inner product over a whole tree; unlike vdot it does not flatten, so sharded leaves stay sharded."""
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)))


def norm(tree: Tree) -> jax.Array:
    """Global l2 norm over a whole tree and all its shards."""
    return jnp.sqrt(inner(tree, tree))
