"""Loads a model from a run's checkpoint, for commands that use trained models."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from steppe.data import files, sources
from steppe.data.cache import open_of
from steppe.data.loader import Corpus
from steppe.data.manifest import path_of
from steppe.lm.keep import mirror, record, seal
from steppe.lm.keep.checkpoint import directory_of, find, load_arrays, load_parts, place
from steppe.lm.keep.exits import Unusable, WorkdirError
from steppe.lm.keep.weights import LAST, Weights, of_state, weights_of
from steppe.lm.keep.workdir import config_of
from steppe.lm.parts import corpus as corpora
from steppe.lm.parts.assembly import Parts, assemble
from steppe.lm.parts.check import check_stored
from steppe.lm.track.lines import AVERAGES
from steppe.optim import references
from steppe.optim.methods import OPTIONS

PARAMS = "params/"  # prefix of parameter names in a checkpoint


class Saved(NamedTuple):
    """A run's config, its corpus, the parts of its model on this machine's devices, and the parameters.

    optimizer: the base optimizer's state, if asked for. weights: the parameters' name in lm.keep.weights. step: of the
    checkpoint, if asked for. data: see own_data.
    """

    config: ConfigDict
    corpus: Corpus
    parts: Parts
    params: Any
    optimizer: Any
    weights: str
    step: int | None
    data: dict[str, Any]

    @property
    def are_last(self) -> bool:
        """Whether the parameters are those of the last step instead of an average."""
        return self.weights == LAST


class Unread(NamedTuple):
    """A checkpoint of a run in `directory`, whose parameters are read on demand.

    shapes: {path: shape} of every parameter. read(paths): {path: array} in this host's memory. weights: see Saved.
    """

    directory: str
    config: ConfigDict
    corpus: Corpus
    step: int
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[Collection[str]], dict[str, np.ndarray]]
    weights: str = LAST


# Kinds of sources that a stored config may not use
UNTRUSTED = {"seqio": "which runs its own code", "tfds": "which runs its own code", "hf": "which is downloaded"}


def own_data(config: ConfigDict, corpus: Corpus, trust: bool) -> dict[str, Any]:
    """A stored config's config.data, to read other text in the same way. Unless trusted, it names no modules, URLs or
    directories to write to, and a vocabulary of the hub is the corpus's copy."""
    data, copied = config.data.to_dict(), corpus.manifest["vocabulary"]["file"]
    if trust:
        return data
    if data["vocabulary"].startswith("hf:") and copied:
        data["vocabulary"] = path_of(corpus.directory, copied)
    return {**data, "cache": "", "seqio_module": "", "tfds_dir": "", "directory": ""}


def corpus_of(directory: str, config: ConfigDict, log: Callable[[str], None], trust: bool = False) -> Corpus:
    """A run's prepared corpus, else that of its config. WorkdirError if that is a URL or runs code, without trust."""
    kept = corpora.kept(directory)
    if kept is not None:
        return kept
    data = config.data
    if not trust:
        if files.is_remote(data.directory):
            raise _untrusted(directory, "data.directory", data.directory, "a URL")
        held_out = sources.held_out_sources("", data.held_out)
        for key, listed in (("task", sources.parse(data.task)), ("held_out", held_out)):
            for source in () if data.directory else listed:
                if what := UNTRUSTED.get(source.kind, "a URL" if files.is_remote(source.where) else ""):
                    raise _untrusted(directory, f"data.{key}", f"{source.kind}:{source.where}", what)
        if data.vocabulary.startswith("hf:"):
            raise _untrusted(directory, "data.vocabulary", data.vocabulary, "which is downloaded")
    return open_of(data.to_dict() if trust else {**data.to_dict(), "cache": "", "seqio_module": ""}, log)


def checkpoints_of(directory: str, config: ConfigDict, trust: bool = False, step: int | None = None) -> str:
    """The directory of a run's checkpoints, or of one step. Raises WorkdirError if it is a URL and not trusted."""
    found = directory_of(config, directory)
    if files.is_remote(found) and not trust:
        raise _untrusted(directory, "checkpoint.directory", found, "a URL")
    return found if step is None else f"{found}/{step}"


def _untrusted(directory: str, key: str, value: str, what: str) -> WorkdirError:
    remedy = "which a stored config may not use; pass --trust if the run is your own"
    return WorkdirError(f"{directory}: needs config.{key} = {files.shown(value)}, {what}, {remedy}")


def unread(
    directory: str,
    step: int | None = None,
    log: Callable[[str], None] = print,
    weights: str | None = None,
    trust: bool = False,
) -> Unread:
    """The run of `directory` at `step`, by default at its newest sound checkpoint; loads no parameters.

    weights, trust: see load and corpus_of. Raises WorkdirError, Unusable or DataError, each one line.
    """
    directory = mirror.here(directory, checkpoints=True)
    config = config_of(directory)
    corpus = corpus_of(directory, config, log, trust)
    start = find(checkpoints_of(directory, config, trust, step), log)
    known = {name: tuple(shape) for name, (_, shape) in seal.read(start)["tree"].items()}
    name, chosen = choose(directory, config, weights)
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
    """(name, Weights) of a run; by default those it is judged by. Raises WorkdirError for a name it does not have."""
    known = weights_of(config)
    name = next(iter(known)) if name is None else name
    if name not in known:
        kept = f"{', '.join(known)}; config.average.weights sets which averages a run stores"
        raise WorkdirError(f"{directory}: --weights={name}: must be one of the run's, which are {kept}")
    return name, known[name]


def measured_in(directory: str, weights: str | None) -> Path:
    """The directory for measurements of these weights: the run's own for the weights it is judged by."""
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
    """The run of `directory` at `step`, by default at its newest sound checkpoint, whatever mesh it was trained on.

    weights: a name, by default the weights that the run is judged by. The model is sharded over all devices here (fsdp)
    if they divide its batch and width; otherwise it goes to the first. Raises WorkdirError, Unusable or DataError.
    """
    directory = mirror.here(directory, checkpoints=True)
    config = config_of(directory)
    devices = jax.devices()[: None if spreads(config) else 1]
    config.mesh.update(data=1, fsdp=len(devices), tensor=1)
    config.train.microbatches = 1  # this mesh may not divide them, and nothing is trained here
    config.optim.update(method="adamw", **dict.fromkeys(OPTIONS))
    if references.is_reference(config.optim.base):
        if not optimizer:
            config.optim.base = "adamw"  # a stand-in: its state is not read
        elif not trust:
            raise _untrusted(directory, "optim.base", config.optim.base, "a user's code")
        else:
            record.same_code(directory, config)
    corpus = corpus_of(directory, config, log, trust)
    found = checkpoints_of(directory, config, trust, step)
    rows = max((part.rows for part in corpus.held_out.values()), default=1)
    config.train.batch_size = min(config.train.batch_size, -(-rows // len(devices)) * len(devices))  # enough rows
    check_stored(config)
    parts = assemble(
        config, corpus.tokenizer.vocab_size, corpus.epoch_tokens, devices=devices, tokens_per_row=corpus.tokens_per_row
    )
    name, chosen = choose(directory, config, weights)
    fields = {source.partition("/")[0] for source in chosen.sources} | ({"optimizer"} if optimizer else set())
    wanted = {field: getattr(parts.abstract, field) for field in fields}
    state = load_parts(found, wanted, log)
    params = of_state(chosen, state, parts.abstract.params)
    kept = state["optimizer"] if optimizer else None
    return Saved(config, corpus, parts, params, kept, weights=name, step=step, data=own_data(config, corpus, trust))


def spreads(config: ConfigDict) -> bool:
    """Whether `load` shards a run over all devices here, which must divide its batch and width."""
    devices = len(jax.devices())
    return config.train.batch_size % devices == 0 and config.model.width % devices == 0


def newest(directory: str, trust: bool = False, log: Callable[[str], None] = print) -> int:
    """The step of a run's newest sound checkpoint. Raises WorkdirError or Unusable if there is none."""
    directory = mirror.here(directory, checkpoints=True)
    return int(find(checkpoints_of(directory, config_of(directory), trust), log).name)


def steps(directory: str, trust: bool = False) -> list[int]:
    """The steps of a run's sealed checkpoints, in order. Raises WorkdirError if `directory` is not a run."""
    directory = mirror.here(directory, checkpoints=True)
    return seal.sealed(place(checkpoints_of(directory, config_of(directory), trust)))
