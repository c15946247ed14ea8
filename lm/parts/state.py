"""The state of a run, created on the devices that hold it."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from steppe.lm.model.mesh import parameter_shardings, state_shardings
from steppe.lm.model.transformer import Shape, Trunk
from steppe.optim import Rule
from steppe.optim.averaging import Averages
from steppe.optim.base import Base


class Optimizer(NamedTuple):
    """Turns a gradient into an update, and averages the parameters.

    base and rule follow learning_rate(step) and rho(step).
    """

    base: Base
    rule: Rule
    learning_rate: Callable[[jax.Array], Any]
    rho: Callable[[jax.Array], Any]
    averages: Averages = Averages()

    def following(self, step: int) -> dict[str, float]:
        """The learning rate and rho of the step after `step` updates."""
        done = jnp.asarray(step, jnp.int32)
        return {"learning_rate": float(self.learning_rate(done)), "rho": float(self.rho(done))}


class State(NamedTuple):
    """All that a step changes: step int32 (batches seen), params float32, the optimizer's and the rule's state.

    averages: {name: {slot: tree like params}}, see optim.averaging; {} for a run without averages.
    """

    step: jax.Array
    params: Any
    optimizer: Any
    rule: Any
    averages: Any


def init_params(shape: Shape, key: jax.Array) -> Any:
    """Fresh float32 parameters; the same numbers on every mesh."""
    return Trunk(shape).init(key, jnp.zeros((1, shape.sequence_length), jnp.int32))["params"]


@cache
def parameter_shapes(shape: Shape) -> Any:
    """The parameters as ShapeDtypeStructs."""
    return jax.eval_shape(lambda: init_params(shape, jax.random.key(0)))


def start(optimizer: Optimizer, params: Any) -> State:
    """The State at step 0 with given parameters."""
    base, rule, averages = optimizer.base.transform, optimizer.rule, optimizer.averages
    return State(jnp.zeros((), jnp.int32), params, base.init(params), rule.init(params), averages.init(params))


def initialiser(shape: Shape, optimizer: Optimizer, seed: int) -> jax.tree_util.Partial:
    """A pure function () -> State at step 0; the same numbers on every mesh.

    The seed is an operand of the program instead of a constant, so that runs with other seeds share the program.
    """

    def initialise(seed: jax.Array) -> State:
        params = init_params(shape, jax.random.key(seed))
        return start(optimizer, params)

    return jax.tree_util.Partial(initialise, np.uint32(seed))


def shardings(mesh: Mesh, state: State) -> State:
    """NamedShardings of a State given as arrays or shapes."""
    optimizer, rule, averages = (state_shardings(mesh, part, state.params) for part in state[2:])
    return State._make((NamedSharding(mesh, P()), parameter_shardings(mesh, state.params), optimizer, rule, averages))


def abstract(mesh: Mesh, initialise) -> State:
    """The State as ShapeDtypeStructs with shardings, to restore into or to compile for."""
    shapes = jax.eval_shape(initialise.func, *initialise.args)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings(mesh, shapes)
    )


def create(mesh: Mesh, initialise) -> State:
    """A fresh State; each shard is computed on its own device."""
    places = shardings(mesh, jax.eval_shape(initialise.func, *initialise.args))  # traced once, for all three
    return jax.jit(initialise.func, out_shardings=places)(*initialise.args)


def create_from(abstract_state: State, optimizer: Optimizer, params: Any) -> State:
    """A State at step 0 with given parameters, sharded like `abstract_state`."""
    places = jax.tree.map(lambda s: s.sharding, abstract_state)
    return jax.jit(partial(start, optimizer), out_shardings=places)(params)
