"""Every program of a run lowers for TPU and GPU meshes of eight, with the attention kernel that it would take there."""

import jax
import jax.numpy as jnp
import pytest

from helpers.optim_problems import telling
from helpers.programs import LENGTH, PLATFORMS, VOCABULARY, batch_of, curvature_calls, parts_on
from steppe.lm.measure import disturb
from steppe.lm.measure.evaluate import make_evaluation_step
from steppe.lm.parts import state as states
from steppe.lm.parts.step import lower_step
from steppe.lm.run.generate import make_decoder
from steppe.optim import methods

each_platform = pytest.mark.parametrize("platform", ["tpu", pytest.param("cuda", marks=pytest.mark.exhaustive)])


def lower(platform: str, function, *arguments, **options) -> str:
    """The text of a program lowered for a platform; fails where it cannot be."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return jitted.trace(*arguments, **options).lower(lowering_platforms=(platform,)).as_text()


def kernels(text: str) -> int:
    """Calls of splash's kernel in a program."""
    return text.count("tpu_custom_call")


# Every way through the model on TPU, where a kernel is opaque to the partitioner, and two on GPU: a method's ascent
# calls none. All of both: pytest -m exhaustive.
SOME = {"tpu": {*telling("first", "second")}, "cuda": {"functional_sam", "penalty_sam"}}
STEPS = [
    pytest.param(platform, name, marks=[] if name in SOME[platform] else pytest.mark.exhaustive)
    for platform in PLATFORMS
    for name in methods.METHODS
]


@pytest.mark.parametrize(("platform", "method"), STEPS)
def test_the_step_of_every_method(platform, method):
    k = {"optim__k": 2} if method == "k_sam" else {}  # sequences of a shard
    parts = parts_on(platform, method, **k)
    text = lower_step(parts, batch_of(parts), platforms=(platform,)).as_text()
    assert (kernels(text) > 0) == (parts.shape.kernel == "splash")


@pytest.mark.parametrize("switches", [
    pytest.param({"train__microbatches": 2}, marks=pytest.mark.exhaustive),  # as two of those below have it
    {"optim__ascent_over": "subset", "optim__ascent_fraction": 0.3},  # 2.4 rows of 8, on 4 shards
    {"optim__ascent_over": "subset", "optim__ascent_fraction": 0.75, "train__microbatches": 2},
    {"optim__ascent_over": "microbatch", "train__microbatches": 2},
    {"optim__every": 2, "optim__start": "10%"},
    {"data__packing": "bestfit"},
    pytest.param({"optim__base": "soap"}, marks=pytest.mark.exhaustive),
    {
        "optim__base": "schedule_free", "average__weights": ("ema", "lawa"),
        "model__parametrisation": "mup", "model__base_width": 8,
    },
])  # fmt: skip
def test_the_step_with_switches(switches):
    parts = parts_on("tpu", "functional_sam", rows=16, **switches)
    packed = {"segments": jnp.int32, "positions": jnp.int32} if "data__packing" in switches else {}
    assert kernels(lower_step(parts, batch_of(parts, 16, **packed), platforms=("tpu",)).as_text()) > 0


@pytest.mark.parametrize("platform", PLATFORMS)
def test_creation_evaluation_and_sampling(platform):
    parts = parts_on(platform)
    places = states.shardings(parts.mesh, jax.eval_shape(parts.initialise))
    lower(platform, jax.jit(parts.initialise.func, out_shardings=places), *parts.initialise.args)
    params, batch = parts.abstract.params, batch_of(parts, bytes=jnp.int32)
    text = lower(platform, make_evaluation_step(parts), params, batch)
    assert (kernels(text) > 0) == (platform == "tpu")
    decoder, ids = make_decoder(parts.shape, VOCABULARY, parts.mesh), jax.ShapeDtypeStruct((3,), jnp.int32)
    window, keys = jax.ShapeDtypeStruct((3, LENGTH), jnp.int32), jax.random.split(jax.random.key(0), 3)
    _, cache = jax.eval_shape(decoder.first.__wrapped__, params, window, ids, keys, jnp.float32(0.5))
    for program, *arguments in (
        (decoder.first, window, ids),
        (decoder.next, cache, ids, ids),
        (decoder.again, window, ids),
    ):
        assert kernels(lower(platform, program, params, *arguments, keys, jnp.float32(0.5))) == 0


@pytest.mark.exhaustive  # thirty programs
@pytest.mark.parametrize("platform", PLATFORMS)
def test_curvature(platform):
    for program, *arguments in curvature_calls(parts_on(platform)):
        lower(platform, program, *arguments)


@each_platform
def test_retention(platform):
    parts = parts_on(platform, optim__schedule="constant")
    made, params = disturb.programs(parts), parts.abstract.params
    lower(platform, made.evaluate, params, batch_of(parts, bytes=jnp.int32))
    lower(platform, made.noise, params, 0, 0.1)
    lower(platform, made.quantise, params, 4, 0, False)
    lower(platform, made.layers.enter, params, batch_of(parts))
    entered = jax.eval_shape(made.layers.enter, params, batch_of(parts))
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params["layers"])
    lower(platform, made.layers.grams, layer, entered, batch_of(parts))
    assert (kernels(lower(platform, made.layers.advance, layer, entered, batch_of(parts))) > 0) == (platform == "tpu")
    lower(platform, made.start, params)
    assert (kernels(lower(platform, made.step, parts.abstract, batch_of(parts), 0.1)) > 0) == (platform == "tpu")
