"""Reads data sets of the Hugging Face hub: the parquet, JSONL or text files of one split at one commit.

The set's card (the YAML of its README.md) says which files a configuration and a split have; without it the names of
files do, by the rules of the `datasets` library. We do without that library: it would write each set a second time in
a format of its own, keeps nothing of a stream, and compares no hashes.
"""

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Required, TypedDict

from steppe.data import huggingface, stored
from steppe.data.errors import DataError, refused
from steppe.data.huggingface import File, Repository
from steppe.data.readers import plain
from steppe.data.sources import READY, Limit, Reading, Record, Source, hub_split, in_split

LARGE = 5 * 10**9  # bytes; a larger set needs a limit in the task
_KINDS = {"parquet": "parquet", "jsonl": "jsonl", "json": "jsonl", "ndjson": "jsonl", "txt": "lines"}  # of files
_SUFFIX = re.compile(rf"\.({'|'.join(_KINDS)})(?:\.(?:gz|zst|bz2|xz))?$")
_NUMBERED = re.compile(r"(?:^|.*/)data/([\w.]+)-\d{5}-of-\d{5}[^/]*$")
_WORDS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
_WORD = {split: re.compile(rf"(?:^|[/._ -])(?:{words})(?=[/._ 0-9-]|$)") for split, words in _WORDS.items()}
_IGNORED = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


class Selection(NamedTuple):
    """The files of a source. split: a split that in_split knows; limit: how much to read."""

    repository: Repository
    commit: str
    card: dict[str, Any]
    files: list[File]
    split: str
    limit: Limit


def check(source: Source, reading: Reading, log: Callable[[str], None]) -> None:
    """Downloads the first file. Raises DataError if it has no such text field."""
    selection = _selected(source)
    part = "only the files that it needs are downloaded" if selection.limit.given else "all is downloaded"
    licence = selection.card.get("license", "not given")
    found = f"{_amount(selection.files)} at commit {selection.commit}, licence {licence}"
    log(f"{source.address}@{source.split} is {found}; {part}")
    plain.check(_file(selection, selection.files[0], log), reading, log)


def records(source: Source, reading: Reading, shard: int = 0, shards: int = 1) -> Iterator[Record]:
    """The records of one shard of a split, in the order of file names and rows. Skips blank texts, as `lines` does.

    Shards divide whole files if there are at least `shards` files and no limit, else single records.
    """
    selection = _selected(source)
    by_file = len(selection.files) >= shards and not selection.limit.given
    documents, size = selection.limit.documents, selection.limit.bytes
    number, counted = 0, source._replace(split=selection.split)
    for file in selection.files[shard::shards] if by_file else selection.files:
        if number >= documents or size <= 0:
            return  # before the next file is downloaded
        for record in plain.records(_file(selection, file, lambda line: print(line, flush=True)), reading):
            if not record.text or record.text.isspace():
                continue
            if number >= documents or size <= 0:
                return
            mine = by_file or number % shards == shard
            number, size = number + 1, size - len(record.text)
            if mine and in_split(counted, reading, record.text):
                yield record


def fingerprint(source: Source, reading: Reading) -> str:
    """The repository, configuration and commit. Raises DataError if they or the split do not exist, or if the set is
    large and the source has no limit. Downloads nothing but the list of files."""
    selection, (repository, config) = _selected(source), _repository(source)
    if sum(file["size"] for file in selection.files) > LARGE and not selection.limit.given:
        name = f"{source.address}@{source.split}"
        examples = f"{name}[:1GB], {name}[:100000] documents, or {name}[:all]"
        raise refused("data.task", name, f"a limit, because it is {_amount(selection.files)}: {examples}")
    return f"{repository.name}/{config}@{selection.commit}"


def _amount(listed: list[File]) -> str:
    size = huggingface.sized(sum(file["size"] for file in listed))
    return f"{size} in {len(listed):,} file{'s' * (len(listed) > 1)}"


def _file(selection: Selection, file: File, log: Callable[[str], None]) -> Source:
    """A file as a source of its own."""
    path = huggingface.fetched(selection.repository, selection.commit, file, log)
    return Source("file", _kind(file["path"]), path, "all", 1.0)


def _kind(path: str) -> str:
    """The kind of source that reads a file; "" if none does."""
    suffix = None if os.path.basename(path) in _IGNORED else _SUFFIX.search(path)
    return _KINDS[suffix[1]] if suffix else ""


def _repository(source: Source) -> tuple[Repository, str]:
    """(repository, configuration) of a source."""
    place, _, revision = READY.get(source.where, source.where).partition(":")
    owner, name, *config = place.split("/", 2)
    return Repository("dataset", f"{owner}/{name}", revision or "main"), "".join(config)


def _selected(source: Source) -> Selection:
    repository, config = _repository(source)
    listing = huggingface.listed(repository)
    splits = _splits(source, repository, config, listing)
    own = next((split for split in ("validation", "test") if split in splits), "")
    wanted, limit = hub_split(source.split)
    if own or wanted not in ("train", "held_out", "all"):
        chosen, split = own if wanted == "held_out" else wanted, "all"
    else:
        chosen, split = "train", wanted  # the hash of a document divides the only split
    if chosen not in splits:
        raise refused("data.task", f"{source.address}@{source.split}", f"one of its splits: {', '.join(splits)}")
    return Selection(repository, listing["commit"], listing["card"], splits[chosen], split, limit)


def _splits(source: Source, repository: Repository, config: str, listing: huggingface.Listing) -> dict[str, list[File]]:
    """{split: its files} of a configuration. Raises DataError if there are none."""
    readable = {file["path"]: file for file in listing["files"] if _kind(file["path"])}
    if not readable:
        suffixes = sorted({os.path.splitext(file["path"])[1] for file in listing["files"]} - {""})
        remedy = f"the hub's own conversion may exist: {repository}:refs/convert/parquet"
        raise DataError(f"{repository} has no parquet, jsonl or txt files, only {', '.join(suffixes)}; {remedy}")
    known = stored.typed(listing["card"], Card, f"README.md of {repository}").get("configs") or []
    card = {each.get("config_name", "default"): each for each in known}
    config = config or next((n for n in card if card[n].get("default") or n == "default" or len(card) == 1), "")
    entry = card.get(config, Config(data_dir=config))
    folder = entry.get("data_dir", "")
    if patterns := entry.get("data_files"):
        splits = _by_card(readable, folder, patterns)
    else:
        splits = _by_name([path for path in readable if path.startswith(f"{folder}/" if folder else "")])
    if not any(splits.values()) or (card and not config):
        folders = dict.fromkeys(path.split("/")[0] for path in readable if "/" in path)
        names = ", ".join(f"{repository.name}/{name}" for name in [*(card or folders)][:20])
        raise refused("data.task", source.address, f"a set with one of its configurations: {names}")
    return {split: [readable[path] for path in paths] for split, paths in splits.items() if paths}


def _by_name(paths: list[str]) -> dict[str, list[str]]:
    """{split: paths} by the names of files: data/SPLIT-00000-of-00004, else a word in a folder, else one in a file."""
    splits: dict[str, list[str]] = {}
    for path in paths:
        if numbered := _NUMBERED.match(path):
            splits.setdefault(numbered[1], []).append(path)
    for part in (os.path.dirname, os.path.basename):
        if not splits:
            splits = {split: [path for path in paths if word.search(part(path))] for split, word in _WORD.items()}
            splits = {split: named for split, named in splits.items() if named}
    return splits or {"train": paths}


class Part(TypedDict, total=False):
    """The files of a split in a card."""

    split: str
    path: Required[str | list[str]]


Patterns = str | list[str | Part] | dict[str, str | list[str]]


class Config(TypedDict, total=False):
    """A configuration in a card."""

    config_name: str
    data_files: Patterns
    data_dir: str
    default: bool


class Card(TypedDict, total=False):
    """What we read of a card."""

    configs: list[Config] | None


def _by_card(paths: Iterable[str], folder: str, listed: Patterns) -> dict[str, list[str]]:
    """{split: paths} by the patterns of a configuration: one, several, or some for each split."""
    from fsspec.utils import glob_translate

    if isinstance(listed, dict):
        listed = [Part(split=split, path=path) for split, path in listed.items()]
    splits: dict[str, list[str]] = {}
    for each in [listed] if isinstance(listed, str) else listed:
        part = Part(path=each) if isinstance(each, str) else each
        for given in [part["path"]] if isinstance(part["path"], str) else part["path"]:
            pattern = posixpath.normpath(posixpath.join(folder, given))
            inside = "" if re.search(r"[*?[]", pattern) else f"|{re.escape(pattern)}/.*"
            match = re.compile(glob_translate(pattern) + inside).fullmatch
            named = splits.setdefault(part.get("split", "train"), [])
            named += [path for path in paths if match(path) and path not in named]
    return {split: sorted(named) for split, named in splits.items()}
