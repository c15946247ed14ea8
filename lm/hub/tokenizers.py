"""Writes a run's vocabulary as a tokenizer.json for Hugging Face's fast tokenizers."""

import base64
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from steppe.data import files
from steppe.data.loader import Corpus
from steppe.data.manifest import path_of
from steppe.data.vocabulary import hub, pieces, read_model
from steppe.data.vocabulary.byte import BYTE_OFFSET

CONTROL = ("<pad>", "</s>", "<unk>")  # of the byte vocabulary, with ByT5's names
_SPACE = "\u2581"


def write(folder: Path, corpus: Corpus, length: int) -> dict[str, int | None]:
    """Writes tokenizer.json, its configs and, for a SentencePiece model, tokenizer.model. Returns the ids that begin
    and end a text and pad a batch, as in config.json. length: the model's sequence length in tokens."""
    import tokenizers

    tokenizer = corpus.tokenizer
    made = _made(folder, corpus)
    found = tokenizers.Tokenizer.from_str(json.dumps(made))
    begin, end = ((cast(str, found.id_to_token(number)), number) for number in (tokenizer.begin_id, tokenizer.eos_id))
    made["post_processor"] = _beginning(*begin)
    named = {"bos": begin, "eos": end, "pad": _pad(made, (begin[1], end[1]))}
    tokens = {f"{name}_token": token[0] for name, token in named.items() if token}
    files.write(folder / "tokenizer.json", json.dumps(made, ensure_ascii=False))
    files.write_json(folder / "special_tokens_map.json", tokens)
    files.write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **tokens,
            "split_special_tokens": True,  # control strings in a text are text
            "padding_side": "left",
            "model_max_length": length,
            "clean_up_tokenization_spaces": False,
        },
    )
    return {f"{name}_token_id": token and token[1] for name, token in named.items()}


def _pad(made: Mapping[str, Any], ends: tuple[int, int]) -> tuple[str, int] | None:
    """A control token that occurs in no text and neither begins nor ends one: one named pad, else the unknown token.

    It must not be the begin token, because transformers would mask that token for a model without a given mask.
    """
    model, free = made["model"], {t["content"]: t["id"] for t in made["added_tokens"] if t["special"]}
    free = {content: number for content, number in free.items() if number not in ends}
    pads = [content for content in free if "pad" in content.lower()]
    never = model.get("byte_fallback") or (model["type"] == "BPE" and model.get("unk_token") is None)
    pads += [content for content in free if never and "unk" in content.lower()]
    return (pads[0], free[pads[0]]) if pads else None


def _made(folder: Path, corpus: Corpus) -> dict[str, Any]:
    kept = corpus.manifest["vocabulary"]["file"]
    if not kept:
        return _of_bytes()
    content = read_model(path_of(corpus.directory, kept))
    if hub.is_joined(content):
        found = json.loads(content)
        return hub.textual_tokenizer(found)[0] if "tokenizer" in found else _of_ranks(found)
    files.write(folder / "tokenizer.model", content)
    return _of_pieces(content)


# ------------------------------------------------------------------------------------------------- parts of the format
def _tokenizer(model: Mapping, decoder: Mapping, special: Mapping[str, int], **more: Any) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": number, "content": content, **plain} for content, number in special.items()]
    parts = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, **more}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts,
            "decoder": decoder, "model": model}  # fmt: skip


def _sequence(kind: str, parts: list[dict]) -> dict:
    return {"type": "Sequence", kind: parts}


def _beginning(token: str, number: int) -> dict:
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    ids = {token: {"id": token, "ids": [number], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": [special, text[0]], "pair": [special, *text], "special_tokens": ids}


def _byte_level(split: dict | None = None) -> tuple[dict, dict]:
    """(the pre-tokenizer that splits a text and maps bytes to characters, the decoder that reverses it)."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return (_sequence("pretokenizers", [split, level]) if split else level), level


def byte_characters() -> dict[int, str]:
    """{byte: its character in byte-level vocabularies}; a printable byte is itself (GPT-2)."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {**{byte: chr(byte) for byte in seen}, **{byte: chr(256 + n) for n, byte in enumerate(unseen)}}


def _bpe(vocabulary: Mapping[str, int], merges: list, unknown: str | None, fallback: bool, words: bool = False) -> dict:
    """words: whether a whole word that is a piece becomes that piece regardless of merges."""
    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": unknown is not None, "byte_fallback": fallback, "ignore_merges": words,
        "vocab": dict(sorted(vocabulary.items(), key=lambda entry: entry[1])),
        "merges": [list(pair) for pair in merges],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- vocabularies
def _of_bytes() -> dict[str, Any]:
    special = {content: number for number, content in enumerate(CONTROL)}
    vocabulary = {**special, **{character: byte + BYTE_OFFSET for byte, character in byte_characters().items()}}
    cut, joined = _byte_level()
    return _tokenizer(_bpe(vocabulary, [], None, False), joined, special, pre_tokenizer=cut)


def of_bytes_and_merges(
    vocabulary: Mapping[str, int], merges: list, special: Mapping[str, int], cuts: list[dict]
) -> dict[str, Any]:
    """A byte-level vocabulary with its merges. cuts: the pre-tokenizers, of which the last maps bytes to characters."""
    model = _bpe(vocabulary, merges, None, False)
    return _tokenizer(model, cuts[-1], special, pre_tokenizer=_sequence("pretokenizers", cuts))


def _of_ranks(found: dict) -> dict[str, Any]:
    """tiktoken's. A word that is a token becomes that token; special tokens are not part of the words."""
    characters = byte_characters()
    written = ["".join(characters[byte] for byte in base64.b64decode(token)) for token in found["tiktoken"]]
    vocabulary = dict(zip(written, found["tiktoken"].values(), strict=True))
    special = dict(sorted(found["special"].items(), key=lambda entry: entry[1]))
    merges = _merges(vocabulary)
    if [*sorted(vocabulary.values()), *special.values()] != list(range(len(vocabulary) + len(special))):
        vocabulary |= special  # otherwise the library would number special tokens itself, without gaps
    cut, joined = _byte_level(_split(found["pattern"]))
    return _tokenizer(_bpe(vocabulary, merges, None, False, words=True), joined, special, pre_tokenizer=cut)


def _of_pieces(content: bytes) -> dict[str, Any]:
    """A SentencePiece model; it treats the whole text as one word, so this does too."""
    import sentencepiece

    model = pieces.model_of(content)
    kinds, spec = model.SentencePiece, model.normalizer_spec
    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    special = {piece.piece: ids[piece.piece] for piece in model.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)}
    symbols = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    unknown = next(piece.piece for piece in model.pieces if piece.type == kinds.UNKNOWN)
    fallback = any(piece.type == kinds.BYTE for piece in model.pieces)
    normal = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        normal.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        normal += [_replace({"Regex": r"\A +"}, ""), _replace({"Regex": " {2,}"}, " ")]
        normal += [_replace({"Regex": f"[ {_SPACE}]+\\z"}, "")]
    normal += [{"type": "Prepend", "prepend": _SPACE}] * spec.add_dummy_prefix
    normal.append(_replace({"String": " "}, _SPACE))
    decoder = [_replace({"String": _SPACE}, " "), *[{"type": "ByteFallback"}] * fallback, {"type": "Fuse"}]
    decoder += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * spec.add_dummy_prefix
    parts: dict[str, Any] = {"normalizer": _sequence("normalizers", normal)}
    symbols = [symbol for symbol in symbols if " " not in symbol]  # blanks are already marks when symbols are matched
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        scores = _scores(model, kinds)
        hub.shun(scores, special.values())
        parts["pre_tokenizer"] = _parted(special, [p.piece for p in model.pieces if p.piece not in special])
        made = {"type": "Unigram", "unk_id": ids[unknown], "vocab": scores, "byte_fallback": fallback}
        return _tokenizer(made, _sequence("decoders", decoder), special, **parts)
    ranks = {p.piece: -p.score for p in model.pieces if p.type == kinds.NORMAL}
    made = _bpe(ids, _merges(ranks), unknown, fallback, words=bool(symbols))
    if symbols:  # each is a word; a word that is not a symbol but has another token's name is split
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        others = [p.piece for p in model.pieces if p.type not in (kinds.NORMAL, kinds.USER_DEFINED)]
        firsts = [processor.EncodeAsPieces(other)[0].lstrip(_SPACE) or other[0] for other in others]
        cuts = [rf"\A{_escaped(a)}(?={_escaped(b.removeprefix(a))}\z)" for a, b in zip(firsts, others, strict=True)]
        words = "|".join(map(_escaped, sorted(symbols, key=len, reverse=True)))
        parts["pre_tokenizer"] = _sequence("pretokenizers", [_split(words), _split("|".join(cuts))])
    return _tokenizer(made, _sequence("decoders", decoder), special, **parts)


def _replace(pattern: Mapping[str, str], content: str) -> dict:
    return {"type": "Replace", "pattern": dict(pattern), "content": content}


def _split(pattern: str, behavior: str = "Isolated") -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _escaped(text: str) -> str:
    return re.sub(r"([^\w\s])", r"\\\1", text)


def _parted(control: Iterable[str], pieces: Sequence[str]) -> dict | None:
    """Splits the control strings in a text where no piece crosses the split, so that none is recognised."""
    cuts = []
    for string in control:
        free = (at for at in range(1, len(string)) if not any(string[at - 1 : at + 1] in piece for piece in pieces))
        cuts += [f"{_escaped(string[:at])}(?={_escaped(string[at:])})" for at in itertools.islice(free, 1)]
    return _split("|".join(cuts), "MergedWithPrevious") if cuts else None


def _scores(model, kinds) -> list[list]:
    """[piece, score] of every id; user-defined symbols are likelier than any other cover, as in SentencePiece."""
    best = max((piece.score for piece in model.pieces if piece.type == kinds.NORMAL), default=0.0)
    sizes = [len(piece.piece.encode()) if piece.type == kinds.USER_DEFINED else 0 for piece in model.pieces]
    return [[p.piece, size * best - 0.1 if size else p.score] for p, size in zip(model.pieces, sizes, strict=True)]


def _merges(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pairs of tokens that merge into a token, lowest rank first.

    ranks: of every token, as characters; neighbours whose joined token has the lowest rank merge first. Once all lower
    merges are done, the parts that remain of a token are its only pair. If it cannot be reached alone, all are listed.
    """
    pairs = []
    for token, rank in ranks.items():
        parts = list(token)
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            lowest = min(range(len(joined)), key=joined.__getitem__)
            if joined[lowest] >= rank:
                break
            parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
        cuts = [len(parts[0])] if len(parts) == 2 else range(1, len(token))
        halves = [(token[:cut], token[cut:]) for cut in cuts]
        pairs += [(rank, pair) for pair in halves if pair[0] in ranks and pair[1] in ranks]
    pairs.sort(key=lambda entry: entry[0])
    return [pair for _, pair in pairs]
