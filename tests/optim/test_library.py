"""What a user of the library alone meets: aux from every method, keys in a batch, losses with nothing to freeze."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import optim_problems as problems
from steppe import optim
from steppe.optim import methods, rule
from steppe.optim.base import BASES

FROZEN = [name for name in methods.METHODS if methods.second_of(name).anchored]
NEVER_AT_THETA = {"random_sam", "msam", "precond_msam"}  # one pass, at theta + epsilon


def revealing():
    """The small language model, whose aux tells at which parameters, and of which rows, its logits are."""

    def forward(params, batch):
        logits = problems.trunk(params, batch) @ params["readout"]
        return {"logits": logits, "seen": jnp.full((), 3, jnp.int32), "params": params, "rows": batch["row"]}

    def loss(out, batch):
        value, aux = problems.token_loss(out["logits"], batch)
        return value, {**aux, **out}

    return optim.objective(forward, loss, has_aux=True, weight=problems.tokens_of)


def batch_of(rows=problems.B):
    return {**problems.batch(rows=rows), "row": jnp.arange(rows)}


def ways(name):
    """(microbatches, ascent_over, more) in which a method takes a batch; each has a branch for the base's own step."""
    yield 2, "global", {}
    if name in ("sam", "functional_sam", "k_sam", "msam"):
        yield from ((1, "global", {}), (2, "microbatch", {}))
    if name in ("sam", "functional_sam"):
        yield 2, "subset", {"ascent_fraction": 0.5}


WAYS = [(name, *way) for name in methods.METHODS for way in ways(name)]
TOLD = dict.fromkeys(problems.telling("first", "second"), 1) | {"sam": 4}  # how many of its ways: all at night


@pytest.mark.parametrize(("name", "microbatches", "over", "more"), [
    pytest.param(*each, marks=[] if each[1:] in [*ways(each[0])][: TOLD.get(each[0], 0)] else pytest.mark.exhaustive)
    for each in WAYS
])  # fmt: skip
def test_every_method_hands_back_aux_of_the_whole_batch(name, microbatches, over, more):
    params, objective, batch = problems.parameters(), revealing(), batch_of()
    base = optim.base_optimizer("adamw", 1e-2)
    state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), base.transform.init(params))
    given = {**problems.needs(name), "microbatches": microbatches, "ascent_over": over, **more}
    one = optim.method(name, base=base, start=5, **given)
    run = jax.jit(lambda step: one.gradient(objective, params, batch, state, one.init(params), step)[2])
    for step in (0, 5):
        aux = run(step)["aux"]
        whole, seen = {key: aux[key] for key in ("rows", "logits")}, aux["params"]
        if microbatches > 1:  # stacked: row i is in part i mod K
            whole = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), whole)
            seen = jax.tree.map(lambda x: x[0], seen)
            assert aux["seen"].tolist() == [3] * microbatches, step
        np.testing.assert_array_equal(whole["rows"], batch["row"], err_msg=str(step))
        at_theta = all(jax.tree.leaves(jax.tree.map(np.array_equal, seen, params)))
        beyond = name in NEVER_AT_THETA or (over == "subset" and not methods.second_of(name).anchored)
        assert at_theta == (step == 0 or not beyond), step
        if over != "microbatch" or at_theta:  # else each part is at an epsilon of its own
            wanted = problems.trunk(seen, batch) @ seen["readout"]
            np.testing.assert_allclose(whole["logits"], wanted, atol=2e-5, err_msg=str(step))


class Net(nn.Module):
    """Convolution, batch normalisation, dropout."""

    @nn.compact
    def __call__(self, images):
        x = nn.Dropout(0.3, deterministic=False)(nn.Conv(6, (3, 3), strides=2)(images))
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


def test_batch_normalisation_and_dropout_train_as_in_the_opaque_mode_of_optax():
    """What optax.contrib.sam does with gradient functions that the user closes over state and keys."""
    net, keys = Net(), jax.random.split(jax.random.key(0), 8)
    images = jax.random.normal(keys[0], (16, 8, 8, 1))
    labels = jnp.arange(16) % 10
    begin = net.init({"params": keys[1], "dropout": keys[2]}, images)
    rho, base = 0.1, optax.sgd(0.1, momentum=0.9)

    def apply(params, stats, key, x):
        variables = {"params": params, "batch_stats": stats}
        return net.apply(variables, x, rngs={"dropout": key}, mutable=["batch_stats"])

    def cross_entropy(logits):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    theirs = optax.contrib.sam(
        base, optax.chain(optax.contrib.normalize(), optax.sgd(rho)), sync_period=2, opaque_mode=True
    )

    @jax.jit
    def their_step(params, stats, state, key):
        def loss(p):
            logits, new = apply(p, stats, key, images)
            return cross_entropy(logits), (new["batch_stats"], jnp.mean(logits.argmax(-1) == labels))

        gradient, (stats, accuracy) = jax.grad(loss, has_aux=True)(params)
        updates, state = theirs.update(gradient, state, params, grad_fn=lambda p, _: jax.grad(loss, has_aux=True)(p)[0])
        return optax.apply_updates(params, updates), stats, state, accuracy

    @jax.jit
    def our_step(params, stats, state, key):
        def loss(out, batch):
            logits, new = out
            return cross_entropy(logits), (new["batch_stats"], jnp.mean(logits.argmax(-1) == labels))

        objective = optim.objective(lambda p, b: apply(p, stats, b["key"], b["image"]), loss, has_aux=True)
        sam = optim.method("sam", rho=rho)
        batch = {"image": images, "key": key}
        gradient, _, report = sam.gradient(objective, params, batch, state, sam.init(params), 0)
        updates, state = base.update(gradient, state, params)
        return optax.apply_updates(params, updates), report["aux"][0], state, report["aux"][1]

    runs = []
    for step, state in ((their_step, theirs.init(begin["params"])), (our_step, base.init(begin["params"]))):
        params, stats, seen = begin["params"], begin["batch_stats"], []
        for key in keys[3:]:
            params, stats, state, accuracy = step(params, stats, state, key)
            seen.append(float(accuracy))
        runs.append((params, stats, seen))
    assert runs[0][2] == runs[1][2]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *(run[:2] for run in runs))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), runs[1][1], begin["batch_stats"])
    assert min(jax.tree.leaves(moved)) > 1e-3


def noisy():
    """A regression whose inputs are noised by a key of the batch."""

    def forward(params, batch):
        noise = jax.random.normal(batch["key"], batch["x"].shape)
        return jnp.tanh((batch["x"] + batch["scale"] * noise) @ params["w"])

    return optim.objective(forward, lambda out, b: jnp.mean((out - b["y"]) ** 2))


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
@given(parts=st.sampled_from([1, 2, 3, 6]), seed=st.integers(0, 2**20), name=st.sampled_from(["adamw", "sam", "k_sam"]))
@settings(max_examples=3, deadline=None)
def test_each_microbatch_has_a_key_of_its_own_and_both_passes_the_same(make, parts, seed, name):
    draw = jax.random.split(jax.random.key(seed), 3)
    batch = {"x": jax.random.normal(draw[0], (6, 3)), "y": jax.random.normal(draw[1], 6), "scale": jnp.float32(0.5)}
    params, key, objective = {"w": jnp.array([0.3, -0.2, 0.5])}, make(seed), noisy()
    keys = jax.random.split(key, parts) if parts > 1 else [key]

    def gradient(w, part):
        rows = {"x": batch["x"][part::parts], "y": batch["y"][part::parts], "scale": batch["scale"], "key": keys[part]}
        return jax.grad(lambda w: objective.readout(None, objective.trunk({"w": w}, rows), rows)[0])(w)

    def mean(w):
        return sum(gradient(w, part) for part in range(parts)) / parts

    wanted = mean(params["w"])
    if name == "sam":
        wanted = mean(params["w"] + 0.3 * wanted / jnp.linalg.norm(wanted))
    if name == "k_sam":
        return refused_by_k_sam(objective, params, {**batch, "key": key})
    one = optim.method(name, microbatches=parts, **({"rho": 0.3} if name == "sam" else {}))
    got, _, report = one.gradient(objective, params, {**batch, "key": key}, None, one.init(params), 0)
    np.testing.assert_allclose(got["w"], wanted, rtol=2e-5, atol=1e-6)
    assert "aux" not in report


def refused_by_k_sam(objective, params, batch):
    one = optim.method("k_sam", k=2)
    with pytest.raises(ValueError, match="per_sequence_loss"):
        one.gradient(objective, params, batch, None, one.init(params), 0)


@pytest.mark.parametrize("name", ["k_sam", "sam"])
def test_rows_are_chosen_from_a_batch_with_a_key(name):
    def loss(out, batch):
        each = (out - batch["y"]) ** 2
        return jnp.mean(each), {"per_sequence_loss": each}

    objective = optim.objective(noisy().trunk, loss, has_aux=True)
    batch = {"x": jnp.ones((6, 3)), "y": jnp.arange(6.0), "scale": jnp.float32(0.1), "key": jax.random.key(0)}
    more = {"k": 2} if name == "k_sam" else {"ascent_over": "subset", "ascent_fraction": 0.5}
    one = optim.method(name, **more)
    _, _, report = one.gradient(objective, {"w": jnp.ones(3)}, batch, None, ((), ()), 0)
    assert report["nonfinite"] == 0
    assert report["aux"]["per_sequence_loss"].shape == (6,)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"classes": jnp.ones(10)}, r"batch\['x'\] has 6 rows and batch\['classes'\] 10"),
        ({"table": jnp.ones((2, 6))}, r"batch\['x'\] has 6 rows and batch\['table'\] 2"),
        ({"x": jnp.ones((2, 3)), "y": jnp.ones(2), "key": jax.random.PRNGKey(0)}, "a PRNG key, or one number for each"),
        ({"x": jnp.ones((5, 3)), "y": jnp.ones(5)}, "optim.microbatches = 2: must be a divisor of the 5 rows"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused_in_one_line(extra, message):
    batch = {"x": jnp.ones((6, 3)), "y": jnp.ones(6), "scale": 0.5, "key": jax.random.key(0), **extra}
    one = optim.method("sam", microbatches=2)
    with pytest.raises(ValueError, match=message) as error:
        one.gradient(noisy(), {"w": jnp.ones(3)}, batch, None, ((), ()), 0)
    assert "\n" not in str(error.value)


@jax.jit
def averaged(out, batch):
    return jnp.sum(jnp.where(batch["weight"] > 0, out * batch["weight"], 0.0)) / jnp.sum(batch["weight"])


LINEAR = {
    "identity": (lambda p, b: jnp.mean((b["x"] @ p["w"] - b["y"]) ** 2), lambda out, b: out),
    "mean of losses": (lambda p, b: (b["x"] @ p["w"] - b["y"]) ** 2, lambda out, b: jnp.mean(out)),
    "weighted, compiled": (lambda p, b: (b["x"] @ p["w"] - b["y"]) ** 2, averaged),
    "part of a tree": (lambda p, b: {"loss": jnp.sum(b["x"] @ p["w"]), "n": jnp.int32(1)}, lambda out, b: out["loss"]),
    "summed in a loop": (
        lambda p, b: b["x"] @ p["w"],
        lambda out, b: jax.lax.scan(lambda total, x: (total + x, None), 0.0, out)[0],
    ),
}
CURVED = {
    "squared": lambda out, b: jnp.mean((out - b["y"]) ** 2),
    "absolute": lambda out, b: jnp.mean(jnp.abs(out - b["y"])),
    "hinge": lambda out, b: jnp.mean(jnp.maximum(0.0, 1 - out * b["y"])),
    "compiled": jax.jit(lambda out, b: jnp.mean(optax.sigmoid_binary_cross_entropy(out, b["y"]))),
    "in a loop": lambda out, b: jax.lax.scan(lambda total, x: (total + x**2, None), 0.0, out)[0],
    "a scalar": lambda out, b: jnp.sqrt(1 + jnp.sum(out) ** 2),
}


def gradient_of(name, forward, loss):
    batch = {
        "x": jnp.arange(12.0).reshape(4, 3) / 9,
        "y": jnp.array([0.0, 1, 1, 0]),
        "weight": jnp.array([1.0, 0, 2, 1]),
    }
    params = {"w": jnp.array([0.3, -0.2, 0.5])}
    base = optim.base_optimizer("adamw", 1e-2)
    one = optim.method(name, rho=0.1, base=base)
    return one.gradient(optim.objective(forward, loss), params, batch, base.transform.init(params), one.init(params), 0)


@pytest.mark.parametrize("kind", LINEAR)
def test_a_loss_with_no_derivative_to_freeze_is_refused(kind):
    for name in FROZEN:
        with pytest.raises(ValueError, match="the loss is linear in the outputs") as error:
            gradient_of(name, *LINEAR[kind])
        assert "\n" not in str(error.value)
    assert gradient_of("sam", *LINEAR[kind])[2]["nonfinite"] == 0


@pytest.mark.parametrize("kind", CURVED)
def test_a_loss_with_a_derivative_of_its_own_is_not(kind):
    for name in FROZEN:
        assert gradient_of(name, lambda p, b: b["x"] @ p["w"], CURVED[kind])[2]["nonfinite"] == 0


def test_rows_of_a_batch_are_dealt_out_as_ever():
    batch = {"tokens": jnp.arange(12).reshape(6, 2), "keys": jax.random.split(jax.random.key(0), 6)}
    parts, shares = rule.split(rule.Objective(None, None, None), batch, 3)
    np.testing.assert_array_equal(parts["tokens"], np.arange(12).reshape(2, 3, 2).swapaxes(0, 1))
    np.testing.assert_array_equal(
        jax.random.key_data(parts["keys"]), jax.random.key_data(batch["keys"]).reshape(2, 3, -1).swapaxes(0, 1)
    )
    np.testing.assert_allclose(shares, 1 / 3)


def test_every_base_is_still_made_by_name():
    assert {optim.base_optimizer(name, 1e-3).name for name in BASES} == set(BASES)
