"""Branches a run off another: takes the state, position and record that the other had after some step."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from steppe.configs.keys import ConfigError
from steppe.data import files
from steppe.lm.keep import checkpoint, mirror, saved, seal, workdir
from steppe.lm.keep.checkpoint import Checkpoints
from steppe.lm.keep.exits import WorkdirError
from steppe.lm.keep.record import meta_of
from steppe.lm.parts.state import Optimizer, State
from steppe.lm.track.lines import METRICS, rewind

KEY = "branch_from"


class Parent(NamedTuple):
    """The run that another continues: its directory here, its workdir as given, its id, its updates so far."""

    directory: str
    workdir: str
    run: str
    step: int


def named(text: str) -> tuple[str, int | None]:
    """(workdir, step or None) of RUN or RUN@STEP; a path that exists is taken whole, even with an @."""
    path = os.path.expanduser(text)
    directory, at, step = path.rpartition("@")
    if at and step.isdecimal() and not os.path.exists(path):  # for a URL, @K is always a step
        return directory, int(step)
    return path, None


def take(
    text: str, abstract: State, optimizer: Optimizer, log: Callable[[str], None] = print, trust: bool = False
) -> tuple[State, dict[str, Any], Parent]:
    """(State sharded like `abstract`, meta of the checkpoint, parent) for a new run that branches from `text`.

    Parameters and the base optimizer's state come from the parent. So does the rule's state if both runs have the same
    kind; otherwise it starts fresh, and the log says so. Averages start at the branch. trust: see saved.checkpoints_of.
    Raises ConfigError, WorkdirError or Unusable, each one line.
    """
    parent, step = named(text)
    directory = mirror.here(parent, checkpoints=True)
    try:
        config = workdir.config_of(directory)
    except WorkdirError:
        raise ConfigError(KEY, text, f"the workdir of a run, or RUN@STEP; there is no run in {directory}") from None
    start = checkpoint.find(saved.checkpoints_of(directory, config, trust, step), lambda line: None)
    step = int(start.name)
    theirs, ours = seal.read(start)["tree"], seal.tree_of(abstract)
    shared = _within(theirs, "rule") == _within(ours, "rule")
    with Checkpoints(start.parent, read_only=True, log=log) as checkpoints:
        meta = meta_of(checkpoints.meta(step), start)
    wanted = {"step": abstract.step, "params": abstract.params, "optimizer": abstract.optimizer}
    wanted |= {"rule": abstract.rule} if shared and _within(ours, "rule") else {}
    found = checkpoint.load_parts(str(start), wanted, lambda line: None)
    for field, begin in (("rule", optimizer.rule.init), ("averages", optimizer.averages.init)):
        if field not in found:
            places = jax.tree.map(lambda leaf: leaf.sharding, getattr(abstract, field))
            found[field] = jax.jit(begin, out_shardings=places)(found["params"])
    state = State(**found)
    if not shared:
        method = meta["config"]["optim"]["method"]
        log(f"branch      the rule's state of {method} is dropped; this run's rule starts fresh")
    run = workdir.id_of(directory)
    log(f"branch      from {parent}, after step {step}")
    recorded = parent if files.is_remote(parent) else os.path.abspath(parent)
    # the branch gets its own wandb run, and does not owe the parent's evaluation
    return state, {**meta, "wandb_id": "", "owes_evaluation": False}, Parent(directory, recorded, run, step)


def copy_record(parent: Parent, directory: str) -> None:
    """Starts metrics.jsonl, if absent, with the parent's record up to the branch and a line that names the parent."""
    mine, theirs = Path(directory) / METRICS, Path(parent.directory) / METRICS
    if mine.exists():
        return
    with files.replacing(mine) as aside:
        Path(aside).touch()
        if theirs.exists():
            shutil.copyfile(theirs, aside)
            rewind(Path(aside), parent.step)
        branched = {"kind": "branch", "step": parent.step, "parent": parent.workdir, "parent_run": parent.run}
        with open(aside, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(branched) + "\n")


def _within(tree: Mapping[str, Any], field: str) -> dict[str, Any]:
    return {name: entry for name, entry in tree.items() if name.startswith(f"{field}/")}
