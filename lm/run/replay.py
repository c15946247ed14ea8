"""Repeats one step of a run and reports norms per layer and the origin of the first NaN."""

import contextlib
import io
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from steppe.lm.keep import mirror, record, workdir
from steppe.lm.keep.checkpoint import Checkpoints, directory_of
from steppe.lm.keep.exits import Unusable, WorkdirError
from steppe.lm.model import parameters
from steppe.lm.parts import anomaly
from steppe.lm.parts.assembly import abstract_batch, batch_reader, open_parts, parts_of
from steppe.lm.parts.leg import WHOLE
from steppe.lm.parts.state import State
from steppe.lm.parts.step import compile_step
from steppe.lm.run import begin
from steppe.lm.track import lines
from steppe.lm.track.waiting import compiling

_HOUSE = str(Path(anomaly.__file__).parents[2])


def replay(config: ConfigDict, directory: str, number: int, log: Callable[[str], None] = print) -> dict[str, float]:
    """Repeats step `number` of the run in `directory` from the newest checkpoint before it; returns its metrics.

    It repeats the steps in between, so on the same mesh the state equals the run's bit for bit. It prints a table of
    norms per parameter and layer, then runs the gradient under jax's NaN checks. It writes nothing. A step that caused
    a rollback is repeated as that bad step, with its original batches. Raises ConfigError, WorkdirError or Unusable.
    """
    directory = mirror.here(directory, checkpoints=True)
    differing = workdir.changes(workdir.config_of(directory), config)
    if differing:
        key, (before, after) = next(iter(differing.items()))
        raise WorkdirError(f"config.{key} = {after!r}: must be {before!r} to replay a step of {directory}")
    corpus, parts, counts = open_parts(config, log, directory)
    recorded = lines.read(directory)
    windows, newest_of = _windows(recorded, number)
    with Checkpoints(directory_of(config, directory), read_only=True, log=log) as checkpoints:
        start = begin.restore(checkpoints, parts, lambda: begin.begin(config, parts, log), before=newest_of)
    state, watch = start.state, start.progress(config).watch
    for change in recorded.of("change"):
        if change["step"] > int(state.step) and "." in change["key"]:
            since = f"config.{change['key']} is {change['after']!r} since step {change['step']}"
            raise Unusable(f"--replay_step={number}: must have a checkpoint before it with the present config: {since}")
    leg = start.leg(record.facts(config, corpus))
    if leg != WHOLE:
        parts = parts_of(config, corpus, counts, leg)
    if not 1 <= number <= parts.budget.steps:
        raise Unusable(f"--replay_step={number}: must be a step of the run, from 1 to {parts.budget.steps}")
    log(f"replaying   step {number}, from the state after step {int(state.step)}")

    watch.windows = watch.windows if windows is None else windows
    read = batch_reader(config, corpus, parts, watch.batch_index)
    with compiling("the training step", log):
        step = compile_step(parts, abstract_batch(parts, corpus, config.train.batch_size))
    while int(state.step) < number - 1:
        done = int(state.step)
        state, metrics = step(state, read(done), watch.limit(done + 1))
        found = watch.judge(done + 1, _floats(metrics))
        if found and found["decision"] != "skip":
            raise Unusable(f"step {done + 1} ended this attempt before step {number}: replay step {done + 1}")

    batch = read(number - 1)
    after, metrics = step(jax.tree.map(jnp.copy, state), batch, watch.limit(number))
    metrics = _floats(metrics)
    found = watch.judge(number, metrics)
    log(anomaly.describe(number, found) if found else f"step {number}: sound")
    for name, value in metrics.items():
        log(f"  {name:<20} {value:.6g}")

    # the step's gradient alone: NaNs in the report only mean "not computed"
    def gradient(state, batch):
        clean = jax.grad(lambda p: parts.objective.readout(p, parts.objective.trunk(p, batch), batch)[0])(state.params)
        returned, _, _ = parts.optimizer.rule.gradient(
            parts.objective, state.params, batch, state.optimizer, state.rule, state.step
        )
        return clean, returned

    gradient = jax.jit(gradient)
    clean, returned = gradient(state, batch)
    log(table(state.params, clean, returned, after.params))
    log(first_nan(gradient, state, batch))
    return metrics


def _windows(recorded: lines.Records, number: int) -> tuple[list | None, int]:
    """(batches that were skipped when step `number` ran, None to use the checkpoint's; the step that the checkpoint
    must precede)."""
    back = recorded.of("rollback")
    if not any(found["step"] == number for found in recorded.of("anomaly")):
        for found in reversed(back):
            if found["because"]["step"] == number:
                return found["windows"][:-1], found["to"] + 1
    behind = [found["windows"] for found in back if found["to"] < number]
    return (behind[-1] if behind else None), number


def table(params, clean, returned, after) -> str:
    """A table of norms per parameter and, for stacked layers, per layer: theta, clean and returned gradient, update.

    Takes trees of arrays on any mesh, including shards on other hosts.
    """

    def facts(trees):
        columns = zip(*(jax.tree.leaves(tree) for tree in trees), strict=True)
        return [jnp.stack([_norms(name, leaf) for leaf in leaves]) for name, leaves in zip(names, columns, strict=True)]

    names = [parameters.name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    trees = (params, clean, returned, jax.tree.map(jnp.subtract, after, params))
    everywhere = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, PartitionSpec())
    lines = [f"{'parameter':<34}{'layer':>6}{'theta':>11}{'gradient':>11}{'returned':>11}{'update':>11}  not finite"]
    for name, found in zip(names, jax.device_get(jax.jit(facts, out_shardings=everywhere)(trees)), strict=True):
        for layer in range(found.shape[1]):
            norms = "".join(f"{length:>11.4g}" for length in found[:, layer, 0])
            shown = layer if re.search(parameters.STACKED, name) else ""
            lines.append(f"{name:<34}{shown:>6}{norms}  {int(found[:3, layer, 1].sum()) or ''}".rstrip())
    return "\n".join(lines)


def _norms(name: str, leaf: jax.Array) -> jax.Array:
    """[layers, (norm, number of non-finite entries)] of a parameter."""
    rows = leaf.reshape(leaf.shape[0] if re.search(parameters.STACKED, name) else 1, -1)
    return jnp.stack([jnp.linalg.norm(rows, axis=1), jnp.sum(~jnp.isfinite(rows), axis=1)], axis=1)


def first_nan(gradient: Callable, state: State, batch: dict) -> str:
    """The result of jax's NaN checks on gradient(state, batch): the operation with the first NaN, and its line here."""
    with jax.debug_nans(True), jax.debug_infs(True):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # jax prints its own progress
                jax.block_until_ready(gradient(state, batch))
        except FloatingPointError as compiled:
            error = compiled
            try:
                with jax.disable_jit():  # one operation at a time, also within the scan over layers
                    jax.block_until_ready(gradient(state, batch))
            except FloatingPointError as found:
                error = found
            # for operations that jax traced before, the traceback is in the cause
            tracebacks = (cause.__traceback__ for cause in (error, error.__cause__) if cause)
            frames = [frame for found in tracebacks for frame in traceback.extract_tb(found)]
            ours = [frame for frame in frames if frame.filename.startswith(_HOUSE)]
            place = (
                f" in {os.path.relpath(ours[-1].filename, _HOUSE)}:{ours[-1].lineno}: {ours[-1].line}" if ours else ""
            )
            return "NaN checks  " + " ".join(str(error).split()) + place
    return "NaN checks  every number of both gradients is finite"


def _floats(metrics: dict) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
