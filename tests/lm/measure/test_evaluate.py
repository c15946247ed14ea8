"""Held-out loss against a sum written out, and sampling against the model's own probabilities."""

import functools
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import lm_runs
from steppe.data import baselines, cache, loader
from steppe.lm.measure.evaluate import evaluate, held_out, make_evaluation_step
from steppe.lm.parts.assembly import assemble
from steppe.lm.parts.state import create
from steppe.lm.run.generate import generate, make_decoder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(config, corpus, parts, state) of an untrained model with every extra of the loss switched on."""
    place = tmp_path_factory.mktemp("corpus")
    source = pathlib.Path(os.__file__).read_text()
    (place / "train.txt").write_text(source[:9_000])
    (place / "val.txt").write_text(source[9_000:10_000])
    config = lm_runs.config(
        str(place), str(place / "cache"), model__z_loss=0.1, model__label_smoothing=0.1, model__logit_soft_cap=5.0
    )
    corpus = loader.open_corpus(cache.ensure(config.data))
    parts = assemble(config, corpus.tokenizer.vocab_size, corpus.epoch_tokens, devices=jax.devices()[:1])
    return config, corpus, parts, create(parts.mesh, parts.initialise)


def logits(parts, params, inputs):
    return _logits(parts.objective.trunk, parts.options.vocabulary, params, inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(trunk, vocabulary, params, inputs):
    return 5 * jnp.tanh(trunk(params, {"inputs": inputs}) @ params["embed"]["embedding"].T / 5)[..., :vocabulary]


def test_held_out_loss_is_plain_cross_entropy_over_every_token_once(run):
    _, corpus, parts, state = run
    step = make_evaluation_step(parts)
    found = evaluate(step, state.params, held_out(corpus, "val", parts.mesh, 5))  # the last batch is padded
    nats = 0.0
    text = (pathlib.Path(corpus.directory).parents[1] / "val.txt").read_bytes()
    ids = np.array([b + 3 for b in text] + [1])
    before = np.concatenate([[0], ids[:-1]])
    for start in range(0, len(ids), 16):
        inputs = np.zeros(16, np.int32)
        piece = before[start : start + 16]
        inputs[: len(piece)] = piece
        log_p = jax.nn.log_softmax(logits(parts, state.params, inputs[None])[0])
        nats -= float(log_p[np.arange(len(piece)), ids[start : start + 16]].sum())
    assert found["tokens"] == len(ids)
    assert found["bytes"] == len(text)
    assert found["loss"] == pytest.approx(nats / len(ids), rel=1e-5)  # order of sums in float32
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    first = evaluate(step, state.params, held_out(corpus, "val", parts.mesh, 5, 1))
    assert first["tokens"] == 5 * 16


def test_greedy_sampling_follows_the_most_likely_token(run):
    _, corpus, parts, state = run
    decoder = make_decoder(parts.shape, corpus.tokenizer.vocab_size, parts.mesh, 5.0)
    drawn = {"tokens": 12, "temperature": 0.0, "seed": 0}
    (text,) = generate(decoder, state.params, corpus.tokenizer, ["import os"], **drawn)
    ids = [0, *corpus.tokenizer.encode("import os")]
    for _ in range(12):  # past the window of 16, so that it slides
        window = np.zeros((1, 16), np.int32)
        window[0, : len(ids[-16:])] = ids[-16:]
        best = int(jnp.argmax(logits(parts, state.params, window)[0, len(ids[-16:]) - 1]))
        if best == corpus.tokenizer.eos_id:
            break
        ids.append(best)
    assert text == "import os" + corpus.tokenizer.decode(ids[10:])


@pytest.mark.parametrize(
    "model",
    [pytest.param({}, marks=pytest.mark.exhaustive), {"style": "modern", "heads": 4, "kv_heads": 2, "qk_norm": True}],
)
def test_kept_keys_and_values_change_no_token_nor_do_neighbours(tmp_path, model):
    """Prompts of all lengths at once, some sliding past the window of 48, against each alone and without a cache."""
    config = lm_runs.config(
        *lm_runs.write_text(tmp_path), data__sequence_length=48, **{f"model__{name}": v for name, v in model.items()}
    )
    corpus = loader.open_corpus(cache.ensure(config.data))
    parts = assemble(config, corpus.tokenizer.vocab_size, corpus.epoch_tokens, devices=jax.devices()[:1])
    params = jax.tree.map(lambda leaf: 2 * leaf, create(parts.mesh, parts.initialise).params)
    decoder = make_decoder(parts.shape, corpus.tokenizer.vocab_size, parts.mesh)
    prompts = ["", "import os", "x" * 30, "y" * 47, "z" * 60]
    for temperature in (0.0, 1.0):
        drawn = {"tokens": 25, "temperature": temperature}
        together = generate(decoder, params, corpus.tokenizer, prompts[:3], seed=7, **drawn)
        for row, prompt in enumerate(prompts):
            (alone,) = generate(decoder, params, corpus.tokenizer, [prompt], seed=7 + row, **drawn)
            (slow,) = generate(decoder, params, corpus.tokenizer, [prompt], seed=7 + row, cache=False, **drawn)
            assert alone == slow
            assert row >= 3 or alone == together[row]


def test_baselines_of_a_text_that_can_be_computed_by_hand(run):
    _, corpus, _, _ = run
    counts = baselines.token_counts(corpus, corpus.tokenizer.vocab_size)
    text = (pathlib.Path(corpus.directory).parents[1] / "train.txt").read_bytes()
    assert counts.sum() == len(text) + 1
    assert counts[ord("e") + 3] == text.count(b"e")
    found = baselines.baselines(corpus, "val", counts)
    smoothed = (counts + 1) / (counts + 1).sum()
    held_out = (pathlib.Path(corpus.directory).parents[1] / "val.txt").read_bytes()
    bits = -sum(math.log2(smoothed[b + 3]) for b in held_out) - math.log2(smoothed[1])
    assert found["unigram"] == pytest.approx(bits / len(held_out))
    assert 1 < found["gzip"] < found["unigram"]
