"""Held-out loss, in nats per token and bits per byte, always at theta."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from steppe.data.loader import Corpus, held_out_rows, held_out_steps
from steppe.lm.model.mesh import local_rows, place_batch
from steppe.lm.model.objective import readout_kernel
from steppe.lm.model.ordered import jitted
from steppe.lm.model.readout import Options, cross_entropy
from steppe.lm.model.transformer import Shape
from steppe.optim import Objective


def make_evaluation_step(parts) -> Callable:
    """The compiled evaluation_step of lm.parts.assembly.Parts."""
    return jitted(evaluation_step(parts.objective, parts.shape, parts.options), parts.mesh, "evaluation")


def evaluation_step(objective: Objective, shape: Shape, options: Options) -> Callable:
    """step(params, batch) -> (nats, tokens, bytes) of a batch: plain cross-entropy, whatever the training loss adds."""
    plain = Options(options.vocabulary, options.chunk, soft_cap=options.soft_cap, place=options.place)

    def step(params, batch):
        hidden = objective.trunk(params, batch)
        loss, _, _ = cross_entropy(plain, readout_kernel(params, shape), hidden, batch["targets"], batch["weights"])
        tokens = jnp.sum(batch["weights"] > 0)
        return loss * tokens, tokens, jnp.sum(batch["bytes"])

    return step


def evaluate(
    step: Callable, params, corpus: Corpus, name: str, mesh: Mesh, batch_size: int, batches: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> dict | None:  # fmt: skip
    """Loss on held-out set `name`: {loss (nats per token), bits_per_byte, tokens, bytes}; batches = 0 takes all of it.

    step: a compiled make_evaluation_step. The rows come in one fixed order, so a limit always sees the same ones.
    stop() is asked before every batch; once it says so, the result is None.
    """
    total = held_out_steps(corpus, name, batch_size)
    rows = local_rows(mesh, batch_size)
    results = []
    for index in range(min(total, batches) if batches else total):
        if stop():
            return None
        batch = held_out_rows(corpus, name, index, batch_size, rows)
        results.append(step(params, place_batch(mesh, batch_size, rows, batch)))
        jax.block_until_ready(results[-2:][0])  # at most one batch ahead, so that stop() is asked in time
    nats, tokens, size = (sum(np.float64(x) for x in column) for column in zip(*jax.device_get(results), strict=True))
    return {
        "loss": float(nats / tokens),
        "bits_per_byte": float(nats / math.log(2) / size),
        "tokens": int(tokens),
        "bytes": int(size),
    }
