"""Refuses a config that cannot run, before anything is compiled or written."""

import math
import re
from typing import Any

from ml_collections import ConfigDict

POLICIES = ("stop", "skip", "rollback")  # what follows a bad step


class ConfigError(ValueError):
    """An impossible config value. `key` without "config.", its `value`, and what is `accepted`; one line in all."""

    def __init__(self, key: str, value: Any, accepted: str):
        self.key, self.value, self.accepted = key, value, accepted
        super().__init__(f"config.{key} = {value!r}: must be {accepted}")


_CHOICES = {
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.functional_readout": ("auto", "rebuild", "keep"),
    "mesh.ascent_reduction": ("float32", "bfloat16"),
    "data.packing": ("concat", "bestfit"),
    "data.verify": ("full", "sizes", "auto"),
    "optim.clip_order": ("after", "before"),
    "train.parameter_count": ("total", "non_embedding"),
    "train.on_nonfinite": POLICIES,
    "train.on_spike": POLICIES,
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
    "model.vocabulary_multiple": (1, None),
    "model.readout_chunk": (0, None),
    "data.sequence_length": (1, None),
    "data.shards": (1, None),
    "data.prefetch": (0, None),
    "data.workers": (0, None),
    "optim.every": (1, None),
    "optim.k": (1, None),
    "train.batch_size": (1, None),
    "train.microbatches": (1, None),
    "train.max_skips": (1, None),
    "train.spike_window": (2, None),
    "evaluate.batches": (0, None),
    "evaluate.batch_size": (0, None),
    "checkpoint.keep": (1, None),
    "curvature.every": (0, None),
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
            *("train.spike_score", "checkpoint.minutes"),
        ),
    ),
    ("a finite number", math.isfinite, ("optim.alpha", "optim.beta", "optim.gamma", "optim.sigma")),
    (
        "a number >= 0 and < 1",
        lambda value: 0 <= value < 1,
        ("model.label_smoothing", "optim.b1", "optim.b2", "optim.decay"),
    ),
    ("a number from 0 to 1", lambda value: 0 <= value <= 1, ("optim.end_learning_rate", "data.bad_records")),
    ("a number > 0 and <= 1", lambda value: 0 < value <= 1, ("optim.ascent_fraction",)),
    ("a number > 0 and < 1", lambda value: 0 < value < 1, ("data.held_out_fraction",)),
)

# the keys of config.optim that belong to single methods and are None unless set
METHOD_OPTIONS = (
    *("rho", "precond_power", "precond_eps", "precond_norm", "precond_moment"),
    *("alpha", "beta", "gamma", "lam", "sigma", "decay", "k"),
)

_REGEXES = ("optim.perturb", "optim.decay_mask", "curvature.groups")


def check(config: ConfigDict, *, device_count: int, process_count: int = 1, backend: str | None = None) -> None:
    """Refuses a resolved config that cannot run on these devices and processes, naming one value.

    backend: cpu, gpu or tpu; None leaves out what depends on it.
    Raises ConfigError, or data's DataError for a text source or vocabulary; either is one line.
    """
    _check_data(config)
    for key, names in {**_CHOICES, **_choices_of_rooms()}.items():
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
    for group in config.curvature.groups:
        _need(re.fullmatch(r"\w+=.+", group) is not None, config, "curvature.groups", "groups as name=regex")
    _check_model(config, backend)
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


def _check_model(config: ConfigDict, backend: str | None) -> None:
    from steppe.lm.model import attention

    model, data = config.model, config.data
    if backend is not None:
        segmented, twice = data.packing == "bestfit", config.optim.method == "penalty_sam"
        try:
            attention.choose(model.attention, backend, data.sequence_length, model.compute_dtype, segmented, twice)
        except ValueError as error:
            accepted = f"a kernel that runs on {backend} ({str(error).partition(': ')[2]})"
            raise ConfigError("model.attention", model.attention, accepted) from None
        accepted = "none, full or dots on a CPU, whose memory is the host's already"
        _need(model.remat != "offload" or backend != "cpu", config, "model.remat", accepted)
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


def _check_data(config: ConfigDict) -> None:
    from steppe.data import sources, vocabulary

    sources.parse(config.data.task)
    sources.held_out_sources(config.data.task, config.data.held_out)
    vocabulary.load_tokenizer(config.data.vocabulary)


def _choices_of_rooms() -> dict[str, tuple[str, ...]]:
    from steppe.lm.model import attention
    from steppe.lm.model import transformer as model
    from steppe.optim import methods, schedules
    from steppe.optim import two_pass as sharpness_aware

    return {
        "model.style": model.STYLES,
        "model.attention": attention.KERNELS,
        "model.remat": model.REMAT,
        "optim.method": (*methods.METHODS, *methods.ALIASES),
        "optim.schedule": schedules.SCHEDULES,
        "optim.rho_schedule": schedules.RHO_SCHEDULES,
        "optim.ascent_over": sharpness_aware.ASCENT_OVER,
        "optim.layerwise_rho": sharpness_aware.LAYERWISE,
        **{f"optim.{key}": names for key, names in methods.CHOICES.items()},
    }


def _check_method(config: ConfigDict) -> None:
    from steppe.optim import methods

    optim = config.optim
    accepted = f"float32 with optim.method = {optim.method}, which has no frozen readout to be exact where this is not"
    low = config.mesh.ascent_reduction != "float32"
    _need(not low or methods.is_anchored(optim.method), config, "mesh.ascent_reduction", accepted)
    accepted = f"{_one_of(methods.accepted_bases(optim.method))} with optim.method = {optim.method}"
    _need(optim.base in methods.accepted_bases(optim.method), config, "optim.base", accepted)
    row = methods.METHODS[methods.canonical(optim.method)]
    taken = [key for key in METHOD_OPTIONS if row and key in row.defaults]
    for key in METHOD_OPTIONS:
        accepted = f"None with optim.method = {optim.method}, which takes {', '.join(taken) or 'no option'}"
        _need(optim[key] is None or key in taken, config, f"optim.{key}", accepted)
    accepted = f"1.0 unless optim.ascent_over is subset, and it is {optim.ascent_over}"
    _need(optim.ascent_fraction == 1.0 or optim.ascent_over == "subset", config, "optim.ascent_fraction", accepted)
    accepted = "1 with optim.method = look_sam, whose period is optim.k"
    _need(optim.every == 1 or optim.method != "look_sam", config, "optim.every", accepted)
    given = {key: optim[key] for key in METHOD_OPTIONS if optim[key] is not None}
    if "frequency" in (row.defaults if row else {}):
        given["frequency"] = ()  # counted from the corpus, later
    try:
        methods.method(
            optim.method,
            every=optim.every,
            ascent_over=optim.ascent_over,
            ascent_fraction=optim.ascent_fraction,
            **given,
        )
    except ValueError as error:  # "optim.KEY = VALUE: must be ACCEPTED"
        key, _, said = str(error).partition(" = ")
        raise ConfigError(key, _value(config, key), said.split(": must be ", 1)[1]) from None


def _check_durations(config: ConfigDict) -> None:
    from steppe.optim.schedules import duration_steps

    tokens_per_step = config.train.batch_size * config.data.sequence_length

    def steps(key: str, **known: int) -> int:
        text = _value(config, key)
        try:
            return duration_steps(text, tokens_per_step=tokens_per_step, **known)
        except ValueError as error:
            reason = str(error)
            for verb in (" is not ", " must be "):
                if reason.startswith(f"{text!r}{verb}"):
                    raise ConfigError(key, text, reason.removeprefix(f"{text!r}{verb}")) from None
            raise ConfigError(key, text, f"a duration in steps, tokens or % of the run ({reason})") from None

    # How long "chinchilla" and epochs are depends on the model and the corpus: what is written is checked all the same,
    # against a run so long that only a false sentence fails.
    whole = config.train.duration
    known = whole != "chinchilla" and "epoch" not in whole
    total = 10**12 if whole == "chinchilla" else steps("train.duration", tokens_per_epoch=10**15)
    _need(total >= 1, config, "train.duration", f"at least one step, which is {tokens_per_step} tokens")
    for key in ("evaluate.every", "checkpoint.every"):
        _need(steps(key, total_steps=total) >= 1, config, key, "at least one step")
    steps("checkpoint.keep_every", total_steps=total)
    start, stop, warmup, cooldown = (
        steps(f"optim.{key}", total_steps=total) for key in ("start", "stop", "warmup", "cooldown")
    )
    if known:
        _need(start <= stop, config, "optim.stop", f"no earlier than optim.start = {config.optim.start!r}")
        _need(warmup <= total, config, "optim.warmup", f"no longer than the run, which has {total} steps")
        if config.optim.schedule == "wsd":
            accepted = f"no longer than what the warm-up of {warmup} steps leaves of the run, {total - warmup} steps"
            _need(warmup + cooldown <= total, config, "optim.cooldown", accepted)


def _check_mesh(config: ConfigDict, device_count: int, process_count: int) -> None:
    data, fsdp, tensor = mesh_shape(config, device_count)
    model, train = config.model, config.train
    for key, size in (
        ("heads", model.heads),
        ("kv_heads", model.kv_heads or model.heads),
        ("mlp_width", model.mlp_width),
        ("vocabulary_multiple", model.vocabulary_multiple),
    ):
        accepted = f"a divisor of model.{key} = {size}"
        _need(size % tensor == 0, config, "mesh.tensor", accepted)

    accepted = f"a divisor of model.width = {model.width}"
    _need(model.width % fsdp == 0, config, "mesh.fsdp", accepted)
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
