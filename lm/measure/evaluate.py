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


def evaluate(step: Callable, params, batches: Iterable[dict]) -> dict:
    """{loss (nats per token), bits_per_byte, tokens, bytes} of held_out's batches."""
    results = []
    for batch in batches:
        results.append(step(params, batch))
        jax.block_until_ready(results[-2:][0])  # stay at most one batch ahead: whoever yields them knows the pace
    nats, tokens, size = (sum(np.float64(x) for x in column) for column in zip(*jax.device_get(results), strict=True))
    found = {"loss": float(nats / tokens), "bits_per_byte": float(nats / math.log(2) / size)}
    return found | {"tokens": int(tokens), "bytes": int(size)}


class Interrupted(Exception):
    """A signal to stop came during an evaluation."""


class Evaluations:
    """A run's evaluations: all its weights on every held-out set; the weights it is judged by also on multiple choice.

    weights: {name: function from a State to its parameters}, those that the run is judged by first. questions: items
    by name. references: baselines of each set. asked(): whether a signal asks to stop, alike on all processes.
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
        self._totals = {name: held_out_steps(corpus, name, self._rows) for name in corpus.held_out}
        more = {name: total - min(total, self._batches or total) for name, total in self._totals.items()}
        tracker.expect({f"held-out {self._shown(name, kind)}": more[name] for name in more for kind in weights})
        every = max(1, parts.budget.steps_of(config.evaluate.every))
        self.events = [Event(each(every, self._total), self.evaluate)]

    def evaluate(self, at: Progress) -> None:
        """Evaluates everything. If a signal to stop comes first, it records nothing and the run owes it still."""
        with self._tracker.goodput.spending("evaluate"):
            try:
                found, answers = self._held_out(at), self._choices(at)
            except Interrupted:
                at.stop = at.owes_evaluation = True
                return
            for (kind, name), values in found.items():
                self._tracker.evaluation(at.done, name, values, "" if kind == self._judged else kind)
            for name, values in answers.items():
                self._tracker.evaluation(at.done, name, values, kind="choices")
            self._latest, at.owes_evaluation = found, False

    def _held_out(self, at: Progress) -> dict[tuple[str, str], dict]:
        """{(weights, set): values}. Interrupted."""
        found, batches = {}, 0 if at.done == self._total else self._batches
        for kind, of_state in self._weights.items():
            params = of_state(at.state)
            for name, total in self._totals.items():
                text = held_out(self._corpus, name, self._mesh, self._rows, batches)
                text = self._watched(f"held-out {self._shown(name, kind)}", text, min(total, batches or total))
                found[kind, name] = evaluate(self._step, params, text)
        return found

    def _shown(self, name: str, kind: str) -> str:
        return name + f" with {kind}" * (kind != self._judged)

    def _choices(self, at: Progress) -> dict[str, dict]:
        """{set of items: values}. Interrupted."""
        found, params = {}, self._weights[self._judged](at.state)
        for name, (items, rows) in self._questions.items():
            batches = choices.batches(rows, self._mesh, self._rows)
            watched = self._watched(f"choices {name}", batches, choices.steps(rows, self._rows))
            found[name] = choices.measure(self._scores, params, items, rows, watched)
        return found

    def _watched(self, name: str, batches: Iterable[dict], total: int) -> Iterator[dict]:
        """The batches, while the tracker says how far they are. Interrupted if a signal comes."""
        for batch in self._tracker.over(name, batches, total):
            if self._asked():
                raise Interrupted
            yield batch

    def conclude(self) -> None:
        """Prints the last results next to the baselines of each set."""
        for (kind, name), values in self._latest.items():
            known = self._references.get(name, {})
            others = ", ".join(f"{of} {known[key]:.3f}" for key, of in NAMES.items() if known)
            shown = self._shown(name, kind)
            self._tracker.note(f"result      {shown}: {values['bits_per_byte']:.3f} bits per byte ({others})")
