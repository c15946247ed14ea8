"""What a run is made of before it starts: parameters, tokens, steps, FLOPs."""

import math
import re
from typing import Any, NamedTuple

import jax

from lm.model import Shape
from optim import methods
from optim.schedules import duration_steps


class Parameters(NamedTuple):
    """Counts of a model: all, and those outside the tables of tokens, positions and readout."""

    total: int
    non_embedding: int


class Flops(NamedTuple):
    """FLOPs of one token's forward pass: the trunk (with the whole attention square) and one readout product."""

    trunk: float
    readout: float


class Budget(NamedTuple):
    """A run in numbers. flops and adamw_flops: one step over all devices, of the method and of plain AdamW."""

    parameters: Parameters
    tokens_per_step: int
    steps: int
    tokens: int
    flops: float
    adamw_flops: float


def count_parameters(params: Any) -> Parameters:
    """Counts the leaves (arrays or shapes) of a parameter tree; tables are embed/, position/ and readout/."""
    sizes = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), math.prod(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    tables = sum(size for name, size in sizes if re.match(r"(embed|position|readout)/", name))
    total = sum(size for _, size in sizes)
    return Parameters(total, total - tables)


def forward_flops(shape: Shape) -> Flops:
    """Multiply-adds count two. Norms, softmax and activations are left out (a few per cent at width 128)."""
    D, F, H, G = shape.width, shape.mlp_width, shape.heads, shape.kv_heads
    K = D // H
    projections = 2 * D * K * (2 * H + 2 * G)
    mlp = 2 * D * F * (3 if shape.style == "modern" else 2)
    square = 2 * 2 * shape.sequence_length * H * K  # scores, then their product with the values
    return Flops(shape.layers * (projections + mlp + square), 2.0 * shape.vocabulary * D)


def step_flops(shape: Shape, tokens: int, forwards: float, backwards: float, products_saved: int = 0) -> float:
    """FLOPs of a step that takes so many forwards and backwards (a backward is two forwards).

    products_saved: readout products a keeping functional pass leaves out, one.
    """
    trunk, readout = forward_flops(shape)
    return tokens * ((trunk + readout) * (forwards + 2 * backwards) - readout * products_saved)


def total_steps(train, parameters: Parameters, sequence_length: int, epoch_tokens: int) -> int:
    """Steps of config.train.duration; "chinchilla" is tokens_per_parameter x the chosen count of parameters."""
    tokens_per_step = train.batch_size * sequence_length
    if train.duration == "chinchilla":
        counted = parameters.total if train.parameter_count == "total" else parameters.non_embedding
        return max(1, math.ceil(train.tokens_per_parameter * counted / tokens_per_step))
    return duration_steps(train.duration, tokens_per_step=tokens_per_step, tokens_per_epoch=epoch_tokens)


def budget(config, shape: Shape, params: Any, epoch_tokens: int, options: dict, keep: bool) -> Budget:
    """The Budget of a run; options are the method's, keep whether its frozen derivative is stored."""
    parameters = count_parameters(params)
    train, optim = config.train, config.optim
    tokens = train.batch_size * config.data.sequence_length
    steps = total_steps(train, parameters, config.data.sequence_length, epoch_tokens)
    forwards, backwards = methods.cost(
        optim.method, sequences=train.batch_size, every=optim.every, ascent_fraction=optim.ascent_fraction, **options
    )
    return Budget(
        parameters,
        tokens,
        steps,
        steps * tokens,
        step_flops(shape, tokens, forwards, backwards, products_saved=1 if keep else 0),
        step_flops(shape, tokens, 1, 1),
    )


def describe(budget: Budget, method: str) -> str:
    """The budget in a few lines for a reader."""
    total, non_embedding = budget.parameters
    whole, plain = budget.flops * budget.steps, budget.adamw_flops * budget.steps
    return "\n".join(
        [
            f"parameters  {total:,} ({non_embedding:,} non-embedding)",
            f"tokens      {budget.tokens:,} in {budget.steps:,} steps of {budget.tokens_per_step:,}"
            f" ({budget.tokens / max(1, non_embedding):.1f} per non-embedding parameter)",
            f"FLOPs       {whole:.3g} with {method}, {plain:.3g} with adamw ({whole / plain:.2f} x)",
        ]
    )
