"""Writes a checkpoint as a Hugging Face directory: weights, configs, tokenizer and a model card.

Parameters are read from the checkpoint one at a time and written whenever a file is full.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from steppe.data import files
from steppe.data.vocabulary import load_tokenizer
from steppe.lm.hub import card, differences, families, tokenizers
from steppe.lm.hub.families import Family
from steppe.lm.keep.saved import Unread
from steppe.lm.model.transformer import widening_of

MOST = 5 << 30  # bytes per file of weights
PARTIAL = ".partial"  # suffix of the directory while it is being written


@contextmanager
def building(out: str) -> Iterator[Path]:
    """A directory to write files into, which appears as `out` only when the `with` block has ended without an error."""
    aside = Path(f"{out}{PARTIAL}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in aside.iterdir():
            files.sync(path)
        if os.path.isdir(out):  # it is empty
            os.rmdir(out)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export(run: Unread, out: str, log: Callable[[str], None] = print) -> None:
    """Writes the model of `run` to directory `out`, which appears only when complete.

    Raises ConfigError, by key, if no family computes that model, and Unusable if the tokenizer differs from the run's.
    After an error nothing is left.
    """
    family = families.of_config(run.config)
    tokenizer = run.corpus.tokenizer
    with building(out) as aside:
        ids = tokenizers.write(aside, run.corpus, run.config.data.sequence_length)
        names = [tokenizer.fingerprint, load_tokenizer(str(aside)).fingerprint]
        more = {**ids, families.VOCABULARY: names}
        files.write_json(aside / "config.json", families.theirs(family, run.config, tokenizer.vocab_size, more))
        files.write_json(aside / "generation_config.json", {**ids, "do_sample": True, "temperature": 1.0})
        log(f"tokenizer   {tokenizer.vocab_size:,} tokens; {differences.said(aside, run.corpus)}")
        _write_weights(aside, run, family, log)
        files.write(aside / "README.md", card.card(run))


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a .safetensors file that everyone may read."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(arrays, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(errno.EIO, " ".join(str(error).split()), str(path)) from error
    path.chmod(0o644)


def _write_weights(folder: Path, run: Unread, family: Family, log: Callable[[str], None]) -> None:
    numbers: dict[str, int] = {}  # {their tensor: the number of its file}
    count = total = 0
    for count, (held, size) in enumerate(_parts(tensors(run, family)), 1):
        save(folder / f"part-{count}.safetensors", held)
        numbers |= dict.fromkeys(held, count)
        total += size
        held.clear()  # frees the memory before more is read
    final = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        final = ["model.safetensors"]
    else:
        where = {name: final[number - 1] for name, number in sorted(numbers.items())}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        files.write_json(folder / "model.safetensors.index.json", index)
    for number, name in enumerate(final, 1):
        (folder / f"part-{number}.safetensors").rename(folder / name)
    log(f"wrote {len(numbers)} tensors, {total / 1e6:,.1f} MB, in {count} {'file' if count == 1 else 'files'}")


def _parts(arrays: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """(arrays by name, their bytes) of each file."""
    held, size = {}, 0
    for name, array in arrays:
        if held and size + array.nbytes > MOST:
            yield held, size
            held, size = {}, 0
        held[name] = np.ascontiguousarray(array)
        size += array.nbytes
    yield held, size


def tensors(run: Unread, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """(their name, array) of every tensor of the model, read from the checkpoint on demand."""
    vocabulary, layers = run.corpus.tokenizer.vocab_size, run.config.model.layers
    widening = widening_of(run.config.model)
    for name, paths in family.names.items():
        if not all(path in run.shapes for path in paths):  # a tied model has no readout
            continue
        arrays = run.read(paths)
        stacked = "{}" in name
        for layer in range(layers if stacked else 1):
            parts = [
                families.to_theirs(family, path, arrays[path][layer] if stacked else arrays[path]) for path in paths
            ]
            array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0 if family.linear else 1)
            if paths[0] in ("embed/embedding", "readout/kernel"):
                array = array[:vocabulary]
            if paths[0] == families.LAST_NORM and widening != 1:  # mup divides the readout's input by it
                array = array / np.float32(widening)
            yield name.format(layer), array
            if (bias := families.bias_of(name)) in family.zeros:
                yield bias.format(layer), np.zeros(array.shape[-1], np.float32)
