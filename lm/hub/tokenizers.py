"""A run's vocabulary as a tokenizer.json for Hugging Face's fast tokenizers, compared with it on held-out text."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steppe.data import files
from steppe.data.loader import Corpus, held_out_rows
from steppe.data.vocabulary import hub, read_model
from steppe.data.vocabulary.byte import BYTE_OFFSET

CONTROL = ("<pad>", "</s>", "<unk>")  # of the byte vocabulary, as ByT5 calls them
_SPACE = "\u2581"
COMPARED = 64  # rows of held-out text


def write(folder: Path, corpus: Corpus, length: int, log: Callable[[str], None]) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, of a SentencePiece model, tokenizer.model.

    length: tokens that the model was trained on at a time. Says on how many held-out texts the two differ, if they do.
    """
    import tokenizers

    tokenizer = corpus.tokenizer
    made = _made(folder, corpus)
    found = tokenizers.Tokenizer.from_str(json.dumps(made))
    begin, end = (found.id_to_token(number) for number in (tokenizer.begin_id, tokenizer.eos_id))
    made["post_processor"] = _beginning(begin, tokenizer.begin_id)
    files.write(folder / "tokenizer.json", json.dumps(made, ensure_ascii=False))
    files.write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": begin,
            "eos_token": end,
            "pad_token": begin,
            "model_max_length": length,
            "clean_up_tokenization_spaces": False,
        },
    )
    texts = _texts(corpus)
    other = sum(found.encode(text, add_special_tokens=False).ids != tokenizer.encode(text) for text in texts)
    said = f"of {len(texts)} held-out texts {other} get other tokens" if other else "the run's own on held-out text"
    log(f"tokenizer   {tokenizer.vocab_size:,} tokens, {said}")


def _made(folder: Path, corpus: Corpus) -> dict[str, Any]:
    """The content of tokenizer.json, without what it puts before a text."""
    kept = corpus.manifest["vocabulary"]["file"]
    if not kept:
        return _of_bytes()
    content = read_model(str(Path(corpus.directory) / kept["file"]))
    if hub.is_joined(content):
        found = json.loads(content)
        return found["tokenizer"] if "tokenizer" in found else _of_ranks(found)
    files.write(folder / "tokenizer.model", content)
    return _of_pieces(content)


def _texts(corpus: Corpus) -> list[str]:
    texts = []
    for name in corpus.held_out:
        batch = held_out_rows(corpus, name, 0, COMPARED)
        for targets, weights in zip(batch["targets"], batch["weights"], strict=True):
            texts.append(corpus.tokenizer.decode(targets[weights > 0].tolist()))
    return [text for text in texts if text]


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
    """(what cuts a text and writes its bytes as characters, what undoes that)."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return (_sequence("pretokenizers", [split, level]) if split else level), level


def byte_characters() -> dict[int, str]:
    """{byte: the character that byte-level vocabularies write for it}: itself where it can be seen (GPT-2)."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {**{byte: chr(byte) for byte in seen}, **{byte: chr(256 + n) for n, byte in enumerate(unseen)}}


def _bpe(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], unknown: str | None, fallback: bool) -> dict:
    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": unknown is not None, "byte_fallback": fallback, "ignore_merges": False,
        "vocab": dict(vocabulary), "merges": [list(pair) for pair in merges],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- vocabularies
def _of_bytes() -> dict[str, Any]:
    special = {content: number for number, content in enumerate(CONTROL)}
    vocabulary = {**special, **{character: byte + BYTE_OFFSET for byte, character in byte_characters().items()}}
    cut, joined = _byte_level()
    return _tokenizer(_bpe(vocabulary, [], None, False), joined, special, pre_tokenizer=cut)


def _of_ranks(found: dict) -> dict[str, Any]:
    """tiktoken's: a token's last merge is the pair that is left of it once all lower ranks are merged."""
    import base64

    characters = byte_characters()
    ranks = {base64.b64decode(token): rank for token, rank in found["tiktoken"].items()}

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            lowest = min(range(len(joined)), key=joined.__getitem__)
            if joined[lowest] >= rank:
                break
            parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
        if len(parts) == 2:
            merges.append((written(parts[0]), written(parts[1])))
    special = dict(found["special"])
    vocabulary = {written(token): rank for token, rank in ranks.items()} | special
    split = {"type": "Split", "pattern": {"Regex": found["pattern"]}, "behavior": "Isolated", "invert": False}
    cut, joined = _byte_level(split)
    return _tokenizer(_bpe(vocabulary, merges, None, False), joined, special, pre_tokenizer=cut)


def _of_pieces(content: bytes) -> dict[str, Any]:
    """A SentencePiece model. The whole text is one word, as it is there."""
    import base64

    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    kinds, spec = sentencepiece_model_pb2.ModelProto.SentencePiece, model.normalizer_spec
    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    special = {piece.piece: ids[piece.piece] for piece in model.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)}
    unknown = next(piece.piece for piece in model.pieces if piece.type == kinds.UNKNOWN)
    fallback = any(piece.type == kinds.BYTE for piece in model.pieces)
    normal = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        normal.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        normal.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normal.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    scheme = "always" if spec.add_dummy_prefix else "never"
    space = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}
    decoder = [{"type": "ByteFallback"}] if fallback else []
    decoder.append(space)
    if model.trainer_spec.model_type == model.trainer_spec.BPE:
        made = _bpe(ids, _merges(model, kinds, ids), unknown, fallback)
    else:
        scores = [[piece.piece, piece.score] for piece in model.pieces]
        made = {"type": "Unigram", "unk_id": ids[unknown], "vocab": scores, "byte_fallback": fallback}
    return _tokenizer(
        made,
        _sequence("decoders", decoder),
        special,
        normalizer=_sequence("normalizers", normal) if normal else None,
        pre_tokenizer=space,
    )


def _merges(model, kinds, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that make a piece, the pieces of the best scores first."""
    found = []
    for piece in model.pieces:
        if piece.type in (kinds.NORMAL, kinds.USER_DEFINED):
            text = piece.piece
            pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
            pairs = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
            pairs.sort(key=lambda pair: [ids[part] for part in pair])
            found += [(piece.score, pair) for pair in pairs]
    found.sort(key=lambda entry: -entry[0])  # stable: equal scores in the order of the model
    return [pair for _, pair in found]
