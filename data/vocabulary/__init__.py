"""Vocabularies: bytes, SentencePiece models, Hugging Face's tokenizer.json, tiktoken's ranks; and training one.

Preparation, training, evaluation and generation share one `Tokenizer`, which never imports tensorflow. What a file is,
its first bytes say. One of several files becomes one (`hub.joined`), which is what lies in a prepared directory.
"""

import os

from steppe.data import stored
from steppe.data.errors import refused
from steppe.data.vocabulary import byte, hub, pieces
from steppe.data.vocabulary.pieces import train_sentencepiece
from steppe.data.vocabulary.tokenizer import PART, Tokenizer, Tokens

__all__ = ["PART", "Tokenizer", "Tokens", "load_tokenizer", "read_model", "train_sentencepiece"]


def load_tokenizer(spec: str, kept: str = "") -> Tokenizer:
    """Loads `spec`: "bytes", or the path of a SentencePiece model, a tokenizer.json or a .tiktoken file.

    kept: the fingerprint under which a corpus was prepared; one of before text was text loads what it was then.
    """
    if spec == "bytes":
        return byte.load()
    model = read_model(spec)
    return (hub if hub.is_joined(model) else pieces).load(spec, model, kept)


def read_model(spec: str) -> bytes:
    """Bytes of the vocabulary in file `spec`, complete in themselves."""
    path = os.path.expanduser(spec)
    try:
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        return hub.joined(spec, path, stored.content_of(path))
    except (OSError, stored.Wrong) as error:
        reason = getattr(error, "strerror", None) or error
        accepted = f'"bytes" or the path of a SentencePiece model, a tokenizer.json or a .tiktoken file ({reason})'
        raise refused("data.vocabulary", spec, accepted) from error
