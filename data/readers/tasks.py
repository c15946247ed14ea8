"""Reads TFDS data sets, and seqio tasks and mixtures. Only the functions of this module import tensorflow."""

import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xxhash

from steppe.configs import packages
from steppe.data.errors import DataError, refused
from steppe.data.sources import Reading, Record, Source

BATCH = 256  # records per transfer from tensorflow to Python


def import_tensorflow():
    """Imports tensorflow and seqio silently, without accelerators, which training needs. Raises DataError."""
    if lacking := packages.lacking("seqio", "tensorflow", "tensorflow_datasets"):
        raise DataError(f"config.data.task: a task of seqio or TFDS {lacking}")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # tensorflow's libraries ignore that level while they load.
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        import seqio  # noqa: F401
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        tf.config.set_visible_devices([], "TPU")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)
    return tf


def check(source: Source, reading: Reading, log: Callable[[str], None]) -> None:
    """Raises DataError if the data set, its split or its text field does not exist."""
    if source.kind == "tfds":
        _builder(source, reading)
    else:
        _seqio_dataset(source, reading)


def records(source: Source, reading: Reading, shard: int = 0, shards: int = 1) -> Iterator[Record]:
    """The records of shard `shard` of `shards` of a split, in a fixed order. Raises DataError."""
    tf = import_tensorflow()
    if source.kind == "seqio":
        dataset, field = _seqio_dataset(source, reading)
        dataset = dataset.shard(shards, shard)
    else:
        builder, split = _builder(source, reading)
        field = reading.text_field
        if builder.info.file_format.value == "array_record":  # tf.data cannot read these
            rows = builder.as_data_source(split)
            for index in range(shard, len(rows), shards):
                text = rows[index][field]
                text = text.encode() if isinstance(text, str) else text
                yield Record(text, "", f"{source.where}, record {index + 1}")
            return
        dataset = _tfrecord_dataset(builder, split, reading, shard, shards)
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    dataset = dataset.map(lambda example: example[field]).batch(BATCH).with_options(options)
    number = 0
    try:
        for texts in dataset.as_numpy_iterator():
            for text in np.atleast_1d(texts):
                number += 1
                yield Record(text, "", f"{source.where}, record {number} of part {shard + 1}")
    except tf.errors.OpError as error:
        reason = " ".join(str(error.message).split())[:200]
        raise DataError(f"cannot read {source.kind}:{source.where} after record {number}: {reason}") from error


def fingerprint(source: Source, reading: Reading) -> str:
    """Hash of the name and its directory or module; data of one name and version do not change."""
    place = reading.tfds_dir if source.kind == "tfds" else reading.seqio_module
    return xxhash.xxh3_128_hexdigest(f"{source.where}\0{place}".encode())


def _tfrecord_dataset(builder, split: str, reading: Reading, shard: int, shards: int):
    import seqio

    provider = seqio.TfdsDataSource(
        builder.get_reference().tfds_name(include_version=True),
        tfds_data_dir=reading.tfds_dir or None,
        splits={"train": split},
        read_only=True,
    )
    if 1 < shards <= len(provider.list_shards("train")):
        return provider.get_dataset("train", shuffle=False, shard_info=seqio.ShardInfo(shard, shards))
    return provider.get_dataset("train", shuffle=False).shard(shards, shard)


def _seqio_dataset(source: Source, reading: Reading):
    """(tf dataset of one pass, its text field). Raises DataError."""
    tf = import_tensorflow()
    import seqio

    name, module = source.where, reading.seqio_module
    if module:
        try:
            importlib.import_module(module)
        except Exception as error:
            accepted = f"a module that can be imported; this one raises {_line(error)}"
            raise refused("data.seqio_module", module, accepted) from error
    try:
        known = seqio.get_mixture_or_task(name)
    except ValueError as error:
        remedy = "the name of a registered task or mixture; config.data.seqio_module names the module that registers it"
        raise refused("data.task", f"seqio:{name}", remedy) from error
    split = _split_of(f"seqio:{name}", source.split, sorted(known.splits))
    options: dict[str, Any] = {"copy_pretokenized": True} if isinstance(known, seqio.Mixture) else {}
    try:
        dataset = known.get_dataset(None, split=split, shuffle=False, seed=0, num_epochs=1, **options)
    except Exception as error:
        raise DataError(f"cannot read seqio:{name}@{split}: {_line(error)}") from error
    spec = dataset.element_spec
    wanted = (reading.text_field, f"{reading.text_field}_pretokenized", "targets_pretokenized", "targets", "text")
    texts = [name for name, kind in spec.items() if (getattr(kind, "dtype", 0), kind.shape.rank) == (tf.string, 0)]
    field = next((field for field in wanted if field in texts), None)
    if field is None:
        listed = ", ".join(texts) or f"none (its fields are {', '.join(spec)})"
        raise refused("data.text_field", reading.text_field, f"a text field of seqio:{name}: {listed}")
    return dataset, field


def _builder(source: Source, reading: Reading) -> tuple[Any, str]:
    """(builder, split) of a TFDS source that is prepared on this machine. Downloads nothing; raises DataError."""
    import_tensorflow()
    import tensorflow_datasets as tfds

    name, tfds_dir, text_field = source.where, reading.tfds_dir, reading.text_field
    try:
        builder: Any = tfds.builder(name, data_dir=tfds_dir or None, try_gcs=False)
    except Exception as error:  # a builder's code, or an unknown name, may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"config.data: tfds:{name} in config.data.tfds_dir = {tfds_dir!r}: {reason}") from error
    splits = list(builder.info.splits)
    if not splits:
        parent = os.path.dirname(os.path.dirname(str(builder.data_dir)))
        remedy = f"run `tfds build {name} --data_dir=DIR` and set config.data.tfds_dir=DIR"
        raise DataError(f"config.data.tfds_dir = {tfds_dir!r}: tfds:{name} is not prepared below {parent}; {remedy}")
    split = _split_of(f"tfds:{name}", source.split, splits)
    features = builder.info.features
    if text_field not in features or not isinstance(features[text_field], tfds.features.Text):
        raise refused("data.text_field", text_field, f"a text feature of tfds:{name}, which has {', '.join(features)}")
    return builder, split


def _split_of(name: str, split: str, splits: list[str]) -> str:
    """Checks a split, and maps held_out to validation or test. Raises DataError."""
    held_out = split == "held_out"
    if held_out:
        split = next((known for known in ("validation", "test") if known in splits), split)
    if split.split("[")[0] not in (*splits, *(["all"] if name.startswith("tfds:") else [])):
        remedy = "; name a set in config.data.held_out, such as val=tfds:NAME@SPLIT" if held_out else ""
        raise DataError(f"{name} has no split {split!r}, only {', '.join(splits)}{remedy}")
    return split


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
