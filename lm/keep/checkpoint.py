"""Checkpoints through orbax: asynchronous, sealed, restored onto any mesh; a damaged one is never restored.

DIRECTORY/STEP/ holds orbax's files (state, meta) and a seal with the hash of each. A save writes to a temporary name,
renames, writes the seal, then deletes older checkpoints. A kill at any moment leaves the previous checkpoint intact.
"""

import logging
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from steppe.data import files
from steppe.data.errors import StorageError
from steppe.lm.keep import seal
from steppe.lm.keep.exits import Unusable
from steppe.lm.keep.seal import Broken
from steppe.lm.parts.state import State

ASIDE = ".orbax-checkpoint-tmp"  # in the names of unfinished directories, orbax's and ours
DELETED = f"{ASIDE}-deleted"
SPARE = 8 << 20  # bytes that a save must leave free, for metrics.jsonl and other small files


class Checkpoints:
    """The checkpoints of one run. Close it, or use it in a `with` block, to finish writing.

    directory: a path, or a gs:// or s3:// URL that etils can reach. keep: how many of the newest to keep. keep_every:
    multiples of this step are kept forever; 0: none. period: its newest multiple is also kept, to roll back to. run:
    the run's id ("" in processes that do not know it). read_only: never writes, moves or deletes. log: for the user.
    """

    def __init__(
        self, directory: str | epath.Path, keep: int = 1, keep_every: int = 0, period: int = 1, run: str = "",
        read_only: bool = False, log: Callable[[str], None] = print,
    ):  # fmt: skip
        self.directory = place(directory)
        self._period = period
        self._keep, self._keep_every, self._run, self._read_only, self._log = keep, keep_every, run, read_only, log
        self._primary = jax.process_index() == 0
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_orbax)
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler())
        )
        self._writer = ThreadPoolExecutor(1, "seal")
        self._pending: Future[None] | None = None
        if self._primary and not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if ASIDE in path.name:
                    path.rmtree()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def newest(self, before: int | None = None) -> int | None:
        """The newest sound step (below `before`), with every byte verified; None if there is no checkpoint.

        Logs damaged, unfinished, renamed and foreign checkpoints above it and moves them to DIRECTORY/damaged. Raises
        Unusable, and moves nothing, if there are finished ones but none is sound. All processes must call it.
        """
        self.wait()
        multihost_utils.sync_global_devices("steppe checkpoints")
        problems, newest = {}, None
        for step in sorted((s for s in seal.steps(self.directory) if before is None or s < before), reverse=True):
            problem = self._examine(step)
            if problem is None:
                newest = step
                break
            problems[step] = problem
            self._log(f"CHECKPOINT {step} IS NOT USED: {problem}")
        finished = [step for step, problem in problems.items() if problem.sealed]
        if newest is None and finished:
            raise Unusable(
                f"{self.directory}: no checkpoint can be used; the newest, {finished[0]}: {problems[finished[0]]}. "
                "Restore one, or remove them all to start from the beginning"
            )
        if problems:
            for step in problems if self._primary and not self._read_only else ():
                seal.set_aside(self.directory, step, "damaged")
            self._log("falling back to " + ("the beginning" if newest is None else f"the checkpoint of step {newest}"))
            multihost_utils.sync_global_devices("steppe checkpoints moved")
        return newest

    def forget(self, after: int) -> None:
        """Deletes the checkpoints after a step, from which the run takes another course. All processes must call it."""
        self.wait()
        if self._primary:
            for step in seal.steps(self.directory):
                if step > after:
                    self._delete(step)
        multihost_utils.sync_global_devices("steppe checkpoints forgotten")

    def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
        """(State sharded like `abstract`, meta) of a step that `newest` returned.

        Raises Unusable before reading if paths, dtypes or shapes differ, because orbax would cast silently.
        """
        path = self.directory / str(step)
        found = _fitting(path, seal.read(path)["tree"], _written(abstract))
        return State(**{"averages": {}, **found}), self.meta(step)

    def meta(self, step: int) -> dict[str, Any]:
        """The meta of a step that `newest` returned."""
        return _read(self.directory / str(step), "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())

    def room(self, state: State) -> str:
        """Why the next save does not fit, "" if it does. Counts bytes before compression; local directories only."""
        problem = ""
        if self._primary and not files.is_remote(self.directory):
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + SPARE
            free = shutil.disk_usage(self.directory).free
            problem = f"{free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB needed" if free < needed else ""
        return (problem or "no room") if agreed(bool(problem)) else ""

    def save(self, step: int, state: State, meta: dict[str, Any]) -> float:
        """Starts writing the state after `step` steps with meta (JSON); returns the seconds that the caller waited.

        Waits for the previous save. Raises StorageError if that save, or the start of this one, failed.
        """
        began = time.monotonic()
        self.wait()
        path, tree = self.directory / str(step), seal.tree_of(state)
        args = ocp.args.Composite(state=ocp.args.StandardSave(_written(state)), meta=ocp.args.JsonSave(meta))
        try:
            self._orbax.save(path, args=args)
        except Exception as error:  # tensorstore and jax raise many kinds of errors for a full disk
            raise self._not_written(path, error) from error
        self._pending = self._writer.submit(self._finish, path, step, tree)
        return time.monotonic() - began

    def wait(self) -> None:
        """Returns when the last save is finished and sealed. Raises StorageError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finishes writing; logs a failure that has not been raised yet."""
        try:
            self.wait()
        except StorageError as error:
            self._log(str(error))
        self._writer.shutdown()
        self._orbax.close()

    def _finish(self, path: epath.Path, step: int, tree: dict) -> None:
        try:
            self._orbax.wait_until_finished()
            if self._primary:
                seal.write(path, step, self._run, tree)
                self._retire()
        except Exception as error:
            raise self._not_written(path, error) from error

    def _not_written(self, path: epath.Path, error: BaseException) -> StorageError:
        """The error of a failed save; removes the partial checkpoint to free its space."""
        if self._primary and not files.is_remote(path):
            for part in Path(path.parent).glob(f"{path.name}{ASIDE}*"):
                shutil.rmtree(part, ignore_errors=True)
        reason = " ".join(str(error).split())
        return StorageError(f"checkpoint {path}: not written ({type(error).__name__}: {reason[:300]})")

    def _retire(self) -> None:
        """Deletes sealed checkpoints that retention does not keep; leaves unsealed ones alone."""
        sealed = seal.sealed(self.directory)
        regular = [step for step in sealed if step % self._period == 0]
        for step in sealed[: -self._keep]:
            if step not in regular[-1:] and not (self._keep_every and step % self._keep_every == 0):
                self._delete(step)

    def _delete(self, step: int) -> None:
        path, retired = self.directory / str(step), self.directory / seal.RETIRED
        if files.is_remote(path):
            path.rmtree()
            return
        # renamed first, so that a kill leaves no partial checkpoint under its name
        path = path.rename(self.directory / f"{step}{DELETED}")
        if retired.exists() and (path / seal.NAME).exists():
            (path / seal.NAME).rename(retired / str(step))
        path.rmtree()

    def _examine(self, step: int) -> Broken | None:
        """What is wrong with a step. Each process reads a share of it; they agree on whether anything is wrong."""
        problem = None
        try:
            seal.verify(self.directory / str(step), step, self._run, (jax.process_index(), jax.process_count()))
        except Broken as broken:
            problem = broken
        except OSError as error:
            problem = Broken(f"it cannot be read ({error})")
        if not agreed(problem is not None):
            return None
        return problem or Broken("another process found it damaged")


def _written(state: State) -> dict[str, Any]:
    """A State in the stored form: without averages if a run has none, as older versions stored it."""
    fields = state._asdict()
    return fields if fields["averages"] else {name: fields[name] for name in fields if name != "averages"}


def load_parts(path: str, abstract_parts: dict[str, Any], log: Callable[[str], None] = print) -> dict[str, Any]:
    """Parts of a checkpoint's State by name ("params", "optimizer"), sharded like `abstract_parts`.

    Verifies every byte. Raises Unusable if there is no checkpoint, or if paths, dtypes or shapes differ.
    """
    start = find(path, log)
    tree = seal.read(start)["tree"]
    saved = {name: entry for name, entry in tree.items() if name.partition("/")[0] in abstract_parts}
    found = _fitting(start, saved, abstract_parts)
    log(f"parameters  of {start}")
    return found


def _fitting(start: epath.Path, saved: dict, wanted: dict[str, Any]) -> dict[str, Any]:
    """Arrays of a checkpoint like the abstract ones. saved: their part of its tree. Raises Unusable if it differs."""
    here = seal.tree_of(wanted)
    shown = lambda entry: f"{entry[0]}{entry[1]}" if entry else "absent"  # noqa: E731
    found = [
        f"{path}: {shown(saved.get(path))} in the checkpoint, {shown(here.get(path))} here"
        for path in sorted({*saved, *here})
        if saved.get(path) != here.get(path)
    ]
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise Unusable(f"{start} does not fit this config: {'; '.join(found[:3])}{more}")
    return _restored(start, wanted, ocp.checkpoint_utils.construct_restore_args(wanted))


def load_arrays(start: epath.Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Some leaves of a checkpoint's State, {"params/embed/embedding": array}, in this host's memory. start: from
    `find`. Reads nothing else of the checkpoint."""
    item = traverse_util.unflatten_dict(dict.fromkeys(names, np.zeros(())), sep="/")
    found = _restored(start, item, jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), item))
    return {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(found, sep="/").items()}


def _restored(start: epath.Path, item: Any, arguments: Any) -> Any:
    args = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
    return _read(start, "state", ocp.PyTreeCheckpointHandler(), args)


def _read(start: epath.Path, part: str, handler: ocp.CheckpointHandler, args: ocp.args.CheckpointArgs) -> Any:
    with ocp.Checkpointer(handler) as reader:
        try:
            return reader.restore(start / part, args=args)
        except OSError:
            raise
        except Exception as error:  # the seal is sound, so another program saved this
            raise Unusable(f"{start}: cannot be restored ({' '.join(str(error).split())[:300]})") from None


def find(path: str, log: Callable[[str], None] = print) -> epath.Path:
    """The step directory for `path`: a step directory, a directory of them, or a workdir; of several the newest sound
    one. Verifies every byte. Raises Unusable if there is none."""
    start = place(path)
    if start.name.isdecimal() and (start / seal.NAME).exists():
        try:
            seal.verify(start, int(start.name))
        except Broken as broken:
            raise Unusable(f"{start}: {broken}") from None
    else:
        found = start / "checkpoints" if (start / "checkpoints").exists() else start
        with Checkpoints(str(found), read_only=True, log=log) as checkpoints:
            newest = checkpoints.newest()
        if newest is None:
            raise Unusable(f"{start}: holds no checkpoint")
        start = found / str(newest)
    return start


def directory_of(config: ConfigDict, workdir: str) -> str:
    """The directory of a run's checkpoints."""
    return config.checkpoint.directory or str(Path(workdir) / "checkpoints")


def place(path: str | epath.Path) -> epath.Path:
    """An absolute path, or an object store's URL. Raises Unusable if that cannot be reached."""
    if not files.is_remote(path):
        return epath.Path(path).absolute()
    try:
        found = epath.Path(path)
        found.exists()
        return found
    except Exception as error:  # missing packages or permissions: each store raises its own errors
        reason = " ".join(str(error).split())
        raise Unusable(f"{path}: cannot be reached ({type(error).__name__}: {reason[:300]})") from None


def agreed(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _not_orbax(record: logging.LogRecord) -> bool:
    """A log filter: drops tracebacks that orbax's threads print of errors which are also raised here."""
    return "orbax" not in record.pathname and "exception was never retrieved" not in record.getMessage()
