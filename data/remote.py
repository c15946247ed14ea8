"""Prepared corpora behind addresses (s3://, gs://, hf://, memory://), through fsspec: fetched once, published whole."""

import os
import shutil
import tempfile
from collections.abc import Callable

from steppe.data import files
from steppe.data import manifest as manifests
from steppe.data.addresses import reached, unreachable
from steppe.data.errors import CorpusDamaged, DataError


def fetch(address: str, cache: str, log: Callable[[str], None] = print) -> str:
    """The local copy, below `cache`, of a prepared directory behind an address; what is there and whole is not fetched
    again. Several processes fetch it once. CorpusDamaged where it is none."""
    system, path = reached(address)
    place = os.path.join(cache, f"fetched-{manifests.checksum({'address': address})[:16]}")
    try:
        os.makedirs(place, exist_ok=True)
        with files.lock(f"{place}.lock", wait=True):
            aside = os.path.join(place, f"{manifests.NAME}.remote")
            try:
                system.get_file(f"{path}/{manifests.NAME}", aside)
            except FileNotFoundError:
                raise CorpusDamaged(f"{address} has no {manifests.NAME}; it is no prepared directory") from None
            manifest = manifests.checked(manifests.read_json(aside), place)
            here = os.path.join(place, manifests.NAME)  # there once all was whole
            if os.path.exists(here) and manifests.read_json(here) == manifest:
                os.unlink(aside)
                return place
            missing = [entry for entry in manifests.entries(manifest) if not _whole(place, entry)]
            if missing:
                size = sum(entry["size"] for entry in missing)
                log(f"fetching {len(missing)} files, {size / 1e6:,.1f} MB, of {address} to {place}, once")
            for entry in missing:
                target = manifests.path_of(place, entry)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with files.replacing(target) as partial:
                    system.get_file(f"{path}/{entry['file']}", partial)
                if not _whole(place, entry):
                    raise CorpusDamaged(f"{address}/{entry['file']} is not what its manifest says; publish it again")
            os.replace(aside, here)
    except (DataError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place}: {error.strerror or error}") from error
    except Exception as error:
        raise unreachable(address, error) from error
    return place


def published(address: str) -> manifests.Manifest | None:
    """The manifest of a prepared directory behind an address, None where there is none."""
    system, path = reached(address)
    try:
        with tempfile.TemporaryDirectory() as folder:
            system.get_file(f"{path}/{manifests.NAME}", os.path.join(folder, manifests.NAME))
            return manifests.read(folder)
    except FileNotFoundError:
        return None
    except DataError:
        raise
    except Exception as error:
        raise unreachable(address, error) from error


def publish(directory: str, address: str, log: Callable[[str], None] = print) -> None:
    """Copies a finished prepared directory to an address, the manifest last: no manifest, no corpus there."""
    system, path = reached(address)
    manifest = manifests.read(directory)
    names = [*(entry["file"] for entry in manifests.entries(manifest)), manifests.NAME]
    try:
        for name in names:
            source = files.below(directory, name)
            if name == manifests.NAME or not _has(system, f"{path}/{name}", os.stat(source).st_size):
                system.makedirs(os.path.dirname(f"{path}/{name}"), exist_ok=True)
                system.put_file(source, f"{path}/{name}")
    except Exception as error:
        raise unreachable(address, error) from error
    log(f"published {len(names)} files at {address}")


def staged(address: str, cache: str) -> str:
    """Where a corpus is prepared that is then published at an address; its own, so that it can be continued."""
    return os.path.join(cache, f"staged-{manifests.checksum({'address': address})[:16]}")


def discard(directory: str) -> None:
    """Removes a staged directory that was published."""
    shutil.rmtree(directory)


def _whole(place: str, entry: manifests.File) -> bool:
    path = manifests.path_of(place, entry)
    return os.path.exists(path) and os.stat(path).st_size == entry["size"] and files.content_hash(path) == entry["hash"]


def _has(system, path: str, size: int) -> bool:
    try:
        return system.info(path)["size"] == size
    except FileNotFoundError:
        return False
