"""Quantisation with error compensation: GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, arXiv 2210.17323).

A matrix is rounded input by input. The inputs not yet rounded compensate for each rounding's effect on the outputs, as
measured on a calibration text. Blocks are rounded from first to last, each on the outputs of those rounded before.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from steppe.lm.model import parameters
from steppe.lm.model.ordered import jitted
from steppe.lm.model.transformer import INPUTS, Block, Trunk
from steppe.lm.parts.assembly import Parts
from steppe.optim.masks import path_names

DAMPING = 0.01  # times the mean of the Gram matrix's diagonal, added to the diagonal (as in the paper)


class Layers(NamedTuple):
    """Programs for one block at a time, so that a text goes through the model twice, whatever its depth.

    enter(params, batch) -> (x [B, T, D], positions) before the first block. grams(layer, entered, batch) -> {path:
    [I, I]}: the sum over counted tokens of y yᵀ, with y a matrix's input. advance(layer, entered, batch) -> the same as
    enter, after a block. layer: the parameters of one block.
    """

    enter: Callable
    grams: Callable
    advance: Callable


def layers_of(parts: Parts) -> Layers:
    """The programs of a model on its mesh."""
    shape, place = parts.shape, parts.options.place

    def through(layer, entered, batch, **options):
        x, positions = entered
        block = Block(shape, place.fitting(len(x)))
        return block.apply({"params": layer}, x, positions, batch.get("segments"), **options)

    def enter(params, batch):
        trunk = Trunk(shape, place, enters=True)
        return trunk.apply({"params": params}, batch["inputs"], batch.get("positions"), batch.get("segments"))

    def grams(layer, entered, batch):
        _, kept = through(layer, entered, batch, mutable=[INPUTS])
        counted = (batch["weights"] > 0).astype(jnp.float32)

        def gram(y):
            flat = y.reshape(*y.shape[:2], -1).astype(jnp.float32) * counted[..., None]
            return jnp.einsum("bti,btj->ij", flat, flat, precision="highest")

        found, _ = jax.tree_util.tree_flatten_with_path(kept[INPUTS])  # tuples of length one
        return {f"layers/{parameters.name_of(path[:-1]).removesuffix('_input')}/kernel": gram(y) for path, y in found}

    def advance(layer, entered, batch):
        return through(layer, entered, batch)[0], entered[1]

    called = {"enter": enter, "grams": grams, "advance": advance}
    return Layers(**{name: jitted(made, parts.mesh, "calibration") for name, made in called.items()})


def scale_of(w: jax.Array, bits: int, axis: int) -> jax.Array:
    """The scale s of entries along an axis, which stays with length 1; 1 where all are 0.

    The values are s * {-m, ..., m - 1} with m = 2^(bits - 1), and s = max|w| / (m - 1/2).
    """
    scale = jnp.max(jnp.abs(w), axis=axis, keepdims=True) * (2 / (2**bits - 1))  # what XLA makes of a division
    return jnp.where(scale > 0, scale, 1)


def nearest(w: jax.Array, scale: jax.Array, bits: int) -> jax.Array:
    """The nearest values of the grid of a scale; halves go away from 0.

    The largest entry always lies on a half. Without the factor, rounding errors of a mesh would decide its value.
    """
    m = 2 ** (bits - 1)
    return jnp.clip(jnp.round(w / scale * (1 + 1e-6)), -m, m - 1) * scale


@partial(jax.jit, static_argnums=(2, 3))
def quantise_rows(w_OxI: jax.Array, gram_IxI: jax.Array, bits: int, group: int = 0) -> jax.Array:
    """A matrix [O, I] rounded input by input to the values of disturb.quantise_array.

    gram: sum of x xᵀ over the calibration text. group > 0: each group of inputs gets its scale when rounding reaches
    it. Computes in float32 with products at full precision.
    """
    O, I = w_OxI.shape
    size = min(group, I) or I
    diagonal = jnp.diagonal(gram_IxI)
    damped = gram_IxI + jnp.diag(jnp.where(diagonal > 0, DAMPING * jnp.mean(diagonal), 1.0))
    lower = jnp.linalg.cholesky(damped)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(I, dtype=w_OxI.dtype))
    upper = jnp.linalg.cholesky(inverse, upper=True)  # inverse = upperᵀ upper; row i: how later inputs compensate i
    ahead = jnp.arange(size)

    def one(i, carry):
        w, scale = carry

        def fresh(_):
            columns = jnp.take(w, i + ahead, axis=1, mode="fill", fill_value=0)
            return scale_of(columns, bits, 1)[:, 0]

        scale = jax.lax.cond(i % size == 0, fresh, lambda _: scale, None)
        column = w[:, i]
        rounded = nearest(column, scale, bits)
        error = (column - rounded) / upper[i, i]
        w = w - error[:, None] * upper[i][None]  # upper[i, :i] is zero, so rounded columns do not change
        return w.at[:, i].set(rounded), scale

    with jax.default_matmul_precision("highest"):
        return jax.lax.fori_loop(0, I, one, (w_OxI, jnp.ones(O, w_OxI.dtype)))[0]


def quantise(params: Any, layers: Layers, batches: Sequence[dict], bits: int, group: int = 0) -> Any:
    """The parameters with the blocks' matrices rounded. batches: calibration text, placed."""
    names, structure = jax.tree.flatten(path_names(params))
    stacks = {
        name: leaf for name, leaf in zip(names, jax.tree.leaves(params), strict=True) if name.startswith("layers/")
    }
    kept = {name: np.array(stack) for name, stack in stacks.items()}
    blocks = jax.tree.structure(params["layers"])
    matrices = [name for name in stacks if parameters.of(name).kind == "matrix"]
    entered = [layers.enter(params, batch) for batch in batches]
    for layer in range(len(next(iter(kept.values())))):
        block = blocks.unflatten([stack[layer] for stack in kept.values()])  # views: rounded below
        found = [jax.device_get(layers.grams(block, *each)) for each in zip(entered, batches, strict=True)]
        grams = jax.tree.map(lambda *each: sum(each), *found)
        for name in matrices:  # on one device, because speed does not matter here
            change = lambda w, gram=grams[name]: quantise_rows(w.reshape(-1, w.shape[-1]), gram, bits, group)  # noqa: E731
            reads = [axis - 1 for axis in parameters.of(name).reads]  # of one layer
            kept[name][layer] = in_rows(jnp.asarray(kept[name][layer]), reads, change)
        entered = [layers.advance(block, *each) for each in zip(entered, batches, strict=True)]
    rounded = {name: jax.device_put(kept[name], stack.sharding) for name, stack in stacks.items()}
    leaves = zip(names, jax.tree.leaves(params), strict=True)
    return structure.unflatten([rounded.get(name, leaf) for name, leaf in leaves])


def in_rows(w: jax.Array, reads: Sequence[int], change: Callable) -> jax.Array:
    """Applies `change` to a weight as [..., inputs]: the axes `reads`, which its product sums over, as one."""
    behind = tuple(range(-len(reads), 0))
    moved = jnp.moveaxis(w, tuple(reads), behind)
    changed = change(moved.reshape(*moved.shape[: -len(reads)], -1))
    return jnp.moveaxis(changed.reshape(moved.shape), behind, tuple(reads))
