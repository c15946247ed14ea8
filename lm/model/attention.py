"""Causal attention as one function; the kernel is chosen by name or by backend."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from steppe.lm.model.mesh import Placement

KERNELS = ("auto", "einsum", "blockwise", "cudnn", "splash")
MIXED = "attention_mixed"  # the result's name for remat policies
_LANES = 128  # splash needs sequence lengths that are multiples of this


class NoKernel(ValueError):
    """A kernel that cannot run here; the message names its requirements."""


def choose(
    name: str, backend: str, sequence_length: int, dtype: str, *, segmented: bool, second_order: bool = False
) -> str:
    """The named kernel, or the best one for "auto". Raises NoKernel if the named one cannot run.

    auto takes cuDNN on GPU in bfloat16 without segments, and splash on TPU. Neither can be differentiated twice
    (second_order). Otherwise it takes einsum while [T, T] is small, and blocks of queries beyond.
    """
    can = {
        "cudnn": backend == "gpu" and dtype == "bfloat16" and not segmented and not second_order,
        "splash": backend == "tpu" and sequence_length % _LANES == 0 and not second_order,
    }
    needs = {
        "cudnn": "a GPU, model.compute_dtype = bfloat16 and data.packing = concat",
        "splash": f"a TPU and data.sequence_length divisible by {_LANES}",
    }
    if not can.get(name, True):
        raise NoKernel(f"needs {needs[name]}, and a method that differentiates once; use auto, einsum or blockwise")
    if name != "auto":
        return name
    fast = next((kernel for kernel, able in can.items() if able), None)
    return fast or differentiable(sequence_length)


def differentiable(sequence_length: int) -> str:
    """The kernel that runs everywhere and can be differentiated twice: einsum while [T, T] is small, else blockwise."""
    return "einsum" if sequence_length <= 256 else "blockwise"


CACHED = "cached"  # for generation only: keys and values of earlier tokens come from a cache


def attention(
    query_BxTxHxK: jax.Array,
    key_BxTxGxK: jax.Array,
    value_BxTxGxK: jax.Array,
    segments_BxT: jax.Array | None = None,
    kernel: str = "einsum",
    place: Placement = Placement(),  # noqa: B008
    lean: bool = False,
) -> jax.Array:
    """Causal softmax attention; H is a multiple of G (grouped queries). Tokens attend within their own segment.

    Softmax in float32 or better; the result [B, T, H, K] has the inputs' dtype. Scores are scaled by 1/sqrt(K). lean,
    for einsum and blockwise: divides by the softmax's sum after mixing the values, and einsum also takes blocks of
    queries. It differs only in rounding.
    """
    if kernel == "cudnn":
        mixed = jax.nn.dot_product_attention(
            query_BxTxHxK, key_BxTxGxK, value_BxTxGxK, is_causal=True, implementation="cudnn"
        )
    elif kernel == "splash":
        mixed = _splash(query_BxTxHxK, key_BxTxGxK, value_BxTxGxK, segments_BxT, place)
    else:
        mixed = _rows_of_queries(query_BxTxHxK, key_BxTxGxK, value_BxTxGxK, segments_BxT, kernel, lean)
    return checkpoint_name(mixed, MIXED)


def cached_attention(
    query_BxNxHxK: jax.Array, key_BxTxGxK: jax.Array, value_BxTxGxK: jax.Array, positions_BxN: jax.Array
) -> jax.Array:
    """Attention of N new tokens per sequence, at these positions, over T cached keys and values.

    Result [B, N, H, K]. A token attends to positions up to its own; later cache entries are ignored.
    """
    B, N, H, K = query_BxNxHxK.shape
    T, G = key_BxTxGxK.shape[1:3]
    wide = jnp.promote_types(jnp.float32, query_BxNxHxK.dtype)
    grouped = query_BxNxHxK.reshape(B, N, G, H // G, K)
    scores = jnp.einsum("bngrk,btgk->bgrnt", grouped, key_BxTxGxK, preferred_element_type=wide) * (K**-0.5)
    seen = positions_BxN[:, None, None, :, None] >= jnp.arange(T)
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(value_BxTxGxK.dtype)
    return jnp.einsum("bgrnt,btgk->bngrk", weights, value_BxTxGxK).reshape(B, N, H, K)


def query_block(sequence_length: int) -> int:
    """Queries per block: a quarter of the sequence, between 64 and 512."""
    return min(512, max(64, -(-sequence_length // 4)))


def _rows_of_queries(query_BxTxHxK, key_BxTxGxK, value_BxTxGxK, segments_BxT, kernel, lean):
    B, T, H, K = query_BxTxHxK.shape
    G = key_BxTxGxK.shape[2]
    grouped = query_BxTxHxK.reshape(B, T, G, H // G, K)

    def rows(start: int, size: int, keys: int) -> jax.Array:
        """Attention of queries [start, start + size) over the first `keys` positions, which are all they may see."""
        scores = jnp.einsum(
            "bqgrk,btgk->bgrqt",
            grouped[:, start : start + size],
            key_BxTxGxK[:, :keys],
            preferred_element_type=jnp.promote_types(jnp.float32, grouped.dtype),
        ) * (K**-0.5)
        seen = (start + jnp.arange(size))[:, None] >= jnp.arange(keys)
        if segments_BxT is not None:
            same = segments_BxT[:, start : start + size, None] == segments_BxT[:, None, :keys]
            seen = seen & same[:, None, None]
        # A finite floor, because a padded row that sees only itself must not become NaN.
        scores = jnp.where(seen, scores, -1e30)
        if not lean:
            weights = jax.nn.softmax(scores).astype(value_BxTxGxK.dtype)
            return jnp.einsum("bgrqt,btgk->bqgrk", weights, value_BxTxGxK[:, :keys])
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        mixed = jnp.einsum("bgrqt,btgk->bqgrk", weights.astype(value_BxTxGxK.dtype), value_BxTxGxK[:, :keys])
        return (mixed / jnp.moveaxis(weights.sum(-1), 3, 1)[..., None]).astype(mixed.dtype)

    # Skipping the keys after a block halves the work of the causal square.
    block = query_block(T) if lean or kernel == "blockwise" else T
    if kernel == "blockwise":
        # The backward pass recomputes each block's scores, so only [block, T] of them exist at a time.
        rows = jax.checkpoint(rows, static_argnums=(0, 1, 2))
    blocks = [rows(start, min(block, T - start), min(start + block, T)) for start in range(0, T, block)]
    return jnp.concatenate(blocks, axis=1).reshape(B, T, H, K)


def _splash(query_BxTxHxK, key_BxTxGxK, value_BxTxGxK, segments_BxT, place: Placement):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, K = query_BxTxHxK.shape[1], query_BxTxHxK.shape[3]
    block = next(b for b in (512, 256, _LANES) if T % b == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    # XLA cannot partition the custom call, so each device runs it on its own sequences and heads.
    def local(query, key, value, *segments):
        mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * query.shape[2])
        kernel: Any = splash.make_splash_mha_single_device(mask=mask, block_sizes=sizes, residual_checkpoint_name=MIXED)
        heads_first = (x.swapaxes(1, 2) for x in (query * K**-0.5, key, value))
        ids = splash.SegmentIds(*segments, *segments) if segments else None
        return jax.vmap(kernel)(*heads_first, segment_ids=ids).swapaxes(1, 2)

    segments = () if segments_BxT is None else (segments_BxT,)
    kinds = ("heads", "heads", "heads", *["tokens"] * len(segments))
    return place.split(local, kinds, "heads")(query_BxTxHxK, key_BxTxGxK, value_BxTxGxK, *segments)
