"""Text that every Python contains: its standard library and the help topics of pydoc."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import xxhash

from steppe.data.sources import Reading, Record, Source, in_split


def check(source: Source, reading: Reading, log: Callable[[str], None]) -> None:
    """Does nothing: this source is always valid."""


def records(source: Source, reading: Reading, shard: int = 0, shards: int = 1) -> Iterator[Record]:
    """Every `shards`-th document of the split, starting with number `shard`. A hash of its name decides the split."""
    listed = [text for name, text in DOCUMENTS[source.kind]() if in_split(source, reading, name.encode())]
    yield from (Record(text) for text in listed[shard::shards])


def fingerprint(source: Source, reading: Reading) -> str:
    """Hash of names and contents."""
    digest = xxhash.xxh3_128()
    for name, text in DOCUMENTS[source.kind]():
        digest.update(f"{name}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()


def topic_documents() -> list[tuple[str, bytes]]:
    """(name, UTF-8 text) of the help topics of pydoc, sorted by name; names as in the embedded corpus."""
    from pydoc_data import topics

    listed = [(f"pydoc_data/topics/{name}", text.encode()) for name, text in topics.topics.items() if text.strip()]
    return sorted(listed)


def embedded_documents() -> list[tuple[str, bytes]]:
    """(name, UTF-8 text) of this Python's standard library without its tests, sorted by name. Needs no network.

    Each topic of pydoc_data is a document. Texts differ between Python versions; the manifest records their hash.
    """
    root = os.path.dirname(os.__file__)
    documents = []
    for folder, folders, names in os.walk(root):
        skipped = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3")
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("config-"))
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            # The installation on this machine writes these; they are not part of the library.
            local = name.startswith(("_sysconfigdata", "sitecustomize"))
            if name.endswith(".py") and not local and relative != "pydoc_data/topics.py":
                text = path.read_bytes()
                with suppress(UnicodeDecodeError):
                    if text.decode("utf-8").strip():
                        documents.append((relative, text))
    return sorted([*documents, *topic_documents()])


DOCUMENTS = {"embedded": embedded_documents, "topics": topic_documents}
