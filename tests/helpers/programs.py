"""A run's parts on eight simulated devices, and calls of its programs on abstract arguments."""

import functools
import re

import jax
import jax.numpy as jnp

from helpers import lm_runs
from steppe.lm.measure import curvature, in_training, sharpness
from steppe.lm.model import hlo
from steppe.lm.model.attention import differentiable
from steppe.lm.model.mesh import batch_sharding
from steppe.lm.model.objective import objective
from steppe.lm.parts.assembly import Parts, ascent_reduction, assemble
from steppe.optim import methods

VOCABULARY, LENGTH, ROWS = 50, 128, 8
# splash walks 128 tokens at a time, one head on each device of the tensor axis. cuDNN's call can be made only where
# it is installed: its partitioner takes any placement, so that the kernel for segments stands for it here.
PLATFORMS = {"tpu": "splash", "cuda": "blockwise"}
MESH = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}


@functools.cache
def parts_on(platform: str, method: str = "adamw", rows: int = ROWS, **overrides) -> Parts:
    """A run's parts on eight simulated devices, with the kernel of a platform."""
    given = {"model__heads": 2, "data__sequence_length": LENGTH, "train__batch_size": rows, **MESH, **overrides}
    rho = {} if methods.row_of(method) is None else {"optim__rho": 0.05}
    config = lm_runs.config("unused", "unused", optim__method=method, **rho, **given)
    frequency = jnp.full(256, 1 / 256)
    parts = assemble(config, VOCABULARY, 10**6, frequency, jax.devices()[:8])
    if platform == "cpu":
        return parts
    row = methods.row_of(method)
    kernel = differentiable(LENGTH) if row and row.second_derivatives else PLATFORMS[platform]
    shape = parts.shape._replace(kernel=kernel)
    made = objective(shape, parts.options, parts.options.place, ascent_reduction(config))
    return parts._replace(shape=shape, objective=made)


def batch_of(parts: Parts, rows: int = ROWS, **others) -> dict:
    place = batch_sharding(parts.mesh)
    names = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32, **others}
    return {name: jax.ShapeDtypeStruct((rows, LENGTH), dtype, sharding=place) for name, dtype in names.items()}


def curvature_calls(parts: Parts) -> list[tuple]:
    """(program, *arguments) of everything that measures curvature, by command and in a run."""
    settings = curvature.Settings(lanczos=3, noise_scale=2)
    made, params, batch = sharpness.programs(parts, 1, settings), parts.abstract.params, batch_of(parts)
    key = jax.random.key(0)
    vector, scale = jax.eval_shape(made.flatten.__wrapped__, params), jnp.float32(0.05)
    return [
        (made.flatten, params),
        (made.unflatten, vector),
        *((program, params, batch, vector) for program in (*made.lanczos.values(), *made.action.values())),
        (made.ascend, params, batch, params, scale),
        (made.rise, params, batch, params, params),
        (made.loss_at, params, batch, (params, params), jnp.ones(2)),
        (made.logits, params, batch, key),
        (made.along, params, batch, params),
        (made.critical, params, batch, params),
        (made.start, key),
        (made.gaussian, key),
        (made.noise, params, batch),
        (in_training.make_measurement(parts, ("norms=norm",)), params, parts.abstract, params, batch, parts.scalars),
    ]


def array_shapes(text):
    """The shapes of all arrays that a compiled program's instructions produce on a device."""
    types = [each.type for instructions in hlo.computations(text)[0].values() for each in instructions]
    found = re.findall(r"\b(?:[a-z]+\d+(?:e\d+m\d+\w*)?|pred)\[([\d,]*)\]", " ".join(types))
    return {tuple(int(d) for d in dims.split(",") if d) for dims in found}
