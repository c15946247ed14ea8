"""The manifest of a prepared directory, which is written last and checked first.

A directory is finished exactly if it has manifest.json. The manifest has the hash of every shard and of itself, so a
damaged or foreign file raises an error when the directory is opened.
"""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, TypedDict, cast

import xxhash
from msgspec import Meta

from steppe.data import files, stored
from steppe.data.errors import CorpusDamaged, DataError

FORMAT = 1  # version of records, packing and manifest; other versions are refused
NAME = "manifest.json"
VOCABULARY = "vocabulary.model"  # copy of the SentencePiece model
VERIFY = ("auto", "full", "sizes")
FULL_UP_TO = 8 << 30  # verify=auto reads all contents up to this many bytes

# keys of config.data that a prepared directory records
DESCRIBED = ("task", "held_out", "held_out_fraction", "text_field", "seqio_module", "shards")


class File(TypedDict):
    """A file of a prepared directory; `file` is its relative path."""

    file: str
    size: stored.Count
    hash: str


class Shard(File):
    """A shard in a manifest; `content` is the hash of its rows."""

    rows: stored.Count
    content: str


class Component(TypedDict):
    """One source of training text, or one held-out set."""

    name: str
    weight: Annotated[float, Meta(gt=0)]
    rows: stored.Count
    tokens: stored.Count
    bytes: stored.Count
    documents: stored.Count
    shards: list[Shard]


class Vocabulary(TypedDict):
    """spec: config.data.vocabulary. file: the copy in the directory, None for bytes."""

    spec: str
    fingerprint: str
    size: stored.Positive
    file: File | None


class Manifest(TypedDict):
    """manifest.json."""

    format: int
    sequence_length: Annotated[int, Meta(ge=1, le=1 << 24)]
    packing: Literal["concat", "bestfit"]
    dtype: Literal["uint16", "uint32"]
    vocabulary: Vocabulary
    train: list[Component]
    held_out: list[Component]
    identity: dict[str, Any]
    fingerprint: str
    checksum: str


def checksum(value: Mapping[str, Any]) -> str:
    """Hash of a JSON value without its key "checksum"."""
    content = {key: item for key, item in value.items() if key != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def write_json(path: str, value: Mapping[str, Any]) -> None:
    """Writes `value` with its checksum."""
    files.write_json(path, {**value, "checksum": checksum(value)})


def read_json(path: str) -> dict:
    """Reads a file of `write_json`. Raises CorpusDamaged if it was altered, FileNotFoundError if it is missing."""
    try:
        value = stored.read(path, dict[str, Any])
    except DataError as error:
        raise CorpusDamaged(f"{error}; prepare the directory again") from None
    if value.get("checksum") != checksum(value):
        raise CorpusDamaged(f"{path} does not match its checksum, so it was altered; prepare the directory again")
    return value


def read(directory: str) -> Manifest:
    """The manifest of a finished directory. Raises CorpusDamaged; all its file names stay below the directory."""
    if os.path.isfile(directory):
        raise CorpusDamaged(f"config.data.directory = {directory!r} is a file")
    try:
        manifest = read_json(os.path.join(directory, NAME))
    except FileNotFoundError as error:
        if os.path.exists(os.path.join(directory, "preparation.json")):
            state = "holds an unfinished preparation; run steppe prepare_data on it again to finish it"
        elif os.path.isdir(directory):
            state = f"has no {NAME}; it is not a prepared directory"
        else:
            state = "does not exist"
        raise CorpusDamaged(f"config.data.directory = {directory!r} {state}") from error
    if manifest.get("format") != FORMAT:
        have = files.shown(manifest.get("format"))
        raise CorpusDamaged(
            f"config.data.directory = {directory!r} has format {have}; this version reads {FORMAT}: prepare again"
        )
    return checked(manifest, directory)


def checked(manifest: dict, directory: str) -> Manifest:
    """Checks the types of a manifest and that its files stay below the directory. Raises CorpusDamaged."""
    try:
        known = cast(Manifest, stored.typed(manifest, Manifest, os.path.join(directory, NAME)))
        for entry in entries(known):
            path_of(directory, entry)
    except DataError as error:
        raise CorpusDamaged(f"{error}; prepare the directory again") from None
    return known


def recipe(directory: str) -> dict:
    """The recipe of a finished directory, with the names of config.data."""
    return read(os.path.expanduser(directory))["identity"]


def shards(manifest: Manifest) -> Iterable[Shard]:
    """All shard entries of a manifest."""
    for part in ("train", "held_out"):
        for component in manifest[part]:
            yield from component["shards"]


def entries(manifest: Manifest) -> list[File]:
    """All files in a manifest: its shards and, if there is one, the copy of the vocabulary."""
    copied = manifest["vocabulary"]["file"]
    return [*shards(manifest), *([copied] if copied else [])]


def path_of(directory: str, entry: File) -> str:
    """The path of a file in a manifest. Raises DataError if it leaves the directory."""
    return str(files.below(directory, entry["file"]))


def verify(directory: str, manifest: Manifest, how: str = "auto") -> None:
    """Checks that every file exists and has its size and, with `full` or with `auto` up to 8 GiB, its hash.

    With `sizes`, ArrayRecord's chunk checksums still detect damaged records when they are read.
    """
    listed = entries(manifest)
    for entry in listed:
        path = path_of(directory, entry)
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise CorpusDamaged(
                f"{path} is missing ({error.strerror}); the directory is damaged, prepare it again"
            ) from error
        if size != entry["size"]:
            raise CorpusDamaged(
                f"{path} has {size} bytes, the manifest says {entry['size']}; prepare the directory again"
            )
    if how == "sizes" or (how == "auto" and sum(entry["size"] for entry in listed) > FULL_UP_TO):
        return

    def check(entry: File) -> None:
        path = path_of(directory, entry)
        try:
            digest = files.content_hash(path)
        except OSError as error:
            digest = f"unreadable: {error.strerror}"
        except DataError:
            digest = "not a regular file"
        if digest != entry["hash"]:
            raise CorpusDamaged(f"{path} was altered ({digest}); prepare again")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, listed))
