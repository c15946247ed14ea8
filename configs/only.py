"""Values as text on a command line, and the configs that --only flags choose by them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from steppe.configs.read import UsageError, plain

T = TypeVar("T")


def matching(runs: Sequence[T], only: Sequence[str], flat: Callable[[T], Mapping[str, Any]]) -> list[T]:
    """The runs that match --only flags. flat: returns the flat config of a run. Raises UsageError if none does."""
    chosen = list(runs)
    for key, texts in filters(only).items():
        if not any(key in flat(run) for run in chosen):
            raise UsageError(f"--only={key}: no such key; configs/base.py lists every key")
        chosen = [run for run in chosen if any(same(flat(run).get(key), text) for text in texts)]
        if not chosen:
            raise UsageError(f"--only={key}={','.join(texts)}: no run matches")
    return chosen


def filters(texts: Sequence[str]) -> dict[str, list[str]]:
    """{key: values} of --only=KEY=VALUE,VALUE,KEY=VALUE flags; a run must match all. Raises UsageError."""
    found = {}
    for piece in [piece for text in texts for piece in split(text)]:
        key, equals, value = piece.partition("=")
        if equals:
            key, piece = key.strip().removeprefix("config."), value
            found.setdefault(key, [])
        elif not found:
            raise UsageError(f"--only={piece}: must be KEY=VALUE,..., such as model.size=0.1m,0.4m,seed=0")
        found[list(found)[-1]].append(piece.strip())
    return found


_TOKEN = re.compile(r"""'[^']*'|"[^"]*"|.""", re.DOTALL)


def split(text: str) -> list[str]:
    """Splits a text at commas outside of quotes and brackets; at every comma if these are not closed."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in "([{") - (token in ")]}")
        if token in ("'", '"') or depth < 0:
            return [part.strip() for part in text.split(",")]
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in (text.split(",") if depth else parts)]


def text_of(value: Any) -> str:
    """A config value as text for the command line. Raises UsageError if no key can have that value."""
    value = plain(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value):
        return repr(tuple(value))
    raise UsageError(f"{value!r}: must be a number, a text, true or false, None, or a tuple of texts")


def same(value: Any, text: str) -> bool:
    """Whether a config value equals the value that a text denotes."""
    try:
        return value == float(text) if isinstance(value, (int, float)) and value is not True else text_of(value) == text
    except ValueError:
        return text_of(value) == text
