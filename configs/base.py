"""Declares every configuration key of Steppe with its unit. Other configs call `get_config()` and change values.

None stands for the default of the code that reads the key. The options of single methods start at None; the rows of
optim/methods.py declare them. A duration is a text: "2000 steps", "3.2M tokens" or "5%" of the run. train.duration
also takes "3 epochs" and "chinchilla". `steppe config` prints all keys.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from steppe.configs.keys import (
    DURATION,
    FACTORS,
    FLAG,
    STEPS,
    TEXT,
    TEXTS,
    Accepted,
    ConfigError,
    Key,
    config_of,
    flatten,
    integer,
    named,
    number,
    one_of,
    or_reference,
    patterns,
    several_of,
)

# mark the position of the options of single methods, and of the switches that every method has
_METHOD_OPTIONS, _SWITCHES = "optim.*", "optim.**"
_KEYS = {
    "seed": Key(
        0, "seeds initialisation and data order; runs with the same seed see the same tokens", integer(0, 2**32 - 1)
    ),
    "init_from": Key(
        "", 'checkpoint, workdir or Hugging Face directory that gives a new run its parameters; "": random ones', TEXT
    ),
    "init_weights": Key(
        "",
        'weights to take from the run init_from: last, an average (ema, lawa) or the name of its base; "": the weights '
        "that run is evaluated with",
        TEXT,
    ),
    "branch_from": Key(
        "", 'RUN or RUN@STEP: a new run continues from its state and data position; "": start anew', TEXT
    ),
    "model.size": Key(
        "", 'a name of configs/sizes.py, which sets layers, width, heads and mlp_width; "": use the keys below', TEXT
    ),
    "model.style": Key(
        "nanodo",
        "nanodo: LayerNorm, GELU, learned positions; modern: RMSNorm, SwiGLU, RoPE",
        one_of("lm.model.transformer:STYLES"),
    ),
    "model.init": Key(
        "steppe",
        "steppe: truncated normal by fan-in, smaller at the output of a layer; nanodo: Xavier uniform, normal tables",
        one_of("lm.model.transformer:INITS"),
    ),
    "model.parametrisation": Key(
        "standard",
        "mup: initialisation, rates and rho follow the width: one learning rate suits all widths; rho is hardly tested",
        one_of("lm.model.transformer:PARAMETRISATIONS"),
    ),
    "model.base_width": Key(128, "mup: the width at which mup equals the standard parametrisation", integer(1)),
    "model.layers": Key(4, "Transformer blocks", integer(1)),
    "model.width": Key(128, "D, features of the residual stream", integer(1)),
    "model.heads": Key(4, "H, query heads", integer(1)),
    "model.head_width": Key(0, "K, features per head; 0: D / H", integer(0)),
    "model.kv_heads": Key(0, "key/value heads, a divisor of heads; 0: same as heads", integer(0)),
    "model.mlp_width": Key(512, "F, hidden features of the MLP", integer(1)),
    "model.qk_norm": Key(False, "normalise queries and keys in each head", FLAG),
    "model.tie_embeddings": Key(True, "the readout shares the embedding table", FLAG),
    "model.rope_base": Key(10000.0, "base of the RoPE wavelengths, in positions (style modern)", number(above=0)),
    "model.norm_epsilon": Key(1e-6, "added to the variance in every norm layer", number(above=0)),
    "model.vocabulary_multiple": Key(32, "the embedding table is padded to a multiple of this many rows", integer(1)),
    "model.compute_dtype": Key(
        "float32", "dtype of matrix products; the rest stays float32", one_of("float32", "bfloat16")
    ),
    "model.attention": Key(
        "auto", "kernel; auto: chosen for the backend and logged", one_of("lm.model.attention:KERNELS"), free=True
    ),
    "model.remat": Key(
        "dots",
        "what backward recomputes; full: all; dots: all but matrix products; offload: as dots, products in host memory",
        one_of("lm.model.transformer:REMAT"),
        free=True,
    ),
    "model.readout_chunk": Key(
        0, "tokens per device whose logits are in memory at once; 0: by backend and vocabulary", integer(0), free=True
    ),
    "model.functional_readout": Key(
        "auto", "recompute or store the frozen loss derivative", one_of("auto", "rebuild", "keep")
    ),
    "model.z_loss": Key(0.0, "weight of log(Z)^2, nats", number(least=0)),
    "model.logit_soft_cap": Key(0.0, "c in c * tanh(logits / c); 0: no cap", number(least=0)),
    "model.label_smoothing": Key(0.0, "probability mass spread over all tokens", number(least=0, below=1)),
    "data.task": Key("embedded", 'SOURCE, or a mixture "0.7 SOURCE + 0.3 SOURCE"; sources: see data/README.md', TEXT),
    "data.held_out": Key(
        (), 'sources to evaluate, as ("val=jsonl:val.jsonl@all",); (): the held-out split of each source', TEXTS
    ),
    "data.held_out_fraction": Key(
        0.02, "fraction of documents held out, for sources without a held-out split", number(above=0, below=1)
    ),
    "data.vocabulary": Key(
        "bytes",
        "bytes, hf:OWNER/NAME, or the path of a SentencePiece model, a tokenizer.json or a .tiktoken file",
        TEXT,
    ),
    "data.sequence_length": Key(256, "T, tokens predicted per sequence", integer(1, 1 << 24)),
    "data.packing": Key(
        "concat",
        "concat: joins documents with a separator; bestfit: whole documents in a row, no attention across them",
        one_of("data.packing:PACKINGS"),
    ),
    "data.text_field": Key("text", "field or column that holds the document's text; a.b for a nested field", TEXT),
    "data.tfds_dir": Key(
        "", 'directory of prepared TFDS data sets; "": $TFDS_DATA_DIR, else ~/tensorflow_datasets', TEXT, free=True
    ),
    "data.seqio_module": Key("", "module to import; it registers the task or mixture seqio:NAME of data.task", TEXT),
    "data.bad_records": Key(
        0.01, "largest fraction of unreadable or empty records; a corpus with more is refused", number(least=0, most=1)
    ),
    "data.shards": Key(1, "files per training source; changes the corpus, as rows do not cross files", integer(1)),
    "data.directory": Key(
        "", 'directory made by steppe prepare_data; "": prepare the corpus once, in the cache', TEXT, free=True
    ),
    "data.cache": Key(
        "", 'where prepared corpora are stored; "": $STEPPE_CACHE, else ~/.cache/steppe', TEXT, free=True
    ),
    "data.verify": Key(
        "auto",
        "check of a prepared directory when it is opened; auto: full up to 8 GiB",
        one_of("data.manifest:VERIFY"),
        free=True,
    ),
    "data.prefetch": Key(2, "batches to read ahead", integer(0), free=True),
    "data.workers": Key(1, "threads that read ahead; 0: read in the main thread", integer(0), free=True),
    "optim.method": Key(
        "adamw",
        "a name of optim/methods.py: the gradient that the base optimizer receives",
        or_reference(one_of("optim.methods:METHODS", "optim.methods:ALIASES")),
    ),
    "optim.*": Key(None, "options of single methods, from the rows of optim/methods.py", TEXT),
    "optim.rho_schedule": Key(
        "constant",
        "shape of rho over the run; learning_rate: proportional to it; late: 0 until the last optim.cooldown",
        one_of("optim.schedules:RHO_SCHEDULES"),
    ),
    "optim.start": Key("0%", "duration before which only the base optimizer runs", DURATION),
    "optim.stop": Key("100%", "duration after which only the base optimizer runs", DURATION),
    "optim.**": Key(None, "switches of every method, from optim/passes/two_pass.py", TEXT),
    "optim.clip_order": Key(
        "after", "after: clip the returned gradient; before: also clip the ascent gradient", one_of("after", "before")
    ),
    "optim.clip_norm": Key(1.0, "largest global l2 norm of the gradient; 0: no clipping", number(least=0)),
    "optim.base": Key("adamw", "a name of optim/base.py", or_reference(one_of("optim.base:BASES"))),
    "optim.peak_learning_rate": Key(1e-3, "highest learning rate, per step", number(above=0)),
    "optim.rate_factors": Key(
        (), 'learning-rate factors of parameters by regex of their path, such as ("attention/=0.5",)', FACTORS
    ),
    "optim.end_learning_rate": Key(0.1, "final learning rate, as a fraction of the peak", number(least=0, most=1)),
    "optim.schedule": Key(
        "cosine", "shape of the learning rate after the linear warm-up", one_of("optim.schedules:SCHEDULES")
    ),
    "optim.warmup": Key("5%", "duration of the warm-up", DURATION),
    "optim.warmup_from_zero": Key(
        False,
        "start the warm-up with a step at rate 0, as old runs did, if end_learning_rate is 0",
        FLAG,
        former=lambda flat: flat["optim.end_learning_rate"] == 0,
    ),
    "optim.cooldown": Key("20%", "duration of the final decay (schedule wsd, rho_schedule late)", DURATION),
    "optim.b1": Key(0.9, "decay of the first moment (momentum)", number(least=0, below=1)),
    "optim.b2": Key(0.98, "decay of the second moment", number(least=0, below=1)),
    "optim.eps": Key(1e-9, "added to the square root of the second moment", number(above=0)),
    "optim.weight_decay": Key(0.1, "decoupled weight decay, times the learning rate", number(least=0)),
    "optim.decay_mask": Key(
        ("^(?!.*(norm|scale|bias|position)).*$",), "regexes of the parameters that decay", patterns()
    ),
    "average.weights": Key(
        (), "averages of the weights, evaluated along with the weights", several_of("optim.averaging:AVERAGES")
    ),
    "average.horizon": Key("1%", "duration that an average spans", DURATION),
    "average.snapshots": Key(5, "lawa: snapshots in the average; each takes the memory of the parameters", integer(1)),
    "train.duration": Key("1000 steps", 'length of the run; also "3 epochs" or "chinchilla"', DURATION),
    "train.counted": Key(
        "tokens",
        "what durations in tokens count in padded rows: tokens of the loss, or all positions, as old runs did",
        one_of("tokens", "positions"),
        former=lambda flat: "positions" if flat["data.packing"] == "bestfit" else "tokens",
    ),
    "train.tokens_per_parameter": Key(20.0, "length of a chinchilla run, tokens per parameter", number(above=0)),
    "train.parameter_count": Key(
        "non_embedding", "parameters that chinchilla counts", one_of("total", "non_embedding")
    ),
    "train.batch_size": Key(16, "sequences per step, over all devices", integer(1)),
    "train.microbatches": Key(1, "parts of a step's batch, processed one after the other", integer(1)),
    "train.on_nonfinite": Key(
        "stop",
        "action after a non-finite loss, gradient or update; its step is never applied",
        one_of("stop", "skip", "rollback"),
    ),
    "train.on_spike": Key(
        "skip", "action after a loss spike; its step is never applied", one_of("stop", "skip", "rollback")
    ),
    "train.spike_score": Key(
        0.0, "a spike is this many robust standard deviations above the median loss; 0: never", number(least=0)
    ),
    "train.spike_window": Key(64, "recent losses that give median and deviation, steps", integer(2)),
    "train.max_skips": Key(
        10, "consecutive skipped steps, or rollbacks to one checkpoint, before the run stops", integer(1)
    ),
    "evaluate.every": Key("10%", "duration between held-out evaluations; the last step is always evaluated", DURATION),
    "evaluate.batches": Key(
        0, "held-out batches per evaluation; 0: all; the last evaluation always takes all", integer(0)
    ),
    "evaluate.choices": Key(
        (), 'multiple-choice sets to score, such as ("name=jsonl:items.jsonl",); see lm/README.md', TEXTS, free=True
    ),
    "evaluate.batch_size": Key(0, "sequences per held-out batch; 0: train.batch_size", integer(0)),
    "curvature.every": Key(
        0,
        "steps between measurements of delta_logit and delta_func on a held-out batch; 0: never",
        integer(0),
        free=True,
    ),
    "curvature.groups": Key(
        (
            "attention=attention/(query|key|value|out)/",
            "mlp=mlp/(up|gate|down)/",
            "norms=norm/",
            "embeddings=^(embed|position|readout)/",
        ),
        'name=regex over parameter paths, such as "layers/mlp/up/kernel/0"; the group "all" is added',
        patterns(r"\w+=.+", "groups as name=regex"),
        free=True,
    ),
    "checkpoint.every": Key("20%", "duration between checkpoints; the last step always has one", DURATION, free=True),
    "checkpoint.minutes": Key(0.0, "most minutes between checkpoints; 0: no limit", number(least=0), free=True),
    "checkpoint.keep": Key(2, "number of newest checkpoints to keep", integer(1), free=True),
    "checkpoint.keep_every": Key(
        "0%", 'never delete checkpoints at its multiples; "0%": delete them', DURATION, free=True
    ),
    "checkpoint.directory": Key("", 'directory or gs:// URL of the checkpoints; "": WORKDIR/checkpoints', TEXT),
    "log.every": Key(10, "steps between progress lines (metrics.jsonl has every step)", integer(1), free=True),
    "log.wandb": Key("disabled", "mode of wandb", one_of("online", "offline", "disabled"), free=True),
    "log.project": Key("steppe", "wandb project", TEXT, free=True),
    "log.group": Key("", "wandb group", TEXT, free=True),
    "log.name": Key("", 'wandb run name; "": the name of the workdir', TEXT, free=True),
    "log.tags": Key((), "wandb tags", TEXTS, free=True),
    "log.tensorboard": Key(False, "write TensorBoard event files to WORKDIR/tensorboard", FLAG, free=True),
    "log.profile": Key("", 'steps to profile into WORKDIR/profile, such as "steps 20-25"; "": none', STEPS, free=True),
    "mesh.data": Key(
        -1, "devices that split the batch and replicate the parameters; -1: all remaining", integer(-1), free=True
    ),
    "mesh.fsdp": Key(1, "devices that split batch, parameters and optimizer state", integer(-1), free=True),
    "mesh.tensor": Key(1, "devices that split heads, MLP and vocabulary", integer(-1), free=True),
    "mesh.check_every": Key(
        0,
        "steps between checks: one device recomputes a step, and a difference ends the run; 0: never",
        integer(0),
        free=True,
    ),
    "mesh.reduction": Key(
        "compute",
        "dtype that sums the gradients of embedding and readout over devices; compute: config.model.compute_dtype",
        one_of("compute", "float32"),
    ),
    "mesh.ascent_reduction": Key(
        "float32",
        "dtype that sums the readout's ascent gradient over devices; bfloat16: only if the method just climbs it",
        one_of("float32", "bfloat16"),
    ),
    "sample.prompt": Key(
        None, "prompt of the sample at the end of the run; None: the first words of the held-out text", TEXT, free=True
    ),
    "sample.tokens": Key(200, "tokens to generate; 0: none", integer(0), free=True),
    "sample.temperature": Key(0.8, "sampling temperature; 0: greedy", number(least=0), free=True),
}


@functools.cache
def keys() -> dict[str, Key]:
    """{"section.name": Key} of every key, in order."""
    declared = {}
    for name, key in _KEYS.items():
        if name == _METHOD_OPTIONS:
            for option, (kind, meaning, accepted) in named("optim.methods:OPTIONS").items():
                declared[f"optim.{option}"] = Key(None, meaning, Accepted(kind, lambda text=accepted: text))
        elif name == _SWITCHES:
            for switch, (kind, default, option) in named("optim.passes.two_pass:SWITCHES").items():
                accepted = Accepted(kind, lambda o=option: o.accepted, option.allows, lambda o=option: list(o.names))
                declared[f"optim.{switch}"] = Key(default, option.meaning, accepted)
        else:
            declared[name] = key
    return declared


def keys_of(flat: Mapping[str, Any]) -> Mapping[str, Key]:
    """{"section.name": Key} of every key of a config; `flat` may hold only part of it.

    Adds to keys() the options of optimizers from outside, whose files it runs. Raises ConfigError for a file that
    cannot be used, or an option with the name of another key.
    """
    outside = {}
    for part in ("method", "base"):
        reference = flat.get(f"optim.{part}") or ""
        try:
            declared = named("optim.references:declared")({part: reference})
        except named("optim.rule:OptionError") as error:
            raise ConfigError(f"optim.{part}", reference, error.accepted) from None
        for name, (kind, default, option) in declared.items():
            key, known = f"optim.{name}", keys().get(f"optim.{name}")
            if known and not (known.default is None and known.accepted.kind is kind):
                accepted = f"an optimizer without an option {name}: {key} is already a key"
                raise ConfigError(f"optim.{part}", reference, accepted)
            allowed = Accepted(kind, lambda o=option: o.accepted, option.allows, lambda o=option: list(o.names))
            outside[key] = known or Key(None, f"{option.meaning}; None: {default} with {reference}", allowed)
    return keys() | outside


def stored_keys(flat: Mapping[str, Any]) -> Mapping[str, Key]:
    """Like keys_of for a flat stored config, but runs no file: unknown keys count as options from outside."""
    outside = {}
    for name in flat:
        if is_foreign(name, flat):
            kind = {list: tuple, type(None): str}.get(type(flat[name]), type(flat[name]))
            accepted = Accepted(kind, lambda k=kind: k.__name__)
            outside[name] = Key(None, "an option of an optimizer from outside", accepted)
    return keys() | outside


def is_foreign(name: str, flat: Mapping[str, Any]) -> bool:
    """Whether a key of a flat stored config may be an option of its optimizer from outside. Does not run its file."""
    outside = named("optim.references:is_reference")
    used = (flat.get(f"optim.{part}") for part in ("method", "base"))
    return name.startswith("optim.") and name not in keys() and any(isinstance(n, str) and outside(n) for n in used)


def get_config() -> ConfigDict:
    """The base configuration: a small byte-level model on the embedded corpus, trained with AdamW."""
    return config_of(keys())


FREE = frozenset(name for name, key in _KEYS.items() if key.free)


@functools.cache
def _defaults() -> dict[str, Any]:
    return flatten({name: key.default for name, key in keys().items()})


def with_defaults(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config of any version of Steppe, completed with the keys that are newer than it.

    Newer keys get their defaults. If a method's default has changed since, its option gets the old default.
    """
    complete = {**_defaults(), **flat}
    complete |= former(complete, flat)
    options = [name.removeprefix("optim.") for name in flat]
    for option, value in named("optim.methods:former")(complete["optim.method"], options).items():
        if complete.get(f"optim.{option}") is None:
            complete[f"optim.{option}"] = value
    return complete


def former(flat: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """{key: old behaviour} of keys absent from `known` whose default differs from what runs did before they existed."""
    return {name: key.former(flat) for name, key in _KEYS.items() if key.former and name not in known}


def completed(config: Mapping | ConfigDict) -> ConfigDict:
    """A nested config that any version of Steppe wrote, with newer keys at their defaults.

    Raises ConfigError for a key that was removed, or a value of the wrong type.
    """
    flat = flatten(config)
    gone = [name for name in flat if name not in stored_keys(flat)]
    if gone:
        others = f" (nor {', '.join(gone[1:])})" if gone[1:] else ""
        raise ConfigError(gone[0], flat[gone[0]], f"left out: this version has no such key{others}")
    return config_of(stored_keys(flat), with_defaults(typed(flat)))


def _suits(key: Key, value: Any) -> bool:
    return key.is_typed(value) and (key.accepted.kind not in (int, float) or key.accepted.allows(value))


@functools.lru_cache(1 << 14)  # a report reads the same values in many runs
def _fits(key: Key, kind: type, value: Any) -> bool:
    return _suits(key, value)


def typed(flat: Mapping[str, Any]) -> Mapping[str, Any]:
    """Checks the types and number bounds of a flat config that any version of Steppe wrote, and returns it.

    Accepts keys that this version does not know. Raises ConfigError."""
    known = stored_keys(flat)
    sections = {name.rpartition(".")[0] for name in known} - {""}
    for name, value in flat.items():
        key = known.get(name)
        if key is None and name in sections:
            raise ConfigError(name, value, "an object")
        if key is None and (leaf := next((n for n in known if name.startswith(f"{n}.")), "")):
            raise ConfigError(leaf, "{...}", known[leaf].accepted.text())
        if key is None or (value is None and key.default is None):
            continue
        simple = isinstance(value, (bool, int, float, str))
        if not (_fits(key, type(value), value) if simple else _suits(key, value)):
            raise ConfigError(name, value, key.accepted.text())
    return flat
