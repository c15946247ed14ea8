"""Products on a mesh against the same einsum on one device, whatever the rings of the network are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from steppe.lm.model import mesh as meshes
from steppe.lm.model.mesh import ACTIVATIONS, Placement, make_mesh
from steppe.lm.model.parameters import TABLE
from steppe.lm.model.products import _kinds, read, write

MESHES = ((1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2))
RINGS = {8: ((8,), (2, 4), (2, 2, 2)), 4: ((4,), (2, 2)), 2: ((2,),)}
CASES = [(shape, rings) for shape in MESHES for rings in RINGS[shape[1]]]


def on_every_mesh(name, first, *others):
    """The first value on every mesh, each other one where there are three rings; all of them at night."""
    cases = [(*case, value) for value in (first, *others) for case in CASES]
    told = [case for case in cases if case[-1] == first or case[1] == (2, 2, 2)]
    each = [pytest.param(*case, marks=[] if case in told else pytest.mark.exhaustive) for case in cases]
    return pytest.mark.parametrize(("shape", "rings", name), each)


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


@pytest.fixture
def rings_of(monkeypatch):
    """Sets the axes of the network of which fsdp is made; a CPU has none of its own."""

    def of(shape, rings):
        monkeypatch.setattr(meshes, "rings", lambda mesh: rings)
        return Placement(make_mesh(shape, jax.devices()[:8]))

    return of


@on_every_mesh("features", (4, 3), (6,))
def test_products_and_their_gradients_are_those_of_one_device(rings_of, shape, rings, features):
    """In float64 to 1e-13, also where the shards are not whole tiles."""
    place, nowhere = rings_of(shape, rings), Placement()
    x, first, last = drawn(8, 5, 24), drawn(24, *features), drawn(*features, 24)

    def results(place):
        def loss(x, first, last):
            wide = read(place, x, first)
            return jnp.sum(jnp.sin(write(place, jnp.cos(wide), last))), wide

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, first, last)

    both = map(jax.tree.leaves, (results(place), results(nowhere)))
    for here, alone in zip(*both, strict=True):
        np.testing.assert_allclose(here, alone, rtol=1e-13, atol=1e-13)


@on_every_mesh("rows", (256, 128), (8, 5))
def test_what_is_scattered_is_the_sum_and_what_is_gathered_is_whole(rings_of, shape, rings, rows):
    place = rings_of(shape, rings)
    devices = shape[0] * shape[1]
    parts = drawn(devices, *rows)
    batch = P(("data", "fsdp"))

    def local(part):
        mine = place.scattered(part[0])
        return mine, place.gathered(mine)[None]

    run = jax.shard_map(local, mesh=place.mesh, in_specs=batch, out_specs=(P("fsdp"), batch), check_vma=False)
    mine, whole = jax.jit(run)(jax.device_put(parts, NamedSharding(place.mesh, batch)))
    np.testing.assert_allclose(mine, jnp.sum(parts, axis=0), rtol=1e-13, atol=1e-13)
    assert all(np.array_equal(each, mine) for each in whole)


def test_kernels_lie_where_the_table_of_parameters_says():
    for line in TABLE:
        if line.kind == "matrix":
            reads = line.spec[1] == "fsdp"
            kernel = jnp.zeros((1,) * (len(line.spec) - 1))
            assert ACTIVATIONS[_kinds(reads, kernel)[1]] == P(*line.spec[1:]), line.path
