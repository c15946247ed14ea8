"""From a checked config to the parts of a run: every command that touches a model starts here."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from steppe.lm.model import attention, readout
from steppe.lm.model.mesh import Placement, make_mesh
from steppe.lm.model.objective import objective
from steppe.lm.model.transformer import Shape, shape
from steppe.lm.run.budget import Budget, budget, count_parameters, estimate_memory
from steppe.lm.run.check import METHOD_OPTIONS, ConfigError, mesh_shape
from steppe.lm.run.chips import chip_of
from steppe.lm.run.state import State, abstract, initialiser
from steppe.optim import Objective, Rule
from steppe.optim.base import Base, base
from steppe.optim.masks import mask, matrix_axes
from steppe.optim.methods import canonical, is_anchored, method, options_of
from steppe.optim.schedules import duration_steps, learning_rate
from steppe.optim.schedules import rho as rho_schedule

# Which axes of the stacked weights a matrix reads and writes, for muon and layerwise rho; tables are no matrices.
MATRIX_AXES = matrix_axes(
    (
        (r"attention/(query|key|value)/kernel$", (1,), (2, 3)),
        (r"attention/out/kernel$", (1, 2), (3,)),
        (r"mlp/(up|gate|down)/kernel$", (1,), (2,)),
    )
)


class Parts(NamedTuple):
    """The parts of a run. abstract: the State's shapes and places; initialise() -> State; schedules take the step.

    scalars: what the step takes as operands, so that runs that differ in nothing else share a compiled program.
    at(**scalars) -> (base, rule, learning_rate, rho) at other values of them, which may be traced.
    """

    mesh: Mesh
    shape: Shape
    options: readout.Options
    objective: Objective
    base: Base
    rule: Rule
    initialise: Callable[[], State]
    abstract: State
    budget: Budget
    learning_rate: Callable
    rho: Callable
    scalars: dict[str, float]
    at: Callable


def assemble(
    config: ConfigDict,
    vocabulary_size: int,
    epoch_tokens: int,
    frequency: jax.Array | None = None,
    devices: Sequence | None = None,
) -> Parts:
    """Builds the parts from a config that lm.check accepted.

    epoch_tokens: tokens of one pass over the corpus, for durations in epochs. frequency: share of each token in the
    training text [padded V], which focal_sam weighs by. devices: default all.
    """
    model, optim, train = config.model, config.optim, config.train
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(config, len(devices))
    mesh = make_mesh(sizes, devices)
    shards = sizes[0] * sizes[1]
    kernel = attention.choose(
        model.attention, devices[0].platform, config.data.sequence_length, model.compute_dtype,
        segmented=config.data.packing != "concat", second_order=canonical(optim.method) == "penalty_sam",
    )  # fmt: skip
    model_shape = shape(model, vocabulary_size, config.data.sequence_length, kernel)
    params = jax.eval_shape(initialiser(model_shape, base("sgd", 0.0), method("adamw"), 0)).params
    rows = train.batch_size // train.microbatches // shards
    tokens = model.readout_chunk or readout.chunk_tokens(devices[0].platform, model_shape.vocabulary)
    chunk = readout.chunk_positions(config.data.sequence_length, rows, tokens)
    count = count_parameters(params).total
    keep = _keeps_derivative(config, model_shape, count, rows, chunk, sizes, devices[0])
    options = readout.Options(
        vocabulary_size, chunk, model.z_loss, model.logit_soft_cap, model.label_smoothing, keep,
        reduce_dtype=config.mesh.ascent_reduction if is_anchored(optim.method) else "float32", place=Placement(mesh),
    )  # fmt: skip

    given = {key: optim[key] for key in METHOD_OPTIONS if key != "rho"}
    name = canonical(optim.method)
    if name == "k_sam":
        given["shards"] = shards
    if name == "focal_sam":
        given["frequency"] = frequency
    settings = options_of(name, {**given, "rho": optim.rho})

    plan = budget(config, model_shape, params, epoch_tokens, settings, keep)

    def steps(duration: str) -> int:
        return duration_steps(duration, tokens_per_step=plan.tokens_per_step, total_steps=plan.steps)

    decay_mask, stop = _matching(config, "optim.decay_mask", params), steps(optim.stop)
    _matching(config, "optim.perturb", params)

    def rate_of(peak):
        return learning_rate(
            optim.schedule, peak, plan.steps, warmup_steps=steps(optim.warmup), end=optim.end_learning_rate,
            cooldown_steps=steps(optim.cooldown),
        )  # fmt: skip

    def at(peak_learning_rate, rho=0.0):
        rate, warmup = rate_of(peak_learning_rate), steps(optim.warmup)
        radius = rho_schedule(optim.rho_schedule, rho, plan.steps, warmup_steps=warmup, rate=rate_of(1.0))
        the_base = base(
            optim.base, rate, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay,
            decay_mask=decay_mask, matrix_axes=MATRIX_AXES,
            clip_norm=optim.clip_norm if optim.clip_order == "after" else 0.0,
        )  # fmt: skip
        rule = method(
            name, rho=radius, base=the_base, every=optim.every, start=steps(optim.start),
            stop=None if stop >= plan.steps else stop, microbatches=train.microbatches, ascent_over=optim.ascent_over,
            ascent_fraction=optim.ascent_fraction, perturb=tuple(optim.perturb), layerwise_rho=optim.layerwise_rho,
            matrix_axes=MATRIX_AXES, clip_norm=optim.clip_norm if optim.clip_order == "before" else None, **given,
        )  # fmt: skip
        return the_base, rule, rate, radius if callable(radius) else lambda step: radius

    scalars = {"peak_learning_rate": optim.peak_learning_rate}
    if settings.get("rho"):  # without one the method is its base, which is another program
        scalars["rho"] = settings["rho"]
    the_base, rule, rate, radius = at(**scalars)
    initialise = initialiser(model_shape, the_base, rule, config.seed)
    return Parts(
        mesh, model_shape, options, objective(model_shape, options, Placement(mesh)), the_base, rule, initialise,
        abstract(mesh, initialise), plan, rate, radius, scalars, at,
    )  # fmt: skip


def _matching(config: ConfigDict, key: str, params) -> Any:
    """The mask of a key's patterns; ConfigError where one matches no parameter, before a run is trained without it."""
    section, name = key.split(".")
    try:
        return mask(params, tuple(config[section][name]))
    except ValueError as error:
        raise ConfigError(key, tuple(config[section][name]), f"patterns of parameter paths: {error}") from None


def _keeps_derivative(config, shape: Shape, parameters: int, rows: int, chunk: int, sizes: tuple, device) -> bool:
    """Whether the pass at theta stores its loss derivative for the functional path; rows: sequences of a microbatch.

    auto: where the estimate of the step's memory leaves room for it, with a tenth to spare, in one microbatch (several
    would each keep theirs), and only in bfloat16, where storing it rounds nothing that was not rounded before.
    """
    choice = config.model.functional_readout
    if not is_anchored(config.optim.method) or choice == "rebuild":
        return False
    if choice == "keep":
        return True
    if shape.dtype != "bfloat16" or config.train.microbatches > 1:
        return False
    estimate = estimate_memory(shape, parameters, rows, rows * chunk, sizes, anchored=True)
    return sum(estimate) < 0.9 * chip_of(device, sizes[0] * sizes[1] * sizes[2]).memory
