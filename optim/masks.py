"""Parameter paths; masks, factors and matrix axes by regexes over them."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from steppe.optim.rule import Tree


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


def default_axes(tree: Tree) -> Tree:
    """Default optax.contrib.MuonDimensionNumbers of a tree: reduces all axes but the last; None for vectors."""

    def axes(leaf):
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1) if leaf.ndim > 1 else None

    return jax.tree.map(axes, tree)


def dimensions(tree: Tree, axes: Callable[[Tree], Tree] | None) -> list[MuonDimensionNumbers | None]:
    """The MuonDimensionNumbers of every leaf, in order; None for leaves that are not matrices."""
    numbers = axes(tree) if axes else default_axes(tree)
    return jax.tree.leaves(numbers, is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers))


def matrix_norm(matrix: jax.Array, dims: MuonDimensionNumbers) -> jax.Array:
    """The Frobenius norm of each matrix in a stack; the axes of a matrix have length 1 in the result."""
    axes = [(axis,) if isinstance(axis, int) else tuple(axis) for axis in (dims.reduction_axis, dims.output_axis)]
    return jnp.sqrt(jnp.sum(matrix * matrix, axis=axes[0] + axes[1], keepdims=True))


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
