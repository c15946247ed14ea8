"""The interface of a vocabulary: text to ids and back, and the source bytes of each id."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

PAD_ID = 0  # pads rows, and is not a target there
PART = 1 << 15  # long texts are tokenised in parts of about this many bytes, if the vocabulary allows it


class Tokens(NamedTuple):
    """Tokens of several texts: ids [n], number of source bytes [n] of each id, number of ids [texts] of each text."""

    ids: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray


class Tokenizer(NamedTuple):
    """Converts between text and ids. `decode` drops padding and end-of-document ids.

    measure(texts): the Tokens of UTF-8 texts. cut(text, start, end): a place near or after `end` at which the rest of
    the text from `start` may be cut without a change of its tokens, None if there is none. begin_id begins every
    stream, eos_id ends every document.
    """

    spec: str
    fingerprint: str  # equal for two tokenizers exactly if they give the same ids
    vocab_size: int
    begin_id: int
    eos_id: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Iterable[int]], str]
    measure: Callable[[list[bytes]], Tokens]
    cut: Callable[[bytes, int, int], int | None] = lambda text, start, end: None

    def cuts(self, text: bytes) -> Iterator[bytes]:
        """Parts of the text whose concatenated tokens are those of the whole text."""
        start = 0
        while len(text) - start > PART and (place := self.cut(text, start, start + PART)):
            yield text[start:place]
            start = place
        yield text[start:]
