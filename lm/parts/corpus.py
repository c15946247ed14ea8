"""Records in a workdir which prepared corpus its run reads."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from steppe.data import files, stored
from steppe.data.errors import DataError

if TYPE_CHECKING:
    from steppe.data.loader import Corpus

CORPUS = "corpus.json"


class KeptCorpus(TypedDict):
    """corpus.json: the prepared directory that the run reads."""

    directory: str
    fingerprint: str


def keep(workdir: str, corpus: "Corpus") -> None:
    """Records the prepared directory that a run reads."""
    place = os.path.abspath(corpus.directory)
    files.write_json(Path(workdir) / CORPUS, {"directory": place, "fingerprint": corpus.fingerprint})


def kept(workdir: str) -> "Corpus | None":
    """The run's recorded corpus, None if it is missing or has changed. Its raw text may be gone."""
    from steppe.data.loader import open_corpus  # imported here so that other commands do not need its packages

    try:
        kept = stored.read(Path(workdir) / CORPUS, KeptCorpus)
        corpus = open_corpus(kept["directory"])
    except (OSError, DataError):  # never recorded, damaged, or removed
        return None
    return corpus if corpus.fingerprint == kept["fingerprint"] else None
