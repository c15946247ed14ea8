"""Refuses a config that cannot run, before anything is compiled or written."""

import math
import re
from typing import Any

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """An impossible config value. `key` without "config.", its `value`, and what is `accepted`; one line in all."""

    def __init__(self, key: str, value: Any, accepted: str):
        self.key, self.value, self.accepted = key, value, accepted
        super().__init__(f"config.{key} = {value!r}: must be {accepted}")


_CHOICES = {
    "model.style": ("nanodo", "modern"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "einsum", "blockwise", "cudnn", "splash"),
    "model.remat": ("none", "full", "dots", "offload"),
    "model.functional_readout": ("auto", "rebuild", "keep"),
    "data.packing": ("concat", "bestfit"),
    "optim.rho_schedule": ("constant", "warmup", "cosine", "learning_rate"),
    "optim.ascent_over": ("global", "microbatch", "subset"),
    "optim.layerwise_rho": ("none", "norm", "width"),
    "optim.precond_norm": ("l2", "ellipsoid"),
    "optim.precond_moment": ("stale", "fresh"),
    "optim.clip_order": ("after", "before"),
    "optim.schedule": ("cosine", "linear", "constant", "rsqrt", "wsd"),
    "train.parameter_count": ("total", "non_embedding"),
    "train.on_nonfinite": ("stop", "skip"),
    "log.wandb": ("online", "offline", "disabled"),
}

# key: (smallest, largest), both allowed
_INTEGERS = {
    "seed": (0, 2**32 - 1),
    "model.layers": (1, None),
    "model.width": (1, None),
    "model.heads": (1, None),
    "model.kv_heads": (0, None),
    "model.mlp_width": (1, None),
    "model.readout_chunk": (1, None),
    "data.sequence_length": (1, None),
    "data.prefetch": (0, None),
    "optim.every": (1, None),
    "optim.k": (1, None),
    "train.batch_size": (1, None),
    "train.microbatches": (1, None),
    "train.max_skips": (1, None),
    "evaluate.batches": (0, None),
    "evaluate.batch_size": (0, None),
    "checkpoint.keep": (1, None),
    "log.every": (1, None),
    "sample.tokens": (0, None),
}

_NUMBERS = (
    (
        "a finite number > 0",
        lambda value: 0 < value < math.inf,
        ("model.rope_base", "model.norm_epsilon", "optim.peak_learning_rate", "train.tokens_per_parameter"),
    ),
    (
        "a finite number >= 0",
        lambda value: 0 <= value < math.inf,
        (
            *("model.z_loss", "model.logit_soft_cap", "sample.temperature"),
            *("optim.rho", "optim.precond_power", "optim.precond_eps", "optim.lam"),
            *("optim.clip_norm", "optim.eps", "optim.weight_decay"),
        ),
    ),
    ("a finite number", math.isfinite, ("optim.alpha", "optim.beta", "optim.gamma", "optim.sigma")),
    (
        "a number >= 0 and < 1",
        lambda value: 0 <= value < 1,
        ("model.label_smoothing", "optim.b1", "optim.b2", "optim.decay"),
    ),
    ("a number from 0 to 1", lambda value: 0 <= value <= 1, ("optim.end_learning_rate",)),
    ("a number > 0 and <= 1", lambda value: 0 < value <= 1, ("optim.ascent_fraction",)),
)

# the keys of config.optim that belong to single methods and are None unless set
METHOD_OPTIONS = (
    *("rho", "precond_power", "precond_eps", "precond_norm", "precond_moment"),
    *("alpha", "beta", "gamma", "lam", "sigma", "decay", "k"),
)

_REGEXES = ("optim.perturb", "optim.decay_mask")


def check(config: ConfigDict, *, device_count: int, process_count: int = 1) -> None:
    """Raises ConfigError for the first value of a resolved config that cannot run on these devices and processes."""
    for key, names in _CHOICES.items():
        _need(_value(config, key) in (*names, None), config, key, _one_of(names))
    for key, (low, high) in _INTEGERS.items():
        value = _value(config, key)
        accepted = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
        _need(value is None or (value >= low and (high is None or value <= high)), config, key, accepted)
    for accepted, allowed, keys in _NUMBERS:
        for key in keys:
            value = _value(config, key)
            _need(value is None or allowed(value), config, key, accepted)
    for key in _REGEXES:
        _check_regexes(config, key)
    _check_model(config)
    _check_method(config)
    _check_durations(config)
    _check_mesh(config, device_count, process_count)


def mesh_shape(config: ConfigDict, device_count: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) with the one -1 replaced by the devices that remain. Raises ConfigError."""
    axes = {name: config.mesh[name] for name in ("data", "fsdp", "tensor")}
    for name, size in axes.items():
        _need(size == -1 or size >= 1, config, f"mesh.{name}", "an integer >= 1, or -1 for the devices that remain")
    free = [name for name, size in axes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh.{free[1]}", -1, f"an integer >= 1, because mesh.{free[0]} is -1 already")
    fixed = math.prod(size for size in axes.values() if size != -1)
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


def _value(config: ConfigDict, key: str) -> Any:
    value = config
    for part in key.split("."):
        value = value[part]
    return value


def _need(true: bool, config: ConfigDict, key: str, accepted: str) -> None:
    if not true:
        raise ConfigError(key, _value(config, key), accepted)


def _one_of(names) -> str:
    return "one of " + ", ".join(names)


def _check_regexes(config: ConfigDict, key: str) -> None:
    for pattern in _value(config, key):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(key, pattern, f"a regular expression over parameter paths ({error})") from None


def _check_model(config: ConfigDict) -> None:
    model = config.model
    accepted = f"a divisor of model.width = {model.width}"
    _need(model.width % model.heads == 0, config, "model.heads", accepted)
    if model.style == "nanodo":
        accepted = "0 in style nanodo, whose heads are never grouped (style modern groups them)"
        _need(model.kv_heads in (0, model.heads), config, "model.kv_heads", accepted)
    else:
        accepted = f"0 or a divisor of model.heads = {model.heads}"
        _need(model.kv_heads == 0 or model.heads % model.kv_heads == 0, config, "model.kv_heads", accepted)
        accepted = f"such that model.width / model.heads = {model.width // model.heads} is even, as RoPE turns pairs"
        _need(model.width // model.heads % 2 == 0, config, "model.heads", accepted)


def _check_method(config: ConfigDict) -> None:
    from optim import base, methods

    optim = config.optim
    names = [*methods.METHODS, *methods.ALIASES]
    _need(optim.method in names, config, "optim.method", _one_of(names))
    _need(optim.base in base.BASES, config, "optim.base", _one_of(base.BASES))

    name = methods.ALIASES.get(optim.method, optim.method)
    taken = methods.METHODS[name].defaults
    for key in METHOD_OPTIONS:
        if optim[key] is not None and key not in taken:
            takes = f"which takes {', '.join(taken)}" if taken else "which takes no options"
            raise ConfigError(
                f"optim.{key}", optim[key], f"left out (None) with optim.method = {optim.method}, {takes}"
            )

    accepted = f"1.0 unless optim.ascent_over is subset, and it is {optim.ascent_over}"
    _need(optim.ascent_fraction == 1.0 or optim.ascent_over == "subset", config, "optim.ascent_fraction", accepted)


def _check_durations(config: ConfigDict) -> None:
    from optim.schedules import duration_steps

    tokens_per_step = config.train.batch_size * config.data.sequence_length

    def steps(key: str, total_steps: int) -> int:
        try:
            return duration_steps(_value(config, key), total_steps=total_steps, tokens_per_step=tokens_per_step)
        except ValueError as error:
            accepted = 'a duration such as "2000 steps", "3.2M tokens" or "5%" of the run'
            raise ConfigError(key, _value(config, key), f"{accepted} ({error})") from None

    whole = config.train.duration
    total = 10**9  # of a run whose length depends on the corpus or the parameters: enough to check what is written
    known = False
    if whole != "chinchilla" and not re.fullmatch(r"\d+(\.\d*)?\s+epochs?", whole):
        accepted = 'a duration such as "2000 steps", "3.2M tokens", "3 epochs" or "chinchilla"'
        _need("%" not in whole, config, "train.duration", accepted)
        try:
            total = duration_steps(whole, total_steps=total, tokens_per_step=tokens_per_step)
        except ValueError as error:
            raise ConfigError("train.duration", whole, f"{accepted} ({error})") from None
        _need(total >= 1, config, "train.duration", f"at least one step of {tokens_per_step} tokens")
        known = True
    elif whole != "chinchilla":
        _need(float(whole.split()[0]) > 0, config, "train.duration", "more than 0 epochs")

    for key in ("evaluate.every", "checkpoint.every"):
        _need(steps(key, total) >= 1 or not known, config, key, "at least one step")
    start, stop = steps("optim.start", total), steps("optim.stop", total)
    _need(start <= stop or not known, config, "optim.stop", f"no earlier than optim.start = {config.optim.start!r}")
    warmup = steps("optim.warmup", total)
    cooldown = steps("optim.cooldown", total)
    if known:
        _need(warmup <= total, config, "optim.warmup", f"no longer than the run of {total} steps")
        if config.optim.schedule == "wsd":
            accepted = f"no longer than what warm-up ({warmup} steps) leaves of the run of {total} steps"
            _need(warmup + cooldown <= total, config, "optim.cooldown", accepted)


def _check_mesh(config: ConfigDict, device_count: int, process_count: int) -> None:
    data, fsdp, tensor = mesh_shape(config, device_count)
    model, train = config.model, config.train
    for key, size in (
        ("heads", model.heads),
        ("kv_heads", model.kv_heads or model.heads),
        ("mlp_width", model.mlp_width),
    ):
        accepted = f"a divisor of model.{key} = {size}"
        _need(size % tensor == 0, config, "mesh.tensor", accepted)

    shards = data * fsdp
    unit = train.microbatches * shards
    accepted = f"a multiple of {unit} (microbatches {train.microbatches} x mesh.data {data} x mesh.fsdp {fsdp})"
    _need(train.batch_size % unit == 0, config, "train.batch_size", accepted)
    accepted = f"a multiple of the {process_count} processes"
    _need(train.batch_size % process_count == 0, config, "train.batch_size", accepted)
    held_out = config.evaluate.batch_size
    accepted = f"0 or a multiple of {shards} (mesh.data {data} x mesh.fsdp {fsdp})"
    _need(held_out % shards == 0, config, "evaluate.batch_size", accepted)
    accepted = f"0 or a multiple of the {process_count} processes"
    _need(held_out % process_count == 0, config, "evaluate.batch_size", accepted)
    if config.optim.method == "k_sam" and config.optim.k is not None:
        each = train.batch_size // unit
        accepted = f"at most {each}, the sequences of one microbatch on one data shard"
        _need(config.optim.k <= each, config, "optim.k", accepted)
