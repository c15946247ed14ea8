"""Reference losses of a held-out set: a unigram model and a compressor."""

import gzip
import math

import numpy as np

from steppe.data.loader import Corpus, rows_in_order

NAMES = {"unigram": "unigram", "gzip": "gzip -9"}  # references and their labels
SAMPLE_ROWS = 20_000  # most training rows per source for the unigram counts


def token_counts(corpus: Corpus, vocabulary: int) -> np.ndarray:
    """Counts [vocabulary] of each token as a target in the first SAMPLE_ROWS of each training source."""
    counts = np.zeros(vocabulary, np.int64)
    for part in corpus.train:
        for start in range(0, min(part.rows, SAMPLE_ROWS), 1000):
            batch = rows_in_order(corpus, part, start, min(part.rows, SAMPLE_ROWS, start + 1000))
            counts += np.bincount(batch["targets"][batch["weights"] > 0], minlength=vocabulary)
    return counts


def baselines(corpus: Corpus, name: str, counts: np.ndarray, sample_bytes: int = 8 << 20) -> dict[str, float]:
    """Bits per byte of held-out set `name` (its first sample_bytes) under two references.

    unigram: add-one-smoothed token frequencies from `counts`. gzip: gzip -9 of the decoded text, per byte of the
    source; a lossy vocabulary decodes to a different text.
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
