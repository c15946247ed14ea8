"""Names of a run's weights: those that its steps change (last), and averages of them."""

import fnmatch
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax

from steppe.lm.model.parameters import name_of
from steppe.optim.averaging import AVERAGES
from steppe.optim.base import BASES

LAST = "last"
NAMES = (LAST, *AVERAGES, *(name for name, kind in BASES.items() if kind.evaluated))


class Weights(NamedTuple):
    """Weights as a function of a run's State: each parameter is combine(*leaves) of the leaves that `sources` name.

    sources: names of State leaves as stored in checkpoints; {} is the parameter's path, * any path around it.
    """

    sources: tuple[str, ...]
    combine: Callable[..., Any]

    def names(self, path: str, known: Collection[str]) -> list[str]:
        """The leaves of a State that the parameter at `path` is computed from. known: names of all leaves."""
        found = []
        for source in self.sources:
            name = source.format(path)
            (match,) = [name] if "*" not in name else fnmatch.filter(known, name)
            found.append(match)
        return found


def weights_of(config) -> dict[str, Weights]:
    """{name: Weights} of a run with this config; the first are those that the run is judged by."""
    optim, average = config.optim, config.average
    found = {LAST: Weights(("params/{}",), lambda leaf: leaf)}
    for name in average.weights:
        slots = AVERAGES[name].slots(average.snapshots)
        found[name] = Weights(tuple(f"averages/{name}/{slot}/{{}}" for slot in range(slots)), _mean)
    own = BASES[optim.base].evaluated if optim.base in BASES else None
    if own:
        judged = Weights(("params/{}", f"optimizer/*{own.stored_as}/{{}}"), partial(own.at, optim.b1))
        found = {optim.base: judged, **found}
    return found


def readers(config) -> dict[str, Callable[[Any], Any]]:
    """{name: function from a State to the parameters of this name}, in the order of weights_of."""
    return {
        name: lambda state, chosen=chosen: of_state(chosen, state._asdict(), state.params)
        for name, chosen in weights_of(config).items()
    }


def of_state(chosen: Weights, state: Mapping[str, Any], like: Any) -> Any:
    """A tree of parameters, shaped like `like`, from the State fields that `chosen` uses."""
    leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dict(state))}

    def one(path, _):
        return chosen.combine(*(leaves[name] for name in chosen.names(name_of(path), leaves)))

    return jax.tree_util.tree_map_with_path(one, like)


def _mean(first: Any, *others: Any) -> Any:
    return sum(others, first) / (1 + len(others)) if others else first
