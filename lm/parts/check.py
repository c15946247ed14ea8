"""Refuses a config that cannot run, before anything is compiled or written."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from steppe.configs import base, packages
from steppe.configs.keys import DURATION, ConfigError, flatten, value_of
from steppe.data import cache, manifest, sources, vocabulary
from steppe.lm.model import attention
from steppe.lm.model.transformer import widening_of
from steppe.optim import methods
from steppe.optim.base import base as base_optimizer
from steppe.optim.passes.two_pass import SWITCHES
from steppe.optim.references import declared
from steppe.optim.rule import OptionError
from steppe.optim.schedules import DurationError, duration_steps, in_steps


def check(config: ConfigDict, *, device_count: int | None, process_count: int = 1, backend: str | None = None) -> None:
    """Refuses a resolved config that cannot run on these devices and processes, naming one value.

    device_count: None means the fewest that the mesh allows. backend: cpu, gpu or tpu; None skips checks that need it.
    Raises ConfigError, or data's DataError for a text source or vocabulary; each is one line.
    """
    sources.parse(config.data.task)
    sources.held_out_sources(config.data.task, config.data.held_out)
    vocabulary.load_tokenizer(config.data.vocabulary)
    described(config)
    for name, key in base.keys_of(flatten(config)).items():
        key.check(name, value_of(config, name))
    _need(not (config.init_from and config.branch_from), config, "init_from", '"" with branch_from, which sets weights')
    _need(bool(config.init_from) or not config.init_weights, config, "init_weights", '"" without init_from')
    _check_model(config, backend)
    _check_method(config)
    _check_durations(config)
    _check_mesh(config, device_count, process_count)
    for name, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        off = base.keys()[f"log.{name}"].default
        lacking = packages.lacking(module) if config.log[name] != off else ""
        _need(not lacking, config, f"log.{name}", f"{off}: it {lacking}")


def check_stored(config: ConfigDict) -> None:
    """Refuses a stored config that no run can have had; ignores its text and devices. Raises ConfigError."""
    _check_model(config, None)
    _check_durations(config)


def mesh_shape(config: ConfigDict, device_count: int | None) -> tuple[int, int, int]:
    """(data, fsdp, tensor), with -1 replaced by the number of remaining devices (1 if None). Raises ConfigError."""
    axes = {name: config.mesh[name] for name in ("data", "fsdp", "tensor")}
    for name, size in axes.items():
        _need(size == -1 or size >= 1, config, f"mesh.{name}", "an integer >= 1, or -1 for the remaining devices")
    free = [name for name, size in axes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh.{free[1]}", -1, f"an integer >= 1, because mesh.{free[0]} is -1 already")
    fixed = math.prod(size for size in axes.values() if size != -1)
    device_count = fixed if device_count is None else device_count
    shown = " x ".join(f"{name} {size}" for name, size in axes.items() if size != -1)
    blame = max((name for name in axes if name not in free), key=lambda name: axes[name])
    if free:
        accepted = f"such that {shown} = {fixed} divides the {device_count} devices"
        _need(device_count % fixed == 0, config, f"mesh.{blame}", accepted)
        axes[free[0]] = device_count // fixed
    else:
        accepted = f"such that {shown} = {fixed} equals the {device_count} devices, or -1 on one axis"
        _need(fixed == device_count, config, f"mesh.{blame}", accepted)
    return axes["data"], axes["fsdp"], axes["tensor"]


def _need(true: bool, config: ConfigDict, key: str, accepted: str) -> None:
    if not true:
        raise ConfigError(key, value_of(config, key), accepted)


def _check_model(config: ConfigDict, backend: str | None) -> None:
    model = config.model
    if backend is not None:
        kernel_of(config, backend)
        accepted = "none, full or dots on a CPU, which has no memory other than the host's"
        _need(model.remat != "offload" or backend != "cpu", config, "model.remat", accepted)
    accepted = f"a divisor of model.width = {model.width}, or any number with model.head_width set"
    _need(model.head_width or model.width % model.heads == 0, config, "model.heads", accepted)
    if model.style == "nanodo":
        accepted = "0 in style nanodo, whose heads are never grouped (style modern groups them)"
        _need(model.kv_heads in (0, model.heads), config, "model.kv_heads", accepted)
    else:
        accepted = f"0 or a divisor of model.heads = {model.heads}"
        _need(model.kv_heads == 0 or model.heads % model.kv_heads == 0, config, "model.kv_heads", accepted)
        if model.head_width:
            _need(model.head_width % 2 == 0, config, "model.head_width", "an even number, because RoPE rotates pairs")
        accepted = f"such that model.width / model.heads = {model.width // model.heads} is even: RoPE rotates pairs"
        _need(model.head_width or model.width // model.heads % 2 == 0, config, "model.heads", accepted)


def kernel_of(config: ConfigDict, backend: str) -> str:
    """The attention kernel of a run on a backend. Raises ConfigError if the named kernel cannot run there."""
    model, row = config.model, methods.row_of(config.optim.method)
    try:
        return attention.choose(
            model.attention,
            backend,
            config.data.sequence_length,
            model.compute_dtype,
            segmented=config.data.packing == "bestfit",
            second_order=bool(row) and row.second_derivatives,
        )
    except attention.NoKernel as error:
        raise ConfigError("model.attention", model.attention, f"a kernel that runs on {backend} ({error})") from None


def described(config: ConfigDict) -> dict[str, Any]:
    """What config.data.directory was prepared from, by names of config.data; {} without a directory.

    Raises ConfigError for a key with another value, unless that is the key's default.
    """
    if not config.data.directory:
        return {}
    prepared = manifest.recipe(cache.ensure(config.data))
    for name in manifest.DESCRIBED:
        value, known = config.data[name], prepared.get(name, "")
        known = tuple(known) if isinstance(known, list) else known
        prepared[name] = known
        if value not in (known, base.keys()[f"data.{name}"].default):
            accepted = f"{known!r}, from which config.data.directory was prepared, or left out"
            raise ConfigError(f"data.{name}", value, accepted)
    return {name: prepared[name] for name in manifest.DESCRIBED}


def _check_method(config: ConfigDict) -> None:
    optim = config.optim
    accepted = f"float32 with optim.method = {optim.method}, whose gradient at theta is not only climbed"
    low = config.mesh.ascent_reduction != "float32"
    _need(not low or methods.only_climbs(optim.method), config, "mesh.ascent_reduction", accepted)
    row = methods.row_of(optim.method)
    with options_as_keys():
        methods.method(
            optim.method,
            base=base_optimizer(
                optim.base,
                optim.peak_learning_rate,
                b1=optim.b1,
                widening=widening_of(config.model),
                **base_options(config),
            ),
            widening=widening_of(config.model),
            **method_settings(config),
            **dict.fromkeys(row.needs() if row else (), 1),  # placeholders for values that are known later
        )


@contextlib.contextmanager
def options_as_keys() -> Iterator[None]:
    """Turns OptionErrors into ConfigErrors of their keys."""
    try:
        yield
    except OptionError as error:
        raise ConfigError(f"optim.{error.name}", error.value, error.accepted) from None


def method_options(config: ConfigDict) -> dict[str, Any]:
    """The method options that a config sets; None for those left to the method."""
    return {name: config.optim[name] for name in {**methods.OPTIONS, **declared({"method": config.optim.method})}}


def base_options(config: ConfigDict) -> dict[str, Any]:
    """The options that a config sets of a base optimizer from a user's file; None for those left to it."""
    return {name: config.optim[name] for name in declared({"base": config.optim.base})}


def method_settings(config: ConfigDict) -> dict[str, Any]:
    """method_options, and the switches of every method."""
    return method_options(config) | {name: config.optim[name] for name in SWITCHES}


def _check_durations(config: ConfigDict) -> None:
    tokens_per_step = config.train.batch_size * config.data.sequence_length

    def steps(key: str, **known: int) -> int:
        text = value_of(config, key)
        try:
            return duration_steps(text, tokens_per_step=tokens_per_step, **known)
        except DurationError as error:
            raise ConfigError(key, text, error.accepted) from None

    # The length of "chinchilla" and of epochs depends on the model and the corpus. The text is still checked, against a
    # run so long that only a malformed duration fails.
    whole = config.train.duration
    known = whole != "chinchilla" and "epoch" not in whole
    # the number of tokens in a padded row depends on the corpus, too
    known = known and (config.data.packing == "concat" or in_steps(whole))
    total = 10**12 if whole == "chinchilla" else steps("train.duration", tokens_per_epoch=10**15)
    _need(total >= 1, config, "train.duration", f"at least one step, which is {tokens_per_step} tokens")
    others = [name for name, key in base.keys().items() if key.accepted is DURATION and name != "train.duration"]
    found = {name: steps(name, total_steps=total) for name in others}
    for key in ("evaluate.every", "checkpoint.every"):
        _need(found[key] >= 1, config, key, "at least one step")
    start, stop, warmup, cooldown = (found[f"optim.{key}"] for key in ("start", "stop", "warmup", "cooldown"))
    if known:
        _need(start <= stop, config, "optim.stop", f"no earlier than optim.start = {config.optim.start!r}")
        _need(warmup <= total, config, "optim.warmup", f"no longer than the run, which has {total} steps")
        if config.optim.schedule == "wsd":
            accepted = f"no longer than the {total - warmup} steps that remain of the run after the warm-up of {warmup}"
            _need(warmup + cooldown <= total, config, "optim.cooldown", accepted)


def _check_mesh(config: ConfigDict, device_count: int | None, process_count: int) -> None:
    data, fsdp, tensor = mesh_shape(config, device_count)
    model, train = config.model, config.train
    for key, size in (
        ("heads", model.heads),
        ("kv_heads", model.kv_heads or model.heads),
        ("mlp_width", model.mlp_width),
        ("vocabulary_multiple", model.vocabulary_multiple),
    ):
        _need(size % tensor == 0, config, "mesh.tensor", f"a divisor of model.{key} = {size}")
    _need(model.width % fsdp == 0, config, "mesh.fsdp", f"a divisor of model.width = {model.width}")
    shards = data * fsdp
    unit = train.microbatches * shards
    accepted = f"a multiple of {unit} (microbatches {train.microbatches} x mesh.data {data} x mesh.fsdp {fsdp})"
    _need(train.batch_size % unit == 0, config, "train.batch_size", accepted)
    processes, held_out = f"a multiple of the {process_count} processes", config.evaluate.batch_size
    _need(train.batch_size % process_count == 0, config, "train.batch_size", processes)
    accepted = f"0 or a multiple of {shards} (mesh.data {data} x mesh.fsdp {fsdp})"
    _need(held_out % shards == 0, config, "evaluate.batch_size", accepted)
    _need(held_out % process_count == 0, config, "evaluate.batch_size", f"0 or {processes}")
    row = methods.row_of(config.optim.method)
    if row and row.share:
        each, k = train.batch_size // unit, methods.options_of(config.optim.method, method_options(config))["k"]
        if k > each:
            raise ConfigError("optim.k", k, f"at most {each}, the sequences of one microbatch on one data shard")
