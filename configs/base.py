"""Every configuration key of Steppe, once, with its unit. Other configs start from `get_config()` and change values.

A key left at None means "the default of whatever reads it": so are the options of single methods, which the rows of
optim/methods.py declare. Durations are texts: "2000 steps", "3.2M tokens", "5%" of the run; train.duration also "3
epochs" or "chinchilla". `steppe config` prints all this.
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

# where the options of methods, and the switches of all of them, stand among the keys
_METHOD_OPTIONS, _SWITCHES = "optim.*", "optim.**"
_KEYS = {
    "seed": Key(
        0, "seeds initialisation and data order; runs that share it see the same tokens", integer(0, 2**32 - 1)
    ),
    "init_from": Key(
        "", 'checkpoint, workdir or Hugging Face directory whose parameters a new run starts from; "": fresh ones', TEXT
    ),
    "init_weights": Key(
        "",
        'which weights of init_from: last, an average (ema, lawa), its base; "": those the run is judged by, of a bare '
        "checkpoint the last",
        TEXT,
    ),
    "branch_from": Key(
        "", 'run whose state and place in the text a new run goes on from, as RUN or RUN@STEP; "": none', TEXT
    ),
    "model.size": Key(
        "", 'a name of configs/sizes.py, which sets layers, width, heads and mlp_width; "" keeps those below', TEXT
    ),
    "model.style": Key(
        "nanodo",
        "nanodo: LayerNorm, GELU, learned positions; modern: RMSNorm, SwiGLU, RoPE",
        one_of("lm.model.transformer:STYLES"),
    ),
    "model.init": Key(
        "steppe",
        "steppe: normal by fan-in, cut, smaller where a layer ends; nanodo: Xavier-uniform kernels, normal tables",
        one_of("lm.model.transformer:INITS"),
    ),
    "model.parametrisation": Key(
        "standard",
        "mup: initialisation, rates and rho by width, so that their best values stay over widths of one head width",
        one_of("lm.model.transformer:PARAMETRISATIONS"),
    ),
    "model.base_width": Key(128, "with mup: the width at which it is the standard parametrisation", integer(1)),
    "model.layers": Key(4, "Transformer blocks", integer(1)),
    "model.width": Key(128, "D, features of the residual stream", integer(1)),
    "model.heads": Key(4, "H, query heads", integer(1)),
    "model.head_width": Key(0, "K, features of a head; 0: D / H", integer(0)),
    "model.kv_heads": Key(0, "key/value heads, divides heads; 0: as many as heads", integer(0)),
    "model.mlp_width": Key(512, "F, hidden features of the MLP", integer(1)),
    "model.qk_norm": Key(False, "normalise queries and keys per head", FLAG),
    "model.tie_embeddings": Key(True, "the readout shares the embedding table", FLAG),
    "model.rope_base": Key(10000.0, "RoPE wavelength base, positions (style modern)", number(above=0)),
    "model.norm_epsilon": Key(1e-6, "added to the variance in every norm", number(above=0)),
    "model.vocabulary_multiple": Key(
        32, "embedding rows are the vocabulary rounded up to a multiple of this", integer(1)
    ),
    "model.compute_dtype": Key(
        "float32", "of products; parameters, loss and optimizer stay float32", one_of("float32", "bfloat16")
    ),
    "model.attention": Key(
        "auto", "kernel; auto picks by backend, and the log says which", one_of("lm.model.attention:KERNELS"), free=True
    ),
    "model.remat": Key(
        "dots",
        "what backward recomputes: dots all but products, which offload keeps in the host's memory",
        one_of("lm.model.transformer:REMAT"),
        free=True,
    ),
    "model.readout_chunk": Key(
        0, "tokens per device whose logits exist at one time; 0: by backend and vocabulary", integer(0), free=True
    ),
    "model.functional_readout": Key(
        "auto", "recompute or store the frozen loss derivative", one_of("auto", "rebuild", "keep")
    ),
    "model.z_loss": Key(0.0, "weight of log(Z)^2, nats", number(least=0)),
    "model.logit_soft_cap": Key(0.0, "c * tanh(logits / c); 0: off", number(least=0)),
    "model.label_smoothing": Key(0.0, "probability mass moved to the uniform distribution", number(least=0, below=1)),
    "data.task": Key("embedded", 'SOURCE, or a mixture "0.7 SOURCE + 0.3 SOURCE"; sources: see data/README.md', TEXT),
    "data.held_out": Key(
        (), 'sources to evaluate, as ("val=jsonl:val.jsonl@all",); (): the held-out split of each source', TEXTS
    ),
    "data.held_out_fraction": Key(
        0.02,
        "of a source's documents that make its held-out split, where it has none of its own",
        number(above=0, below=1),
    ),
    "data.vocabulary": Key(
        "bytes", "bytes | path of a SentencePiece model, a tokenizer.json or a .tiktoken file", TEXT
    ),
    "data.sequence_length": Key(256, "T, tokens predicted per sequence", integer(1, 1 << 24)),
    "data.packing": Key(
        "concat",
        "concat: documents joined by a separator | bestfit: whole documents, no attention across",
        one_of("data.packing:PACKINGS"),
    ),
    "data.text_field": Key("text", "field or column that holds a document; a.b for a nested one", TEXT),
    "data.tfds_dir": Key(
        "", 'where TFDS finds its prepared data sets; "": $TFDS_DATA_DIR, else ~/tensorflow_datasets', TEXT, free=True
    ),
    "data.seqio_module": Key("", "module to import, which registers what seqio:NAME of data.task names", TEXT),
    "data.bad_records": Key(
        0.01,
        "fraction of records that may be unreadable or empty before the corpus is refused",
        number(least=0, most=1),
    ),
    "data.shards": Key(1, "files per training source; part of the corpus, as rows do not cross files", integer(1)),
    "data.directory": Key(
        "", 'a prepared directory (steppe prepare_data); "": prepare once into the cache', TEXT, free=True
    ),
    "data.cache": Key("", 'where corpora prepare themselves; "": $STEPPE_CACHE, else ~/.cache/steppe', TEXT, free=True),
    "data.verify": Key(
        "auto",
        "how a prepared directory is checked on opening; auto: full up to 8 GiB",
        one_of("data.manifest:VERIFY"),
        free=True,
    ),
    "data.prefetch": Key(2, "batches read ahead of the step", integer(0), free=True),
    "data.workers": Key(1, "threads that read ahead; 0: read when the step asks", integer(0), free=True),
    "optim.method": Key(
        "adamw",
        "a name of optim/methods.py: which gradient the base optimizer gets",
        or_reference(one_of("optim.methods:METHODS", "optim.methods:ALIASES")),
    ),
    "optim.*": Key(None, "the options of methods, from the rows of optim/methods.py", TEXT),
    "optim.rho_schedule": Key(
        "constant",
        "shape of rho over the run; learning_rate: in proportion to it; late: only in the last optim.cooldown",
        one_of("optim.schedules:RHO_SCHEDULES"),
    ),
    "optim.start": Key("0%", "duration before which the method is its base optimizer", DURATION),
    "optim.stop": Key("100%", "duration after which the method is its base optimizer", DURATION),
    "optim.**": Key(None, "the switches of every method, from optim/two_pass.py", TEXT),
    "optim.clip_order": Key(
        "after", "after: clip the returned gradient | before: also clip the ascent gradient", one_of("after", "before")
    ),
    "optim.clip_norm": Key(1.0, "global l2 norm; 0: no clipping", number(least=0)),
    "optim.base": Key("adamw", "a name of optim/base.py", or_reference(one_of("optim.base:BASES"))),
    "optim.peak_learning_rate": Key(1e-3, "per step", number(above=0)),
    "optim.rate_factors": Key(
        (), 'learning rates of parameters apart, as ("attention/=0.5",): so many times the common one', FACTORS
    ),
    "optim.end_learning_rate": Key(0.1, "fraction of the peak at the end of the run", number(least=0, most=1)),
    "optim.schedule": Key(
        "cosine", "shape of the learning rate after a linear warm-up", one_of("optim.schedules:SCHEDULES")
    ),
    "optim.warmup": Key("5%", "duration of the warm-up", DURATION),
    "optim.warmup_from_zero": Key(
        False,
        "spend a step at rate 0 where the warm-up begins there, as runs before this key did",
        FLAG,
        former=lambda flat: flat["optim.end_learning_rate"] == 0,
    ),
    "optim.cooldown": Key("20%", "duration of the final decay (schedule wsd)", DURATION),
    "optim.b1": Key(0.9, "decay of the first moment (momentum)", number(least=0, below=1)),
    "optim.b2": Key(0.98, "decay of the second moment", number(least=0, below=1)),
    "optim.eps": Key(1e-9, "added to the root of the second moment", number(above=0)),
    "optim.weight_decay": Key(0.1, "decoupled, times the learning rate", number(least=0)),
    "optim.decay_mask": Key(("^(?!.*(norm|scale|bias|position)).*$",), "regexes of the decayed parameters", patterns()),
    "average.weights": Key(
        (), "averages of the weights that a run keeps and evaluates beside them", several_of("optim.averaging:AVERAGES")
    ),
    "average.horizon": Key("1%", "duration over which an average goes back", DURATION),
    "average.snapshots": Key(5, "lawa: parameters in the average, a copy each", integer(1)),
    "train.duration": Key("1000 steps", 'also in epochs, or "chinchilla"', DURATION),
    "train.counted": Key(
        "tokens",
        "what durations in tokens count where rows are padded: tokens that the loss sees, or all positions, as runs "
        "before this key did",
        one_of("tokens", "positions"),
        former=lambda flat: "positions" if flat["data.packing"] == "bestfit" else "tokens",
    ),
    "train.tokens_per_parameter": Key(20.0, "with chinchilla", number(above=0)),
    "train.parameter_count": Key("non_embedding", "what chinchilla counts", one_of("total", "non_embedding")),
    "train.batch_size": Key(16, "sequences per step over all devices", integer(1)),
    "train.microbatches": Key(1, "parts in which a step's batch is processed, one after the other", integer(1)),
    "train.on_nonfinite": Key(
        "stop",
        "what follows a step with a non-finite number, which changes nothing",
        one_of("stop", "skip", "rollback"),
    ),
    "train.on_spike": Key(
        "skip", "what follows a step with a loss spike, which changes nothing", one_of("stop", "skip", "rollback")
    ),
    "train.spike_score": Key(
        0.0, "a loss so many robust standard deviations above the median is a spike; 0: none is", number(least=0)
    ),
    "train.spike_window": Key(64, "recent losses that median and deviation are taken of, steps", integer(2)),
    "train.max_skips": Key(
        10, "consecutive skipped steps, or rollbacks to one checkpoint, before stopping", integer(1)
    ),
    "evaluate.every": Key("10%", "duration between held-out evaluations; one always follows the last step", DURATION),
    "evaluate.batches": Key(
        0, "held-out batches per evaluation, 0: all; the evaluation after the last step takes all", integer(0)
    ),
    "evaluate.choices": Key(
        (),
        'multiple choice, scored beside held-out loss, as ("name=jsonl:items.jsonl",); lm/README.md',
        TEXTS,
        free=True,
    ),
    "evaluate.batch_size": Key(0, "sequences; 0: train.batch_size", integer(0)),
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
        'name=regex over parameter paths, layers as "layers/mlp/up/kernel/0"; "all" is always there',
        patterns(r"\w+=.+", "groups as name=regex"),
        free=True,
    ),
    "checkpoint.every": Key(
        "20%", "duration between checkpoints; one always follows the last step", DURATION, free=True
    ),
    "checkpoint.minutes": Key(0.0, "also after so many minutes without one; 0: never", number(least=0), free=True),
    "checkpoint.keep": Key(2, "newest checkpoints kept", integer(1), free=True),
    "checkpoint.keep_every": Key("0%", 'duration whose multiples are kept for good; "0%": none', DURATION, free=True),
    "checkpoint.directory": Key("", 'where they lie, also gs://; "": WORKDIR/checkpoints', TEXT),
    "log.every": Key(10, "steps between lines of progress (metrics.jsonl has every step)", integer(1), free=True),
    "log.wandb": Key("disabled", "where wandb records go", one_of("online", "offline", "disabled"), free=True),
    "log.project": Key("steppe", "wandb project", TEXT, free=True),
    "log.group": Key("", "wandb group", TEXT, free=True),
    "log.name": Key("", 'wandb run name; "": the name of the workdir', TEXT, free=True),
    "log.tags": Key((), "wandb tags", TEXTS, free=True),
    "log.tensorboard": Key(False, "TensorBoard's event files in WORKDIR/tensorboard", FLAG, free=True),
    "log.profile": Key("", 'traced steps, as "steps 20-25", into WORKDIR/profile; "": none', STEPS, free=True),
    "mesh.data": Key(
        -1, "devices along which the batch is split, parameters replicated; -1: all that remain", integer(-1), free=True
    ),
    "mesh.fsdp": Key(1, "devices along which batch, parameters and optimizer state are split", integer(-1), free=True),
    "mesh.tensor": Key(1, "devices along which heads, MLP and vocabulary are split", integer(-1), free=True),
    "mesh.check_every": Key(
        0,
        "steps between those one device computes again; the run ends where they differ; 0: none",
        integer(0),
        free=True,
    ),
    "mesh.reduction": Key(
        "compute",
        "dtype of sums over devices of the tables' gradients; compute: config.model.compute_dtype, as all others",
        one_of("compute", "float32"),
    ),
    "mesh.ascent_reduction": Key(
        "float32",
        "bfloat16: sums over devices of the readout's gradient at theta are that low, where it is only climbed",
        one_of("float32", "bfloat16"),
    ),
    "sample.prompt": Key("def ", "continued at the end of the run", TEXT, free=True),
    "sample.tokens": Key(200, "tokens generated; 0: none", integer(0), free=True),
    "sample.temperature": Key(0.8, "0: greedy", number(least=0), free=True),
}


@functools.cache
def keys() -> dict[str, Key]:
    """{"section.name": Key} of every key, in order."""
    found = {}
    for name, key in _KEYS.items():
        if name == _METHOD_OPTIONS:
            for option, (kind, meaning, accepted) in named("optim.methods:OPTIONS").items():
                found[f"optim.{option}"] = Key(None, meaning, Accepted(kind, lambda text=accepted: text))
        elif name == _SWITCHES:
            for switch, (kind, default, option) in named("optim.two_pass:SWITCHES").items():
                accepted = Accepted(kind, lambda o=option: o.accepted, option.allows, lambda o=option: list(o.names))
                found[f"optim.{switch}"] = Key(default, option.meaning, accepted)
        else:
            found[name] = key
    return found


def keys_of(flat: Mapping[str, Any]) -> Mapping[str, Key]:
    """{"section.name": Key} of every key of one config, of which `flat` is known: here the whole of it need not be.

    Beyond keys() these are the options that its optimizers from outside declare, whose files are run. ConfigError for
    a file that does not serve, or an option with the name of another key.
    """
    found = {}
    for part in ("method", "base"):
        reference = flat.get(f"optim.{part}") or ""
        try:
            declared = named("optim.references:declared")({part: reference})
        except named("optim.rule:OptionError") as error:
            raise ConfigError(f"optim.{part}", reference, error.accepted) from None
        for name, (kind, default, option) in declared.items():
            key, known = f"optim.{name}", keys().get(f"optim.{name}")
            if known and not (known.default is None and known.accepted.kind is kind):
                accepted = f"one whose options have names of their own: {key} is another key"
                raise ConfigError(f"optim.{part}", reference, accepted)
            allowed = Accepted(kind, lambda o=option: o.accepted, option.allows, lambda o=option: list(o.names))
            found[key] = known or Key(None, f"{option.meaning}; None: {default} with {reference}", allowed)
    return keys() | found


def stored_keys(flat: Mapping[str, Any]) -> Mapping[str, Key]:
    """The same of a flat stored config, whose optimizers from outside are not run: their options are what it holds."""
    found = {}
    for name in flat:
        if is_foreign(name, flat):
            kind = {list: tuple, type(None): str}.get(type(flat[name]), type(flat[name]))
            found[name] = Key(None, "an option of an optimizer from outside", Accepted(kind, lambda k=kind: k.__name__))
    return keys() | found


def is_foreign(name: str, flat: Mapping[str, Any]) -> bool:
    """Whether a key of a flat stored config may be an option of its optimizer from outside, whose file is not run."""
    outside = named("optim.references:is_reference")
    used = (flat.get(f"optim.{part}") for part in ("method", "base"))
    return name.startswith("optim.") and name not in keys() and any(isinstance(n, str) and outside(n) for n in used)


def get_config() -> ConfigDict:
    """The base configuration: a small byte-level model on the embedded corpus, trained with AdamW."""
    return config_of(keys())


FREE = frozenset(name for name, key in _KEYS.items() if key.free)


def with_defaults(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config of some version of Steppe with the keys it did not have yet; absent options of methods are None.

    An option left to its method whose default has changed since is at what it then was.
    """
    found = flatten({name: key.default for name, key in stored_keys(flat).items()}) | dict(flat)
    found |= former(found, flat)
    options = [name.removeprefix("optim.") for name in flat]
    for option, value in named("optim.methods:former")(found["optim.method"], options).items():
        if found.get(f"optim.{option}") is None:
            found[f"optim.{option}"] = value
    return found


def former(found: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """{key: what a run did} for the keys whose default says otherwise, of a config that knows only these keys."""
    return {name: key.former(found) for name, key in _KEYS.items() if key.former and name not in known}


def completed(config: Mapping | ConfigDict) -> ConfigDict:
    """A nested config that some version of Steppe wrote, with the keys it did not have yet at their defaults.

    Raises ConfigError for keys that are there no longer, or a value of another type.
    """
    flat = flatten(config)
    gone = [name for name in flat if name not in stored_keys(flat)]
    if gone:
        others = f" (nor {', '.join(gone[1:])})" if gone[1:] else ""
        raise ConfigError(gone[0], flat[gone[0]], f"left out: this version has no such key{others}")
    return config_of(stored_keys(flat), with_defaults(typed(flat)))


def _suits(key: Key, value: Any) -> bool:
    return key.is_typed(value) and (key.accepted.kind not in (int, float) or key.accepted.allows(value))


@functools.lru_cache(1 << 14)  # many runs are read, of which most values are the same
def _fits(key: Key, kind: type, value: Any) -> bool:
    return _suits(key, value)


def typed(flat: Mapping[str, Any]) -> Mapping[str, Any]:
    """A flat config that some version of Steppe wrote, once its values are of their keys' types, and numbers within
    their bounds; keys that this version does not know are let through. ConfigError."""
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
