"""SentencePiece models: ids, their source bytes, and training one."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from steppe.data import files
from steppe.data.errors import DataError
from steppe.data.vocabulary.tokenizer import PAD_ID, PART, Tokenizer, Tokens

_WHITE = bytes.maketrans(b"\t\n\r", b"   ")  # what a normaliser may take for blanks
_NEAR = 1 << 10  # how far before the end of a part a blank is looked for first
_SPACE = "\u2581"  # SentencePiece's mark of a blank
_BLANK = re.compile(rb"[!-~] (?=[!-~])")  # a single one, nothing near it that a normaliser could join to it


def load(spec: str, model: bytes, kept: str = "") -> Tokenizer:
    """The vocabulary of a model's bytes; kept: as `load_tokenizer`. DataError where they are none."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise DataError(f"config.data.vocabulary={spec!r}: not a SentencePiece model ({error})") from error
    size, eos_id = processor.GetPieceSize(), processor.eos_id()
    if eos_id <= 0:
        raise DataError(f"config.data.vocabulary={spec!r}: its end-of-sentence id is {eos_id}; a positive id is needed")

    digest = hashlib.sha256(model).hexdigest()[:32]
    begin_id = PAD_ID
    if processor.pad_id() != PAD_ID and kept != f"sentencepiece-{digest}":
        begin_id = processor.bos_id() if processor.bos_id() >= 0 else eos_id
    # Models without padding at 0 once began with 0 too, whatever it is in them: such corpora are others.
    policy = "" if begin_id == PAD_ID else f"-begin{begin_id}"

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
        **_measuring(processor)._asdict(),
    )


class _Measuring(NamedTuple):
    measure: Callable[[list[bytes]], Tokens]
    cuts: Callable[[bytes], Iterator[bytes]]


def model_of(content: bytes) -> Any:
    """The protocol buffer of a SentencePiece model, whose classes come to be when it is imported."""
    import sentencepiece.sentencepiece_model_pb2

    messages: Any = sentencepiece.sentencepiece_model_pb2
    return messages.ModelProto.FromString(content)


def _measuring(processor) -> _Measuring:
    """How a SentencePiece model's tokens are aligned with the bytes of their source.

    The library's own alignment costs several times what encoding does. Where normalisation leaves a text as it is, but
    for marking its blanks, pieces alone say where they end: in all texts with a vocabulary of our own, in most of plain
    prose with others. Elsewhere the library's normaliser says where a place of the normalised text lies in the source;
    and where even that sum does not come out, the library aligns.
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
            normal_sizes[number] = 1 << 40  # never part of a sum that comes out
    sizes = normal_sizes - [piece.piece.count(_SPACE) * (len(mark) - 1) for piece in model.pieces]  # blanks as blanks

    def unchanged(text: bytes) -> bool:
        """Whether normalisation does no more than mark the blanks."""
        return identity or processor.Normalize(text) == mark * prefix + text.translate(_WHITE).replace(b" ", mark)

    def ends_of(text: bytes, ids: np.ndarray) -> np.ndarray:
        """Where in any text each of its tokens ends."""
        behind = normal_sizes[ids]
        if places := np.flatnonzero(ids == unknown).tolist():
            pieces = processor.Encode(text, return_type=bytes)
            behind[places] = [len(pieces[i]) for i in places]
        normal, places = processor.Normalize(text, with_offsets=True)
        ends = np.cumsum(behind)
        if ends[-1] == len(normal):
            return np.array(places)[ends]
        parsed = messages.SentencePieceText.FromString(processor.Encode(text, return_type="serialized_proto"))
        return np.array([piece.end for piece in parsed.pieces])

    def measure(texts: list[bytes]) -> Tokens:
        found = processor.Encode(texts, return_type="numpy", num_threads=1)
        counts = np.array([len(ids) for ids in found])
        ids = np.concatenate([*found, np.zeros(0, np.int32)])
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
        # Of a character in several pieces, the last stands for all of its bytes.
        begins = np.repeat(np.cumsum(text_sizes) - text_sizes, counts)
        whole = np.frombuffer(b"".join(texts) + b"\0", np.uint8)
        for _ in range(3):
            ends -= (whole[ends + begins] & 0xC0) == 0x80
        lengths = np.diff(ends, prepend=0)
        first = edges[:-1][counts > 0]
        lengths[first] = ends[first]
        return Tokens(ids.astype(np.int32), lengths.astype(np.int32), counts)

    # No piece goes on over a blank, so what is on its two sides is encoded apart. A normaliser takes away the blank
    # that a part begins with, and puts its own there. (A unigram model adds up float32 scores, so which of equally
    # likely segmentations it takes, of 99999 for one, depends on where it begins.)
    apart = identity or (spec.add_dummy_prefix and spec.remove_extra_whitespaces)
    apart = apart and not any(_SPACE in piece.piece.lstrip(_SPACE) for piece in model.pieces)

    def cuts(text: bytes) -> Iterator[bytes]:
        start = 0
        while apart and len(text) - start > PART:
            last = [*_BLANK.finditer(text, max(start, start + PART - _NEAR), start + PART)][-1:]
            place = last[0] if last else _BLANK.search(text, start + PART)
            if not place:
                break
            yield text[start : place.start() + 1]
            start = place.start() + 1
        yield text[start:]

    return _Measuring(measure, cuts)


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
    with open(path, "rb") as handle:
        return load(path, handle.read())


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
