"""Records in a workdir the text and hash of optimizers from users' files; reading the record never runs them."""

from pathlib import Path
from typing import TypedDict

from ml_collections import ConfigDict

from steppe.data import files, stored
from steppe.data.errors import DataError
from steppe.lm.keep.exits import WorkdirError
from steppe.lm.keep.workdir import CODE
from steppe.optim import references


class Kept(TypedDict):
    """One recorded file: its reference in the config, sha256 and text."""

    reference: str
    sha256: str
    text: str


def digests(config: ConfigDict) -> dict[str, str]:
    """{reference: sha256 of its file} of a config's optimizers from users' files; runs those files."""
    return {source.reference: source.digest for source in _sources(config)}


def _sources(config: ConfigDict) -> list[references.Source]:
    return list(references.sources({"method": config.optim.method, "base": config.optim.base}).values())


def keep(directory: str, config: ConfigDict) -> None:
    """Records the texts of a config's optimizers from users' files in its workdir."""
    found = [Kept(reference=s.reference, sha256=s.digest, text=s.text) for s in _sources(config)]
    if found:
        files.write_json(Path(directory) / CODE, found)


def same(directory: str, config: ConfigDict) -> None:
    """Runs a config's optimizers from users' files. Raises WorkdirError if a file differs from the recorded one."""
    path = Path(directory) / CODE
    try:
        kept = {each["reference"]: each["sha256"] for each in stored.read(path, list[Kept])} if path.exists() else {}
    except DataError as error:
        raise WorkdirError(str(error)) from None
    for reference, digest in digests(config).items():
        if kept.get(reference) != digest:
            raise WorkdirError(
                f"{directory}: {reference} must be the file that the run was trained with, of sha256 "
                f"{kept.get(reference)}, but has {digest}; {path} holds its text"
            )
