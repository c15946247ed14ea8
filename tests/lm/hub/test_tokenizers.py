"""A run's vocabulary as tokenizer.json: the ids of the run, on text it has not seen."""

import base64
import json
from pathlib import Path

import pytest

from helpers import lm_runs
from steppe.data import cache
from steppe.data.loader import open_corpus
from steppe.data.readers.built_in import embedded_documents, topic_documents
from steppe.data.vocabulary import train_sentencepiece
from steppe.lm.hub import tokenizers as hub_tokenizers

tokenizers = pytest.importorskip("tokenizers", reason="steppe[hub] is not installed")
C4_MODEL = Path(__file__).parents[4] / "shared" / "t5_cc_all_32000_100extra.model"
UNSEEN = ["plain", "tab\tand\nnewline  two spaces ", "naïve Ünïcode 漢字 🎉", "a\x00b", " 99999 "]


def vocabulary(kind, folder):
    """The value of data.vocabulary."""
    texts = [text.decode() for _, text in [*embedded_documents()[:30], *topic_documents()[:60]]]
    if kind in ("bpe", "unigram"):
        train_sentencepiece(texts, str(folder / "v.model"), 700, kind)
        return str(folder / "v.model")
    if kind == "c4":
        if not C4_MODEL.exists():
            pytest.skip("the C4 vocabulary is not next to the repository")
        return str(C4_MODEL)
    if kind == "tiktoken":
        pytest.importorskip("tiktoken", reason="steppe[hub] is not installed")
        ranks = [bytes([byte]) for byte in range(256)]
        ranks += [b"th", b" a", b"in", b"the", b" the", b"er", b"on", b"re", b"\xe6\xbc", b"de", b"def", b" s", b"se"]
        lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks))
        (folder / "v.tiktoken").write_text("\n".join(lines))
        said = {"pat_str": r" ?\p{L}+|\s+|[^\s\p{L}]+", "special_tokens": {"<|endoftext|>": len(ranks)}}
        (folder / "v.tiktoken.json").write_text(json.dumps(said))
        return str(folder / "v.tiktoken")
    return kind


def scores_of(path):
    """The scores of a unigram model's pieces, None of another."""
    model = json.loads(path.read_text())["model"]
    return [score for _, score in model["vocab"]] if model["type"] == "Unigram" else None


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram", "c4", "tiktoken"])
def test_ids_are_those_of_the_run(tmp_path, kind):
    text, place = lm_runs.write_text(tmp_path)
    config = lm_runs.config(text, place, data__vocabulary=vocabulary(kind, tmp_path))
    corpus = open_corpus(cache.ensure(config.data, log=lambda line: None))
    (tmp_path / "hf").mkdir()
    hub_tokenizers.write(tmp_path / "hf", corpus, 16)
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    unseen = UNSEEN + [text.decode()[:4000] for _, text in [*embedded_documents()[40:70], *topic_documents()[70:]]]
    others, scores = 0, scores_of(tmp_path / "hf" / "tokenizer.json")
    for text in unseen:
        ids, found = corpus.tokenizer.encode(text), made.encode(text, add_special_tokens=False).ids
        if scores:  # two equally likely segmentations differ by how scores are added up
            assert sum(map(scores.__getitem__, found)) == pytest.approx(sum(map(scores.__getitem__, ids)), rel=1e-6)
            others += found != ids
        else:
            assert found == ids
        assert made.encode(text).ids == [corpus.tokenizer.begin_id, *found]
        if kind != "c4":  # which loses text as it encodes
            assert made.decode(ids) == text == corpus.tokenizer.decode(ids)
    assert others < len(unseen) / 5
    assert made.get_vocab_size() == corpus.tokenizer.vocab_size
    assert (tmp_path / "hf" / "tokenizer.model").exists() == (kind in ("bpe", "unigram", "c4"))


def test_bytes_are_those_of_byt5(tmp_path):
    transformers = pytest.importorskip("transformers", reason="steppe[hub] is not installed")
    text, place = lm_runs.write_text(tmp_path)
    corpus = open_corpus(cache.ensure(lm_runs.config(text, place).data, log=lambda line: None))
    hub_tokenizers.write(tmp_path, corpus, 16)
    made, theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), transformers.ByT5Tokenizer()
    for text in UNSEEN:
        assert made.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids
