"""The chunked readouts against the same functions written out with whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.lm.model.mesh import Placement, make_mesh
from steppe.lm.model.readout import Options, chunk_positions, cross_entropy, frozen_change

B, T, D, V, REAL = 3, 12, 8, 24, 21
# Each has chunks, and weights that leave out tokens and a whole sequence.
OPTIONS = {
    "plain": Options(REAL, 4),
    "one chunk": Options(REAL, T),
    "everything": Options(REAL, 3, z_loss=0.05, soft_cap=2.0, smoothing=0.2),
}


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def problem(dtype):
    keys = jax.random.split(jax.random.key(0), 6)
    kernel, other_kernel = (jax.random.normal(k, (V, D), dtype) for k in keys[:2])
    hidden, other_hidden = (jax.random.normal(k, (B, T, D), dtype) for k in keys[2:4])
    targets = jax.random.randint(keys[4], (B, T), 0, REAL)
    weights = jax.random.uniform(keys[5], (B, T)).at[0, :5].set(0).at[2].set(0).astype(dtype)
    return kernel, other_kernel, hidden, other_hidden, targets, weights


def direct_loss(options, logits, targets, weights):
    logits = logits[..., : options.vocabulary]
    if options.soft_cap:
        logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    log_p = logits - log_z[..., None]
    correct = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    token = -(1 - options.smoothing) * correct - options.smoothing * log_p.mean(-1) + options.z_loss * log_z**2
    return jnp.sum(weights * token) / jnp.sum(weights > 0)


def close(a, b, dtype):
    # The two differ in the order of sums only; relative to the largest entry.
    tolerance = 1e-10 if dtype == "float64" else 1e-5
    scale = float(jnp.max(jnp.abs(b)))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", OPTIONS)
def test_loss_and_gradient_equal_the_direct_form(name, dtype):
    options = OPTIONS[name]
    kernel, _, hidden, _, targets, weights = problem(dtype)

    def chunked(kernel, hidden):
        return cross_entropy(options, kernel, hidden, targets, weights)[0]

    def direct(kernel, hidden):
        return direct_loss(options, jnp.einsum("btd,vd->btv", hidden, kernel), targets, weights)

    got = jax.value_and_grad(chunked, argnums=(0, 1))(kernel, hidden)
    want = jax.value_and_grad(direct, argnums=(0, 1))(kernel, hidden)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(a, b, dtype)
    assert np.all(np.asarray(got[1][0])[REAL:] == 0)  # padded rows are never pulled


@pytest.mark.parametrize("name", OPTIONS)
def test_functional_readout_equals_the_direct_vjp(name, dtype):
    options = OPTIONS[name]
    kernel, other_kernel, hidden, other_hidden, targets, weights = problem(dtype)

    def logits(kernel, hidden):
        return jnp.einsum("btd,vd->btv", hidden, kernel)

    at_anchor = logits(kernel, hidden)
    derivative = jax.grad(lambda z: direct_loss(options, z, targets, weights))(at_anchor)
    elsewhere, pull = jax.vjp(logits, other_kernel, other_hidden)
    want = jnp.sum(derivative * (elsewhere - at_anchor)), pull(derivative)

    def chunked(k, h):
        return frozen_change(options, k, h, (kernel, hidden, None), targets, weights)

    got = jax.value_and_grad(chunked, argnums=(0, 1))(other_kernel, other_hidden)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(a, b, dtype)


@pytest.mark.parametrize("name", OPTIONS)
def test_kept_derivative_gives_the_rebuilt_one(name, dtype):
    options = OPTIONS[name]._replace(keep=True, kept_dtype=dtype)
    kernel, other_kernel, hidden, other_hidden, targets, weights = problem(dtype)

    def clean(kernel):
        loss, _, kept = cross_entropy(options, kernel, hidden, targets, weights)
        return loss, kept

    (_, kept), _ = jax.value_and_grad(clean, has_aux=True)(kernel)

    def change(kept):
        def frozen(k, h):
            return frozen_change(options, k, h, (kernel, hidden, kept), targets, weights)

        return jax.value_and_grad(frozen, argnums=(0, 1))(other_kernel, other_hidden)

    for a, b in zip(jax.tree.leaves(change(kept)), jax.tree.leaves(change(None)), strict=True):
        close(a, b, dtype)


@pytest.mark.parametrize("keep", [False, True])
def test_in_bfloat16_the_frozen_readout_is_zero_where_nothing_has_moved(keep):
    """Its value is taken of the derivative that its gradient is taken of; of the exact one it would be off by 1e-3."""
    rows, tokens, width, entries = 4, 64, 32, 259
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = jax.random.normal(keys[0], (264, width)).astype(jnp.bfloat16)
    hidden = jax.random.normal(keys[1], (rows, tokens, width)).astype(jnp.bfloat16)
    targets = jax.random.randint(keys[2], (rows, tokens), 0, entries)
    options, weights = Options(entries, 16, keep=keep, kept_dtype="bfloat16"), jnp.ones((rows, tokens))
    loss, _, kept = cross_entropy(options, kernel, hidden, targets, weights)
    fixed = (kernel, hidden, kept if keep else None)
    value = frozen_change(options, kernel, hidden, fixed, targets, weights)
    assert loss > 5
    assert abs(float(value)) < 2e-6 * float(loss)  # float32 sums in two orders


def test_hessian_vector_product_through_the_custom_gradient():
    """Forward over reverse, as penalty_sam and the curvature products take it."""
    with jax.enable_x64(True):
        options = OPTIONS["everything"]
        kernel, direction_k, hidden, direction_h, targets, weights = problem("float64")

        def chunked(k, h):
            return cross_entropy(options, k, h, targets, weights)[0]

        def direct(k, h):
            return direct_loss(options, jnp.einsum("btd,vd->btv", h, k), targets, weights)

        got, want = (
            jax.jvp(jax.grad(f, argnums=(0, 1)), (kernel, hidden), (direction_k, direction_h))[1]
            for f in (chunked, direct)
        )
        for a, b in zip(got, want, strict=True):
            close(a, b, "float64")


def test_per_sequence_losses_average_to_the_loss():
    kernel, _, hidden, _, targets, _ = problem("float32")
    weights = jnp.ones((B, T)).at[1, 3:].set(0)
    loss, per_sequence, _ = cross_entropy(OPTIONS["plain"], kernel, hidden, targets, weights)
    counts = np.array([12, 3, 12])
    np.testing.assert_allclose((per_sequence * counts).sum() / counts.sum(), loss, rtol=1e-6)  # order of sums


def test_a_batch_without_tokens_is_zero_not_nan():
    kernel, _, hidden, _, targets, _ = problem("float32")
    value, gradient = jax.value_and_grad(
        lambda k: cross_entropy(OPTIONS["plain"], k, hidden, targets, jnp.zeros((B, T)))[0]
    )(kernel)
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)


def test_chunks_divide_the_sequence_and_fit():
    assert chunk_positions(512, 8, 4096) == 512
    assert chunk_positions(512, 16, 4096) == 256
    assert chunk_positions(12, 3, 20) == 6
    assert chunk_positions(7, 100, 10) == 1


def test_the_sum_of_the_weights_gradient_over_devices_may_be_rounded():
    """To bfloat16, of 8 bits: parts of four devices and their sums. The gradient of hidden states is as it was."""
    kernel, _, *four_times = problem("float32")
    hidden, _, targets, weights = (jnp.concatenate([x] * 4) for x in four_times)
    mesh = make_mesh((2, 2, 1), jax.devices()[:4])

    def gradient(dtype):
        options = OPTIONS["plain"]._replace(place=Placement(mesh, dtype))
        loss = lambda kernel, hidden: cross_entropy(options, kernel, hidden, targets, weights)[0]  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(kernel, hidden)

    exact, rounded = gradient(""), gradient("bfloat16")
    assert np.array_equal(exact[1], rounded[1])
    error = np.max(np.abs(rounded[0] - exact[0])) / np.max(np.abs(exact[0]))
    assert 1e-5 < error < 2**-7
