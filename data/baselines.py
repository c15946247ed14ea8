"""What a model without context, and a compressor, make of a held-out set: numbers to read a loss against."""

import gzip
import math

import numpy as np

from steppe.data.loader import Corpus, rows_in_order

NAMES = {"unigram": "unigram", "gzip": "gzip -9"}  # of the references, and as they are shown
SAMPLE_ROWS = 20_000  # training rows that the unigram counts come from, at most


def token_counts(corpus: Corpus, vocabulary: int) -> np.ndarray:
    """How often each token is a target in (the first SAMPLE_ROWS of each source of) the training text: [vocabulary]."""
    counts = np.zeros(vocabulary, np.int64)
    for part in corpus.train:
        for start in range(0, min(part.rows, SAMPLE_ROWS), 1000):
            batch = rows_in_order(corpus, part, start, min(part.rows, SAMPLE_ROWS, start + 1000))
            counts += np.bincount(batch["targets"][batch["weights"] > 0], minlength=vocabulary)
    return counts


def baselines(corpus: Corpus, name: str, counts: np.ndarray, sample_bytes: int = 8 << 20) -> dict[str, float]:
    """Bits per byte of held-out set `name` (its first sample_bytes) under two references.

    unigram: the add-one-smoothed token frequencies `counts` of the training text. gzip: gzip -9 of the decoded
    text, per byte of the source, which a lossy vocabulary does not give back whole.
    """
    part = corpus.held_out[name]
    rows = max(1, min(part.rows, part.rows * sample_bytes // max(1, part.bytes)))
    batch = rows_in_order(corpus, part, 0, rows)
    targets = batch["targets"][batch["weights"] > 0]
    size = int(batch["bytes"].sum())
    frequency = (counts + 1) / (counts + 1).sum()
    text = corpus.tokenizer.decode([int(t) for t in targets if t != corpus.tokenizer.eos_id]).encode()
    return {
        "unigram": float(-np.log2(frequency[targets]).sum() / size),
        "gzip": 8 * len(gzip.compress(text, 9)) / size,
        "nats_per_bit_per_byte": size * math.log(2) / len(targets),
    }
