"""Vocabularies: bytes, SentencePiece models, Hugging Face's tokenizer.json, tiktoken's ranks; and training of one.

Preparation, training, evaluation and generation share one `Tokenizer`, which never imports tensorflow. The first bytes
of a file decide its format. `hub.joined` merges a vocabulary of several files into one for the prepared directory.
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

    kept: the fingerprint of a prepared corpus; that of an older version of Steppe selects its behaviour.
    """
    if spec == "bytes":
        return byte.load()
    model = read_model(spec)
    return (hub if hub.is_joined(model) else pieces).load(spec, model, kept)


def read_model(spec: str) -> bytes:
    """The self-contained bytes of the vocabulary in file `spec`. Raises DataError."""
    path = os.path.expanduser(spec)
    try:
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        return hub.joined(spec, path, stored.content_of(path))
    except (OSError, stored.Wrong) as error:
        reason = getattr(error, "strerror", None) or error
        accepted = f'"bytes" or the path of a SentencePiece model, a tokenizer.json or a .tiktoken file ({reason})'
        raise refused("data.vocabulary", spec, accepted) from error
