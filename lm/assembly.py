"""From a checked config to the parts of a run: every command that touches a model starts here."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lm import attention, readout
from lm.budget import Budget, budget
from lm.check import METHOD_OPTIONS, mesh_shape
from lm.mesh import Placement, make_mesh
from lm.model import Shape, shape
from lm.objective import objective
from lm.state import State, abstract, initialiser
from optim import Objective, Rule
from optim.base import Base, base
from optim.masks import mask
from optim.methods import canonical, is_anchored, method, options_of
from optim.schedules import duration_steps, learning_rate, rho


class Parts(NamedTuple):
    """The parts of a run. abstract: the State's shapes and places; initialise() -> State; schedules take the step."""

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
        segmented=config.data.packing != "concat",
    )  # fmt: skip
    model_shape = shape(model, vocabulary_size, config.data.sequence_length, kernel)
    rows = train.batch_size // train.microbatches // shards
    keep = _keeps_derivative(config, model_shape, train.batch_size // shards, devices[0])
    options = readout.Options(
        vocabulary_size, readout.chunk_positions(config.data.sequence_length, rows, model.readout_chunk), model.z_loss,
        model.logit_soft_cap, model.label_smoothing, keep, place=Placement(mesh),
    )  # fmt: skip

    given = {key: optim[key] for key in METHOD_OPTIONS if key != "rho"}
    name = canonical(optim.method)
    if name == "k_sam":
        given["shards"] = shards
    if name == "focal_sam":
        given["frequency"] = frequency
    settings = options_of(name, {**given, "rho": optim.rho})

    params = jax.eval_shape(initialiser(model_shape, base("sgd", 0.0), method("adamw"), 0)).params
    plan = budget(config, model_shape, params, epoch_tokens, settings, keep)

    def steps(duration: str) -> int:
        return duration_steps(duration, tokens_per_step=plan.tokens_per_step, total_steps=plan.steps)

    rate = learning_rate(
        optim.schedule, optim.peak_learning_rate, plan.steps, warmup_steps=steps(optim.warmup),
        end=optim.end_learning_rate, cooldown_steps=steps(optim.cooldown),
    )  # fmt: skip
    radius = rho(optim.rho_schedule, settings.get("rho", 0.0), plan.steps, warmup_steps=steps(optim.warmup), rate=rate)
    the_base = base(
        optim.base, rate, b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay,
        decay_mask=mask(params, optim.decay_mask), clip_norm=optim.clip_norm if optim.clip_order == "after" else 0.0,
    )  # fmt: skip
    mask(params, optim.perturb)  # refuses a pattern that matches nothing
    stop = steps(optim.stop)
    rule = method(
        name, rho=radius, base=the_base, every=optim.every, start=steps(optim.start),
        stop=None if stop >= plan.steps else stop, microbatches=train.microbatches, ascent_over=optim.ascent_over,
        ascent_fraction=optim.ascent_fraction, perturb=tuple(optim.perturb), layerwise_rho=optim.layerwise_rho,
        clip_norm=optim.clip_norm if optim.clip_order == "before" else None, **given,
    )  # fmt: skip
    initialise = initialiser(model_shape, the_base, rule, config.seed)
    return Parts(
        mesh, model_shape, options, objective(model_shape, options, Placement(mesh)), the_base, rule, initialise,
        abstract(mesh, initialise), plan, rate, radius if callable(radius) else lambda step: radius,
    )  # fmt: skip


def _keeps_derivative(config: ConfigDict, shape: Shape, sequences: int, device) -> bool:
    """Whether the pass at theta stores its loss derivative for the functional path.

    auto: only in bfloat16, where storing it rounds nothing that was not rounded before, and where it takes at most a
    tenth of the device's memory.
    """
    choice = config.model.functional_readout
    if not is_anchored(config.optim.method) or choice == "rebuild":
        return False
    if choice == "keep":
        return True
    memory = (device.memory_stats() or {}).get("bytes_limit", 0) if hasattr(device, "memory_stats") else 0
    size = sequences * shape.sequence_length * shape.vocabulary * 2
    return shape.dtype == "bfloat16" and size * 10 <= memory
