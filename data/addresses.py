"""Files behind addresses (s3://, gs://, hf://, memory://), as fsspec's drivers reach them."""

from typing import Any

import fsspec

from steppe.data.errors import DataError


def reached(address: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it) of an address. DataError where its driver is missing, or refuses."""
    try:
        return fsspec.core.url_to_fs(address)
    except Exception as error:  # a missing package, an unknown scheme, no credentials: every store has its own
        raise unreachable(address, error) from error


def unreachable(address: str, error: Exception) -> DataError:
    """The error of an address that a driver could not serve."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return DataError(f"{address}: cannot be reached ({reason[:200]})")
