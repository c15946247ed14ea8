"""Which prepared corpus a run reads, as its workdir keeps it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from steppe.data import files, stored
from steppe.data.errors import DataError

if TYPE_CHECKING:
    from steppe.data.loader import Corpus

CORPUS = "corpus.json"


class KeptCorpus(TypedDict):
    """corpus.json: which prepared directory the run reads."""

    directory: str
    fingerprint: str


def keep(workdir: str, corpus: "Corpus") -> None:
    """Records which prepared directory a run reads."""
    place = os.path.abspath(corpus.directory)
    files.write_json(Path(workdir) / CORPUS, {"directory": place, "fingerprint": corpus.fingerprint})


def kept(workdir: str) -> "Corpus | None":
    """The prepared corpus that a run has read, if it is still there and the same; its raw text may be gone."""
    from steppe.data.loader import open_corpus  # here: commands that open no corpus do without its packages

    try:
        kept = stored.read(Path(workdir) / CORPUS, KeptCorpus)
        corpus = open_corpus(kept["directory"])
    except (OSError, DataError):  # never recorded, damaged, or removed
        return None
    return corpus if corpus.fingerprint == kept["fingerprint"] else None
