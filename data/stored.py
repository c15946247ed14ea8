"""Reads stored JSON safely: regular files of bounded size and depth, checked types and ranges, no duplicate keys.

A TypedDict next to the writer declares the content of a file. Undeclared keys are accepted, because other versions
write other keys. A bad value raises a `Wrong` of one line.
"""

import json
import os
import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from steppe.data import files
from steppe.data.errors import DataError

MOST = 256 << 20  # largest file, bytes
DEPTH = 64  # deepest nesting of objects and lists

Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Amount = Annotated[float, Meta(ge=0)]
Scalar = bool | int | float | str | None
Flat = dict[str, Scalar | list[Scalar]]  # a config, {"optim.rho": 0.1}


class Wrong(DataError):
    """A stored file, or a value in it, is damaged or not from Steppe."""


def read(path: str | os.PathLike, kind: Any, most: int = MOST) -> Any:
    """Reads a JSON file and checks it against a msgspec type. Raises Wrong or FileNotFoundError."""
    return decode(content_of(path, most), kind, os.fspath(path))


def content_of(path: str | os.PathLike, most: int = MOST) -> bytes:
    """The bytes of a regular file. Raises FileNotFoundError, or DataError if irregular, unreadable or too large."""
    try:
        with files.ordinary(path) as handle:
            content = handle.read(most + 1)
    except (FileNotFoundError, DataError):
        raise
    except (OSError, ValueError) as error:
        raise Wrong(f"{os.fspath(path)}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > most:
        raise Wrong(f"{os.fspath(path)}: is too large; the limit is {most:,} bytes")
    return content


def decode(content: bytes, kind: Any, place: str) -> Any:
    """Decodes JSON and checks it against a type. place: its name in messages. Raises Wrong."""
    if _is_deep(content):
        raise Wrong(f"{place}: is nested more than {DEPTH} deep")
    try:
        value = msgspec.json.decode(content)
        if _keys(value) != len(_KEY.findall(content)):  # a duplicate key, or a text that looks like one
            json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors
        raise Wrong(f"{place}: is damaged ({' '.join(str(error).split())[:200]})") from None
    return typed(value, kind, place)


def typed(value: Any, kind: Any, place: str) -> Any:
    """Checks a value against a type and returns it. Raises Wrong with the path, the value and what is accepted."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise Wrong(f"{place}: {_fault(value, kind, str(error))}") from None
    return value


_KEY = re.compile(rb'"\s*:')


def _keys(value: Any) -> int:
    """Number of keys of all objects in a value."""
    if isinstance(value, dict):
        return len(value) + sum(_keys(each) for each in value.values() if isinstance(each, (dict, list)))
    return sum(map(_keys, value)) if isinstance(value, list) else 0


def _once(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {files.shown(next(key for key in keys if keys.count(key) > 1))} occurs twice")


_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _is_deep(content: bytes) -> bool:
    if content.count(b"[") + content.count(b"{") <= DEPTH:
        return False
    depth = 0
    for bracket in _STRING.sub(b"", content).translate(None, _NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > DEPTH:
            return True
    return False


_WORDS = {"int": "an integer", "float": "a number", "str": "a text", "bool": "true or false", "object": "an object",
          "array": "a list", "null": "null"}  # fmt: skip


def _fault(value: Any, kind: Any, said: str) -> str:
    """Rewrites an error of msgspec with the full path and the value there."""
    message, _, path = said.partition(" - at ")
    where, inside = "", value
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path):
        if index == "...":  # msgspec does not say which key
            index = _culprit(value, inside, kind, said)
            where, inside = f"{where}.{index}" if where else index, inside[index]
        elif name:
            where, inside = f"{where}.{name}" if where else name, inside.get(name)
        else:
            where, inside = f"{where}[{index}]", inside[int(index)]
    where = where if where.isprintable() else ascii(where)
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        return f"{where + '.' if where else ''}{missing[1]}: is missing"
    kinds, _, bound = re.sub(r", got .*", "", message).removeprefix("Expected ").removeprefix("`").partition("`")
    accepted = " or ".join(_WORDS.get(each, each) for each in kinds.split(" | "))
    if message.startswith("Expected"):
        return f"{where or 'it'} = {files.shown(inside)}: must be {accepted}{bound}"
    if message.startswith("Invalid enum value"):
        return f"{where or 'it'} = {files.shown(inside)}: must be a value that Steppe writes there"
    return f"{where or 'it'} = {files.shown(inside)}: {message[:1].lower()}{message[1:100]}"


def _culprit(whole: Any, inside: dict, kind: Any, said: str) -> str:
    """The key of `inside`, a part of `whole`, that causes the error `said` of msgspec; found by bisection."""

    def complains(keys: list[str]) -> bool:
        inside.clear()
        inside.update((key, kept[key]) for key in keys)
        try:
            msgspec.convert(whole, kind)
        except msgspec.ValidationError as error:
            return str(error) == said
        return False

    kept, keys = dict(inside), list(inside)
    while len(keys) > 1:
        half = keys[: len(keys) // 2]
        keys = half if complains(half) else keys[len(half) :]
    inside.clear()
    inside.update(kept)
    return keys[0]
