"""Text and prepared corpora behind addresses: fsspec's memory://, which is a store like any other."""

import json
import sys
import uuid

import fsspec
import pytest

from steppe.configs.base import get_config
from steppe.data import cache, files, remote
from steppe.data import manifest as manifests
from steppe.data.errors import CorpusDamaged, DataError
from steppe.data.loader import open_corpus, training_rows
from steppe.data.prepare import prepare, recipe_of
from steppe.data.readers.built_in import embedded_documents
from steppe.lm.parts.check import described
from steppe.scripts import prepare_data

QUIET = {"log": lambda line: None}


@pytest.fixture
def store():
    """An address of its own in memory."""
    address = f"memory://{uuid.uuid4().hex}"
    yield address
    fsspec.filesystem("memory").rm(address.removeprefix("memory:/"), recursive=True)


def put(address, content):
    with fsspec.open(address, "wb") as handle:
        handle.write(content)


def lines(documents):
    return "".join(json.dumps({"text": text.decode()}) + "\n" for text in documents).encode()


def test_text_behind_an_address_is_the_text(tmp_path, store):
    documents = [text for _, text in embedded_documents()[:40]]
    for number in range(2):
        put(f"{store}/part{number}.jsonl", lines(documents[number::2]))
        (tmp_path / f"part{number}.jsonl").write_bytes(lines(documents[number::2]))
    options = {"sequence_length": 64, "held_out_fraction": 0.2, "shards": 2}
    there, here = (
        prepare(
            recipe_of(get_config().data, task=f"jsonl:{place}/part*.jsonl", **options), str(tmp_path / name), **QUIET
        )
        for name, place in (("there", store), ("here", tmp_path))
    )
    assert there["fingerprint"] == here["fingerprint"]


def test_parquet_behind_an_address_is_streamed(tmp_path, store):
    """Row groups and a nested column, as FineWeb's files have them; of the file only what is asked for is read."""
    import pyarrow
    import pyarrow.parquet

    texts = [text.decode() for _, text in embedded_documents()[:60]]
    table = pyarrow.table(
        {"data": [{"text": text, "id": i} for i, text in enumerate(texts)], "other": [b"x" * 100_000] * 60}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7, compression="none")
    put(f"{store}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    options = {"sequence_length": 64, "text_field": "data.text", "held_out_fraction": 0.2}
    made = [
        prepare(recipe_of(get_config().data, task=f"parquet:{place}", **options), str(tmp_path / name), **QUIET)
        for name, place in (("there", f"{store}/a.parquet"), ("here", tmp_path / "a.parquet"))
    ]
    assert made[0]["fingerprint"] == made[1]["fingerprint"]
    assert sum(made[0][part][0]["documents"] for part in ("train", "held_out")) == 60


def test_a_corpus_is_published_and_fetched_once(tmp_path, store, capsys):
    line = ["--config=base", "--config.data.task=topics", f"--config.data.cache={tmp_path / 'cache'}"]
    assert prepare_data.main([*line, f"--out={store}/corpus", "--workers=1"]) == 0
    assert f"--config.data.directory={store}/corpus" in capsys.readouterr().out
    assert not list((tmp_path / "cache").glob("staged-*"))
    assert prepare_data.main([*line, f"--out={store}/corpus"]) == 0
    assert "is already prepared" in capsys.readouterr().out
    assert prepare_data.main([*line, f"--out={store}/corpus", "--config.data.sequence_length=32"]) == 2
    assert "holds another preparation: sequence_length is 256 there, 32 now" in capsys.readouterr().err
    config = get_config()
    config.data.update(directory=f"{store}/corpus", cache=str(tmp_path / "other"))
    assert described(config)["task"] == "topics"
    said = []
    corpus = cache.open_of(config.data, said.append)
    assert said == []  # described has fetched it
    alone = prepare(recipe_of(get_config().data, task="topics"), str(tmp_path / "alone"), **QUIET)
    assert corpus.fingerprint == alone["fingerprint"]
    batch = training_rows(corpus, 0, 0, 4)
    assert (batch["inputs"] == training_rows(open_corpus(str(tmp_path / "alone")), 0, 0, 4)["inputs"]).all()


def test_a_cut_fetch_goes_on_and_damage_is_found(tmp_path, store):
    prepare(recipe_of(get_config().data, task="topics", shards=3), str(tmp_path / "made"), **QUIET)
    remote.publish(str(tmp_path / "made"), store, **QUIET)
    place = remote.fetch(store, str(tmp_path / "cache"), **QUIET)
    shards = sorted((tmp_path / "cache").rglob("*.array_record"))
    (tmp_path / "cache").joinpath(place, "manifest.json").unlink()  # as a kill leaves it, one shard short, one cut
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    said = []
    assert remote.fetch(store, str(tmp_path / "cache"), said.append) == place
    assert said[0].startswith("fetching 2 files")
    open_corpus(place, verify="full")
    put(f"{store}/train/topics/00001-of-00003.array_record", b"damaged")
    with pytest.raises(CorpusDamaged, match="does not match its manifest"):
        remote.fetch(store, str(tmp_path / "new"), **QUIET)
    with pytest.raises(CorpusDamaged, match="it is not a prepared directory"):
        remote.fetch(f"{store}/nothing", str(tmp_path / "new"), **QUIET)


@pytest.mark.parametrize("address", ["nosuch://x/a.jsonl", "gs://bucket/*.jsonl"])
def test_a_missing_driver_is_one_line(tmp_path, address, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    task = f"jsonl:{address}"
    with pytest.raises(DataError, match=r"^[^\n]*cannot be reached[^\n]*$"):
        prepare(recipe_of(get_config().data, task=task), str(tmp_path / "out"), **QUIET)
    config = get_config()
    config.data.directory = address
    with pytest.raises(DataError, match=r"^[^\n]*cannot be reached[^\n]*$"):
        cache.ensure(config.data)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["/elsewhere.bin", "../../elsewhere.bin", "train/../../../elsewhere.bin"])
@pytest.mark.parametrize("of", ["shard", "vocabulary"])
def test_a_manifest_from_elsewhere_names_no_file_outside_the_copy(tmp_path, of, name):
    """The checksums are the attacker's own, so only the name tells."""
    made, outside = tmp_path / "attack", tmp_path / "elsewhere.bin"
    prepare(recipe_of(get_config().data, task="topics", sequence_length=64), str(made), **QUIET)
    manifest = manifests.read(str(made))
    name = str(outside) if name.startswith("/") else name
    payload = made / "payload.bin"
    payload.write_bytes(b"attack")
    entry = {"file": name, "size": 6, "hash": files.content_hash(payload), "content": "", "rows": 0}
    if of == "shard":
        manifest["train"][0]["shards"].append(entry)
    else:
        manifest["vocabulary"]["file"] = entry
    (made / "manifest.json").chmod(0o644)
    manifests.write_json(str(made / "manifest.json"), manifest)
    outside.write_bytes(b"precious")
    with pytest.raises(CorpusDamaged, match=r"the name '.*' must be relative"):
        remote.fetch(f"file://{made}", str(tmp_path / "cache"), **QUIET)
    with pytest.raises(CorpusDamaged, match=r"the name '.*' must be relative"):
        open_corpus(str(made), verify="sizes")
    assert outside.read_bytes() == b"precious"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name == "elsewhere.bin"]
