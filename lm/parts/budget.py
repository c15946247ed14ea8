"""A run in numbers before it starts: parameters, tokens, steps, FLOPs, and a first estimate of its memory."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from steppe.configs.keys import ConfigError
from steppe.lm.model import parameters
from steppe.lm.model.mesh import Placement
from steppe.lm.model.objective import objective
from steppe.lm.model.readout import Options
from steppe.lm.model.transformer import Shape, shape
from steppe.lm.parts.check import base_options, method_settings
from steppe.lm.parts.chips import Chip
from steppe.lm.parts.leg import WHOLE, Leg
from steppe.lm.parts.state import parameter_shapes
from steppe.optim import Objective, Rule, methods
from steppe.optim.averaging import AVERAGES
from steppe.optim.base import Base, base
from steppe.optim.outside.flops import counted
from steppe.optim.schedules import duration_steps, in_steps

MOST_STEPS = 2**31 - 1  # the state counts steps in int32


class Parameters(NamedTuple):
    """A model's parameter counts: total, and without the tables of tokens, positions and readout."""

    total: int
    non_embedding: int


class Length(NamedTuple):
    """A run's length: predicted tokens of a step over all devices, on average, and steps.

    offset: added to the step by schedules if earlier steps had another size, so that they follow tokens.
    """

    tokens_per_step: float
    steps: int
    offset: float = 0.0


class Budget(NamedTuple):
    """A run in numbers.

    positions_per_step: batch x sequence length, which determines the cost. tokens_per_step: those that the loss counts,
    on average: all except padding. flops, adamw_flops: of an average step over all devices, with the method (including
    its steps that do not perturb) and with plain AdamW. tokens, positions, total_flops, total_adamw_flops: of the whole
    run, including earlier legs.
    """

    parameters: Parameters
    positions_per_step: int
    tokens_per_step: float
    steps: int
    tokens: int
    positions: int
    flops: float
    adamw_flops: float
    total_flops: float
    total_adamw_flops: float

    def steps_of(self, duration: str) -> int:
        """A duration in steps of this run."""
        return duration_steps(duration, tokens_per_step=self.tokens_per_step, total_steps=self.steps)


def count_parameters(params: Any) -> Parameters:
    """Counts the parameters of a tree of arrays or shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = [(parameters.of(parameters.name_of(path)).kind, math.prod(leaf.shape)) for path, leaf in leaves]
    tables = sum(size for kind, size in sizes if kind == "table")
    total = sum(size for _, size in sizes)
    return Parameters(total, total - tables)


@functools.cache
def base_flops(shape: Shape, name: str, options: tuple[tuple[str, Any], ...] = ()) -> float:
    """FLOPs of a base optimizer's own products in a step, on average over 100 steps: of muon and soap; 0 for adamw.

    options: of a base optimizer from a user's file, as pairs.
    """
    params = parameter_shapes(shape)
    transform = base(name, 1e-3, matrix_axes=parameters.MATRIX_AXES, **dict(options)).transform
    update = functools.partial(transform.update, value=jnp.float32(0))
    return counted(update, params, jax.eval_shape(transform.init, params), params, steps=range(100, 200))


def rule_flops(shape: Shape, rule: Rule, the_base: Base, batch_size: int) -> float:
    """FLOPs of a rule's gradient in addition to a plain one, counted from its program and averaged over 100 steps."""

    def flops(rule: Rule) -> float:
        made, given = _of_gradient(shape, rule, the_base, batch_size)
        return counted(lambda *given: rule.gradient(made, *given)[0], *given, steps=range(100, 200))

    return flops(rule) - flops(methods.method("adamw"))


def trace_rule(shape: Shape, rule: Rule, the_base: Base, batch_size: int) -> None:
    """Traces a rule's gradient. Raises OptionError if a user's code in it raises."""
    made, given = _of_gradient(shape, rule, the_base, batch_size)
    jax.eval_shape(lambda *given: rule.gradient(made, *given)[0], *given)


def _of_gradient(shape: Shape, rule: Rule, the_base: Base, batch_size: int) -> tuple[Objective, tuple]:
    """(an objective, the shapes of the other arguments) of a rule's gradient on one device."""
    params = parameter_shapes(shape)
    options = Options(shape.vocabulary, shape.sequence_length)
    made = objective(shape._replace(kernel="einsum", remat="none", small=False), options, Placement())
    tokens = jax.ShapeDtypeStruct((batch_size, shape.sequence_length), jnp.int32)
    batch = {"inputs": tokens, "targets": tokens, "weights": jax.ShapeDtypeStruct(tokens.shape, jnp.float32)}
    states = jax.eval_shape(the_base.transform.init, params), jax.eval_shape(rule.init, params)
    return made, (params, batch, *states, jax.ShapeDtypeStruct((), jnp.int32))


def step_flops(shape: Shape, tokens: int, cost: methods.Cost) -> float:
    """FLOPs of a step of `tokens` tokens; a backward pass counts as two forward passes, a multiply-add as two.

    The trunk has the full attention square. Norms, softmax and activations are omitted (a few per cent at width 128).
    """
    D, F, H, G, K = shape.width, shape.mlp_width, shape.heads, shape.kv_heads, shape.features
    projections = 2 * D * K * (2 * H + 2 * G)
    mlp = 2 * D * F * (3 if shape.style == "modern" else 2)
    square = 2 * 2 * shape.sequence_length * H * K  # scores, then their product with the values
    trunk, readout = shape.layers * (projections + mlp + square), 2.0 * shape.vocabulary * D
    return tokens * (trunk * (cost.forwards + 2 * cost.backwards) + readout * cost.products)


def estimate_memory(
    shape: Shape, parameters: int, sequences: int, chunk_tokens: int, mesh: tuple, anchored: bool, averages: int = 0
) -> tuple[float, float, float, float, float]:
    """Estimated bytes per device of a step with `sequences` per microbatch and device, on a (data, fsdp, tensor) mesh,
    for choices before compiling; steppe plan reports the compiler's own figures.

    Of the state: float32 parameters, two moments, and `averages` trees of the same size. Of gradients: one, theta +
    epsilon, and the hidden states of an anchored method. Of activations saved for the backward pass, of the readout,
    and of its stored loss derivative.
    """
    _, fsdp, tensor = mesh
    tokens, small = sequences * shape.sequence_length, 2 if shape.dtype == "bfloat16" else 4
    D, F = shape.width, shape.mlp_width
    own = 4.0 * parameters / (fsdp * tensor)
    wide = 2 * D + (D + F * (2 if shape.style == "modern" else 1)) / tensor
    features = {"full": 0, "offload": 0, "dots": 2 * D / tensor + wide}.get(shape.remat, 3 * (2 * D / tensor + wide))
    layer = (2 * D / tensor + wide) * 3 * tokens * small  # of one layer while it is recomputed
    return (
        (3 + averages) * own,
        2 * own + (tokens * D * small if anchored else 0),
        shape.layers * tokens * (D + features) * small + layer,
        (chunk_tokens * 3 + D) * 4.0 * shape.vocabulary / tensor,
        tokens * shape.vocabulary * 2.0 / tensor,
    )


def averages_kept(config) -> int:
    """The number of trees like the parameters that a run's averages store."""
    return sum(AVERAGES[name].slots(config.average.snapshots) for name in config.average.weights)


def roofline(
    flops: float, weights: float, activations: float, sent: float, chip: Chip, link: float, passes: float
) -> tuple[float, float]:
    """Seconds of a step on one device: (the slowest of products, memory and network; their sum).

    Of one device: flops; bytes of its float32 weights, of saved activations, and sent to others. link: bytes/s of its
    network (chips.network_of). passes: pairs of forward and backward passes. Memory traffic is a lower bound: state is
    read and written once (7 copies), weights and activations are read and written once per pass.
    """
    traffic = 7 * weights + passes * (2 * weights + 2 * activations)
    parts = flops / chip.flops, traffic / chip.bandwidth, sent / link
    return max(parts), sum(parts)


def step_traffic(config, vocabulary_size: int, mesh: tuple, chip: Chip, link: float) -> tuple[float, float]:
    """Estimated (seconds, bytes of memory) of a step on one device, to rank meshes and remat policies."""
    shape_ = shape(config.model, vocabulary_size, config.data.sequence_length, "")
    data, fsdp, tensor = mesh
    rows = config.train.batch_size // (data * fsdp)
    tokens = rows * shape_.sequence_length
    per_layer = 12 * shape_.width**2
    parameters = shape_.layers * per_layer + shape_.vocabulary * shape_.width
    chunk = min(config.model.readout_chunk or 4096, tokens)
    anchored = methods.second_of(config.optim.method).anchored
    each = rows // config.train.microbatches
    averages = averages_kept(config)
    memory = estimate_memory(shape_, parameters, each, chunk, mesh, anchored, averages)
    cost = methods.cost(config.optim.method)
    forwards, backwards, _ = cost
    again = {"none": 0.0, "dots": 0.1, "offload": 0.3, "full": 1.0}[shape_.remat]
    flops = step_flops(shape_, tokens, cost._replace(forwards=forwards + again * backwards)) / tensor
    small = 2 if shape_.dtype == "bfloat16" else 4
    # Each forward and backward gathers weights and scatters their gradient; tensor adds two sums per layer.
    gathered = small * parameters / tensor * (forwards + backwards * 2) * (fsdp - 1) / fsdp
    gathered += 8.0 * parameters / (fsdp * tensor) * backwards * (data - 1) / data
    summed = 2 * shape_.layers * tokens * shape_.width * small * 2 * (forwards + backwards) * (tensor - 1) / tensor
    state, _, activations, *_ = memory
    seconds = roofline(flops, state / (3 + averages), activations, gathered + summed, chip, link, backwards)
    return sum(seconds), sum(memory[:4])


def fixed_memory(config, vocabulary_size: int) -> float:
    """Estimated bytes of parameters, optimizer state and gradients over all devices; the batch size does not matter."""
    shape_ = shape(config.model, vocabulary_size, config.data.sequence_length, "")
    parameters = shape_.layers * 12 * shape_.width**2 + shape_.vocabulary * shape_.width
    state, gradients, *_ = estimate_memory(shape_, parameters, 0, 0, (1, 1, 1), False, averages_kept(config))
    return state + gradients


def tokens_of_step(config, tokens_per_row: float | None) -> float:
    """Tokens of a step as the run counts them. tokens_per_row: of the corpus; None if unknown."""
    padded = config.data.packing == "bestfit" and config.train.counted == "tokens" and tokens_per_row is not None
    return config.train.batch_size * (tokens_per_row if padded else config.data.sequence_length)


def total_steps(train, parameters: Parameters, tokens_per_step: float, epoch_tokens: float) -> int:
    """Steps of config.train.duration; "chinchilla" is tokens_per_parameter x the chosen count of parameters."""
    if train.duration == "chinchilla":
        counted = parameters.total if train.parameter_count == "total" else parameters.non_embedding
        steps = max(1, math.ceil(train.tokens_per_parameter * counted / tokens_per_step))
    else:
        steps = duration_steps(train.duration, tokens_per_step=tokens_per_step, tokens_per_epoch=epoch_tokens)
    if steps > MOST_STEPS:
        raise ConfigError("train.duration", train.duration, f"at most {MOST_STEPS:,} steps, but it is {steps:.3g}")
    return steps


def length(config, params: Any, epoch_tokens: int, leg: Leg = WHOLE, tokens_per_row: float | None = None) -> Length:
    """The Length of a run. epoch_tokens: positions of one pass over the corpus; tokens_per_row: see tokens_of_step."""
    tokens_per_step = tokens_of_step(config, tokens_per_row)
    filled = tokens_per_step / (config.train.batch_size * config.data.sequence_length)
    steps = total_steps(config.train, count_parameters(params), tokens_per_step, epoch_tokens * filled)
    if leg == WHOLE or in_steps(config.train.duration):
        return Length(tokens_per_step, steps)
    had = leg.planned_after(leg.step, tokens_per_step) / tokens_per_step  # steps of the present size
    offset = 0.0 if math.isclose(had, leg.step, rel_tol=1e-9) else had - leg.step
    return Length(tokens_per_step, leg.step + max(0, steps - math.floor(had + 1e-9)), offset)


def budget(
    config,
    *,
    shape: Shape,
    params: Any,
    length: Length,
    rule: Rule,
    the_base: Base,
    shards: int = 1,
    keep: bool = False,
    leg: Leg = WHOLE,
) -> Budget:
    """The Budget of a run.

    rule: tells which steps perturb. the_base: the base optimizer. shards: data shards. keep: whether the readout stores
    its loss derivative at theta.
    """
    train, optim = config.train, config.optim
    one = methods.cost(
        optim.method,
        sequences=train.batch_size,
        microbatches=train.microbatches,
        shards=shards,
        keep=keep,
        **method_settings(config),
    )
    positions = train.batch_size * config.data.sequence_length
    steps, left = length.steps, length.steps - leg.step
    perturbing = rule.perturbing(steps) * steps - (rule.perturbing(leg.step) * leg.step if leg.step else 0.0)
    flops = step_flops(shape, positions, one.averaged(perturbing / max(1, left)))
    flops += base_flops(shape, optim.base, tuple(base_options(config).items()))
    row = methods.row_of(optim.method)
    if row and row.rule:
        flops += rule_flops(shape, rule, the_base, train.batch_size)
    adamw_flops = step_flops(shape, positions, methods.Cost())
    return Budget(
        parameters=count_parameters(params),
        positions_per_step=positions,
        tokens_per_step=length.tokens_per_step,
        steps=steps,
        tokens=leg.tokens_after(steps, length.tokens_per_step),
        positions=leg.rows * config.data.sequence_length + left * positions,
        flops=flops,
        adamw_flops=adamw_flops,
        total_flops=leg.flops + left * flops,
        total_adamw_flops=leg.adamw_flops + left * adamw_flops,
    )


def describe(budget: Budget, method: str) -> str:
    """The budget as a few lines of text."""
    total, non_embedding = budget.parameters
    whole, plain = budget.total_flops, budget.total_adamw_flops
    share = budget.tokens_per_step / budget.positions_per_step
    lines = [
        f"parameters  {total:,} ({non_embedding:,} non-embedding)",
        f"tokens      {budget.tokens:,} in {budget.steps:,} steps of {budget.tokens_per_step:,.10g}"
        f" ({budget.tokens / max(1, non_embedding):.1f} per non-embedding parameter)",
    ]
    if share < 1:
        each = f"{budget.positions_per_step:,} a step, {share:.1%} of them tokens"
        lines.append(f"positions   {budget.positions:,}, {each}")
    lines.append(f"FLOPs       {whole:.3g} with {method}, {plain:.3g} with adamw ({whole / plain:.2f} x)")
    return "\n".join(lines)
