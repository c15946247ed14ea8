"""SOAP: Adam in the eigenbases of Shampoo's factors (Vyas et al. 2024, arXiv 2409.11321), an optax transform."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from steppe.optim.masks import dimensions
from steppe.optim.rule import Tree

EVERY = 10  # steps between two refreshes of the bases, as in the paper
MOST = 10_000  # a side longer than this keeps its own basis, as its authors' code has it


class SoapState(NamedTuple):
    """count of updates; mu: first moment; nu: second moment, of a matrix in the eigenbases; sides: per leaf in order,
    () for what is no matrix, else (left, right), each {"factor", "basis"} [stack, side, side], or () where too long."""

    count: jax.Array
    mu: Tree
    nu: Tree
    sides: tuple


class _Matrix(NamedTuple):
    """A leaf as [stack, m, n]: m what it sums over, n what it writes."""

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
    """Adam's direction, of each matrix in the eigenbases of its factors; Adam itself of what is no matrix.

    With L, R the averages (decay b2) of G Gᵀ and GᵀG, Q_L, Q_R their eigenvectors by one step of orthogonal iteration
    every EVERY steps (the first time exactly), M the average of G and V that of (Q_Lᵀ G Q_R)²: the direction is
    Q_L (Q_Lᵀ M Q_R / (√V + eps)) Q_Rᵀ, M and V bias-corrected. The paper leaves out the first step; here the factors of
    its own gradient serve it. matrix_axes: as optim.base takes it; stacked matrices have factors of their own.
    """

    def matrices(tree: Tree) -> list[_Matrix | None]:
        found = []
        for leaf, dims in zip(jax.tree.leaves(tree), dimensions(tree, matrix_axes), strict=True):
            if dims is None:
                found.append(None)
                continue
            reads, writes = (
                (axis,) if isinstance(axis, int) else tuple(axis) for axis in (dims.reduction_axis, dims.output_axis)
            )
            stack = tuple(axis for axis in range(leaf.ndim) if axis not in (*reads, *writes))
            sizes = [math.prod(leaf.shape[axis] for axis in axes) for axes in (reads, writes)]
            found.append(_Matrix((*stack, *reads, *writes), leaf.shape, *sizes))
        return found

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

    def refreshed(count, side, gram):
        if not side:
            return ()
        factor = b2 * side["factor"] + (1 - b2) * gram
        basis = lax.switch(
            jnp.where(count == 0, 0, jnp.where(count % EVERY == 0, 1, 2)),
            [
                lambda: jnp.linalg.eigh(factor)[1][..., ::-1],
                lambda: jnp.linalg.qr(factor @ side["basis"])[0],
                lambda: side["basis"],
            ],
        )
        return {"factor": factor, "basis": basis}

    def into(sides, x):
        left, right = sides
        x = x if not left else jnp.einsum("sab,san->sbn", left["basis"], x)
        return x if not right else jnp.einsum("smc,scd->smd", x, right["basis"])

    def out_of(sides, x):
        left, right = sides
        x = x if not left else jnp.einsum("sab,sbn->san", left["basis"], x)
        return x if not right else jnp.einsum("smd,scd->smc", x, right["basis"])

    def update(gradient: Tree, state: SoapState, params: Any = None):
        del params
        leaves, structure = jax.tree.flatten(gradient)
        count = state.count + 1
        right_by = [(1 - b ** count.astype(jnp.float32)) for b in (b1, b2)]
        found = []
        for g, m, v, sides, matrix in zip(
            leaves, jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), state.sides, matrices(gradient), strict=True
        ):
            first = b1 * m + (1 - b1) * g
            if matrix is None:
                turned, moved, back = g, first, lambda x: x
            else:
                whole = matrix.to(g)
                grams = jnp.einsum("smn,skn->smk", whole, whole), jnp.einsum("smn,smk->snk", whole, whole)
                sides = tuple(refreshed(state.count, side, gram) for side, gram in zip(sides, grams, strict=True))
                turned, moved = into(sides, whole), into(sides, matrix.to(first))
                v = matrix.to(v)
                back = lambda x, s=sides, mat=matrix: mat.back(out_of(s, x))  # noqa: E731
            second = b2 * v + (1 - b2) * turned**2
            corrected = [x / by.astype(x.dtype) for x, by in zip((moved, second), right_by, strict=True)]
            direction = back(corrected[0] / (jnp.sqrt(corrected[1]) + eps))
            found.append((direction, first, second if matrix is None else matrix.back(second), sides))
        directions, firsts, seconds, sides = zip(*found, strict=True)
        trees = [jax.tree.unflatten(structure, part) for part in (directions, firsts, seconds)]
        return trees[0], SoapState(count, trees[1], trees[2], tuple(sides))

    return optax.GradientTransformation(init, update)
