"""TFDS sources, offline: data sets written to disk in both real formats, and TFDS's own C4 builder, mocked by TFDS."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from steppe.configs.base import get_config
from steppe.data import readers, sources
from steppe.data.errors import DataError
from steppe.data.loader import open_corpus, training_rows
from steppe.data.prepare import prepare, recipe_of
from steppe.data.readers import tasks
from steppe.data.readers.built_in import embedded_documents
from steppe.data.sources import Reading

pytest.importorskip("seqio", reason="steppe[seqio] is not installed")
ROOT = Path(__file__).parents[3]
TEXTS = [f"train {i}: " + text.decode()[:400] for i, (_, text) in enumerate(embedded_documents()[:90])]


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def tfds_dir(request, tmp_path_factory):
    """A TFDS data directory as `tfds build` leaves it; the builder's code is gone when it is read."""
    folder = str(tmp_path_factory.mktemp(request.param))
    tf = tasks.import_tensorflow()
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "number": tfds.features.Scalar(np.int64)})
    texts = {"train": TEXTS, "validation": [f"validation {text}" for text in TEXTS[:9]]}
    tfds.dataset_builders.store_as_tfds_dataset(
        name="stories",
        version="1.2.0",
        config="long",
        features=features,
        split_datasets={
            split: tf.data.Dataset.from_tensor_slices({"text": chosen, "number": list(range(len(chosen)))})
            for split, chosen in texts.items()
        },
        data_dir=folder,
        description="Written by a test.",
        file_format=request.param,
        disable_shuffling=True,
    )
    return folder


def recipe(task, **options):
    return recipe_of(get_config().data, task=task, **{"sequence_length": 64, **options})


def read(task, tfds_dir, **options):
    (source,) = sources.parse(task)
    return [record.text.decode() for record in tasks.records(source, Reading(tfds_dir=tfds_dir), **options)]


def test_a_builder_on_disk_is_read_completely(tfds_dir):
    assert sorted(read("tfds:stories/long:1.2.0", tfds_dir)) == sorted(TEXTS)
    assert sorted(read("tfds:stories/long", tfds_dir)) == sorted(TEXTS)
    assert read("tfds:stories/long@train[:10]", tfds_dir) == TEXTS[:10]
    assert sorted(read("tfds:stories/long@held_out", tfds_dir)) == sorted(f"validation {text}" for text in TEXTS[:9])
    parts = [read("tfds:stories/long", tfds_dir, shard=shard, shards=4) for shard in range(4)]
    assert sorted(text for part in parts for text in part) == sorted(TEXTS)
    assert all(parts)


def test_a_builder_on_disk_becomes_a_corpus(tfds_dir, tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(f"line {i}" for i in range(500)))
    chosen = recipe(f"0.5 tfds:stories/long + 0.5 lines:{tmp_path}/lines.txt", tfds_dir=tfds_dir, shards=2)
    manifest = prepare(chosen, str(tmp_path / "out"), log=lambda line: None)
    assert [entry["name"] for entry in manifest["held_out"]] == ["stories_long", "lines"]
    assert manifest["train"][0]["documents"] == len(TEXTS)
    assert manifest["held_out"][0]["documents"] == 9
    corpus = open_corpus(str(tmp_path / "out"), "bytes", 64)
    assert training_rows(corpus, 0, 0, 8)["weights"].sum() > 0


def test_what_tfds_cannot_give_is_one_line(tfds_dir, tmp_path):
    for task, options, message in (
        ("tfds:no_such_set", {}, r"tfds:no_such_set in config\.data\.tfds_dir = .*not found"),
        ("tfds:c4/en", {}, r"config\.data\.tfds_dir = .*tfds:c4/en is not prepared below .*tfds build c4/en"),
        ("tfds:c4/en:0.0.1", {}, r"tfds:c4/en:0\.0\.1 in .*cannot be loaded at version 0\.0\.1"),
        ("tfds:stories/long@test", {}, r"has no split 'test', only train, validation"),
        ("tfds:stories/long", {"text_field": "body"}, r"config\.data\.text_field = 'body'.*which has .*text"),
        ("tfds:stories/long", {"text_field": "number"}, r"config\.data\.text_field = 'number'"),
    ):
        with pytest.raises(DataError, match=message) as error:
            prepare(recipe(task, tfds_dir=tfds_dir, **options), str(tmp_path / "out"), log=lambda line: None)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()


MOCKED = """
import sys
from pathlib import Path
import tensorflow_datasets as tfds
from steppe.configs.base import get_config
from steppe.data.loader import open_corpus, training_rows
from steppe.data.prepare import prepare, recipe_of

out, metadata = sys.argv[1:]
# The mock takes splits from metadata files, as C4's own are not at hand: written through TFDS's own classes.
folder = Path(metadata) / "c4" / "en" / "3.1.0"
folder.mkdir(parents=True)
with tfds.testing.mock_data(num_examples=30):
    info = tfds.builder("c4/en:3.1.0").info
    name = tfds.core.ShardedFileTemplate(
        dataset_name="c4",
        data_dir=folder,
        filetype_suffix="tfrecord",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    sizes = {"train": [30], "validation": [30]}
    info.set_splits(tfds.core.SplitDict(
        tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=1000, filename_template=name)
        for split, lengths in sizes.items()
    ))
    info.write_to_directory(folder)
with tfds.testing.mock_data(num_examples=30, data_dir=metadata):
    recipe = recipe_of(get_config().data, task="tfds:c4/en", sequence_length=16, held_out=("embedded",))
    manifest = prepare(recipe, out)
    entry = manifest["train"][0]
    expected = [x["text"] for x in tfds.as_numpy(tfds.load("c4/en", split="train"))]
    assert entry["documents"] == len(expected) == 30
    assert entry["bytes"] == sum(map(len, expected))
    # The mock gives train and validation the same text: nothing may then be left to train on.
    try:
        prepare(recipe_of(get_config().data, task="tfds:c4/en", sequence_length=16), out + "2")
    except ValueError as error:
        assert "has no documents" in str(error), error
    else:
        raise AssertionError("validation text was trained on")
corpus = open_corpus(out, "bytes", 16)
print(corpus.tokenizer.decode(training_rows(corpus, 0, 0, 2)["targets"][0]))
"""


@pytest.mark.exhaustive  # another builder: the tests above
def test_tfds_s_own_c4_builder(tmp_path):
    command = [sys.executable, "-c", MOCKED, str(tmp_path / "out"), str(tmp_path / "metadata")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]


def test_mixture_texts_are_interleaved_by_weight(tmp_path):
    for name, count in (("a", 300), ("b", 300)):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name}{i}" for i in range(count)) + "\n\n")
    components = sources.parse(f"0.8 a=lines:{tmp_path}/a.txt@all + 0.2 b=lines:{tmp_path}/b.txt@all")
    found = list(readers.texts(components, Reading()))
    assert [text for text in found if text[0] == "a"] == [f"a{i}" for i in range(300)]
    share = sum(text[0] == "b" for text in found) / len(found)
    assert 0.12 < share < 0.28


SEQIO = """
import seqio
import tensorflow as tf

def texts(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices([f"{split} {i} " + "word " * i for i in range(40)])

source = seqio.FunctionDataSource(texts, splits=("train", "validation"))
features = {"targets": seqio.Feature(seqio.ByteVocabulary())}
steps = [lambda dataset: dataset.map(lambda text: {"targets": text})]
seqio.TaskRegistry.add("plain_texts", source=source, preprocessors=steps, output_features={})
more = [*steps, seqio.preprocessors.tokenize]
seqio.TaskRegistry.add("tokenised", source=source, preprocessors=more, output_features=features)
numbers = [lambda dataset: dataset.map(lambda text: {"targets": tf.strings.length(text)[None]})]
seqio.TaskRegistry.add("numbers", source=source, preprocessors=numbers, output_features=features)
seqio.MixtureRegistry.add("both", [("tokenised", 3.0), ("numbers", 1.0)])
seqio.MixtureRegistry.add("twice", [("tokenised", 3.0)])
"""


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """The folder of a module that registers tasks, in which Python finds it."""
    folder = tmp_path_factory.mktemp("seqio")
    (folder / "some_tasks.py").write_text(SEQIO)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.mark.parametrize("name", ["plain_texts", "tokenised", "twice"])
def test_a_seqio_task_is_read_as_text(registered, name):
    (source,) = sources.parse(f"seqio:{name}")
    reading = Reading(seqio_module="some_tasks")
    tasks.check(source, reading, print)
    found = [record.text.decode() for record in tasks.records(source, reading)]
    assert found == [f"train {i} " + "word " * i for i in range(40)]
    parts = [[record.text.decode() for record in tasks.records(source, reading, shard, 3)] for shard in range(3)]
    assert sorted(text for part in parts for text in part) == sorted(found)
    (held_out,) = sources.parse(f"seqio:{name}@held_out")
    assert next(tasks.records(held_out, reading)).text.startswith(b"validation 0")


def test_a_seqio_task_becomes_a_corpus(registered, tmp_path):
    chosen = recipe("seqio:tokenised", seqio_module="some_tasks", shards=2)
    manifest = prepare(chosen, str(tmp_path / "out"), log=lambda line: None)
    assert [entry["documents"] for part in ("train", "held_out") for entry in manifest[part]] == [40, 40]


@pytest.mark.parametrize(
    ("task", "module", "said"),
    [
        ("seqio:absent", "some_tasks", r"config\.data\.task = 'seqio:absent': must be the name of a registered task"),
        ("seqio:tokenised", "no_such_module", r"config\.data\.seqio_module = 'no_such_module': .*ModuleNotFoundError"),
        (
            "seqio:numbers",
            "some_tasks",
            r"config\.data\.text_field = 'text': .*a text field of seqio:[^ ]*: none \(its fields are targets\)",
        ),
        ("seqio:tokenised@test", "some_tasks", r"seqio:tokenised has no split 'test', only train, validation"),
    ],
)
def test_what_seqio_cannot_give_is_one_line(registered, tmp_path, task, module, said):
    with pytest.raises(DataError, match=said) as error:
        prepare(recipe(task, seqio_module=module), str(tmp_path / "out"), log=lambda line: None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
