"""What only a GPU can show: its kernels against einsum, and the methods' steps in bfloat16.

JAX_PLATFORMS=cuda python -m pytest -m gpu
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.configs import base, sizes
from steppe.lm.model import attention
from steppe.lm.parts.state import create
from steppe.lm.parts.step import with_scalars
from steppe.scripts.plan.compiled import compiled_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU, and JAX_PLATFORMS=cuda"),
]


def _both(kernel, dtype, arrays, segments):
    def total(*qkv):
        return jnp.sum(jnp.sin(attention.attention(*qkv, segments, kernel).astype(jnp.float32)))

    found = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*(array.astype(dtype) for array in arrays))
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found)]


@pytest.mark.parametrize(
    ("kernel", "segmented"),
    [("cudnn", False), ("blockwise", False), ("blockwise", True), ("einsum", False), ("einsum", True)],
)
def test_kernels_against_einsum_in_float32(kernel, segmented):
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (2, 512, 8, 64)) for key in keys]
    segments = jnp.repeat(jnp.array([[1, 2, 3, 4]] * 2), 128, axis=1) if segmented else None
    exact = _both("einsum", jnp.float32, arrays, segments)
    for a, b in zip(_both(kernel, jnp.bfloat16, arrays, segments)[1:], exact[1:], strict=True):
        # bfloat16 keeps 8 bits: operands, weights and results are each rounded to 2^-9 of themselves
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


@pytest.mark.parametrize("method", ["adamw", "sam", "functional_sam:rebuild", "functional_sam:keep", "msam"])
def test_a_step_of_the_24m_model_learns_in_bfloat16(method):
    config = base.get_config()
    config.model.size = "24m"
    config.optim.method, _, readout = method.partition(":")
    sizes.resolve(config)
    config.model.update(compute_dtype="bfloat16", functional_readout=readout or "auto")
    config.train.batch_size, config.data.sequence_length = 8, 512
    config.mesh.update(data=1, fsdp=1, tensor=1)
    config.optim.update(warmup="0 steps", peak_learning_rate=1e-3)
    parts, program = compiled_step(config, 32_128, 10**9, jax.devices()[:1])
    step, state = with_scalars(program, parts), create(parts.mesh, parts.initialise)
    numbers = jax.random.randint(jax.random.key(1), (8, 513), 0, 32_000)
    batch = {"inputs": numbers[:, :-1], "targets": numbers[:, 1:], "weights": jnp.ones((8, 512), jnp.float32)}
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch, np.float32(np.inf))
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 1, "it learns one batch by heart"
