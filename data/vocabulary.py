"""Vocabularies: bytes, a SentencePiece file, and training one.

Preparation, training, evaluation and generation share one `Tokenizer`, which never imports tensorflow; it gives the ids
of the seqio vocabulary that preparation's tasks declare. Id 0 begins every stream and fills padding, `eos_id` ends a
document.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from steppe.data import files
from steppe.data.errors import DataError

PAD_ID = 0
BYTE_OFFSET = 3  # seqio.ByteVocabulary: 0 padding, 1 end of document, 2 unknown, then the 256 bytes


class Tokenizer(NamedTuple):
    """Text <-> ids. `decode` drops padding and end-of-document ids; it is lossless where the vocabulary is."""

    spec: str
    fingerprint: str  # equal for two tokenizers exactly if they give the same ids
    vocab_size: int
    pad_id: int
    eos_id: int
    encode: Callable[[str], list[int]]
    decode: Callable[[Iterable[int]], str]
    measure: Callable[[bytes], tuple[np.ndarray, np.ndarray]]  # UTF-8 -> ids [n], bytes behind each id [n], int32


def load_tokenizer(spec: str) -> Tokenizer:
    """Loads `spec`, "bytes" or the path of a SentencePiece model, without tensorflow."""
    if spec == "bytes":
        return Tokenizer(
            spec=spec,
            fingerprint=spec,
            vocab_size=256 + BYTE_OFFSET,
            pad_id=PAD_ID,
            eos_id=1,
            encode=_encode_bytes,
            decode=_decode_bytes,
            measure=_measure_bytes,
        )
    model = read_model(spec)
    import sentencepiece
    from sentencepiece import sentencepiece_pb2

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise DataError(f"config.data.vocabulary={spec!r}: not a SentencePiece model ({error})") from error
    size, eos_id = processor.GetPieceSize(), processor.eos_id()
    if eos_id <= 0:
        raise DataError(f"config.data.vocabulary={spec!r}: its end-of-sentence id is {eos_id}; a positive id is needed")

    def decode(ids: Iterable[int]) -> str:
        return processor.DecodeIds([int(i) for i in ids if i not in (PAD_ID, eos_id)])

    def measure(text: bytes) -> tuple[np.ndarray, np.ndarray]:
        parsed = sentencepiece_pb2.SentencePieceText.FromString(
            processor.Encode(text.decode("utf-8"), out_type="serialized_proto")
        )
        pairs = np.array([(piece.id, piece.end) for piece in parsed.pieces], np.int32).reshape(-1, 2)
        ids, ends = np.ascontiguousarray(pairs[:, 0]), pairs[:, 1]
        if len(ends):  # text that normalisation drops at the end belongs to the last token
            ends[-1] = len(text)
        return ids, np.diff(ends, prepend=np.int32(0))

    digest = hashlib.sha256(model).hexdigest()[:32]
    return Tokenizer(
        spec=spec,
        fingerprint=f"sentencepiece-{digest}",
        vocab_size=size,
        pad_id=PAD_ID,
        eos_id=eos_id,
        encode=processor.EncodeAsIds,
        decode=decode,
        measure=measure,
    )


def _encode_bytes(text: str) -> list[int]:
    return [byte + BYTE_OFFSET for byte in text.encode("utf-8")]


def _decode_bytes(ids: Iterable[int]) -> str:
    kept = bytes(int(i) - BYTE_OFFSET for i in ids if BYTE_OFFSET <= i < 256 + BYTE_OFFSET)
    return kept.decode("utf-8", errors="ignore")  # as seqio: a character cut at a row's end is dropped


def _measure_bytes(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    ids = np.frombuffer(text, np.uint8).astype(np.int32) + BYTE_OFFSET
    return ids, np.ones_like(ids)


def read_model(spec: str) -> bytes:
    """Bytes of the SentencePiece file `spec`."""
    try:
        with open(os.path.expanduser(spec), "rb") as handle:
            return handle.read()
    except OSError as error:
        accepted = 'accepted: "bytes" or the path of a SentencePiece model'
        raise DataError(f"config.data.vocabulary={spec!r}: {error.strerror or error}; {accepted}") from error


def seqio_vocabulary(spec: str):
    """The seqio vocabulary whose ids `load_tokenizer(spec)` gives. Imports tensorflow."""
    import seqio

    if spec == "bytes":
        return seqio.ByteVocabulary()
    return seqio.SentencePieceVocabulary(os.path.expanduser(spec), extra_ids=0)


def train_sentencepiece(
    documents: Iterable[str], path: str, size: int, model_type: str = "bpe", characters: int = 100_000_000
) -> Tokenizer:
    """Trains a lossless SentencePiece model on the first `characters` of `documents` and writes it to `path`.

    Ids 0, 1, 2 are padding, end of document and unknown, as seqio expects. No normalisation, no dummy prefix and byte
    fallback: decode(encode(text)) is text. `size` counts all pieces, and so must exceed 256 bytes + 3.
    """
    import sentencepiece

    if size < 300:
        raise DataError(f"--size={size}: a vocabulary with byte fallback needs at least 300 pieces")
    if model_type not in ("bpe", "unigram"):
        raise DataError(f"--model_type={model_type!r}: accepted are bpe and unigram")
    try:
        with files.replacing(path) as aside, open(aside, "wb") as handle:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(documents, characters),
                model_writer=handle,
                vocab_size=size,
                model_type=model_type,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                byte_fallback=True,
                character_coverage=0.9999,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                max_sentence_length=1 << 16,
                hard_vocab_limit=model_type == "bpe",
                minloglevel=2,
            )
    except RuntimeError as error:
        raise DataError(f"--size={size}: SentencePiece refuses: {' '.join(str(error).split())}") from error
    return load_tokenizer(path)


def _sentences(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Lines of the documents, in order, until `characters` were given. Pieces never span a line break then."""
    given = 0
    for document in documents:
        for line in document.splitlines():
            if line.strip():
                given += len(line)
                yield line[: 1 << 14]
        if given >= characters:
            return
