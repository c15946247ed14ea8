"""What is done to parameters to see what a model keeps: noise, rounding, training on another text.

Functions of parameter trees, and the few compiled programs that measure them; lm.measure.retention asks for them.
"""

import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from steppe.data import loader
from steppe.lm.measure import gptq
from steppe.lm.measure.evaluate import make_evaluation_step
from steppe.lm.measure.in_training import twice_differentiable
from steppe.lm.model import parameters
from steppe.lm.model.ordered import jitted
from steppe.lm.parts.assembly import Parts
from steppe.lm.parts.state import Optimizer, start
from steppe.lm.parts.step import make_step
from steppe.optim.curvature.along import along
from steppe.optim.masks import path_names


def programs(parts: Parts) -> SimpleNamespace:
    """Compiled once for a shape of model, a mesh and a batch; nothing here depends on a run, whose learning rate must
    be a schedule of peak 1, which `rate` multiplies.

    evaluate(params, batch) -> (nats, tokens, bytes). noise(params, seed, sigma) -> params.
    quantise(params, bits, group, tables) -> params. layers: for lm.measure.gptq.quantise.
    start(params) -> State with copies of them. step(state, batch, rate) -> (state, metrics), which takes the state's
    memory. along(params, batch, other): of the way from params to others, see optim.curvature.along.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, parts.abstract)

    def step(state, batch, rate):
        return make_step(parts.objective, at_rate(parts.optimizer, rate))(state, batch)

    def along_way(params, batch, other):
        return along(twice_differentiable(parts), params, batch, jax.tree.map(jnp.subtract, other, params))

    noise = lambda params, seed, sigma: add_noise(params, jax.random.key(seed), sigma)  # noqa: E731
    # Copies: the first step gives its state's memory away, and the parameters are needed again.
    begun = lambda params: start(parts.optimizer, jax.tree.map(jnp.copy, params))  # noqa: E731
    as_given = (places, None)  # else a second compile
    return SimpleNamespace(
        evaluate=make_evaluation_step(parts),
        noise=jax.jit(noise, out_shardings=places.params),
        quantise=jax.jit(quantise, static_argnums=(1, 2, 3), out_shardings=places.params),
        layers=gptq.layers_of(parts),
        start=jax.jit(begun, out_shardings=places),
        step=jitted(step, parts.mesh, "fine-tuning", donate_argnums=0, out_shardings=as_given),
        along=jitted(along_way, parts.mesh, "curvature along the way"),
    )


def at_rate(optimizer: Optimizer, rate: float | jax.Array) -> Optimizer:
    """The optimizer with its updates times `rate`, which may be traced: one compile serves every rate."""
    transform = optimizer.base.transform

    def update(updates, state, params=None, **given):
        updates, state = transform.update(updates, state, params, **given)
        return jax.tree.map(lambda u: rate * u, updates), state

    return optimizer._replace(
        base=optimizer.base._replace(transform=optax.GradientTransformationExtraArgs(transform.init, update)),
        learning_rate=lambda count: rate * optimizer.learning_rate(count),
    )


# -------------------------------------------------------------------------------------------------------- weight noise
def add_noise(params: Any, key: jax.Array, sigma: float | jax.Array) -> Any:
    """params + sigma * rms(w) * z, z standard normal: noise of sigma times each tensor's own root mean square.

    Every parameter takes part, norm scales and tables too; of a stack of layers each is a tensor. z depends on the key
    and the shapes alone: equal for every sigma, every model of a shape, and every mesh.
    """
    names = path_names(params)
    leaves, structure = jax.tree.flatten(params)

    def noisy(index, name, w):
        axes = tuple(range(1 if re.search(parameters.STACKED, name) else 0, w.ndim))
        rms = jnp.sqrt(jnp.mean(w**2, axis=axes, keepdims=True))
        return w + sigma * rms * jax.random.normal(jax.random.fold_in(key, index), w.shape, w.dtype)

    return structure.unflatten(map(noisy, range(len(leaves)), jax.tree.leaves(names), leaves))


# -------------------------------------------------------------------------------------------------------- quantisation
def quantise(params: Any, bits: int, group: int = 0, tables: bool = False) -> Any:
    """The parameters with every matrix rounded to `bits`-bit integers times scales, see quantise_array.

    Attention and MLP weights are scaled per output channel. tables: also embedding, positions and readout, per row.
    """

    kinds = ("matrix", "table") if tables else ("matrix",)

    def one(name, w):
        line = parameters.of(name)
        return quantise_array(w, bits, line.reads, group) if line.kind in kinds else w

    return jax.tree.map(one, path_names(params), params)


def quantise_array(w: jax.Array, bits: int, reduced: Sequence[int], group: int = 0) -> jax.Array:
    """w rounded to the nearest of torchao's default values (IntxWeightOnlyConfig), see gptq.scale_of.

    One scale for each output channel (the axes not in `reduced`) and, with group > 0, for every `group` inputs of it in
    a row (the axes `reduced`, flattened; the last group may be smaller). Ties go to the even integer.
    """

    def rounded(rows):
        inputs = rows.shape[-1]
        size = min(group, inputs) or inputs
        padded = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -inputs % size)])
        grouped = padded.reshape(*rows.shape[:-1], -1, size)
        return gptq.nearest(grouped, gptq.scale_of(grouped, bits, -1), bits).reshape(padded.shape)[..., :inputs]

    return gptq.in_rows(w, reduced, rounded)


# ---------------------------------------------------------------------------------------------------------- fine-tuning
def fine_tune(
    run: SimpleNamespace, params: Any, read: Callable[[int], dict], rate: float, points: Sequence[int],
    measure: Callable[[Any], dict],
) -> tuple[list[dict], Any]:  # fmt: skip
    """Trains on at peak learning rate `rate`: ({"step", **measure(params)} after each of `points`, params at the end).

    read(step) -> batch on the mesh, read ahead. The parameters given stay as they are.
    """
    state, found = run.start(params), []
    with loader.prefetch(read, 0, max(points)) as batches:
        for step, batch in batches:
            state, _ = run.step(state, batch, rate)
            if step + 1 in points:
                found.append({"step": step + 1, **measure(state.params)})
    return found, state.params
