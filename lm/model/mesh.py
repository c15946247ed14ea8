"""The device mesh (axes data, fsdp, tensor), and where parameters, state, activations and batches live on it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from steppe.lm.model import parameters
from steppe.lm.model.parameters import name_of

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split the sequences of a batch

ACTIVATIONS = {
    "tokens": P(BATCH, None),  # [B, T]
    "hidden": P(BATCH, None, None),  # [B, T, D]
    "heads": P(BATCH, None, "tensor", None),  # [B, T, H, K]
    "mlp": P(BATCH, None, "tensor"),  # [B, T, F], and [B, T, V]
    "table": P("tensor", "fsdp"),  # [V, D], a table as it is stored
    "positions": P(None, "fsdp"),  # [T, D], likewise
    "rows": P(BATCH),  # [B]
    "scalar": P(),
}


class Placement(NamedTuple):
    """Where activations live. placement(x, kind) constrains one; without a mesh nothing is constrained or split."""

    mesh: Mesh | None = None

    def __call__(self, x: jax.Array, kind: str) -> jax.Array:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, ACTIVATIONS[kind]))

    def fitting(self, sequences: int) -> "Placement":
        """This placement if it divides so many sequences, else one that leaves them to XLA (single prompts do)."""
        shards = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return self if sequences % shards == 0 else Placement()

    def size(self, axis: str) -> int:
        """Devices along an axis; 1 without a mesh."""
        return 1 if self.mesh is None else self.mesh.shape[axis]

    # Inside split; left out where there is one device, because XLA copies even then.

    def summed(self, x: Any, *axes: str) -> Any:
        """The sum of a tree over these axes."""
        axes = tuple(axis for axis in axes if self.size(axis) > 1)
        return jax.lax.psum(x, axes) if axes else x

    def whole_width(self, table_RxD: jax.Array) -> jax.Array:
        """A table whose width is split over fsdp, gathered."""
        return jax.lax.all_gather(table_RxD, "fsdp", axis=1, tiled=True) if self.size("fsdp") > 1 else table_RxD

    def reduced(self, gradient_RxD: jax.Array) -> jax.Array:
        """A table's gradient summed over the devices of a batch, its width split over fsdp as the table's is."""
        if self.size("fsdp") > 1:
            gradient_RxD = jax.lax.psum_scatter(gradient_RxD, "fsdp", scatter_dimension=1, tiled=True)
        return self.summed(gradient_RxD, "data")

    def split(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        """The function run on each device's own parts of its arguments, of these kinds (trees of them).

        Inside, collectives over AXES are explicit, so that a loop holds exactly those written into it.
        """
        if self.mesh is None:
            return function
        specs = (jax.tree.map(ACTIVATIONS.get, kinds) for kinds in (inputs, outputs))
        return jax.shard_map(function, mesh=self.mesh, in_specs=next(specs), out_specs=next(specs), check_vma=False)


def make_mesh(shape: tuple[int, int, int], devices: Sequence | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices, neighbours in the network along the inner axes.

    On several TPU slices, data runs across them where its size allows.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1 and shape[0] % slices == 0:
        from jax.experimental import mesh_utils

        grid = mesh_utils.create_hybrid_device_mesh((shape[0] // slices, *shape[1:]), (slices, 1, 1), devices)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parameter_shardings(mesh: Mesh, params: Any) -> Any:
    """NamedShardings of a parameter tree (arrays or shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, parameters.of(name_of(path)).spec), params
    )


def state_shardings(mesh: Mesh, state: Any, params: Any) -> Any:
    """NamedShardings of an optimizer or rule state: a leaf with the path and shape of a parameter lives where it does.

    Everything else (counts, factored moments) is replicated.
    """
    shapes = {name_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def place(path, leaf):
        name = name_of(path)
        owner = next((p for p, s in shapes.items() if s == leaf.shape and (name == p or name.endswith("/" + p))), None)
        return NamedSharding(mesh, parameters.of(owner).spec if owner else P())

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch array [B, ...] lives: its sequences over data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The global rows of a batch that this process's devices hold, in order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for index in places.values() if index for row in range(*index[0].indices(batch_size))})


def place_batch(mesh: Mesh, batch_size: int, rows: Sequence[int], batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays [batch_size, ...] from this process's `rows` of them, as local_rows gives them."""
    at = {row: index for index, row in enumerate(rows)}

    def place(array):
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            return array[at[start] : at[start] + stop - start]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), batch_sharding(mesh), part)

    return {name: place(array) for name, array in batch.items()}
