"""The sources as seqio tasks and mixtures: reading, tokenising and counting source bytes in one tf.data pipeline.

Imports tensorflow inside its functions; only preparation and the training of a vocabulary call them.
"""

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from steppe.data import sources
from steppe.data.errors import DataError
from steppe.data.packing import Document
from steppe.data.sources import Source
from steppe.data.vocabulary import load_tokenizer, seqio_vocabulary

BATCH = 32  # documents that cross from tensorflow to Python at a time


class Example(NamedTuple):
    """One record after the pipeline: its text, the reason why it is bad ("" if it is not), and its tokens."""

    text: bytes
    fault: str
    document: Document


def import_tensorflow():
    """Imports tensorflow and seqio, quiet and without accelerators: they belong to the training process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # What tensorflow's libraries print while they load ignores that level.
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        import seqio  # noqa: F401
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        tf.config.set_visible_devices([], "TPU")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
    return tf


def check(source: Source, text_field: str, tfds_dir: str) -> None:
    """Raises DataError if `source` cannot be read at all: found before anything is written."""
    if source.kind == "tfds":
        import_tensorflow()
        tfds_builder(source, text_field, tfds_dir)
    else:
        next(sources.records(source._replace(split="all"), text_field, 0.0), None)


def task(source: Source, vocabulary: str, text_field: str, held_out_fraction: float, tfds_dir: str):
    """The seqio.Task of one source. Its examples: targets int32 [n] without the end-of-document id, lengths int32 [n],
    targets_pretokenized and fault strings. Not registered: a name may stand for different files in different runs.
    """
    import_tensorflow()
    import seqio

    if source.kind == "tfds":
        provider, preprocessors = _tfds_source(source, text_field, tfds_dir)
    else:

        def read(shard: int, shards: int):
            for record in sources.records(source, text_field, held_out_fraction, shard, shards):
                yield {"targets": record.text, "fault": record.fault}

        provider = _records_source(read, lambda: sources.files(source) if source.where else [source.kind])
        preprocessors = []
    words = seqio_vocabulary(vocabulary)
    return seqio.Task(
        _task_name(source.name),
        source=provider,
        preprocessors=[*preprocessors, functools.partial(_tokenize, spec=vocabulary)],
        output_features={"targets": seqio.Feature(vocabulary=words, add_eos=False)},
        shuffle_buffer_size=None,
    )


def mixture(components: tuple[Source, ...], vocabulary: str, text_field: str, held_out_fraction: float, tfds_dir: str):
    """The seqio.Mixture of a whole task, with its weights as rates of documents."""
    import seqio

    pairs = [
        (task(source, vocabulary, text_field, held_out_fraction, tfds_dir), source.weight) for source in components
    ]
    return seqio.Mixture("_".join(_task_name(source.name) for source in components), pairs)


def examples(
    source: Source,
    vocabulary: str,
    text_field: str,
    held_out_fraction: float,
    tfds_dir: str,
    shard: int = 0,
    shards: int = 1,
    threads: int = 1,
) -> Iterator[Example]:
    """Runs the task of `source` once over shard `shard` of `shards`, in a fixed order."""
    tf = import_tensorflow()
    import seqio

    built = task(source, vocabulary, text_field, held_out_fraction, tfds_dir)
    eos_id = built.output_features["targets"].vocabulary.eos_id
    dataset = built.get_dataset(
        None,
        split="train",
        shuffle=False,
        shard_info=seqio.ShardInfo(shard, shards) if shards > 1 else None,
        num_epochs=1,
        try_in_mem_cache=False,
    )
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    for batch in dataset.ragged_batch(BATCH).with_options(options):
        ids, sizes = batch["targets"].values.numpy(), batch["lengths"].values.numpy()
        splits = batch["targets"].row_splits.numpy()
        texts, faults = batch["targets_pretokenized"].numpy(), batch["fault"].numpy()
        for i in range(len(texts)):
            cut = slice(splits[i], splits[i + 1])
            document = Document(np.append(ids[cut], eos_id), np.append(sizes[cut], 0))
            # A lossy vocabulary may leave nothing of a text, such as one of zero-width characters.
            fault = faults[i].decode() or _fault(texts[i]) or ("" if len(ids[cut]) else "no token")
            yield Example(texts[i], fault, document)


def texts(components: tuple[Source, ...], text_field: str, held_out_fraction: float, tfds_dir: str) -> Iterator[str]:
    """The good documents of a whole task, its sources interleaved by weight until the first of them ends."""
    import_tensorflow()
    mixed = mixture(components, "bytes", text_field, held_out_fraction, tfds_dir)
    dataset = mixed.get_dataset(
        None,
        split="train",
        shuffle=False,
        num_epochs=1,
        copy_pretokenized=True,
        passthrough_features=["fault"],
        try_in_mem_cache=False,
    )
    for example in dataset.as_numpy_iterator():
        text = example["targets_pretokenized"]
        if not example["fault"] and not _fault(text):
            yield text.decode("utf-8")


def _fault(text: bytes) -> str:
    try:
        return "" if text.decode("utf-8").strip() else "empty"
    except UnicodeDecodeError:
        return "encoding"


def _task_name(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _tokenize(dataset, spec: str):
    """Adds ids and the source bytes behind each id, which add up to the bytes of the text in every vocabulary."""
    import tensorflow as tf

    measure = load_tokenizer(spec).measure

    def tokenize_text(text: bytes):
        try:
            return measure(text)
        except UnicodeDecodeError:  # a bad record, counted by whoever reads it
            return np.zeros(0, np.int32), np.zeros(0, np.int32)

    def tokenize(example):
        text = example["targets"]
        # The SentencePiece inside tensorflow-text is another version and splits some words differently: the library of
        # training and generation has to do it.
        ids, lengths = tf.numpy_function(tokenize_text, [text], (tf.int32, tf.int32), stateful=False)
        ids, lengths = tf.ensure_shape(ids, [None]), tf.ensure_shape(lengths, [None])
        return {"targets": ids, "lengths": lengths, "targets_pretokenized": text, "fault": example["fault"]}

    return dataset.map(tokenize)


def _records_source(read, list_files):
    """A seqio.DataSource of `read(shard, shards)`, which yields {targets, fault}: sharded also inside a file."""
    import seqio
    import tensorflow as tf

    class Records(seqio.DataSource):
        supports_arbitrary_sharding = True

        def list_shards(self, split):
            return list_files()

        def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **_):
            if shuffle:
                raise ValueError("rows are shuffled when they are read: use shuffle=False")
            part = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
            signature = {name: tf.TensorSpec((), tf.string) for name in ("targets", "fault")}
            return tf.data.Dataset.from_generator(lambda: read(*part), output_signature=signature)

    return Records(splits=("train",))


def _tfds_source(source: Source, text_field: str, tfds_dir: str):
    """(seqio source, preprocessors) of a TFDS data set, whether its files are TFRecord or ArrayRecord."""
    import seqio
    import tensorflow as tf

    builder, split = tfds_builder(source, text_field, tfds_dir)

    def rename(dataset):
        return dataset.map(lambda example: {"targets": example[text_field], "fault": tf.constant("")})

    if builder.info.file_format.value != "array_record":
        provider = seqio.TfdsDataSource(
            builder.get_reference().tfds_name(include_version=True),
            tfds_data_dir=tfds_dir or None,
            splits={"train": split},
            read_only=True,
        )
        return provider, [rename]

    # tf.data cannot read ArrayRecord: TFDS's own random access can.
    records = builder.as_data_source(split)

    def read(shard: int, shards: int):
        for index in range(shard, len(records), shards):
            yield {"targets": records[index][text_field], "fault": ""}

    return _records_source(read, lambda: [split]), []


def tfds_builder(source: Source, text_field: str, tfds_dir: str):
    """(builder, split) of a TFDS source, which must be prepared on this machine; nothing is downloaded."""
    import tensorflow_datasets as tfds

    name = source.where
    try:
        builder = tfds.builder(name, data_dir=tfds_dir or None, try_gcs=False)
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"config.data: tfds:{name} in config.data.tfds_dir={tfds_dir!r}: {reason}") from error
    splits = list(builder.info.splits)
    if not splits:
        place = os.path.dirname(os.path.dirname(str(builder.data_dir)))
        remedy = f"run `tfds build {name} --data_dir=DIR` and set config.data.tfds_dir=DIR"
        raise DataError(f"config.data.tfds_dir={tfds_dir!r}: tfds:{name} is not prepared below {place}; {remedy}")
    split = source.split
    if split == "held_out":
        split = next((known for known in ("validation", "test") if known in splits), split)
    if split.split("[")[0] not in (*splits, "all"):
        remedy = "name sets in config.data.held_out, as val=tfds:NAME@SPLIT" if source.split == "held_out" else ""
        raise DataError(f"tfds:{name} has no split {split!r}, only {', '.join(splits)}; {remedy}".rstrip("; "))
    features = builder.info.features
    if text_field not in features or not isinstance(features[text_field], tfds.features.Text):
        listed = ", ".join(features)
        raise DataError(f"config.data.text_field={text_field!r}: no text feature of tfds:{name}, which has {listed}")
    return builder, split
