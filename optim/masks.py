"""Parameter paths; masks, factors and matrix axes by regexes over them."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from steppe.optim.rule import Tree

Axes = tuple[tuple[int, ...], tuple[int, ...]]  # (reduced, output) axes of a matrix; others stack matrices


def path_names(tree: Tree) -> Tree:
    """The tree with each leaf replaced by its path, such as "layers/attention/query/kernel"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )


def mask(tree: Tree, patterns: tuple[str, ...]) -> Tree:
    """True for every leaf whose path a pattern matches (re.search). Raises ValueError if a pattern matches no path."""
    names = path_names(tree)
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in jax.tree.leaves(names)):
            raise ValueError(f"pattern {pattern!r} matches no parameter; there are {', '.join(jax.tree.leaves(names))}")
    return jax.tree.map(lambda name: any(re.search(pattern, name) for pattern in patterns), names)


def factors(tree: Tree, rules: tuple[str, ...]) -> tuple[Tree, Tree]:
    """(group, factor) of every leaf. The first rule "REGEX=FACTOR" that matches its path decides.

    Rule n makes group n; leaves without a rule have group 0 and factor 1. Raises ValueError if a rule matches no path.
    """
    parts = [rule.rpartition("=") for rule in rules]
    patterns, values = [regex for regex, _, _ in parts], [1.0, *(float(value) for _, _, value in parts)]
    mask(tree, tuple(patterns))

    def group(name):
        return next((number for number, regex in enumerate(patterns, 1) if re.search(regex, name)), 0)

    groups = jax.tree.map(group, path_names(tree))
    return groups, jax.tree.map(lambda number: values[number], groups)


def dimensions(tree: Tree, axes: Callable[[Tree], Tree] | None) -> list[Axes | None]:
    """The axes of every leaf, in order; None for leaves that are not matrices.

    axes: makes optax.contrib.MuonDimensionNumbers; default: all axes but the last of a matrix are reduced.
    """
    if not axes:
        return [(tuple(range(x.ndim - 1)), (x.ndim - 1,)) if x.ndim > 1 else None for x in jax.tree.leaves(tree)]

    def both(dims: MuonDimensionNumbers) -> Axes:
        reads, writes = ((axis,) if isinstance(axis, int) else tuple(axis) for axis in dims)
        return reads, writes

    numbers = jax.tree.leaves(axes(tree), is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers))
    return [None if dims is None else both(dims) for dims in numbers]


def matrix_norm(matrix: jax.Array, dims: Axes) -> jax.Array:
    """The Frobenius norm of each matrix in a stack; the axes of a matrix have length 1 in the result."""
    return jnp.sqrt(jnp.sum(matrix * matrix, axis=dims[0] + dims[1], keepdims=True))


def by_width(tree: Tree, axes: Callable | None, widening: float, vectors: float, matrices: float) -> Tree:
    """Multiplies matrices by widening ** matrices and other leaves by widening ** vectors."""
    leaves, structure = jax.tree.flatten(tree)
    powers = [vectors if dims is None else matrices for dims in dimensions(tree, axes)]
    scaled = [leaf * widening**power if power else leaf for leaf, power in zip(leaves, powers, strict=True)]
    return jax.tree.unflatten(structure, scaled)


def matrix_axes(rules: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]) -> Callable[[Tree], Tree]:
    """Makes the `matrix_axes` of optim.base from rules (regex, reduced axes, output axes); the first match decides.

    All other axes stack matrices, as layers do. Parameters without a matching rule are not matrices (None).
    """

    def axes(params):
        def one(name):
            return next((MuonDimensionNumbers(*dims) for regex, *dims in rules if re.search(regex, name)), None)

        return jax.tree.map(one, path_names(params))

    return axes
