"""Writes a checkpoint as a Hugging Face directory: weights, configs, tokenizer and a model card.

Parameters are read from the checkpoint one at a time and written whenever a file is full.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
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


def _write_weights(folder: Path, run: Unread, family: Family, log: Callable[[str], None]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    names: dict[str, str] = {}  # {their tensor: its file}
    held: dict[str, np.ndarray] = {}
    written = total = 0

    def flush() -> None:
        nonlocal written, held
        if held:
            written += 1
            file = f"part-{written}.safetensors"
            try:
                save_file(held, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(errno.EIO, " ".join(str(error).split()), str(folder / file)) from error
            (folder / file).chmod(0o644)
            names.update(dict.fromkeys(held, file))
            held = {}

    for name, array in tensors(run, family):
        if sum(each.nbytes for each in held.values()) + array.nbytes > MOST:
            flush()
        held[name] = np.ascontiguousarray(array)
        total += array.nbytes
    flush()
    final = {f"part-{n}.safetensors": f"model-{n:05d}-of-{written:05d}.safetensors" for n in range(1, written + 1)}
    if written == 1:
        final = {"part-1.safetensors": "model.safetensors"}
    else:
        where = {name: final[file] for name, file in sorted(names.items())}
        files.write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where}
        )
    for before, after in final.items():
        (folder / before).rename(folder / after)
    log(f"wrote {len(names)} tensors, {total / 1e6:,.1f} MB, in {written} {'file' if written == 1 else 'files'}")


def tensors(run: Unread, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """(their name, array) of every tensor of the model, read from the checkpoint on demand."""
    vocabulary, layers = run.corpus.tokenizer.vocab_size, run.config.model.layers
    widening = widening_of(run.config.model)
    biases: dict[str, list[str]] = {}
    for bias, path in family.zeros.items():
        biases.setdefault(path, []).append(bias)
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
            for bias in biases.get(paths[0], ()):
                yield bias.format(layer), np.zeros(array.shape[-1], np.float32)
