"""No program of a run on several CPU devices holds a collective that may overtake another: none is ever refused."""

import jax
import jax.numpy as jnp
import pytest

from helpers.programs import LENGTH, VOCABULARY, batch_of, curvature_calls, parts_on
from steppe.lm.measure import disturb, in_training
from steppe.lm.measure.evaluate import make_evaluation_step
from steppe.lm.model import hlo
from steppe.lm.parts.step import lower_step
from steppe.lm.run.generate import make_decoder
from steppe.optim import methods
from steppe.optim.base import BASES

STEPS = [
    *(pytest.param(name, {}, id=name) for name in methods.METHODS),
    *(pytest.param("functional_sam", {"optim__base": base}, id=base) for base in BASES),
    pytest.param("functional_sam", {"train__microbatches": 2}, id="microbatches"),
    pytest.param("functional_sam", {"optim__ascent_over": "subset", "optim__ascent_fraction": 0.3}, id="subset"),
    pytest.param(
        "functional_sam",
        {"model__style": "modern", "model__heads": 6, "model__kv_heads": 2, "model__width": 288, "model__layers": 6},
        id="a deep model of few keys",
    ),
    pytest.param("sam", {"optim__every": 2, "optim__start": "10%"}, id="every second step"),
]


def pairs(program, *arguments) -> list:
    return hlo.unordered(program.trace(*arguments).lower().compile().as_text())


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 8, 1), (1, 4, 2)], ids=lambda mesh: "x".join(map(str, mesh)))
@pytest.mark.parametrize(("method", "switches"), STEPS)
def test_steps(mesh, method, switches):
    k = {"optim__k": 2} if method == "k_sam" else {}
    sizes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    parts = parts_on("cpu", method, rows=16, **(sizes | switches | k))
    assert not hlo.unordered(lower_step(parts, batch_of(parts, 16)).compile().as_text())


@pytest.mark.exhaustive
@pytest.mark.parametrize("microbatches", [1, 2])
def test_measurements(microbatches):
    parts = parts_on("cpu")
    for program, *arguments in curvature_calls(parts):
        assert not pairs(program, *arguments)
    in_run = in_training.make_measurement(parts, ("norms=norm",), microbatches)
    assert not pairs(in_run, None, parts.abstract, parts.abstract.params, batch_of(parts), parts.scalars)


@pytest.mark.exhaustive
def test_evaluation_and_retention():
    parts = parts_on("cpu", optim__schedule="constant")
    made, params = disturb.programs(parts), parts.abstract.params
    assert not pairs(make_evaluation_step(parts), params, batch_of(parts, bytes=jnp.int32))
    assert not pairs(made.step, parts.abstract, batch_of(parts), 0.1)
    assert not pairs(made.along, params, batch_of(parts), params)


@pytest.mark.exhaustive
def test_sampling():
    parts = parts_on("cpu")
    params, decoder = parts.abstract.params, make_decoder(parts.shape, VOCABULARY, parts.mesh)
    ids, window = jax.ShapeDtypeStruct((3,), jnp.int32), jax.ShapeDtypeStruct((3, LENGTH), jnp.int32)
    drawn = jax.random.split(jax.random.key(0), 3), jnp.float32(0.5)
    _, cache = jax.eval_shape(decoder.first.__wrapped__, params, window, ids, *drawn)
    assert not pairs(decoder.first, params, window, ids, *drawn)
    assert not pairs(decoder.next, params, cache, ids, ids, *drawn)
    assert not pairs(decoder.again, params, window, ids, *drawn)
