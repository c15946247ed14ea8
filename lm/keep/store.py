"""The files at one URL, by name, through fsspec: one request at a time; every error is one line."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from fsspec.callbacks import Callback

from steppe.data import files
from steppe.data.errors import DataError, StorageError

PATIENCE = 60.0  # seconds without any progress after which a request fails for now


class There(NamedTuple):
    """A listed file. mark: changes with the file, as far as the store reports it."""

    size: int
    mark: str


class Store:
    """The content of a URL, by names relative to it.

    place: of its local copy; a name that leaves it raises DataError. A driver's errors and timeouts are StorageErrors.
    """

    def __init__(self, address: str, place: Path):
        self.address, self._place = address.rstrip("/"), place
        self._system, root = files.reached(self.address)
        self._root = root.rstrip("/")
        self._pending: _Request | None = None

    def names(self) -> dict[str, There]:
        """Every file at the URL; {} if the bucket does not exist. DataError for a name that leaves the directory."""

        def listed(system, _):
            system.invalidate_cache()
            return system.find(self._root, detail=True)

        try:
            found = self._asked(("list",), listed)
        except FileNotFoundError:
            return {}
        inside = f"{self._root}/"
        named = {path.removeprefix(inside): info for path, info in found.items() if path.startswith(inside)}
        try:
            for name in named:
                files.below(self._place, name)
        except DataError as error:
            raise DataError(f"{self.address}: {error}") from None
        return {name: There(info["size"], _mark(info)) for name, info in named.items()}

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if absent."""
        try:
            return self._asked(("read", name), lambda system, _: system.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def beginnings(self, names: Iterable[str], count: int) -> dict[str, bytes]:
        """The first `count` bytes of files; missing files are left out."""
        names = list(names)
        paths = [self._path(name) for name in names]

        def begun(system, _):
            return system.cat_ranges(paths, [0] * len(paths), [count] * len(paths), on_error="return") if paths else []

        found = dict(zip(names, self._asked(("begin", *names), begun), strict=True))
        for error in found.values():
            if isinstance(error, Exception) and not isinstance(error, FileNotFoundError):
                raise self._error(error) from error
        return {name: content for name, content in found.items() if isinstance(content, bytes)}

    def write(self, name: str, content: bytes) -> None:
        """Replaces a small file."""
        self._placed(("write", name, content), [name], lambda system, _: system.pipe_file(self._path(name), content))

    def remove(self, name: str) -> None:
        """Removes a file; it may be gone already."""
        with suppress(FileNotFoundError):
            self._asked(("remove", name), lambda system, _: system.rm_file(self._path(name)))

    def get(self, targets: Mapping[str, Path]) -> None:
        """Fetches {name: local file}. Raises FileNotFoundError if one is gone."""
        if targets:
            there, here = [self._path(name) for name in targets], [str(path) for path in targets.values()]
            for folder in {path.parent for path in targets.values()}:
                folder.mkdir(parents=True, exist_ok=True)
            self._asked(("get", *there, *here), lambda system, progress: system.get(there, here, callback=progress))

    def put(self, sources: Mapping[str, Path]) -> set[str]:
        """Sends {name: local file}; returns the names of files that still existed here."""
        present = {name: path for name, path in sources.items() if path.exists()}
        if not present:
            return set()
        there, here = [self._path(name) for name in present], [str(path) for path in present.values()]
        with suppress(FileNotFoundError):
            marks = [path.stat().st_mtime_ns for path in present.values()]
            put = lambda system, progress: system.put(here, there, callback=progress)  # noqa: E731
            self._placed(("put", *there, *marks), present, put, lambda: all(path.exists() for path in present.values()))
            return set(present)
        return self.put(present)

    def _placed(self, key: tuple, names: Iterable[str], what: Callable, whole: Callable = lambda: True) -> None:
        """A request that writes; creates folders, which some stores need. FileNotFoundError unless `whole`."""
        try:
            self._asked(key, what)
        except FileNotFoundError as error:
            if not whole():
                raise
            top = self._root[: self._root.find("/", 1)] if "/" in self._root[1:] else self._root
            if not self._asked(("top",), lambda system, _: (system.invalidate_cache(), system.exists(top))[1]):
                raise StorageError(f"{self.address}: {error}; there is no {top.strip('/')}") from error
            for folder in {os.path.dirname(self._path(name)) for name in names}:
                self._asked(("folder", folder), lambda system, _, f=folder: system.makedirs(f, exist_ok=True))
            try:
                self._asked(key, what)
            except FileNotFoundError as again:
                if not whole():
                    raise
                raise self._error(again) from again

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _asked(self, key: tuple, what: Callable[[Any, Callback], Any]) -> Any:
        """The answer of what(system, progress). A request that timed out must finish before the next starts, so that
        two never write at once; asking again with its key waits for the same request."""
        if self._pending is not None and self._pending.key != key:
            self._answered(self._pending)
        request = self._pending = self._pending or _Request(key, lambda progress: what(self._system, progress))
        self._answered(request)
        try:
            return request.answer.result()
        except FileNotFoundError:
            raise
        except BaseException as error:  # every driver raises its own errors
            raise self._error(error) from error

    def _answered(self, request: "_Request") -> None:
        if not request.wait(PATIENCE):
            raise StorageError(f"{self.address}: no answer for {time.monotonic() - request.moved:.0f} s")
        self._pending = None

    def _error(self, error: BaseException) -> StorageError:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return StorageError(f"{self.address}: {reason[:300]}")


class _Request(Callback):
    """A request running in its own thread. moved: the time of its last progress."""

    def __init__(self, key: tuple, what: Callable[[Callback], Any]):
        super().__init__()
        self.key, self.moved, self.answer = key, time.monotonic(), Future()
        threading.Thread(target=self._run, args=(what,), daemon=True).start()

    def call(self, *_, **__) -> None:
        self.moved = time.monotonic()

    def branched(self, *_, **__) -> Callback:
        return Callback(hooks={"moved": lambda *_, **__: self.call()})

    def wait(self, patience: float) -> bool:
        """Whether it is done; False after `patience` seconds without progress."""
        while (left := self.moved + patience - time.monotonic()) > 0 and not self.answer.done():
            wait([self.answer], left)
        return self.answer.done()

    def _run(self, what: Callable[[Callback], Any]) -> None:
        try:
            self.answer.set_result(what(self))
        except BaseException as error:
            self.answer.set_exception(error)


def _mark(info: Mapping) -> str:
    return xxhash.xxh3_64_hexdigest(repr(sorted((key, str(value)) for key, value in info.items())).encode())
