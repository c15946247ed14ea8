"""The trunk: its attention mask, its two styles, its kernels, its parameter paths."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import programs
from steppe.lm.model import attention
from steppe.lm.model.mesh import Placement, make_mesh
from steppe.lm.model.transformer import INITS, Shape, Trunk, lookup
from steppe.optim.masks import path_names

T = 12
STYLES = {
    "nanodo": Shape("nanodo", 2, 16, 4, 4, 32, 64, T),
    "modern": Shape("modern", 2, 16, 4, 2, 32, 64, T, qk_norm=True, tie_embeddings=False),
}


def tokens(key=0):
    return jax.random.randint(jax.random.key(key), (2, T), 0, 64)


def init(shape):
    return Trunk(shape).init(jax.random.key(1), tokens())["params"]


@pytest.mark.parametrize("style", STYLES)
def test_no_token_sees_a_later_one(style):
    params = init(STYLES[style])
    hidden = Trunk(STYLES[style]).apply({"params": params}, tokens())
    changed = Trunk(STYLES[style]).apply({"params": params}, tokens().at[:, 7].add(1) % 64)
    assert np.array_equal(hidden[:, :7], changed[:, :7])
    assert not np.array_equal(hidden[:, 7:], changed[:, 7:])


@pytest.mark.parametrize("style", STYLES)
def test_packed_documents_do_not_see_each_other(style):
    """Two documents in one row give what each gives alone, up to the order of sums in float32."""
    trunk, params = Trunk(STYLES[style]), init(STYLES[style])
    segments = jnp.array([[1] * 5 + [2] * 7] * 2)
    positions = jnp.array([[*range(5), *range(7)]] * 2)
    packed = trunk.apply({"params": params}, tokens(), positions, segments)
    alone = jnp.zeros_like(tokens()).at[:, :7].set(tokens()[:, 5:])
    np.testing.assert_allclose(packed[:, 5:], trunk.apply({"params": params}, alone)[:, :7], rtol=1e-5, atol=1e-5)


def test_modern_attention_depends_on_distance_only():
    """RoPE: moving every position by the same amount changes nothing but rounding."""
    trunk, params = Trunk(STYLES["modern"]), init(STYLES["modern"])
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))
    here, there = (trunk.apply({"params": params}, tokens(), p) for p in (positions, positions + 100))
    np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-4)  # angles near 100 lose two digits in float32


def test_parameter_paths_are_stable():
    """Sharding, decay and perturbation match on these. If this fails, old checkpoints and users' regexes break too."""
    paths = set(jax.tree.leaves(path_names(init(STYLES["nanodo"]))))
    assert paths == {
        "embed/embedding", "position/embedding", "final_norm/scale", "layers/attention_norm/scale",
        "layers/mlp_norm/scale", "layers/attention/query/kernel", "layers/attention/key/kernel",
        "layers/attention/value/kernel", "layers/attention/out/kernel", "layers/mlp/up/kernel",
        "layers/mlp/down/kernel",
    }  # fmt: skip
    modern = set(jax.tree.leaves(path_names(init(STYLES["modern"]))))
    assert modern - paths == {
        "readout/kernel", "layers/mlp/gate/kernel", "layers/attention/query_norm/scale",
        "layers/attention/key_norm/scale",
    }  # fmt: skip
    assert paths - modern == {"position/embedding"}


def test_initial_scale():
    """Hidden states of unit size, so that the first loss is near log(vocabulary)."""
    shape = STYLES["nanodo"]._replace(width=64, mlp_width=256)
    hidden = Trunk(shape).apply({"params": Trunk(shape).init(jax.random.key(0), tokens())["params"]}, tokens())
    assert 0.9 < float(jnp.std(hidden)) < 1.1


@pytest.mark.parametrize("drawn", INITS)
def test_initial_statistics_of_every_parameter(drawn):
    """Standard deviation and largest entry by hand. 3 %: of 4096 draws and more, two deviations and less."""
    D, F, L = 64, 256, 3
    shape = STYLES["modern"]._replace(width=D, mlp_width=F, layers=L, vocabulary=512, init=drawn, qk_norm=False)
    positions = STYLES["nanodo"]._replace(width=D, mlp_width=F, layers=L, sequence_length=128, init=drawn)
    params = jax.tree.map(np.asarray, {**init(positions), **init(shape)})
    cut = 0.98658  # the standard deviation of a normal cut at three

    def fan_in(size, out, ends=False):
        if drawn == "nanodo":
            bound = (6 / (size + out)) ** 0.5
            return bound / 3**0.5, bound
        scale = (1 / size / (2 * L if ends else 1)) ** 0.5
        return cut * scale, 3 * scale

    table = (D**-0.5, 6 * D**-0.5) if drawn == "nanodo" else (cut * D**-0.5, 3 * D**-0.5)
    kv = shape.kv_heads * D // shape.heads
    mixing, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    for array, (deviation, most) in [
        (params["embed"]["embedding"], table),
        (params["position"]["embedding"], table),
        (params["readout"]["kernel"], table),
        (mixing["query"]["kernel"], fan_in(D, D)),
        (mixing["key"]["kernel"], fan_in(D, kv)),
        (mixing["value"]["kernel"], fan_in(D, kv)),
        (mixing["out"]["kernel"], fan_in(D, D, ends=True)),
        (mlp["up"]["kernel"], fan_in(D, F)),
        (mlp["gate"]["kernel"], fan_in(D, F)),
        (mlp["down"]["kernel"], fan_in(F, D, ends=True)),
    ]:
        assert np.std(array) == pytest.approx(deviation, rel=0.03)
        assert abs(np.mean(array)) < 0.05 * deviation
        # The bound of the draw is nearly reached; a normal that is not cut goes beyond three deviations, not to six.
        assert 0.9 * min(most, 3.3 * deviation) < np.max(np.abs(array)) <= most * (1 + 1e-6)
    scales = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "scale" in str(path)]
    assert all(np.all(leaf == 1) for leaf in scales)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(
    ("kernel", "lean"),
    [("blockwise", True), pytest.param("blockwise", False, marks=pytest.mark.exhaustive), ("einsum", True)],
)
def test_attention_by_blocks_equals_one_einsum(kernel, lean, segmented, monkeypatch):
    monkeypatch.setattr(attention, "query_block", lambda length: 8)
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 20, 4, 8))
    key, value = (jax.random.normal(k, (2, 20, 2, 8)) for k in keys[1:])
    segments = jnp.array([[1] * 9 + [2] * 11] * 2) if segmented else None

    def both(*chosen):
        def total(q, k, v):
            return jnp.sum(jnp.sin(attention.attention(q, k, v, segments, chosen[0], lean=chosen[1])))

        return jax.value_and_grad(total, argnums=(0, 1, 2))(query, key, value)

    for a, b in zip(jax.tree.leaves(both(kernel, lean)), jax.tree.leaves(both("einsum", False)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # order of sums


def test_blockwise_attention_at_8k_tokens_never_holds_a_square_of_them():
    T = 8192
    shape = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)

    def most(kernel):
        """Elements of the largest array of the forward and backward pass."""
        both = jax.grad(lambda *qkv: jnp.sum(attention.attention(*qkv, None, kernel) ** 2), argnums=(0, 1, 2))
        return max(map(math.prod, programs.array_shapes(jax.jit(both).lower(shape, shape, shape).compile().as_text())))

    assert most("einsum") >= T * T  # so the test can fail
    assert most("blockwise") <= attention.query_block(T) * T


def test_grouped_queries_share_keys_as_repeated_ones_would():
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, T, 4, 8))
    key, value = (jax.random.normal(k, (2, T, 2, 8)) for k in keys[1:])
    grouped = attention.attention(query, key, value)
    repeated = attention.attention(query, jnp.repeat(key, 2, axis=2), jnp.repeat(value, 2, axis=2))
    np.testing.assert_allclose(grouped, repeated, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_memory_not_numbers(remat):
    params = init(STYLES["nanodo"])

    def gradient(remat):
        trunk = Trunk(STYLES["nanodo"]._replace(remat=remat))
        return jax.jit(jax.grad(lambda p: jnp.sum(trunk.apply({"params": p}, tokens()) ** 3)))(params)

    for a, b in zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(gradient("none")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)  # recomputed in another order


@pytest.mark.parametrize(("style", "kernel"), [("nanodo", "einsum"), ("modern", "blockwise")])
@jax.enable_x64(True)  # here alone: the fixture would leave the rest of the module in double precision
def test_small_models_compute_what_looped_ones_do(style, kernel):
    """Unrolled blocks and lean attention: the same hidden states, gradient and product with the Hessian."""
    looped = STYLES[style]._replace(dtype="float64", kernel=kernel)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), init(looped))
    along = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=jnp.float64)).reshape(leaf.shape), params)

    def all_of(shape):
        gradient = jax.value_and_grad(lambda p: jnp.sum(jnp.sin(Trunk(shape).apply({"params": p}, tokens()))))
        return jax.jit(lambda p: jax.jvp(gradient, (p,), (along,)))(params)

    for a, b in zip(*(jax.tree.leaves(all_of(looped._replace(small=small))) for small in (False, True)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_choice_of_kernel():
    assert attention.choose("auto", "cpu", 256, "float32", segmented=False) == "einsum"
    assert attention.choose("auto", "cpu", 512, "float32", segmented=False) == "blockwise"
    assert attention.choose("auto", "gpu", 512, "bfloat16", segmented=False) == "cudnn"
    assert attention.choose("auto", "gpu", 512, "bfloat16", segmented=True) == "blockwise"
    assert attention.choose("auto", "tpu", 512, "bfloat16", segmented=True) == "splash"
    assert attention.choose("auto", "tpu", 500, "bfloat16", segmented=False) == "blockwise"
    assert attention.choose("auto", "tpu", 512, "bfloat16", segmented=False, second_order=True) == "blockwise"
    with pytest.raises(attention.NoKernel, match=r"needs a GPU.*use auto"):
        attention.choose("cudnn", "cpu", 512, "bfloat16", segmented=False)


def test_table_lookup_is_the_plain_gather_and_its_gradient():
    """On a mesh whose tensor axis splits the rows: the forward bit for bit, the gradient up to the order of sums."""
    place = Placement(make_mesh((2, 2, 2)))
    table = jax.random.normal(jax.random.key(0), (16, 8))
    ids = jax.random.randint(jax.random.key(1), (4, 6), 0, 16)
    direction = jax.random.normal(jax.random.key(2), (4, 6, 8))
    for kind, positions in (("table", ids), ("positions", ids)):
        got, pull = jax.vjp(jax.jit(lambda t, k=kind, p=positions: lookup(place, k, "float32", t, p)), table)
        want, plain_pull = jax.vjp(lambda t, p=positions: t[p], table)
        assert np.array_equal(got, want)
        np.testing.assert_allclose(pull(direction)[0], plain_pull(direction)[0], rtol=1e-6, atol=1e-6)
