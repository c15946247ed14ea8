"""Parameter paths, and what regexes over them decide."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from steppe.optim.rule import Tree


def path_names(tree: Tree) -> Tree:
    """The same tree with each leaf replaced by its path, "layers/attention/query/kernel"."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )


def mask(tree: Tree, patterns: tuple[str, ...]) -> Tree:
    """True for every leaf whose path some pattern matches (re.search). ValueError if a pattern matches no path."""
    names = path_names(tree)
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in jax.tree.leaves(names)):
            raise ValueError(f"pattern {pattern!r} matches no parameter; there are {', '.join(jax.tree.leaves(names))}")
    return jax.tree.map(lambda name: any(re.search(pattern, name) for pattern in patterns), names)


def factors(tree: Tree, rules: tuple[str, ...]) -> tuple[Tree, Tree]:
    """(group, factor) of every leaf, by rules "REGEX=FACTOR": those of the first that matches its path.

    Groups are numbered from 1; leaves that no rule matches are group 0, of factor 1. ValueError if a rule matches no
    path.
    """
    parts = [rule.rpartition("=") for rule in rules]
    patterns, values = [regex for regex, _, _ in parts], [1.0, *(float(value) for _, _, value in parts)]
    mask(tree, tuple(patterns))

    def group(name):
        return next((number for number, regex in enumerate(patterns, 1) if re.search(regex, name)), 0)

    groups = jax.tree.map(group, path_names(tree))
    return groups, jax.tree.map(lambda number: values[number], groups)


def default_axes(tree: Tree) -> Tree:
    """optax.contrib.MuonDimensionNumbers of a tree that says nothing else: all axes but the last are reduced.

    Vectors are no matrices (None).
    """

    def axes(leaf):
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1) if leaf.ndim > 1 else None

    return jax.tree.map(axes, tree)


def dimensions(tree: Tree, axes: Callable[[Tree], Tree] | None) -> list[MuonDimensionNumbers | None]:
    """Those of every leaf, in order."""
    found = axes(tree) if axes else default_axes(tree)
    return jax.tree.leaves(found, is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers))


def matrix_norm(matrix: jax.Array, dims: MuonDimensionNumbers) -> jax.Array:
    """The Frobenius norm of each matrix of a stack, in its shape with the axes of one matrix 1."""
    axes = [(axis,) if isinstance(axis, int) else tuple(axis) for axis in (dims.reduction_axis, dims.output_axis)]
    return jnp.sqrt(jnp.sum(matrix * matrix, axis=axes[0] + axes[1], keepdims=True))


def by_width(tree: Tree, axes: Callable | None, widening: float, vectors: float, matrices: float) -> Tree:
    """The leaves times widening ** matrices where they are matrices, and widening ** vectors elsewhere."""
    leaves, structure = jax.tree.flatten(tree)
    powers = [vectors if dims is None else matrices for dims in dimensions(tree, axes)]
    scaled = [leaf * widening**power if power else leaf for leaf, power in zip(leaves, powers, strict=True)]
    return jax.tree.unflatten(structure, scaled)


def matrix_axes(rules: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]) -> Callable[[Tree], Tree]:
    """The function optim.base and layerwise rho take, from (regex, reduced axes, output axes); the first match decides.

    Axes in neither stack matrices, as layers do. Parameters that no rule matches are no matrices (None).
    """

    def axes(params):
        def one(name):
            return next((MuonDimensionNumbers(*dims) for regex, *dims in rules if re.search(regex, name)), None)

        return jax.tree.map(one, path_names(params))

    return axes
