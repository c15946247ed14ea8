"""Builds the parts of a run from a checked config; every command that uses a model starts here."""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from steppe.configs.keys import ConfigError, flatten, value_of
from steppe.data import baselines, loader
from steppe.data.cache import open_of
from steppe.data.errors import DataError
from steppe.data.loader import Corpus
from steppe.data.vocabulary import load_tokenizer
from steppe.lm.model import readout
from steppe.lm.model.mesh import Placement, batch_sharding, local_rows, make_mesh, place_batch
from steppe.lm.model.objective import objective
from steppe.lm.model.parameters import GROUPS, MATRIX_AXES
from steppe.lm.model.transformer import Shape, padded_vocabulary, shape, widening_of
from steppe.lm.parts import budget as budgets
from steppe.lm.parts import corpus as corpora
from steppe.lm.parts.budget import Budget, Length, budget, count_parameters, describe, length
from steppe.lm.parts.check import base_options, kernel_of, mesh_shape, method_options, method_settings, options_as_keys
from steppe.lm.parts.chips import chip_of
from steppe.lm.parts.leg import WHOLE, Leg
from steppe.lm.parts.memo import once
from steppe.lm.parts.state import Optimizer, State, abstract, initialiser, parameter_shapes, start
from steppe.optim import Objective, references
from steppe.optim.averaging import Averages
from steppe.optim.base import base
from steppe.optim.masks import factors, mask
from steppe.optim.methods import method, options_of, perturbs, row_of, second_of
from steppe.optim.rule import OptionError
from steppe.optim.schedules import duration_steps, learning_rate
from steppe.optim.schedules import rho as rho_schedule


class Parts(NamedTuple):
    """The parts of a run. abstract: the State's shapes and shardings; initialise() -> State. key: of its programs.

    scalars: operands of the step, so that runs that differ only in them share a program. optimizer_at(**scalars): the
    Optimizer at other values, which may be traced.
    """

    mesh: Mesh
    shape: Shape
    options: readout.Options
    objective: Objective
    optimizer: Optimizer
    optimizer_at: Callable[..., Optimizer]
    scalars: dict[str, float]
    initialise: jax.tree_util.Partial
    abstract: State
    budget: Budget
    leg: Leg = WHOLE
    key: Hashable = None


@options_as_keys()  # of those that can only be checked with the parameters
def assemble(
    config: ConfigDict,
    vocabulary_size: int,
    epoch_tokens: int,
    frequency: jax.Array | None = None,
    devices: Sequence | None = None,
    leg: Leg = WHOLE,
    tokens_per_row: float | None = None,
) -> Parts:
    """Builds the parts from a config that lm.parts.check has accepted.

    epoch_tokens: positions of one pass over the corpus, for durations in epochs. tokens_per_row: tokens of a corpus row
    on average, None if unknown. frequency: share of each token in the training text [padded V], for methods that need
    it. devices: default all. leg: of a run that resumes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(config, len(devices))
    mesh, shards = make_mesh(sizes, devices), sizes[0] * sizes[1]
    kernel = kernel_of(config, devices[0].platform)
    model_shape = shape(config.model, vocabulary_size, config.data.sequence_length, kernel)
    params = parameter_shapes(model_shape)
    scalars = _scalars(config)
    frozen = "rho" in scalars and second_of(config.optim.method).frozen
    options = _readout_options(config, model_shape, vocabulary_size, params, mesh, devices[0], frozen)
    long = length(config, params, epoch_tokens, leg, tokens_per_row)
    optimizer_at = _optimizers(config, params, long, shards, {"frequency": frequency}, leg.branch)
    optimizer = optimizer_at(**scalars)
    plan = budget(
        config,
        shape=model_shape,
        params=params,
        length=long,
        rule=optimizer.rule,
        the_base=optimizer.base,
        shards=shards,
        keep=options.keep,
        leg=leg,
    )
    _must_serve(config, model_shape, params, optimizer)
    initialise = initialiser(model_shape, optimizer, config.seed)
    return Parts(
        mesh=mesh,
        shape=model_shape,
        options=options,
        objective=objective(model_shape, options, options.place, ascent_reduction(config)),
        optimizer=optimizer,
        optimizer_at=optimizer_at,
        scalars=scalars,
        initialise=initialise,
        abstract=abstract(mesh, initialise),
        budget=plan,
        leg=leg,
    )


@options_as_keys()
def planned(
    config: ConfigDict, model_shape: Shape, params: Any, epoch_tokens: int, tokens_per_row: float | None = None
) -> Budget:
    """The Budget of a run on one device, without assembling it. params: their shapes."""
    long = length(config, params, epoch_tokens, tokens_per_row=tokens_per_row)
    made = _optimizers(config, params, long, 1, {"frequency": jnp.ones(model_shape.vocabulary)})(**_scalars(config))
    _must_serve(config, model_shape, params, made)
    return budget(config, shape=model_shape, params=params, length=long, rule=made.rule, the_base=made.base)


def _must_serve(config: ConfigDict, model_shape: Shape, params: Any, optimizer: Optimizer) -> None:
    """Raises OptionError if an optimizer from outside cannot run, or checkpoints cannot hold its state."""
    names = {"base": config.optim.base, "method": config.optim.method}
    outside, row = (
        {part: name for part, name in names.items() if references.is_reference(name)},
        row_of(names["method"]),
    )
    if not outside:
        return
    row = row_of(outside["method"]) if "method" in outside else None
    if row and not row.rule:  # else the budget has traced it
        budgets.trace_rule(model_shape, optimizer.rule, optimizer.base, config.train.batch_size)
    state = jax.eval_shape(partial(start, optimizer), params)
    for part, name in outside.items():
        for path, leaf in jax.tree.leaves_with_path(state.optimizer if part == "base" else state.rule):
            if not leaf.size:
                accepted = f"one whose state checkpoints can hold: its {jax.tree_util.keystr(path)} has no entries"
                raise OptionError(part, name, accepted)


def _scalars(config: ConfigDict) -> dict[str, float]:
    """The step's operands: the learning rate, and rho if the method perturbs (otherwise the program is its base's)."""
    rho = options_of(config.optim.method, method_options(config)).get("rho")
    found = {"peak_learning_rate": config.optim.peak_learning_rate}
    return {**found, "rho": rho} if rho is not None and perturbs(config.optim.method, rho) else found


def _optimizers(
    config: ConfigDict, params: Any, long: Length, shards: int, surroundings: dict[str, Any], begin: int = 0
) -> Callable:
    """optimizer_at(peak_learning_rate, rho=0.0) of a config. begin: the parent's updates, for a branched run."""
    optim = config.optim
    decay_mask = _matching(config, "optim.decay_mask", params)
    _matching(config, "optim.perturb", params)
    for key in ("optim.rho_factors", "optim.rate_factors"):
        _matching(config, key, params, lambda tree, rules: factors(tree, rules)[1])

    offset = long.offset
    total = max(1, round(long.steps + offset))  # in steps of the present size

    def steps(duration: str) -> int:
        return duration_steps(duration, tokens_per_step=long.tokens_per_step, total_steps=total)

    def moved(schedule):
        return (lambda step: schedule(step + offset)) if offset and callable(schedule) else schedule

    widening = widening_of(config.model)
    averages = Averages(
        tuple(config.average.weights), max(1, steps(config.average.horizon)), config.average.snapshots, begin
    )
    row, warmup, stop = row_of(optim.method), steps(optim.warmup), steps(optim.stop)
    met = {need: surroundings[need] for need in (row.needs() if row else ())}

    def rate_of(peak):
        return learning_rate(
            optim.schedule, peak, total, warmup_steps=warmup, end=optim.end_learning_rate,
            cooldown_steps=steps(optim.cooldown), from_zero=optim.warmup_from_zero,
        )  # fmt: skip

    def optimizer_at(peak_learning_rate, rho=0.0) -> Optimizer:
        rate = moved(rate_of(peak_learning_rate))
        if perturbs(optim.method, rho):
            rho = rho_schedule(
                optim.rho_schedule, rho, total,
                warmup_steps=warmup, cooldown_steps=steps(optim.cooldown), rate=rate_of(1.0),
            )  # fmt: skip
            rho = moved(rho)
        the_base = base(
            optim.base,
            rate,
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            decay_mask=decay_mask,
            matrix_axes=MATRIX_AXES,
            rate_factors=tuple(optim.rate_factors),
            widening=widening,
            clip_norm=optim.clip_norm if optim.clip_order == "after" else 0.0,
            **base_options(config),
        )
        rule = method(
            optim.method,
            base=the_base,
            start=max(0, steps(optim.start) - round(offset)),
            stop=None if stop >= total else max(0, stop - round(offset)),
            microbatches=config.train.microbatches,
            widening=widening,
            matrix_axes=MATRIX_AXES,
            clip_norm=optim.clip_norm if optim.clip_order == "before" else None,
            shards=shards,
            groups=GROUPS,
            **{**method_settings(config), "rho": rho},
            **met,
        )
        return Optimizer(the_base, rule, rate, rho if callable(rho) else lambda step: rho, averages)

    return optimizer_at


def ascent_reduction(config: ConfigDict) -> str:
    """The ascent_reduction argument of `objective`; "" for float32, in which gradients are not rounded."""
    return "" if config.mesh.ascent_reduction == "float32" else config.mesh.ascent_reduction


def _readout_options(config: ConfigDict, shape: Shape, vocabulary_size: int, params: Any, mesh: Mesh, device, frozen):
    model = config.model
    rows = config.train.batch_size // config.train.microbatches // (mesh.shape["data"] * mesh.shape["fsdp"])
    tokens = model.readout_chunk or readout.chunk_tokens(device.platform, shape.vocabulary)
    chunk = readout.chunk_positions(config.data.sequence_length, rows, tokens)
    return readout.Options(
        vocabulary=vocabulary_size,
        chunk=chunk,
        z_loss=model.z_loss,
        soft_cap=model.logit_soft_cap,
        smoothing=model.label_smoothing,
        keep=frozen and _keeps_derivative(config, shape, count_parameters(params).total, rows, chunk, mesh, device),
        place=Placement(mesh, "" if config.mesh.reduction == "float32" else model.compute_dtype),
    )


def _matching(config: ConfigDict, key: str, params, reader: Callable = mask) -> Any:
    """The result of a key's patterns for each parameter. Raises ConfigError if one matches none."""
    rules = tuple(value_of(config, key))
    try:
        return reader(params, rules)
    except ValueError as error:
        raise ConfigError(key, rules, f"patterns of parameter paths: {error}") from None


def _keeps_derivative(config, shape: Shape, parameters: int, rows: int, chunk: int, mesh: Mesh, device) -> bool:
    """Whether the pass at theta stores its loss derivative for the functional path; rows: sequences per microbatch.

    auto: only if the memory estimate leaves a tenth spare, with one microbatch (several would each store theirs), and
    in bfloat16, where storing adds no rounding.
    """
    choice = config.model.functional_readout
    if choice != "auto" or shape.dtype != "bfloat16" or config.train.microbatches > 1:
        return choice == "keep"
    sizes = tuple(mesh.shape.values())
    averages = budgets.averages_kept(config)
    estimate = budgets.estimate_memory(shape, parameters, rows, rows * chunk, sizes, anchored=True, averages=averages)
    return sum(estimate) < 0.9 * chip_of(device, mesh.size).memory


# ------------------------------------------------------------------------------------------------ with a corpus
# not part of a program: its operands, and sections that concern only the run
OPERANDS, OUTSIDE = ("seed", "optim.peak_learning_rate", "optim.rho"), ("log", "checkpoint", "sample")


def program_key(config: ConfigDict, fingerprint: str, leg: Leg = WHOLE) -> tuple:
    """A key that is equal for runs with the same compiled programs. fingerprint: of the corpus."""
    flat = flatten(config.to_dict())
    held = [(key, flat[key]) for key in sorted(flat) if key not in OPERANDS and key.split(".")[0] not in OUTSIDE]
    return repr(held), fingerprint, leg, tuple(_scalars(config))


def open_parts(
    config: ConfigDict,
    log: Callable[[str], None],
    directory: str = "",
    before: Callable[[Parts], Any] = lambda parts: None,
) -> tuple[Corpus, Parts, np.ndarray]:
    """(corpus, parts of the run, count of each token in the training text [V]).

    directory: a workdir, whose prepared corpus is used if the text itself can no longer be read. before(parts): called
    before a corpus is prepared, with parts for one of made-up length, to raise what no corpus would change.
    """

    def foresee() -> None:
        made = foreseen(config)
        if jax.process_count() == 1:  # another process may find the corpus prepared, and all must run the same programs
            before(made)

    try:
        corpus = open_of(config.data, log, foresee)
    except DataError as error:
        corpus = corpora.kept(directory) if directory else None
        if corpus is None:
            raise
        log(f"{error}: the run continues with its prepared corpus, {corpus.directory}")
    if _differs(corpus.fingerprint):
        raise DataError(
            f"config.data.task = {config.data.task!r}: the processes read different text (here {corpus.fingerprint}); "
            "prepare it once and give all processes that config.data.directory"
        )
    used = {part: config.optim[part] for part in ("method", "base")}
    if _differs(repr({key: source.digest for key, source in references.sources(used).items()})):
        part = next(part for part, name in used.items() if references.is_reference(name))
        raise ConfigError(f"optim.{part}", used[part], "a file that is the same on all processes")
    counts = once("counts", corpus.fingerprint, lambda: baselines.token_counts(corpus, corpus.tokenizer.vocab_size))
    return corpus, parts_of(config, corpus, counts), counts


def foreseen(config: ConfigDict) -> Parts:
    """The parts of a run on a corpus of made-up length. Raises what no corpus would change."""
    vocabulary = load_tokenizer(config.data.vocabulary).vocab_size
    padded = padded_vocabulary(vocabulary, config.model.vocabulary_multiple)
    epoch = 1000 * config.train.batch_size * config.data.sequence_length
    made = assemble(config, vocabulary, epoch, jnp.full(padded, 1 / padded, jnp.float32))
    must_fit(config, made)
    return made


def parts_of(config: ConfigDict, corpus: Corpus, counts: np.ndarray, leg: Leg = WHOLE) -> Parts:
    """The parts of a run on a corpus; counts: of each token [V]. Raises ConfigError if they do not fit in memory."""
    vocabulary, key = corpus.tokenizer.vocab_size, program_key(config, corpus.fingerprint, leg)
    padded = padded_vocabulary(vocabulary, config.model.vocabulary_multiple)
    frequency = jnp.asarray(np.pad(counts, (0, padded - vocabulary)) / counts.sum(), jnp.float32)
    options = {"leg": leg, "tokens_per_row": corpus.tokens_per_row}
    made = once("parts", key, lambda: assemble(config, vocabulary, corpus.epoch_tokens, frequency, **options))
    must_fit(config, made)
    scalars = _scalars(config)  # those of `made` may belong to another run with the same programs
    start = jax.tree_util.Partial(made.initialise.func, np.uint32(config.seed))
    return made._replace(key=key, scalars=scalars, optimizer=made.optimizer_at(**scalars), initialise=start)


def _differs(text: str) -> bool:
    same = int(xxhash.xxh32_hexdigest(text.encode()), 16)
    return len({int(other) for other in np.ravel(multihost_utils.process_allgather(np.uint32(same)))}) > 1


def must_fit(config: ConfigDict, parts: Parts) -> None:
    """Raises ConfigError if the state and a gradient, or one activation, exceed a device's memory: a lower bound."""

    def bytes_of(tree) -> int:
        return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(tree))

    device = parts.mesh.devices.flat[0]
    needed, memory = bytes_of(parts.abstract) + bytes_of(parts.abstract.params), chip_of(device, parts.mesh.size).memory
    if memory and needed > memory:
        sizes = f"{parts.budget.parameters.total:,} parameters on {parts.mesh.size} devices"
        accepted = f"a model whose state and gradient fit a device: {sizes} need {needed / 1e9:,.1f} GB on each"
        raise ConfigError("model.size", config.model.size, f"{accepted}, which has {memory / 1e9:,.1f} GB")
    data, train, held_out = config.data, config.train, config.evaluate.batch_size
    each = data.sequence_length * config.model.width * jnp.dtype(config.model.compute_dtype).itemsize
    for key, rows in (("train.batch_size", train.batch_size // train.microbatches), ("evaluate.batch_size", held_out)):
        needed = rows * each // parts.mesh.size
        if memory and needed > memory:
            accepted = (
                f"a batch of which one activation fits a device: {rows:,} sequences of {data.sequence_length:,} tokens "
                f"need {needed / 1e9:,.1f} GB on each of {parts.mesh.size} devices, which has {memory / 1e9:,.1f} GB"
            )
            raise ConfigError(key, value_of(config, key), accepted)


def report_parts(config: ConfigDict, parts: Parts, corpus: Corpus, log: Callable[[str], None]) -> None:
    """Logs the budget, the devices and the kernels of a run."""
    log(describe(parts.budget, config.optim.method))
    if config.data.packing == "bestfit" and config.train.counted == "positions":
        log("tokens      are positions, padding included, because the run began with a version that counted those")
    for name, epochs in corpus.epochs(parts.budget.positions).items():
        log(f"corpus      {name}: {epochs:.2f} epochs")
    sizes = " x ".join(f"{axis} {size}" for axis, size in parts.mesh.shape.items())
    readout = f"logits of {parts.options.chunk} positions at a time" + (", derivative kept" * parts.options.keep)
    log(f"devices     {len(parts.mesh.devices.flat)} {jax.devices()[0].device_kind}: {sizes}")
    log(f"kernels     attention {parts.shape.kernel}, readout {readout}, remat {parts.shape.remat}")


def rows_reader(
    config: ConfigDict,
    corpus: Corpus,
    parts: Parts,
    batch_index: Callable[[int], int],
    rows: Sequence[int] | None = None,
) -> Callable:
    """rows(step) -> `rows` (None: all) of the batch of the step after `step` updates."""
    leg, size = parts.leg, config.train.batch_size

    def read(step: int) -> dict[str, np.ndarray]:
        number = batch_index(step) - leg.batches
        return loader.training_rows(corpus, config.seed, number, size, rows, before=leg.rows)

    return read


def batch_reader(config: ConfigDict, corpus: Corpus, parts: Parts, batch_index: Callable[[int], int]) -> Callable:
    """read(step) -> the batch of the step after `step` updates, sharded over the mesh."""
    batch_size = config.train.batch_size
    rows = local_rows(parts.mesh, batch_size)
    mine = rows_reader(config, corpus, parts, batch_index, rows)

    def read(step: int) -> dict:
        batch = mine(step)
        batch.pop("bytes")
        return place_batch(parts.mesh, batch_size, rows, batch)

    return read


def abstract_batch(parts: Parts, corpus: Corpus, batch_size: int) -> dict:
    """A training batch as ShapeDtypeStructs, sharded over the mesh."""
    example = loader.training_rows(corpus, 0, 0, batch_size, [0])
    example.pop("bytes")
    place = batch_sharding(parts.mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype, sharding=place)
        for name, array in example.items()
    }
