"""A model out of a run's checkpoint, for commands that look at what was trained."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from steppe.data.cache import open_of
from steppe.data.loader import Corpus
from steppe.lm.keep import mirror, seal
from steppe.lm.keep.checkpoint import directory_of, find, load_arrays, load_parts, place, shapes_of
from steppe.lm.keep.workdir import config_of, kept_corpus
from steppe.lm.run.assembly import Parts, assemble
from steppe.optim.methods import OPTIONS

PARAMS = "params/"  # of the names of parameters in a checkpoint


class Saved(NamedTuple):
    """The run's config, its corpus, the parts of its model on this machine's devices, and the parameters.

    optimizer: the state of the base optimizer, where it was asked for.
    """

    config: ConfigDict
    corpus: Corpus
    parts: Parts
    params: Any
    optimizer: Any = None


class Unread(NamedTuple):
    """A checkpoint of a run, whose parameters are read as they are asked for.

    directory: the run's. shapes: {path: shape} of every parameter. read(paths): {path: array, in this host's memory}.
    """

    directory: str
    config: ConfigDict
    corpus: Corpus
    step: int
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[Collection[str]], dict[str, np.ndarray]]


def unread(directory: str, step: int | None = None, log: Callable[[str], None] = print) -> Unread:
    """The run of `directory` after `step` steps, by default at its newest sound checkpoint, nothing of it in memory.

    WorkdirError, Unusable or DataError, each one line, where that cannot be.
    """
    directory = mirror.here(directory, checkpoints=True)
    config = config_of(directory)
    corpus = kept_corpus(directory) or open_of(config.data, log)
    found = directory_of(config, directory)
    start = find(found if step is None else f"{found}/{step}", log)
    shapes = {name: shape for name, shape in shapes_of(start).items() if name.startswith(PARAMS)}

    def read(paths: Collection[str]) -> dict[str, np.ndarray]:
        arrays = load_arrays(start, [PARAMS + path for path in paths])
        return {name.removeprefix(PARAMS): array for name, array in arrays.items()}

    names = {name.removeprefix(PARAMS): shape for name, shape in shapes.items()}
    return Unread(directory, config, corpus, int(start.name), names, read)


def load(directory: str, step: int | None = None, log: Callable[[str], None] = print, optimizer: bool = False) -> Saved:
    """The run of `directory` after `step` steps, by default at its newest sound checkpoint.

    Whatever mesh it was trained on, it is spread over all devices here (fsdp) if they divide its batch and width, else
    it goes to the first. WorkdirError, Unusable or DataError, each one line, where that cannot be.
    """
    directory = mirror.here(directory, checkpoints=True)
    config = config_of(directory)
    devices = jax.devices()
    if config.train.batch_size % len(devices) or config.model.width % len(devices):
        devices = devices[:1]
    config.mesh.update(data=1, fsdp=len(devices), tensor=1)
    config.train.microbatches = 1  # one device more or fewer may not divide them, and nothing is trained here:
    config.optim.update(method="adamw", **dict.fromkeys(OPTIONS))
    corpus = kept_corpus(directory) or open_of(config.data, log)
    parts = assemble(config, corpus.tokenizer.vocab_size, corpus.epoch_tokens, devices=devices)
    found = directory_of(config, directory)
    wanted = {"params": parts.abstract.params, **({"optimizer": parts.abstract.optimizer} if optimizer else {})}
    return Saved(config, corpus, parts, **load_parts(found if step is None else f"{found}/{step}", wanted, log))


def steps(directory: str) -> list[int]:
    """The steps that the run of `directory` has sealed checkpoints of, in order. WorkdirError if it is no run."""
    directory = mirror.here(directory, checkpoints=True)
    found = place(directory_of(config_of(directory), directory))
    names = [path.name for path in found.iterdir()] if found.exists() else []
    return sorted(int(name) for name in names if name.isdecimal() and (found / name / seal.NAME).exists())
