"""SentencePiece models: ids, their source bytes, and training."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from steppe.data import files
from steppe.data.errors import DataError, refused
from steppe.data.vocabulary.tokenizer import PAD_ID, Tokenizer, Tokens

_WHITE = bytes.maketrans(b"\t\n\r", b"   ")  # a normaliser may turn these into blanks
_NEAR = 1 << 10  # search the last _NEAR bytes of a part first for a blank
_SPACE = "\u2581"  # SentencePiece's mark of a blank
_BLANK = re.compile(rb"[!-~] (?=[!-~])")  # a single blank that a normaliser cannot merge with its neighbours


def load(spec: str, model: bytes, kept: str = "") -> Tokenizer:
    """Loads a model from its bytes; kept: see `load_tokenizer`. Raises DataError for an invalid model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise DataError(f"config.data.vocabulary = {spec!r}: not a SentencePiece model ({error})") from error
    size, eos_id = processor.GetPieceSize(), processor.eos_id()
    if eos_id <= 0:
        raise DataError(f"config.data.vocabulary = {spec!r}: its end-of-sentence id is {eos_id}; it must be > 0")

    digest = hashlib.sha256(model).hexdigest()[:32]
    begin_id = PAD_ID
    if processor.pad_id() != PAD_ID and kept != f"sentencepiece-{digest}":
        begin_id = processor.bos_id() if processor.bos_id() >= 0 else eos_id
    # Old versions began texts with 0 for every model, so the fingerprint records another begin id.
    policy = "" if begin_id == PAD_ID else f"-begin{begin_id}"

    measure, cut = _measuring(processor)

    def decode(ids: Iterable[int]) -> str:
        return processor.DecodeIds([int(i) for i in ids if i not in (begin_id, eos_id)])

    return Tokenizer(
        spec=spec,
        fingerprint=f"sentencepiece-{digest}{policy}",
        vocab_size=size,
        begin_id=begin_id,
        eos_id=eos_id,
        encode=processor.EncodeAsIds,
        decode=decode,
        measure=measure,
        cut=cut,
    )


def model_of(content: bytes) -> Any:
    """The protocol buffer of a SentencePiece model. Its classes exist only after the import."""
    import sentencepiece.sentencepiece_model_pb2

    messages: Any = sentencepiece.sentencepiece_model_pb2
    return messages.ModelProto.FromString(content)


def _measuring(processor) -> tuple[Callable[[list[bytes]], Tokens], Callable[[bytes, int, int], int | None]]:
    """Tokenizer.measure, which aligns the tokens of a SentencePiece model with their source bytes, and Tokenizer.cut.

    The library's alignment costs several times the encoding. If normalisation only marks blanks, the lengths of pieces
    give the alignment. This holds for all texts with a vocabulary of Steppe, and for most plain prose with others.
    Otherwise the offsets of the library's normaliser give it. If the lengths do not add up, the library aligns.
    """
    import sentencepiece.sentencepiece_pb2

    messages: Any = sentencepiece.sentencepiece_pb2
    model = model_of(processor.serialized_model_proto())
    spec, kinds = model.normalizer_spec, model.SentencePiece
    unknown, mark = processor.unk_id(), _SPACE.encode()
    identity = not (spec.precompiled_charsmap or spec.add_dummy_prefix or spec.remove_extra_whitespaces)
    prefix = int(spec.add_dummy_prefix)
    normal_sizes = np.array([len(piece.piece.encode()) for piece in model.pieces])
    for number, piece in enumerate(model.pieces):
        if piece.type == kinds.BYTE:
            normal_sizes[number] = 1
        elif piece.type != kinds.NORMAL and piece.type != kinds.USER_DEFINED:
            normal_sizes[number] = 1 << 40  # so large that the sum cannot match
    sizes = normal_sizes - [
        piece.piece.count(_SPACE) * (len(mark) - 1) for piece in model.pieces
    ]  # a marked blank is one byte

    def unchanged(text: bytes) -> bool:
        """Whether normalisation only marks the blanks."""
        return identity or processor.Normalize(text) == mark * prefix + text.translate(_WHITE).replace(b" ", mark)

    def ends_of(text: bytes, ids: np.ndarray) -> np.ndarray:
        """The end of each token in the source bytes, for any text."""
        piece_sizes = normal_sizes[ids]
        if unknowns := np.flatnonzero(ids == unknown).tolist():
            pieces = processor.Encode(text, return_type=bytes)
            piece_sizes[unknowns] = [len(pieces[i]) for i in unknowns]
        normal, offsets = processor.Normalize(text, with_offsets=True)
        ends = np.cumsum(piece_sizes)
        if ends[-1] == len(normal):
            return np.array(offsets)[ends]
        parsed = messages.SentencePieceText.FromString(processor.Encode(text, return_type="serialized_proto"))
        return np.array([piece.end for piece in parsed.pieces])

    def measure(texts: list[bytes]) -> Tokens:
        encoded = processor.Encode(texts, return_type="numpy", num_threads=1)
        counts = np.array([len(ids) for ids in encoded])
        ids = np.concatenate([*encoded, np.zeros(0, np.int32)])
        edges, text_sizes = np.cumsum([0, *counts]), np.array([len(text) for text in texts])
        upto = np.concatenate([[0], np.cumsum(sizes[ids])])
        ends = upto[1:] - np.repeat(upto[edges[:-1]] + prefix, counts)
        sums = upto[edges[1:]] - upto[edges[:-1]] - prefix
        for number, text in enumerate(texts):
            part = slice(edges[number], edges[number + 1])
            if counts[number] and not (sums[number] == text_sizes[number] and unchanged(text)):
                ends[part] = ends_of(text, ids[part])
        last = edges[1:][counts > 0] - 1
        ends[last] = text_sizes[counts > 0]  # text that normalisation drops at the end belongs to the last token
        # The last of several pieces of a character gets all of its bytes.
        begins = np.repeat(np.cumsum(text_sizes) - text_sizes, counts)
        whole = np.frombuffer(b"".join(texts) + b"\0", np.uint8)
        for _ in range(3):
            ends -= (whole[ends + begins] & 0xC0) == 0x80
        lengths = np.diff(ends, prepend=0)
        first = edges[:-1][counts > 0]
        lengths[first] = ends[first]
        return Tokens(ids.astype(np.int32), lengths.astype(np.int32), counts)

    # No piece crosses a blank, so its two sides are encoded independently. A normaliser replaces the blank at the
    # beginning of a part by its own. (A unigram model sums float32 scores, so its choice between equally likely
    # segmentations, such as those of 99999, depends on the beginning of the part.)
    apart = identity or (spec.add_dummy_prefix and spec.remove_extra_whitespaces)
    apart = apart and not any(_SPACE in piece.piece.lstrip(_SPACE) for piece in model.pieces)

    def cut(text: bytes, start: int, end: int) -> int | None:
        if not apart:
            return None
        last = [*_BLANK.finditer(text, max(start, end - _NEAR), end)][-1:]
        place = last[0] if last else _BLANK.search(text, end)
        return place and place.start() + 1

    return measure, cut


def train_sentencepiece(
    documents: Iterable[str], path: str, size: int, model_type: str = "bpe", characters: int = 100_000_000
) -> Tokenizer:
    """Trains a lossless SentencePiece model on the first `characters` of `documents` and writes it to `path`.

    Ids 0, 1, 2 are padding, end of document and unknown, as seqio expects. Without normalisation and dummy prefix, and
    with byte fallback, decode(encode(text)) equals text. size: number of pieces, at least 300. Raises DataError.
    """
    import sentencepiece

    if size < 300:
        raise DataError(f"--size={size}: a vocabulary with byte fallback needs at least 300 pieces")
    if model_type not in ("bpe", "unigram"):
        raise refused("--model_type", model_type, "bpe or unigram")
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
    with open(path, "rb") as handle:
        return load(path, handle.read())


def _sentences(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Lines of the documents until `characters` are reached. Separate lines keep pieces from crossing line breaks."""
    given = 0
    for document in documents:
        for line in document.splitlines():
            if line.strip():
                given += len(line)
                yield line[: 1 << 14]
        if given >= characters:
            return
