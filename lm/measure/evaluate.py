"""Held-out loss in nats per token and bits per byte, at theta or at an average, never at perturbed weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from steppe.data.baselines import NAMES
from steppe.data.loader import Corpus, held_out_rows, held_out_steps
from steppe.lm.measure import choices
from steppe.lm.model.mesh import local_rows, place_batch
from steppe.lm.model.objective import readout_kernel
from steppe.lm.model.ordered import jitted
from steppe.lm.model.readout import cross_entropy
from steppe.lm.parts.assembly import Parts
from steppe.lm.parts.memo import once
from steppe.lm.parts.progress import Event, Progress, each
from steppe.lm.parts.state import State
from steppe.lm.track.tracker import Tracker


def make_evaluation_step(parts: Parts) -> Callable:
    """step(params, batch) -> (nats, tokens, bytes), compiled, with plain cross-entropy for any training loss."""
    plain = choices.plain_options(parts)

    def step(params, batch):
        hidden, kernel = parts.objective.trunk(params, batch), readout_kernel(params, parts.shape)
        loss, _, _ = cross_entropy(plain, kernel, hidden, batch["targets"], batch["weights"])
        tokens = jnp.sum(batch["weights"] > 0)
        return loss * tokens, tokens, jnp.sum(batch["bytes"])

    return jitted(step, parts.mesh, "evaluation")


def held_out(corpus: Corpus, name: str, mesh: Mesh, batch_size: int, batches: int = 0) -> Iterator[dict]:
    """The batches of a held-out set on the mesh, in a fixed order: the first `batches`, 0 for all of it."""
    total, rows = held_out_steps(corpus, name, batch_size), local_rows(mesh, batch_size)
    for index in range(min(total, batches) if batches else total):
        yield place_batch(mesh, batch_size, rows, held_out_rows(corpus, name, index, batch_size, rows))


def first_batch(corpus: Corpus, mesh: Mesh, rows: int) -> dict:
    """The first rows of the first held-out set on the mesh, as a batch of training has them."""
    batch = next(held_out(corpus, next(iter(corpus.held_out)), mesh, rows))
    batch.pop("bytes")
    return batch


def evaluate(step: Callable, params, batches: Iterable[dict], stop: Callable[[], bool] = lambda: False) -> dict:
    """{loss (nats per token), bits_per_byte, tokens, bytes} of held_out's batches; {} if stop(), asked before each."""
    results = []
    for batch in batches:
        if stop():
            return {}
        results.append(step(params, batch))
        jax.block_until_ready(results[-2:][0])  # stay at most one batch ahead, so that stop() is asked in time
    nats, tokens, size = (sum(np.float64(x) for x in column) for column in zip(*jax.device_get(results), strict=True))
    found = {"loss": float(nats / tokens), "bits_per_byte": float(nats / math.log(2) / size)}
    return found | {"tokens": int(tokens), "bytes": int(size)}


class Evaluations:
    """A run's evaluations: all its weights on every held-out set; the weights it is judged by also on multiple choice.

    weights: {name: function from a State to its parameters}, those that the run is judged by first. questions: items
    by name. references: baselines of each set. asked(): whether a signal asks to stop.
    """

    def __init__(
        self,
        config: ConfigDict,
        corpus: Corpus,
        parts: Parts,
        tracker: Tracker,
        *,
        weights: Mapping[str, Callable[[State], Any]],
        questions: Mapping[str, list[choices.Item]],
        references: Mapping[str, Mapping[str, float]],
        asked: Callable[[], bool],
    ):
        tokenizer, length = corpus.tokenizer, config.data.sequence_length
        self._questions = {name: (items, choices.rows(items, tokenizer, length)) for name, items in questions.items()}
        self._corpus, self._mesh, self._tracker, self._weights = corpus, parts.mesh, tracker, weights
        self._judged, self._asked, self._total = next(iter(weights)), asked, parts.budget.steps
        self._references = references
        self._rows, self._batches = config.evaluate.batch_size or config.train.batch_size, config.evaluate.batches
        made = lambda: (make_evaluation_step(parts), choices.make_scores(parts))  # noqa: E731
        self._step, self._scores = once("evaluation", parts.key, made)
        self._latest: dict[tuple[str, str], dict] = {}
        every = max(1, parts.budget.steps_of(config.evaluate.every))
        self.events = [Event(each(every, self._total), self.evaluate)]

    def evaluate(self, at: Progress) -> None:
        """Evaluates everything. If a signal to stop comes first, it records nothing and the run owes the evaluation."""
        with self._tracker.goodput.spending("evaluate"):
            found = self._held_out(at)
            if found is None:
                at.stop = at.owes_evaluation = True
                return
            for (kind, name), values in found.items():
                self._tracker.evaluation(at.done, name, values, "" if kind == self._judged else kind)
            self._latest, params = found, self._weights[self._judged](at.state)
            for name, (items, rows) in self._questions.items():
                values = choices.measure(self._scores, params, items, rows, self._mesh, self._rows)
                self._tracker.evaluation(at.done, name, values, kind="choices")

    def _held_out(self, at: Progress) -> dict[tuple[str, str], dict] | None:
        """{(weights, set): values}; None if a signal came first."""
        found, batches = {}, 0 if at.done == self._total else self._batches
        for kind, of_state in self._weights.items():
            params = of_state(at.state)
            for name in self._corpus.held_out:
                text = held_out(self._corpus, name, self._mesh, self._rows, batches)
                values = found[kind, name] = evaluate(self._step, params, text, self._asked)
                if not values:
                    return None
        return found

    def conclude(self) -> None:
        """Prints the last results next to the baselines of each set."""
        for (kind, name), values in self._latest.items():
            known = self._references.get(name, {})
            others = ", ".join(f"{of} {known[key]:.3f}" for key, of in NAMES.items() if known)
            whose = "" if kind == self._judged else f" with {kind}"
            self._tracker.note(f"result      {name}{whose}: {values['bits_per_byte']:.3f} bits per byte ({others})")
