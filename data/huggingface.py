"""Files of the Hugging Face hub at one commit, downloaded by the hub's own client into the hub's own cache.

The first use of a name asks the hub for the commit of its revision and for the list of its files. Steppe's cache
records both, so later runs read the same files, also without a network. Every file is compared with its hash.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypedDict

from steppe.configs import packages
from steppe.data import files, stored
from steppe.data.errors import DataError

Kind = Literal["dataset", "model"]
NAME = r"[\w.-]+/[\w.-]+"  # OWNER/NAME


class File(TypedDict):
    """A file of a repository. hash: SHA-256 of its bytes, or for a small file the SHA-1 that git gives it."""

    path: str
    size: stored.Count
    hash: str


class Listing(TypedDict):
    """A repository at a commit. card: the YAML of its README.md; files: sorted by path."""

    commit: str
    card: dict[str, Any]
    files: list[File]


class Repository(NamedTuple):
    """A repository of the hub. revision: a branch, tag or commit."""

    kind: Kind
    name: str
    revision: str

    def __str__(self) -> str:
        return f"hf:{self.name}{f':{self.revision}' * (self.revision != 'main')}"

    @property
    def record(self) -> str:
        """The file in Steppe's cache that keeps the listing."""
        flat = re.sub(r"[^\w.-]", "--", f"{self.kind}s/{self.name}") + "@" + re.sub(r"[^\w.-]", "--", self.revision)
        return os.path.join(files.user_cache(), "hub", f"{flat}.json")


def listed(repository: Repository) -> Listing:
    """The listing of a repository: the recorded one, else the hub's, which is recorded. Raises DataError."""
    try:
        return stored.read(repository.record, Listing)
    except FileNotFoundError:
        pass
    with _asking(repository) as client:
        api, where = client.HfApi(), {"repo_id": repository.name, "repo_type": repository.kind}
        commit = api.repo_info(**where, revision=repository.revision).sha
        found = [
            File(path=entry.path, size=entry.size, hash=entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in api.list_repo_tree(**where, revision=commit, recursive=True)
            if hasattr(entry, "blob_id")  # a folder has none
        ]
    listing = Listing(commit=commit, card={}, files=sorted(found, key=lambda file: file["path"]))
    for readme in (file for file in found if file["path"] == "README.md"):
        listing["card"] = _card(repository, fetched(repository, commit, readme))
    try:
        os.makedirs(os.path.dirname(repository.record), exist_ok=True)
        files.write_json(repository.record, listing)
    except OSError as error:
        raise DataError(f"cannot write {repository.record}: {error.strerror or error}") from error
    return listing


def _card(repository: Repository, path: str) -> dict[str, Any]:
    import huggingface_hub

    try:
        said = huggingface_hub.metadata_load(path) or {}
        return json.loads(json.dumps(said, default=str))  # YAML has dates
    except Exception as error:  # the YAML library has its own errors
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"README.md of {repository}: its YAML is damaged ({reason})") from None


def fetched(repository: Repository, commit: str, file: File, log: Callable[[str], None] | None = None) -> str:
    """The local path of a file, downloaded unless the hub's cache has it. Names a download through `log`.

    Raises DataError, also if the contents do not have the file's hash.
    """
    where = {"repo_id": repository.name, "repo_type": repository.kind, "revision": commit, "filename": file["path"]}
    with _asking(repository) as client:
        path = client.try_to_load_from_cache(**where)
        if not isinstance(path, str):
            if log:
                log(f"downloading {file['path']} of {repository}, {sized(file['size'])}")
            path = client.hf_hub_download(**where)
    if os.path.getsize(path) != file["size"] or _hash(path, file) != file["hash"]:
        blob = os.path.realpath(path)  # without its blob, the client downloads a file again
        raise DataError(
            f"{file['path']} of {repository} does not have its hash on the hub; remove {blob} and run again"
        )
    return path


def sized(size: int) -> str:
    """A number of bytes as text, such as 1.5 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def _hash(path: str, file: File) -> str:
    by_git = len(file["hash"]) == 40
    digest = hashlib.sha1(f"blob {file['size']}\0".encode()) if by_git else hashlib.sha256()
    with files.ordinary(path) as handle:
        return hashlib.file_digest(handle, lambda: digest).hexdigest()


@contextlib.contextmanager
def _asking(repository: Repository) -> Iterator[Any]:
    """Yields the hub's client. Its errors become a DataError of one line with a remedy."""
    if lacking := packages.lacking("huggingface_hub"):
        raise DataError(f"{repository}: {lacking}")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would mix with our own lines
    import huggingface_hub

    try:
        yield huggingface_hub
    except Exception as error:  # the client's own errors, those of its HTTP library, and a full disk
        raise DataError(f"{repository}: {_explained(repository, error, huggingface_hub)}") from error


def _explained(repository: Repository, error: Exception, client: Any) -> str:
    kinds, endpoint = client.errors, client.constants.ENDPOINT
    page = f"{endpoint}/{'datasets/' if repository.kind == 'dataset' else ''}{repository.name}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, kinds.GatedRepoError):
        return f"is gated; accept its terms at {page} and set HF_TOKEN to a token of your account"
    if isinstance(error, kinds.RevisionNotFoundError):
        return f"the hub has no such revision; {page}/tree/main lists them"
    if isinstance(error, kinds.RepositoryNotFoundError) or status in (401, 403, 404):
        return f"{page} does not exist, or is private; check the name, or set HF_TOKEN to a token that may read it"
    if isinstance(error, kinds.OfflineModeIsEnabled):
        return "is not in the cache, and HF_HUB_OFFLINE forbids a download"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"cannot write {error.filename} ({error.strerror})"
    if isinstance(error, kinds.HfHubHTTPError) and status:
        return f"the hub at {endpoint} answers with status {status}; run again later"
    cause = (isinstance(error, kinds.LocalEntryNotFoundError) and error.__cause__) or error
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
    return f"{endpoint} cannot be read ({reason}); check the network and run again, complete files remain"
