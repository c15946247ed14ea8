"""Multiple choice: which continuation of a query is most likely under a model, in total or per byte, as in lm-eval.

A file has one object a line: {"query", "choices", "gold"}, joined without a separator, or HellaSwag's {"ctx",
"endings", "label"}, joined by a blank.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from steppe.data import files
from steppe.data.errors import DataError, refused
from steppe.data.readers.plain import json_value, opened_text
from steppe.data.vocabulary import Tokenizer
from steppe.lm.model.mesh import local_rows, place_batch
from steppe.lm.model.objective import readout_kernel
from steppe.lm.model.ordered import jitted
from steppe.lm.model.readout import Options, cross_entropy
from steppe.lm.parts.assembly import Parts

KEY = "evaluate.choices"
_FIELDS = (("query", "choices", "gold", ""), ("ctx", "endings", "label", " "))  # field names, and the separator


class Item(NamedTuple):
    """A question: a query, its possible continuations, and the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


def read(sources: Sequence[str]) -> dict[str, list[Item]]:
    """{name: items} for "name=jsonl:FILE" texts, compressed or not. DataError with file and line for a bad item."""
    found: dict[str, list[Item]] = {}
    for source in sources:
        name, equals, place = source.partition("=")
        kind, colon, path = place.partition(":")
        if not (name and equals and colon and path) or kind != "jsonl" or name in found:
            raise refused(KEY, source, "like name=jsonl:items.jsonl, every name once")
        found[name] = _items(path)
    return found


def _items(path: str) -> list[Item]:
    try:
        (place,) = files.matching(path)
    except ValueError:
        raise refused(KEY, path, "a file") from None
    items = []
    with opened_text(place, "jsonl") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                try:
                    items.append(_item(json_value(line.decode())))
                except (ValueError, KeyError):
                    fields = " or ".join("{" + ", ".join(names[:3]) + "}" for names in _FIELDS)
                    raise DataError(f"config.{KEY}: {place}:{number} is not an item: an object with {fields}") from None
    if not items:
        raise refused(KEY, path, "a file with items")
    return items


def _item(value: Any) -> Item:
    """The item of a line's value. Raises ValueError or KeyError if it is not an item."""
    names = next((names for names in _FIELDS if isinstance(value, dict) and names[0] in value), None)
    if names is None:
        raise ValueError
    query, choices, gold = (value[name] for name in names[:3])
    texts = choices if isinstance(choices, list) else []
    if len(texts) < 2 or not all(isinstance(text, str) for text in (query, *texts)) or not all(map(str.strip, texts)):
        raise ValueError
    if isinstance(gold, str) and gold.isdecimal():
        gold = int(gold)
    if type(gold) is not int or gold not in range(len(texts)):
        raise ValueError
    "".join((query, *texts)).encode()  # raises for lone surrogates
    return Item(query, tuple(names[3] + text for text in texts), gold)


class Rows(NamedTuple):
    """Every choice of every item as a row [n, T]; weight 1 on tokens of the choice. bytes: of each choice [n]."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    bytes: np.ndarray


def rows(items: Sequence[Item], tokenizer: Tokenizer, length: int) -> Rows:
    """The Rows of items; a query loses its beginning if the row is longer than `length`.

    The first counted token is the first that reaches into the choice, even if it begins in the query. White space at
    the end of a query counts with the choice, as in lm-eval. Raises DataError if a choice has no token.
    """
    texts = [(item.query, choice) for item in items for choice in item.choices]
    shape = len(texts), length
    made = Rows(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(len(texts)))
    tokens = tokenizer.measure([(query + choice).encode() for query, choice in texts])
    ends = np.cumsum(tokens.counts)
    for row, ((query, choice), end, count) in enumerate(zip(texts, ends, tokens.counts, strict=True)):
        part = slice(end - count, end)
        before = _before(np.cumsum(tokens.lengths[part]), len(query.rstrip().encode()))
        if before == count:
            what = f"the choice {choice!a} after {query!a}"
            raise DataError(f"config.{KEY}: no token of the vocabulary represents {what}")
        ids = [tokenizer.begin_id, *tokens.ids[part].tolist()]
        first = max(before, len(ids) - 1 - length)  # of the targets that count
        kept = ids[-(length + 1) :]
        n, cut = len(kept) - 1, len(ids) - len(kept)
        made.inputs[row, :n], made.targets[row, :n] = kept[:-1], kept[1:]
        made.weights[row, first - cut : n] = 1
        made.bytes[row] = len(choice.encode())
    return made


def _before(reached: np.ndarray, query: int) -> int:
    """The number of tokens that end by the end of the query. reached: source bytes up to the end of each token, [n].

    If several tokens form one character, the last represents all its bytes and the others end where they begin.
    """
    if not query:
        return 0
    at = int(np.searchsorted(reached, query))
    return at + int(at < len(reached) and reached[at] == query)


def plain_options(parts: Parts) -> Options:
    """The readout options of a run with plain cross-entropy as its loss."""
    return parts.options._replace(smoothing=0.0, z_loss=0.0, keep=False)


def make_scores(parts: Parts) -> Callable[[Any, dict], jax.Array]:
    """scores(params, batch of Rows) -> log-likelihood in nats of each row's choice [B], on every process."""
    plain = plain_options(parts)

    def scores(params, batch):
        hidden = parts.objective.trunk(params, {"inputs": batch["inputs"]})
        kernel = readout_kernel(params, parts.shape)
        _, means, _ = cross_entropy(plain, kernel, hidden, batch["targets"], batch["weights"])
        return -means * jnp.sum(batch["weights"] > 0, axis=1)

    return jitted(scores, parts.mesh, "choices", out_shardings=NamedSharding(parts.mesh, PartitionSpec()))


def steps(made: Rows, batch_size: int) -> int:
    """The number of batches that the rows fill, the last perhaps in part."""
    return -(-len(made.bytes) // batch_size)


def batches(made: Rows, mesh: Mesh, batch_size: int) -> Iterator[dict]:
    """The rows in batches on the mesh."""
    mine = local_rows(mesh, batch_size)
    arrays = {"inputs": made.inputs, "targets": made.targets, "weights": made.weights}
    whole = {name: np.pad(array, ((0, -len(array) % batch_size), (0, 0))) for name, array in arrays.items()}
    for start in range(0, len(made.bytes), batch_size):
        batch = {name: array[start : start + batch_size][mine] for name, array in whole.items()}
        yield place_batch(mesh, batch_size, mine, batch)


def measure(scores: Callable, params, items: Sequence[Item], made: Rows, batches: Iterable[dict]) -> dict[str, float]:
    """{accuracy, accuracy_per_byte, items}, for the choices that are likeliest in total and per byte."""
    scored = [np.asarray(scores(params, batch)) for batch in batches]
    likely = np.concatenate(scored)[: len(made.bytes)]
    ends, found = np.cumsum([len(item.choices) for item in items]), {}
    for name, scored in (("accuracy", likely), ("accuracy_per_byte", likely / made.bytes)):
        chosen = [int(np.argmax(part)) for part in np.split(scored, ends[:-1])]
        found[name] = sum(at == item.gold for at, item in zip(chosen, items, strict=True)) / len(items)
    return {**found, "items": len(items)}
