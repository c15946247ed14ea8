"""Parameter paths, and what regexes over them decide."""

import re
from collections.abc import Callable

import jax
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


def matrix_axes(rules: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]) -> Callable[[Tree], Tree]:
    """The function optim.base and layerwise rho take, from (regex, reduced axes, output axes); the first match decides.

    Axes in neither stack matrices, as layers do. Parameters that no rule matches are no matrices (None).
    """

    def axes(params):
        def one(name):
            return next((MuonDimensionNumbers(*dims) for regex, *dims in rules if re.search(regex, name)), None)

        return jax.tree.map(one, path_names(params))

    return axes
