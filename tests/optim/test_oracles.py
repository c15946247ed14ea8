"""Float64: every method against products with dense matrices, against optax, or against its published equations.

The transcriptions are straight-line NumPy on the flattened parameters and share no code with optim.
"""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from helpers import optim_problems as problems
from helpers.optim_problems import close, unit
from steppe import optim
from steppe.optim import methods
from steppe.optim.base import moments
from steppe.optim.passes.two_pass import Switches, TwoPass

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", ["sam", "functional_sam", "logit_sam", "mixture_sam"])
def test_first_order_identity_with_a_residual_of_second_order(problem, matrices, name):
    hessian, ggn, nme = matrices
    assert np.allclose(hessian, ggn + nme, atol=1e-12)
    assert min(np.linalg.norm(ggn), np.linalg.norm(nme)) > 0.1 * np.linalg.norm(hessian)
    matrix = {"sam": hessian, "functional_sam": nme, "logit_sam": ggn, "mixture_sam": 0.3 * nme + 0.7 * ggn}[name]
    options = {"alpha": 0.3} if name == "mixture_sam" else {}
    g = problem.gradient(problem.theta)
    row = methods.METHODS[name]

    @jax.jit
    def gradient(rho):
        rule = TwoPass(ascent=row.ascent(), second=row.second(**options), switches=Switches(rho=rho), moments=moments)
        return rule.gradient(problem.objective, problem.params, problem.batch, None, ((), ()), 0)[0]

    radii = [1e-3, 2e-3, 4e-3, 8e-3]
    residuals = []
    for rho in radii:
        got = np.asarray(ravel_pytree(gradient(rho))[0])
        residuals.append(np.linalg.norm(got - g - rho * matrix @ unit(g)))
    slope = np.polyfit(np.log(radii), np.log(residuals), 1)[0]
    assert 1.9 < slope < 2.1
    assert residuals[0] < 0.05 * np.linalg.norm(radii[0] * matrix @ unit(g))


def test_penalty_is_the_exact_hessian_vector_product(problem, matrices):
    g = problem.gradient(problem.theta)
    (got,), _ = problem.run("penalty_sam", rho=0.3)
    close(got, g + 0.3 * matrices[0] @ unit(g), 1e-13)
    taylor = problem.loss(problem.theta) + 0.3 * np.linalg.norm(g) + 0.5 * 0.09 * unit(g) @ matrices[0] @ unit(g)
    assert abs(float(problem.report["perturbed_loss"]) - taylor) < 1e-6  # the report is float32


@pytest.mark.parametrize("name", ["functional_sam", "logit_sam", "mixture_sam", "functional_msam"])
def test_split_at_the_hidden_state_changes_nothing(problem, name):
    options = {"transform": optax.sgd(0.1, momentum=0.9)} if name == "functional_msam" else {}
    whole, _ = problem.run(name, steps=2, rho=0.2, **options)
    split, _ = problem.run(name, steps=2, rho=0.2, objective=problems.split_language_model(), **options)
    close(split[1], whole[1], 1e-13)
    assert np.linalg.norm(whole[1] - problem.gradient(problem.theta)) > 1e-3


def test_functional_path_of_a_linear_model_is_the_base_gradient():
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = {"x": jax.random.normal(keys[0], (6, 5)), "targets": jnp.arange(6) % 3, "weights": jnp.ones(6)}
    params = {"w": jax.random.normal(keys[1], (5, 3)), "b": jax.random.normal(keys[2], (3,))}
    linear = optim.objective(lambda p, b: b["x"] @ p["w"] + p["b"], lambda out, b: problems.token_loss(out[:, None], {
        "targets": b["targets"][:, None], "weights": b["weights"][:, None]})[0])  # fmt: skip
    for name, same in (("functional_sam", True), ("sam", False)):
        gradients = [_gradient(which, linear, params, inputs) for which in (name, "adamw")]
        assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, *gradients))) == same


def _gradient(name, objective, params, batch):
    rule = optim.method(name, **({"rho": 0.5} if methods.row_of(name) else {}))
    return jax.jit(rule.gradient, static_argnums=0)(objective, params, batch, None, rule.init(params), 0)[0]


def test_sam_is_optax_contrib_sam(problem):
    base, rho = optax.adamw(1e-2, weight_decay=0.1), 0.3
    theirs = optax.contrib.sam(
        base, optax.chain(optax.contrib.normalize(), optax.sgd(rho)), sync_period=2, opaque_mode=True
    )
    gradient = jax.jit(jax.grad(problems.loss_of))
    params, state = problem.params, theirs.init(problem.params)
    for _ in range(4):
        updates, state = theirs.update(
            gradient(params, problem.batch), state, params, grad_fn=lambda p, _: gradient(p, problem.batch)
        )
        params = optax.apply_updates(params, updates)
    _, ours = problem.run("sam", steps=4, transform=base, rho=rho)
    assert np.abs(ours - np.asarray(ravel_pytree(params)[0])).max() < 1e-6
    assert np.abs(ours - problem.run("adamw", steps=4, transform=base)[1]).max() > 1e-4


def test_sam_climbs_what_perturb_and_layerwise_rho_choose(problem):
    g, theta = problem.gradient(problem.theta), problem.theta
    only = np.zeros_like(g)
    start = problems.V * problems.D  # leaves in the order of their names: embed, layers, norm, readout
    only[start : start + 2 * problems.D**2] = 1
    (got,), _ = problem.run("sam", rho=0.2, perturb=("^layers",))
    close(got, problem.gradient(theta + 0.2 * unit(only * g)))

    V, D = problems.V, problems.D
    parts = np.split(np.arange(g.size), np.cumsum([V * D, D**2, D**2, D]))
    by_width = np.concatenate([g[i] / np.sqrt(f) for i, f in zip(parts, (V, D, D, 1, D), strict=True)])
    (got,), _ = problem.run("sam", rho=0.2, layerwise_rho="width", matrix_axes=_stacked)
    close(got, problem.gradient(theta + 0.2 * unit(by_width)))
    by_norm = np.concatenate([unit(g[i]) * np.linalg.norm(theta[i]) for i in parts])
    (got,), _ = problem.run("sam", rho=0.2, layerwise_rho="norm", matrix_axes=_stacked)
    close(got, problem.gradient(theta + 0.2 * unit(by_norm)))
    assert np.isclose(float(problem.report["epsilon_norm"]), 0.2)


def _stacked(params):
    matrix = optax.contrib.MuonDimensionNumbers
    return {
        "embed": matrix(0, 1),
        "layers": {"kernel": matrix((1,), (2,))},
        "norm": {"scale": None},
        "readout": matrix(0, 1),
    }


# Published equations, in straight lines.


def test_asam(problem):
    theta, rho = problem.theta, 0.7
    g, T = problem.gradient(theta), np.abs(theta) + 0.01
    (got,), _ = problem.run("asam", rho=rho)
    close(got, problem.gradient(theta + rho * T**2 * g / np.linalg.norm(T * g)))


def test_msam_with_sgd_is_algorithm_1(problem):
    rate, mu, rho = 0.1, 0.9, 0.3
    w, v = problem.theta.copy(), np.zeros_like(problem.theta)
    for step in range(4):
        perturbed = w - rho * v / np.linalg.norm(v) if step else w
        v = mu * v + problem.gradient(perturbed)
        w = w - rate * v
    _, got = problem.run("msam", steps=4, transform=optax.sgd(rate, momentum=mu), rho=rho)
    close(got, w)


def test_msam_with_adamw(problem):
    rate, b1, b2, eps, decay, rho = 1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0
    w, m, v = problem.theta.copy(), 0.0, 0.0
    for step in range(1, 4):
        g = problem.gradient(w - rho * m / np.linalg.norm(m) if step > 1 else w)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        update = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
        w = w - rate * (update + decay * w)
    made = optim.base_optimizer("adamw", rate, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    _, got = problem.run("msam", steps=3, transform=made.transform, base=made)
    close(got, w)


def test_cr_sam(problem):
    theta, rho, gamma, beta = problem.theta, 0.2, 0.3, 0.05
    original = problem.gradient(theta)
    e_w = rho * original / np.linalg.norm(original)
    worst, best = problem.gradient(theta + e_w), problem.gradient(theta - e_w)
    wanted = worst + gamma * (worst + best - 2 * original) + beta * (worst - best)
    (got,), _ = problem.run("cr_sam", rho=rho, gamma=gamma, beta=beta)
    close(got, wanted)


def test_gsam(problem):
    theta, rho, alpha = problem.theta, 0.5, 0.4
    old = problem.gradient(theta)
    new = problem.gradient(theta + rho * unit(old))
    cosine = old @ new / (np.linalg.norm(old) * np.linalg.norm(new))
    vertical = old - cosine * np.linalg.norm(old) * new / np.linalg.norm(new)
    (got,), _ = problem.run("gsam", rho=rho, alpha=alpha)
    close(got, new - alpha * vertical)
    assert abs(vertical @ new) < 1e-12


def test_look_sam_over_two_periods(problem):
    rate, rho, alpha, k = 0.2, 0.3, 0.7, 3
    batches = [problems.batch(seed) for seed in range(5)]
    w = problem.theta.copy()
    for t, batch in enumerate(batches):
        g = problem.gradient(w, batch)
        if t % k == 0:
            g_s = problem.gradient(w + rho * unit(g), batch)
            cosine = unit(g) @ unit(g_s)
            g_v = g_s - np.linalg.norm(g_s) * cosine * unit(g)
        else:
            g_s = g + alpha * np.linalg.norm(g) / np.linalg.norm(g_v) * g_v
        w = w - rate * g_s
    _, got = problem.run("look_sam", steps=5, transform=optax.sgd(rate), batches=batches, rho=rho, alpha=alpha, k=k)
    close(got, w)


def test_look_sam_is_the_base_outside_start_and_stop(problem):
    gradients, _ = problem.run("look_sam", steps=5, rho=0.3, k=2, start=1, stop=4)
    g = problem.gradient(problem.theta)
    assert [np.linalg.norm(got - g) < 1e-12 for got in gradients] == [True, False, False, False, True]
    assert not np.allclose(gradients[1], gradients[2])


def test_friendly_sam(problem):
    rate, rho, sigma, lam = 0.2, 0.3, 0.8, 0.9
    batches = [problems.batch(seed) for seed in range(4)]
    w, average = problem.theta.copy(), None
    for batch in batches:
        g = problem.gradient(w, batch)
        climbed = g if average is None else g - sigma * average
        average = g if average is None else lam * average + (1 - lam) * g
        w = w - rate * problem.gradient(w + rho * unit(climbed), batch)
    _, got = problem.run(
        "friendly_sam", steps=4, transform=optax.sgd(rate), batches=batches, rho=rho, sigma=sigma, decay=lam
    )
    close(got, w)


def test_k_sam_in_each_of_two_shards(problem):
    theta, rho, k, half = problem.theta, 0.3, 2, problems.B // 2
    rows = lambda chosen: jax.tree.map(lambda x: x[np.asarray(chosen)], problem.batch)  # noqa: E731
    tokens = [float((row["weights"] > 0).sum()) for row in map(rows, ([i] for i in range(problems.B)))]
    summed = np.array([problem.loss(theta, rows([i])) * max(tokens[i], 1) for i in range(problems.B)])
    chosen = [*np.argsort(-summed[:half])[:k], *half + np.argsort(-summed[half:])[:k]]
    g = problem.gradient(theta, rows(chosen))
    (got,), _ = problem.run("k_sam", rho=rho, k=k, shards=2)
    close(got, problem.gradient(theta + rho * unit(g), rows(chosen)))


def test_focal_sam(problem):
    rho, gamma, lam = 0.3, 20.0, 0.5
    counts = np.arange(1, problems.V + 1)
    coefficient = lam * (1 - counts / counts.sum()) ** gamma
    targets, weights = np.asarray(problem.batch["targets"]), np.asarray(problem.batch["weights"])

    def weighted(x, c):
        tree = problem.tree(x)
        log_p = jax.nn.log_softmax(problems.trunk(tree, problem.batch) @ tree["readout"])
        losses = -jnp.take_along_axis(log_p, problem.batch["targets"][..., None], -1)[..., 0]
        return jnp.sum(losses * weights * c[targets]) / (weights > 0).sum()

    gradient = jax.grad(weighted)
    first = np.asarray(gradient(problem.flat, 1 - coefficient))
    focal = np.asarray(gradient(problem.flat, coefficient))
    second = np.asarray(gradient(jnp.asarray(problem.theta + rho * unit(focal)), coefficient))
    (got,), _ = problem.run("focal_sam", rho=rho, gamma=gamma, lam=lam, frequency=jnp.asarray(counts / counts.sum()))
    close(got, first + second)
    assert np.linalg.norm(first + second - problem.gradient(problem.theta)) > 1e-3


def floored(problem, v, floor):
    """v, each entry below floor * the mean of its parameter replaced by that mean."""
    parts = [np.asarray(part) for part in jax.tree.leaves(problem.tree(jnp.asarray(v)))]
    return np.concatenate([np.where(part < floor * part.mean(), part.mean(), part).ravel() for part in parts])


@pytest.mark.parametrize("moment", ["stale", "fresh"])
@pytest.mark.parametrize("scaled", ["l2", "ellipsoid"])
def test_preconditioned_ascent(problem, moment, scaled):
    b2, eps, rho, power, floor = 0.9, 1e-3, 0.2, 0.4, 0.1
    made = optim.base_optimizer("adamw", 1e-2, b2=b2)
    g1 = problem.gradient(problem.theta)
    untouched = made.transform.init(problem.params)
    updates, state = jax.jit(made.transform.update)(problem.tree(jnp.asarray(g1)), untouched, problem.params)
    theta = problem.theta + np.asarray(ravel_pytree(updates)[0])
    g = problem.gradient(theta)
    v = (1 - b2) * g1**2
    v = v / (1 - b2) if moment == "stale" else (b2 * v + (1 - b2) * g**2) / (1 - b2**2)
    if moment == "stale":
        v = floored(problem, v, floor)
        assert 0 < np.sum(v != g1**2) < len(v) / 2
    direction = g / (v**power + eps)
    length = np.linalg.norm(direction) if scaled == "l2" else np.sqrt(g @ direction)
    options = {
        "precond_power": power, "precond_eps": eps, "precond_norm": scaled, "precond_moment": moment,
        "precond_floor": floor,
    }  # fmt: skip
    gradient = jax.jit(optim.method("precond_sam", rho=rho, base=made, **options).gradient, static_argnums=0)
    got, _, report = gradient(problem.objective, problem.tree(jnp.asarray(theta)), problem.batch, state, ((), ()), 1)
    close(np.asarray(ravel_pytree(got)[0]), problem.gradient(theta + rho * direction / length), 1e-9)
    assert np.isclose(float(report["epsilon_norm"]), rho * np.linalg.norm(direction) / length, rtol=1e-6)

    if moment == "stale":  # before the first update v is zero and D = 1
        got, _, _ = gradient(problem.objective, problem.params, problem.batch, untouched, ((), ()), 0)
        close(np.asarray(ravel_pytree(got)[0]), problem.gradient(problem.theta + rho * unit(g1)))


@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_ascent_along_the_update_of_the_base(problem, floor):
    """One step after another: gradients at theta - rho u/|u|, u = D^-1 m of Adam's moments of those gradients."""
    b1, b2, eps, rate, decay, rho = 0.8, 0.9, 1e-8, 1e-2, 0.3, 0.2
    made = optim.base_optimizer("adamw", rate, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    theta, first, second = problem.theta, 0.0, 0.0
    for step in range(1, 4):
        seen = floored(problem, second + 0 * theta, floor)
        assert step == 1 or (0 < np.sum(seen != second) < len(theta) / 2) == bool(floor)
        u = 0.0 if step == 1 else (first / (1 - b1 ** (step - 1))) / (np.sqrt(seen / (1 - b2 ** (step - 1))) + eps)
        g = problem.gradient(theta - (rho * unit(u) if step > 1 else 0.0))
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
        theta = theta - rate * ((first / (1 - b1**step)) / (np.sqrt(second / (1 - b2**step)) + eps) + decay * theta)
    _, got = problem.run("precond_msam", steps=3, transform=made.transform, base=made, rho=rho, update_floor=floor)
    close(got, theta, 1e-7)  # eps is added to moments that are a step older


def test_adafactor_second_moment_is_the_one_adafactor_divides_by():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"matrix": (130, 140), "stack": (3, 128, 131), "flipped": (150, 2, 129), "vector": (7,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    draw = jax.jit(lambda key: {name: jax.random.normal(key, shape) for name, shape in shapes.items()})
    transform = optax.scale_by_factored_rms()
    state = transform.init(params)
    for key in keys[:2]:
        g = draw(key)
        fresh = jax.jit(lambda state, g: moments(state, params).fresh(g))(state, g)
        updates, state = jax.jit(transform.update)(g, state, params)
    for second in (fresh, jax.jit(lambda s: moments(s, params).second)(state)):
        for name in params:
            np.testing.assert_allclose(g[name] / jnp.sqrt(second[name]), updates[name], rtol=1e-10)
    before = moments(transform.init(params), params)
    assert before.count == 0
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(before.second))


def test_every_part_of_every_method_has_an_oracle_here():
    """A part counts where a test above names a method that has it. A random direction has no formula: test_parts."""
    tests = [node for node in ast.parse(pathlib.Path(__file__).read_text()).body if isinstance(node, ast.FunctionDef)]
    words = {node.value for test in tests[:-1] for node in ast.walk(test) if isinstance(node, ast.Constant)}
    rows = {name: set(row.makers()) for name, row in methods.METHODS.items() if row}
    tested = set().union(*(rows[name] for name in words & rows.keys()))
    assert [name for name, parts in rows.items() if parts - tested] == ["random_sam"]
