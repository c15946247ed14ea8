"""Text sampled from a model: a continuation of a prompt, one token at a time within the last T."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from steppe.data.vocabulary import Tokenizer
from steppe.lm.model.objective import readout_kernel
from steppe.lm.model.transformer import Shape
from steppe.optim import Objective


def make_next_token(objective: Objective, shape: Shape, vocabulary: int, soft_cap: float = 0.0) -> Callable:
    """next_token(params, tokens [1, T], length, key, temperature) -> the id that follows the first `length` tokens."""

    def next_token(params, tokens_1xT, length, key, temperature):
        hidden = objective.trunk(params, {"inputs": tokens_1xT})[0, length - 1]
        logits_V = jnp.matmul(readout_kernel(params, shape), hidden.astype(jnp.float32))
        logits_V = soft_cap * jnp.tanh(logits_V / soft_cap) if soft_cap else logits_V
        logits_V = jnp.where(jnp.arange(logits_V.shape[0]) < vocabulary, logits_V, -jnp.inf)
        drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V))

    return next_token


def generate(
    next_token: Callable,
    params,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    temperature: float,
    length: int,
    seed: int,
) -> str:
    """The prompt and up to `tokens` sampled tokens, as text; stops at the end of a document.

    next_token: a compiled make_next_token; length: its T. The window is recomputed for each token, which costs T times
    what a cache would: meant for a look at a model, not for serving.
    """
    ids = [tokenizer.begin_id, *tokenizer.encode(prompt)]  # as documents begin in training
    start = len(ids)
    for key in jax.random.split(jax.random.key(seed), tokens):
        window = ids[-length:]
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(window)] = window
        following = int(next_token(params, padded, np.int32(len(window)), key, np.float32(temperature)))
        if following == tokenizer.eos_id:
            break
        ids.append(following)
    return prompt + tokenizer.decode(ids[start:])
