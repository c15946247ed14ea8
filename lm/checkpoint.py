"""Checkpoints through orbax: asynchronous, atomic, restored onto any mesh."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from lm.state import State


def open_checkpoints(workdir: str, keep: int, read_only: bool = False) -> ocp.CheckpointManager:
    """The checkpoints of a run, in workdir/checkpoints; the newest `keep` survive. Close it to finish writing."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=not read_only, read_only=read_only, create=not read_only
    )
    return ocp.CheckpointManager(
        Path(workdir).resolve() / "checkpoints",
        options=options,
        item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
    )


def save(manager: ocp.CheckpointManager, step: int, state: State, meta: dict[str, Any]) -> None:
    """Starts writing the state after `step` steps with meta (JSON: config, wandb id, versions). Returns once copied."""
    manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)))


def restore(manager: ocp.CheckpointManager, abstract: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
    """(State placed as `abstract` says, meta) of a step, by default the newest."""
    step = manager.latest_step() if step is None else step
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
    restored = manager.restore(step, args=args)
    return restored["state"], restored["meta"]
