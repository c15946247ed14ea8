"""Products of activations with kernels, including the collectives if the width is split.

On a mesh with fsdp each device gathers a kernel, multiplies its own sequences, and reduces the kernel's gradient into
its own shard. The collectives are explicit, because XLA would sum whole gradients on every device of a large TPU slice,
at twice the bytes.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from steppe.lm.model.mesh import Placement

PRODUCT = "product"  # the results' name for remat policies


def read(place: Placement, x_BxTxD: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product of [B, T, D] and a kernel [D, ...]: [B, T, ...]."""
    if place.size("fsdp") > 1:
        return checkpoint_name(_sharded(place, True, x_BxTxD, kernel), PRODUCT)
    letters = "hk" if kernel.ndim == 3 else "f"
    return project(f"btd,d{letters}->bt{letters}", x_BxTxD, kernel)


def write(place: Placement, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product of [B, T, ...] and a kernel [..., D]: [B, T, D]."""
    if place.size("fsdp") > 1:
        return checkpoint_name(_sharded(place, False, x, kernel), PRODUCT)
    letters = "hk" if kernel.ndim == 3 else "f"
    return jnp.einsum(f"bt{letters},{letters}d->btd", x, kernel)


def _project(equation: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The einsum of activations and a kernel into at least as many features.

    x is the first operand in the kernel's gradient. XLA on CPU transposes the first operand of such a product, and
    JAX's own rule puts the wider result there.
    """
    return jnp.einsum(equation, x, kernel)


def _project_forward(equation, x, kernel):
    return jnp.einsum(equation, x, kernel), (x, kernel)


def _project_backward(equation, kept, cotangent):
    x, kernel = kept
    operands, result = equation.split("->")
    first, second = operands.split(",")
    to_x = jnp.einsum(f"{result},{second}->{first}", cotangent, kernel)
    return to_x, jnp.einsum(f"{first},{result}->{second}", x, cotangent)


project = jax.custom_vjp(_project, nondiff_argnums=(0,))
project.defvjp(_project_forward, _project_backward)


def _kinds(reads: bool, kernel: jax.Array) -> tuple[str, str, str]:
    """The sharding kinds of a product's operands and result."""
    wide = "heads" if kernel.ndim == 3 else "mlp"
    return ("hidden", f"reads {wide}", wide) if reads else (wide, f"writes {wide}", "hidden")


def _matrix(reads: bool, kernel: jax.Array) -> jax.Array:
    """A kernel as [D, N], split along the first axis: its rows are then whole tiles and need no copy before sending."""
    kernel = kernel if reads else jnp.moveaxis(kernel, -1, 0)
    return kernel.reshape(len(kernel), -1)


def _times(place: Placement, reads: bool, x, kernel_DxN, shape):
    """The product on one device; shape: of the result's features."""
    x_BxTxN = x.reshape(*x.shape[:2], -1)
    if reads:
        return jnp.einsum("btd,dn->btn", x_BxTxN, kernel_DxN).reshape(*x.shape[:2], *shape)
    return place.summed(jnp.einsum("btn,dn->btd", x_BxTxN, kernel_DxN), "tensor")


def _product(place: Placement, reads: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product if fsdp splits the width. reads: the width is the kernel's first axis, else its last."""

    def local(x, kernel):
        return _times(place, reads, x, place.gathered(_matrix(reads, kernel)), kernel.shape[1:])

    *inputs, output = _kinds(reads, kernel)
    return place.split(local, tuple(inputs), output)(x, kernel)


def _sharded_forward(place, reads, x, kernel):
    return _product(place, reads, x, kernel), (x, kernel)


def _sharded_backward(place, reads, kept, cotangent):
    def local(x, kernel, cotangent):
        kernel_DxN = place.gathered(_matrix(reads, kernel))
        to_x = _times(place, not reads, cotangent, kernel_DxN, x.shape[2:])
        of_width, other = (x, cotangent) if reads else (cotangent, x)
        to_kernel = place.scattered(jnp.einsum("btd,btn->dn", of_width, other.reshape(*other.shape[:2], -1)))
        if reads:
            return to_x, to_kernel.reshape(kernel.shape)
        return to_x, jnp.moveaxis(to_kernel.reshape(-1, *kernel.shape[:-1]), 0, -1)

    into, stored, out = _kinds(reads, kept[1])
    return place.split(local, (into, stored, out), (into, stored))(*kept, cotangent)


_sharded = jax.custom_vjp(_product, nondiff_argnums=(0, 1))
_sharded.defvjp(_sharded_forward, _sharded_backward)
