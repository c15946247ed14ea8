"""Parameter paths and regex masks over them."""

import re

import jax

from optim.rule import Tree


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
