"""The baseline in flax: a plain Transformer, whole logits, optax, optax.contrib.sam.

It has the shapes and parameter counts of style nanodo: pre-LayerNorm without bias, GELU, learned positions, tied
embeddings. Layers are unrolled; nothing is chunked, rematerialised or shared between passes.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from steppe.lm.model.transformer import Shape


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream."""

    heads: int
    mlp_width: int

    @nn.compact
    def __call__(self, x_BxTxD):
        width = x_BxTxD.shape[-1]
        head = width // self.heads
        y = nn.LayerNorm(use_bias=False)(x_BxTxD)
        query, key, value = (
            nn.DenseGeneral((self.heads, head), use_bias=False, name=name)(y) for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhk,bthk->bhqt", query / head**0.5, key)
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e30)
        mixed = jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(scores), value)
        x_BxTxD = x_BxTxD + nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, name="out")(mixed)
        y = nn.LayerNorm(use_bias=False)(x_BxTxD)
        y = nn.Dense(width, use_bias=False)(jax.nn.gelu(nn.Dense(self.mlp_width, use_bias=False)(y)))
        return x_BxTxD + y


class Transformer(nn.Module):
    """tokens [B, T] -> logits [B, T, V]."""

    shape: Shape

    @nn.compact
    def __call__(self, tokens_BxT):
        s = self.shape
        table = nn.Embed(s.vocabulary, s.width)
        x_BxTxD = table(tokens_BxT) + nn.Embed(s.sequence_length, s.width)(jnp.arange(tokens_BxT.shape[1]))
        for _ in range(s.layers):
            x_BxTxD = Block(s.heads, s.mlp_width)(x_BxTxD)
        return table.attend(nn.LayerNorm(use_bias=False)(x_BxTxD))


def make(shape: Shape, sam: bool, rho: float = 0.05, learning_rate: float = 1e-3):
    """(initialise(key) -> state, step(state, batch) -> (state, metrics)), with AdamW or optax.contrib.sam around it."""
    model = Transformer(shape)
    adamw = optax.adamw(learning_rate, b2=0.98, eps=1e-9, weight_decay=0.1)
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    transform = optax.contrib.sam(adamw, ascent, sync_period=2, opaque_mode=True) if sam else adamw

    def initialise(key):
        params = model.init(key, jnp.zeros((1, shape.sequence_length), jnp.int32))["params"]
        return params, transform.init(params)

    def step(state, batch):
        params, optimizer = state

        def loss(params):
            logits: Any = model.apply({"params": params}, batch["inputs"])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]))

        value, gradient = jax.value_and_grad(loss)(params)
        extra = {"grad_fn": jax.grad(lambda p, _: loss(p))} if sam else {}
        updates, optimizer = transform.update(gradient, optimizer, params, **extra)
        return (optax.apply_updates(params, updates), optimizer), {"loss": value}

    return initialise, step
