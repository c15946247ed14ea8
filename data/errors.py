"""What can go wrong in this room, one class per remedy. Every message is one line and names the key or file."""

from typing import Any, Required, TypedDict


class DataError(ValueError):
    """Bad input: the message names the key, its value and what is accepted, which are fields where there is a key."""

    def __init__(self, message: str, *, key: str = "", value: Any = None, accepted: str = ""):
        self.key, self.value, self.accepted = key, value, accepted
        super().__init__(message)


class StorageError(OSError):
    """Something could not be written where it belongs; one line."""


def refused(key: str, value: Any, accepted: str) -> DataError:
    """The error of the value of a key, or of an --option."""
    name = key if key.startswith("--") else f"config.{key}"
    return DataError(f"{name}={value!r}: accepted is {accepted}", key=key, value=value, accepted=accepted)


class CorpusMismatch(DataError):
    """A prepared directory does not suit the run: prepare another one or change the named key."""


class CorpusDamaged(DataError):
    """A prepared directory is not what was prepared: a shard or the manifest is missing, cut short or altered."""


class BadRecords(DataError):
    """More records than config.data.bad_records allows could not be read."""


class Refusal(TypedDict, total=False):
    """What `to_json` makes of an error."""

    kind: Required[str]
    message: Required[str]
    key: str
    value: Any
    accepted: str


def to_json(error: DataError | StorageError) -> Refusal:
    """An error for another process; `from_json` makes it again."""
    said: Refusal = {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, DataError):
        said.update({"key": error.key, "value": error.value, "accepted": error.accepted})
    return said


def from_json(said: Refusal) -> DataError | StorageError:
    """The error that another process told of."""
    kinds = {kind.__name__: kind for kind in (DataError, CorpusMismatch, CorpusDamaged, BadRecords, StorageError)}
    fields: dict[str, Any] = {name: field for name, field in said.items() if name in ("key", "value", "accepted")}
    return kinds.get(said["kind"], DataError)(said["message"], **fields)
