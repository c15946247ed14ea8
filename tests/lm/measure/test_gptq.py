"""GPTQ against the rule it stands for, written out in double precision, and on a model."""

import collections
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import lm_runs
from steppe.data import cache, loader
from steppe.lm.measure import disturb, gptq
from steppe.lm.parts.assembly import assemble, batch_reader
from steppe.lm.parts.state import create


def by_elimination(w, gram, bits, group):
    """Optimal Brain Quantisation in a fixed order: round an input, let those left make up for it, forget it."""
    w, half = np.array(w, np.float64), 2 ** (bits - 1)
    gram = np.array(gram, np.float64)
    gram = gram + np.diag(np.where(np.diag(gram) > 0, gptq.DAMPING * np.mean(np.diag(gram)), 1.0))
    inputs = w.shape[1]
    size = min(group, inputs) or inputs
    for i in range(inputs):
        if i % size == 0:
            scale = np.abs(w[:, i : i + size]).max(1) / (half - 0.5)
            scale = np.where(scale > 0, scale, 1)
        inverse = np.linalg.inv(gram[i:, i:])
        rounded = np.clip(np.rint(w[:, i] / scale * (1 + 1e-6)), -half, half - 1) * scale
        w[:, i + 1 :] -= np.outer((w[:, i] - rounded) / inverse[0, 0], inverse[0, 1:])
        w[:, i] = rounded
    return w


def problem(outputs=5, inputs=12, tokens=60):
    random = np.random.default_rng(0)
    mixing = random.normal(size=(inputs, inputs)) / 2 + np.eye(inputs)
    x = random.normal(size=(tokens, inputs)) @ mixing
    return random.normal(size=(outputs, inputs)).astype(np.float32), (x.T @ x).astype(np.float32)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group", [0, 4, 5, 100])
def test_it_is_elimination_input_by_input(bits, group):
    w, gram = problem()
    found = gptq.quantise_rows(w, gram, bits, group)
    np.testing.assert_allclose(found, by_elimination(w, gram, bits, group), rtol=1e-4, atol=1e-5)  # float32 inverse


def test_inputs_that_do_not_go_together_are_rounded_to_the_nearest():
    w, gram = problem()
    found = gptq.quantise_rows(w, np.diag(np.diag(gram)), 4)
    np.testing.assert_allclose(found, disturb.quantise_array(jnp.asarray(w), 4, (1,)), rtol=1e-6)


def test_what_is_never_read_does_no_harm():
    w, gram = problem()
    gram[3], gram[:, 3] = 0, 0
    assert np.isfinite(gptq.quantise_rows(w, gram, 3)).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(parts, parameters, training batches) of a model of two layers on eight devices."""
    place = tmp_path_factory.mktemp("corpus")
    (place / "train.txt").write_text(pathlib.Path(os.__file__).read_text()[:9_000])
    (place / "val.txt").write_text(pathlib.Path(os.__file__).read_text()[9_000:10_000])
    config = lm_runs.config(str(place), str(place / "cache"), model__style="modern")
    corpus = loader.open_corpus(cache.ensure(config.data))
    parts = assemble(config, corpus.tokenizer.vocab_size, corpus.epoch_tokens)
    read = batch_reader(config, corpus, parts, lambda step: step)
    return parts, create(parts.mesh, parts.initialise).params, [read(0), read(1)]


def test_grams_are_of_what_each_matrix_is_multiplied_with(model):
    parts, params, batches = model
    layers = gptq.layers_of(parts)
    first, second = (jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"]) for n in range(2))
    entered = layers.advance(first, layers.enter(params, batches[0]), batches[0])
    found = layers.grams(second, entered, batches[0])
    matrices = {f"layers/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert set(found) == matrices | {f"layers/mlp/{name}/kernel" for name in ("up", "gate", "down")}
    tokens, width = float(jnp.sum(batches[0]["weights"] > 0)), parts.shape.width
    for name in ("attention/query", "attention/key", "mlp/up", "mlp/gate"):  # after an RMSNorm of scale one
        assert np.trace(found[f"layers/{name}/kernel"]) == pytest.approx(tokens * width, rel=1e-3)
    assert found["layers/mlp/down/kernel"].shape == (parts.shape.mlp_width, parts.shape.mlp_width)


def test_a_model_keeps_more_of_its_outputs_than_when_rounded_to_the_nearest(model):
    parts, params, batches = model
    trunk = jax.jit(parts.objective.trunk)
    plain = jax.jit(disturb.quantise, static_argnums=(1, 2, 3))(params, 3, 0, False)
    called = collections.Counter()

    def counted(name, program):
        return lambda *given: called.update([name]) or program(*given)

    layers = gptq.layers_of(parts)._asdict()
    layers = gptq.Layers(**{name: counted(name, program) for name, program in layers.items()})
    made_up = gptq.quantise(params, layers, batches, 3)
    assert called == {"enter": 2, "grams": 4, "advance": 4}  # two batches, two layers: the text goes through twice
    off = [
        sum(float(jnp.sum((trunk(other, b) - trunk(params, b)) ** 2)) for b in batches) for other in (plain, made_up)
    ]
    assert off[1] < 0.9 * off[0]  # inputs of fresh weights hardly go together; 0.80 here
    before, after = (jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (params, made_up))
    assert before == after
    np.testing.assert_array_equal(made_up["embed"]["embedding"], params["embed"]["embedding"])
    kernel = np.asarray(made_up["layers"]["mlp"]["up"]["kernel"])
    assert all(len(np.unique(kernel[0, :, output].round(6))) <= 7 for output in range(kernel.shape[-1]))
