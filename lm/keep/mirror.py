"""Runs whose workdir is a URL (s3://, gs://, memory://): they run in the local cache and are copied to the URL.

Sealed checkpoints decide which copy is newer. Before a run starts, the seals of both copies are compared. What is newer
at the URL is fetched, what is newer in the cache is sent; if both have continued, nothing is changed. No local file is
removed because the URL lacks it. At the URL, only steps are removed that this cache's retention has deleted.
"""

import os
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import msgspec
from etils import epath

from steppe.data import files, stored
from steppe.data.errors import DataError, StorageError
from steppe.data.manifest import checksum
from steppe.lm.keep import seal
from steppe.lm.keep.exits import WorkdirError
from steppe.lm.keep.store import Store, There
from steppe.lm.keep.workdir import LOCK, RUN, alone

SECONDS = 20.0  # between copies
HOLDER = "holder"  # the file at the URL that names the training process; removed after a clean end
CHECKPOINTS = "checkpoints"
SUPERSEDED = "superseded"  # a folder in CHECKPOINTS: local steps that the URL's course has replaced
ADDRESS, TRAINING, KNOWN = "address", "training.lock", "known.json"  # next to the local directory


@contextmanager
def kept(workdir: str, primary: bool, log: Callable[[str], None]) -> Iterator[str]:
    """The local directory of a workdir for training, while the `with` block runs; a path is returned unchanged.

    Newer files at a URL are fetched first; changes are copied to it every SECONDS and at the end. The last process to
    start owns the run: the previous owner gets a signal and stops copying. Raises DataError if the URL cannot be
    reached, WorkdirError if another process of this machine uses it, or if the URL and this cache have both continued,
    and at the end StorageError for files that could not be copied.
    """
    if not files.is_remote(workdir):
        yield workdir
        return
    if not primary:
        yield str(_looked(workdir, checkpoints=False))
        return
    place = _made(workdir)
    with alone(place.parent / TRAINING, workdir):
        with _one_line(place):
            copier = _Copier(workdir, place, log)
        log(f"workdir     {workdir}, through {place}")
        with closing(copier):
            yield str(place)


def here(workdir: str, checkpoints: bool = False) -> str:
    """The current local directory of a workdir for reading, with checkpoints if asked for; a path is unchanged.

    If a run on this machine is ahead of the URL, its directory is used. Raises WorkdirError for an empty URL.
    """
    if not files.is_remote(workdir):
        return workdir
    place = _looked(workdir, checkpoints)
    if not any(place.iterdir()):
        raise WorkdirError(f"{workdir}: must be the workdir of a run; it is empty")
    return str(place)


def add(directory: str | os.PathLike, *written: str) -> None:
    """Copies files or folders that a command wrote into a directory from `here` to its URL, if it has one."""
    place = Path(directory)
    if place.parent.parent == _runs() and (place.parent / ADDRESS).exists():
        store = Store((place.parent / ADDRESS).read_text(), place)
        store.put({name: place / name for name in _files(place) if name.split("/")[0] in written})


def _runs() -> Path:
    """The folder of local copies of workdirs at URLs."""
    return Path(files.user_cache()) / "runs"


def _place(address: str, reading: bool = False) -> Path:
    """The local copy of a URL, for training or for reading: a folder with the URL's last name, next to its locks."""
    address = address.rstrip("/")
    folder = checksum({"address": address})[:16] + ("-read" if reading else "")
    return _runs() / folder / (address.rpartition("/")[2] or "run")


def _made(address: str, reading: bool = False) -> Path:
    place = _place(address, reading)
    try:
        place.mkdir(parents=True, exist_ok=True)
        files.write(place.parent / ADDRESS, address)
    except OSError as error:
        raise WorkdirError(
            f"{place.parent}: cannot be created for the copy of {address} ({error.strerror or error})"
        ) from None
    return place


@contextmanager
def _one_line(place: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{error.filename or place}: {error.strerror or error}") from error


# ----------------------------------------------------------------------------------------------------------- comparing
class _State:
    """The present content of a URL. steps: {step: digest of its seal}, if asked for. run: its id, "" for none."""

    def __init__(self, store: Store, seals: bool = True):
        self.names = store.names()
        sealed = [name for name in self.names if seals and f"{CHECKPOINTS}/{_step(name)}/{seal.NAME}" == name]
        found = store.beginnings(sealed, _DIGEST)
        steps = ((_step(name), digest.decode(errors="replace")) for name, digest in found.items())
        self.steps = {step: digest for step, digest in steps if step is not None}
        self.run = ((RUN in self.names and store.read(RUN)) or b"").decode(errors="replace").strip()

    def within(self, step: int) -> list[str]:
        """The names of a step's files, with its seal last."""
        return sorted((n for n in self.names if _step(n) == step), key=lambda n: (n.endswith(f"/{seal.NAME}"), n))


class _Known(msgspec.Struct):
    """What a local directory knows of its URL, stored in a file next to it.

    seals: {step: (digest, whether it arrived)} of seals fetched from there or sent. files: {name: (size, local time,
    remote mark)} of other files when both copies last agreed; the mark is "" if unknown.
    """

    seals: dict[int, tuple[str, bool]] = {}
    files: dict[str, tuple[int, int, str]] = {}

    @classmethod
    def of(cls, place: Path) -> "_Known":
        with suppress(FileNotFoundError, stored.Wrong, msgspec.ValidationError):  # a damaged file counts as absent
            return msgspec.convert(stored.read(place.parent / KNOWN, dict), cls, str_keys=True)
        return cls()

    def save(self, place: Path) -> None:
        files.write_json(place.parent / KNOWN, msgspec.structs.asdict(self))


def _newer(place: Path, there: _State, known: _Known, holder: str) -> tuple[bool, bool]:
    """(whether the newest local seal is missing at the URL, whether the URL has a seal that this cache never had).

    A local seal that the URL once had and then dropped while continuing is not newer.
    """
    mine = _seals(place)
    last, other = max(mine, default=-1), max(there.steps, default=-1)
    theirs = bool(there.steps) and mine.get(other) != there.steps[other]
    theirs = theirs and known.seals.get(other, ("",))[0] != there.steps[other]
    ours = bool(mine) and there.steps.get(last) != mine[last]
    ours = ours and not (theirs and known.seals.get(last) == (mine[last], True))
    if ours and theirs and not (place.parent / KNOWN).exists():  # an older version wrote no record
        theirs = f" on {socket.gethostname()} (" not in holder
    return ours, theirs


def _other_run(place: Path, there: _State) -> str:
    """The id of the run in this cache if the URL holds another, else ""."""
    with suppress(OSError, DataError), files.ordinary(place / RUN) as handle:
        run = handle.read().decode(errors="replace").strip()
        return run if there.run not in ("", run) else ""
    return ""


def _compared(store: Store, place: Path, known: _Known, holder: str) -> tuple[_State, bool, bool]:
    """The content of the URL, and the result of _newer. Raises WorkdirError if the URL and this cache hold different
    runs, or different continuations of one."""
    there = _State(store)
    ours, theirs = _newer(place, there, known, holder)
    run = _other_run(place, there)
    if run or (ours and theirs):
        what = f"the run {there.run}, this machine the run {run}" if run else "steps that this machine never had"
        last, mine = max(there.steps, default=0), max(_seals(place), default=0)
        raise WorkdirError(
            f"{store.address}: holds {what}: step {last} there, step {mine} in {place}; nothing was changed. To resume "
            "from the URL, move that directory away; to resume from here, pass a copy of it as --workdir"
        )
    return there, ours, theirs


# ------------------------------------------------------------------------------------------------------------- reading
def _looked(address: str, checkpoints: bool) -> Path:
    training = _place(address)
    if files.is_held(training.parent / TRAINING):  # a run on this machine is ahead of the URL
        return training
    place = _made(address, reading=True)
    with _one_line(place), files.lock(place.parent / "fetch.lock", wait=True):
        store = Store(address, place)
        there = _State(store, seals=checkpoints or bool(_seals(training)))
        ours, theirs = _newer(training, there, _Known.of(training), "")
        if ours and not theirs:
            return training
        known = _Known.of(place)
        if there.names:
            for name in [name for name in known.files if name not in there.names]:
                if (place / name).exists() and _mark(place / name) == known.files[name][:2]:
                    files.below(place, name).unlink()
                del known.files[name]
            _fetch_files(store, place, there, known)
        if checkpoints and there.steps:
            for step, digest in _seals(place).items():
                if there.steps.get(step) != digest:
                    if step < max(there.steps):
                        shutil.rmtree(place / CHECKPOINTS / str(step))
                    else:
                        seal.set_aside(place / CHECKPOINTS, step, SUPERSEDED)
            mine, others = _seals(place), _seals(training)
            for step, digest in there.steps.items():
                if mine.get(step) != digest:
                    near = training / CHECKPOINTS / str(step) if others.get(step) == digest else None
                    _fetch_step(store, place, there, step, print, near)
        known.save(place)
    return place


def _fetch_files(store: Store, place: Path, there: _State, known: _Known, kept: Collection[str] = ()) -> None:
    """Fetches files outside of steps, except those in `kept` and those that are already here."""
    wanted = []
    for name in filter(_is_shared, there.names):
        *mark, remote = known.files.get(name, ("",))
        same = remote == there.names[name].mark and (place / name).exists() and [*_mark(place / name)] == mark
        if not same and name not in kept:
            wanted.append(name)
    incoming = place.parent / "incoming"
    shutil.rmtree(incoming, ignore_errors=True)
    while True:
        try:
            store.get({name: files.below(incoming, name) for name in wanted})
            break
        except FileNotFoundError:  # removed in the meantime
            now = store.names()
            if all(name in now for name in wanted):
                raise
            wanted = [name for name in wanted if name in now]
    for name in wanted:
        target = files.below(place, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(target) as aside:
            os.replace(incoming / name, aside)
        known.files[name] = (*_mark(target), there.names[name].mark)
    shutil.rmtree(incoming, ignore_errors=True)


def _fetch_step(store: Store, place: Path, there: _State, step: int, log: Callable, near: Path | None = None) -> bool:
    """Fetches a sealed step, or links it from another local copy. False if it is gone or damaged; logs damage."""
    from steppe.lm.keep.checkpoint import ASIDE  # imported here: commands that read no checkpoint need no orbax

    target = files.below(place, f"{CHECKPOINTS}/{step}")
    aside, problem = target.with_name(f"{step}{ASIDE}-fetched"), None
    for source in (near, None):  # twice, because a connection may have been cut within a file
        shutil.rmtree(aside, ignore_errors=True)
        try:
            if source:
                shutil.copytree(source, aside, copy_function=os.link)
            else:
                start = f"{CHECKPOINTS}/{step}/"
                store.get({name: files.below(aside, name.removeprefix(start)) for name in there.within(step)})
            seal.verify(epath.Path(aside), step)
        except (FileNotFoundError, shutil.Error):  # its run has deleted it, or the file system has no links
            if not source:
                problem = None
                break
            continue
        except seal.Broken as broken:
            problem = broken
            continue
        for path in filter(Path.is_file, aside.rglob("*")):
            files.sync(path)
        if target.exists():  # without a seal, so it is not a checkpoint
            seal.set_aside(place / CHECKPOINTS, step, SUPERSEDED)
        aside.rename(target)
        files.sync(target.parent)
        return True
    shutil.rmtree(aside, ignore_errors=True)
    if problem:
        log(f"CHECKPOINT {step} AT {store.address} IS NOT USED: {problem}")
    return False


# ------------------------------------------------------------------------------------------------------------- copying
_SENT = There(0, "")  # of files sent since the URL was last listed


class _Taken(Exception):
    """Another process has taken over the run."""


class _Copier:
    """Copies a run's directory to its URL every SECONDS, from a thread, and once more when closed.

    First compares both copies, takes over the run and fetches what is newer at the URL. Raises WorkdirError, before
    writing anything, if both have continued.
    """

    def __init__(self, address: str, place: Path, log: Callable[[str], None]):
        self._store = store = Store(address, place)
        self._place, self._log = place, log
        self._token = f"process {os.getpid()} on {socket.gethostname()} ({uuid.uuid4().hex[:8]})"
        self._known = known = _Known.of(place)
        self._lost, self._failing_since = "", 0.0  # 0: it does not fail
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        before = (store.read(HOLDER) or b"").decode(errors="replace")
        _compared(store, place, known, before)
        if before:
            self._log(f"workdir     {before} did not end cleanly; this process takes over")
        store.write(HOLDER, self._token.encode())
        # again, because the previous owner may have written in the meantime
        there, ours, theirs = _compared(store, place, known, before)
        mine = _seals(place)
        last, other = max(mine, default=0), max(there.steps, default=0)
        if ours:
            what = f"step {other} there" if there.steps else "anything there"
            self._log(
                f"workdir     step {last} is newer in {place} than {what}; it is sent, and the run resumes from it"
            )
        elif theirs and mine:
            self._log(f"workdir     step {other} at the URL is newer than step {last} here; it is fetched")
        self._fetch(there, theirs)
        changed = {name for name, mark in _files(place).items() if self._is_new(name, mark)}
        begun = (place.parent / KNOWN).exists()
        settled = theirs or not (begun or ours)  # for files in both copies, the URL decides
        _fetch_files(store, place, there, known, kept=() if settled else changed)
        known.save(place)
        self._adopt(there)
        self._thread.start()

    def close(self) -> None:
        """Copies what remains. WorkdirError if another process has taken over; StorageError for missing copies."""
        self._ended.set()
        self._thread.join()
        if not self._lost:
            try:
                self._copy()
                self._compare()
                self._store.remove(HOLDER)
            except _Taken as taken:
                self._lost = str(taken)
            except OSError as error:
                raise StorageError(f"{error}; {self._lacking()}") from error
        if self._lost:
            raise WorkdirError(
                f"{self._store.address}: was taken over by {self._lost}; this process's later work is only in "
                f"{self._place}"
            )

    def _fetch(self, there: _State, theirs: bool) -> None:
        """Fetches steps that are newer at the URL, or missing here if the URL has continued."""
        from steppe.lm.keep.checkpoint import DELETED

        place, mine = self._place, _seals(self._place)
        (place / CHECKPOINTS / seal.RETIRED).mkdir(parents=True, exist_ok=True)
        for left in (place / CHECKPOINTS).glob(f"*{DELETED}/{seal.NAME}"):  # a kill interrupted the deletion
            left.rename(place / CHECKPOINTS / seal.RETIRED / left.parent.name.removesuffix(DELETED))
        retired, last = set(_retired(place)), max(mine, default=-1)
        for step, digest in mine.items() if theirs else ():
            if step > max(there.steps) or there.steps.get(step, digest) != digest:
                aside = seal.set_aside(place / CHECKPOINTS, step, SUPERSEDED)
                self._log(f"workdir     step {step} is not part of the run there; moved to {aside}")
        mine = _seals(place)
        for step, digest in sorted(there.steps.items()):
            if step not in mine and (step, digest) not in retired and (theirs or step > last):
                self._known.seals[step] = (digest, _fetch_step(self._store, place, there, step, self._log))

    def _adopt(self, there: _State) -> None:
        """Records the content of the URL as sent."""
        self._there = there
        self._known.files = {name: mark for name, mark in self._known.files.items() if name in there.names}

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._copy()
                if self._failing_since:
                    spent = time.monotonic() - self._failing_since
                    self._log(f"COPIED      again, after {spent:,.0f} s; {self._held()} is at {self._store.address}")
                self._failing_since = 0.0
            except _Taken as taken:
                self._lost = str(taken)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            except Exception as error:
                if not self._failing_since:
                    self._failing_since = time.monotonic()
                    again = f"the run continues and tries again every {SECONDS:g} s"
                    self._log(f"NOT COPIED  {error}; {self._lacking()}; {again}")
            self._ended.wait(SECONDS)

    def _held(self) -> str:
        return f"step {max(self._there.steps)}" if self._there.steps else "no checkpoint"

    def _lacking(self) -> str:
        return f"anything newer than {self._held()} is only in {self._place}"

    def _copy(self) -> None:
        """Sends new files: those of steps, then others, then seals. Removes steps that retention has deleted."""
        self._must_hold()
        known, sealed = self._known, _seals(self._place)
        new = [step for step in sorted(sealed) if self._there.steps.get(step) != sealed[step] and self._send(step)]
        now = _files(self._place)
        changed = [name for name, mark in now.items() if self._is_new(name, mark)]
        for name in self._store.put({name: self._place / name for name in changed}):
            known.files[name] = (*now[name], "")
        for step in new:
            self._seal(step, sealed[step])
        gone = list(_retired(self._place))
        if gone:
            self._must_hold()
        for step, digest in gone:
            if step not in _seals(self._place) and self._there.steps.get(step, digest) == digest:
                self._remove(step)
                known.seals.pop(step, None)
            (self._place / CHECKPOINTS / seal.RETIRED / str(step)).unlink()
        if new or gone or changed:
            known.save(self._place)

    def _send(self, step: int) -> bool:
        """Sends a step's files except its seal, without which it is no checkpoint; False if the step is gone."""
        folder = self._place / CHECKPOINTS / str(step)
        found = [path for path in folder.rglob("*") if path.is_file() and path != folder / seal.NAME]
        names = {path.relative_to(self._place).as_posix(): path for path in found}
        self._remove(step, names)
        self._there.names.update(dict.fromkeys(names, _SENT))
        return len(self._store.put(names)) == len(names) > 0

    def _seal(self, step: int, digest: str) -> None:
        name = f"{CHECKPOINTS}/{step}/{seal.NAME}"
        if _seals(self._place).get(step) != digest:  # deleted in the meantime
            return
        self._must_hold()
        self._known.seals[step] = (digest, False)
        self._known.save(self._place)
        self._there.names[name] = _SENT
        if self._store.put({name: self._place / name}):
            self._known.seals[step] = (digest, True)
            self._there.steps[step] = digest

    def _remove(self, step: int, but: Collection[str] = ()) -> None:
        """Removes a step at the URL, its seal first, except the files `but`, which are about to be replaced."""
        for name in reversed(self._there.within(step)):
            if name not in but:
                self._store.remove(name)
                del self._there.names[name]
                if name.endswith(f"/{seal.NAME}"):
                    self._there.steps.pop(step, None)

    def _must_hold(self) -> None:
        """Raises _Taken if another process owns the run. Rewrites a holder file that vanished with everything else."""
        holder = self._store.read(HOLDER)
        if holder == self._token.encode():
            return
        if holder is not None:
            raise _Taken(holder.decode(errors="replace"))
        there = _State(self._store)
        if _newer(self._place, there, self._known, "")[1] or _other_run(self._place, there):
            raise _Taken("another, which has ended")
        self._store.write(HOLDER, self._token.encode())
        self._adopt(there)

    def _compare(self) -> None:
        """Sends again what is missing or incomplete at the URL. Raises StorageError if it still is afterwards."""
        place, known = self._place, self._known
        for last in (False, True):
            there = _State(self._store)
            self._adopt(there)
            sizes = {name: found.size for name, found in there.names.items()}
            now, sealed, lacking = _files(place), _seals(place), []
            wrong = [name for name, mark in now.items() if self._is_new(name, mark) or sizes[name] != mark[0]]
            if last:  # a file that changed again belongs to another process, which is still writing it
                wrong = [name for name in wrong if name not in sizes or not self._is_new(name, now[name])]
            for step, digest in sealed.items():
                parts = filter(Path.is_file, (place / CHECKPOINTS / str(step)).rglob("*"))
                whole = all(sizes.get(path.relative_to(place).as_posix()) == path.stat().st_size for path in parts)
                if there.steps.get(step) != digest or not whole:
                    lacking.append(step)
            if not wrong and not lacking:
                known.files = {name: (*at[:2], there.names[name].mark) for name, at in known.files.items()}
                heard = {step: digest for step, (digest, _) in known.seals.items() if there.steps.get(step) == digest}
                known.seals = {step: (digest, True) for step, digest in {**heard, **sealed}.items()}
                known.save(place)
                return
            if last:
                raise StorageError(f"{self._store.address}: lacks {(wrong + lacking)[0]}, although it was sent")
            for name in wrong:
                known.files.pop(name, None)
            for step in lacking:
                there.steps.pop(step, None)
            self._copy()

    def _is_new(self, name: str, mark: tuple[int, int]) -> bool:
        return self._known.files.get(name, (0, 0))[:2] != mark


# --------------------------------------------------------------------------------------------------- local directories
_DIGEST = 32  # first bytes of a seal: the hash of the rest


def _seals(place: Path) -> dict[int, str]:
    """{step: digest of its seal} of a directory's checkpoints."""
    found = {}
    for step in seal.steps(place / CHECKPOINTS):
        with suppress(FileNotFoundError, NotADirectoryError, DataError):  # not an ordinary file, so no seal
            found[step] = _digest(place / CHECKPOINTS / str(step) / seal.NAME)
    return found


def _retired(place: Path) -> Iterator[tuple[int, str]]:
    """(step, digest) of steps that retention has deleted since the last copy."""
    for path in sorted((place / CHECKPOINTS / seal.RETIRED).glob("*")):
        if (step := seal.number(path.name)) is not None:
            with suppress(FileNotFoundError, DataError):
                yield step, _digest(path)


def _digest(path: Path) -> str:
    with files.ordinary(path) as handle:
        return handle.read(_DIGEST).decode(errors="replace")


def _files(place: Path) -> dict[str, tuple[int, int]]:
    """{name: mark} of the files of a run's directory outside of steps."""
    found = {}
    for folder, below, names in os.walk(place):
        inside = Path(folder).relative_to(place)
        if inside == Path("."):
            below[:] = [name for name in below if name != CHECKPOINTS]
        for name in names:
            relative = (inside / name).as_posix()
            if _is_shared(relative) and not (Path(folder) / name).is_symlink():
                with suppress(FileNotFoundError):
                    found[relative] = _mark(Path(folder) / name)
    return found


def _mark(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _is_shared(name: str) -> bool:
    """Whether a file outside of steps is copied: locks and unfinished files are not."""
    top, last = name.split("/")[0], name.rpartition("/")[2]
    return name not in (LOCK, HOLDER) and top != CHECKPOINTS and not last.endswith((".lock", files.ASIDE))


def _step(name: str) -> int | None:
    """The step whose checkpoint a file belongs to; None for other files."""
    parts = name.split("/")
    return seal.number(parts[1]) if len(parts) > 2 and parts[0] == CHECKPOINTS else None
