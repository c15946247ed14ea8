"""Access to URLs (s3://, gs://, hf://, memory://) through fsspec's drivers."""

from typing import Any

import fsspec

from steppe.data.errors import DataError


def reached(address: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL. Raises DataError if the driver is missing or fails."""
    try:
        return fsspec.core.url_to_fs(address)
    except Exception as error:  # a missing package, an unknown scheme, no credentials: every store has its own
        raise unreachable(address, error) from error


def unreachable(address: str, error: Exception) -> DataError:
    """The DataError for a URL that a driver could not access."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return DataError(f"{address}: cannot be reached ({reason[:200]})")
