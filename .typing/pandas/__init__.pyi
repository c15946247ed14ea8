"""What a frame holds is known when it is read: its cells, and what is made of them, are of any type."""

from typing import Any

def __getattr__(name: str) -> Any: ...
