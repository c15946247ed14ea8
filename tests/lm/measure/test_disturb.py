"""Weight noise, quantisation and fine-tuning, against loops written out and on both meshes."""

import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import lm_runs
from steppe.data import cache, loader
from steppe.lm.measure import disturb, frontier
from steppe.lm.measure.evaluate import evaluate, held_out
from steppe.lm.parts.assembly import assemble, batch_reader
from steppe.lm.parts.state import create
from steppe.lm.parts.step import make_step
from steppe.optim.masks import path_names


@pytest.fixture(scope="module")
def corpus_and_config(tmp_path_factory):
    place = tmp_path_factory.mktemp("corpus")
    source = pathlib.Path(os.__file__).read_text()
    (place / "train.txt").write_text(source[:9_000])
    (place / "val.txt").write_text(source[9_000:10_000])
    config = lm_runs.config(str(place), str(place / "cache"), model__tie_embeddings=False)
    with config.unlocked():
        config.mesh.update(data=1, fsdp=-1)
        config.optim.update(peak_learning_rate=1.0, schedule="constant")
    return loader.open_corpus(cache.ensure(config.data)), config


def tools(corpus_and_config, devices):
    corpus, config = corpus_and_config
    parts = assemble(config, corpus.tokenizer.vocab_size, corpus.epoch_tokens, devices=devices)
    batches = list(held_out(corpus, "val", parts.mesh, 8, 4))
    return parts, disturb.programs(parts), create(parts.mesh, parts.initialise).params, batches


@pytest.fixture(scope="module")
def one(corpus_and_config):
    """(parts, programs, parameters, held-out batches) on one device."""
    return tools(corpus_and_config, jax.devices()[:1])


@pytest.fixture(scope="module")
def eight(corpus_and_config):
    return tools(corpus_and_config, jax.devices())


def named(tree):
    return dict(zip(jax.tree.leaves(path_names(tree)), jax.tree.leaves(tree), strict=True))


def by_loop(w, bits, reduced, group):
    """(rounded, scale of every entry), one entry after the other in numpy float32."""
    w = np.asarray(w)
    rounded, scales = np.zeros_like(w), np.zeros_like(w)
    half = 2 ** (bits - 1)
    kept = [axis for axis in range(w.ndim) if axis not in reduced]
    inputs = list(np.ndindex(*(w.shape[axis] for axis in reduced)))
    for channel in np.ndindex(*(w.shape[axis] for axis in kept)):
        for start in range(0, len(inputs), group or len(inputs)):
            places = []
            for entry in inputs[start : start + (group or len(inputs))]:
                place = dict(zip(kept, channel, strict=True)) | dict(zip(reduced, entry, strict=True))
                places.append(tuple(place[axis] for axis in range(w.ndim)))
            scale = max(abs(w[place]) for place in places) * np.float32(2 / (2 * half - 1)) or np.float32(1)
            for place in places:
                rounded[place] = (
                    np.float32(min(max(np.rint(w[place] / scale * np.float32(1 + 1e-6)), -half), half - 1)) * scale
                )
                scales[place] = scale
    return rounded, scales


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("group", [0, 4, 5, 1000])
@pytest.mark.parametrize(("shape", "reduced"), [((2, 12, 2, 3), (1,)), ((2, 2, 6, 5), (1, 2)), ((7, 9), (1,))])
def test_rounding_is_that_of_a_loop_bit_for_bit(bits, group, shape, reduced):
    w = np.random.default_rng(bits).normal(size=shape).astype(np.float32)
    w[0] = 0  # whole channels without a scale
    rounded, scales = by_loop(w, bits, reduced, group)
    found = jax.jit(disturb.quantise_array, static_argnums=(1, 2, 3))(w, bits, reduced, group)
    np.testing.assert_array_equal(found, rounded)
    assert (np.abs(w - rounded) <= scales / 2 * (1 + 1e-3)).all()  # also of the largest, which lies between two
    levels = np.unique(np.rint(rounded / scales))
    assert set(levels) <= set(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


@pytest.mark.parametrize("ulp", [0, 1, -1])
def test_the_largest_entry_goes_away_from_0_whatever_the_rounding_errors(ulp):
    """In 2 bits the values are s * {-2, -1, 0, 1} with s = max|w| / 1.5."""
    w = np.float32([[-1.0, 0.5, -0.5, 0.75, 0.2], [1.0, 0.5, -0.5, 0.75, 0.2]])
    w[:, 0] = np.nextafter(w[:, 0], np.float32(2 * ulp), dtype=np.float32) if ulp else w[:, 0]
    found = disturb.quantise_array(jnp.asarray(w), 2, (1,)) * 1.5
    np.testing.assert_allclose(found, [[-2, 1, -1, 1, 0], [1, 1, -1, 1, 0]], rtol=1e-6)


@pytest.mark.parametrize("tables", [False, True])
def test_every_matrix_is_rounded_and_nothing_else(one, tables):
    _, run, params, _ = one
    before, after = named(params), named(run.quantise(params, 4, 4, tables))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    matrices = {name for name in before if re.search(r"/(query|key|value|out|up|gate|down)/kernel$", name)}
    expected = matrices | ({"embed/embedding", "position/embedding", "readout/kernel"} if tables else set())
    assert changed == expected
    assert len(matrices) >= 6
    reduced = {"layers/attention/out/kernel": (1, 2)}
    for name in matrices:
        np.testing.assert_array_equal(
            after[name], by_loop(before[name], 4, reduced.get(name, (1,)), 4)[0], err_msg=name
        )
    if tables:  # a row of a table is a channel
        np.testing.assert_array_equal(after["embed/embedding"], by_loop(before["embed/embedding"], 4, (1,), 4)[0])


def test_noise_has_the_stated_size_in_every_tensor_and_the_same_draw_for_all(one):
    _, run, params, _ = one
    params = jax.tree.map(lambda w: w * (1 + jnp.arange(w.shape[0]).reshape(-1, *[1] * (w.ndim - 1))), params)
    noise = {s: jax.tree.map(jnp.subtract, run.noise(params, 7, s), params) for s in (0.25, 0.5)}
    for name, w in named(params).items():
        tensors = w if name.startswith("layers/") else w[None]
        shaken = named(noise[0.5])[name]
        for index, tensor in enumerate(tensors):
            drawn = shaken[index] if name.startswith("layers/") else shaken
            ratio = float(jnp.sqrt(jnp.mean(drawn**2) / jnp.mean(tensor**2)))
            assert abs(ratio / 0.5 - 1) < 4 / math.sqrt(2 * tensor.size), name  # four standard deviations
        np.testing.assert_allclose(shaken, 2 * named(noise[0.25])[name], atol=1e-6 * np.abs(w).max())
    # another model of the same shape gets the same draw, in units of its own size
    other = jax.tree.map(lambda w: 3 * w, params)
    twice = jax.tree.map(jnp.subtract, run.noise(other, 7, 0.5), other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 3 * b, atol=1e-5 * np.abs(a).max()), twice, noise[0.5])
    another = jax.tree.map(jnp.subtract, run.noise(params, 8, 0.5), params)
    cosine = [float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(another), jax.tree.leaves(noise[0.5]), strict=True)]
    size = sum(float(jnp.vdot(a, a)) for a in jax.tree.leaves(noise[0.5]))
    assert abs(sum(cosine)) < 0.2 * size
    # tensors of one shape are shaken differently
    drawn = named(noise[0.5])
    assert abs(np.corrcoef(np.ravel(drawn["embed/embedding"]), np.ravel(drawn["readout/kernel"]))[0, 1]) < 0.1


def test_no_noise_is_no_loss_and_eight_bits_nearly_none(one):
    _, run, params, batches = one
    found = evaluate(run.evaluate, params, batches)
    base = found["loss"]
    assert found["tokens"] == 4 * 8 * 16
    assert evaluate(run.evaluate, run.noise(params, 3, 0.0), batches)["loss"] == base
    assert evaluate(run.evaluate, run.noise(params, 3, 1.0), batches)["loss"] != base
    rounded = {bits: run.quantise(params, bits, 0, True) for bits in (2, 8)}
    loss = {bits: evaluate(run.evaluate, made, batches)["loss"] - base for bits, made in rounded.items()}
    assert 0 < abs(loss[8]) < 1e-3 * base
    assert abs(loss[2]) > 20 * abs(loss[8])


def tuned(corpus_and_config, given, rate, points=(2, 8)):
    corpus, config = corpus_and_config
    parts, run, params, batches = given
    read = batch_reader(config, corpus, parts, lambda step: step)
    before = evaluate(run.evaluate, params, batches)["loss"]
    measure = lambda p: {"gained": before - evaluate(run.evaluate, p, batches)["loss"]}  # noqa: E731
    return disturb.fine_tune(run, params, read, rate, points, measure)[0]


def test_fine_tuning_at_rate_zero_changes_nothing_and_leaves_what_it_was_given(corpus_and_config, one):
    before = jax.tree.map(np.asarray, one[2])
    assert tuned(corpus_and_config, one, 0.0) == [{"step": 2, "gained": 0.0}, {"step": 8, "gained": 0.0}]
    found = tuned(corpus_and_config, one, 0.01)
    assert found[1]["gained"] > found[0]["gained"] > 0
    jax.tree.map(np.testing.assert_array_equal, one[2], before)


def test_one_compiled_step_serves_every_rate_and_is_adamw_at_that_rate(corpus_and_config, one):
    """After three steps: the trainer's own step, built at that rate, gives the same parameters."""
    corpus, config = corpus_and_config
    _, run, params, _ = one
    plain, rate = config.copy_and_resolve_references(), 0.01
    plain.optim.peak_learning_rate = rate
    parts = assemble(plain, corpus.tokenizer.vocab_size, corpus.epoch_tokens, devices=jax.devices()[:1])
    step = jax.jit(make_step(parts.objective, parts.optimizer))
    mine, theirs = run.start(params), run.start(params)
    read = batch_reader(plain, corpus, parts, lambda step: step)
    for index in range(3):
        batch = read(index)
        (mine, metrics), (theirs, expected) = run.step(mine, batch, rate), step(theirs, batch)
    assert metrics["learning_rate"] == pytest.approx(float(expected["learning_rate"]))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), mine.params, params)
    assert max(jax.tree.leaves(moved)) > rate / 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * rate), mine.params, theirs.params)
    run.step(mine, batch, 0.5)
    assert run.step._cache_size() == 1


def test_eight_devices_measure_what_one_does(corpus_and_config, one, eight):
    """Losses within 2e-6 relative (order of sums in float32), fine-tuning within 2e-5 nats."""
    found = []
    for parts, run, params, batches in (one, eight):
        assert parts.mesh.size == len(jax.devices()) if run is eight[1] else parts.mesh.size == 1
        variants = [params, run.noise(params, 1, 0.2), run.quantise(params, 4, 4, True)]
        found.append([evaluate(run.evaluate, variant, batches)["loss"] for variant in variants])
    np.testing.assert_allclose(*found, rtol=2e-6)
    paths = [[p["gained"] for p in tuned(corpus_and_config, given, 0.01)] for given in (one, eight)]
    np.testing.assert_allclose(*paths, atol=2e-5)


def test_the_frontier_is_the_least_loss_at_a_gain():
    slow, fast = [(0.1, 0.0), (0.2, 0.1)], [(0.2, 0.3), (0.4, 0.5)]
    assert frontier.lost_at([slow, fast], 0.05) == pytest.approx(0.0)
    assert frontier.lost_at([slow, fast], 0.15) == pytest.approx(0.05)
    assert frontier.lost_at([slow, fast], 0.3) == pytest.approx(0.4)
    assert frontier.lost_at([fast], 0.1) == pytest.approx(0.15)
    assert math.isnan(frontier.lost_at([slow, fast], 0.5))
    assert frontier.lost_at([slow], -0.1) == 0.0
    overshooting = [(0.3, 0.2), (0.1, 0.9)]  # what comes after the gain is reached does not count
    assert frontier.lost_at([overshooting], 0.3) == pytest.approx(0.2)
    assert math.isnan(frontier.lost_at([[(math.nan, 0.1), (1.0, 0.0)]], 0.5))
