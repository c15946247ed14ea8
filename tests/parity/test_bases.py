"""Base optimizers against those of other packages, step by step over one sequence of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.optim import masks, soap
from steppe.optim.base import BASES

torch = pytest.importorskip("torch", reason="steppe[parity] is not installed")


def gradients(steps, *shapes, scale=1e-3):
    rng = np.random.default_rng(0)
    return [[rng.normal(size=shape) * scale for shape in shapes] for _ in range(steps)]


def set_gradients(parameters, given):
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = torch.tensor(gradient)


@jax.enable_x64(True)
@pytest.mark.parametrize("longest", [10_000, 5], ids=["both sides", "one side too long"])
def test_soap_is_that_of_pytorch_optimizer(longest, monkeypatch):
    """36 steps, the first of which moves nothing, and three refreshes; a matrix, and a vector that has Adam's."""
    theirs = pytest.importorskip("pytorch_optimizer", reason="steppe[parity] is not installed")
    monkeypatch.setattr(soap, "MOST", longest)
    shapes = ((5, 6) if longest == 5 else (6, 6), (7,))  # of a matrix with more rank than that the basis is free
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "precondition_frequency": soap.EVERY}
    other = theirs.SOAP(parameters, lr=1.0, weight_decay=0.0, max_precondition_dim=longest, **options)
    transform = soap.scale_by_soap(0.9, 0.95, 1e-8)
    state, update = transform.init([jnp.zeros(shape) for shape in shapes]), jax.jit(transform.update)
    for step, given in enumerate(gradients(36, *shapes)):
        before = [parameter.detach().numpy().copy() for parameter in parameters]
        set_gradients(parameters, given)
        other.step()
        found, state = update([jnp.asarray(g) for g in given], state)
        for one, was, parameter in zip(found, before, parameters, strict=True):
            # bias corrections are in float32, as optax has them
            np.testing.assert_allclose(one, was - parameter.detach().numpy(), rtol=0, atol=2e-6)
        assert np.any(found[0]) == (step > 0)


@jax.enable_x64(True)
def test_stacked_kernels_are_as_many_matrices_of_pytorch_optimizer():
    """[stack, in, head, width] as an attention kernel has them."""
    theirs = pytest.importorskip("pytorch_optimizer", reason="steppe[parity] is not installed")
    parameters = [torch.nn.Parameter(torch.zeros((4, 4), dtype=torch.float64)) for _ in range(2)]
    other = theirs.SOAP(parameters, lr=1.0, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    transform = soap.scale_by_soap(0.9, 0.95, 1e-8, masks.matrix_axes((("kernel", (1,), (2, 3)),)))
    state, update = transform.init({"kernel": jnp.zeros((2, 4, 2, 2))}), jax.jit(transform.update)
    moved = np.zeros((2, 4, 2, 2))
    for (given,) in gradients(25, (2, 4, 2, 2)):
        set_gradients(parameters, given.reshape(2, 4, 4))
        other.step()
        found, state = update({"kernel": jnp.asarray(given)}, state)
        moved -= found["kernel"]
    for layer, parameter in enumerate(parameters):
        np.testing.assert_allclose(moved[layer].reshape(4, 4), parameter.detach().numpy(), rtol=0, atol=1e-5)


@jax.enable_x64(True)
@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule_free_is_that_of_its_authors(warmup):
    """Where it trains and where it is evaluated, with a warm-up and a decay, over 25 steps of a quadratic."""
    theirs = pytest.importorskip("schedulefree", reason="steppe[parity] is not installed")
    begin, pull = np.linspace(-1, 1, 6), np.linspace(1, 3, 6)
    parameter = torch.nn.Parameter(torch.tensor(begin))
    other = theirs.AdamWScheduleFree(
        [parameter], lr=0.05, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.1, warmup_steps=warmup, foreach=False
    )
    other.train()
    rate = optax.linear_schedule(0.05 / warmup, 0.05, warmup - 1) if warmup else 0.05
    base = optim.base_optimizer("schedule_free", rate, b1=0.9, b2=0.98, eps=1e-9, weight_decay=0.1)
    params = jnp.asarray(begin)
    state, evaluated = base.transform.init(params), BASES["schedule_free"].evaluated
    for step in range(25):
        gradient = pull * (np.asarray(params) - 0.3) + np.sin(step + np.arange(6))
        parameter.grad = torch.tensor(pull * (parameter.detach().numpy() - 0.3) + np.sin(step + np.arange(6)))
        other.step()
        updates, state = base.transform.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, parameter.detach().numpy(), rtol=0, atol=2e-6)
    other.eval()
    z = next(x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "z")) if hasattr(x, "z")).z
    np.testing.assert_allclose(evaluated.at(0.9, params, z), parameter.detach().numpy(), rtol=0, atol=2e-6)


EXAMPLES = "steppe.optim.outside.examples."


@jax.enable_x64(True)
@pytest.mark.parametrize(
    ("name", "theirs", "given", "own", "apart"),
    [
        (
            "mars:mars",
            "MARS",
            {"betas": (0.9, 0.95), "gamma": 0.025, "lr_1d": 1e-2, "betas_1d": (0.9, 0.95), "weight_decay_1d": 0.1},
            {},
            1e-8,  # their eps is added before the bias is corrected
        ),
        (
            "ademamix:ademamix",
            "AdEMAMix",
            {"betas": (0.9, 0.95, 0.999), "alpha": 5.0, "t_alpha_beta3": 20},
            {"slow_warmup": 20},
            1e-12,
        ),
    ],
)
def test_examples_are_those_of_pytorch_optimizer(name, theirs, given, own, apart):
    """30 steps of gradients whose norm passes 1 on some, past the warm-up of the slow average."""
    package = pytest.importorskip("pytorch_optimizer", reason="steppe[parity] is not installed")
    rng = np.random.default_rng(0)
    begin = [rng.normal(size=shape) for shape in ((6, 5), (7,))]
    parameters = [torch.nn.Parameter(torch.tensor(array)) for array in begin]
    settings = {"lr": 1e-2, "eps": 1e-12, "weight_decay": 0.1, "weight_decouple": True}
    other = getattr(package, theirs)(parameters, **settings, **given)
    base = optim.base_optimizer(EXAMPLES + name, 1e-2, b1=0.9, b2=0.95, eps=1e-12, weight_decay=0.1, **own)
    params = [jnp.asarray(array) for array in begin]
    state, update = base.transform.init(params), jax.jit(base.transform.update)
    for _ in range(30):
        gradient = [rng.normal(size=array.shape) * 10 ** rng.uniform(-2, 1) for array in begin]
        set_gradients(parameters, gradient)
        other.step()
        updates, state = update([jnp.asarray(array) for array in gradient], state, params)
        params = optax.apply_updates(params, updates)
    for ours, parameter in zip(params, parameters, strict=True):
        np.testing.assert_allclose(ours, parameter.detach().numpy(), rtol=0, atol=apart)


@jax.enable_x64(True)
@pytest.mark.parametrize("name", ["adam_hyperball", "muon_hyperball"])
def test_hyperball_is_its_formula_on_each_matrix_of_a_stack(name):
    """W <- R N(W - rate R N(u)), u of optax alone; what is no matrix takes decoupled AdamW."""
    rng, rate, decay = np.random.default_rng(0), 0.1, 0.1
    params = {"kernel": rng.normal(size=(2, 4, 6)), "scale": rng.normal(size=5)}
    axes = masks.matrix_axes((("kernel", (1,), (2,)),))
    base = optim.base_optimizer(
        f"{EXAMPLES}hyperball:{name}", rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=decay, matrix_axes=axes
    )
    alone = {
        "adam_hyperball": optax.scale_by_adam(0.9, 0.95, 1e-8),
        "muon_hyperball": optax.chain(
            optax.contrib.muon(1.0, beta=0.9, eps=1e-8, adam_b1=0.9, adam_b2=0.95, muon_weight_dimension_numbers=axes),
            optax.scale(-1.0),
        ),
    }[name]
    state, inner, radii = base.transform.init(params), alone.init(params), np.linalg.norm(params["kernel"], axis=(1, 2))
    for _ in range(5):
        gradient = {key: rng.normal(size=value.shape) for key, value in params.items()}
        updates, state = base.transform.update(gradient, state, params)
        u, inner = alone.update(gradient, inner, params)
        want = []
        for matrix, direction, radius in zip(params["kernel"], np.asarray(u["kernel"]), radii, strict=True):
            moved = matrix - rate * radius * direction / np.linalg.norm(direction)
            want.append(radius * moved / np.linalg.norm(moved))
        scale = params["scale"] - rate * (np.asarray(u["scale"]) + decay * params["scale"])
        params = {key: np.asarray(value + updates[key]) for key, value in params.items()}
        np.testing.assert_allclose(params["kernel"], want, rtol=1e-6)
        np.testing.assert_allclose(params["scale"], scale, rtol=1e-6)
