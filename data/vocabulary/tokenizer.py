"""What a vocabulary is to the rest of Steppe: text to ids and back, and the source bytes behind each id."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

PAD_ID = 0  # fills rows, and is never a target there
PART = 1 << 15  # bytes of a long text that are tokenised at a time, where the vocabulary allows it


class Tokens(NamedTuple):
    """Several texts as tokens: ids [n], the source bytes [n] behind each id, and how many ids [texts] each text has."""

    ids: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray


class Tokenizer(NamedTuple):
    """Text <-> ids. `decode` drops padding and end-of-document ids; it is lossless where the vocabulary is.

    measure(texts): the Tokens of UTF-8 texts. cuts(text): the text in parts of which the tokens, one after the other,
    are those of the whole. begin_id begins every stream, eos_id ends every document.
    """

    spec: str
    fingerprint: str  # equal for two tokenizers exactly if they give the same ids
    vocab_size: int
    begin_id: int
    eos_id: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Iterable[int]], str]
    measure: Callable[[list[bytes]], Tokens]
    cuts: Callable[[bytes], Iterator[bytes]]
