"""What one process keeps from run to run: values that depend on their key alone, and are costly to make."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Memo:
    """Values by kind and key, each made once; of each kind the `keep` that were asked for last."""

    def __init__(self, keep: int = 1):
        self._keep, self._kinds = keep, {}

    def once(self, kind: str, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of a key, made where it is not kept."""
        values = self._kinds.setdefault(kind, OrderedDict())
        if key not in values:
            values[key] = make()
        values.move_to_end(key)
        while len(values) > self._keep:
            values.popitem(last=False)
        return values[key]
