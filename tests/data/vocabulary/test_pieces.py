"""The tokenizer without tensorflow gives seqio's ids; a trained vocabulary loses nothing."""

import random
from pathlib import Path

import numpy as np
import pytest

from steppe.data.errors import DataError
from steppe.data.readers.built_in import embedded_documents
from steppe.data.vocabulary import load_tokenizer, train_sentencepiece
from steppe.lm.run.generate import _continuation

C4_MODEL = Path(__file__).parents[4] / "shared" / "t5_cc_all_32000_100extra.model"
TEXTS = ["", "plain", "tab\tand\nnewline  two spaces ", "naïve Ünïcode 漢字 🎉", "\x00\x7f", "▁ lower one eighth block"]


def documents(count: int) -> list[str]:
    texts = [text.decode() for _, text in embedded_documents()]
    return (texts * (1 + count // len(texts)))[:count]


def test_bytes_agree_with_seqio():
    seqio = pytest.importorskip("seqio", reason="steppe[seqio] is not installed")
    ours, theirs = load_tokenizer("bytes"), seqio.ByteVocabulary()
    assert (ours.vocab_size, ours.begin_id, ours.eos_id) == (theirs.vocab_size, theirs.pad_id, theirs.eos_id)
    for text in [*TEXTS, *documents(50)]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text) == theirs.encode_tf(text).numpy().tolist()
        assert ours.decode(ids) == theirs.decode(ids) == text
        cut = ids[: len(ids) // 2]  # perhaps inside a character
        assert ours.decode(cut) == theirs.decode(cut)
        assert ours.decode([*ids, 1, 0, 0]) == text


@pytest.mark.skipif(not C4_MODEL.exists(), reason="the C4 vocabulary is not next to the repository")
def test_sentencepiece_agrees_with_the_library_and_seqio_on_1000_documents():
    import sentencepiece

    seqio = pytest.importorskip("seqio", reason="steppe[seqio] is not installed")
    library = sentencepiece.SentencePieceProcessor(model_file=str(C4_MODEL))
    ours, theirs = load_tokenizer(str(C4_MODEL)), seqio.SentencePieceVocabulary(str(C4_MODEL), extra_ids=0)
    assert ours.vocab_size == theirs.vocab_size == library.get_piece_size()
    assert (ours.begin_id, ours.eos_id) == (theirs.pad_id, theirs.eos_id) == (0, 1)
    # Documents of one module each, then distinct slices of them, which begin and end anywhere.
    chosen = documents(400)
    generator = random.Random(0)
    while len(chosen) < 1000:
        text = generator.choice(chosen[:400])
        start = generator.randrange(len(text))
        chosen.append(text[start : start + 3000])
    for i, text in enumerate([*TEXTS, *chosen]):
        ids = ours.encode(text[:20_000])
        assert ids == library.encode(text[:20_000])
        assert ours.decode(ids) == library.decode(ids)
        if i % 10 == 0:
            assert ids == theirs.encode(text[:20_000])
            assert ours.decode(ids) == theirs.decode(ids)


def aligned(tokenizer, processor, text):
    """(ids, bytes behind each) by the library's own alignment; bytes dropped at the end belong to the last token."""
    from sentencepiece import sentencepiece_pb2

    found = sentencepiece_pb2.SentencePieceText.FromString(processor.encode(text, return_type="serialized_proto"))
    ends = [piece.end for piece in found.pieces][:-1] + [len(text)] * bool(found.pieces)
    return [piece.id for piece in found.pieces], np.diff(ends, prepend=0).tolist()


@pytest.mark.parametrize("model", ["c4", "bpe", "unigram"])
def test_bytes_behind_tokens_are_the_library_s_own_alignment(tmp_path, model):
    import sentencepiece

    path = C4_MODEL
    if model != "c4":
        path = tmp_path / "small.model"
        train_sentencepiece([text[:3000] for text in documents(150)], str(path), 600, model, characters=200_000)
    elif not path.exists():
        pytest.skip("the C4 vocabulary is not next to the repository")
    tokenizer, processor = load_tokenizer(str(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = [text.encode() for text in [*TEXTS, *(text[:4000] for text in documents(60)), "ﬁ  e\u0301 ℌ 한 𝒳"]]
    ids, lengths, counts = tokenizer.measure(texts)
    at = 0
    for text, count in zip(texts, counts.tolist(), strict=True):
        mine = ids[at : at + count].tolist(), lengths[at : at + count].tolist()
        assert mine == aligned(tokenizer, processor, text), text
        at += count
    assert at == len(ids) == len(lengths)


@pytest.mark.parametrize("model", ["bytes", "bpe", "unigram", "c4"])
def test_parts_of_a_long_text_are_encoded_as_the_whole(tmp_path, monkeypatch, model):
    import sentencepiece

    path = {"bytes": "bytes", "c4": str(C4_MODEL)}.get(model, str(tmp_path / "small.model"))
    if model == "c4" and not C4_MODEL.exists():
        pytest.skip("the C4 vocabulary is not next to the repository")
    if model in ("bpe", "unigram"):
        train_sentencepiece([text[:3000] for text in documents(150)], path, 600, model, characters=200_000)
    tokenizer = load_tokenizer(path)
    monkeypatch.setattr("steppe.data.vocabulary.tokenizer.PART", 100)
    for text in [*TEXTS, *documents(20), "x" * 500, " " * 500, "é漢 " * 99]:
        parts = list(tokenizer.cuts(text.encode()))
        assert b"".join(parts) == text.encode()
        apart, whole = [int(i) for part in parts for i in tokenizer.measure([part]).ids], tokenizer.encode(text)
        if model in ("bytes", "bpe"):
            assert apart == whole
        elif apart != whole:  # a unigram model's ties: equally likely, to float32
            score = sentencepiece.SentencePieceProcessor(model_file=path).get_score
            assert sum(map(score, apart)) == pytest.approx(sum(map(score, whole)), rel=1e-6)
        if len(text) > 1000:
            assert len(parts) > len(text) / 1000


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_trained_vocabulary_is_lossless(tmp_path, model_type):
    path = str(tmp_path / "small.model")
    train_texts = [text[:3000] for text in documents(150)]
    tokenizer = train_sentencepiece(train_texts, path, 600, model_type, characters=200_000)
    assert tokenizer.vocab_size <= 600
    assert tokenizer.fingerprint == load_tokenizer(path).fingerprint != load_tokenizer("bytes").fingerprint
    for text in [*TEXTS[:5], *(text[:5000] for text in documents(60))]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.model"]
    seqio = pytest.importorskip("seqio", reason="steppe[seqio] is not installed")
    assert tokenizer.encode("x") == seqio.SentencePieceVocabulary(path, extra_ids=0).encode("x")


def test_bad_vocabularies_are_one_line(tmp_path):
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"not a model")
    for spec in (str(tmp_path / "absent.model"), str(broken), str(tmp_path)):
        with pytest.raises(DataError, match=r"^config\.data\.vocabulary = [^\n]*$"):
            load_tokenizer(spec)
    with pytest.raises(DataError, match=r"--size=100: [^\n]*$"):
        train_sentencepiece(["text"], str(tmp_path / "x.model"), 100)
    with pytest.raises(DataError, match=r"--size=30000: [^\n]*$"):
        train_sentencepiece(["too little text"], str(tmp_path / "x.model"), 30_000)
    assert not (tmp_path / "x.model").exists()


def test_a_model_with_a_beginning_begins_with_it_and_says_so(tmp_path):
    """As Llama's: unknown 0, begin 1, end 2. A corpus of before, which began with 0, is read as it was."""
    import sentencepiece

    with open(tmp_path / "llama.model", "wb") as handle:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents(5)), model_writer=handle, vocab_size=400, model_type="bpe",
            byte_fallback=True, minloglevel=2, max_sentence_length=1 << 16,
        )  # fmt: skip
    tokenizer = load_tokenizer(str(tmp_path / "llama.model"))
    assert (tokenizer.begin_id, tokenizer.eos_id) == (1, 2)
    old = tokenizer.fingerprint.removesuffix("-begin1")
    assert old != tokenizer.fingerprint
    assert load_tokenizer(str(tmp_path / "llama.model"), old).begin_id == 0
    # what follows a prompt keeps its first blank, which alone the library takes for its own
    for prompt in ("def a", "", "x", "import"):
        ids = [1, *tokenizer.encode(prompt)]
        for more in (" the", "the", " é", "x b"):
            follow = tokenizer.encode("x" + more)[len(tokenizer.encode("x")) :]
            whole = tokenizer.decode([*ids, *follow])
            assert prompt + _continuation(tokenizer, [*ids, *follow], len(ids)) == whole
            assert not prompt or whole == prompt + more
    trained = train_sentencepiece(documents(9), str(tmp_path / "own.model"), 500)
    assert (trained.begin_id, "begin" in trained.fingerprint) == (0, False)
