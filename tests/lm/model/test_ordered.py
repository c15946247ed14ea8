"""Programs of several CPU devices in which a collective may overtake another are found, and ours hold none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from steppe.configs.keys import ConfigError
from steppe.lm.model import hlo, ordered

FLOWS = {
    "cond": lambda x, inside: lax.cond(x[0, 0] > 0, inside, lambda x: x, x),
    "loop": lambda x, inside: lax.fori_loop(0, 3, lambda _, x: inside(x), x),
    "loop in a branch": lambda x, inside: lax.cond(
        x[0, 0] > 0, lambda x: lax.fori_loop(0, 3, lambda _, x: inside(x), x), lambda x: x, x
    ),
}


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:4]), ("x",))


def compiled(mesh, function):
    """A function of two [4, 32] arrays, each device with a row of them."""
    split = jax.shard_map(
        function, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"), check_vma=False
    )
    shape = jax.ShapeDtypeStruct((4, 32), jnp.float32)
    return jax.jit(split).lower(shape, shape).compile()


def summed(x, times=1):
    for _ in range(times):
        x = jnp.tanh(lax.psum(x, "x"))
    return x


@pytest.mark.parametrize("flow", FLOWS)
def test_a_collective_that_may_overtake_those_in_control_flow_is_refused(mesh, flow):
    independent = compiled(mesh, lambda a, b: (FLOWS[flow](a, summed), summed(b, 9)))
    assert hlo.unordered(independent.as_text())
    with pytest.raises(ConfigError, match=r"mesh.*x 4.*may overtake"):
        ordered.ordered(independent, mesh, "test")

    def waits(a, b):
        first = FLOWS[flow](a, summed)
        return first, summed(b * first)

    assert not hlo.unordered(compiled(mesh, waits).as_text())


def test_collectives_without_control_flow_are_in_order(mesh):
    program = compiled(mesh, lambda a, b: (summed(a), summed(b, 9)))
    assert not hlo.unordered(program.as_text())
    a, b = (jnp.arange(128.0).reshape(4, 32) / 128 + shift for shift in (0, 1))
    for got, want in zip(ordered.ordered(program, mesh, "test")(a, b), program(a, b), strict=True):
        np.testing.assert_array_equal(got, want)


def test_control_flow_without_collectives_orders_nothing(mesh):
    program = compiled(mesh, lambda a, b: (FLOWS["loop"](a, jnp.tanh), summed(b)))
    assert not hlo.unordered(program.as_text())
