"""The seal of a checkpoint: a manifest with a hash of every file, written last.

A step directory without a complete seal is no checkpoint. The seal is text: the hash of the rest, then a line of JSON.
"""

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypedDict

import jax
import xxhash
from etils import epath

from steppe.data import files, stored
from steppe.data.errors import DataError

NAME = "SEAL"
FORMAT = 1
RETIRED = "retired"  # a folder next to the steps: seals of deleted steps, until the run's URL has been updated


class Seal(TypedDict):
    """A seal's content: step, run id, {path: [dtype, shape]} of the arrays, {name: [bytes, hash]} of the files."""

    format: Literal[1]  # FORMAT
    step: stored.Count
    run: str
    tree: dict[str, tuple[str, list[stored.Count]]]
    files: dict[str, tuple[int, str]]


class Broken(ValueError):
    """Why a directory is not the expected checkpoint. sealed: False if its save never finished."""

    def __init__(self, why: str, sealed: bool = True):
        self.sealed = sealed
        super().__init__(why)


def tree_of(state: Any) -> dict[str, list]:
    """{path: [dtype, shape]} of a tree of arrays or ShapeDtypeStructs."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [str(leaf.dtype), list(leaf.shape)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def write(directory: epath.Path, step: int, run: str, tree: dict[str, list]) -> None:
    """Seals a finished step directory of run `run`. Durable when it returns; OSError if it cannot be written."""
    found = _looks(directory, list(_files(directory)))
    body = json.dumps({"format": FORMAT, "step": step, "run": run, "tree": tree, "files": found}).encode()
    content = _digest(body).encode() + b"\n" + body
    if not files.is_remote(directory):
        files.write(directory / NAME, content)
    else:
        aside = directory / f"{NAME}.tmp"
        aside.write_bytes(content)
        aside.rename(directory / NAME)


def read(directory: epath.Path) -> Seal:
    """The seal of a step directory, after verifying its own hash. Raises Broken."""
    path = directory / NAME
    try:
        content = path.read_bytes() if files.is_remote(path) else stored.content_of(str(path))
    except FileNotFoundError:
        raise Broken("it has no seal, so its save never finished", sealed=False) from None
    except (OSError, ValueError) as error:
        raise Broken(f"its seal cannot be read ({error})") from None
    digest, _, body = content.partition(b"\n")
    if digest != _digest(body).encode():
        raise Broken("its seal was altered")
    try:
        seal = stored.decode(body, Seal, NAME)
    except stored.Wrong as error:
        raise Broken(f"its seal does not have the format of this version, {FORMAT} ({error})") from None
    try:
        if not files.is_remote(directory):
            for name in seal["files"]:
                files.below(directory, name)
    except DataError as error:
        raise Broken(f"its seal names a file outside of it ({error})") from None
    return seal


def verify(directory: epath.Path, step: int, run: str = "", share: tuple[int, int] = (0, 1)) -> Seal:
    """The seal, after comparing the directory with it. Raises Broken with the first difference.

    run: the expected id, "" for any. share (i, n): reads the contents of every n-th file, starting at the i-th.
    """
    seal = read(directory)
    if seal["step"] != step:
        raise Broken(f"it was saved as step {seal['step']} and renamed")
    if run and seal["run"] != run:
        other = files.shown(seal["run"])
        raise Broken(f"it belongs to another run ({other}; this one is {run}); config.init_from can start from it")
    found = set(_files(directory)) - {NAME}
    for what, names in (("lacks", set(seal["files"]) - found), ("has a foreign file", found - set(seal["files"]))):
        if names:
            raise Broken(f"it {what} {min(names)[:100]}")
    for name, looked in _looks(directory, sorted(found)[share[0] :: share[1]]).items():
        if looked != seal["files"][name]:
            raise Broken(f"{name} was altered ({looked[0]} bytes, {seal['files'][name][0]} when saved)")
    return seal


def steps(directory: Any) -> list[int]:
    """The steps of the checkpoints in a directory, finished or not."""
    names = [path.name for path in directory.iterdir() if path.is_dir()] if directory.exists() else []
    return [step for step in map(number, names) if step is not None]


def sealed(directory: Any) -> list[int]:
    """The steps of the sealed checkpoints in a directory, in order."""
    return sorted(step for step in steps(directory) if (directory / str(step) / NAME).exists())


def number(name: str) -> int | None:
    """The step that a checkpoint's directory is named after; None for other names."""
    return int(name) if name.isascii() and name.isdecimal() and name == str(int(name)) and len(name) < 19 else None


def set_aside(directory: Any, step: int, folder: str) -> Any:
    """Moves a checkpoint into a folder next to it, where no run looks for checkpoints; returns its new path."""
    aside = directory / folder
    aside.mkdir(exist_ok=True)
    target = next(path for k in range(10**6) if not (path := aside / (f"{step}.{k}" if k else str(step))).exists())
    return (directory / str(step)).rename(target)


def _digest(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def _looks(directory: epath.Path, names: list[str]) -> dict[str, list]:
    """{name: [size, hash]} of files of a step directory."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: _look(directory / name), names), strict=True))


def _look(path: epath.Path) -> list:
    """[size, hash] of a file's contents; an unreadable file differs from every other."""
    digest, size = xxhash.xxh3_128(), 0
    try:
        with path.open("rb") if files.is_remote(path) else files.ordinary(path) as handle:
            while chunk := handle.read(1 << 22):
                digest.update(chunk)
                size += len(chunk)
    except (OSError, ValueError) as error:
        return [-1, f"unreadable: {error}"]
    return [size, digest.hexdigest()]


def _files(directory: epath.Path, below: str = "") -> Iterable[str]:
    """Names of all files in a step directory, relative to it. Broken for a link: its target may be anything."""
    for path in directory.iterdir():
        name = f"{below}{path.name}"
        if os.path.islink(path):
            raise Broken(f"{name} is a link")
        if path.is_dir():
            yield from _files(path, f"{name}/")
        else:
            yield name
