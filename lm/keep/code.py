"""The code from outside that a run is trained by: its text and hash, kept in the workdir, which reading never runs."""

from pathlib import Path
from typing import TypedDict

from ml_collections import ConfigDict

from steppe.data import files, stored
from steppe.data.errors import DataError
from steppe.lm.keep.exits import WorkdirError
from steppe.lm.keep.workdir import CODE
from steppe.optim import references


class Kept(TypedDict):
    """What a workdir has of one file: the reference of its config, sha256 and text."""

    reference: str
    sha256: str
    text: str


def digests(config: ConfigDict) -> dict[str, str]:
    """{reference: sha256 of its file} of a config's optimizers from outside, whose files are run."""
    return {source.reference: source.digest for source in _sources(config)}


def _sources(config: ConfigDict) -> list[references.Source]:
    return list(references.sources({"method": config.optim.method, "base": config.optim.base}).values())


def keep(directory: str, config: ConfigDict) -> None:
    """Keeps the texts of a config's optimizers from outside in its workdir."""
    found = [Kept(reference=s.reference, sha256=s.digest, text=s.text) for s in _sources(config)]
    if found:
        files.write_json(Path(directory) / CODE, found)


def same(directory: str, config: ConfigDict) -> None:
    """Runs a config's optimizers from outside. WorkdirError where their files are not those of the workdir's run."""
    path = Path(directory) / CODE
    try:
        kept = {each["reference"]: each["sha256"] for each in stored.read(path, list[Kept])} if path.exists() else {}
    except DataError as error:
        raise WorkdirError(str(error)) from None
    for reference, digest in digests(config).items():
        if kept.get(reference) != digest:
            raise WorkdirError(
                f"{directory}: {reference} must be the file that it was trained by, with sha256 {kept.get(reference)}, "
                f"and it has {digest}; {path} keeps its text"
            )
