"""Packing: every token is predicted once, in its own context, and its source bytes are counted once."""

from itertools import pairwise

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steppe.data.packing import WINDOW, Documents, rows, to_batch, to_record

EOS = 1


def documents_of(lengths, seed=0):
    """Documents of these lengths before the end-of-document id; every id occurs once, each stands for id % 4 bytes."""
    made, next_id = [], 10
    for length in lengths:
        ids = np.arange(next_id, next_id + length)
        next_id += length
        made.append(document(np.append(ids, EOS), np.append(ids % 4, 0)))
    return made


def document(ids, lengths):
    return Documents(ids, lengths, np.array([len(ids)]))


def regrouped(documents, cuts):
    """The same documents, several together and some in parts, cut at these places of the whole."""
    ids, lengths = (np.concatenate([getattr(each, name) for each in documents]) for name in ("ids", "lengths"))
    ends = np.cumsum([len(each.ids) for each in documents])
    places = [0, *sorted({cut % (len(ids) + 1) for cut in cuts} - {0, len(ids)}), len(ids)]
    for start, stop in pairwise(places):
        yield Documents(ids[start:stop], lengths[start:stop], ends[(ends > start) & (ends <= stop)] - start)


def batch_of(documents, packing, length, dtype="uint32"):
    return to_batch([to_record(row, dtype) for row in rows(documents, packing, length)], dtype, packing, length)


def predicted(batch):
    """[(input, target)] of all positions with weight, row by row."""
    used = batch["weights"] > 0
    return list(zip(batch["inputs"][used].tolist(), batch["targets"][used].tolist(), strict=True))


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_concat_predicts_the_stream_token_by_token(lengths, length):
    documents = documents_of(lengths)
    stream = np.concatenate([document.ids for document in documents])
    batch = batch_of(documents, "concat", length)
    assert predicted(batch) == list(zip([0, *stream[:-1].tolist()], stream.tolist(), strict=True))
    assert "segments" not in batch
    # Only the last row may be short, and its padding is at its end.
    assert batch["weights"].sum() == len(stream)
    assert (np.diff(batch["weights"]) <= 0).all()
    assert (batch["weights"][:-1] == 1).all()
    assert batch["bytes"].sum() == sum(document.lengths.sum() for document in documents)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_bestfit_keeps_documents_apart(lengths, length):
    documents = documents_of(lengths)
    batch = batch_of(documents, "bestfit", length)
    expected = [
        pair
        for document in documents
        for pair in zip([0, *document.ids[:-1].tolist()], document.ids.tolist(), strict=True)
    ]
    assert sorted(predicted(batch)) == sorted(expected)
    assert ((batch["segments"] > 0) == (batch["weights"] > 0)).all()
    owner = {int(i): number for number, document in enumerate(documents) for i in document.ids if i != EOS}
    for r in range(len(batch["targets"])):
        for segment in range(1, batch["segments"][r].max() + 1):
            inside = batch["segments"][r] == segment
            targets = batch["targets"][r][inside]
            assert (batch["positions"][r][inside] == np.arange(inside.sum())).all()
            assert len({owner[int(t)] for t in targets if t != EOS}) <= 1
            # Inputs are the targets one position earlier: nothing of another segment leaks in.
            assert (batch["inputs"][r][inside][1:] == targets[:-1]).all()
    assert batch["bytes"].sum() == sum(document.lengths.sum() for document in documents)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 17), st.lists(st.integers(0, 1000), max_size=12), st.sampled_from(["concat", "bestfit"]))
def test_rows_do_not_depend_on_how_documents_come(lengths, length, cuts, packing):
    documents = documents_of(lengths)

    def plain(made):
        return [[(s.targets.tolist(), s.first, s.bytes) for s in row] for row in rows(made, packing, length)]

    assert plain(regrouped(documents, cuts)) == plain(documents)


@pytest.mark.parametrize("packing", ["concat", "bestfit"])
def test_bytes_of_a_row_are_those_of_its_targets(packing):
    batch = batch_of(documents_of([7, 30, 3, 12]), packing, 8)
    sizes = np.where(batch["targets"] == EOS, 0, batch["targets"] % 4) * (batch["weights"] > 0)
    assert (batch["bytes"] == sizes.sum(1)).all()


def test_bestfit_fills_rows_and_beats_grains_online_best_fit():
    lengths = np.random.default_rng(0).lognormal(4, 1.2, 3000).astype(int).clip(1, 400)
    documents = documents_of(lengths.tolist())
    length = 512
    ours = len(list(rows(documents, "bestfit", length)))
    source = grain.MapDataset.source([{"x": document.ids} for document in documents]).to_iter_dataset()
    packed = grain.experimental.BestFitPackIterDataset(
        source, length_struct={"x": length}, num_packing_bins=256, shuffle_bins=False
    )
    theirs = sum(1 for _ in packed)
    tokens = sum(len(document.ids) for document in documents)
    assert tokens / (ours * length) > 0.99
    assert ours <= theirs


def test_bestfit_memory_is_bounded_by_its_window():
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield document(np.array([5, EOS]), np.array([1, 0]))

    next(rows(endless(), "bestfit", 4))
    assert read <= WINDOW


@pytest.mark.parametrize(("vocab", "largest"), [("uint16", 2**16 - 1), ("uint32", 2**20)])
def test_largest_ids_survive_the_record(vocab, largest):
    batch = batch_of([document(np.array([largest, EOS]), np.array([3, 0]))], "concat", 4, vocab)
    assert batch["targets"].tolist() == [[largest, EOS, 0, 0]]
    assert batch["inputs"].tolist() == [[0, largest, 0, 0]]


def test_empty_rows_have_no_weight():
    batch = to_batch([None], "uint16", "bestfit", 4)
    assert not any(value.any() for value in batch.values())
    assert {name: value.dtype.name for name, value in batch.items()} == {
        "inputs": "int32",
        "targets": "int32",
        "weights": "float32",
        "bytes": "int32",
        "segments": "int32",
        "positions": "int32",
    }
