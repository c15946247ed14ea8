"""Ids of a run against those of its exported tokenizer, loaded as users load it, on text that aims at differences."""

import base64
import itertools
import json
import random
from pathlib import Path

import pytest

from steppe.data.loader import Corpus
from steppe.data.readers.built_in import embedded_documents
from steppe.data.vocabulary import load_tokenizer, read_model
from steppe.lm.hub import differences
from steppe.lm.hub import tokenizers as exported
from steppe.lm.keep.exits import Unusable
from steppe.lm.measure import choices

transformers = pytest.importorskip("transformers", reason="steppe[hub] is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="steppe[hub] is not installed")
pytest.importorskip("tiktoken", reason="steppe[hub] is not installed")

SHARED = Path(__file__).parents[3] / "shared"
STRIKE = "<p><s>old price</s> new price, <pad> and <unk></p>"
WORDS = r"[A-Za-z]+| ?[^\sA-Za-z]+|\s+"


def sentences():
    for _, text in embedded_documents()[:20]:
        yield from (line for line in text.decode()[:8000].splitlines() if line.strip())


def pieces(folder, **options):
    """A SentencePiece model of a few hundred pieces; options: of the library's trainer."""
    import sentencepiece

    own = {"byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
           "remove_extra_whitespaces": False, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}  # fmt: skip
    with open(folder / "v.model", "wb") as handle:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(), model_writer=handle, minloglevel=2, hard_vocab_limit=False,
            **{"vocab_size": 600, "model_type": "bpe", **own, **options},
        )  # fmt: skip
    return str(folder / "v.model")


def ranks(folder, tokens, **special):
    every = [*(bytes([byte]) for byte in range(256)), *tokens]
    (folder / "v.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(every)))
    said = {"pat_str": WORDS, "special_tokens": {"<|endoftext|>": len(every), **special}}
    (folder / "v.tiktoken.json").write_text(json.dumps(said))
    return str(folder / "v.tiktoken")


def fast(folder, model, trainer, special, **parts):
    """A tokenizer.json that the tokenizers library trains."""
    made = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator(
        sentences(), trainer(vocab_size=600, show_progress=False, special_tokens=special, **SAME[type(model).__name__])
    )
    made.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


SAME = {
    "BPE": {"initial_alphabet": tokenizers.pre_tokenizers.ByteLevel.alphabet()},
    "Unigram": {"unk_token": "<unk>"},
    "WordLevel": {},
}
SYMBOLS = ["<sep>", "    ", "\n", "import"]
ONCE = ("a<sep>b", "import x", "hello", "say hello world", STRIKE, "a<|endoftext|>b", "x</s>y")  # once unlike the run's
LLAMA = {"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2, "add_dummy_prefix": True}
NORMALISED = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True, "add_dummy_prefix": True}
VOCABULARIES = {
    "bytes": lambda folder: "bytes",
    "bpe": pieces,
    "unigram": lambda folder: pieces(folder, model_type="unigram"),
    "llama": lambda folder: pieces(folder, **LLAMA),
    "llama, normalised": lambda folder: pieces(folder, **{**LLAMA, **NORMALISED, "byte_fallback": False}),
    "unigram, normalised": lambda folder: pieces(folder, model_type="unigram", **NORMALISED, byte_fallback=False),
    "bpe with symbols": lambda folder: pieces(folder, user_defined_symbols=SYMBOLS),
    "llama with symbols": lambda folder: pieces(folder, **LLAMA, user_defined_symbols=SYMBOLS),
    "unigram with symbols": lambda folder: pieces(folder, model_type="unigram", user_defined_symbols=SYMBOLS),
    "tiktoken": lambda folder: ranks(folder, [b"he", b"ll", b" w", b"or", b"hell", b"th", b"the"]),
    "tiktoken, unreachable": lambda folder: ranks(folder, [b"he", b"ll", b" w", b"or", b"hello"]),
    "tiktoken, gaps": lambda folder: ranks(folder, [b"he", b"ll"], **{"<|pad|>": 300}),
    "byte-level bpe": lambda folder: fast(
        folder, tokenizers.models.BPE(), tokenizers.trainers.BpeTrainer, ["<|endoftext|>"],
        pre_tokenizer=tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=tokenizers.decoders.ByteLevel(),
    ),
    "hub unigram": lambda folder: fast(
        folder, tokenizers.models.Unigram(), tokenizers.trainers.UnigramTrainer, ["<unk>", "<s>", "</s>"],
        pre_tokenizer=tokenizers.pre_tokenizers.Metaspace(), decoder=tokenizers.decoders.Metaspace(),
    ),
    "c4": lambda folder: str(SHARED / "t5_cc_all_32000_100extra.model"),
}  # fmt: skip


def export(folder, spec):
    """(corpus without text, the exported tokenizer)."""
    (folder / "hf").mkdir()
    kept = None
    if spec != "bytes":
        (folder / "kept").write_bytes(read_model(spec))
        kept = {"file": "kept"}
    corpus = Corpus(str(folder), {"vocabulary": {"file": kept}}, load_tokenizer(spec), 16, "concat", (), {})
    named = exported.write(folder / "hf", corpus, 16)
    (folder / "hf" / "config.json").write_text(json.dumps({"model_type": "llama", **named}))
    return corpus, transformers.AutoTokenizer.from_pretrained(folder / "hf")


def compared(folder, corpus, theirs):
    """(what is found on hostile texts, {control string: id}) of an export."""
    made = json.loads((folder / "hf" / "tokenizer.json").read_text())
    control = {token["content"]: token["id"] for token in made["added_tokens"] if token["special"]}
    found = differences.compare(
        corpus.tokenizer, lambda texts: theirs(list(texts), verbose=False)["input_ids"], control,
        differences.scores_of(made), differences.normalisers(folder / "hf", theirs),
    )  # fmt: skip
    return found, control


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_the_runs_on_hostile_text(tmp_path, name):
    if name == "c4" and not (SHARED / "t5_cc_all_32000_100extra.model").exists():
        pytest.skip("the C4 vocabulary is not next to the repository")
    corpus, theirs = export(tmp_path, VOCABULARIES[name](tmp_path))
    ours = corpus.tokenizer
    found, control = compared(tmp_path, corpus, theirs)
    assert found.texts > 5000
    assert (found.control, found.other) == (0, ())
    assert not found.ties or "unigram" in name or name == "c4"
    assert not found.normal or "normalised" in name or name == "c4"
    assert sum(found[1:4]) < found.texts / 100
    # text is text, and no token but the first is a control token
    for text in (*ONCE, *control, *(f"a{string}b" for string in control)):
        ids = ours.encode(text)
        assert {ours.begin_id, ours.eos_id}.isdisjoint(ids)
        assert ours.measure([text.encode()]).ids.tolist() == ids
        assert theirs(text)["input_ids"] == [ours.begin_id, *ids]
        if "normalised" not in name and name not in ("c4", "hub unigram"):
            assert ours.decode(ids) == text == theirs.decode(ids)
    # begin, end and padding are named alike everywhere; a model that has its own beginning begins with that
    if wanted := {"llama": (1, 2), "bytes": (0, 1), "byte-level bpe": (0, 0)}.get(name):
        assert (ours.begin_id, ours.eos_id) == wanted
    said = json.loads((tmp_path / "hf" / "special_tokens_map.json").read_text())
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.begin_id, ours.eos_id)
    assert (said["bos_token"], said["eos_token"]) == (theirs.bos_token, theirs.eos_token)
    assert theirs.pad_token_id not in (ours.begin_id, ours.eos_id)
    assert said.get("pad_token") == theirs.pad_token
    assert theirs.padding_side == "left"


CHOICES = [
    ("for x in the cl", "ass"),
    ("        self.ret", "urn x"),
    ("a", "b"),
    ("def f(x):\n    ", "return"),
    ("", "x"),
    ("in ", "os"),
]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_first_token_that_reaches_into_a_choice_counts(tmp_path, name):
    """Whatever merges with the query before; the tokenizers library says where each token ends."""
    corpus, theirs = export(tmp_path, VOCABULARIES[name](tmp_path))
    drawn = random.Random(0)
    lines = [line for line in itertools.islice(sentences(), 400) if line.isascii() and len(line) > 20]
    cuts = ((line[:at], line[at : at + 8]) for line in lines for at in (drawn.randrange(1, len(line) - 8),))
    pairs = [*CHOICES, *((query, choice) for query, choice in cuts if choice.strip())]
    if "normalised" in name or name in ("c4", "hub unigram"):  # offsets there are of text without its blanks
        pairs = [(query, choice) for query, choice in pairs if "  " not in query + choice and query == query.strip()]
    items = [choices.Item(query, (choice, choice + "?"), 0) for query, choice in pairs]
    made = choices.rows(items, corpus.tokenizer, 512)
    merged = 0
    for row, (query, choice) in zip(range(0, len(made.inputs), 2), pairs, strict=True):
        found = theirs.backend_tokenizer.encode(query + choice, add_special_tokens=False)
        if found.ids != corpus.tokenizer.encode(query + choice):
            continue  # a tie of a unigram model
        counted = [end > len(query.rstrip()) for _, end in found.offsets]
        assert (made.weights[row, : len(counted)] > 0).tolist() == counted, (query, choice)
        assert any(counted)
        begins = [begin for (begin, _), counts in zip(found.offsets, counted, strict=True) if counts]
        merged += begins[0] < len(query.rstrip())
    assert merged or name in ("bytes", "tiktoken, gaps")


def test_a_token_that_no_merge_reaches_is_a_word(tmp_path):
    corpus, theirs = export(tmp_path, VOCABULARIES["tiktoken, unreachable"](tmp_path))
    assert corpus.tokenizer.encode("hello") == theirs("hello", add_special_tokens=False)["input_ids"] == [260]


def test_a_difference_is_refused_with_the_shortest_text(tmp_path):
    corpus, _ = export(tmp_path, VOCABULARIES["bpe"](tmp_path))
    file = tmp_path / "hf" / "tokenizer.json"
    made = json.loads(file.read_text())
    lost = made["model"]["merges"].pop(len(made["model"]["merges"]) // 2)
    file.write_text(json.dumps(made))
    with pytest.raises(Unusable, match=r"^the exported tokenizer differs from the run's: '[^\n]*$") as caught:
        differences.said(tmp_path / "hf", corpus)
    shown = str(caught.value).split("'")[2].split("' is ")[0]
    assert len(shown) <= 2 * len("".join(lost)), (shown, lost)
