"""Causal attention as one function; the kernel is chosen by name or by backend, never silently slow."""

import jax
import jax.numpy as jnp

KERNELS = ("auto", "einsum", "blockwise", "cudnn")
_QUERY_BLOCK = 512


def choose(name: str, backend: str, sequence_length: int, dtype: str, segmented: bool) -> str:
    """The kernel for "auto", or the named one; ValueError where it cannot run.

    cuDNN on GPU in bfloat16 without segments; else one einsum while [T, T] is small, and blocks of queries beyond.
    """
    cudnn = backend == "gpu" and dtype == "bfloat16" and not segmented
    if name == "cudnn" and not cudnn:
        raise ValueError(
            f"model.attention = {name!r}: needs a GPU, model.compute_dtype = bfloat16 and data.packing = concat; "
            "use auto, einsum or blockwise"
        )
    if name != "auto":
        return name
    if cudnn:
        return "cudnn"
    return "einsum" if sequence_length <= 2 * _QUERY_BLOCK else "blockwise"


def attention(
    query_BxTxHxK: jax.Array,
    key_BxTxGxK: jax.Array,
    value_BxTxGxK: jax.Array,
    segments_BxT: jax.Array | None = None,
    kernel: str = "einsum",
) -> jax.Array:
    """Causal softmax attention with H a multiple of G (grouped queries); tokens attend within their own segment.

    Softmax in float32 or better, result [B, T, H, K] in the inputs' dtype. Scaled by 1/sqrt(K).
    """
    B, T, H, K = query_BxTxHxK.shape
    if kernel == "cudnn":
        return jax.nn.dot_product_attention(
            query_BxTxHxK, key_BxTxGxK, value_BxTxGxK, is_causal=True, implementation="cudnn"
        )
    G = key_BxTxGxK.shape[2]
    grouped = query_BxTxHxK.reshape(B, T, G, H // G, K)

    def rows(start: int, size: int, keys: int) -> jax.Array:
        """Attention of the queries [start, start + size) over the first `keys` positions, all they can see."""
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
        # A finite floor: a padded row that sees nothing but itself must not become NaN.
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).astype(value_BxTxGxK.dtype)
        return jnp.einsum("bgrqt,btgk->bqgrk", weights, value_BxTxGxK[:, :keys])

    if kernel == "einsum":
        return rows(0, T, T).reshape(B, T, H, K)
    # Each block recomputes its scores in the backward pass, so only [block, T] of them ever exist; keys after the block
    # are skipped altogether, which halves the work of the causal square.
    blocks = [
        jax.checkpoint(rows, static_argnums=(0, 1, 2))(
            start, min(_QUERY_BLOCK, T - start), min(start + _QUERY_BLOCK, T)
        )
        for start in range(0, T, _QUERY_BLOCK)
    ]
    return jnp.concatenate(blocks, axis=1).reshape(B, T, H, K)
