"""Averages of the weights over the last steps of a run, kept beside it by any method and base.

An average is the mean of its slots, trees like the parameters, so that whatever shards, saves or exports parameters
does so with these too. A run is trained at theta, whatever is averaged.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from steppe.optim.rule import Tree


class Average(NamedTuple):
    """A row of AVERAGES. slots(snapshots) -> how many trees it keeps.

    update(slots, params, count, sound, horizon, snapshots) -> the slots after the update that gave params, before which
    the run had made `count`; where it was not sound they stay as they are.
    """

    slots: Callable[[int], int]
    update: Callable


def _ema(slots, params, count, sound, horizon, snapshots):
    # the plain mean of all steps so far until there are `horizon` of them: nothing of the start remains
    weight = jnp.where(sound, jnp.maximum(1 / horizon, 1 / (count + 1.0)), 0.0)
    return {"0": jax.tree.map(lambda a, p: a + (weight * (p - a)).astype(a.dtype), slots["0"], params)}


def _lawa(slots, params, count, sound, horizon, snapshots):
    every = max(1, horizon // snapshots)
    number, due = (count + 1) // every, sound & ((count + 1) % every == 0)

    def taken(slots):
        # until all slots have been taken the others hold the mean of those that have: nothing of the start remains
        since = [(name, (int(name) > 0) & (int(name) < number)) for name in slots]

        def mean(now, *olds):
            known = sum(jnp.where(there, old, 0) for (_, there), old in zip(since, olds, strict=True))
            return ((known + now) / number).astype(now.dtype)

        filling = jax.tree.map(mean, params, *slots.values())
        new = {}
        for name, there in since:
            its = number % snapshots == int(name)
            empty = (number < snapshots) & ~there
            others = jax.tree.map(partial(jnp.where, empty), filling, slots[name])
            new[name] = jax.tree.map(partial(jnp.where, its), params, others)
        return new

    return lax.cond(due, taken, lambda slots: slots, slots)


AVERAGES = {"ema": Average(lambda snapshots: 1, _ema), "lawa": Average(lambda snapshots: snapshots, _lawa)}


class Averages(NamedTuple):
    """The averages that a run keeps.

    names: of AVERAGES. ema: exponential, the decay 1 - 1 / horizon a step. lawa: of the `snapshots` last parameters
    taken every horizon / snapshots steps (Latest Weight Averaging, Kaddour 2022; both with horizons of about 1 % of a
    run in Ajroldi, Orvieto, Geiping 2025, arXiv 2502.06761). horizon: steps. begin: the updates before the run, of one
    that goes on from another's parameters: nothing older than the run itself is in its averages.
    """

    names: tuple[str, ...] = ()
    horizon: int = 1
    snapshots: int = 1
    begin: int = 0

    def init(self, params: Tree) -> dict[str, dict[str, Tree]]:
        """{name: {slot: tree like params}}, all of them the parameters at the start."""
        return {
            name: {str(slot): jax.tree.map(jnp.copy, params) for slot in range(AVERAGES[name].slots(self.snapshots))}
            for name in self.names
        }

    def update(self, state: dict, params: Tree, step: jax.Array, sound: jax.Array) -> dict[str, dict[str, Tree]]:
        """The averages once update number step + 1 has given params; unchanged where that update was refused."""
        return {
            name: AVERAGES[name].update(slots, params, step - self.begin, sound, self.horizon, self.snapshots)
            for name, slots in state.items()
        }
