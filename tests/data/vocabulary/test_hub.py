"""Vocabularies of tokenizers and tiktoken: the library's own ids, every source byte counted once, kept in one file."""

import base64
import json

import numpy as np
import pytest

from steppe.configs.base import get_config
from steppe.data.errors import DataError
from steppe.data.loader import open_corpus, training_rows
from steppe.data.prepare import prepare, recipe_of
from steppe.data.readers.built_in import embedded_documents, topic_documents
from steppe.data.vocabulary import PART, load_tokenizer, read_model

tokenizers = pytest.importorskip("tokenizers", reason="steppe[hub] is not installed")
tiktoken = pytest.importorskip("tiktoken", reason="steppe[hub] is not installed")

TEXTS = ["", "plain", "tab\tand\nnewline  two spaces ", "naïve Ünïcode 漢字 🎉🎉", "\x00\x7f", "▁ lower", "  漢  "]
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def documents():
    return [*TEXTS, *(text.decode() for _, text in [*embedded_documents()[:20], *topic_documents()[:40]])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """bytes.json: byte-level BPE with one end of text, as GPT-2; words.json: a unigram with Metaspace, a normaliser and
    a beginning of text; ranks.tiktoken: the former's merges as ranks."""
    folder = tmp_path_factory.mktemp("vocabularies")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(documents(), trainer)
    (folder / "bytes").mkdir()
    made.save(str(folder / "bytes" / "tokenizer.json"))

    words = tokenizers.Tokenizer(models.Unigram())
    words.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.NFKC()])
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    words.train_from_iterator(
        documents(), trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token="<unk>")
    )
    (folder / "words").mkdir()
    words.save(str(folder / "words" / "tokenizer.json"))
    said = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    (folder / "words" / "tokenizer_config.json").write_text(json.dumps(said))

    alphabet = {character: byte for byte, character in byte_characters().items()}
    ranks = {
        bytes(alphabet[c] for c in token): rank - 1
        for token, rank in made.get_vocab().items()
        if token != "<|endoftext|>"
    }
    lines = [
        f"{base64.b64encode(token).decode()} {rank}" for token, rank in sorted(ranks.items(), key=lambda kv: kv[1])
    ]
    (folder / "ranks.tiktoken").write_text("\n".join(lines))
    around = {"pat_str": PATTERN, "special_tokens": {"<|endoftext|>": len(ranks)}}
    (folder / "ranks.tiktoken.json").write_text(json.dumps(around))
    return folder


def byte_characters():
    """{byte: the character that a byte-level vocabulary writes for it} (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


@pytest.mark.parametrize("name", ["bytes/tokenizer.json", "words", "ranks.tiktoken"])
def test_ids_are_the_librarys_and_every_byte_is_counted_once(folder, name):
    tokenizer = load_tokenizer(str(folder / name))
    texts = documents()
    found = tokenizer.measure([text.encode() for text in texts])
    ends = np.cumsum(found.counts)
    for text, end, count in zip(texts, ends, found.counts, strict=True):
        ids, lengths = found.ids[end - count : end], found.lengths[end - count : end]
        assert ids.tolist() == tokenizer.encode(text)
        assert lengths.min(initial=0) >= 0
        assert lengths.sum() == (len(text.encode()) if count else 0)
        if name != "words":
            assert tokenizer.decode([tokenizer.begin_id, *ids, tokenizer.eos_id]) == text
    assert tokenizer.eos_id < tokenizer.vocab_size
    assert int(found.ids.max()) < tokenizer.vocab_size


def test_the_bytes_of_every_token_are_its_own(folder):
    """Of a byte-level vocabulary the tokens themselves say theirs; a character in several counts with the last."""
    tokenizer = load_tokenizer(str(folder / "bytes"))
    made = tokenizers.Tokenizer.from_file(str(folder / "bytes" / "tokenizer.json"))
    sizes = {number: len(token) for token, number in made.get_vocab().items()}  # a character a byte
    split = 0
    for text in documents():
        ids, lengths, _ = tokenizer.measure([text.encode()])
        begins = np.append([i for i, byte in enumerate(text.encode()) if byte & 0xC0 != 0x80], len(text.encode()))
        ends = np.cumsum([sizes[number] for number in ids.tolist()], dtype=np.int64)
        whole = begins[np.searchsorted(begins, ends, side="right") - 1]  # of the characters that have ended by then
        assert np.cumsum(lengths).tolist() == whole.tolist()
        split += int((whole != ends).sum())
    assert split > 5


def test_begin_and_end_of_a_text_are_those_of_the_files(folder):
    words, fast, ranks = (load_tokenizer(str(folder / name)) for name in ("words", "bytes", "ranks.tiktoken"))
    assert (words.begin_id, words.eos_id) == (1, 2)
    assert fast.begin_id == fast.eos_id == 0
    assert ranks.begin_id == ranks.eos_id == ranks.vocab_size - 1


@pytest.mark.parametrize("name", ["bytes", "words"])
def test_control_strings_in_text_are_text(folder, tmp_path, name):
    """In all that is encoded; a corpus of before, when they were control ids, is read as it was."""
    tokenizer, content = load_tokenizer(str(folder / name)), read_model(str(folder / name))
    control = ["<|endoftext|>"] if name == "bytes" else ["<s>", "</s>"]
    for text in (*control, *(f"import{string} os" for string in control), control[0] * 2 + "é"):
        ids = tokenizer.encode(text)
        assert {tokenizer.begin_id, tokenizer.eos_id}.isdisjoint(ids)
        assert tokenizer.measure([text.encode()] * 2).ids.tolist() == ids * 2
        assert tokenizer.measure([text.encode()]).lengths.sum() == len(text.encode())
        assert name == "words" or tokenizer.decode(ids) == text
    assert tokenizer.fingerprint.endswith("-text")
    (tmp_path / "vocabulary.model").write_bytes(content)
    before = load_tokenizer(str(tmp_path / "vocabulary.model"), tokenizer.fingerprint.removesuffix("-text"))
    assert before.fingerprint == tokenizer.fingerprint.removesuffix("-text")
    assert before.eos_id in before.encode(f"a{control[-1]}b")


@pytest.mark.parametrize(
    ("files", "begin", "end"),
    [
        ({"special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, 1, 2),
        ({"config": {"bos_token_id": 1, "eos_token_id": [2, 0]}}, 1, 2),
        ({"config": {"bos_token_id": 0, "eos_token_id": 0}, "special_tokens_map": {"bos_token": "<s>"}}, 1, 0),
        ({"tokenizer_config": {"eos_token": "</s>"}, "special_tokens_map": {"bos_token": "<s>"}}, 1, 2),
        (
            {
                "config": {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0},
                "generation_config": {"bos_token_id": 0},
                "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>"},
            },
            1,
            2,
        ),
        ({}, 2, 2),
    ],
)
def test_begin_and_end_stand_in_any_of_the_other_files(folder, tmp_path, files, begin, end):
    (tmp_path / "tokenizer.json").write_bytes((folder / "words" / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.begin_id, tokenizer.eos_id) == (begin, end)


@pytest.mark.parametrize(("name", "packing"), [("words", "concat"), ("ranks.tiktoken", "bestfit")])
def test_a_corpus_keeps_the_whole_vocabulary_in_one_file(folder, tmp_path, name, packing):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in documents() if text.strip())
    )
    task = f"jsonl:{tmp_path}/a.jsonl"
    options = {"vocabulary": str(folder / name), "held_out_fraction": 0.1, "packing": packing, "sequence_length": 32}
    manifest = prepare(recipe_of(get_config().data, task=task, **options), str(tmp_path / "out"), log=lambda line: None)
    kept, given = open_corpus(str(tmp_path / "out")), load_tokenizer(str(folder / name))
    assert kept.tokenizer.fingerprint == given.fingerprint == manifest["vocabulary"]["fingerprint"]
    assert (tmp_path / "out" / "vocabulary.model").read_bytes() == read_model(str(folder / name))
    batch = training_rows(kept, 0, 0, manifest["train"][0]["rows"])  # an epoch
    assert (batch["inputs"][:, 0] == given.begin_id).any()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a tokenizer.json"),
        ('{"model": 3}', "model = 3: must be an object"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "with an end of text"),
        ('{"model": {"type": "BPE", "vocab": [1], "merges": []}}', "vocab"),
        ('{"model":' + "[" * 10**5, "nested more than 64 deep"),
        ('{"model": {"type": "Unheard", "vocab": {"</s>": 0}}}', "tokenizers refuses it"),
    ],
)
def test_what_is_no_vocabulary_is_refused_in_a_line(tmp_path, content, said):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=rf"^config\.data\.vocabulary = [^\n]*{said}[^\n]*$"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_tiktoken_file_says_its_pattern_or_is_named_for_an_encoding(folder, tmp_path):
    (tmp_path / "mine.tiktoken").write_text((folder / "ranks.tiktoken").read_text())
    with pytest.raises(DataError, match=r"must be a file of one of tiktoken's own encodings, or with a"):
        load_tokenizer(str(tmp_path / "mine.tiktoken"))
    (tmp_path / "cl100k_base.tiktoken").write_text((folder / "ranks.tiktoken").read_text())
    assert load_tokenizer(str(tmp_path / "cl100k_base.tiktoken")).eos_id == 100257
    (tmp_path / "bad.tiktoken").write_text("no ranks here")
    with pytest.raises(DataError, match="not a tiktoken file"):
        load_tokenizer(str(tmp_path / "bad.tiktoken"))


@pytest.mark.parametrize(("name", "cut"), [("bytes", True), ("ranks.tiktoken", True), ("words", False)])
def test_a_long_text_is_encoded_in_parts_as_if_whole(folder, name, cut):
    tokenizer = load_tokenizer(str(folder / name))
    text = "\n\n".join(documents()).encode()
    parts = list(tokenizer.cuts(text))
    assert b"".join(parts) == text
    assert len(parts) > len(text) // (2 * PART) if cut else parts == [text]
    assert max(map(len, parts)) < 2 * PART or not cut
    whole, apart = tokenizer.measure([text]), tokenizer.measure(parts)
    np.testing.assert_array_equal(apart.ids, whole.ids)
    np.testing.assert_array_equal(apart.lengths, whole.lengths)
