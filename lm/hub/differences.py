"""Where an exported tokenizer gives other ids than its run: looked for on text that aims at differences."""

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

JOINED = 5000  # texts of several parts, beside every token alone
LOOKED_AT = 256  # rows of the corpus in which control strings are counted
_BLANKS = (" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\v", "\f", "\x85", "\u00a0", "\u2003", "\u2028", "\u3000")
_ODD = ("\0", "\x1b", "\x7f", "\u00ad", "\u0301", "\u200b", "\u200d", "\u2581", "\ufeff", "\ufffd", "\u202e", "\ufb01")
_PLANES = ((0x20, 0x7F), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0x20000, 0x110000))


class Found(NamedTuple):
    """How many texts were compared, and how many of them have other ids for a reason.

    control: a control string is no text there. ties: another segmentation that is as likely. normal: the library
    normalises characters with marks after them in another way. other: for no reason that is known, shortest first.
    """

    texts: int
    control: int = 0
    ties: int = 0
    normal: int = 0
    other: tuple[str, ...] = ()


def said(folder: Path, corpus: Corpus) -> str:
    """What is to be said of the tokenizer in `folder`, loaded as its users load it.

    Unusable, with the shortest text, where it gives other ids than the run for no reason that is known.
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
    words = [f"ids are the run's on {found.texts - sum(found[1:4]):,} of {found.texts:,} hostile texts"]
    if found.ties:
        words.append(f"on {found.ties:,} another segmentation is as likely")
    if found.normal:
        words.append(f"on {found.normal:,} tokenizers normalises a character and its marks in another way")
    if found.control:
        times, rows = _times(corpus, control)
        words.append(f"on {found.control:,} a control string is no text there; it is {times:,} times in {rows:,} rows")
    return "; ".join(words)


def compare(
    ours: Tokenizer,
    theirs: Callable[[Sequence[str]], list[list[int]]],
    control: Mapping[str, int],
    scores: Sequence[float] = (),
    normalised: Callable[[str], tuple[str, str]] | None = None,
) -> Found:
    """Compares ids on `hostile` texts.

    theirs(texts): ids of each, with what begins it. control: {string: id}. scores: of a unigram's pieces.
    normalised(text): as the run's library and theirs normalise it.
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
    """Whether a character is part of the one before it, or the mark that SentencePiece has for blanks."""
    return character == "\u2581" or unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")


def normalisers(folder: Path, theirs: Any) -> Callable[[str], tuple[str, str]] | None:
    """normalised(text) of SentencePiece and of tokenizers, where the former's model lies in `folder`."""
    if not (folder / "tokenizer.model").exists():
        return None
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    normalizer = theirs.backend_tokenizer.normalizer
    return lambda text: (processor.Normalize(text), normalizer.normalize_str(text))


def hostile(tokenizer: Tokenizer, control: Sequence[str], joined: int = JOINED, seed: int = 0) -> Iterator[str]:
    """Every token as text and every control string, alone and within words; then random joins of these, of blanks,
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
    return abs(sums[0] - sums[1]) <= 1e-6 * abs(sums[1])  # float32 sums there, float64 here


def _shortest(ours: Tokenizer, ids: Callable, text: str) -> str:
    """A text that still differs, and no longer does with any one character less."""
    while True:
        less = [text[:at] + text[at + 1 :] for at in range(len(text))]
        pairs = zip(less, ids(less) if less else (), strict=True)
        shorter = next((each for each, got in pairs if got != [ours.begin_id, *ours.encode(each)]), None)
        if shorter is None:
            return text
        text = shorter


def _times(corpus: Corpus, control: Iterable[str]) -> tuple[int, int]:
    """(how often control strings stand in the text of some rows, how many rows)."""
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
