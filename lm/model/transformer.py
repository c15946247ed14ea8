"""The Transformer's trunk: tokens to the last hidden state. lm/model/readout.py holds the readout.

Dimensions, here and everywhere: B sequences, T tokens of a sequence, D width, L layers, H query heads, G key/value
heads, K head width, F hidden width of the MLP, V vocabulary (padded).
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from steppe.lm.model.attention import CACHED, MIXED, attention, cached_attention, differentiable
from steppe.lm.model.mesh import Placement
from steppe.lm.model.products import PRODUCT, read, write

STYLES = ("nanodo", "modern")
INITS = ("steppe", "nanodo")
PARAMETRISATIONS = ("standard", "mup")
REMAT = ("none", "full", "dots", "offload")


class Shape(NamedTuple):
    """Everything that determines the trunk's computation; `shape` builds it from a config."""

    style: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocabulary: int
    sequence_length: int
    qk_norm: bool = False
    tie_embeddings: bool = True
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-6
    head_width: int = 0  # 0: width / heads
    init: str = "steppe"
    dtype: str = "float32"
    kernel: str = "einsum"
    remat: str = "dots"
    base_width: int = 0  # mup's base width; 0: the standard parametrisation
    small: bool = False  # kernels are small, so layers are unrolled and attention is lean

    @property
    def widening(self) -> float:
        """width / mup's base width; 1 in the standard parametrisation.

        mup (Yang et al. 2021, arXiv 2203.03466, table 8): tables, including the readout's, are drawn as at the base
        width, and hidden states are divided by the widening before the readout. Matrices are drawn by fan-in, as in the
        standard parametrisation. Learning rates are scaled in optim.base, rho in optim.passes.two_pass.
        """
        return self.width / self.base_width if self.base_width else 1.0

    @property
    def features(self) -> int:
        """K, the width of a head."""
        return self.head_width or self.width // self.heads


def padded_vocabulary(size: int, multiple: int) -> int:
    """The number of embedding rows: the vocabulary rounded up, to suit tensor parallelism and vector lanes."""
    return -(-size // multiple) * multiple


def shape(model, vocabulary_size: int, sequence_length: int, kernel: str) -> Shape:
    """The trunk's Shape for config.model, a vocabulary size, a sequence length and an attention kernel."""
    own = {name: model[name] for name in Shape._fields if name in model}
    given = {
        "kv_heads": model.kv_heads or model.heads,
        "vocabulary": padded_vocabulary(vocabulary_size, model.vocabulary_multiple),
        "sequence_length": sequence_length,
        "dtype": model.compute_dtype,
        "kernel": kernel,
        "base_width": model.base_width if model.parametrisation == "mup" else 0,
        "small": model.width <= 128 and model.layers <= 4,
    }
    return Shape(**{**own, **given})


def widening_of(model) -> float:
    """Shape.widening for config.model."""
    return model.width / model.base_width if model.parametrisation == "mup" else 1.0


def _matrix(init: str, reads: tuple[int, ...], scale: float = 1.0) -> Callable:
    """An initialiser of a kernel that sums over the axes `reads`.

    steppe: normal, truncated at three deviations, with variance scale / fan-in. nanodo: Xavier-uniform (Glorot and
    Bengio 2010) of [in, out]; it ignores scale.
    """

    def initialise(key, shape, dtype):
        fan_in = math.prod(shape[axis] for axis in reads)
        if init == "nanodo":
            bound = (6 / (fan_in + math.prod(shape) // fan_in)) ** 0.5
            return jax.random.uniform(key, shape, dtype, -bound, bound)
        return jax.random.truncated_normal(key, -3, 3, shape, dtype) * (scale / fan_in) ** 0.5

    return initialise


def _table(init: str, scale: float = 1.0) -> Callable:
    """An initialiser of rows [R, D] with mean square norm `scale`: normal; steppe truncates it at three deviations."""
    if init == "nanodo":
        return lambda key, shape, dtype: jax.random.normal(key, shape, dtype) * (scale / shape[1]) ** 0.5
    return _matrix(init, (1,), scale)


class Norm(nn.Module):
    """LayerNorm without bias (nanodo) or RMSNorm (modern) over the last axis, computed in float32 or better."""

    shape: Shape

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        if self.shape.style == "nanodo":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.shape.norm_epsilon)
        return (wide * scale).astype(x.dtype)


def rotate(x_BxTxHxK: jax.Array, positions_BxT: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) on pairs from the two halves; angles in float32 or better."""
    half = x_BxTxHxK.shape[-1] // 2
    wide = jnp.promote_types(jnp.float32, x_BxTxHxK.dtype)
    angles = positions_BxT[..., None].astype(wide) * base ** (-jnp.arange(half, dtype=wide) / half)
    sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
    first, second = jnp.split(x_BxTxHxK.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxTxHxK.dtype)


class Kernel(nn.Module):
    """One weight array, cast to the compute dtype; the caller writes its einsum."""

    dims: tuple[int, ...]
    draw: Callable
    dtype: str

    @nn.compact
    def __call__(self):
        kernel = self.param("kernel", self.draw, self.dims, jnp.float32)
        return kernel.astype(self.dtype)


class Table(nn.Module):
    """A table [rows, D] of vectors, in float32; `lookup` reads rows of it."""

    rows: int
    width: int
    draw: Callable

    @nn.compact
    def __call__(self):
        return self.param("embedding", self.draw, (self.rows, self.width), jnp.float32)


def _lookup(place: Placement, kind: str, dtype: str, table_RxD: jax.Array, ids_BxT: jax.Array) -> jax.Array:
    """Rows of a table by id, [B, T, D] in `dtype`. kind: "table" (rows split over tensor) or "positions" (not split).

    Written per device, because XLA would gather all sequences on every device. The gradient is summed in float32 or
    better on each device, whatever the dtype, and over devices as `place` says.
    """

    def local(table, ids):
        if place.size("fsdp") > 1:
            table = place.whole_width(table.astype(dtype))
        index, mine = _local_index(place, kind, ids, table.shape[0])
        found = jnp.where(mine[..., None], table.astype(dtype)[index], 0) if mine is not None else table[index]
        return found.astype(dtype) if mine is None else place.summed(found, "tensor")

    return place.split(local, (kind, "tokens"), "hidden")(table_RxD, ids_BxT)


def _local_index(place: Placement, kind: str, ids, rows: int):
    """(row index on this device, whether this device holds the row); the latter is None if each device holds all."""
    if kind != "table" or place.size("tensor") == 1:
        return ids, None
    index = ids - lax.axis_index("tensor") * rows
    mine = (index >= 0) & (index < rows)
    return jnp.where(mine, index, 0), mine


def _lookup_forward(place, kind, dtype, table_RxD, ids_BxT):
    # Not lookup itself: second derivatives differentiate this rule, which has no rule of its own.
    return _lookup(place, kind, dtype, table_RxD, ids_BxT), (table_RxD, ids_BxT)


def _lookup_backward(place, kind, dtype, kept, cotangent_BxTxD):
    table_RxD, ids_BxT = kept
    parts = place.size("tensor") if kind == "table" else 1

    def local(ids, cotangent):
        rows = table_RxD.shape[0] // parts
        index, mine = _local_index(place, kind, ids, rows)
        wide = cotangent.astype(table_RxD.dtype)
        wide = wide if mine is None else jnp.where(mine[..., None], wide, 0)
        return place.reduced(jnp.zeros((rows, table_RxD.shape[1]), wide.dtype).at[index].add(wide))

    return place.split(local, ("tokens", "hidden"), kind)(ids_BxT, cotangent_BxTxD), None


lookup = jax.custom_vjp(_lookup, nondiff_argnums=(0, 1, 2))
lookup.defvjp(_lookup_forward, _lookup_backward)


INPUTS = "inputs"  # the collection of each kernel's input; apply(..., mutable=) asks for it


def note_input(module: nn.Module, x: jax.Array, *kernels: str) -> None:
    """Stores x as the input of these kernels of a module, if apply asked for INPUTS."""
    for kernel in kernels:
        module.sow(INPUTS, f"{kernel}_input", x)


class Attention(nn.Module):
    """Multi-head or grouped-query self-attention without biases."""

    shape: Shape
    place: Placement

    @nn.compact
    def __call__(self, x_BxTxD, positions_BxT, segments_BxT):
        s = self.shape
        D, H, G, K = s.width, s.heads, s.kv_heads, s.features
        draw = _matrix(s.init, (0,))
        note_input(self, x_BxTxD, "query", "key", "value")
        query = read(self.place, x_BxTxD, Kernel((D, H, K), draw, s.dtype, name="query")())
        key = read(self.place, x_BxTxD, Kernel((D, G, K), draw, s.dtype, name="key")())
        value = read(self.place, x_BxTxD, Kernel((D, G, K), draw, s.dtype, name="value")())
        query, key, value = (self.place(a, "heads") for a in (query, key, value))
        if s.qk_norm:
            query, key = Norm(s, name="query_norm")(query), Norm(s, name="key_norm")(key)
        if s.style == "modern":
            query, key = rotate(query, positions_BxT, s.rope_base), rotate(key, positions_BxT, s.rope_base)
        if s.kernel == CACHED:
            mixed = cached_attention(query, *self.kept(key, value, positions_BxT), positions_BxT)
        else:
            mixed = attention(query, key, value, segments_BxT, s.kernel, self.place, s.small)
        note_input(self, mixed, "out")
        out = Kernel((H, K, D), _matrix(s.init, (0, 1), 1 / (2 * s.layers)), s.dtype, name="out")()
        return write(self.place, mixed, out)

    def kept(self, key_BxNxGxK, value_BxNxGxK, positions_BxN):
        """(keys, values) [B, T, G, K] of all tokens so far: writes the new ones into the collection "cache"."""
        rows, found = jnp.arange(positions_BxN.shape[0])[:, None], []
        for name, new in (("keys", key_BxNxGxK), ("values", value_BxNxGxK)):
            shape = (new.shape[0], self.shape.sequence_length, *new.shape[2:])
            store = self.variable("cache", name, jnp.zeros, shape, new.dtype)
            store.value = store.value.at[rows, positions_BxN].set(new)
            found.append(store.value)
        keys, values = found
        return keys, values


class Mlp(nn.Module):
    """GELU (nanodo) or SwiGLU (modern) without biases."""

    shape: Shape
    place: Placement

    @nn.compact
    def __call__(self, x_BxTxD):
        s = self.shape
        D, F = s.width, s.mlp_width
        draw = _matrix(s.init, (0,))
        note_input(self, x_BxTxD, "up", *["gate"] * (s.style == "modern"))
        hidden = read(self.place, x_BxTxD, Kernel((D, F), draw, s.dtype, name="up")())
        # Checkpointed even with remat none, or the backward pass would read five arrays of [B, T, F] instead of one.
        if s.style == "modern":
            gate = read(self.place, x_BxTxD, Kernel((D, F), draw, s.dtype, name="gate")())
            hidden = jax.checkpoint(lambda gate, up: jax.nn.silu(gate) * up, prevent_cse=False)(gate, hidden)
        else:
            hidden = jax.checkpoint(jax.nn.gelu, prevent_cse=False)(hidden)
        hidden = self.place(hidden, "mlp")
        note_input(self, hidden, "down")
        down = Kernel((F, D), _matrix(s.init, (0,), 1 / (2 * s.layers)), s.dtype, name="down")()
        return write(self.place, hidden, down)


class Block(nn.Module):
    """A pre-norm residual block; returns (x, None), the carry and output of a scan over layers."""

    shape: Shape
    place: Placement

    @nn.compact
    def __call__(self, x_BxTxD, positions_BxT, segments_BxT):
        s = self.shape
        mixed = Attention(s, self.place, name="attention")(
            Norm(s, name="attention_norm")(x_BxTxD), positions_BxT, segments_BxT
        )
        x_BxTxD = self.place(x_BxTxD + mixed, "hidden")
        hidden = Mlp(s, self.place, name="mlp")(Norm(s, name="mlp_norm")(x_BxTxD))
        return self.place(x_BxTxD + hidden, "hidden"), None


def _remat_policy(name: str, place: Placement):
    """What the backward pass need not recompute: nothing (full), or products with weights and attention's result, kept
    on the device (dots) or in the host's memory (offload)."""
    policies = jax.checkpoint_policies
    if name == "full":
        return None
    if place.size("fsdp") > 1:  # a product also gathers its kernel, so it is saved by name
        if name == "dots":
            return policies.save_only_these_names(PRODUCT, MIXED)
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[PRODUCT],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    if name == "dots":
        return policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(MIXED)
        )
    return policies.offload_dot_with_no_batch_dims("device", "pinned_host")


class Trunk(nn.Module):
    """tokens [B, T] -> hidden [B, T, D] after the final norm, in the compute dtype.

    constrain: the Placement of activations on a mesh. Parameter paths: embed/embedding, position/embedding (nanodo),
    layers/... stacked over L, final_norm/scale, readout/kernel (untied). enters: whether it ends before the first
    block, with (x [B, T, D], positions [B, T]) as a block takes them.
    """

    shape: Shape
    constrain: Placement = Placement()
    enters: bool = False

    @nn.compact
    def __call__(self, tokens_BxT, positions_BxT=None, segments_BxT=None):
        s, place = self.shape, self.constrain.fitting(tokens_BxT.shape[0])
        if place is not self.constrain and s.kernel == "splash":  # which runs on a split batch only
            kernel = differentiable(s.sequence_length)
            one = f"a batch of {tokens_BxT.shape[0]}, which does not divide over the devices"
            warnings.warn(f"attention: uses {kernel} instead of {s.kernel} for {one}", stacklevel=2)
            s = s._replace(kernel=kernel)
        draw = _table(s.init, s.widening)
        x_BxTxD = lookup(place, "table", s.dtype, Table(s.vocabulary, s.width, draw, name="embed")(), tokens_BxT)
        if s.style == "nanodo":
            places = Table(s.sequence_length, s.width, draw, name="position")()
            if positions_BxT is None:
                x_BxTxD = x_BxTxD + places[: tokens_BxT.shape[1]].astype(s.dtype)
            else:
                x_BxTxD = x_BxTxD + lookup(place, "positions", s.dtype, places, positions_BxT)
        if positions_BxT is None:
            positions_BxT = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
        if self.enters:
            return place(x_BxTxD, "hidden"), positions_BxT
        if not s.tie_embeddings:
            Kernel((s.vocabulary, s.width), draw, "float32", name="readout")()
        block = Block
        if s.remat != "none":
            block = nn.remat(Block, policy=_remat_policy(s.remat, place), prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "cache": 0, INPUTS: 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]: flax accepts it but declares int
            length=s.layers,
            unroll=s.layers if s.small else 1,
            check_constancy_invariants=self.is_initializing(),  # a second trace, which moves the draws on
        )
        x_BxTxD, _ = layers(s, place, name="layers")(place(x_BxTxD, "hidden"), positions_BxT, segments_BxT)
        hidden_BxTxD = Norm(s, name="final_norm")(x_BxTxD)
        return hidden_BxTxD / s.widening if s.widening != 1 else hidden_BxTxD
