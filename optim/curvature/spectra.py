"""Eigenvalues, trace and spectral density of a symmetric operator on parameter trees, computed with matfree.

The operator is a function tree -> tree; see optim.curvature.products. matfree needs flat vectors, which `flat` makes
and `place` shards. Functions that apply the operator are pure and can be jitted. The others use their small results on
the host, in float64.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from steppe.optim.rule import Tree


class Flat(NamedTuple):
    """Trees as vectors of `size` entries and `pad` zeros: flatten(tree) -> [n], unflatten([n]) -> tree."""

    flatten: Callable[[Tree], jax.Array]
    unflatten: Callable[[jax.Array], Tree]
    size: int
    pad: int
    dtype: jnp.dtype


class Krylov(NamedTuple):
    """Result of Lanczos: diagonal [k] and offdiagonal [k] of T (the last entry is the residual norm), basis [k, n].

    square: squared norm of the start vector.
    """

    diagonal: jax.Array
    offdiagonal: jax.Array
    basis: jax.Array
    square: jax.Array


class Ritz(NamedTuple):
    """Eigenpairs of T on the host, ascending: values [m], weights [m] in the spectral density, coefficients [m, m].

    bounds [m]: |A v - value v| for the vector v of each pair, computed without another product.
    """

    values: np.ndarray
    weights: np.ndarray
    coefficients: np.ndarray
    bounds: np.ndarray


class Estimate(NamedTuple):
    """A mean over probes and its standard error (NaN for one probe)."""

    mean: float
    error: float


def flat(like: Tree, parts: int = 1, place: Callable[[jax.Array], jax.Array] = lambda vector: vector) -> Flat:
    """Converts between trees like `like` (arrays or shapes) and vectors, padded to a multiple of `parts`.

    place(vector): constrains the sharding of a vector inside jit.
    """
    leaves, structure = jax.tree.flatten(like)
    edges = np.cumsum([0, *(leaf.size for leaf in leaves)])
    pad, dtype = -int(edges[-1]) % parts, jnp.result_type(*leaves)

    def flatten(tree):
        pieces = [leaf.astype(dtype).ravel() for leaf in jax.tree.leaves(tree)]
        return place(jnp.concatenate([*pieces, jnp.zeros(pad, dtype)]))

    def unflatten(vector):
        pieces = [vector[a:b] for a, b in pairwise(edges)]
        shaped = [piece.reshape(leaf.shape).astype(leaf.dtype) for piece, leaf in zip(pieces, leaves, strict=True)]
        return jax.tree.unflatten(structure, shaped)

    return Flat(flatten, unflatten, int(edges[-1]), pad, dtype)


def signs(view: Flat, key: jax.Array, keep: Tree | None = None) -> jax.Array:
    """A vector of random signs, 0 in the padding and where `keep` is false; the same on any number of devices."""
    from matfree.stochtrace import sampler_signs

    drawn = sampler_signs(jnp.zeros(view.size, view.dtype), num=1)(key)[0]
    tree = view.unflatten(jnp.pad(drawn, (0, view.pad)))
    if keep is not None:
        tree = jax.tree.map(lambda leaf, chosen: leaf if chosen else jnp.zeros_like(leaf), tree, keep)
    return view.flatten(tree)


def lanczos(product: Callable[[Tree], Tree], view: Flat, start: jax.Array, steps: int) -> Krylov:
    """Runs Lanczos for `steps` products from `start` [n], with full reorthogonalisation.

    Memory in addition to the product's: the basis, steps x n, twice while matfree transposes it.
    """
    from matfree.decomp import hessenberg

    def matvec(vector):
        return view.flatten(product(view.unflatten(vector)))

    found = hessenberg(steps, reortho="full", custom_vjp=False)(matvec, start)
    # Read T below the diagonal: beyond the rank, entries above it are noise, which tridiag_sym would average in.
    small, basis = cast(tuple[jax.Array, jax.Array], (found.J_small, found.Q_tall))
    below = jnp.append(jnp.diagonal(small, -1), jnp.linalg.norm(found.residual))
    return Krylov(jnp.diagonal(small), below, basis, jnp.sum(start * start))


def ritz(krylov: Krylov) -> Ritz:
    """The eigenpairs of T up to the operator's rank. Raises FloatingPointError for a non-finite product."""
    precision = 10 * float(jnp.finfo(krylov.diagonal.dtype).eps)
    diagonal, offdiagonal = (np.asarray(jax.device_get(x), np.float64) for x in krylov[:2])
    m, scale = 0, 0.0
    for m, (a, b) in enumerate(zip(np.abs(diagonal), np.abs(offdiagonal), strict=True), 1):
        if not np.isfinite(a + b):
            raise FloatingPointError(f"the operator's product {m} of Lanczos is not finite")
        scale = max(scale, a)
        if b <= precision * scale:
            break
        scale = max(scale, b)
    matrix = np.diag(diagonal[:m]) + np.diag(offdiagonal[: m - 1], 1) + np.diag(offdiagonal[: m - 1], -1)
    values, vectors = np.linalg.eigh(matrix)
    return Ritz(values, vectors[0] ** 2, vectors, np.abs(offdiagonal[m - 1] * vectors[-1]))


def ritz_vector(krylov: Krylov, found: Ritz, index: int) -> jax.Array:
    """The unit vector [n] of one eigenpair."""
    coefficients = np.zeros(len(krylov.diagonal))
    coefficients[: len(found.values)] = found.coefficients[:, index]
    # the basis beyond a breakdown may be NaN, and 0 * NaN is NaN
    basis = jnp.where(coefficients[:, None] == 0, 0, krylov.basis)
    vector = jnp.asarray(coefficients, krylov.basis.dtype) @ basis
    return vector / jnp.linalg.norm(vector)


def residual(vector: jax.Array, image: jax.Array) -> tuple[float, float]:
    """(Rayleigh quotient, |A v - quotient v|) of a unit vector v and its image A v; the latter bounds the error."""
    quotient = jnp.vdot(vector, image)
    return float(quotient), float(jnp.linalg.norm(image - quotient * vector))


def estimate(samples: Sequence[float]) -> Estimate:
    """Mean and standard error of independent samples. Samples v^T A v of sign vectors v give the trace (Hutchinson)."""
    values = np.asarray(samples, np.float64)
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return Estimate(float(values.mean()), float(error))


def density(probes: Sequence[Ritz], points: int = 801, width: float = 0.005) -> tuple[np.ndarray, np.ndarray]:
    """Spectral density by stochastic Lanczos quadrature: (grid [points], density [points], which integrates to 1).

    The mean over probes of their weighted Ritz values, smoothed by Gaussians of `width` times the range of all values.
    """
    low, high = min(p.values[0] for p in probes), max(p.values[-1] for p in probes)
    sigma = width * max(high - low, 1e-6 * max(abs(low), abs(high)), 1e-30)
    grid = np.linspace(low - 6 * sigma, high + 6 * sigma, points)
    total = np.zeros(points)
    for probe in probes:
        bells = np.exp(-0.5 * ((grid[:, None] - probe.values) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
        total += bells @ probe.weights / len(probes)
    return grid, total
