"""The errors of this package, one class per remedy. Every message is one line and names the key or file."""

from typing import Any, Required, TypedDict

from steppe.configs.keys import refusal


class DataError(ValueError):
    """Bad input. If a config key is at fault, the fields `key`, `value` and `accepted` are set."""

    def __init__(self, message: str, *, key: str = "", value: Any = None, accepted: str = ""):
        self.key, self.value, self.accepted = key, value, accepted
        super().__init__(message)


class StorageError(OSError):
    """A file could not be written; the message is one line."""


def refused(key: str, value: Any, accepted: str) -> DataError:
    """The DataError for a bad value of a config key or an --option. accepted: completes "must be ..."."""
    name = key if key.startswith("--") else f"config.{key}"
    return DataError(refusal(name, value, accepted), key=key, value=value, accepted=accepted)


class CorpusMismatch(DataError):
    """A prepared directory does not match the run: prepare another one or change the named key."""


class CorpusDamaged(DataError):
    """A prepared directory is damaged: a shard or the manifest is missing, truncated or altered."""


class BadRecords(DataError):
    """More bad records than config.data.bad_records allows."""


class Refusal(TypedDict, total=False):
    """The JSON form of an error, made by `to_json`."""

    kind: Required[str]
    message: Required[str]
    key: str
    value: Any
    accepted: str


def to_json(error: DataError | StorageError) -> Refusal:
    """Converts an error to JSON for another process; `from_json` restores it."""
    said: Refusal = {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, DataError):
        said.update({"key": error.key, "value": error.value, "accepted": error.accepted})
    return said


def from_json(said: Refusal) -> DataError | StorageError:
    """Restores an error from `to_json`."""
    kinds = {kind.__name__: kind for kind in (DataError, CorpusMismatch, CorpusDamaged, BadRecords, StorageError)}
    fields: dict[str, Any] = {name: field for name, field in said.items() if name in ("key", "value", "accepted")}
    return kinds.get(said["kind"], DataError)(said["message"], **fields)
