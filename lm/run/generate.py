"""Samples text from a model: continues prompts token by token, with a cache of keys and values.

Beyond the model's sequence length T the window slides, every position changes, and each token costs a whole pass.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from steppe.data.loader import Corpus, beginning
from steppe.data.vocabulary import Tokenizer
from steppe.lm.model.attention import CACHED
from steppe.lm.model.objective import readout_kernel
from steppe.lm.model.ordered import jitted
from steppe.lm.model.transformer import Shape, Trunk
from steppe.lm.parts.assembly import Parts


class Decoder(NamedTuple):
    """Compiled functions for B prompts at a time; ids [B], keys [B], temperature a number. length: the model's T.

    first(params, tokens [B, N], lengths [B], keys, temperature) -> (next ids after the first `lengths` tokens, cache).
    next(params, cache, ids, positions [B], keys, temperature) -> (next ids, cache). again: `first` without a cache.
    """

    first: Callable
    next: Callable
    again: Callable
    length: int


def make_decoder(shape: Shape, vocabulary: int, mesh: Mesh, soft_cap: float = 0.0) -> Decoder:
    """The Decoder of a model on a mesh. vocabulary: ids to sample from; soft_cap: config.model.logit_soft_cap."""
    plain = shape._replace(remat="none", kernel="einsum")
    whole, cached = Trunk(plain), Trunk(plain._replace(kernel=CACHED))

    def draw(params, hidden_BxD, keys_B, temperature):
        logits_BxV = jnp.matmul(hidden_BxD.astype(jnp.float32), readout_kernel(params, shape).T)
        logits_BxV = soft_cap * jnp.tanh(logits_BxV / soft_cap) if soft_cap else logits_BxV
        logits_BxV = jnp.where(jnp.arange(logits_BxV.shape[1]) < vocabulary, logits_BxV, -jnp.inf)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BxV / jnp.maximum(temperature, 1e-6))
        return jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BxV, axis=1))

    def at(hidden_BxNxD, index_B):
        return jnp.take_along_axis(hidden_BxNxD, index_B[:, None, None], axis=1)[:, 0]

    def first(params, tokens_BxN, lengths_B, keys_B, temperature):
        places = jnp.broadcast_to(jnp.arange(tokens_BxN.shape[1]), tokens_BxN.shape)
        hidden, kept = cached.apply({"params": params}, tokens_BxN, places, mutable=["cache"])
        return draw(params, at(hidden, lengths_B - 1), keys_B, temperature), kept["cache"]

    def following(params, cache, ids_B, positions_B, keys_B, temperature):
        variables = {"params": params, "cache": cache}
        hidden, kept = cached.apply(variables, ids_B[:, None], positions_B[:, None], mutable=["cache"])
        return draw(params, hidden[:, 0], keys_B, temperature), kept["cache"]

    def again(params, tokens_BxT, lengths_B, keys_B, temperature):
        hidden = whole.apply({"params": params}, tokens_BxT)
        return draw(params, at(hidden, lengths_B - 1), keys_B, temperature)

    return Decoder(
        first=jitted(first, mesh, "sampling"),
        next=jitted(following, mesh, "sampling", donate_argnums=1),
        again=jitted(again, mesh, "sampling"),
        length=shape.sequence_length,
    )


def generate(
    decoder: Decoder,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    tokens: int,
    temperature: float,
    seed: int,
    cache: bool = True,
) -> list[str]:
    """Each prompt followed by up to `tokens` sampled tokens, as text; a text stops at an end-of-document token.

    temperature: 0 takes the most likely token. Prompt i uses random seed seed + i, whatever the other prompts are.
    cache: False computes every token from the whole window, with the same result.
    """
    T = decoder.length
    texts = [[tokenizer.begin_id, *tokenizer.encode(prompt)] for prompt in prompts]  # like documents in training
    starts, ended = [len(ids) for ids in texts], [False] * len(texts)
    draws = jnp.stack([jax.random.split(jax.random.key(seed + row), tokens) for row in range(len(texts))], axis=1)
    kept, heat = None, np.float32(temperature)
    for keys in draws:
        longest = max(map(len, texts))
        if cache and longest <= T:
            if kept is None:
                window, lengths = _windows(texts, min(T, -(-longest // 64) * 64))
                found, kept = decoder.first(params, window, lengths, keys, heat)
            else:
                last = np.array([ids[-1] for ids in texts], np.int32)
                places = np.array([len(ids) - 1 for ids in texts], np.int32)
                found, kept = decoder.next(params, kept, last, places, keys, heat)
        else:
            found = decoder.again(params, *_windows(texts, T), keys, heat)
        for row, token in enumerate(np.asarray(found).tolist()):
            ended[row] = ended[row] or token == tokenizer.eos_id
            if not ended[row]:
                texts[row].append(token)
        if all(ended):
            break
    said = zip(prompts, texts, starts, strict=True)
    return [prompt + _continuation(tokenizer, ids, start) for prompt, ids, start in said]


def prompt_of(config: ConfigDict, corpus: Corpus) -> str:
    """config.sample.prompt, or else the first words of the corpus's held-out text."""
    return beginning(corpus) if config.sample.prompt is None else config.sample.prompt


def sample(config: ConfigDict, parts: Parts, corpus: Corpus, params) -> str:
    """A text sampled from a run's model after its prompt."""
    tokenizer = corpus.tokenizer
    decoder = make_decoder(parts.shape, tokenizer.vocab_size, parts.mesh, config.model.logit_soft_cap)
    wanted = {"tokens": config.sample.tokens, "temperature": config.sample.temperature, "seed": config.seed}
    (text,) = generate(decoder, params, tokenizer, [prompt_of(config, corpus)], **wanted)
    return text


def _continuation(tokenizer: Tokenizer, ids: list[int], start: int) -> str:
    """The text of ids[start:], decoded with the ids before it: decoded alone it may lose its first blank."""
    before, whole = tokenizer.decode(ids[:start]), tokenizer.decode(ids)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids[start:])


def _windows(texts: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """(the last `length` tokens of each text [B, length], their number [B])."""
    window = np.zeros((len(texts), length), np.int32)
    for row, ids in enumerate(texts):
        window[row, : len(ids[-length:])] = ids[-length:]
    return window, np.array([min(len(ids), length) for ids in texts], np.int32)
