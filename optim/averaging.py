"""Averages of the weights over the last steps of a run, for any method and base.

An average is the mean of its slots. Slots are trees like the parameters, so code that shards, saves or exports
parameters handles them too. Averages do not affect training.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from steppe.optim.rule import Tree


class Average(NamedTuple):
    """A row of AVERAGES. slots(snapshots) -> number of trees that it stores.

    update(slots, params, count, sound, horizon, snapshots) -> the new slots. The run had made `count` updates before
    the one that gave `params`. If that update was not sound, the slots do not change.
    """

    slots: Callable[[int], int]
    update: Callable


def _ema(slots, params, count, sound, horizon, snapshots):
    # the first `horizon` steps use the plain mean, which gives the initial weights no share
    weight = jnp.where(sound, jnp.maximum(1 / horizon, 1 / (count + 1.0)), 0.0)
    return {"0": jax.tree.map(lambda a, p: a + (weight * (p - a)).astype(a.dtype), slots["0"], params)}


def _lawa(slots, params, count, sound, horizon, snapshots):
    every = max(1, horizon // snapshots)
    number, due = (count + 1) // every, sound & ((count + 1) % every == 0)

    def taken(slots):
        # until every slot has a snapshot, the others hold the mean of the snapshots, not the initial weights
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
    """The averages of a run.

    names: keys of AVERAGES. ema: exponential average with decay 1 - 1 / horizon per step. lawa: mean of the last
    `snapshots` parameters, taken every horizon / snapshots steps (Latest Weight Averaging, Kaddour 2022). Ajroldi,
    Orvieto, Geiping 2025 (arXiv 2502.06761) use horizons of about 1 % of a run. horizon: steps. begin: the number of
    updates before this run, if it continues another; averages exclude them.
    """

    names: tuple[str, ...] = ()
    horizon: int = 1
    snapshots: int = 1
    begin: int = 0

    def init(self, params: Tree) -> dict[str, dict[str, Tree]]:
        """{name: {slot: tree like params}}, every slot a copy of the initial parameters."""
        return {
            name: {str(slot): jax.tree.map(jnp.copy, params) for slot in range(AVERAGES[name].slots(self.snapshots))}
            for name in self.names
        }

    def update(self, state: dict, params: Tree, step: jax.Array, sound: jax.Array) -> dict[str, dict[str, Tree]]:
        """The averages after update number step + 1, which gave `params`; unchanged if that update was not `sound`."""
        return {
            name: AVERAGES[name].update(slots, params, step - self.begin, sound, self.horizon, self.snapshots)
            for name, slots in state.items()
        }
