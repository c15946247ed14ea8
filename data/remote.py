"""Fetches and publishes prepared corpora at URLs (s3://, gs://, hf://, memory://) with fsspec."""

import contextlib
import os
import tempfile
from collections.abc import Callable

from steppe.data import files
from steppe.data import manifest as manifests
from steppe.data.errors import CorpusDamaged, DataError
from steppe.data.files import reached, reaching


def fetch(address: str, cache: str, log: Callable[[str], None] = print) -> str:
    """Fetches the prepared directory at a URL into `cache` and returns the local path. Keeps intact local files;
    several processes fetch it once. Raises CorpusDamaged if the URL is not a prepared directory."""
    system, path = reached(address)
    local = os.path.join(cache, f"fetched-{manifests.checksum({'address': address})[:16]}")
    with reaching(address):
        try:
            os.makedirs(local, exist_ok=True)
            with files.lock(f"{local}.lock", wait=True):
                aside = os.path.join(local, f"{manifests.NAME}.remote")
                try:
                    system.get_file(f"{path}/{manifests.NAME}", aside)
                except FileNotFoundError:
                    raise CorpusDamaged(f"{address} has no {manifests.NAME}; it is not a prepared directory") from None
                manifest = manifests.checked(manifests.read_json(aside), local)
                here = os.path.join(local, manifests.NAME)  # exists only after all files were fetched
                if os.path.exists(here) and manifests.read_json(here) == manifest:
                    os.unlink(aside)
                    return local
                missing = [entry for entry in manifests.entries(manifest) if not _whole(local, entry)]
                if missing:
                    size = sum(entry["size"] for entry in missing)
                    log(f"fetching {len(missing)} files, {size / 1e6:,.1f} MB, from {address} to {local}, once")
                for entry in missing:
                    target = manifests.path_of(local, entry)
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    with files.replacing(target) as partial:
                        system.get_file(f"{path}/{entry['file']}", partial)
                    if not _whole(local, entry):
                        raise CorpusDamaged(f"{address}/{entry['file']} does not match its manifest; publish it again")
                os.replace(aside, here)
        except OSError as error:
            raise DataError(f"{local}: {error.strerror or error}") from error
    return local


def published(address: str) -> manifests.Manifest | None:
    """The manifest of the prepared directory at a URL, None if there is none."""
    system, path = reached(address)
    with reaching(address), contextlib.suppress(FileNotFoundError), tempfile.TemporaryDirectory() as folder:
        system.get_file(f"{path}/{manifests.NAME}", os.path.join(folder, manifests.NAME))
        return manifests.read(folder)
    return None


def publish(directory: str, address: str, log: Callable[[str], None] = print) -> None:
    """Copies a finished prepared directory to a URL. The manifest comes last and marks the copy as complete."""
    system, path = reached(address)
    manifest = manifests.read(directory)
    names = [*(entry["file"] for entry in manifests.entries(manifest)), manifests.NAME]
    with reaching(address):
        for name in names:
            source, there = files.below(directory, name), f"{path}/{name}"
            is_there = system.exists(there) and system.size(there) == os.stat(source).st_size
            if name == manifests.NAME or not is_there:
                system.makedirs(os.path.dirname(there), exist_ok=True)
                system.put_file(source, there)
    log(f"published {len(names)} files at {address}")


def staged(address: str, cache: str) -> str:
    """The local directory in which a corpus for this URL is prepared. It is fixed, so that a preparation can resume."""
    return os.path.join(cache, f"staged-{manifests.checksum({'address': address})[:16]}")


def _whole(directory: str, entry: manifests.File) -> bool:
    path = manifests.path_of(directory, entry)
    return os.path.exists(path) and os.stat(path).st_size == entry["size"] and files.content_hash(path) == entry["hash"]
