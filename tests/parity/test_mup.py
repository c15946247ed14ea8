"""A transformer's widths against those of the package `mup`, by the authors of the parametrisation.

`pip install --no-deps mup==1.0.0`: it asks for torchvision and seaborn, and imports neither.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import lm_runs
from steppe.lm.model.parameters import MATRIX_AXES
from steppe.lm.model.transformer import Trunk, shape
from steppe.lm.parts.state import init_params
from steppe.optim.base import base

torch = pytest.importorskip("torch", reason="steppe[parity] is not installed")
mup = pytest.importorskip("mup", reason="mup is not installed")

BASE, WIDTH, VOCABULARY, RATE = 16, 64, 512, 0.01


def shape_at(width, style, parametrisation="mup"):
    """An untied model of two layers, whose heads are 8 wide."""
    sizes = {"width": width, "heads": width // 8, "mlp_width": 2 * width, "tie_embeddings": False, "style": style}
    sizes |= {"parametrisation": parametrisation, "base_width": BASE}
    config = lm_runs.config("", "", **{f"model__{key}": value for key, value in sizes.items()})
    return shape(config.model, VOCABULARY, 16, "einsum")


@functools.cache
def drawn(width, style):
    params = init_params(shape_at(width, style), jax.random.key(0))
    names = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {names(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def structure(style):
    return jax.tree.structure(jax.eval_shape(lambda: init_params(shape_at(WIDTH, style), jax.random.key(0))))


def as_matrices(leaf):
    """Heads and their entries as one axis and layers as the last: of a matrix mup looks at the first two axes."""
    if leaf.ndim == 4:
        layers, first, second, last = leaf.shape  # width, heads, entries; or heads, entries, width
        leaf = leaf.reshape(layers, first, -1) if first > second else leaf.reshape(layers, -1, last)
    return np.moveaxis(leaf, 0, -1) if leaf.ndim == 3 else leaf


def of_torch(params):
    tensors = {name: torch.tensor(as_matrices(np.array(leaf, np.float64))) for name, leaf in params.items()}
    return torch.nn.ParameterDict({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()})


def theirs(style):
    """Our parameters at the large width, of which mup knows the shapes at the base width."""
    made = of_torch(drawn(WIDTH, style))
    return mup.set_base_shapes(made, of_torch(drawn(BASE, style)))


@jax.enable_x64(True)
@pytest.mark.parametrize("style", ["nanodo", "modern"])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_every_parameter_moves_as_mup_moves_it(name, style):
    """Five updates of every parameter, equal to 1e-12 of the largest."""
    tensors, adams = theirs(style), {"betas": (0.9, 0.95), "eps": 1e-8}
    other = {
        "adam": lambda: mup.MuAdam(tensors.values(), lr=RATE, **adams),
        "adamw": lambda: mup.MuAdamW(tensors.values(), lr=RATE, weight_decay=0.0, **adams),
        "sgd": lambda: mup.MuSGD(tensors.values(), lr=RATE, momentum=0.9),
    }[name]()
    optimizer = base(name, RATE, b1=0.9, b2=0.95, eps=1e-8, matrix_axes=MATRIX_AXES, widening=WIDTH / BASE).transform
    tree = structure(style)
    params = jax.tree.unflatten(tree, [jnp.asarray(leaf, jnp.float64) for leaf in drawn(WIDTH, style).values()])
    state, rng, update = optimizer.init(params), np.random.default_rng(0), jax.jit(optimizer.update)
    for _ in range(5):
        given = [rng.normal(size=leaf.shape) * 1e-2 for leaf in jax.tree.leaves(params)]
        for tensor, gradient in zip(tensors.values(), given, strict=True):
            tensor.grad = torch.tensor(as_matrices(gradient))
        other.step()
        updates, state = update(jax.tree.unflatten(tree, given), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for path, ours, tensor in zip(drawn(WIDTH, style), jax.tree.leaves(params), tensors.values(), strict=True):
        begun = as_matrices(np.asarray(drawn(WIDTH, style)[path], np.float64))
        moved = tensor.detach().numpy() - begun
        most = 1e-12 * np.abs(moved).max()
        np.testing.assert_allclose(as_matrices(ours) - begun, moved, rtol=0, atol=most, err_msg=path)


@pytest.mark.parametrize("style", ["nanodo", "modern"])
def test_every_parameter_is_drawn_as_mup_draws_it(style):
    """From the deviation at the base width, to 8%: the narrowest table has 256 entries."""
    torch.manual_seed(0)
    for (path, narrow), tensor in zip(drawn(BASE, style).items(), theirs(style).values(), strict=True):
        if narrow.std() > 0:  # the others are constant
            mup.init.normal_(tensor, std=float(narrow.std()))
            assert drawn(WIDTH, style)[path].std() == pytest.approx(float(tensor.detach().std()), rel=0.08), path


@pytest.mark.parametrize("style", ["nanodo", "modern"])
def test_logits_are_those_of_its_readout(style):
    tokens = jnp.arange(16)[None]
    tree = structure(style)
    params = jax.tree.unflatten(tree, drawn(WIDTH, style).values())
    hidden = {
        kind: Trunk(shape_at(WIDTH, style, kind)).apply({"params": params}, tokens) for kind in ("mup", "standard")
    }
    kernel = next(leaf for path, leaf in drawn(WIDTH, style).items() if path.startswith("readout"))
    readout = mup.MuReadout(WIDTH, VOCABULARY, bias=False)
    mup.set_base_shapes(readout, mup.MuReadout(BASE, VOCABULARY, bias=False), rescale_params=False)
    readout.weight.data = torch.tensor(np.array(kernel))
    expected = readout(torch.tensor(np.array(hidden["standard"]))).detach().numpy()
    np.testing.assert_allclose(hidden["mup"] @ kernel.T, expected, rtol=1e-5, atol=1e-6)
