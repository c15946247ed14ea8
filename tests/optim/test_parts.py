"""The small parts by property: norms and masks over random trees, durations and schedules, splitting and switches."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import optim_problems as problems
from steppe import optim
from steppe.optim import ascent, masks, methods, rule, schedules
from steppe.optim.ascent import AscentInput
from steppe.optim.base import BASES, Moments
from steppe.optim.passes import first_pass
from steppe.optim.passes.two_pass import Switches, perturbation

settings.register_profile("quick", max_examples=30, deadline=None)
settings.load_profile("quick")

names = st.text("abcxyz_", min_size=1, max_size=4)
arrays = st.tuples(st.lists(st.integers(0, 3), max_size=3), st.integers(0, 2**31)).map(
    lambda drawn: np.random.default_rng(drawn[1]).normal(size=drawn[0]).astype(np.float32)
)
trees = st.recursive(arrays, lambda inside: st.dictionaries(names, inside, min_size=1, max_size=3), max_leaves=6)


def flat(tree):
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])


@given(trees, st.integers(-20, 20))
def test_norm_inner_and_cosine_are_those_of_the_flat_vector(tree, power):
    scale = np.float32(2.0**power)
    other = jax.tree.map(lambda x: np.flip(x) + 1, tree)
    a, b = flat(tree), flat(other)
    assert math.isclose(rule.norm(tree), np.linalg.norm(a), rel_tol=1e-5, abs_tol=1e-12)
    assert math.isclose(rule.inner(tree, other), a @ b, rel_tol=1e-4, abs_tol=1e-4)
    scaled = jax.tree.map(lambda x: scale * x, tree)
    assert math.isclose(rule.norm(scaled), scale * rule.norm(tree), rel_tol=1e-5)
    cosine = float(rule.cosine(tree, other))
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    assert math.isclose(cosine, a @ b / lengths if lengths else 1.0, rel_tol=1e-4, abs_tol=1e-4)
    assert math.isclose(rule.cosine(tree, scaled), 1.0, rel_tol=1e-5)


def test_norms_are_summed_in_float32():
    ones = jnp.ones(2**12, jnp.bfloat16)
    assert rule.norm(ones) == 64.0
    assert rule.norm({"a": ones, "b": ones}) == pytest.approx(math.sqrt(2**13))
    assert rule.norm(jnp.full(4, 3e-3, jnp.float16)) == pytest.approx(6e-3, rel=1e-3)  # squares below float16's least


@pytest.mark.parametrize(("a", "b", "wanted"), [(1.0, 2.0, 0.5), (0.0, 0.0, 7.0), (1.0, math.inf, 0.0)])
def test_ratio(a, b, wanted):
    assert rule.ratio(jnp.float32(a), jnp.float32(b), 7.0) == wanted
    assert jnp.isnan(rule.ratio(1.0, jnp.float32(math.nan)))


@given(trees, st.lists(names, min_size=1, max_size=3))
def test_mask_is_re_search_on_paths(tree, patterns):
    paths = jax.tree.leaves(masks.path_names(tree))
    for path in paths:
        leaf = tree
        for part in path.split("/") if path else ():
            leaf = leaf[part]
        assert isinstance(leaf, np.ndarray)
    useless = [p for p in patterns if not any(re.search(p, path) for path in paths)]
    if useless:
        with pytest.raises(ValueError, match=f"pattern '{useless[0]}' matches no parameter"):
            masks.mask(tree, tuple(patterns))
    else:
        wanted = [any(re.search(p, path) for p in patterns) for path in paths]
        assert jax.tree.leaves(masks.mask(tree, tuple(patterns))) == wanted


def test_matrix_axes_by_the_first_matching_rule():
    params = {"layers": {"query": jnp.zeros((2, 4, 3, 5)), "bias": jnp.zeros((2, 4))}, "embed": jnp.zeros((6, 4))}
    axes = masks.matrix_axes((("query", (1,), (2, 3)), ("^embed$", (0,), (1,)), ("layers/query", (0,), (1,))))(params)
    assert axes["layers"] == {"query": optax.contrib.MuonDimensionNumbers((1,), (2, 3)), "bias": None}
    # Muon orthogonalises each layer by itself: the update of one does not depend on the gradient of another.
    base = optim.base_optimizer("muon", 1.0, matrix_axes=lambda _: axes)
    draw = lambda seed: jax.tree.map(lambda p: jax.random.normal(jax.random.key(seed), p.shape), params)  # noqa: E731
    gradient, other = draw(0), draw(1)
    mixed = jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b[1:]]), gradient, other)
    update = jax.jit(lambda g: base.transform.update(g, base.transform.init(params), params)[0]["layers"]["query"])
    first, second = update(gradient), update(mixed)
    np.testing.assert_allclose(first[0], second[0], rtol=1e-5, atol=1e-6)
    assert not np.allclose(first[1], second[1], atol=1e-2)


steps = st.integers(0, 10**7)


@given(steps, st.integers(1, 10**6))
def test_durations_in_steps_and_tokens_agree(count, tokens_per_step):
    convert = lambda text: schedules.duration_steps(text, tokens_per_step=tokens_per_step, total_steps=count)  # noqa: E731
    assert convert(f"{count}") == convert(f"{count} steps") == count
    assert convert(f"{count * tokens_per_step} tokens") == count
    assert convert("100%") == count
    assert convert("0%") == 0
    if count:
        assert convert(f"{(count - 1) * tokens_per_step + 1} tokens") == count  # a part of a step is a step


@given(st.floats(0, 100), st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_fraction_of_a_run_lies_within_it(percent, total, tokens_per_step):
    found = schedules.duration_steps(f"{percent:.6f}%", tokens_per_step=tokens_per_step, total_steps=total)
    assert percent / 100 * total - 1e-2 <= found <= min(total, percent / 100 * total + 1.01)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("1.5k", 1500), ("2M tokens", 20000), ("3e2 steps", 300), ("1_000 steps", 1000), ("2 epochs", 100),
     ("1B tokens", 10**7)],
)  # fmt: skip
def test_durations_in_every_unit(text, wanted):
    assert schedules.duration_steps(text, tokens_per_step=100, total_steps=1000, tokens_per_epoch=5000) == wanted


@pytest.mark.parametrize(
    "text", ["", "fast", "-1 steps", "5 minutes", "1e400%", "nan", "101%", "1 epochs", "5%", "1e400"]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        schedules.duration_steps(text, tokens_per_step=100, total_steps=None if text == "5%" else 1000)


@settings(max_examples=10)
@given(st.sampled_from(schedules.SCHEDULES), st.integers(20, 500), st.integers(0, 10), st.floats(0, 0.5))
@example("cosine", 20, 1, 0.0)
def test_learning_rates_start_low_peak_once_and_end_where_they_say(name, total, warmup, end):
    rate = schedules.learning_rate(name, 2.0, total, warmup_steps=warmup, end=end, cooldown_steps=5)
    values = np.broadcast_to(rate(jnp.arange(total + 1)), total + 1)
    assert np.isclose(values[warmup], 2.0, rtol=1e-5)
    assert np.all(values <= 2.0 * (1 + 1e-6))
    assert np.all(np.diff(values[: warmup + 1]) > 0)
    assert np.all(np.diff(values[warmup:]) <= 1e-6)
    if warmup:
        assert np.isclose(values[0], 2.0 * end if end else 2.0 / (warmup + 1), atol=1e-6)  # no step has rate 0
    last = {"constant": 2.0, "rsqrt": 2.0 * math.sqrt(max(1, warmup) / (total - warmup + max(1, warmup)))}
    assert np.isclose(values[-1], last.get(name, 2.0 * end), rtol=1e-4, atol=1e-6)
    if name == "wsd":
        assert np.all(values[warmup : total - 4] == 2.0)


@pytest.mark.parametrize("name", schedules.RHO_SCHEDULES)
def test_rho_schedules(name):
    rate = schedules.learning_rate("cosine", 3e-4, 100, warmup_steps=10)
    rho = schedules.rho(name, 0.2, 100, warmup_steps=10, cooldown_steps=20, rate=rate)
    values = [float(rho(step)) if callable(rho) else rho for step in (0, 10, 55, 100)]
    wanted = {
        "constant": [0.2] * 4, "warmup": [0, 0.2, 0.2, 0.2], "cosine": [0, 0.2, 0.1, 0],
        "learning_rate": [0.02, 0.2, 0.11, 0.02], "linear": [0, 0.2, 0.1, 0], "wsd": [0, 0.2, 0.2, 0],
        "rsqrt": [0, 0.2, 0.2 * (10 / 55) ** 0.5, 0.2 * 0.1**0.5], "late": [0, 0, 0, 0.2],
    }[name]  # fmt: skip
    np.testing.assert_allclose(values, wanted, atol=1e-6)
    if name == "late":
        assert [float(rho(step)) for step in (79, 80, 99)] == pytest.approx([0, 0.2, 0.2])


def test_rho_tied_to_no_learning_rate_is_refused():
    with pytest.raises(ValueError, match="rate"):
        schedules.rho("learning_rate", 0.1, 100)
    for call in (lambda: schedules.rho("steep", 0.1, 100), lambda: schedules.learning_rate("steep", 0.1, 100)):
        with pytest.raises(ValueError, match="'steep': must be one of"):
            call()


def test_rows_are_dealt_out_in_turn_and_weighted_by_tokens():
    batch = {"x": jnp.arange(6), "tokens": jnp.array([1.0, 2, 3, 4, 5, 6])}
    objective = optim.objective(lambda p, b: p, lambda out, b: out, weight=lambda b: jnp.sum(b["tokens"]))
    parts, shares = rule.split(objective, batch, 2)
    np.testing.assert_array_equal(parts["x"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_allclose(shares, [9 / 21, 12 / 21])


def gradient(name, params, batch, **options):
    radius = {"rho": 0.2} if methods.row_of(name) else {}
    made = optim.method(name, **{**radius, **problems.needs(name), **options})
    return jax.jit(lambda p, b: made.gradient(problems.language_model(), p, b, None, made.init(p), 0))(params, batch)


def close(a, b, tolerance=1e-5):
    return float(rule.norm(jax.tree.map(jnp.subtract, a, b)) / rule.norm(b)) < tolerance


def test_one_epsilon_per_microbatch_is_the_mean_of_sam_on_each():
    params, batch = problems.parameters(), problems.batch()
    got, _, report = gradient("sam", params, batch, microbatches=2, ascent_over="microbatch")
    parts, shares = rule.split(problems.language_model(), batch, 2)
    each = [gradient("sam", params, jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(2)]
    mean = jax.tree.map(lambda a, b: shares[0] * a + shares[1] * b, each[0][0], each[1][0])
    assert close(got, mean)
    assert np.isclose(report["loss"], shares[0] * each[0][2]["loss"] + shares[1] * each[1][2]["loss"])
    assert not close(got, gradient("sam", params, batch, microbatches=2)[0], 1e-3)


def test_subset_climbs_some_sequences_and_descends_all():
    params, batch = problems.parameters(), problems.batch()
    every_second = jax.tree.map(lambda x: x[::2], batch)
    base_gradient = jax.jit(jax.grad(problems.loss_of))
    climbed = base_gradient(params, every_second)
    moved = jax.tree.map(lambda p, g: p + 0.2 * g / rule.norm(climbed), params, climbed)
    options = {"ascent_over": "subset", "ascent_fraction": 0.5}
    got, _, report = gradient("sam", params, batch, **options)
    assert close(got, base_gradient(moved, batch))
    assert np.isclose(report["loss"], problems.loss_of(params, every_second))
    _, _, report = gradient("functional_sam", params, batch, **options)
    assert np.isclose(report["loss"], problems.loss_of(params, batch))
    one_row = lambda p: optim.method("sam", ascent_over="subset", ascent_fraction=0.01).gradient(  # noqa: E731
        problems.language_model(), p, batch, None, ((), ()), 0
    )
    assert jax.tree.structure(jax.eval_shape(one_row, params)[0]) == jax.tree.structure(params)


@pytest.mark.parametrize(("fraction", "rows"), [(0.75, [0, 1, 2, 4, 5, 6]), (0.5, [0, 2, 4, 6]), (0.25, [0, 4])])
def test_a_subset_is_spread_evenly(fraction, rows):
    """Also above one half, where every second row is not enough; and over two shards, each giving as many."""
    assert first_pass.subset_rows(fraction, problems.B, 2) == len(rows)
    params, batch = problems.parameters(), problems.batch()
    climbed = jax.grad(problems.loss_of)(params, jax.tree.map(lambda x: x[np.asarray(rows)], batch))
    for shards in (1, 2):
        made = first_pass.subset(fraction, False, shards)
        gradients, _ = made(problems.language_model(), params, batch)
        assert close(gradients.ascent, climbed)


def test_a_focal_weight_that_underflows_is_still_counted():
    """(1 - frequency)^gamma of the most frequent token is 0 in float32: it weighs nothing, and the mean is over it."""
    frequency = np.asarray([0.99] + [0.01 / (problems.V - 1)] * (problems.V - 1))
    c = 0.5 * (1 - frequency) ** 25.0
    assert np.float32(c[0]) == 0 < 0.4 < c[1]
    params, batch = problems.parameters(), problems.batch()
    assert jnp.sum((batch["targets"] == 0) * batch["weights"]) > 0
    made = first_pass.focal(jnp.asarray(frequency, jnp.float32), gamma=25.0, lam=0.5)
    gradients, _ = made(problems.language_model(), params, batch)

    def focused(p):
        log_p = jax.nn.log_softmax(problems.trunk(p, batch) @ p["readout"])
        losses = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        weights = batch["weights"] * jnp.asarray(c, jnp.float32)[batch["targets"]]
        return jnp.sum(losses * weights) / jnp.sum(batch["weights"] > 0)

    assert close(gradients.ascent, jax.grad(focused)(params))


def test_clip_norm_bounds_what_is_climbed_and_what_is_returned():
    params, batch = problems.parameters(), problems.batch()
    plain, _, report = gradient("adamw", params, batch, clip_norm=0.01)
    assert np.isclose(rule.norm(plain), 0.01)
    assert report["gradient_norm"] > 0.1
    friendly, (average, _), _ = gradient("friendly_sam", params, batch, clip_norm=0.01)
    assert np.isclose(rule.norm(friendly), 0.01)
    assert np.isclose(rule.norm(average), 0.01)  # the clipped gradient, the first
    untouched, _, _ = gradient("adamw", params, batch, clip_norm=1e3)
    assert close(untouched, jax.jit(jax.grad(problems.loss_of))(params, batch), 1e-6)


def test_random_ascent_depends_on_seed_and_step_alone():
    params, batch = problems.parameters(), problems.batch()

    def at(seed, step):
        return run[seed](problems.language_model(), params, batch, None, ((), ()), jnp.int32(step))[0]

    run = [jax.jit(optim.method("random_sam", rho=0.2, seed=s).gradient, static_argnums=0) for s in range(2)]

    assert close(at(0, 3), at(0, 3), 1e-9)
    assert not close(at(0, 3), at(0, 4), 1e-3)
    assert not close(at(0, 3), at(1, 3), 1e-3)


def test_directions_that_climb_no_gradient_are_masked_too():
    params = problems.parameters()
    moved = AscentInput(None, params, Moments(first=jax.tree.map(jnp.ones_like, params)), (), 0)
    switches = Switches(perturb=("^layers", "^norm"))
    for direction in (ascent.random(), ascent.momentum()):
        epsilon, _ = jax.jit(lambda r: perturbation(direction, moved, r, switches))(0.3)  # noqa: B023
        still = {name: leaf for name, leaf in epsilon.items() if name in ("embed", "readout")}
        assert rule.norm(still) == 0
        assert np.isclose(rule.norm(epsilon), 0.3)
    assert rule.inner(epsilon, moved.moments.first) < 0


@pytest.mark.parametrize(
    ("base", "factor"), [("adamw", 0.1), ("adam", 0.1), ("sgd", 1.0), ("lion", 0.02), ("muon", 0.1)]
)
def test_first_moment_of_each_base(base, factor):
    params = problems.parameters()
    made = optim.base_optimizer(base, 1e-2, b1=0.9, b2=0.98)
    state = jax.jit(made.transform.update)(params, made.transform.init(params), params)[1]
    first = made.moments(state, params).first
    assert jax.tree.structure(first) == jax.tree.structure(params)
    assert close(first, jax.tree.map(lambda p: factor * p, params))


def test_every_start_and_stop():
    params, batch = problems.parameters(), problems.batch()
    made = optim.method("sam", rho=0.2, every=2, start=1, stop=5)
    run = jax.jit(lambda step: made.gradient(problems.language_model(), params, batch, None, ((), ()), step)[2])
    perturbed = [float(run(jnp.int32(step))["epsilon_norm"]) > 0 for step in range(7)]
    assert perturbed == [False, True, False, True, False, False, False]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamw", {"rho": 0.1}, "optim.rho = 0.1: must be None: rho is not an option of adamw, which takes no options"),
        ("sma", {}, "optim.method = 'sma': must be one of adamw, sam,"),
        ("sam", {"alpha": 0.5}, "optim.alpha = 0.5: must be None: alpha is not an option of sam, which takes rho"),
        ("adamw", {"alpha": 0.5}, "must be None: alpha is not an option of adamw, which takes no options"),
        ("sam", {"rho": -1.0}, "optim.rho = -1.0: must be a finite number >= 0"),
        ("sam", {"rho": math.nan}, "optim.rho = nan: must be a finite number >= 0"),
        ("sam", {"every": 0}, "optim.every = 0: must be an integer >= 1"),
        ("sam", {"ascent_over": "half"}, "optim.ascent_over = 'half': must be one of global, microbatch, subset"),
        ("sam", {"ascent_fraction": 0.5}, "optim.ascent_fraction = 0.5: must be 1.0 unless ascent_over is subset"),
        ("gsam", {"ascent_over": "subset"}, "gsam, which also descends along the gradient of the whole batch"),
        ("look_sam", {"ascent_over": "subset"}, "look_sam, which also descends along the gradient of the whole"),
        ("msam", {"ascent_over": "subset"}, "msam, which uses no gradient for the ascent"),
        ("k_sam", {"ascent_over": "subset"}, "k_sam, which chooses its own tokens"),
        ("look_sam", {"every": 2}, "optim.every = 2: must be 1 with optim.method = look_sam; set optim.k instead"),
        ("focal_sam", {}, "optim.frequency = None: must be given, because focal_sam needs it"),
        ("precond_sam", {"precond_norm": "l1"}, "optim.precond_norm = 'l1': must be one of l2, ellipsoid"),
        ("precond_sam", {"precond_eps": 0.0}, "optim.precond_eps = 0.0: must be a finite number > 0"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        optim.method(name, **options)


@pytest.mark.parametrize("name", methods.METHODS)
def test_bases_without_the_moment_are_refused_and_the_others_named(name):
    accepted = methods.accepted_bases(name)
    assert {"adamw", "adam"} <= set(accepted)
    for base in BASES:
        make = lambda: optim.method(name, base=optim.base_optimizer(base, 0.1), **problems.needs(name))  # noqa: B023, E731
        if base in accepted:
            make()
        else:
            with pytest.raises(
                ValueError, match=f"optim.base = '{base}': must be one of {', '.join(accepted)} with {name}"
            ):
                make()


def test_bad_parameters_and_patterns_are_refused_at_init():
    params = problems.parameters()
    with pytest.raises(ValueError, match="parameter count is int32"):
        optim.method("adamw").init({**params, "count": jnp.zeros((), jnp.int32)})
    with pytest.raises(ValueError, match="pattern 'attention' matches no parameter; there are embed"):
        optim.method("sam", rho=0.1, perturb=("attention",)).init(params)
    with pytest.raises(ValueError, match=r"optim\.k = 9: must be at most"):
        gradient("k_sam", params, problems.batch(), k=9)
    gradient_of = optim.method("msam", rho=0.1).gradient
    with pytest.raises(ValueError, match="holds 0 moment estimates"):
        gradient_of(problems.language_model(), params, problems.batch(), (), ((), ()), 0)


def test_costs():
    """Forwards, backwards and readout products by hand; XLA's count of them: tests/scripts/bench/test_methods.py."""
    cost, subset = methods.cost, {"ascent_over": "subset", "ascent_fraction": 0.25, "sequences": 16}
    assert cost("adamw") == (1, 1, 3)
    assert cost("sam").averaged(0.25) == (1.25, 1.25, 3.75)
    assert cost("k_sam", sequences=16, k=4) == (1.5, 0.5, 2.5)
    assert cost("k_sam", sequences=16, k=4, microbatches=2, shards=2) == (3, 2, 7)
    assert cost("look_sam").averaged(1 / 5) == (1.2, 1.2, 3.6)
    assert cost("sam", **subset) == (1.25, 1.25, 3.75)
    assert cost("functional_sam", **subset) == (2.25, 1.25, 4.75)
    assert cost("functional_sam", keep=True) == (2, 2, 5)
    assert cost("logit_sam", keep=True) == (2, 2, 6)  # it does not read what is kept
    assert cost("logit_sam", microbatches=2) == (3, 2, 6)
    assert cost("msam") == (1, 1, 3)
    assert cost("functional_msam") == (2, 1, 4)


def climbed(switches, rho=0.3, vector=lambda g: g, length=None):
    """(gradient, epsilon) of a direction along `vector` of it, in float64."""
    params = problems.parameters(jnp.float64)
    made = problems.language_model()
    g = jax.grad(lambda p: made.readout(p, made.trunk(p, problems.batch()), problems.batch())[0])(params)
    known = AscentInput(gradient=g, params=params, moments=Moments(), state=(), step=jnp.int32(0))
    up = ascent.Ascent(lambda given: (jax.tree.map(vector, given.gradient), length, ()))
    return g, perturbation(up, known, rho, switches)[0]


@jax.enable_x64(True)
def test_each_group_of_parameters_has_its_own_radius():
    g, epsilon = climbed(Switches(rho_factors=("^embed=0.25", "(readout|embed)=2", "scale=0")))
    size = rule.norm(g["embed"])
    np.testing.assert_allclose(epsilon["embed"], 0.25 * 0.3 * g["embed"] / size, rtol=1e-12)  # the first rule decides
    np.testing.assert_allclose(rule.norm(epsilon["readout"]), 2 * 0.3, rtol=1e-12)
    np.testing.assert_allclose(rule.norm(epsilon["layers"]), 0.3, rtol=1e-12)
    assert not np.any(epsilon["norm"]["scale"])


@jax.enable_x64(True)
def test_groups_of_a_direction_with_a_length_of_its_own_are_factors_of_it():
    g, epsilon = climbed(Switches(rho_factors=("^embed=0.25",)), length=jnp.ones(()))
    np.testing.assert_allclose(epsilon["embed"], 0.25 * 0.3 * g["embed"], rtol=1e-12)
    np.testing.assert_allclose(epsilon["readout"], 0.3 * g["readout"], rtol=1e-12)


@jax.enable_x64(True)
def test_a_budget_of_loss_shortens_epsilon():
    g, whole = climbed(Switches())
    size = rule.norm(g)
    for budget in (0.1 * 0.3 * size, 10 * size):
        _, epsilon = climbed(Switches(rho_budget=float(budget)))
        radius = min(budget / size, 0.3)  # LE-SAM
        np.testing.assert_allclose(rule.norm(epsilon), radius, rtol=1e-12)
        np.testing.assert_allclose(epsilon["embed"], radius * g["embed"] / size, rtol=1e-12)
    _, downhill = climbed(Switches(rho_budget=1e-6), vector=jnp.negative)  # what lowers the loss has no bound
    np.testing.assert_allclose(rule.norm(downhill), rule.norm(whole), rtol=1e-12)
    _, nowhere = climbed(Switches(rho_budget=0.1), vector=jnp.zeros_like)
    assert rule.norm(nowhere) == 0


def test_a_budget_needs_a_gradient():
    with pytest.raises(rule.OptionError, match=r"rho_budget = 0\.1: must be 0 with msam"):
        optim.method("msam", rho=0.1, rho_budget=0.1)


@pytest.mark.parametrize("name", BASES)
def test_rate_factors_are_learning_rates_of_their_own(name):
    """A group's steps are those of a base at its rate, whatever the base; decoupled decay follows the rate as well."""
    rules, params = ("^embed=0.5", "kernel=0"), problems.parameters()
    gradients = [jax.tree.map(lambda p, i=i: jnp.cos(p + i), params) for i in range(3)]

    def run(rate, rate_factors=()):
        base, now = optim.base_optimizer(name, rate, weight_decay=0.1, rate_factors=rate_factors), params
        state = base.transform.init(params)
        for gradient in gradients[: 1 if name == "schedule_free" else 3]:  # of which the weights of the mean differ
            updates, state = base.transform.update(gradient, state, now)
            now = optax.apply_updates(now, updates)
        return now

    both, half, whole = run(0.01, rules), run(0.005), run(0.01)
    np.testing.assert_allclose(both["embed"], half["embed"], rtol=1e-6)
    np.testing.assert_allclose(both["readout"], whole["readout"], rtol=1e-6)
    np.testing.assert_allclose(both["layers"]["kernel"], params["layers"]["kernel"], rtol=1e-6)


def test_rules_are_read_from_their_end_and_must_match():
    tree = {"a=b": jnp.ones(2), "c": jnp.ones(3)}
    groups, values = masks.factors(tree, ("a=b=0.5", "c=1e-2"))
    assert (groups, values) == ({"a=b": 1, "c": 2}, {"a=b": 0.5, "c": 0.01})
    with pytest.raises(ValueError, match="matches no parameter"):
        masks.factors(tree, ("d=1",))


@given(
    st.sampled_from(schedules.SCHEDULES), st.integers(1, 60), st.integers(0, 60), st.integers(0, 60),
    st.sampled_from([0.0, 0.1, 1.0]),
)  # fmt: skip
def test_no_step_has_the_rate_0_and_nothing_else_has_changed(name, total, warmup, cooldown, end):
    warmup, cooldown = min(warmup, total), min(cooldown, total - min(warmup, total))
    shape = {"warmup_steps": warmup, "cooldown_steps": cooldown, "end": end}
    rates, before = (
        [float(schedules.learning_rate(name, 0.5, total, **shape, from_zero=zero)(step)) for step in range(total)]
        for zero in (False, True)
    )
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[warmup:] == before[warmup:]
    assert (rates == before) == (end > 0 or warmup == 0)
    if warmup and not end:
        assert before[0] == 0
        assert np.allclose(np.diff(rates[:warmup]), 0.5 / (warmup + 1), rtol=1e-3)
