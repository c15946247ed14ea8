"""Vocabularies: bytes, SentencePiece models, Hugging Face's tokenizer.json, tiktoken's ranks; and training of one.

Preparation, training, evaluation and generation share one `Tokenizer`, which never imports tensorflow. The first bytes
of a file decide its format. `hub.joined` merges a vocabulary of several files into one for the prepared directory.
"""

import os
import re

from steppe.data import huggingface, stored
from steppe.data.errors import refused
from steppe.data.vocabulary import byte, hub, pieces
from steppe.data.vocabulary.pieces import train_sentencepiece
from steppe.data.vocabulary.tokenizer import PART, Tokenizer, Tokens

ACCEPTED = '"bytes", hf:OWNER/NAME, or the path of a SentencePiece model, a tokenizer.json or a .tiktoken file'
__all__ = ["PART", "Tokenizer", "Tokens", "load_tokenizer", "read_model", "train_sentencepiece"]


def load_tokenizer(spec: str, kept: str = "") -> Tokenizer:
    """Loads `spec`: "bytes", hf:OWNER/NAME, or the path of a SentencePiece model, a tokenizer.json or a .tiktoken file.

    kept: the fingerprint of a prepared corpus; that of an older version of Steppe selects its behaviour.
    """
    if spec == "bytes":
        return byte.BYTES
    model = read_model(spec)
    return (hub if hub.is_joined(model) else pieces).load(spec, model, kept)


def read_model(spec: str) -> bytes:
    """The self-contained bytes of the vocabulary in file `spec`, or of hf:OWNER/NAME. Raises DataError."""
    path = os.path.expanduser(spec)
    try:
        if spec.startswith("hf:"):
            path = _published(spec)
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        return hub.joined(spec, path, stored.content_of(path))
    except (OSError, stored.Wrong) as error:
        reason = getattr(error, "strerror", None) or error
        raise refused("data.vocabulary", spec, f"{ACCEPTED} ({reason})") from error


_PUBLISHED = re.compile(rf"hf:({huggingface.NAME})(?:/([^:]+))?(?::(.+))?")
_NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def _published(spec: str) -> str:
    """The local path of the vocabulary of a model on the Hugging Face hub, next to the files that `joined` reads."""
    match = _PUBLISHED.fullmatch(spec)
    if not match:
        raise refused("data.vocabulary", spec, "hf:OWNER/NAME[/FILE][:REVISION]")
    repository = huggingface.Repository("model", match[1], match[3] or "main")
    listing = huggingface.listed(repository)
    known = {file["path"]: file for file in listing["files"]}
    name = match[2] or next((name for name in _NAMES if name in known), "")
    if name not in known:
        models = [path for path in known if path.endswith((".json", ".model", ".tiktoken"))][:20]
        named = f"hf:{match[1]}/FILE with FILE one of {', '.join(models)}"
        raise refused("data.vocabulary", spec, named if models else f"a repository with {' or '.join(_NAMES)}")
    folder = os.path.dirname(name)
    for companion in [os.path.join(folder, each) for each in hub.COMPANIONS] + [f"{name}.json"]:
        if companion in known:
            huggingface.fetched(repository, listing["commit"], known[companion])
    return huggingface.fetched(repository, listing["commit"], known[name])
