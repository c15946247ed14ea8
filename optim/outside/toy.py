"""The toy problem of the contract: a nonlinear language model of 72 parameters with token weights."""

import jax
import jax.numpy as jnp
import optax

from steppe.optim.rule import Objective, objective

V, D, LAYERS, B, T = 7, 4, 2, 8, 3


def parameters(dtype=jnp.float32, seed=0):
    """A stacked trunk, a vector, an embedding and a readout, with sizes that a 2 x 2 x 2 mesh can split."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "embed": jax.random.normal(keys[0], (V, D), dtype),
        "layers": {"kernel": jax.random.normal(keys[1], (LAYERS, D, D), dtype) * 0.5},
        "norm": {"scale": jnp.ones((D,), dtype)},
        "readout": jax.random.normal(keys[2], (D, V), dtype) * 0.7,
    }


def batch(seed=1, rows=B, weights=None):
    """tokens, targets [rows, T] and float weights, a fifth of them zero."""
    keys = jax.random.split(jax.random.key(seed), 3)
    tokens = jax.random.randint(keys[0], (rows, T), 0, V)
    targets = jax.random.randint(keys[1], (rows, T), 0, V)
    drawn = jax.random.bernoulli(keys[2], 0.8, (rows, T)).astype(jnp.float32)
    return {"tokens": tokens, "targets": targets, "weights": drawn if weights is None else weights}


def trunk(params, batch, dtype=None):
    cast = (lambda x: x) if dtype is None else (lambda x: x.astype(dtype))
    hidden = cast(params["embed"])[batch["tokens"]]
    for layer in range(params["layers"]["kernel"].shape[0]):
        hidden = hidden + jnp.tanh(hidden @ cast(params["layers"]["kernel"])[layer])
    return hidden * cast(params["norm"]["scale"])


def token_loss(logits, batch):
    """Mean over tokens of positive weight, and the per-sequence losses that k_sam needs."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]) * batch["weights"]
    count = jnp.maximum(jnp.sum(batch["weights"] > 0), 1)
    return jnp.sum(losses) / count, {"per_sequence_loss": jnp.sum(losses, axis=1)}


def tokens_of(batch):
    return jnp.sum(batch["weights"] > 0)


def language_model(dtype=None) -> Objective:
    """The problem as an Objective whose outputs are the logits."""

    def forward(params, batch):
        hidden = trunk(params, batch, dtype)
        return (hidden @ params["readout"].astype(hidden.dtype)).astype(params["readout"].dtype)

    made = objective(forward, token_loss, has_aux=True, weight=tokens_of)
    return made._replace(compute_dtype=dtype)
