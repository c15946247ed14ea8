"""Caches values from run to run in one process. Only sweeps use it: `with Memo(4):` around their runs."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any


class Memo:
    """A cache of expensive values that depend only on their kind and key. It keeps the `keep` last used of each kind.
    The function `once` uses the Memo of the enclosing `with` block."""

    def __init__(self, keep: int = 1):
        self.keep, self.kinds, self._before = keep, defaultdict(OrderedDict), []

    def __enter__(self) -> "Memo":
        self._before.append(_CURRENT.set(self))
        return self

    def __exit__(self, *_) -> None:
        _CURRENT.reset(self._before.pop())


_CURRENT: ContextVar[Memo | None] = ContextVar("memo", default=None)


def once(kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
    """The value of a key from the current Memo, made unless cached. A key of None is never cached."""
    memo = _CURRENT.get()
    if memo is None or key is None:
        return make()
    values = memo.kinds[kind]
    if key not in values:
        values[key] = make()
    values.move_to_end(key)
    while len(values) > memo.keep:
        values.popitem(last=False)
    return values[key]
