"""Exported models against their runs, over families and vocabularies, called as users call them."""

import functools
import itertools

import pytest

pytest.importorskip("torch", reason="steppe[hub] is not installed")
pytest.importorskip("transformers", reason="steppe[hub] is not installed")
pytest.importorskip("lm_eval.models.huggingface", reason="steppe[hub] is not installed")
from parity import exported

PAIRS = list(itertools.product(exported.VOCABULARIES, exported.FAMILIES))
# Bytes and tiktoken's ranks by day: lm/hub/test_tokenizers.py
SAMPLED = {("SentencePiece BPE", "llama"), ("SentencePiece unigram", "qwen3"), ("tokenizer.json", "gpt2")}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return functools.cache(lambda name: exported.corpus_of(name, tmp_path_factory.mktemp("text")))


@pytest.mark.parametrize(
    ("vocabulary", "family"),
    [pytest.param(*pair, marks=[] if pair in SAMPLED else pytest.mark.exhaustive) for pair in PAIRS],
)
def test_an_export_is_the_run_called_as_users_call_it(corpora, tmp_path, vocabulary, family):
    found = exported.measure(family, *corpora(vocabulary), tmp_path / "hf")
    assert found.logits < 1e-5  # float32 sums in another order, as below
    assert found.greedy == 0
    assert found.texts > 5000
    assert found.ids == 0 or (vocabulary == "SentencePiece unigram" and found.ids < found.texts / 100)
    assert found.choices < 1e-4
    assert found.rolling < 1e-4
    assert found.merged or vocabulary == "bytes"
