"""Runs whose workdir is an address (s3://, gs://, memory://): they live in the cache, and are copied there as they go.

The address is the run: whoever takes it, on whatever machine, begins by making the copy in the cache equal to it. It
holds what a workdir holds, a checkpoint's seal after its other files, so a kill at any moment leaves whole checkpoints.
"""

import os
import shutil
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from steppe.data import files, remote
from steppe.data.manifest import checksum
from steppe.lm.keep import seal
from steppe.lm.keep.exits import StorageError, WorkdirError
from steppe.lm.keep.workdir import LOCK

HOLDER = "holder"  # at the address: who trains there; gone once that ended in order
CHECKPOINTS = "checkpoints"
ADDRESS, TRAINING = "address", "training.lock"  # beside the local directory


@contextmanager
def kept(workdir: str, primary: bool, log: Callable[[str], None], seconds: float = 20.0) -> Iterator[str]:
    """The local directory of a workdir for a run, while the `with` block runs; a path is itself.

    What is behind an address is fetched first; what changes is copied back every so many seconds and at the end. The
    last to begin has the run: whoever had it before is told by a signal, and copies no more. DataError where the
    address cannot be reached, WorkdirError where a process of this machine has it, StorageError at the end for what
    could not be copied.
    """
    if not files.is_remote(workdir):
        yield workdir
        return
    if not primary:
        yield here(workdir)
        return
    with ExitStack() as stack:
        place = _place(workdir)
        try:
            stack.enter_context(files.lock(place.parent / TRAINING))
        except files.Held as held:
            raise WorkdirError(f"{workdir}: is in use by {held.holder}; wait for it, or stop it") from None
        _fetch(workdir, place, checkpoints=True)
        copier = _Copier(workdir, place, seconds, log)
        log(f"workdir     {workdir}, through {place}")
        stack.callback(copier.close)
        yield str(place)


def here(workdir: str, checkpoints: bool = False) -> str:
    """The local directory of a workdir for reading, as it is now, its checkpoints where asked for; a path is itself."""
    if not files.is_remote(workdir):
        return workdir
    place = _place(workdir)
    if not files.is_held(place.parent / TRAINING):  # by a run of this machine, whose copy is ahead of the address
        _fetch(workdir, place, checkpoints)
        if not any(place.iterdir()):
            raise WorkdirError(f"{workdir}: must be the workdir of a run; there is nothing")
    return str(place)


def add(directory: str | os.PathLike, *written: str) -> None:
    """Copies to its address what a command wrote into a directory that `here` gave, files or folders of it; nothing
    for directories that have no address."""
    place = Path(directory)
    if place.parent.parent == _runs() and (place.parent / ADDRESS).exists():
        known = {name: mark for name, mark in _local(place).items() if name.split("/")[0] not in written}
        _Store((place.parent / ADDRESS).read_text()).copy(place, known)


def _runs() -> Path:
    """Where the runs behind addresses live on this machine."""
    return Path(files.user_cache()) / "runs"


def _place(address: str) -> Path:
    """Where what is behind an address lives on this machine: of the same last name, in a folder with its locks."""
    address = address.rstrip("/")
    folder = _runs() / checksum({"address": address})[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(
            f"{folder}: cannot be made, for what is behind {address} ({error.strerror or error})"
        ) from None
    return folder / (address.rpartition("/")[2] or "run")


def _fetch(address: str, place: Path, checkpoints: bool) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        files.write(place.parent / ADDRESS, address)
        with files.lock(place.parent / "fetch.lock", wait=True):
            _Store(address).fetch(place, checkpoints)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{error.filename or place}: {error.strerror or error}") from error


class _Store:
    """What lies behind one address, by names relative to it. Every error of a driver is a StorageError of one line."""

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        self._system, self._root = remote.reached(self.address)
        self._root = self._root.rstrip("/")

    def names(self) -> dict[str, int]:
        """{name: bytes} of every file there now."""

        def listed(system):
            system.invalidate_cache()
            found = system.find(self._root, detail=True)
            return {name.removeprefix(self._root).lstrip("/"): info["size"] for name, info in found.items()}

        try:
            return self._asked(listed)
        except FileNotFoundError:
            return {}

    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none."""
        try:
            return self._asked(lambda system: system.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Replaces a small file."""
        try:
            self._asked(lambda system: system.pipe_file(self._path(name), content))
        except FileNotFoundError as error:  # there is no such bucket
            raise StorageError(f"{self.address}: {error}") from error

    def remove(self, name: str) -> None:
        """Removes a file, which may be gone."""
        with suppress(FileNotFoundError):
            self._asked(lambda system: system.rm_file(self._path(name)))

    def fetch(self, place: Path, checkpoints: bool) -> None:
        """Makes a local directory equal to what is there: whole checkpoints, if asked for, and everything else."""
        there = self.names()
        steps = {_step(name) for name in there if Path(name).name == seal.NAME} - {None}
        for step in {_step(name) for name in _local(place)} - steps - {None}:
            shutil.rmtree(place / CHECKPOINTS / step)
        for name in _local(place):
            if _step(name) is None and name not in there:
                (place / name).unlink()
        for step in steps if checkpoints else ():
            mine = place / CHECKPOINTS / step
            sealed = mine / seal.NAME
            if not sealed.exists() or sealed.read_bytes() != self.read(f"{CHECKPOINTS}/{step}/{seal.NAME}"):
                shutil.rmtree(mine, ignore_errors=True)
                try:
                    self._get(place, sorted((name for name in there if _step(name) == step), key=_seal_last))
                except FileNotFoundError:  # its run has removed it meanwhile
                    shutil.rmtree(mine, ignore_errors=True)
        self._get(place, [name for name in there if _step(name) is None and name != HOLDER])

    def copy(self, place: Path, sent: dict[str, Any]) -> None:
        """Copies what is new or changed in a local directory since `sent`, {name: mark}, which follows; removes what
        `sent` knows and the directory has no longer."""
        now = _local(place)
        changed = sorted((name for name in now if sent.get(name) != now[name]), key=_seal_last)
        for name in changed:
            if name in sent and Path(name).name == seal.NAME:  # the step was saved anew: till it is whole, it is none
                self.remove(name)
        for name in changed:
            if self._put(place / name, name):
                sent[name] = now[name]
        for name in sorted(set(sent) - set(now), key=_seal_last, reverse=True):
            self.remove(name)
            del sent[name]

    def _get(self, place: Path, names: list[str]) -> None:
        for name in names:
            target = place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(target) as aside:
                self._asked(lambda system, name=name, aside=aside: system.get_file(self._path(name), str(aside)))

    def _put(self, source: Path, name: str) -> bool:
        """Copies a local file; False where it was removed meanwhile."""

        def put(system):
            system.makedirs(os.path.dirname(self._path(name)), exist_ok=True)
            system.put_file(str(source), self._path(name))

        try:
            self._asked(put)
        except FileNotFoundError as error:  # of the file, or of a bucket
            if source.exists():
                raise StorageError(f"{self.address}: {error}") from error
            return False
        return True

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _asked(self, what: Callable) -> Any:
        try:
            return what(self._system)
        except FileNotFoundError:
            raise
        except Exception as error:  # every driver has errors of its own
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise StorageError(f"{self.address}: {reason[:300]}") from error


class _Copier:
    """Copies a run's directory to its address every so many seconds, from a thread, and once more when closed."""

    def __init__(self, address: str, place: Path, seconds: float, log: Callable[[str], None]):
        self._store, self._place, self._seconds, self._log = _Store(address), place, seconds, log
        self._token = f"process {os.getpid()} on {socket.gethostname()} ({uuid.uuid4().hex[:8]})"
        before = self._store.read(HOLDER)
        if before is not None:
            log(f"workdir     had not been left in order by {before.decode(errors='replace')}; it is taken over")
        self._store.write(HOLDER, self._token.encode())
        self._sent: dict[str, Any] = {name: None for name in self._store.names() if name != HOLDER}
        self._sent |= {name: mark for name, mark in _local(place).items() if name in self._sent}
        self._lost, self._failing = "", False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copies what is left. WorkdirError where another has taken the run, StorageError for what is not there."""
        self._ended.set()
        self._thread.join()
        if not self._lost:
            self._copy()
        if self._lost:
            raise WorkdirError(
                f"{self._store.address}: was taken by {self._lost}; what this process did since is not there"
            )
        self._store.remove(HOLDER)

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            try:
                self._copy()
                self._failing = False
            except OSError as error:
                if not self._failing:
                    self._log(f"NOT COPIED  {error}; it is tried again every {self._seconds:g} s")
                self._failing = True
            if self._lost:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _copy(self) -> None:
        holder = (self._store.read(HOLDER) or b"").decode(errors="replace")
        if holder != self._token:
            self._lost = holder or "nobody: its holder file was removed"
            return
        self._store.copy(self._place, self._sent)


def _local(place: Path) -> dict[str, tuple[int, int]]:
    """{name: mark} of the files of a run's directory that are part of it now; a mark changes with the contents."""
    found = {}
    for folder, below, names in os.walk(place):
        inside = Path(folder).relative_to(place)
        if inside == Path(CHECKPOINTS):
            below[:] = [name for name in below if name.isdecimal() and (Path(folder) / name / seal.NAME).exists()]
            continue
        for name in names:
            if name == LOCK or name.endswith(".lock") or name.endswith(files.ASIDE):
                continue
            with suppress(FileNotFoundError):
                status = os.stat(Path(folder) / name)
                found[(inside / name).as_posix()] = (status.st_size, status.st_mtime_ns)
    return found


def _step(name: str) -> str | None:
    """The step of the checkpoint that a file belongs to; None for every other file."""
    parts = name.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == CHECKPOINTS and parts[1].isdecimal() else None


def _seal_last(name: str) -> tuple[bool, str]:
    return name.endswith(f"/{seal.NAME}"), name
