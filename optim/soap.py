"""SOAP as an optax transform: Adam in the eigenbases of Shampoo's factors (Vyas et al. 2024, arXiv 2409.11321)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from steppe.optim.masks import dimensions
from steppe.optim.rule import Tree, after

EVERY = 10  # steps between refreshes of the bases, as in the paper
SHIFT = 100  # a refresh adds this many rounding errors of a factor's trace to its diagonal
MOST = 10_000  # a side longer than this keeps the standard basis, as in the authors' code


class SoapState(NamedTuple):
    """count: of updates. mu: first moment. nu: second moment, for matrices in the eigenbases. sides: per leaf, (left,
    right) for a matrix, else (); each is {"factor", "basis"} [stack, side, side], or () if the side exceeds MOST."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]: a field, of the name that optax gives it
    mu: Tree
    nu: Tree
    sides: tuple


class _Matrix(NamedTuple):
    """The view of a leaf as [stack, m, n]: m its input axes, n its output axes."""

    order: tuple[int, ...]
    shape: tuple[int, ...]
    m: int
    n: int

    def to(self, leaf: jax.Array) -> jax.Array:
        return jnp.transpose(leaf, self.order).reshape(-1, self.m, self.n)

    def back(self, matrix: jax.Array) -> jax.Array:
        moved = matrix.reshape([self.shape[axis] for axis in self.order])
        return jnp.transpose(moved, [self.order.index(axis) for axis in range(len(self.shape))])


def scale_by_soap(
    b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, matrix_axes: Callable | None = None
) -> optax.GradientTransformation:
    """Adam's direction for each matrix in the eigenbases of its factors; plain Adam for other leaves.

    L, R are averages (decay b2) of G Gᵀ and GᵀG; Q_L and Q_R their eigenvectors; M is the average of G, and V of
    (Q_Lᵀ G Q_R)². The direction is Q_L (Q_Lᵀ M Q_R / (√V + eps)) Q_Rᵀ √(1 - b2^t) / (1 - b1^t), in bases from earlier
    gradients. As in the authors' code, the first step only makes L, R and the bases, and its direction is zero. Later
    gradients enter L and R after their step. Every EVERY steps, the columns of the bases and V are sorted by eigenvalue
    and one step of orthogonal iteration updates the bases.
    matrix_axes: as in optim.base; each matrix in a stack has its own factors.
    """

    def matrices(tree: Tree) -> list[_Matrix | None]:
        views = []
        for leaf, dims in zip(jax.tree.leaves(tree), dimensions(tree, matrix_axes), strict=True):
            if dims is None:
                views.append(None)
                continue
            reads, writes = dims
            stack = tuple(axis for axis in range(leaf.ndim) if axis not in (*reads, *writes))
            sizes = [math.prod(leaf.shape[axis] for axis in axes) for axes in (reads, writes)]
            views.append(_Matrix((*stack, *reads, *writes), leaf.shape, *sizes))
        return views

    def init(params: Tree) -> SoapState:
        def side(leaf, matrix, length):
            if length > MOST:
                return ()
            stack = leaf.size // (matrix.m * matrix.n)
            eye = jnp.broadcast_to(jnp.eye(length, dtype=leaf.dtype), (stack, length, length))
            return {"factor": jnp.zeros_like(eye), "basis": eye}

        sides = tuple(
            () if matrix is None else (side(leaf, matrix, matrix.m), side(leaf, matrix, matrix.n))
            for leaf, matrix in zip(jax.tree.leaves(params), matrices(params), strict=True)
        )
        zeros = jax.tree.map(jnp.zeros_like, params)
        return SoapState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros), sides)

    def begun(whole, sides):
        """The bases of a first gradient [stack, m, n]: its singular vectors are the eigenvectors of its Gram matrices.

        Eigenvectors of the Gram matrices beyond the rank would be rounding noise that differs between meshes. A QR that
        completes the singular vectors is as stable as the gradient.
        """
        left, _, right = jnp.linalg.svd(whole, full_matrices=False)
        vectors = left, jnp.swapaxes(right, -1, -2)
        return [jnp.linalg.qr(x, mode="complete")[0] if side else () for x, side in zip(vectors, sides, strict=True)]

    def turned(side):
        """(basis, order of the columns) after one step of orthogonal iteration."""
        factor, basis = side["factor"], side["basis"]
        product = factor @ basis
        order = jnp.argsort(jnp.sum(basis * product, axis=-2), axis=-1, descending=True)
        # for columns that no gradient reached, the product is rounding noise: the shift keeps them unchanged
        shift = SHIFT * jnp.finfo(factor.dtype).eps * jnp.trace(factor, axis1=-2, axis2=-1)
        moved = jnp.take_along_axis(product + shift[:, None, None] * basis, order[:, None, :], axis=-1)
        return jnp.linalg.qr(moved)[0], order

    def fed(whole, sides):
        """The sides of a matrix with its factors updated by a gradient."""
        grams = jnp.einsum("smn,skn->smk", whole, whole), jnp.einsum("smn,smk->snk", whole, whole)
        return tuple(
            {**side, "factor": b2 * side["factor"] + (1 - b2) * gram} if side else ()
            for side, gram in zip(sides, grams, strict=True)
        )

    def renewed(count, wholes, pairs):
        """(two (basis, order of columns) per matrix, a scalar that is computed with them).

        All share one branch: a collective outside could overtake one inside, see steppe.lm.model.hlo.unordered.
        """
        same = [[jnp.broadcast_to(jnp.arange(n), (len(x), n)) for n in x.shape[1:]] for x in wholes]

        def first():
            bases = [begun(whole, sides) for whole, sides in zip(wholes, pairs, strict=True)]
            return [list(zip(*each, strict=True)) for each in zip(bases, same, strict=True)], 0.0

        def later(turn, number):
            both = [zip(*each, strict=True) for each in zip(pairs, same, strict=True)]
            return [[turn(side, one) if side else ((), one) for side, one in each] for each in both], number

        def then():
            return later(lambda side, _: turned(side), 1.0)

        def between():
            return later(lambda side, one: (side["basis"], one), 2.0)

        phase = jnp.where(count == 0, 0, jnp.where(count % EVERY == 0, 1, 2))
        return lax.switch(phase, [first, then, between])

    def into(sides, x):
        left, right = sides
        x = x if not left else jnp.einsum("sab,san->sbn", left["basis"], x)
        return x if not right else jnp.einsum("smc,scd->smd", x, right["basis"])

    def out_of(sides, x):
        left, right = sides
        x = x if not left else jnp.einsum("sab,sbn->san", left["basis"], x)
        return x if not right else jnp.einsum("smd,scd->smc", x, right["basis"])

    def update(updates: Tree, state: Any, params: Any = None):
        del params
        leaves, structure = jax.tree.flatten(updates)
        shapes = matrices(updates)
        wholes = [matrix.to(g) for g, matrix in zip(leaves, shapes, strict=True) if matrix]
        pairs = [fed(*each) for each in zip(wholes, filter(None, state.sides), strict=True)]
        turns, known = renewed(state.count, wholes, pairs)
        leaves, before = after((leaves, state.sides), known)
        turns = iter(zip(pairs, turns, strict=True))
        entered = jnp.where(state.count == 0, 0.0, 1.0)  # the first gradient does not enter the moments
        by = [1 - b ** jnp.maximum(state.count, 1).astype(jnp.float32) for b in (b1, b2)]
        results = []
        for g, m, v, sides, matrix in zip(
            leaves, jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), before, shapes, strict=True
        ):
            enters, scale = entered.astype(g.dtype), (entered * jnp.sqrt(by[1]) / by[0]).astype(g.dtype)
            first = m + enters * (1 - b1) * (g - m)
            to, back = (matrix.to, matrix.back) if matrix else (lambda x: x, lambda x: x)
            turned, moved = (into(sides, to(x)) if matrix else x for x in (g, first))
            second = to(v) + enters * (1 - b2) * (turned**2 - to(v))
            direction = scale * moved / (jnp.sqrt(second) + eps)
            if matrix:
                direction = out_of(sides, direction)
                pair, ((left, rows), (right, columns)) = next(turns)
                bases = zip(pair, (left, right), strict=True)
                sides = tuple({**side, "basis": basis} if side else () for side, basis in bases)
                second = jnp.take_along_axis(second, rows[:, :, None], axis=1)
                second = jnp.take_along_axis(second, columns[:, None, :], axis=2)
            results.append((back(direction), first, back(second), sides))
        directions, firsts, seconds, sides = zip(*results, strict=True)
        trees = [jax.tree.unflatten(structure, part) for part in (directions, firsts, seconds)]
        return trees[0], SoapState(state.count + 1, trees[1], trees[2], tuple(sides))

    return optax.GradientTransformation(init, update)
