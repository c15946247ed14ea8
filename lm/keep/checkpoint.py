"""Checkpoints through orbax: asynchronous, sealed, restored onto any mesh; a damaged one is never restored.

DIRECTORY/STEP/ holds orbax's files (state, meta) and a seal with the hash of each. A save writes to a temporary name,
renames, writes the seal, then deletes older checkpoints. A kill at any moment leaves the previous checkpoint intact.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection
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
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
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
        problems = {}
        for step in sorted((s for s in seal.steps(self.directory) if before is None or s < before), reverse=True):
            problem = self._examine(step)
            if problem is None:
                break
            problems[step] = problem
        else:
            step = None
        for number, problem in problems.items():
            self._log(f"CHECKPOINT {number} IS NOT USED: {problem}")
        finished = [number for number, problem in problems.items() if problem.sealed]
        if step is None and finished:
            raise Unusable(
                f"{self.directory}: no checkpoint can be used; the newest, {finished[0]}: {problems[finished[0]]}. "
                "Restore one, or remove them all to start from the beginning"
            )
        if problems and self._primary and not self._read_only:
            for number in problems:
                seal.set_aside(self.directory, number, "damaged")
        if problems:
            self._log("falling back to " + (f"the checkpoint of step {step}" if step is not None else "the beginning"))
            multihost_utils.sync_global_devices("steppe checkpoints moved")
        return step

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
        _compare(path, seal.read(path)["tree"], seal.tree_of(abstract))
        restored = self._read(path, state=ocp.args.StandardRestore(_written(abstract)), meta=ocp.args.JsonRestore())
        return State(**{"averages": {}, **restored["state"]}), restored["meta"]

    def meta(self, step: int) -> dict[str, Any]:
        """The meta of a step that `newest` returned."""
        return self._read(self.directory / str(step), meta=ocp.args.JsonRestore())["meta"]

    def _read(self, path: epath.Path, **parts: ocp.args.CheckpointArgs) -> Any:
        try:
            return self._orbax.restore(path, args=ocp.args.Composite(**parts))
        except OSError:
            raise
        except Exception as error:  # the seal is sound, so another program saved this
            raise _not_ours(path, error) from None

    def room(self, state: State) -> str:
        """Why the next save does not fit, "" if it does. Counts bytes before compression; local directories only."""
        problem, needed, free = False, 0, 0
        if self._primary and not files.is_remote(self.directory):
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + SPARE
            free = shutil.disk_usage(self.directory).free
            problem = free < needed
        if not agreed(problem):
            return ""
        return f"{free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB needed" if self._primary else "no room"

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
        self._thread = threading.Thread(target=self._finish, args=(path, step, tree), name="seal")
        self._thread.start()
        return time.monotonic() - began

    def wait(self) -> None:
        """Returns when the last save is finished and sealed. Raises StorageError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise error

    def close(self) -> None:
        """Finishes writing; logs a failure that has not been raised yet."""
        try:
            self.wait()
        except StorageError as error:
            self._log(str(error))
        self._orbax.close()

    def _finish(self, path: epath.Path, step: int, tree: dict) -> None:
        try:
            self._orbax.wait_until_finished()
            if self._primary:
                seal.write(path, step, self._run, tree)
                self._retire()
        except Exception as error:
            self._failure = self._not_written(path, error)

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
            share = (jax.process_index(), jax.process_count())
            seal.verify(self.directory / str(step), step, self._run, share)
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
    _compare(start, saved, seal.tree_of(abstract_parts))
    log(f"parameters  of {start}")
    return _restore(start, abstract_parts, ocp.checkpoint_utils.construct_restore_args(abstract_parts))


def load_arrays(start: epath.Path, names: Collection[str]) -> dict[str, np.ndarray]:
    """Some leaves of a checkpoint's State, {"params/embed/embedding": array}, in this host's memory. start: from
    `find`. Reads nothing else of the checkpoint."""
    item = traverse_util.unflatten_dict(dict.fromkeys(names, np.zeros(())), sep="/")
    found = _restore(start, item, jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), item))
    return {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(found, sep="/").items()}


def shapes_of(start: epath.Path) -> dict[str, tuple[int, ...]]:
    """{"params/embed/embedding": shape} of a checkpoint; start: from `find`."""
    return {name: tuple(entry[1]) for name, entry in seal.read(start)["tree"].items()}


def _restore(start: epath.Path, item: Any, arguments: Any) -> Any:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        try:
            return reader.restore(start / "state", args=args)
        except Exception as error:
            raise _not_ours(start, error) from None


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


def _compare(path: epath.Path, saved: dict, wanted: dict) -> None:
    found = seal.differences(saved, wanted)
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise Unusable(f"{path} does not fit this config: {'; '.join(found[:3])}{more}")


def agreed(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _not_orbax(record: logging.LogRecord) -> bool:
    """A log filter: drops tracebacks that orbax's threads print of errors which are also raised here."""
    return "orbax" not in record.pathname and "exception was never retrieved" not in record.getMessage()


def _not_ours(path: epath.Path, error: BaseException) -> Unusable:
    return Unusable(f"{path}: cannot be restored ({' '.join(str(error).split())[:300]})")
