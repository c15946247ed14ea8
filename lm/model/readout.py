"""The readout: token-chunked cross-entropy, and the frozen-derivative readout of the functional path.

Logits exist for one chunk of tokens at a time. Each pass computes its gradients while it has a chunk's logits. It
therefore costs three products with the readout weights, and the backward pass recomputes none.

On a mesh each device loops over its own sequences and its own part of the vocabulary. Before the loop the weights are
gathered over fsdp; after it their gradient is summed over devices. Inside it devices exchange only the softmax's two
sums per token, and only under tensor parallelism.

The functional path differentiates the raw logits F = h W^T. Soft-cap, z-loss and label smoothing belong to the loss:
their derivative is frozen at theta with the rest, and the perturbed logits are never formed.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from steppe.lm.model.mesh import AXES, BATCH, Placement
from steppe.optim.rule import after


class Options(NamedTuple):
    """Static options. vocabulary: size without padding rows. chunk: positions of each sequence at a time.

    keep: the pass at theta stores its loss derivative, in `kept_dtype`, for the functional path.
    """

    vocabulary: int
    chunk: int
    z_loss: float = 0.0
    soft_cap: float = 0.0
    smoothing: float = 0.0
    keep: bool = False
    kept_dtype: str = "bfloat16"
    place: Placement = Placement()


class Kept(NamedTuple):
    """Stored by a pass with options.keep: d loss / d logits [B, T, V], and its inner product with the logits."""

    derivative_BxTxV: jax.Array
    inner: jax.Array


def chunk_tokens(backend: str, vocabulary: int) -> int:
    """Default tokens per chunk: logits of 32 MiB on a CPU, to stay near its caches, otherwise of 512 MiB."""
    return max(1, (2**23 if backend == "cpu" else 2**27) // vocabulary)


def chunk_positions(sequence_length: int, sequences: int, tokens: int) -> int:
    """Positions per chunk: the largest divisor of the length at which `sequences` rows have at most `tokens` tokens."""
    fitting = [n for n in range(1, sequence_length + 1) if sequence_length % n == 0 and n * sequences <= tokens]
    return max(fitting, default=1)


def token_loss(options: Options, raw_BxcxV, targets_Bxc):
    """(loss per token, its derivative by the raw logits), unweighted. V: this device's part of the vocabulary."""
    V = raw_BxcxV.shape[-1]
    split = options.place.size("tensor") > 1
    first = lax.axis_index("tensor") * V if split else 0
    index = first + lax.broadcasted_iota(jnp.int32, (1, 1, V), 2)
    real = index < options.vocabulary
    capped = options.soft_cap * jnp.tanh(raw_BxcxV / options.soft_cap) if options.soft_cap else raw_BxcxV
    logits = jnp.where(real, capped, -1e30)
    peak = lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    peak = lax.stop_gradient(lax.pmax(peak, "tensor")) if split else peak
    powers = jnp.exp(logits - peak)
    # A comparison instead of a gather, because it fuses and stays local when devices split the vocabulary.
    hit = index == targets_Bxc[..., None]
    sums = [jnp.sum(powers, axis=-1), jnp.sum(jnp.where(hit, capped, 0.0), axis=-1)]
    if options.smoothing:
        sums.append(jnp.sum(jnp.where(real, capped, 0.0), axis=-1))
    total, correct, *uniform = options.place.summed(sums, "tensor")
    log_z = peak[..., 0] + jnp.log(total)
    target = hit.astype(raw_BxcxV.dtype)
    loss = log_z - (1 - options.smoothing) * correct
    if options.smoothing:
        target = (1 - options.smoothing) * target + options.smoothing / options.vocabulary * real
        loss = loss - options.smoothing * uniform[0] / options.vocabulary
    slope = 1.0
    if options.z_loss:
        loss = loss + options.z_loss * log_z**2
        slope = (1 + 2 * options.z_loss * log_z)[..., None]
    derivative = slope * (powers / total[..., None]) - target
    if options.soft_cap:
        derivative = derivative * (1 - (capped / options.soft_cap) ** 2)
    return loss, derivative


def _over_chunks(options: Options, length: int, body, carry):
    """carry = body(carry, take, put) for each chunk; take slices arrays [B, T, ...], put writes a chunk back."""

    def at(carry, start):
        def take(x):
            return lax.dynamic_slice_in_dim(x, start, options.chunk, axis=1)

        def put(whole, part):
            return lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), start, axis=1)

        return body(carry, take, put), None

    if options.chunk == length:
        return at(carry, 0)[0]
    return lax.scan(at, carry, jnp.arange(0, length, options.chunk))[0]


def _logits(hidden_BxcxD, kernel_VxD):
    wide = jnp.promote_types(jnp.float32, hidden_BxcxD.dtype)
    return jnp.einsum("bcd,vd->bcv", hidden_BxcxD, kernel_VxD, preferred_element_type=wide)


def _add_products(derivative_BxcxV, kernel_VxD, hidden_BxTxD, gradient, take, put):
    """Adds a chunk's (d loss/d hidden, d loss/d kernel) to `gradient`; also returns the former at full precision."""
    wide = gradient[1].dtype
    low = derivative_BxcxV.astype(kernel_VxD.dtype)
    to_hidden = jnp.einsum("bcv,vd->bcd", low, kernel_VxD, preferred_element_type=wide)
    to_kernel = jnp.einsum("bcv,bcd->vd", low, take(hidden_BxTxD), preferred_element_type=wide)
    return (put(gradient[0], to_hidden), gradient[1] + to_kernel), to_hidden


def _zeros_like_gradient(kernel_VxD, hidden_BxTxD):
    return jnp.zeros_like(hidden_BxTxD), jnp.zeros(kernel_VxD.shape, jnp.promote_types(jnp.float32, hidden_BxTxD.dtype))


def _share(weights_BxT, dtype):
    """The factor of each token's loss in the mean: its weight / the number of tokens with positive weight."""
    return weights_BxT.astype(dtype) / jnp.maximum(jnp.sum(weights_BxT > 0), 1).astype(dtype)


def _fitted(options: Options, sequences: int) -> Options:
    """The options; without their mesh, and with a warning, if it does not divide the sequences."""
    place = options.place.fitting(sequences)
    if options.place.mesh is not None and place.mesh is not options.place.mesh:
        shards = "data x fsdp = {data} x {fsdp}".format(**options.place.mesh.shape)
        warnings.warn(f"readout: {sequences} sequences do not divide over {shards}, so it is slow", stacklevel=2)
    return options._replace(place=place)


def _reduced(options: Options, gradient, value):
    """(d/d hidden, d/d kernel), each summed over devices once; d/d kernel stays split like the stored weights.

    value: a result of the pass on all devices. d/d hidden, with which the trunk's backward begins, waits for all sums.
    """
    to_hidden, to_kernel = gradient
    if options.place.size("data") * options.place.size("fsdp") > 1:
        to_kernel = options.place.reduced(to_kernel)
        to_hidden = after(to_hidden, jnp.isnan(to_kernel[0, 0]) | jnp.isnan(value))
    return options.place.summed(to_hidden, "tensor"), to_kernel


_INPUTS = ("table", "hidden", "tokens", "tokens")
_GRADIENT = ("hidden", "table")


def _clean_pass(options: Options, kernel_VxD, hidden_BxTxD, targets_BxT, weights_BxT, gradients: bool = True):
    options = _fitted(options, len(hidden_BxTxD))
    wide = jnp.promote_types(jnp.float32, hidden_BxTxD.dtype)

    def local(kernel_VxD, hidden_BxTxD, targets_BxT, share_BxT):
        B, T, _ = hidden_BxTxD.shape
        # Cast before the gather, to send half the bytes, but inside the function, so that the kernel's gradient keeps
        # the precision of its sum.
        kernel_VxD = options.place.whole_width(kernel_VxD.astype(hidden_BxTxD.dtype))

        def body(carry, take, put):
            losses, gradient, kept = carry
            raw = _logits(take(hidden_BxTxD), kernel_VxD)
            loss, derivative = token_loss(options, raw, take(targets_BxT))
            share = take(share_BxT)
            losses = losses + jnp.sum(share * loss, axis=1)
            derivative = share[..., None] * derivative
            if gradients:
                gradient, _ = _add_products(derivative, kernel_VxD, hidden_BxTxD, gradient, take, put)
            if options.keep:
                low = derivative.astype(options.kept_dtype)
                kept = Kept(put(kept.derivative_BxTxV, low), kept.inner + jnp.sum(low.astype(wide) * raw))
            return losses, gradient, kept

        gradient = _zeros_like_gradient(kernel_VxD, hidden_BxTxD) if gradients else ()
        kept: Any = ()
        if options.keep:
            kept = Kept(jnp.zeros((B, T, len(kernel_VxD)), options.kept_dtype), jnp.zeros((), wide))
        losses, gradient, kept = _over_chunks(options, T, body, (jnp.zeros(B, wide), gradient, kept))
        loss = options.place.summed(jnp.sum(losses), *BATCH)
        kept = Kept(kept.derivative_BxTxV, options.place.summed(kept.inner, *AXES)) if options.keep else ()
        return loss, losses, kept, _reduced(options, gradient, loss) if gradients else ()

    outputs = ("scalar", "rows", Kept._make(("mlp", "scalar")) if options.keep else (), _GRADIENT if gradients else ())
    share_BxT = _share(weights_BxT, wide)
    loss, losses, kept, gradient = options.place.split(local, _INPUTS, outputs)(
        kernel_VxD, hidden_BxTxD, targets_BxT, share_BxT
    )
    own = jnp.sum(share_BxT > 0, axis=1) / jnp.maximum(jnp.sum(weights_BxT > 0), 1)
    per_sequence = losses / jnp.maximum(own, jnp.finfo(wide).tiny).astype(wide)
    return (loss, per_sequence, kept or None), gradient or None


def _cross_entropy(
    options: Options, kernel_VxD, hidden_BxTxD, targets_BxT, weights_BxT
) -> tuple[jax.Array, jax.Array, Kept | None]:
    """(mean loss in nats, mean loss per sequence [B], Kept or None).

    The loss is sum(weights * token loss) / number of tokens with positive weight. Only the loss carries a gradient, to
    kernel and hidden. Products run in hidden's dtype and sum in float32 or better, which should be the kernel's dtype.
    T is a multiple of options.chunk.
    """
    return _clean_pass(options, kernel_VxD, hidden_BxTxD, targets_BxT, weights_BxT, gradients=False)[0]


def _scaled(cotangent, to_hidden, to_kernel):
    return cotangent * to_kernel, (cotangent * to_hidden).astype(to_hidden.dtype)


def _cross_entropy_backward(options, gradient, cotangents):
    return *_scaled(cotangents[0], *gradient), None, None


cross_entropy = jax.custom_vjp(_cross_entropy, nondiff_argnums=(0,))
cross_entropy.defvjp(_clean_pass, _cross_entropy_backward)


def _frozen_pass(options: Options, kernel_VxD, hidden_BxTxD, anchor, targets_BxT, weights_BxT):
    options = _fitted(options, len(hidden_BxTxD))
    wide = jnp.promote_types(jnp.float32, hidden_BxTxD.dtype)
    *rebuilt_from, kept = anchor

    def local(kernel_VxD, hidden_BxTxD, targets_BxT, share_BxT, fixed):
        kernel_VxD = options.place.whole_width(kernel_VxD.astype(hidden_BxTxD.dtype))
        anchor_kernel_VxD = options.place.whole_width(fixed[0].astype(hidden_BxTxD.dtype)) if kept is None else None

        def body(carry, take, put):
            value, gradient = carry
            if kept is None:
                raw = _logits(take(fixed[1]), anchor_kernel_VxD)
                derivative = take(share_BxT)[..., None] * token_loss(options, raw, take(targets_BxT))[1]
                # Rounded like the products' operands, so that the value is 0 if nothing has moved.
                derivative = derivative.astype(kernel_VxD.dtype)
                value = value - jnp.sum(derivative.astype(wide) * raw)
            else:
                derivative = take(fixed.derivative_BxTxV).astype(kernel_VxD.dtype)
            gradient, to_hidden = _add_products(derivative, kernel_VxD, hidden_BxTxD, gradient, take, put)
            return value + jnp.sum(to_hidden * take(hidden_BxTxD).astype(wide)), gradient

        carry = jnp.zeros((), wide), _zeros_like_gradient(kernel_VxD, hidden_BxTxD)
        value, gradient = _over_chunks(options, hidden_BxTxD.shape[1], body, carry)
        value = options.place.summed(value, *AXES)
        return value, _reduced(options, gradient, value)

    fixed, kinds = (rebuilt_from, ["table", "hidden"]) if kept is None else (kept, Kept._make(("mlp", "scalar")))
    value, gradient = options.place.split(local, (*_INPUTS, kinds), ("scalar", _GRADIENT))(
        kernel_VxD, hidden_BxTxD, targets_BxT, _share(weights_BxT, wide), fixed
    )
    return value if kept is None else value - kept.inner, gradient


def _frozen_change(options: Options, kernel_VxD, hidden_BxTxD, anchor, targets_BxT, weights_BxT) -> jax.Array:
    """<d, F - F_anchor>, with d the loss derivative at the anchor: the first-order change of the loss, a scalar.

    anchor = (kernel_VxD, hidden_BxTxD, Kept or None); with Kept, its derivative is used (two products with the
    readout), else it is rebuilt chunk by chunk (three). The gradient, to kernel and hidden, is the functional path.
    """
    return _frozen_pass(options, kernel_VxD, hidden_BxTxD, anchor, targets_BxT, weights_BxT)[0]


def _frozen_backward(options, gradient, cotangent):
    return *_scaled(cotangent, *gradient), None, None, None


frozen_change = jax.custom_vjp(_frozen_change, nondiff_argnums=(0,))
frozen_change.defvjp(_frozen_pass, _frozen_backward)
