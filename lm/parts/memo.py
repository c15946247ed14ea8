"""What one process keeps from run to run. Sweeps alone need it: `with Memo(4):` around their runs, and no more."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any


class Memo:
    """Values by kind and key, which depend on their key alone and are costly to make; of each kind the `keep` that were
    asked for last. `once` keeps them in the Memo whose `with` block it is in."""

    def __init__(self, keep: int = 1):
        self._keep, self._kinds, self._before = keep, {}, []

    def __enter__(self) -> "Memo":
        self._before.append(_CURRENT.set(self))
        return self

    def __exit__(self, *_) -> None:
        _CURRENT.reset(self._before.pop())

    def once(self, kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key, made where it is not kept."""
        values = self._kinds.setdefault(kind, OrderedDict())
        if key not in values:
            values[key] = make()
        values.move_to_end(key)
        while len(values) > self._keep:
            values.popitem(last=False)
        return values[key]


_CURRENT: ContextVar[Memo | None] = ContextVar("memo", default=None)


def once(kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
    """The value of a key, made where this process does not keep it. None is no key: nothing is known of the value."""
    memo = _CURRENT.get()
    return make() if memo is None or key is None else memo.once(kind, key, make)
