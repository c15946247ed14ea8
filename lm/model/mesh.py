"""The device mesh (axes data, fsdp, tensor) and the shardings of parameters, state, activations and batches."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
    "table": P("tensor", "fsdp"),  # [V, D], as stored
    "positions": P(None, "fsdp"),  # [T, D], as stored
    "reads heads": P("fsdp", "tensor", None),  # [D, H, K], one layer's kernel as stored
    "writes heads": P("tensor", None, "fsdp"),  # [H, K, D]
    "reads mlp": P("fsdp", "tensor"),  # [D, F]
    "writes mlp": P("tensor", "fsdp"),  # [F, D]
    "rows": P(BATCH),  # [B]
    "scalar": P(),
}


class Placement(NamedTuple):
    """Shardings of activations. placement(x, kind) constrains x; without a mesh nothing is constrained or split.

    reduction: dtype in which devices exchange gradients of tables; "": the dtype they are summed in.
    """

    mesh: Mesh | None = None
    reduction: str = ""

    def __call__(self, x: jax.Array, kind: str) -> jax.Array:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, ACTIVATIONS[kind]))

    def fitting(self, sequences: int) -> "Placement":
        """This placement if it divides `sequences`, else one that leaves them to XLA, as for single prompts."""
        shards = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return self if sequences % shards == 0 else Placement()

    def size(self, axis: str) -> int:
        """Devices along an axis; 1 without a mesh."""
        return 1 if self.mesh is None else self.mesh.shape[axis]

    # These methods run inside `split`. On one device they do nothing, because XLA would copy even then.

    def summed(self, x: Any, *axes: str) -> Any:
        """A tree summed over these axes."""
        axes = tuple(axis for axis in axes if self.size(axis) > 1)
        return jax.lax.psum(x, axes) if axes else x

    def gathered(self, part: jax.Array) -> jax.Array:
        """The whole array [D, N], of which each device along fsdp stores [D / fsdp, N]."""
        blocks, shape, n = _tiles(part[None]), part.shape, self.size("fsdp")
        for groups in reversed(_ring_groups(self.mesh)):
            blocks = jax.lax.all_gather(blocks, "fsdp", axis=0, tiled=True, axis_index_groups=groups)
        if blocks.size != n * part.size:
            blocks = jax.lax.optimization_barrier(blocks)
        return blocks.reshape(n, -1)[:, : part.size].reshape(n * shape[0], *shape[1:])

    def scattered(self, part: jax.Array) -> jax.Array:
        """The rows [D / fsdp, N] that this device stores of an array [D, N] summed over the devices of a batch."""
        n = self.size("fsdp")
        shape = (len(part) // n, *part.shape[1:])
        blocks = _tiles(part.reshape(n, *shape))
        for groups in _ring_groups(self.mesh):
            blocks = jax.lax.psum_scatter(blocks, "fsdp", scatter_dimension=0, tiled=True, axis_index_groups=groups)
        if blocks.size != math.prod(shape):
            blocks = jax.lax.optimization_barrier(blocks)
        return self.summed(blocks.reshape(-1)[: math.prod(shape)].reshape(shape), "data")

    def whole_width(self, table_RxD: jax.Array) -> jax.Array:
        """A whole table, gathered if fsdp splits its width."""
        return self.gathered(table_RxD.T).T if self.size("fsdp") > 1 else table_RxD

    def reduced(self, gradient_RxD: jax.Array) -> jax.Array:
        """A table's gradient summed over the devices of a batch, with its width split over fsdp like the table's."""
        if self.size("data") * self.size("fsdp") == 1:
            return gradient_RxD
        sent = gradient_RxD.astype(self.reduction or gradient_RxD.dtype)
        own = self.scattered(sent.T).T if self.size("fsdp") > 1 else self.summed(sent, "data")
        return own.astype(gradient_RxD.dtype)

    def split(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        """Makes `function` run on each device's parts of its arguments; inputs, outputs: trees of kinds.

        Collectives over AXES are explicit inside it, so that a loop contains only those written into it.
        """
        if self.mesh is None:
            return function
        specs = (jax.tree.map(ACTIVATIONS.get, kinds) for kinds in (inputs, outputs))
        return jax.shard_map(function, mesh=self.mesh, in_specs=next(specs), out_specs=next(specs), check_vma=False)


_TILE = (8, 128)  # of a TPU's memory, which pads other shapes to multiples


def _tiles(blocks: jax.Array) -> jax.Array:
    """Blocks [n, R, N] of whole tiles, so that XLA on TPU does not replace a scatter; others become [n, rows, 128]."""
    if blocks.ndim == 3 and blocks.shape[1] % _TILE[0] == 0 and blocks.shape[2] % _TILE[1] == 0:
        return blocks
    flat = blocks.reshape(len(blocks), -1)
    if missing := -flat.shape[1] % math.prod(_TILE):
        # The barrier stops XLA on TPU from moving the padding across the exchange, which gives wrong shapes.
        flat = jax.lax.optimization_barrier(jnp.pad(flat, ((0, 0), (0, missing))))
    return flat.reshape(len(blocks), -1, _TILE[1])


@lru_cache
def rings(mesh: Mesh) -> tuple[int, ...]:
    """The sizes of the torus axes that make up fsdp: 8 and 8 on a whole v5e:8x8; otherwise one size."""
    line = mesh.devices[0, :, 0]
    places = [(getattr(device, "slice_index", 0), *getattr(device, "coords", ())) for device in line]
    sizes = tuple(len(set(along)) for along in zip(*places, strict=True))
    if places != sorted(set(places)) or math.prod(sizes) != len(line):
        return (len(line),)
    return tuple(size for size in sizes if size > 1)


def _ring_groups(mesh: Mesh | None) -> list:
    """For each ring, outermost first, its groups of positions along fsdp; None: all positions.

    Over a whole slice XLA on TPU turns scatters, and many gathers, into all-reduces; along one axis it does not.
    """
    if mesh is None or len(sizes := rings(mesh)) < 2:
        return [None]
    index = np.arange(mesh.shape["fsdp"]).reshape(sizes)
    return [np.moveaxis(index, axis, -1).reshape(-1, size).tolist() for axis, size in enumerate(sizes)]


def make_mesh(shape: tuple[int, int, int], devices: Sequence | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices, with neighbours in the network along the inner axes.

    On several TPU slices, data runs across slices if its size allows.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1 and shape[0] % slices == 0:
        from jax.experimental import mesh_utils

        grid = mesh_utils.create_hybrid_device_mesh((shape[0] // slices, *shape[1:]), (slices, 1, 1), devices)
    else:
        grid = jax.make_mesh(shape, AXES, devices=devices).devices.copy()
    if hasattr(devices[0], "coords"):  # fsdp goes row by row instead of in a snake: see rings
        for data, tensor in np.ndindex(shape[0], shape[2]):
            line = grid[data, :, tensor]
            grid[data, :, tensor] = sorted(line, key=lambda device: (getattr(device, "slice_index", 0), *device.coords))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def parameter_shardings(mesh: Mesh, params: Any) -> Any:
    """NamedShardings of a parameter tree (arrays or shapes)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, parameters.of(name_of(path)).spec), params
    )


def state_shardings(mesh: Mesh, state: Any, params: Any) -> Any:
    """NamedShardings of an optimizer or rule state. A leaf with a parameter's path and shape is sharded like it.

    Other leaves (counts, factored moments) are replicated.
    """
    shapes = {name_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def place(path, leaf):
        name = name_of(path)
        owner = next((p for p, s in shapes.items() if s == leaf.shape and (name == p or name.endswith("/" + p))), None)
        return NamedSharding(mesh, parameters.of(owner).spec if owner else P())

    return jax.tree_util.tree_map_with_path(place, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch array [B, ...]: sequences over data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The global rows of a batch on this process's devices, in order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for index in places.values() if index for row in range(*index[0].indices(batch_size))})


def place_batch(mesh: Mesh, batch_size: int, rows: Sequence[int], batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays [batch_size, ...] from this process's `rows` of them; see local_rows."""
    at = {row: index for index, row in enumerate(rows)}

    def place(array):
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            return array[at[start] : at[start] + stop - start]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), batch_sharding(mesh), part)

    return {name: place(array) for name, array in batch.items()}
