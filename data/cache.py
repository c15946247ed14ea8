"""The prepared directory of a run: the one in its config, or one in the cache that is prepared on first use."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping

from steppe.data import errors, files, remote, sources
from steppe.data import manifest as manifests
from steppe.data.errors import DataError
from steppe.data.loader import Corpus, open_corpus
from steppe.data.prepare import REFUSED, identity, recipe_of, sources_of, without_samples
from steppe.data.prepare.shards import Recipe


def ensure(data_config: Mapping, log: Callable[[str], None] = print, before: Callable[[], None] = lambda: None) -> str:
    """The prepared directory of config.data: `directory` if set, else one in the cache, prepared on first use. Fetches
    a URL into the cache.

    before: called before a preparation, which may take hours, to raise whatever speaks against it. Concurrent processes
    prepare it once. Preparation runs in another process, so this one never imports tensorflow.
    """
    if data_config["directory"]:
        directory = os.path.expanduser(data_config["directory"])
        if files.is_remote(directory):
            return remote.fetch(directory, cache_of(data_config), log)
        manifests.read(directory)
        return directory
    recipe, cache = recipe_of(data_config), cache_of(data_config)
    listed = sources_of(recipe)
    name = "+".join(source.name for source in listed["train"] or listed["held_out"])[:60]
    now = identity(recipe)
    directory, older = (
        os.path.join(cache, f"{name}-{manifests.checksum(known)[:16]}") for known in (now, without_samples(now))
    )
    for known in (directory, older):  # older versions did not hash file contents
        if os.path.exists(os.path.join(known, manifests.NAME)):
            return known
    before()
    try:
        os.makedirs(cache, exist_ok=True)
        with files.lock(directory + ".lock", wait=True):
            if not os.path.exists(os.path.join(directory, manifests.NAME)):
                log(f"preparing {recipe.task or ', '.join(recipe.held_out)} in {directory}, once")
                _prepare_apart(recipe, directory, log)
    except OSError as error:
        raise DataError(f"config.data.cache = {cache!r}: {error.strerror or error}") from error
    return directory


def cache_of(data_config: Mapping) -> str:
    """The cache directory of corpora."""
    return os.path.expanduser(data_config["cache"] or files.user_cache())


def open_of(
    data_config: Mapping, log: Callable[[str], None] = print, before: Callable[[], None] = lambda: None
) -> Corpus:
    """Opens the corpus of config.data; see `ensure` and loader.open_corpus."""
    return open_corpus(
        ensure(data_config, log, before),
        vocabulary=data_config["vocabulary"],
        sequence_length=data_config["sequence_length"],
        packing=data_config["packing"],
        verify=data_config["verify"],
    )


def held_out_of(data_config: Mapping, task: str, log: Callable[[str], None] = print) -> Corpus:
    """A corpus in the cache without training text: the sources of `task` become held-out sets, by default whole.

    Tokenised and packed according to config.data.
    """
    named = tuple(f"{source.name}={source.address}@{source.split}" for source in sources.parse(task, "--task", "all"))
    return open_of({**data_config, "directory": "", "task": "", "held_out": named}, log)


def _prepare_apart(recipe: Recipe, directory: str, log: Callable[[str], None]) -> None:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "steppe.data.prepare", json.dumps(recipe._asdict()), directory]
    command.append(str(os.getpid()))
    with tempfile.TemporaryFile("w+") as complaints:
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=complaints, text=True
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log(line.rstrip())
            except BaseException:
                process.kill()
                raise
        complaints.seek(0)
        said = complaints.read().strip().splitlines()
    if process.returncode:
        last = said[-1] if said else f"status {process.returncode}"
        if process.returncode == REFUSED:
            raise errors.from_json(json.loads(last))
        raise DataError(f"preparing {directory} failed: {last}")
