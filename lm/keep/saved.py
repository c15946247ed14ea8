"""A model out of a run's checkpoint, for commands that look at what was trained."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from steppe.data import files, sources
from steppe.data.cache import open_of
from steppe.data.loader import Corpus
from steppe.lm.keep import code, mirror, seal
from steppe.lm.keep.checkpoint import directory_of, find, load_arrays, load_parts, place, shapes_of
from steppe.lm.keep.exits import Unusable, WorkdirError
from steppe.lm.keep.weights import LAST, Weights, of_state, weights_of
from steppe.lm.keep.workdir import config_of
from steppe.lm.parts import corpus as corpora
from steppe.lm.parts.assembly import Parts, assemble
from steppe.lm.parts.check import check_stored
from steppe.lm.track.lines import AVERAGES
from steppe.optim import references
from steppe.optim.methods import OPTIONS

PARAMS = "params/"  # of the names of parameters in a checkpoint


class Saved(NamedTuple):
    """The run's config, its corpus, the parts of its model on this machine's devices, and the parameters.

    optimizer: the state of the base optimizer, where it was asked for. weights: whose the parameters are, a name that
    lm.keep.weights knows. step: of the checkpoint, where one was asked for.
    """

    config: ConfigDict
    corpus: Corpus
    parts: Parts
    params: Any
    optimizer: Any = None
    weights: str = LAST
    step: int | None = None

    @property
    def are_last(self) -> bool:
        """Whether the parameters are those of the last step, and no average."""
        return self.weights == LAST


class Unread(NamedTuple):
    """A checkpoint of a run, whose parameters are read as they are asked for.

    directory: the run's. shapes: {path: shape} of every parameter. read(paths): {path: array, in this host's memory}.
    weights: whose they are, a name that lm.keep.weights knows.
    """

    directory: str
    config: ConfigDict
    corpus: Corpus
    step: int
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[Collection[str]], dict[str, np.ndarray]]
    weights: str = LAST


CODE = ("seqio", "tfds")  # kinds of sources that are read by code which they name


def own_data(config: ConfigDict, trust: bool) -> dict[str, Any]:
    """config.data of a stored config, to read other text as it did. Unless it is trusted it names no module, no
    address and no place to write to."""
    data = config.data.to_dict()
    return data if trust else {**data, "cache": "", "seqio_module": "", "tfds_dir": "", "directory": ""}


def corpus_of(directory: str, config: ConfigDict, log: Callable[[str], None], trust: bool = False) -> Corpus:
    """The corpus of a run: what it has prepared, or else what its config names. WorkdirError where that is an address,
    or read by code, and it is not trusted."""
    kept = corpora.kept(directory)
    if kept is not None:
        return kept
    data = config.data
    if not trust:
        if files.is_remote(data.directory):
            raise _untrusted(directory, "data.directory", data.directory, "an address")
        for key, listed in (
            ("task", sources.parse(data.task)),
            ("held_out", sources.held_out_sources("", data.held_out)),
        ):
            for source in () if data.directory else listed:
                if source.kind in CODE or files.is_remote(source.where):
                    what = "read by code of its own" if source.kind in CODE else "an address"
                    raise _untrusted(directory, f"data.{key}", f"{source.kind}:{source.where}", what)
    return open_of(data.to_dict() if trust else {**data.to_dict(), "cache": "", "seqio_module": ""}, log)


def checkpoints_of(directory: str, config: ConfigDict, trust: bool = False) -> str:
    """Where the checkpoints of a run lie. WorkdirError where that is an address, and it is not trusted."""
    found = directory_of(config, directory)
    if files.is_remote(found) and not trust:
        raise _untrusted(directory, "checkpoint.directory", found, "an address")
    return found


def _untrusted(directory: str, key: str, value: str, what: str) -> WorkdirError:
    remedy = "which is not followed on the word of a stored config; --trust does so, where the run is your own"
    return WorkdirError(f"{directory}: needs config.{key} = {files.shown(value)}, {what}, {remedy}")


def unread(
    directory: str,
    step: int | None = None,
    log: Callable[[str], None] = print,
    weights: str | None = None,
    trust: bool = False,
) -> Unread:
    """The run of `directory` after `step` steps, by default at its newest sound checkpoint, nothing of it in memory.

    weights: by name, default those that the run is judged by. trust: see corpus_of. WorkdirError, Unusable or
    DataError, each one line, where that cannot be.
    """
    directory = mirror.here(directory, checkpoints=True)
    config = config_of(directory)
    corpus = corpus_of(directory, config, log, trust)
    found = checkpoints_of(directory, config, trust)
    start = find(found if step is None else f"{found}/{step}", log)
    known, (name, chosen) = shapes_of(start), choose(directory, config, weights)
    shapes = {name.removeprefix(PARAMS): shape for name, shape in known.items() if name.startswith(PARAMS)}

    stacked = {shape[:1] for name, shape in shapes.items() if name.startswith("layers/")}
    width = shapes.get("embed/embedding", ())[1:]
    for key, found in (("layers", stacked), ("width", {width})):
        if found != {(config.model[key],)}:
            raise Unusable(f"{start} does not fit config.model.{key} = {config.model[key]} of {directory}")

    def read(paths: Collection[str]) -> dict[str, np.ndarray]:
        sources = {path: chosen.names(path, known) for path in paths}
        arrays = load_arrays(start, [name for names in sources.values() for name in names])
        return {path: chosen.combine(*(arrays[name] for name in names)) for path, names in sources.items()}

    return Unread(directory, config, corpus, int(start.name), shapes, read, name)


def choose(directory: str, config: ConfigDict, name: str | None) -> tuple[str, Weights]:
    """(name, Weights) of a run: those it is judged by where none are named. WorkdirError for such as it has not."""
    known = weights_of(config)
    name = next(iter(known)) if name is None else name
    if name not in known:
        kept = f"{', '.join(known)}; config.average.weights says which averages a run keeps"
        raise WorkdirError(f"{directory}: --weights={name}: must be one of those it has, which are {kept}")
    return name, known[name]


def measured_in(directory: str, weights: str | None) -> Path:
    """Where measurements of these weights of a run stand: in its directory those of what it is judged by."""
    config = config_of(directory)
    name, _ = choose(directory, config, weights)
    own = name == next(iter(weights_of(config)))
    return Path(directory) if own else files.below(directory, f"{AVERAGES}/{name}")


def load(
    directory: str,
    step: int | None = None,
    log: Callable[[str], None] = print,
    optimizer: bool = False,
    weights: str | None = None,
    trust: bool = False,
) -> Saved:
    """The run of `directory` after `step` steps, by default at its newest sound checkpoint.

    weights: by name, default those that the run is judged by. Whatever mesh it was trained on, it is spread over all
    devices here (fsdp) if they divide its batch and width, else it goes to the first. WorkdirError, Unusable or
    DataError, each one line, where that cannot be.
    """
    directory = mirror.here(directory, checkpoints=True)
    config = config_of(directory)
    devices = jax.devices()
    devices = devices if spreads(config) else devices[:1]
    config.mesh.update(data=1, fsdp=len(devices), tensor=1)
    config.train.microbatches = 1  # one device more or fewer may not divide them, and nothing is trained here:
    config.optim.update(method="adamw", **dict.fromkeys(OPTIONS))
    if references.is_reference(config.optim.base):
        if not optimizer:
            config.optim.base = "adamw"  # whose state is not read
        elif not trust:
            raise _untrusted(directory, "optim.base", config.optim.base, "code of its own")
        else:
            code.same(directory, config)
    corpus = corpus_of(directory, config, log, trust)
    found = checkpoints_of(directory, config, trust)
    rows = max((part.rows for part in corpus.held_out.values()), default=1)
    config.train.batch_size = min(config.train.batch_size, -(-rows // len(devices)) * len(devices))  # no more is read
    check_stored(config)
    parts = assemble(
        config, corpus.tokenizer.vocab_size, corpus.epoch_tokens, devices=devices, tokens_per_row=corpus.tokens_per_row
    )
    name, chosen = choose(directory, config, weights)
    fields = chosen.sections | ({"optimizer"} if optimizer else set())
    wanted = {field: getattr(parts.abstract, field) for field in fields}
    state = load_parts(found if step is None else f"{found}/{step}", wanted, log)
    params = of_state(chosen, state, parts.abstract.params)
    return Saved(config, corpus, parts, params, state["optimizer"] if optimizer else None, name, step)


def spreads(config: ConfigDict) -> bool:
    """Whether the devices here divide a run's batch and width, so that `load` spreads it over them."""
    devices = len(jax.devices())
    return config.train.batch_size % devices == 0 and config.model.width % devices == 0


def steps(directory: str, trust: bool = False) -> list[int]:
    """The steps that the run of `directory` has sealed checkpoints of, in order. WorkdirError if it is no run."""
    directory = mirror.here(directory, checkpoints=True)
    found = place(checkpoints_of(directory, config_of(directory), trust))
    names = [path.name for path in found.iterdir()] if found.exists() else []
    return sorted(int(name) for name in names if name.isdecimal() and (found / name / seal.NAME).exists())
