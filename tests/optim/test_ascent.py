"""Where directions put epsilon: no entry takes it for want of a second moment, and the report says which groups do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import optim_problems as problems
from steppe import optim
from steppe.optim import methods
from steppe.optim.ascent import AscentInput, filled
from steppe.optim.base import at_step
from steppe.optim.options import options
from steppe.optim.passes.two_pass import shares

B2 = 0.95
DIRECTIONS = {row.ascent.__name__: row.ascent for row in methods.METHODS.values() if row}
CASES = [
    (name, base, chosen)
    for name, ascent in DIRECTIONS.items()
    for base in (("adamw", "adafactor") if "second" in ascent().needs else ("adamw",))
    for chosen in ([{"precond_moment": m} for m in ("fresh", "stale")] if "precond_moment" in options(ascent) else [{}])
]


def largest_share(name, base_name, chosen):
    """The largest share of |epsilon|^2 of an entry of which nothing was known until now, as a multiple of 1/n."""
    rows = columns = 128  # fewer, and adafactor does not factor
    base = (
        optim.base_optimizer(base_name, 1e-3, b2=B2) if base_name == "adamw" else optim.base_optimizer(base_name, 1e-3)
    )
    params = {"table": jnp.ones((rows, columns)), "matrix": jnp.ones((rows, columns))}
    keys = iter(jax.random.split(jax.random.key(0), 32))

    def gradient(seen):
        g = {name: jax.random.normal(next(keys), p.shape) for name, p in params.items()}
        return g if seen else {**g, "table": g["table"].at[0].set(0.0)}

    state = base.transform.init(params)
    for _ in range(8):
        _, state = base.transform.update(gradient(False), state, params)
    made = DIRECTIONS[name](**chosen)
    given = AscentInput(gradient(True), params, base.moments(state, params), made.init(params), jnp.int32(8))
    vector, _, _ = made.direction(given)
    row = vector["table"][0] ** 2
    return float(jnp.max(row) / optim.rule.norm(vector) ** 2) * 2 * rows * columns, vector


@pytest.mark.parametrize(("name", "base", "chosen"), CASES, ids=str)
def test_an_unseen_entry_takes_at_most_a_stated_multiple_of_an_even_share(name, base, chosen):
    """Of 33k entries, those of one row had no gradient before: 1 / (1 - b2) = 20 times the square of a typical entry.

    A normal g has entries of up to 3.5 by itself (12 times); adafactor's moment at step 8 is by 0.19 new (5 times).
    """
    times, vector = largest_share(name, base, chosen)
    assert times < 1 / (1 - B2) * 3.5
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(vector))


def test_without_a_floor_the_unseen_row_takes_all():
    """What the floor is for."""
    times, vector = largest_share("preconditioned", "adamw", {"precond_moment": "stale", "precond_floor": 0.0})
    assert float(shares(vector, {})["epsilon_row"]) > 0.999
    assert times > 1_000


def test_filled_keeps_what_was_seen():
    second = {"a": jnp.asarray([0.0, 1e-5, 0.5, 1.0, 2.5]), "never": jnp.zeros(2), "small": jnp.full(3, 1e-9)}
    made = filled(second, 0.01)
    np.testing.assert_allclose(made["a"], [0.8, 0.8, 0.5, 1.0, 2.5], rtol=1e-4)
    np.testing.assert_allclose(made["never"], [0.4, 0.4], rtol=1e-4)  # the mean of the tree
    np.testing.assert_array_equal(made["small"], second["small"])
    assert filled(second, 0.0) is second


@pytest.mark.parametrize("name", ["sam", "msam", "random_sam", "precond_functional_sam"])
def test_the_report_says_where_epsilon_lies(name):
    """Shares of groups and of the largest row against numpy, with no pass more than the method takes."""
    groups = {"embeddings": "^(embed|readout)", "layers": "^layers", "none": "^nothing"}
    base = optim.base_optimizer("adamw", 1e-2)
    params, batch = problems.parameters(), problems.batch()
    state = base.transform.update(params, base.transform.init(params), params)[1]
    rule = optim.method(name, base=base, rho=0.1, groups=groups)
    objective, seen = problems.language_model(), []

    def trunk(params, batch):
        jax.debug.callback(lambda **p: seen.append(p), **params, ordered=True)
        return objective.trunk(params, batch)

    _, _, report = jax.jit(rule.gradient, static_argnums=0)(
        objective._replace(trunk=trunk), params, batch, state, rule.init(params), jnp.int32(0)
    )
    jax.effects_barrier()
    epsilon = jax.tree.map(lambda q, p: np.asarray(q - p, np.float64), seen[-1], params)
    squares = {key: np.sum(value**2) for key, value in (("embed", epsilon["embed"]), ("readout", epsilon["readout"]))}
    total = sum(np.sum(leaf**2) for leaf in jax.tree.leaves(epsilon))
    rows = [np.sum(leaf**2, axis=-1).max() for leaf in jax.tree.leaves(epsilon)]
    # 1e-4: theta + epsilon - theta in float32, of an epsilon of 0.1
    assert report["epsilon_embeddings"] == pytest.approx(sum(squares.values()) / total, rel=1e-4)
    assert report["epsilon_layers"] == pytest.approx(np.sum(epsilon["layers"]["kernel"] ** 2) / total, rel=1e-4)
    assert report["epsilon_none"] == 0
    assert report["epsilon_row"] == pytest.approx(max(rows) / total, rel=1e-4)


def test_an_unscaled_parameter_of_asam_climbs_as_sam_does():
    """T = 1 on what matches; a regex that matches nothing is refused by name."""
    made = methods.METHODS["asam"].ascent
    params = {"kernel": jnp.asarray([3.0, -1.0]), "bias": jnp.asarray([5.0])}
    gradient = {"kernel": jnp.asarray([1.0, 2.0]), "bias": jnp.asarray([0.5])}
    given = AscentInput(gradient, params, None, (), jnp.int32(0))
    vector, length, _ = made(unscaled="bias$").direction(given)
    t = np.asarray([3.01, 1.01, 1.0])
    g = np.asarray([1.0, 2.0, 0.5])
    np.testing.assert_allclose(np.concatenate([vector["kernel"], vector["bias"]]), t**2 * g, rtol=1e-6)
    np.testing.assert_allclose(length, np.linalg.norm(t * g), rtol=1e-6)
    assert made().direction(given)[0]["bias"] == pytest.approx(5.01**2 * 0.5)
    with pytest.raises(ValueError, match=r"optim\.unscaled = 'gamma': must be a regex that matches a parameter's path"):
        optim.method("asam", unscaled="gamma").init(params)


def test_friendly_sam_climbs_the_gradient_itself_first():
    """Its authors' code: the first step climbs g, and the average starts as the first gradient, not at zero."""
    made = methods.METHODS["friendly_sam"].ascent(sigma=0.5, decay=0.9)
    params = {"w": jnp.asarray([1.0, 2.0])}
    first, second = {"w": jnp.asarray([1.0, -2.0])}, {"w": jnp.asarray([3.0, 0.0])}
    vector, _, state = made.direction(AscentInput(first, params, None, made.init(params), jnp.int32(0)))
    np.testing.assert_array_equal(vector["w"], first["w"])
    vector, _, state = made.direction(AscentInput(second, params, None, state, jnp.int32(1)))
    np.testing.assert_allclose(vector["w"], [2.5, 1.0])
    np.testing.assert_allclose(state["w"], [1.2, -1.8], rtol=1e-6)


def test_an_equinox_like_module_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"parameter activation is function.*eqx\.partition"):
        optim.method("adamw").init({"activation": jax.nn.gelu, "weight": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"parameter size is int"):
        optim.method("sam", rho=0.1).init({"size": 3, "weight": jnp.ones(2)})


def _driven(name, steps=4):
    """(base, its state after some gradients, params, the gradients) in float64."""
    base = optim.base_optimizer(name, lambda step: 0.01 * (1 + step), b1=0.9, b2=B2, eps=1e-8, weight_decay=0.3)
    keys = jax.random.split(jax.random.key(1), 2 * steps + 2)
    shapes = {"matrix": (6, 4), "scale": (5,)}

    def drawn(at):
        return {
            name: jax.random.normal(k, s, jnp.float64)
            for k, (name, s) in zip(keys[at : at + 2], shapes.items(), strict=True)
        }

    params, gradients = drawn(0), [drawn(2 + 2 * i) for i in range(steps)]
    state = base.transform.init(params)
    for gradient in gradients:
        _, state = base.transform.update(gradient, state, params)
    return base, state, params, gradients


def _orthogonal(momentum):
    """U V^T of a matrix."""
    left, _, right = np.linalg.svd(momentum, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("name", ["adamw", "nadamw", "adam", "lion", "sgd", "muon"])
@jax.enable_x64(True)  # here alone: the fixture would leave the rest of the module in double precision
def test_the_way_the_base_is_going_against_its_formula(name):
    """From the gradients alone, in NumPy: D^-1 m of Adam and NAdam, -sign(m), -m, and of Muon U V^T."""
    base, state, params, gradients = _driven(name)
    made = DIRECTIONS["update"](update_floor=0.0)
    given = AscentInput(gradients[0], params, base.moments(state, params), made.init(params), jnp.int32(4))
    vector, length, _ = made.direction(given)
    assert length is None
    for leaf in params:
        # decay that is added to the gradient is in the moments of adam and sgd, like in theirs
        seen = [
            np.asarray(g[leaf]) + (0.3 * np.asarray(params[leaf]) if name in ("adam", "sgd") else 0) for g in gradients
        ]
        first, second, trace, slow = 0.0, 0.0, 0.0, 0.0
        for g in seen:
            first, second = 0.9 * first + 0.1 * g, B2 * second + (1 - B2) * g**2
            trace, slow = 0.9 * trace + g, B2 * slow + (1 - B2) * g
        adam = (first / (1 - 0.9**4)) / (np.sqrt(second / (1 - B2**4)) + 1e-8)
        expected = {"lion": np.sign(slow), "sgd": trace}.get(name, adam)
        found = -np.asarray(vector[leaf])
        if name == "muon" and leaf == "matrix":
            expected = _orthogonal(first)
        cosine = np.sum(found * expected) / np.linalg.norm(found) / np.linalg.norm(expected)
        # eps added to moments a step older: 1e-8 of them; five Newton-Schulz steps leave singular values in 0.7 to 1.2
        assert cosine > (0.97 if name == "muon" and leaf == "matrix" else 1 - 1e-12)


@jax.enable_x64(True)
def test_radius_in_steps_of_the_base_and_none_before_the_first():
    base, state, params, gradients = _driven("adamw")
    made = DIRECTIONS["update"](update_length="steps", update_floor=0.0)

    def at(state, step):
        given = AscentInput(gradients[0], params, base.moments(state, params), (), jnp.int32(step))
        return made.direction(given)

    vector, length, _ = at(state, 7)
    nothing = jax.tree.map(jnp.zeros_like, params)
    again, _ = base.transform.update(nothing, at_step(state, jnp.int32(7)), nothing)
    assert length == 1
    for a, b in zip(jax.tree.leaves(vector), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert optim.rule.norm(vector) == pytest.approx(2 * optim.rule.norm(at(state, 3)[0]))  # 0.08 and 0.04 a step
    fresh, _, _ = at(base.transform.init(params), 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh))
