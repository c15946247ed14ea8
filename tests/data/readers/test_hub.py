"""Data sets of the Hugging Face hub, by its own client from a server on localhost that speaks its protocol."""

import gzip
import io
import json
import os
import subprocess
import sys

import pytest

from helpers import hub_server
from steppe.configs.base import get_config
from steppe.data import manifest as manifests
from steppe.data.errors import DataError, from_json
from steppe.data.prepare import REFUSED, prepare, recipe_of
from steppe.data.readers.built_in import embedded_documents

pytest.importorskip("huggingface_hub", reason="steppe[corpus] is not installed")
TEXTS = [text.decode()[:2000] for _, text in embedded_documents()[:90]]
OPTIONS = {"sequence_length": 64, "held_out_fraction": 0.1}


@pytest.fixture
def hub():
    with hub_server.serving() as made:
        yield made


def parquet(texts, kind="string"):
    """A Parquet file of several row groups; kind: of the column, or the nested column data.text."""
    import pyarrow
    import pyarrow.parquet

    column = pyarrow.array([{"text": text, "n": 1} for text in texts] if kind == "nested" else texts)
    if kind != "nested":
        column = column.cast(kind)
    table = pyarrow.table({"data" if kind == "nested" else "text": column, "id": pyarrow.array(range(len(texts)))})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=7)
    return buffer.getvalue()


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def prepared(hub, tmp_path, out="out", environment=(), **recipe):
    """The manifest of a preparation in a process of its own, and its lines. Raises its DataError."""
    known = recipe_of(get_config().data, **{**OPTIONS, **recipe})._asdict()
    command = [sys.executable, "-P", "-m", "steppe.data.prepare", json.dumps(known), str(tmp_path / out)]
    variables = {**os.environ, **hub_server.environment(hub, str(tmp_path)), **dict(environment)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    if done.returncode == REFUSED:
        raise from_json(json.loads(done.stderr.strip().splitlines()[-1]))
    assert done.returncode == 0, done.stderr
    return manifests.read(str(tmp_path / out)), done.stdout


def on_disk(tmp_path, texts, out="plain", **recipe):
    """The manifest of the same texts in a local file."""
    (tmp_path / "texts.jsonl").write_bytes(jsonl(texts))
    given = {**OPTIONS, "task": f"name=jsonl:{tmp_path}/texts.jsonl", **recipe}
    return prepare(recipe_of(get_config().data, **given), str(tmp_path / out), log=lambda line: None)


def shards(texts, count=2, split="train", kind="string"):
    """{path: Parquet file} of texts, as the `datasets` library writes a split."""
    size = -(-len(texts) // count)
    return {
        f"data/{split}-{n:05d}-of-{count:05d}.parquet": parquet(texts[size * n : size * (n + 1)], kind)
        for n in range(count)
    }


def content(manifest, part="train"):
    return [entry["documents_hash"] for entry in manifest[part]]


@pytest.mark.parametrize("kind", ["string", "large_string", "nested"])
def test_a_set_is_the_text_of_its_files_at_the_commit(hub, tmp_path, kind):
    commit = hub.put("datasets/owner/set", shards(TEXTS, kind=kind))
    field = "data.text" if kind == "nested" else "text"
    manifest, lines = prepared(hub, tmp_path, task="name=hf:owner/set", text_field=field)
    assert manifest["fingerprint"] == on_disk(tmp_path, TEXTS)["fingerprint"]
    assert manifest["identity"]["sources"] == {"hf:owner/set": f"owner/set/@{commit}"}
    assert commit in lines
    assert hub.downloads() == [f"data/train-0000{n}-of-00002.parquet" for n in range(2)]


CARD = """---
license: cc0-1.0
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: ["en/c4-validation.*.json.gz"]
- config_name: de
  data_files: de/*
- config_name: all
  data_dir: de
---
# A card
"""
EN, DE, VALIDATION = TEXTS[:40], TEXTS[40:70], TEXTS[70:]
LAID_OUT = {
    "README.md": CARD.encode(),
    "en/c4-train.00000-of-00002.json.gz": gzip.compress(jsonl(EN[:20])),
    "en/c4-train.00001-of-00002.json.gz": gzip.compress(jsonl(EN[20:])),
    "en/c4-validation.00000-of-00001.json.gz": gzip.compress(jsonl(VALIDATION)),
    "de/part.jsonl": jsonl(DE),
    "de/notes.csv": b"a,b",
}


@pytest.mark.parametrize("name", ["hf:owner/set", "hf:owner/set/en"])
def test_a_card_names_the_files_of_a_configuration_and_its_splits(hub, tmp_path, name):
    hub.put("datasets/owner/set", LAID_OUT)
    manifest, _ = prepared(hub, tmp_path, task=f"name={name}")
    one = {"task": f"name=jsonl:{tmp_path}/texts.jsonl@all", "held_out_fraction": 0.0}
    assert content(manifest) == content(on_disk(tmp_path, EN, "en", **one, held_out=("x=topics@all",)))
    assert content(manifest, "held_out") == content(
        on_disk(tmp_path, VALIDATION, "validation", task="", held_out=(f"jsonl:{tmp_path}/texts.jsonl@all",)),
        "held_out",
    )


@pytest.mark.parametrize("name", ["hf:owner/set/de", "hf:owner/set/all"])
def test_a_configuration_without_a_split_of_its_own_is_divided_by_the_hash(hub, tmp_path, name):
    hub.put("datasets/owner/set", LAID_OUT)
    divided = {"held_out_fraction": 0.3}  # of 30 texts, which differ between versions of Python
    manifest, _ = prepared(hub, tmp_path, task=f"name={name}", **divided)
    assert manifest["fingerprint"] == on_disk(tmp_path, DE, **divided)["fingerprint"]


@pytest.mark.parametrize(
    ("paths", "held_out"),
    [
        (("train/a.jsonl", "dev/b.jsonl"), True),
        (("a_train.jsonl", "a_test.jsonl"), True),
        (("default/train/0000.parquet", "default/validation/0000.parquet"), True),
        (("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001-0f.parquet"), True),
        (("data/train-00000-of-00004-2d5a.parquet", "data/validation-00000-of-00001-8b5c.parquet"), True),
        (("first.txt", "latest.txt"), False),
    ],
)
def test_names_of_files_say_the_split_where_no_card_does(hub, tmp_path, paths, held_out):
    write = {"parquet": parquet, "jsonl": jsonl, "txt": lambda texts: "\n".join(texts).encode()}
    texts = [text.replace("\n", " ") for text in TEXTS]
    parts = texts[:60], texts[60:]
    files = {path: write[path.rsplit(".")[-1]](part) for path, part in zip(paths, parts, strict=True)}
    # As in TinyStories: other versions of the text in the same repository.
    others = {"All-train.txt": b"other", "All-valid.txt": b"other"} if any("data/" in path for path in paths) else {}
    hub.put("datasets/o/s", files | others)
    manifest, _ = prepared(hub, tmp_path, task="hf:o/s")
    sizes = [manifest[part][0]["documents"] for part in ("train", "held_out")]
    assert sizes == [60, 30] if held_out else (sum(sizes) == 90 and sizes[1] < 20)


def test_a_limit_reads_the_same_beginning_in_any_number_of_shards_and_no_further_file(hub, tmp_path):
    hub.put("datasets/o/s", shards(TEXTS, 3))
    held_out = ("v=topics@all",)
    one, _ = prepared(hub, tmp_path, "one", task="n=hf:o/s@all[:30]", held_out=held_out)
    assert hub.downloads() == ["data/train-00000-of-00003.parquet"]
    assert content(one) == content(
        on_disk(tmp_path, TEXTS[:30], task=f"n=jsonl:{tmp_path}/texts.jsonl@all", held_out=held_out)
    )
    size = sum(len(text.encode()) for text in TEXTS[:30])
    two, _ = prepared(hub, tmp_path, "two", task=f"n=hf:o/s@all[:{size}B]", held_out=held_out)
    assert content(one) == content(two)
    four, _ = prepared(hub, tmp_path, "four", task="n=hf:o/s@all[:30]", held_out=held_out, shards=4)
    assert [four["train"][0][key] for key in ("documents", "bytes")] == [30, size]


def test_a_name_is_resolved_once_and_a_commit_can_be_named(hub, tmp_path):
    first = hub.put("datasets/o/s", shards(TEXTS[:50]))
    before, _ = prepared(hub, tmp_path, "before", task="n=hf:o/s")
    second = hub.put("datasets/o/s", shards(TEXTS))
    hub.asked.clear()
    again, _ = prepared(hub, tmp_path, "again", task="n=hf:o/s")
    assert again["fingerprint"] == before["fingerprint"]
    assert not hub.asked
    new, _ = prepared(hub, tmp_path, "new", task=f"n=hf:o/s:{second}")
    assert new["fingerprint"] != before["fingerprint"]
    (tmp_path / "elsewhere").mkdir()
    old, _ = prepared(hub, tmp_path / "elsewhere", "old", task=f"n=hf:o/s:{first}")
    assert old["fingerprint"] == before["fingerprint"]


def test_a_broken_download_is_one_line_and_the_next_try_fetches_only_the_rest(hub, tmp_path):
    hub.put("datasets/o/s", shards(TEXTS, 3))
    hub.cut["data/train-00001-of-00003.parquet"] = 1000
    with pytest.raises(DataError, match=r"^hf:o/s: http://\S+ cannot be read \([^\n]*complete files remain$"):
        prepared(hub, tmp_path, task="name=hf:o/s")
    hub.cut.clear()
    hub.asked.clear()
    manifest, _ = prepared(hub, tmp_path, task="name=hf:o/s")
    assert hub.downloads() == [f"data/train-0000{n}-of-00003.parquet" for n in (1, 2)]
    assert manifest["fingerprint"] == on_disk(tmp_path, TEXTS)["fingerprint"]


def test_a_file_that_does_not_have_its_hash_is_an_error_that_can_be_mended(hub, tmp_path):
    hub.put("datasets/o/s", shards(TEXTS))
    hub.wrong.add("data/train-00001-of-00002.parquet")
    with pytest.raises(DataError, match=r"data/train-00001-of-00002.parquet of hf:o/s does not have its hash") as error:
        prepared(hub, tmp_path, task="name=hf:o/s")
    hub.wrong.clear()
    os.unlink(str(error.value).split("remove ")[1].split(" and run")[0])
    manifest, _ = prepared(hub, tmp_path, task="name=hf:o/s")
    assert manifest["fingerprint"] == on_disk(tmp_path, TEXTS)["fingerprint"]


BAD = {
    "hf:o/none": r"hf:o/none: http://\S+/datasets/o/none does not exist, or is private; .* set HF_TOKEN",
    "hf:o/gated": r"hf:o/gated: is gated; accept its terms at http://\S+/datasets/o/gated and set HF_TOKEN",
    "hf:o/set:v9": "hf:o/set:v9: the hub has no such revision",
    "hf:o/set/fr": "config.data.task = 'hf:o/set/fr': must be .* one of its configurations: o/set/en, o/set/de",
    "hf:o/set@test": "config.data.task = 'hf:o/set@test': must be one of its splits: train, validation",
    "hf:o/csv": r"hf:o/csv has no parquet, jsonl or txt files, only \.csv",
    "hf:o/set/de": r"config.data.task = 'hf:o/set/de@train': must be a limit, because it is 6 TB in 1 file: ",
    "hf:o/card": r"README.md of hf:o/card: configs = 7: must be a list",
    "hf:o/yaml": r"README.md of hf:o/yaml: its YAML is damaged",
}


def test_bad_names_are_one_line(hub, tmp_path):
    hub.put("datasets/o/set", LAID_OUT)
    hub.put("datasets/o/csv", {"train.csv": b"a,b"})
    hub.put("datasets/o/card", {"README.md": b"---\nconfigs: 7\n---\n", "a.jsonl": jsonl(TEXTS)})
    hub.put("datasets/o/yaml", {"README.md": b"---\na: [\n---\n", "a.jsonl": jsonl(TEXTS)})
    hub.put("datasets/o/gated", {"train.jsonl": jsonl(TEXTS)})
    hub.gated.add("datasets/o/gated")
    hub.sizes["de/part.jsonl"] = 6 * 10**12
    for task, message in BAD.items():
        with pytest.raises(DataError, match=rf"^{message}[^\n]*$"):
            prepared(hub, tmp_path, task=task)
        assert not (tmp_path / "out").exists()
    assert hub.downloads() == []
    manifest, _ = prepared(hub, tmp_path, task="hf:o/gated", environment={"HF_TOKEN": hub.TOKEN})
    assert manifest["train"][0]["documents"] > 60


def test_without_a_network_it_is_one_line(hub, tmp_path):
    for environment, message in (
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be read"),
        ({"HF_HUB_OFFLINE": "1"}, "is not in the cache, and HF_HUB_OFFLINE forbids a download"),
    ):
        with pytest.raises(DataError, match=rf"^hf:o/s: {message}[^\n]*$"):
            prepared(hub, tmp_path, task="hf:o/s", environment=environment)


@pytest.mark.parametrize("package", ["huggingface_hub", "pyarrow"])
def test_an_absent_package_is_one_line_with_its_extra(hub, tmp_path, package):
    hub.put("datasets/o/s", shards(TEXTS))
    code = """import sys
sys.modules[sys.argv[1]] = None
from steppe.data.prepare.__main__ import main
sys.exit(main(sys.argv[2:]))"""
    recipe = json.dumps(recipe_of(get_config().data, **OPTIONS, task="hf:o/s")._asdict())
    command = [sys.executable, "-P", "-c", code, package, recipe, str(tmp_path / "out")]
    variables = {**os.environ, **hub_server.environment(hub, str(tmp_path))}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == REFUSED
    said = str(from_json(json.loads(done.stderr.strip().splitlines()[-1])))
    assert said.endswith(f"needs {package}: pip install 'steppe[corpus]'")
    assert not (tmp_path / "out").exists()


def test_mixtures_and_held_out_sets_name_sets_of_the_hub(hub, tmp_path):
    hub.put("datasets/owner/set", LAID_OUT)
    held_out = ("v=hf:owner/set@validation[:5]", "t=topics@held_out")
    manifest, _ = prepared(hub, tmp_path, task="0.7 hf:owner/set/en + 0.3 topics", held_out=held_out)
    assert manifest["held_out"][0]["documents"] == 5
    assert [(entry["name"], entry["weight"]) for entry in manifest["train"]] == [("owner_set_en", 0.7), ("topics", 0.3)]


def test_blank_rows_are_left_out_as_blank_lines_are(hub, tmp_path):
    hub.put("datasets/o/s", shards([text for pair in zip(TEXTS, [""] * 90, strict=True) for text in pair]))
    manifest, _ = prepared(hub, tmp_path, task="name=hf:o/s")
    assert manifest["fingerprint"] == on_disk(tmp_path, TEXTS)["fingerprint"]
