"""Writes, locks and hashes files. Writes are atomic: a kill leaves the old file or the new one, never a part."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from steppe.data.errors import DataError

ASIDE = ".tmp"  # suffix of unfinished files


class Held(RuntimeError):
    """Another process holds the lock; `holder` describes it."""

    def __init__(self, holder: str):
        self.holder = holder
        super().__init__(f"held by {holder}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[str]:
    """Yields the path of an empty temporary file, which replaces `path` durably when the block ends without an error.
    A link at `path` is replaced, not followed."""
    writer = f"{socket.gethostname()}-{threading.get_native_id()}"  # several hosts may write one directory
    aside = f"{os.fspath(path)}.{writer}{ASIDE}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(aside)  # left by a killed process, or a link that somebody made
    os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(os.path.dirname(os.path.abspath(path)))
    except OSError as error:
        if error.errno is None or error.filename not in (None, aside):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error  # a full disk does not say which file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)


def write(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a whole file, text as UTF-8. An OSError leaves the old file unchanged."""
    with replacing(path) as aside, open(aside, "wb") as handle:
        handle.write(content.encode() if isinstance(content, str) else content)
        handle.flush()


def write_json(path: str | os.PathLike, value: Any, *, digits: int | None = None) -> None:
    """Writes JSON; non-finite numbers become null. digits: significant digits of floats, None for all."""
    write(path, json.dumps(plain(value, digits), indent=1, allow_nan=False))


def plain(value: Any, digits: int | None = None) -> Any:
    """Converts a value for JSON: tuples to lists, non-finite numbers to None, floats to `digits` significant digits."""
    if isinstance(value, dict):
        return {key: plain(inside, digits) for key, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inside, digits) for inside in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value


def sync(path: str | os.PathLike) -> None:
    """Waits until a local file or directory is on disk (fsync)."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def user_cache() -> str:
    """The default cache directory for data that Steppe can recreate: $STEPPE_CACHE, else ~/.cache/steppe."""
    return os.path.expanduser(os.environ.get("STEPPE_CACHE") or os.path.join("~", ".cache", "steppe"))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is a URL, such as gs://bucket/file."""
    return "://" in str(path)


def ordinary(path: str | os.PathLike) -> BufferedReader:
    """Opens a regular file for reading. Raises DataError for a pipe, device or socket, whose read could block."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(number).st_mode
    if stat.S_ISREG(kind):
        return open(number, "rb")
    os.close(number)
    raise DataError(
        f"{os.fspath(path)}: must be an ordinary file, not a {'directory' if stat.S_ISDIR(kind) else 'pipe or device'}"
    )


def opened(path: str) -> BinaryIO:
    """Opens a file, or a URL with fsspec, for reading."""
    if not is_remote(path):
        return open(path, "rb", buffering=1 << 20)
    system, inside = reached(path)
    return system.open(inside, "rb")


def reached(address: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL. Raises DataError if the driver is missing or fails."""
    import fsspec  # slow to import, and local files need none of it

    with reaching(address):
        return fsspec.core.url_to_fs(address)


@contextlib.contextmanager
def reaching(address: str) -> Iterator[None]:
    """Turns the errors of a URL's driver into a DataError of one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # a missing package, an unknown scheme, no credentials: every store has its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{address}: cannot be reached ({reason[:200]})") from error


def matching(pattern: str, kind: Callable[[str], bool] = os.path.isfile) -> list[str]:
    """The files (or other paths of the `kind`) that a glob pattern with ~ and ** matches, sorted; URLs with fsspec.

    Special characters in names that exist are literal.
    """
    if not is_remote(pattern):
        pattern = os.path.expanduser(pattern)
        parts = pattern.split(os.sep)
        starts = [os.sep.join(parts[:n]) for n in range(len(parts) + 1)]
        literal = next(start for start in reversed(starts) if not start or os.path.lexists(start))
        paths = glob.glob(glob.escape(literal) + pattern[len(literal) :], recursive=True)
        return sorted(filter(kind, paths))
    with reaching(pattern):
        system, inside = reached(pattern)
        return sorted(system.unstrip_protocol(path) for path in system.glob(inside) if system.isfile(path))


def content_hash(path: str | os.PathLike) -> str:
    """xxh3_128 of a file's bytes."""
    with ordinary(path) as handle:
        return hashlib.file_digest(handle, xxhash.xxh3_128).hexdigest()


@contextlib.contextmanager
def lock(path: str | os.PathLike, *, wait: bool = False, shared: bool = False) -> Iterator[None]:
    """Holds an advisory lock, which the kernel releases when the process dies.

    wait: waits for another holder instead of raising Held. shared: allows other shared holders.
    Raises OSError on a file system without locks.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(number, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise Held(os.pread(number, 200, 0).decode(errors="replace").strip() or "another process") from None
        os.ftruncate(number, 0)
        with contextlib.suppress(OSError):  # a full disk only prevents the holder's name
            os.pwrite(number, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(number)


def is_held(path: str | os.PathLike) -> bool:
    """Whether a process holds this lock."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(number)
    return False


def below(root: str | os.PathLike, name: Any, *, links: bool = False) -> Path:
    """Joins a root directory and an untrusted relative name, from a stored file, a URL or a listing.

    root: a directory, possibly a link. name: parts separated by "/". links: whether links inside the directory may lead
    out of it, as in a downloaded snapshot; only for reading.
    Raises DataError for an invalid name, and for a path that leaves the directory, also through a link.
    """
    fault = ""
    if not isinstance(name, str) or not name:
        fault = "must be the name of a file"
    elif _NO_NAME.search(name):
        fault = "has forbidden characters"
    elif name.startswith("/") or re.match("[A-Za-z]:", name) or {"", ".", ".."} & set(name.split("/")):
        fault = "must be relative, without empty parts, . and .."
    elif len(name.encode()) > 1024 or max(len(part.encode()) for part in name.split("/")) > 255:
        fault = "is too long for a file"
    elif not links:
        real = os.path.realpath(root)
        if os.path.commonpath((real, os.path.realpath(os.path.join(real, name)))) != real:
            fault = "is, or passes through, a link that leads out of the directory"
    if fault:
        raise DataError(f"{os.fspath(root)}: the name {shown(name)} {fault}")
    return Path(root, name)


_NO_NAME = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\\\\]")


def shown(value: Any) -> str:
    """A stored value as one short line for a message."""
    text = ascii(value) if isinstance(value, str) and _NO_NAME.search(value) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def visible(text: str) -> str:
    """Escapes control characters in a text to be printed: a terminal would execute them."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], text)
