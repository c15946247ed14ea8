"""Base optimizers through optax, and the moments that ascent directions may borrow from their state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonState

from steppe.optim.rule import Tree, ratio

# What each base keeps that a direction can use. adafactor's second moment is its factored estimate, row x column.
# muon has a second moment only where it falls back to Adam, lion and sgd have none.
BASES = {
    "adamw": ("first", "second"),
    "adam": ("first", "second"),
    "sgd": ("first",),
    "lion": ("first",),
    "adafactor": ("second",),
    "muon": ("first",),
}


class Moments(NamedTuple):
    """Moments of the base before this step's update: first, second (bias-corrected), the count of updates so far.

    fresh(gradient) -> the bias-corrected second moment as it will be once this gradient has entered it.
    """

    first: Tree = None
    second: Tree = None
    count: jax.Array | None = None
    fresh: Callable | None = None


class Base(NamedTuple):
    """An optax transform and a reader of its moments: moments(state, params) -> Moments."""

    name: str
    transform: optax.GradientTransformation
    moments: Callable[[Any, Tree], Moments]


_KINDS = (optax.ScaleByAdamState, optax.ScaleByLionState, optax.TraceState, optax.FactoredState, MuonState)


def moments(state: Any, params: Tree, b2: float = 0.999) -> Moments:
    """Reads the moments out of any optax state with one Adam, Lion, momentum, Adafactor or Muon state.

    b2: as the base was given it, to correct Adam's second moment. ValueError if there is not exactly one such state.
    """
    found = [s for s in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, _KINDS)) if isinstance(s, _KINDS)]
    if {type(s) for s in found} == {MuonState, optax.ScaleByAdamState} and len(found) == 2:
        return Moments(first=_merge(found[0].mu, found[1].mu))
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} moment estimates, exactly one is needed: use a base with one"
        )
    (inside,) = found
    if isinstance(inside, optax.ScaleByAdamState):
        return _adam(inside, b2)
    if isinstance(inside, optax.FactoredState):
        return _factored(inside, params)
    return Moments(first=inside.trace if isinstance(inside, optax.TraceState) else inside.mu)


def _merge(a: Tree, b: Tree) -> Tree:
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda x, y: y if masked(x) else x, a, b, is_leaf=masked)


def _adam(inside: optax.ScaleByAdamState, b2: float) -> Moments:
    def corrected(second, count):
        # Before the first update both are zero; directions then use D = 1.
        return jax.tree.map(lambda v: v / jnp.where(count > 0, 1 - b2**count, 1.0).astype(v.dtype), second)

    def fresh(gradient):
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, inside.nu, gradient)
        return corrected(second, inside.count + 1)

    return Moments(inside.mu, corrected(inside.nu, inside.count), inside.count, fresh)


def _factored(inside: optax.FactoredState, params: Tree) -> Moments:
    """Adafactor needs no bias correction: its decay, 1 - t^-0.8, starts at zero."""

    def second(state):
        return jax.tree.map(_outer, params, state.v_row, state.v_col, state.v)

    def fresh(gradient):
        return second(optax.scale_by_factored_rms().update(gradient, inside, params)[1])

    return Moments(second=second(inside), count=inside.count, fresh=fresh)


def _outer(param: jax.Array, row: jax.Array, column: jax.Array, whole: jax.Array) -> jax.Array:
    if whole.shape == param.shape:
        return whole
    # The axes optax factors: the two largest, the larger of them averaged out of `row`.
    second, largest = (int(axis) for axis in np.argsort(param.shape)[-2:])
    axis = second - 1 if second > largest else second
    row = row * ratio(jnp.ones((), row.dtype), jnp.mean(row, axis=axis, keepdims=True), 0.0)
    return jnp.expand_dims(row, largest) * jnp.expand_dims(column, second)


def base(
    name: str,
    learning_rate: float | Callable,
    *,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-9,
    weight_decay: float = 0.0,
    decay_mask: Tree | Callable | None = None,
    clip_norm: float = 0.0,
    matrix_axes: Callable | None = None,
) -> Base:
    """A base optimizer by name; see BASES.

    adamw, lion, adafactor: decoupled decay. adam, sgd: the decay is added to the gradient (L2). muon: orthogonalised
    momentum and decoupled decay on matrices, Adam on the rest. b1 is the momentum of sgd and muon.
    clip_norm: global l2 bound on the returned gradient, 0 for none. matrix_axes(params) -> tree of
    optax.contrib.MuonDimensionNumbers or None (None leaves go to AdamW); default: every 2-d parameter is a matrix.
    """
    decay = optax.add_decayed_weights(weight_decay, decay_mask) if weight_decay else optax.identity()
    rate = optax.scale_by_learning_rate(learning_rate)
    if name == "adamw":
        parts = [optax.scale_by_adam(b1, b2, eps), decay, rate]
    elif name == "adam":
        parts = [decay, optax.scale_by_adam(b1, b2, eps), rate]
    elif name == "sgd":
        parts = [decay, optax.trace(b1), rate]
    elif name == "lion":
        parts = [optax.scale_by_lion(b1, b2), decay, rate]
    elif name == "adafactor":
        parts = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), decay, rate]
    elif name == "muon":
        parts = [
            optax.contrib.muon(
                learning_rate, beta=b1, eps=eps, weight_decay=weight_decay, weight_decay_mask=decay_mask, adam_b1=b1,
                adam_b2=b2, adam_weight_decay=0.0, muon_weight_dimension_numbers=matrix_axes,
                consistent_rms=0.2,  # one learning rate then suits both parts (Liu et al. 2025, arXiv 2502.16982)
            )
        ]  # fmt: skip
    else:
        raise ValueError(f"optim.base = {name!r}: must be one of {', '.join(BASES)}")
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return Base(name, optax.chain(*clip, *parts), lambda state, params: moments(state, params, b2))
