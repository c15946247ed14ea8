"""A new run's initial parameters, from a checkpoint or a Hugging Face directory, sharded over the mesh."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np
from ml_collections import ConfigDict

from steppe.configs import packages
from steppe.configs.keys import ConfigError
from steppe.data import files, stored
from steppe.data.errors import DataError
from steppe.data.vocabulary import load_tokenizer
from steppe.lm.hub import families
from steppe.lm.hub.families import LAST_NORM, Family
from steppe.lm.keep import checkpoint, mirror, saved
from steppe.lm.keep.exits import Unusable
from steppe.lm.keep.weights import LAST
from steppe.lm.keep.workdir import config_of
from steppe.lm.model import parameters
from steppe.lm.model.transformer import widening_of
from steppe.lm.parts.assembly import Parts

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
FLOATS = ("F64", "F32", "F16", "BF16")
PADDING = 1024  # more than the rows that only round up a table's size
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")  # computed, not trained


def initial_params(config: ConfigDict, parts: Parts, log: Callable[[str], None] = print) -> Any:
    """The parameters that config.init_from names, sharded like `parts`.

    Of a run: the weights that it is judged by, or those that config.init_weights names. Raises Unusable, WorkdirError
    or ConfigError, each one line, if they do not fit the config.
    """
    abstract_params, source = parts.abstract.params, mirror.here(config.init_from, checkpoints=True)
    if not is_hub(source):
        return _of_run(source, config.init_weights, abstract_params, log)
    if config.init_weights:
        accepted = '"" with a Hugging Face directory as init_from, which has one set of weights'
        raise ConfigError("init_weights", config.init_weights, accepted)
    found, family = read_config(source)
    _same(config, families.ours(family, found, source), config.init_from)
    _same_vocabulary(config, source, found)
    tensors = _Tensors(source)
    arrays = dict(_arrays(family, tensors, config, _shapes(abstract_params), parts.options.vocabulary))
    tensors.account(tied="lm_head.weight", to=next(iter(family.names)))
    log(f"parameters  of {config.init_from} ({family.architecture})")
    return _placed(arrays, abstract_params)


def _placed(arrays: dict[str, np.ndarray], abstract_params: Any) -> Any:
    def place(path, leaf):
        array = arrays.pop(parameters.name_of(path))
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    return jax.tree_util.tree_map_with_path(place, abstract_params)


def _of_run(source: str, weights: str, abstract_params: Any, log: Callable[[str], None]) -> Any:
    """The parameters of a run's checkpoint; for a directory that holds only checkpoints, the last ones."""
    if not (Path(source).expanduser() / "config.json").exists():
        if weights not in ("", LAST):
            raise ConfigError("init_weights", weights, f'"" or {LAST} unless init_from is the workdir of a run')
        name = LAST
    else:
        name, _ = saved.choose(source, config_of(source), weights or None)
    if name == LAST:
        return checkpoint.load_parts(source, {"params": abstract_params}, log)["params"]
    run, shapes = saved.unread(source, log=log, weights=name), _shapes(abstract_params)
    if run.shapes != shapes:
        differ = sorted(path for path in {*run.shapes, *shapes} if run.shapes.get(path) != shapes.get(path))
        raise Unusable(f"{source} does not fit this config: {', '.join(differ[:3])}")
    return _placed(run.read(list(shapes)), abstract_params)


def is_hub(path: str) -> bool:
    """Whether a path is a directory that transformers can load a model from."""
    folder = Path(path).expanduser()
    return (folder / "config.json").exists() and any((folder / name).exists() for name in (INDEX, SINGLE))


def read_config(directory: str) -> tuple[dict[str, Any], Family]:
    """(config.json of a Hugging Face directory, its family). Raises Unusable if no family of ours matches."""
    place = Path(directory).expanduser() / "config.json"
    try:
        found = stored.read(place, families.Theirs)
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Unusable(f"{place}: must be the config of a Hugging Face model ({reason})") from None
    if os.path.exists(place.with_name(ADAPTER)):
        raise Unusable(f"{place.with_name(ADAPTER)}: adapters are refused; merge them into the weights first")
    return found, families.of_theirs(found, str(place))


def _same(config: ConfigDict, wanted: dict[str, Any], place: str) -> None:
    model = config.model
    have = {
        **{f"model.{name}": value for name, value in model.items()},
        "model.kv_heads": model.kv_heads or model.heads,
        "model.head_width": model.head_width if model.head_width * model.heads != model.width else 0,
    }
    for key, value in wanted.items():
        if key not in ("model.size", "data.sequence_length") and have[key] != value:
            raise ConfigError(key, have[key], f"{value!r}, as in {place}; steppe config from-hf writes such a config")


_SAMPLE = "The quick brown fox jumps over 1,234 lazy dogs, and says:\n    return [x + 1 for x in range(10)]\n"


def _same_vocabulary(config: ConfigDict, source: str, found: dict[str, Any]) -> None:
    """Raises ConfigError if config.data.vocabulary is not the model's.

    Our exports name theirs. Of other models, tokenizer.json must have the same size and give the same ids for a sample;
    without that file, the table's rows limit the vocabulary's size.
    """
    ours, kept = load_tokenizer(config.data.vocabulary), found.get(families.VOCABULARY)
    adjacent = Path(source).expanduser() / "tokenizer.json"
    accepted, rows = f"the vocabulary of {config.init_from}", found.get("vocab_size") or 0
    if kept:
        same = ours.fingerprint in kept
    elif adjacent.exists():
        theirs = load_tokenizer(str(adjacent))
        accepted += f", its tokenizer.json of {theirs.vocab_size:,} tokens"
        same = ours.fingerprint == theirs.fingerprint or (
            ours.vocab_size == theirs.vocab_size and ours.encode(_SAMPLE) == theirs.encode(_SAMPLE)
        )
    else:
        accepted += f", whose table has {rows:,} rows"
        same = rows - PADDING < ours.vocab_size <= rows
    if not same:
        raise ConfigError("data.vocabulary", config.data.vocabulary, f"{accepted} (this one has {ours.vocab_size:,})")


class Index(TypedDict):
    """The part of model.safetensors.index.json that is read: which file holds which tensor."""

    weight_map: dict[str, str]


class _Tensors:
    """The tensors of a directory's safetensors files by name, read on demand."""

    def __init__(self, directory: str):
        self._folder, self._read = Path(directory).expanduser(), set()
        if lacking := packages.lacking("safetensors"):
            raise Unusable(f"{self._folder}: {lacking}")
        try:
            if os.path.exists(self._folder / INDEX):
                where = stored.read(self._folder / INDEX, Index)["weight_map"]
            else:
                where = dict.fromkeys(self._opened(SINGLE).keys(), SINGLE)
            self._open = {name: self._opened(name) for name in sorted(set(where.values()))}
        except Exception as error:  # safetensors has its own error types
            raise Unusable(f"{self._folder}: its weights cannot be read ({' '.join(str(error).split())})") from None
        self._where = where

    def _opened(self, name: str):
        from safetensors import safe_open

        path = files.below(self._folder, name, links=True)
        files.ordinary(path).close()
        return safe_open(path, "numpy")

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._where:
            raise Unusable(f"{self._folder}: has no tensor {name}")
        file = self._open[self._where[name]]
        kind = file.get_slice(name).get_dtype()
        if kind not in FLOATS:
            raise Unusable(f"{self._folder}: tensor {name} is {kind}: must be one of {', '.join(FLOATS)}")
        array = file.get_tensor(name).astype(np.float32)
        if not np.isfinite(array).all():
            raise Unusable(f"{self._folder}: tensor {name} has values that are not finite")
        self._read.add(name)
        return array

    def account(self, tied: str, to: str) -> None:
        """Raises Unusable for unread tensors that no parameter explains; `tied` is accepted if it equals `to`."""
        if tied in self and tied not in self._read and not np.array_equal(self[tied], self[to]):
            raise Unusable(f"{self._folder}: tensor {tied} differs from {to}, to which the config ties it")
        rest = sorted(name for name in self._where if name not in self._read and not _BUFFERS.search(name))
        if rest:
            raise Unusable(f"{self._folder}: no parameter matches tensor {', '.join(rest[:3])} ({len(rest)} in all)")


def _shapes(abstract_params: Any) -> dict[str, tuple[int, ...]]:
    return {parameters.name_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params)}


def _arrays(
    family: Family, tensors: _Tensors, config: ConfigDict, shapes: dict, vocabulary: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(our path, float32 array) of every parameter. Rows that only pad the vocabulary, on either side, are dropped."""
    layers = config.model.layers
    for name, paths in family.names.items():
        if not all(path in shapes for path in paths):
            continue
        stacked = "{}" in name
        each = {path: shapes[path][1:] if stacked else shapes[path] for path in paths}
        made = {path: np.zeros(shapes[path], np.float32) for path in paths}
        edges = np.cumsum([families.sizes(path, shape)[1] for path, shape in each.items()])[:-1]
        for layer in range(layers if stacked else 1):
            array = tensors[name.format(layer)]
            parts = np.split(array, edges, axis=0 if family.linear else 1) if len(paths) > 1 else [array]
            for (path, shape), part in zip(each.items(), parts, strict=True):
                target = made[path][layer] if stacked else made[path]
                try:
                    if parameters.of(path).kind == "table":
                        target[: len(part)] = part[: len(target)]
                    else:
                        target[...] = families.to_ours(family, path, part, shape)
                except ValueError:
                    raise Unusable(f"{name.format(layer)}: has shape {array.shape}, which does not fit") from None
                if path.startswith("position") and len(part) < len(target):
                    accepted = f"at most {len(part)}, the positions of {config.init_from}"
                    raise ConfigError("data.sequence_length", len(target), accepted)
                if parameters.of(path).kind == "table" and len(part) < min(vocabulary, len(target)):
                    accepted = f"a vocabulary of at most {len(part):,} tokens, as {config.init_from} has"
                    raise ConfigError("data.vocabulary", config.data.vocabulary, accepted)
        if LAST_NORM in made:
            made[LAST_NORM] *= np.float32(widening_of(config.model))
        yield from made.items()
    for name in family.zeros:
        for layer in range(layers if "{}" in name else 1):
            if name.format(layer) in tensors and tensors[name.format(layer)].any():
                raise Unusable(f"{name.format(layer)}: must be zero, because Steppe's models have no biases")
