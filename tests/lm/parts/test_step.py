"""The step on a small Transformer: rho = 0 is AdamW bit for bit, and every mesh gives the single-device run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import lm_runs
from steppe.lm.model.mesh import batch_sharding, local_rows, place_batch
from steppe.lm.model.objective import objective
from steppe.lm.parts.anomaly import UPDATE
from steppe.lm.parts.assembly import assemble
from steppe.lm.parts.state import create, start
from steppe.lm.parts.step import compile_step, lower_step, make_step
from steppe.optim.base import base

METHODS = ("sam", "functional_sam", "logit_sam", "precond_sam", "precond_functional_sam")
VOCABULARY = 50


def trajectory(steps, devices=1, **overrides):
    """(losses, final parameters) of `steps` steps on random tokens."""
    config = lm_runs.config("unused", "unused", **overrides)
    parts = assemble(config, VOCABULARY, 10**6, devices=jax.devices()[:devices])
    step = jax.jit(make_step(parts.objective, parts.optimizer), donate_argnums=0)
    state, losses = create(parts.mesh, parts.initialise), []
    rows = local_rows(parts.mesh, config.train.batch_size)
    for index in range(steps):
        tokens = np.asarray(jax.random.randint(jax.random.key(index), (config.train.batch_size, 17), 0, VOCABULARY))
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((len(tokens), 16), np.float32)}
        batch["weights"][0, 5:] = 0  # unequal sequences, so that microbatches carry unequal weight
        state, metrics = step(state, place_batch(parts.mesh, len(tokens), rows, batch))
        losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def adamw():
    return trajectory(20, model__vocabulary_multiple=32)


# At 0 the program is AdamW's for every method: optim/test_contract.py.
ZERO = [(method, rho) for method in METHODS for rho in (0.0, 1e-30)]
TOLD = {("precond_functional_sam", 0.0), ("precond_functional_sam", 1e-30), ("sam", 1e-30)}


@pytest.mark.parametrize(("method", "rho"), [
    pytest.param(*case, marks=[] if case in TOLD else pytest.mark.exhaustive) for case in ZERO
])  # fmt: skip
def test_rho_zero_is_adamw_bit_for_bit(method, rho, adamw):
    """rho = 0 is the base step itself; at 1e-30 theta + epsilon rounds to theta, so both passes run and must agree.

    The second pass is another program than AdamW's, in which XLA may fuse otherwise: at 1e-30 last bits may differ
    (1e-6 a step); at rho = 0 they may not.
    """
    losses, params = trajectory(20, optim__method=method, optim__rho=rho)
    for a, b in zip(jax.tree.leaves((losses, params)), jax.tree.leaves(adamw), strict=True):
        if rho > 0:
            np.testing.assert_allclose(a, b, atol=2e-5)
        else:
            assert np.array_equal(a, b)


@pytest.mark.exhaustive  # eight programs; a worker that keeps one: scripts/sweep/test_worker.py
def test_one_program_serves_every_rho_and_learning_rate():
    """At rho = 0 the program is AdamW's own; the radius and the rate given to it act as those compiled in do."""
    batch = {
        name: jax.ShapeDtypeStruct((8, 16), jnp.float32 if name == "weights" else jnp.int32)
        for name in ("inputs", "targets", "weights")
    }

    def program(**overrides):
        config = lm_runs.config("unused", "unused", **overrides)
        parts = assemble(config, VOCABULARY, 10**6, devices=jax.devices()[:1])
        return lower_step(parts, batch).as_text(), parts

    for options in ({"optim__rho_schedule": "learning_rate"}, {}):
        options = {"optim__method": "functional_sam", **options}
        text, parts = program(optim__rho=0.1, **options)
        assert program(optim__rho=0.3, optim__peak_learning_rate=0.02, **options)[0] == text
        adamw = program(optim__rho=0.0, **options)[0]
        assert adamw != text
        assert adamw == program()[0]
    state = create(parts.mesh, parts.initialise)
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (8, 17), 0, VOCABULARY))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((8, 16), np.float32)}
    _, expected = jax.jit(make_step(parts.objective, parts.optimizer_at(0.02, 0.3)))(state, batch)
    assert expected["rho"] == np.float32(0.3)
    parts = parts._replace(scalars={"peak_learning_rate": 0.02, "rho": 0.3})
    _, given = compile_step(parts, batch)(state, batch, np.float32(np.inf))
    for name, value in expected.items():
        np.testing.assert_allclose(given[name], value, rtol=1e-5, err_msg=name)


MESHES = [(d, f, 8 // d // f) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) if 8 % (d * f) == 0]
TWO_PASS = ("sam", "functional_sam", "precond_functional_sam")
# All axes together by day. All 80 combinations: pytest -m exhaustive (20 minutes).
SOME = [((2, 2, 2), "precond_functional_sam", 4)]
ALL = [(mesh, method, parts) for mesh in MESHES for method in ("adamw", *TWO_PASS) for parts in (1, 4)]


@pytest.fixture(scope="module")
def single():
    """losses(method, microbatches) of 20 steps on one device, each computed once."""

    @functools.cache
    def losses(method, microbatches):
        return trajectory(20, **wide(method, microbatches))[0]

    return losses


def wide(method, microbatches):
    """A config whose batch and heads divide over any mesh of 8."""
    return {
        "optim__method": method, "train__microbatches": microbatches, "train__batch_size": 32, "model__heads": 8,
        "optim__rho": None if method == "adamw" else 0.05,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "method", "microbatches"), [*SOME, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ALL)]
)
def test_every_mesh_gives_the_single_device_losses(mesh, method, microbatches, single):
    """20 steps within 1e-5: float32, other order of sums."""
    data, fsdp, tensor = mesh
    overrides = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
    losses, _ = trajectory(20, 8, **wide(method, microbatches), **overrides)
    np.testing.assert_allclose(losses, single(method, microbatches), atol=1e-5)


def test_accumulation_equals_the_whole_batch(single):
    """One epsilon over four microbatches is the epsilon of the whole: 1e-5 over 20 steps, order of sums."""
    four, whole = (single("precond_functional_sam", microbatches) for microbatches in (4, 1))
    np.testing.assert_allclose(four, whole, atol=1e-5)


def test_bfloat16_compute_keeps_float32_state_and_reports_what_survives():
    config = lm_runs.config("unused", "unused", optim__method="sam", optim__rho=0.01, model__compute_dtype="bfloat16")
    parts = assemble(config, VOCABULARY, 10**6, devices=jax.devices()[:1])
    state = create(parts.mesh, parts.initialise)
    tokens = jnp.zeros((8, 16), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens + 1, "weights": jnp.ones((8, 16))}
    state, metrics = jax.jit(make_step(parts.objective, parts.optimizer))(state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert metrics["nonfinite"] == 0
    # Most entries of epsilon are below bfloat16's resolution of the weights: rounding distorts what is left.
    assert 0.1 < float(metrics["survival_cosine"]) < 0.99


def test_a_refused_step_changes_nothing_but_the_count():
    """A loss above the limit: parameters, moments and the rule's memory (friendly_sam's average) stay, bit for bit."""
    config = lm_runs.config("unused", "unused", optim__method="friendly_sam", optim__rho=0.05)
    parts = assemble(config, VOCABULARY, 10**6, devices=jax.devices()[:1])
    step = jax.jit(make_step(parts.objective, parts.optimizer))
    tokens = np.asarray(jax.random.randint(jax.random.key(0), (8, 17), 0, VOCABULARY))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((8, 16), np.float32)}
    before, metrics = step(create(parts.mesh, parts.initialise), batch, jnp.float32(jnp.inf))
    assert metrics["spike"] == 0
    after, metrics = step(before, batch, jnp.float32(metrics["loss"] - 1))
    assert metrics["spike"] == 1
    assert int(after.step) == int(before.step) + 1 == 2
    assert len(jax.tree.leaves(before.rule)) > 0
    for a, b in zip(jax.tree.leaves(after[1:]), jax.tree.leaves(before[1:]), strict=True):
        assert np.array_equal(a, b)
    moved, _ = step(before, batch, jnp.float32(jnp.inf))
    assert not all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(moved.rule), jax.tree.leaves(before.rule), strict=True)
    )


def tokens_of(step, rows=8, length=16):
    tokens = np.asarray(jax.random.randint(jax.random.key(step), (rows, length + 1), 0, VOCABULARY))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((rows, length), np.float32)}


@pytest.mark.parametrize("method", ["adamw", "functional_sam"])
def test_the_rate_and_rho_that_are_logged_are_those_applied_after_refused_steps(method):
    """Plain SGD moves by rate * |g|; the rate reaches its end, however many steps were refused on the way.

    Two steps are refused, and the run then goes back to the state before them (a rollback), whose count is older.
    """
    options = {"optim__base": "sgd", "optim__b1": 0.0, "optim__schedule": "linear", "optim__end_learning_rate": 0.25}
    options |= {"optim__clip_norm": 0.0, "optim__weight_decay": 0.0, "optim__method": method}
    if method != "adamw":
        options |= {"optim__rho": 0.05, "optim__rho_schedule": "learning_rate"}
    config = lm_runs.config("unused", "unused", **options)
    parts = assemble(config, VOCABULARY, 10**6, devices=jax.devices()[:1])
    step = jax.jit(make_step(parts.objective, parts.optimizer))
    state = saved = create(parts.mesh, parts.initialise)
    refused, rates = {5, 6, 12}, []
    script = [*range(9), "back", *range(4, 20)]
    for number in script:
        if number == "back":
            state = saved
            continue
        if number == 4:
            saved = state
        before = state
        state, metrics = step(state, tokens_of(number), np.float32(-1 if number in refused else np.inf))
        assert int(before.step) == number
        assert metrics["spike"] == (number in refused)
        # two float32 roundings: a compiled schedule may multiply in another order than one that runs op by op
        assert metrics["learning_rate"] == pytest.approx(float(parts.optimizer.learning_rate(number)), rel=2.4e-7)
        moved = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b), state.params, before.params)
        length = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(moved)))
        if number in refused:
            assert length == 0
        elif method == "adamw":  # 1e-4: a difference of float32 parameters
            assert length == pytest.approx(float(metrics["learning_rate"] * metrics["gradient_norm"]), rel=1e-4)
        else:
            assert metrics["rho"] == pytest.approx(0.05 * float(metrics["learning_rate"]) / 0.01, rel=1e-5)
            assert metrics["epsilon_norm"] == pytest.approx(float(metrics["rho"]), rel=1e-5)
        rates.append(float(metrics["learning_rate"]))
    assert rates[-1] == pytest.approx(0.0025 + 0.0075 / 16)  # of the last step, one of 16 short of the end
    assert int(state.step) == 20


def test_an_update_that_is_not_finite_changes_nothing():
    """Loss and gradient are sound, the update is not: 0 / (0 + eps) of Adam with eps 0, on rows no token has met."""
    config = lm_runs.config("unused", "unused", model__tie_embeddings=False)
    parts = assemble(config, VOCABULARY, 10**6, devices=jax.devices()[:1])
    broken = parts.optimizer._replace(base=base("adam", 0.01, eps=0.0))
    state = start(broken, create(parts.mesh, parts.initialise).params)
    after, metrics = jax.jit(make_step(parts.objective, broken))(state, tokens_of(0))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["gradient_norm"])
    assert metrics["nonfinite"] == UPDATE
    for a, b in zip(jax.tree.leaves(after[1:]), jax.tree.leaves(state[1:]), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.exhaustive  # six programs on eight devices
def test_the_ascent_may_be_summed_in_bfloat16_but_nothing_else_is():
    """mesh.ascent_reduction reaches the gradient that is climbed; a base step's program does not know of it."""

    def program(method, **changes):
        config = lm_runs.config("unused", "unused", mesh__data=2, mesh__fsdp=2, mesh__tensor=2, **changes)
        parts = assemble(config, VOCABULARY, 10**6, devices=jax.devices()[:8])
        # what base.get_config refuses for the base is given to it here all the same
        parts = parts._replace(objective=objective(parts.shape, parts.options, parts.options.place, method))
        place = batch_sharding(parts.mesh)
        batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place) for k, v in tokens_of(0).items()}
        return lower_step(parts, batch).as_text()

    climbing = {"optim__method": "sam", "optim__rho": 0.05}
    assert program("bfloat16", **climbing) != program("", **climbing)
    assert program("bfloat16") == program("")
    both = {"optim__method": "gsam", "optim__rho": 0.05}  # whose gradient at theta is returned too
    assert program("bfloat16", **both) == program("", **both)


@pytest.mark.parametrize(("changes", "perturbed"), [
    ({}, 1.0),
    ({"optim__start": "50%"}, 0.5),
    ({"optim__stop": "10%"}, 0.1),
    ({"optim__every": 4}, 0.25),
    ({"optim__rho": 0.0}, 0.0),
    ({"optim__rho_schedule": "cosine"}, 0.95),  # 0 on the last of the 20 steps
])  # fmt: skip
def test_the_budget_counts_the_steps_that_perturb(changes, perturbed):
    given = {"optim__method": "sam", "optim__rho": 0.05, **changes}
    parts = assemble(lm_runs.config("unused", "unused", **given), VOCABULARY, 10**6, devices=jax.devices()[:1])
    assert parts.budget.flops / parts.budget.adamw_flops == pytest.approx(1 + perturbed)
