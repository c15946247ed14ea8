"""The byte vocabulary, equal to seqio's ByteVocabulary and that of ByT5."""

from collections.abc import Iterable

import numpy as np

from steppe.data.vocabulary.tokenizer import PAD_ID, Tokenizer, Tokens

BYTE_OFFSET = 3  # 0 padding, 1 end of document, 2 unknown, then the 256 bytes


def _encode_bytes(text: str) -> list[int]:
    return [byte + BYTE_OFFSET for byte in text.encode("utf-8")]


def _decode_bytes(ids: Iterable[int]) -> str:
    content = bytes(int(i) - BYTE_OFFSET for i in ids if BYTE_OFFSET <= i < 256 + BYTE_OFFSET)
    return content.decode("utf-8", errors="ignore")  # like seqio, drops a character cut at the end of a row


def _measure_bytes(texts: list[bytes]) -> Tokens:
    ids = np.frombuffer(texts[0] if len(texts) == 1 else b"".join(texts), np.uint8).astype(np.uint16)
    ids += BYTE_OFFSET
    return Tokens(ids, np.ones(len(ids), np.uint8), np.array([len(text) for text in texts]))


BYTES = Tokenizer(
    spec="bytes",
    fingerprint="bytes",
    vocab_size=256 + BYTE_OFFSET,
    begin_id=PAD_ID,
    eos_id=1,
    encode=_encode_bytes,
    decode=_decode_bytes,
    measure=_measure_bytes,
    cut=lambda text, start, end: end,
)
