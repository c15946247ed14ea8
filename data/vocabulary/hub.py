"""Vocabularies of other frameworks: Hugging Face's tokenizer.json (tokenizers), and tiktoken's files of ranks.

Both need data from other files: the ids that begin and end a text, and tiktoken's split pattern. `joined` merges all
into one JSON object, {"tokenizer": ...} or {"tiktoken": ...} with "begin" and "end". Steppe stores and hashes that.
"""

import base64
import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Required, TypedDict
from unittest import mock

import numpy as np
from msgspec import Meta

from steppe.configs import packages
from steppe.data import stored
from steppe.data.errors import DataError, refused
from steppe.data.vocabulary.tokenizer import Tokenizer, Tokens

Id = Annotated[int, Meta(ge=-1, le=1 << 31)]
_NEAR = 400  # bytes on each side of a cut whose tokens must not depend on the cut
_BETWEEN = re.compile(rb"[a-z](?= [a-z])")
# The files next to a tokenizer.json that name its begin and end tokens: the first two as text, the others as ids
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
# If no other file names the end-of-text token: the first of these in the vocabulary
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


class Added(TypedDict):
    """An added token of a tokenizer.json."""

    id: Id
    content: str


class Model(TypedDict, total=False):
    """The model of a tokenizer.json. vocab: {piece: id}, or [piece, score] per id."""

    type: str | None
    vocab: dict[str, Id] | list[tuple[str, float]]
    unk_id: Id | None
    unk_token: str | None


class Fast(TypedDict, total=False):
    """The parts of tokenizer.json that this module reads; the tokenizers library reads the rest."""

    model: Required[Model]
    added_tokens: list[Added]
    pre_tokenizer: dict[str, Any] | None


class Joined(TypedDict, total=False):
    """The result of `joined`, with "tokenizer", or with "tiktoken", "pattern" and "special"."""

    begin: Required[Id]
    end: Required[Id]
    tokenizer: Fast
    tiktoken: dict[str, Id]
    pattern: str
    special: dict[str, Id]


class Named(TypedDict):
    """A token in object form."""

    content: str


class Companion(TypedDict, total=False):
    """A file next to a vocabulary that names begin and end tokens, or tiktoken's split pattern."""

    bos_token: str | Named | None
    eos_token: str | Named | None
    bos_token_id: Id | list[Id] | None
    eos_token_id: Id | list[Id] | None
    pat_str: str
    special_tokens: dict[str, Id]


def joined(spec: str, path: str, content: bytes) -> bytes:
    """Merges a vocabulary with its companion files; returns other content unchanged. Raises DataError."""
    if path.endswith(".tiktoken"):
        return _join_tiktoken(spec, path, content)
    if content[:1] != b"{" or is_joined(content):
        return content
    try:
        fast = stored.decode(content, Fast, path)
    except stored.Wrong as error:
        raise DataError(
            f"config.data.vocabulary = {spec!r}: not a tokenizer.json of the tokenizers library ({error})"
        ) from None
    ids = _ids(fast)
    begin, end = (_named(path, name, ids) for name in ("bos", "eos"))
    end = end or next((token for token in _ENDS if token in ids), "")
    if end not in ids:
        accepted = f"a tokenizer with an end of text: eos_token in the tokenizer_config.json next to it, or {_ENDS[0]}"
        raise refused("data.vocabulary", spec, accepted)
    return _packed({"tokenizer": fast, "begin": ids.get(begin, ids[end]), "end": ids[end]})


def _ids(found: dict) -> dict[str, int]:
    """{token: id} of a tokenizer.json."""
    vocabulary = found["model"].get("vocab", {})
    ids = vocabulary if isinstance(vocabulary, dict) else {entry[0]: i for i, entry in enumerate(vocabulary)}
    return {**ids, **{token["content"]: token["id"] for token in found.get("added_tokens", [])}}


def _named(path: str, name: str, ids: dict[str, int]) -> str:
    """The bos or eos token from the files next to a tokenizer.json, given as text or as an id; "" if absent."""
    for file in COMPANIONS[:2]:
        token = _companion(path, file).get(f"{name}_token")
        if text := token["content"] if isinstance(token, dict) else token:
            return text
    tokens: dict[Any, str] = {number: token for token, number in ids.items()}
    for file in COMPANIONS[2:]:
        number = _companion(path, file).get(f"{name}_token_id")
        if token := tokens.get(number[0] if isinstance(number, list) and number else number):
            return token
    return ""


def is_joined(content: bytes) -> bool:
    """Whether `joined` made these bytes."""
    return content.startswith((b'{"begin":', b'{"end":'))


def load(spec: str, content: bytes, kept: str = "") -> Tokenizer:
    """Loads the result of `joined`; kept: see `load_tokenizer`. Raises DataError if its library does not load it."""
    found = stored.decode(content, Joined, spec)
    digest = hashlib.sha256(content).hexdigest()[:32]
    library = "tokenizers" if "tokenizer" in found else "tiktoken"
    fingerprint = f"{library}-{digest}"
    # old versions turned control strings in text into control ids
    textual = library == "tokenizers" and kept != fingerprint
    try:
        made = _ranked(found) if library == "tiktoken" else _fast(found, textual)
    except ImportError:
        raise DataError(f"config.data.vocabulary = {spec!r}: {packages.lacking(library)}") from None
    except Exception as error:  # the libraries have their own error types
        reason = " ".join(f"{error}".split())[:200]
        raise DataError(f"config.data.vocabulary = {spec!r}: {library} refuses it ({reason})") from None
    fingerprint += "-text" * textual
    return Tokenizer(spec=spec, fingerprint=fingerprint, begin_id=found["begin"], eos_id=found["end"], **made)


def textual_tokenizer(found: dict) -> tuple[dict, dict[str, int]]:
    """(a tokenizer.json from the result of `joined` that reads control strings as text, {control string: id}).

    Control tokens are special tokens and those that begin and end a text. The search of a unigram model could still
    choose them, so they become less likely than their characters.
    """
    made = copy.deepcopy(found["tokenizer"])
    ends = (found["begin"], found["end"])
    for token in made.get("added_tokens", []):
        token["special"] = bool(token.get("special")) or token["id"] in ends
    control = {token["content"]: token["id"] for token in made.get("added_tokens", []) if token["special"]}
    control |= {token: number for token, number in _ids(made).items() if number in ends}
    if made["model"].get("type") == "Unigram":
        shun(made["model"]["vocab"], control.values())
    return made, control


def shun(scores: list[list], control: Iterable[int]) -> None:
    """Lowers the scores of a unigram model's control pieces so that it never chooses them for text.

    scores: [piece, score] per id. Skips a control string with a character that is not a piece. It would beat unknown
    characters at any score, because the lowest score sets their cost.
    """
    single = {piece: score for piece, score in scores if len(piece) == 1}
    for number in control:
        if all(character in single for character in scores[number][0]):
            scores[number][1] = min(scores[number][1], sum(single[c] for c in scores[number][0]) - 1.0)


def _fast(found: dict, textual: bool) -> dict:
    import tokenizers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # shards already run in parallel
    made, control = textual_tokenizer(found) if textual else (found["tokenizer"], {})
    library = tokenizers.Tokenizer.from_str(json.dumps(made))
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = textual
    added = {token["id"] for token in made.get("added_tokens", []) if token.get("special")}
    model = made["model"]
    unknown = model["unk_id"] if "unk_id" in model else _ids({"model": model}).get(model.get("unk_token"))
    never = {number for token, number in control.items() if len(token) > 1} - {unknown}
    inside = [f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in control if len(token) > 1]
    within = re.compile("|".join(inside) or "$^")

    def encoded(texts: list[str]) -> list[list]:
        """[(part, its encoding)] of each text. A text has several parts only if the library gave control ids."""
        whole = library.encode_batch(texts, add_special_tokens=False)
        split = []
        for text, each in zip(texts, whole, strict=True):
            parts = [text] if never.isdisjoint(each.ids) else within.split(text)
            made = [each] if len(parts) == 1 else library.encode_batch(parts, add_special_tokens=False)
            split.append(list(zip(parts, made, strict=True)))
        return split

    def encode(text: str) -> list[int]:
        return [number for _, each in encoded([text])[0] for number in each.ids]

    def decode(ids: Iterable[int]) -> str:
        return library.decode([int(i) for i in ids if i not in added], skip_special_tokens=False)

    def measure(texts: list[bytes]) -> Tokens:
        split = encoded([text.decode() for text in texts])
        counts = np.array([sum(len(each.ids) for _, each in parts) for parts in split])
        ids = np.array([i for parts in split for _, each in parts for i in each.ids], np.int32)
        lengths = [_lengths(text.encode(), each.offsets) for parts in split for text, each in parts]
        return Tokens(ids, np.concatenate([*lengths, np.zeros(0, np.int32)]), counts)

    return {
        "vocab_size": 1 + max(library.get_vocab(with_added_tokens=True).values()),
        "encode": encode,
        "decode": decode,
        "measure": measure,
        **({"cut": _cut(encode)} if _by_words(made) else {}),
    }


def _by_words(found: dict) -> bool:
    """Whether a tokenizer.json splits text by patterns without changing it, so that distant parts are independent."""
    first = found.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    kinds = {step.get("type") for step in steps}
    cut = any(step.get("use_regex", True) for step in steps if step.get("type") in ("ByteLevel", "Split"))
    return cut and kinds <= {"ByteLevel", "Split", "Digits", "Punctuation"} and not found.get("normalizer")


def _cut(encode: Callable[[str], list[int]]) -> Callable[[bytes, int, int], int | None]:
    """Tokenizer.cut, between a word and a blank where the text near the cut gives the same tokens."""

    def alike(left: bytes, right: bytes) -> bool:
        texts = left.decode(errors="ignore"), right.decode(errors="ignore")
        return encode("".join(texts)) == [*encode(texts[0]), *encode(texts[1])]

    def cut(text: bytes, start: int, end: int) -> int | None:
        places = (found.start() + 1 for found in _BETWEEN.finditer(text, end))
        return next((at for at in places if alike(text[at - _NEAR : at], text[at : at + _NEAR])), None)

    return cut


def _lengths(text: bytes, offsets: list[tuple[int, int]]) -> np.ndarray:
    """The number of source bytes of each token, [n]. offsets: (first, last + 1) character of each token.

    The last of several tokens of a character gets all of its bytes. Text that no token covers counts for the next
    token, or for the last one at the end.
    """
    if not offsets:
        return np.zeros(0, np.int32)
    whole = np.frombuffer(text, np.uint8)
    begins = np.append(np.flatnonzero((whole & 0xC0) != 0x80), len(whole))  # of each character
    starts, ends = np.array(offsets).T
    ends[:-1] = np.minimum(ends[:-1], np.maximum(starts[1:], starts[:-1]))
    ends[-1] = len(begins) - 1
    return np.diff(begins[np.maximum.accumulate(ends)], prepend=0).astype(np.int32)


def _ranked(found: dict) -> dict:
    import tiktoken

    ranks = {base64.b64decode(token): rank for token, rank in found["tiktoken"].items()}
    encoding = tiktoken.Encoding(
        "steppe", pat_str=found["pattern"], mergeable_ranks=ranks, special_tokens=found["special"]
    )
    sizes = np.zeros(encoding.n_vocab, np.int32)
    for token, rank in ranks.items():
        sizes[rank] = len(token)
    shown = {*ranks.values(), *found["special"].values()} - {found["begin"], found["end"]}  # ids may have gaps

    def measure(texts: list[bytes]) -> Tokens:
        encoded = encoding.encode_ordinary_batch([text.decode() for text in texts], num_threads=1)
        ids = np.array([i for each in encoded for i in each], np.int32)
        return Tokens(ids, sizes[ids], np.array([len(each) for each in encoded]))

    return {
        "vocab_size": encoding.n_vocab,
        "encode": encoding.encode_ordinary,
        "decode": lambda ids: encoding.decode([int(i) for i in ids if i in shown]),
        "measure": measure,
        "cut": _cut(encoding.encode_ordinary),
    }


def _join_tiktoken(spec: str, path: str, content: bytes) -> bytes:
    """Takes pattern and special tokens from FILE.tiktoken.json, or from tiktoken's encoding with the name FILE."""
    try:
        ranks = {token.decode(): int(rank) for token, rank in (line.split() for line in content.splitlines() if line)}
    except ValueError:
        raise DataError(
            f"config.data.vocabulary = {spec!r}: not a tiktoken file, with a base64 token and its rank per line"
        ) from None
    name = os.path.basename(path)
    known = _companion(path, f"{name}.json") or _known_encoding(name[: -len(".tiktoken")])
    special = known.get("special_tokens", {})
    end = next((token for token in _ENDS if token in special), "")
    if not known.get("pat_str") or not end:
        accepted = f"a file of one of tiktoken's own encodings, or with a {name}.json next to it: "
        raise refused("data.vocabulary", spec, accepted + '{"pat_str": ..., "special_tokens": {"<|endoftext|>": ID}}')
    encoding = {"tiktoken": ranks, "pattern": known["pat_str"], "special": special}
    return _packed({**encoding, "begin": special[end], "end": special[end]})


def _known_encoding(name: str) -> dict:
    """The definition of one of tiktoken's encodings without its ranks, which tiktoken would download; {} if unknown."""
    try:
        from tiktoken_ext import openai_public
    except ImportError:
        return {}
    make = openai_public.ENCODING_CONSTRUCTORS.get(name)
    if make is None:
        return {}
    with (
        mock.patch.object(openai_public, "load_tiktoken_bpe", return_value={}),
        mock.patch.object(openai_public, "data_gym_to_mergeable_bpe_ranks", return_value={}),
    ):
        return make()


def _companion(path: str, name: str) -> dict:
    try:
        return stored.read(os.path.join(os.path.dirname(path), name), Companion)
    except FileNotFoundError:
        return {}


def _packed(value: dict) -> bytes:
    return json.dumps({key: value[key] for key in sorted(value)}, ensure_ascii=False, separators=(",", ":")).encode()
