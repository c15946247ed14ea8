"""Finds texts on which an exported tokenizer gives other ids than the run's, among texts made to provoke that."""

import json
import random
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steppe.data.loader import Corpus, held_out_rows, training_rows
from steppe.data.vocabulary import Tokenizer
from steppe.lm.keep.exits import Unusable

JOINED = 5000  # texts joined from several parts, in addition to every single token
LOOKED_AT = 256  # corpus rows in which control strings are counted
_BLANKS = (" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\v", "\f", "\x85", "\u00a0", "\u2003", "\u2028", "\u3000")
_ODD = ("\0", "\x1b", "\x7f", "\u00ad", "\u0301", "\u200b", "\u200d", "\u2581", "\ufeff", "\ufffd", "\u202e", "\ufb01")
_PLANES = ((0x20, 0x7F), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0x20000, 0x110000))


class Found(NamedTuple):
    """How many texts were compared, and how many have other ids, by reason: a control string that is not text in the
    export, an equally likely segmentation, other normal combining marks. other: the rest, shortest first."""

    texts: int
    control: int = 0
    ties: int = 0
    normal: int = 0
    other: tuple[str, ...] = ()


def said(folder: Path, corpus: Corpus) -> str:
    """A summary of how the tokenizer in `folder`, loaded as its users load it, agrees with the run's.

    Raises Unusable, with the shortest text, if it gives other ids for no known reason.
    """
    from transformers import AutoTokenizer

    made = json.loads((folder / "tokenizer.json").read_text())
    theirs, ours = AutoTokenizer.from_pretrained(str(folder)), corpus.tokenizer
    control = {token["content"]: token["id"] for token in made["added_tokens"] if token["special"]}

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return theirs(list(texts), verbose=False)["input_ids"]

    found = compare(ours, ids, control, scores_of(made), normalisers(folder, theirs))
    if found.other:
        text = _shortest(ours, ids, found.other[0])
        got, wanted = ids([text])[0], [ours.begin_id, *ours.encode(text)]
        raise Unusable(
            f"the exported tokenizer differs from the run's: {text!a} is {got[:12]}, and {wanted[:12]} in the run "
            f"({len(found.other):,} of {found.texts:,} texts)"
        )
    words = [f"ids equal the run's on {found.texts - sum(found[1:4]):,} of {found.texts:,} difficult texts"]
    if found.ties:
        words.append(f"on {found.ties:,} another segmentation is equally likely")
    if found.normal:
        words.append(f"on {found.normal:,} the tokenizers library normalises combining marks differently")
    if found.control:
        times, rows = _times(corpus, control)
        words.append(f"on {found.control:,} a control string is not text; it occurs {times:,} times in {rows:,} rows")
    return "; ".join(words)


def compare(
    ours: Tokenizer,
    theirs: Callable[[Sequence[str]], list[list[int]]],
    control: Mapping[str, int],
    scores: Sequence[float] = (),
    normalised: Callable[[str], tuple[str, str]] | None = None,
) -> Found:
    """Compares ids on `hostile` texts.

    theirs(texts): ids of each, including the begin token. control: {string: id}. scores: of a unigram's pieces.
    normalised(text): the text as the run's library and as theirs normalises it.
    """
    texts = list(hostile(ours, list(control)))
    counts, other = dict.fromkeys(("control", "ties", "normal"), 0), []
    for text, got in zip(texts, theirs(texts), strict=True):
        wanted = [ours.begin_id, *ours.encode(text)]
        if got == wanted:
            continue
        if any(number in got[1:] and number not in wanted[1:] for number in control.values()):
            counts["control"] += 1
        elif scores and got[:1] == wanted[:1] and _as_likely(scores, got, wanted):
            counts["ties"] += 1
        elif normalised and any(map(_joins, text)) and len(set(normalised(text))) > 1:
            counts["normal"] += 1
        else:
            other.append(text)
    return Found(len(texts), **counts, other=tuple(sorted(other, key=len)))


def _joins(character: str) -> bool:
    """Whether a character combines with the one before it, or is SentencePiece's mark for blanks."""
    return character == "\u2581" or unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")


def normalisers(folder: Path, theirs: Any) -> Callable[[str], tuple[str, str]] | None:
    """normalised(text) of SentencePiece and of tokenizers; None if `folder` has no SentencePiece model."""
    if not (folder / "tokenizer.model").exists():
        return None
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    normalizer = theirs.backend_tokenizer.normalizer
    return lambda text: (processor.Normalize(text), normalizer.normalize_str(text))


def hostile(tokenizer: Tokenizer, control: Sequence[str], joined: int = JOINED, seed: int = 0) -> Iterator[str]:
    """Every token and control string as text, alone and within words; then random joins of these with blanks,
    characters that normalisers change, and code points of all planes."""
    pieces = [tokenizer.decode([number]) for number in range(tokenizer.vocab_size)]
    pieces = [piece for piece in dict.fromkeys(pieces) if piece]
    yield from (*pieces, *control, "", *_BLANKS, *_ODD)
    for string in control:
        yield from (f"a{string}b", f" {string} ", string + string, string[:-1], string[1:])
    drawn = random.Random(seed)

    def part() -> str:
        kind = drawn.random()
        if kind < 0.5:
            return drawn.choice(pieces)
        if kind < 0.7:
            return drawn.choice(_BLANKS)
        if kind < 0.75 and control:
            return drawn.choice(control)
        if kind < 0.8:
            return drawn.choice(_ODD)
        if kind < 0.85:
            return drawn.choice(pieces)[:2] * drawn.randint(2, 9)
        return "".join(chr(drawn.randrange(*drawn.choice(_PLANES))) for _ in range(drawn.randint(1, 4)))

    for _ in range(joined):
        yield "".join(part() for _ in range(drawn.randint(2, 8)))


def scores_of(made: Mapping[str, Any]) -> list[float]:
    model = made["model"]
    return [score for _, score in model["vocab"]] if model["type"] == "Unigram" else []


def _as_likely(scores: Sequence[float], got: Sequence[int], wanted: Sequence[int]) -> bool:
    sums = [sum(scores[number] for number in ids) for ids in (got, wanted)]
    return abs(sums[0] - sums[1]) <= 1e-6 * abs(sums[1])  # they sum in float32, this in float64


def _shortest(ours: Tokenizer, ids: Callable, text: str) -> str:
    """A text that still differs, but no longer does if any one character is removed."""
    while True:
        less = [text[:at] + text[at + 1 :] for at in range(len(text))]
        pairs = zip(less, ids(less) if less else (), strict=True)
        shorter = next((each for each, got in pairs if got != [ours.begin_id, *ours.encode(each)]), None)
        if shorter is None:
            return text
        text = shorter


def _times(corpus: Corpus, control: Iterable[str]) -> tuple[int, int]:
    """(occurrences of control strings in the text of some rows, number of rows)."""
    batches = [held_out_rows(corpus, name, 0, LOOKED_AT) for name in corpus.held_out]
    if corpus.train:
        batches.append(training_rows(corpus, 0, 0, LOOKED_AT))
    texts = [
        corpus.tokenizer.decode(targets[weights > 0].tolist())
        for batch in batches
        for targets, weights in zip(batch["targets"], np.asarray(batch["weights"]), strict=True)
        if weights.any()
    ]
    return sum(text.count(string) for text in texts for string in control), len(texts)
