"""Float64: eigenvalues, traces, densities losses around theta against dense matrices, on one and eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import optim_problems as problems
from helpers.optim_problems import close, unit
from steppe.optim.curvature import landscape, products, spectra
from steppe.optim.masks import mask

pytestmark = pytest.mark.usefixtures("float64")
DEPTH = 40


@pytest.fixture(scope="module")
def view(problem):
    return spectra.flat(problem.params)


@pytest.fixture(scope="module")
def probes(problem, view):
    """Six Lanczos runs on each of H, GGN and NME."""

    def run(product, key):
        def matvec(vector):
            return product(problem.objective, problem.params, problem.batch, vector)

        return spectra.lanczos(matvec, view, spectra.signs(view, key), DEPTH)

    keys = jax.random.split(jax.random.key(0), 6)
    return {
        name: [jax.jit(run, static_argnums=0)(product, key) for key in keys]
        for name, product in products.PRODUCTS.items()
    }


def test_extreme_eigenvalues_and_their_residuals(problem, view, matrices, probes):
    for (name, product), matrix in zip(products.PRODUCTS.items(), matrices, strict=True):
        wanted = np.linalg.eigvalsh(matrix)
        krylov = probes[name][0]
        found = spectra.ritz(krylov)
        for index in (0, -1):
            vector = spectra.ritz_vector(krylov, found, index)
            image = view.flatten(product(problem.objective, problem.params, problem.batch, view.unflatten(vector)))
            quotient, off = spectra.residual(vector, image)
            assert abs(off - found.bounds[index]) < 1e-9, name  # what Lanczos says of it is true
            nearest = np.min(np.abs(wanted - quotient))
            assert nearest <= off + 1e-12, name
            if abs(wanted[index]) > 0.1 * wanted[-1]:  # the GGN's lowest are many zeros
                assert abs(quotient - wanted[index]) < 1e-6 * wanted[-1], (name, index)


def test_the_bound_of_a_short_run_holds_and_is_not_idle(problem, view, matrices):
    matrix = jnp.asarray(matrices[0])
    product = lambda tree: view.unflatten(matrix @ view.flatten(tree))  # noqa: E731
    found = spectra.ritz(spectra.lanczos(product, view, spectra.signs(view, jax.random.key(1)), 6))
    values = np.linalg.eigvalsh(matrices[0])
    errors = [np.min(np.abs(values - value)) for value in found.values]
    assert np.all(errors <= found.bounds + 1e-12)
    assert errors[-1] > 1e-6


def test_trace_within_its_stated_error(matrices, probes):
    for name, matrix in zip(probes, matrices, strict=True):
        samples = [float(krylov.diagonal[0] * krylov.square) for krylov in probes[name]]
        found = spectra.estimate(samples)
        assert abs(found.mean - np.trace(matrix)) < 3 * found.error, name
        assert 0 < found.error < 0.5 * np.abs(np.linalg.eigvalsh(matrix)).sum()
        assert found.error == pytest.approx(np.std(samples, ddof=1) / 6**0.5)
    assert np.isnan(spectra.estimate([1.0]).error)


def test_hutchinson_samples_are_the_quadratic_forms_of_signs(problem, view, matrices, probes):
    keys = jax.random.split(jax.random.key(0), 6)
    for key, krylov in zip(keys, probes["nme"], strict=True):
        vector = np.asarray(spectra.signs(view, key))
        assert set(np.unique(vector)) == {-1.0, 1.0}
        assert float(krylov.square) == problem.theta.size
        assert float(krylov.diagonal[0] * krylov.square) == pytest.approx(vector @ matrices[2] @ vector, abs=1e-10)


def test_the_density_integrates_to_one_and_its_mean_is_the_trace_per_parameter(problem, matrices, probes):
    for name, matrix in zip(probes, matrices, strict=True):
        rows = [spectra.ritz(krylov) for krylov in probes[name]]
        grid, height = spectra.density(rows)
        assert np.trapezoid(height, grid) == pytest.approx(1, abs=1e-6)
        trace = spectra.estimate([float(krylov.diagonal[0] * krylov.square) for krylov in probes[name]])
        assert np.trapezoid(height * grid, grid) == pytest.approx(trace.mean / problem.theta.size, abs=1e-6)
        values = np.linalg.eigvalsh(matrix)
        middle = 0.5 * values[-1]  # the share of large eigenvalues, beyond the spread of six probes
        share = np.trapezoid(np.where(grid > middle, height, 0), grid)
        assert share == pytest.approx(np.mean(values > middle), abs=0.05)


def test_a_rank_that_runs_out_ends_the_run(view):
    low = jnp.zeros(view.size).at[jnp.array([3, 9])].set(jnp.array([2.0, -1.0]))
    krylov = spectra.lanczos(
        lambda tree: view.unflatten(low * view.flatten(tree)), view, spectra.signs(view, jax.random.key(0)), 12
    )
    found = spectra.ritz(krylov)
    assert len(found.values) == 3  # 2, -1 and 0
    close(found.values, np.array([-1.0, 0.0, 2.0]), 1e-10)
    vector = spectra.ritz_vector(krylov, found, -1)
    close(np.abs(np.asarray(vector)), np.eye(view.size)[3], 1e-6)
    zero = spectra.lanczos(lambda tree: jax.tree.map(jnp.zeros_like, tree), view, jnp.ones(view.size), 5)
    assert spectra.ritz(zero).values.tolist() == [0.0]
    with pytest.raises(FloatingPointError, match="not finite"):
        spectra.ritz(spectra.lanczos(lambda tree: jax.tree.map(lambda x: x * jnp.nan, tree), view, vector, 5))


def test_a_group_has_its_own_spectrum(problem, view, matrices):
    keep = mask(problem.params, ("^layers",))
    chosen = np.flatnonzero(ravel_pytree(jax.tree.map(lambda p, k: jnp.full(p.shape, k), problem.params, keep))[0])
    start = spectra.signs(view, jax.random.key(2), keep)
    product = products.restricted(
        lambda v: products.hessian_product(problem.objective, problem.params, problem.batch, v), keep
    )
    krylov = jax.jit(lambda start: spectra.lanczos(product, view, start, len(chosen)))(start)
    assert float(krylov.square) == len(chosen)
    found, block = spectra.ritz(krylov), matrices[0][np.ix_(chosen, chosen)]
    wanted = np.linalg.eigvalsh(block)
    assert abs(found.values[-1] - wanted[-1]) < 1e-9
    assert abs(found.values[0] - wanted[0]) < 1e-9


def test_eight_devices_give_the_numbers_of_one(problem, matrices):
    mesh = jax.make_mesh((8,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    params = jax.device_put(problem.params, NamedSharding(mesh, P()))
    batch = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("all"))), problem.batch)
    split = NamedSharding(mesh, P("all"))

    def run(params, batch, key, parts, place):
        view = spectra.flat(params, parts, place)
        start = spectra.signs(view, key)
        product = lambda v: products.ggn_product(problem.objective, params, batch, v)  # noqa: E731
        return spectra.lanczos(product, view, start, 12), start

    one, start = jax.jit(lambda p, b, k: run(p, b, k, 1, lambda x: x))(problem.params, problem.batch, jax.random.key(3))
    eight, padded = jax.jit(lambda p, b, k: run(p, b, k, 8, lambda x: jax.lax.with_sharding_constraint(x, split)))(
        params, batch, jax.random.key(3)
    )
    count = problem.theta.size
    assert padded.sharding.is_equivalent_to(split, 1)
    assert eight.basis.sharding.shard_shape(eight.basis.shape)[1] < eight.basis.shape[1]  # the basis is split too
    assert np.array_equal(padded[:count], start)
    assert not np.any(np.asarray(padded[count:]))
    a, b = spectra.ritz(one), spectra.ritz(eight)
    close(b.values, a.values, 1e-10)
    close(np.asarray(eight.square), np.asarray(one.square), 0)
    close(b.weights, a.weights, 1e-8)


def test_the_rise_and_its_parts(problem, matrices):
    _, ggn, nme = matrices
    g = problem.gradient(problem.theta)
    step = jax.jit(landscape.rise, static_argnums=0)
    for objective in (problem.objective, problems.split_language_model()):
        for rho in (1e-3, 2e-3):
            epsilon = rho * unit(g)
            got = step(
                objective, problem.params, problem.batch, problem.tree(jnp.asarray(g)),
                problem.tree(jnp.asarray(epsilon)),
            )  # fmt: skip
            change = problem.loss(problem.theta + epsilon) - problem.loss(problem.theta)
            assert float(got["rise"]) == pytest.approx(change, abs=1e-14)
            parts = sum(float(got[name]) for name in ("first_order", "functional", "logit"))
            assert parts == pytest.approx(change, abs=1e-14)
            for name, matrix in (("functional", nme), ("logit", ggn)):
                assert float(got[name]) == pytest.approx(0.5 * epsilon @ matrix @ epsilon, abs=20 * rho**3), name
    assert abs(0.5 * epsilon @ nme @ epsilon) > 2 * 20 * rho**3 > 0


def test_ascent_begins_at_sams_perturbation_stays_in_the_ball_and_climbs(problem, matrices):
    rho = 0.3
    step = jax.jit(landscape.ascend, static_argnums=0)
    epsilon, losses = jax.tree.map(jnp.zeros_like, problem.params), []
    for number in range(8):
        loss, gradient, further = step(problem.objective, problem.params, problem.batch, epsilon, rho)
        here = np.asarray(ravel_pytree(epsilon)[0])
        assert float(loss) == pytest.approx(problem.loss(problem.theta + here), abs=1e-13)
        close(np.asarray(ravel_pytree(gradient)[0]), problem.gradient(problem.theta + here))
        epsilon = further
        flat = np.asarray(ravel_pytree(epsilon)[0])
        if number == 0:
            close(flat, rho * unit(problem.gradient(problem.theta)), 1e-12)
        assert np.linalg.norm(flat) <= rho * (1 + 1e-12)
        losses.append(float(loss))
    assert losses[1] > losses[0]
    assert losses[-1] > losses[1] + 1e-4  # more than the one step SAM takes
    assert losses[-1] - losses[-2] < 0.02 * (losses[-1] - losses[0])


def test_loss_along_directions(problem):
    rng = np.random.default_rng(5)
    a, b = (rng.normal(size=problem.theta.size) for _ in range(2))
    trees = tuple(problem.tree(jnp.asarray(x)) for x in (a, b))
    at = jax.jit(landscape.loss_at, static_argnums=(0, 5))
    for parts in (1, 4):
        got = at(problem.objective, problem.params, problem.batch, trees, jnp.asarray([0.2, -0.1]), parts)
        assert float(got) == pytest.approx(problem.loss(problem.theta + 0.2 * a - 0.1 * b), abs=1e-13)
