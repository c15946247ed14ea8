"""Vocabularies of models on the Hugging Face hub, by its own client from a server on localhost."""

import json
import os
import subprocess
import sys

import pytest

from helpers import hub_server
from steppe.configs.base import get_config
from steppe.data.errors import from_json
from steppe.data.loader import open_corpus
from steppe.data.prepare import REFUSED, recipe_of
from steppe.data.readers.built_in import topic_documents
from steppe.data.vocabulary import train_sentencepiece

tokenizers = pytest.importorskip("tokenizers", reason="steppe[corpus] is not installed")
TEXTS = [text.decode() for _, text in topic_documents()]
CODE = """
import json, sys
from steppe.data.errors import DataError, to_json
from steppe.data.vocabulary import load_tokenizer
try:
    made = load_tokenizer(sys.argv[1])
    print(json.dumps([made.fingerprint, made.vocab_size, made.begin_id, made.eos_id, made.encode("the list of names")]))
except DataError as error:
    print(error)
"""


@pytest.fixture
def hub():
    with hub_server.serving() as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The files of two models: a tokenizer.json with its companion, and a SentencePiece model."""
    folder = tmp_path_factory.mktemp("model")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<first>", "<last>"]
    made.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    said = {"bos_token": "<first>", "eos_token": "<last>"}
    train_sentencepiece([text.encode() for text in TEXTS], str(folder / "pieces.model"), 400)
    pieces = (folder / "pieces.model").read_bytes()
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": json.dumps(said).encode(),
        "README.md": b"no card",
    }, {"spiece.model": pieces, "config.json": b"{}", "model.safetensors": b"weights" * 1000}


def said(hub, home, spec):
    command = [sys.executable, "-P", "-c", CODE, spec]
    environment = {**os.environ, **hub_server.environment(hub, str(home))}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_a_published_vocabulary_is_that_of_its_files(hub, tmp_path, model):
    fast, pieces = model
    hub.put("models/owner/fast", fast)
    hub.put("models/owner/pieces", pieces)
    (tmp_path / "here").mkdir()
    for name, content in {**fast, **pieces}.items():
        (tmp_path / "here" / name).write_bytes(content)
    there = json.loads(said(hub, tmp_path, "hf:owner/fast"))
    assert there == json.loads(said(hub, tmp_path, f"{tmp_path}/here/tokenizer.json"))
    assert there[2:4] == [0, 1]
    assert json.loads(said(hub, tmp_path, "hf:owner/pieces")) == json.loads(
        said(hub, tmp_path, f"{tmp_path}/here/spiece.model")
    )
    assert json.loads(said(hub, tmp_path, "hf:owner/pieces/spiece.model"))[1] == 400
    assert "model.safetensors" not in hub.downloads()


def test_bad_names_of_a_vocabulary_are_one_line(hub, tmp_path, model):
    hub.put("models/owner/pieces", model[1])
    hub.put("models/owner/none", {"model.safetensors": b"weights"})
    for spec, message in {
        "hf:gpt2": "config.data.vocabulary = 'hf:gpt2': must be hf:OWNER/NAME[/FILE][:REVISION]",
        "hf:owner/pieces/x.model": "hf:owner/pieces/FILE with FILE one of config.json, spiece.model",
        "hf:owner/none": "a repository with tokenizer.json",
        "hf:owner/other": "/owner/other does not exist, or is private",
    }.items():
        line = said(hub, tmp_path, spec)
        assert message in line
        assert "\n" not in line


def test_a_corpus_keeps_its_copy(hub, tmp_path, model):
    hub.put("models/owner/fast", model[0])
    options = {"task": "topics", "vocabulary": "hf:owner/fast", "sequence_length": 64, "held_out_fraction": 0.1}
    recipe = json.dumps(recipe_of(get_config().data, **options)._asdict())
    command = [sys.executable, "-P", "-m", "steppe.data.prepare", recipe, str(tmp_path / "out")]
    environment = {**os.environ, **hub_server.environment(hub, str(tmp_path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == REFUSED:
        raise from_json(json.loads(done.stderr.strip().splitlines()[-1]))
    corpus = open_corpus(str(tmp_path / "out"))
    assert corpus.manifest["vocabulary"]["spec"] == "hf:owner/fast"
    assert corpus.tokenizer.vocab_size == 500
