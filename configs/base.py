"""Every configuration key of Steppe, once, with its unit. Other configs start from `get_config()` and change values.

A key left at None (a typed placeholder) means "the default of whatever reads it", and its comment says which.
Durations are strings: "2000 steps", "3.2M tokens", "5%" of the run; train.duration also "3 epochs" or "chinchilla".
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The base configuration: a small byte-level model on the embedded corpus, trained with AdamW."""
    config = ConfigDict()
    config.seed = 0  # seeds initialisation and data order; runs that share it see the same tokens
    config.init_from = ""  # checkpoint or workdir whose parameters a new run starts from; "": fresh ones

    config.model = model = ConfigDict()
    model.size = ""  # a name of configs/sizes.py, which sets layers, width, heads and mlp_width; "" keeps those below
    model.style = "nanodo"  # nanodo: LayerNorm, GELU, learned positions; modern: RMSNorm, SwiGLU, RoPE
    model.layers = 4  # Transformer blocks
    model.width = 128  # D, features of the residual stream
    model.heads = 4  # H, query heads; D / H is the head width
    model.kv_heads = 0  # key/value heads, divides heads; 0: as many as heads
    model.mlp_width = 512  # F, hidden features of the MLP
    model.qk_norm = False  # normalise queries and keys per head
    model.tie_embeddings = True  # the readout shares the embedding table
    model.rope_base = 10000.0  # RoPE wavelength base, positions (style modern)
    model.norm_epsilon = 1e-6  # added to the variance in every norm
    model.vocabulary_multiple = 32  # embedding rows are the vocabulary rounded up to a multiple of this
    model.compute_dtype = "float32"  # float32 | bfloat16; parameters, loss and optimizer stay float32
    model.attention = "auto"  # auto | einsum | blockwise | cudnn | splash; auto picks by backend, the log says
    model.remat = "dots"  # none | full | dots (all but products) | offload (to the host): what backward recomputes
    model.readout_chunk = 0  # tokens per device whose logits exist at one time; 0: by backend and vocabulary
    model.functional_readout = "auto"  # rebuild | keep | auto: recompute or store the frozen loss derivative
    model.z_loss = 0.0  # weight of log(Z)^2, nats
    model.logit_soft_cap = 0.0  # c * tanh(logits / c); 0: off
    model.label_smoothing = 0.0  # probability mass moved to the uniform distribution

    config.data = data = ConfigDict()
    data.task = "embedded"  # SOURCE, or a mixture "0.7 SOURCE + 0.3 SOURCE"; sources: see data/README.md
    data.held_out = ()  # sources to evaluate, as ("val=jsonl:val.jsonl@all",); (): the held-out split of each source
    data.held_out_fraction = 0.02  # of a source's documents that make its held-out split, where it has none of its own
    data.vocabulary = "bytes"  # bytes | path of a SentencePiece model
    data.sequence_length = 256  # T, tokens predicted per sequence
    data.packing = "concat"  # concat: documents joined by a separator | bestfit: whole documents, no attention across
    data.text_field = "text"  # field (JSONL, TFDS) or column (Parquet) that holds a document
    data.tfds_dir = ""  # where TFDS finds its prepared data sets; "": $TFDS_DATA_DIR, else ~/tensorflow_datasets
    data.bad_records = 0.01  # fraction of records that may be unreadable or empty before the corpus is refused
    data.shards = 1  # files per training source; part of the corpus, as rows do not cross files
    data.directory = ""  # a prepared directory (steppe prepare_data); "": prepare once into the cache
    data.cache = ""  # where corpora prepare themselves; "": $STEPPE_CACHE, else ~/.cache/steppe
    data.verify = "auto"  # full | sizes | auto (full up to 8 GiB): how a prepared directory is checked on opening
    data.prefetch = 2  # batches read ahead of the step
    data.workers = 1  # threads that read ahead; 0: read when the step asks

    config.optim = optim = ConfigDict()
    optim.method = "adamw"  # a name of optim/methods.py: which gradient the base optimizer gets
    optim.rho = placeholder(float)  # perturbation radius, l2 norm over all parameters; None: the method's default
    optim.rho_schedule = "constant"  # constant | warmup | cosine | learning_rate (proportional to it)
    optim.start = "0%"  # duration before which the method is its base optimizer
    optim.stop = "100%"  # duration after which the method is its base optimizer
    optim.every = 1  # perturb on every k-th step, the base gradient in between
    optim.ascent_over = "global"  # global | microbatch | subset: the tokens that one perturbation is computed from
    optim.ascent_fraction = 1.0  # with subset: fraction of each microbatch's sequences used for the ascent
    optim.perturb = (".*",)  # regexes over parameter paths: a parameter is perturbed if one matches
    optim.layerwise_rho = "none"  # none | norm (rho * |theta_l|) | width (rho / sqrt(fan-in)): scaling per parameter
    optim.precond_power = placeholder(float)  # exponent of the second moment in D; None: the method's default (0.5)
    optim.precond_eps = placeholder(float)  # added to D; None: 1e-8
    optim.precond_norm = placeholder(str)  # l2 | ellipsoid: the norm in which rho is measured; None: l2
    optim.precond_moment = placeholder(str)  # stale | fresh: second moment before or after this gradient; None: stale
    optim.alpha = placeholder(float)  # functional share; gsam's, look_sam's weight; None: the method's default
    optim.beta = placeholder(float)  # cr_sam's gradient-difference weight; None: the method's default
    optim.gamma = placeholder(float)  # cr_sam's curvature weight, focal_sam's focus; None: the method's default
    optim.lam = placeholder(float)  # focal_sam's lambda; None: the method's default
    optim.sigma = placeholder(float)  # friendly_sam's share of the average gradient removed; None: the method's default
    optim.decay = placeholder(float)  # friendly_sam's averaging decay; None: the method's default
    optim.k = placeholder(int)  # look_sam's period, steps; k_sam's sequences per data shard; None: the method's default
    optim.clip_order = "after"  # after: clip the returned gradient | before: also clip the ascent gradient
    optim.clip_norm = 1.0  # global l2 norm; 0: no clipping
    optim.base = "adamw"  # a name of optim/base.py
    optim.peak_learning_rate = 1e-3  # per step
    optim.end_learning_rate = 0.1  # fraction of the peak at the end of the run
    optim.schedule = "cosine"  # cosine | linear | constant | rsqrt | wsd, each after a linear warm-up
    optim.warmup = "5%"  # duration of the warm-up
    optim.cooldown = "20%"  # duration of the final decay (schedule wsd)
    optim.b1 = 0.9  # decay of the first moment (momentum)
    optim.b2 = 0.98  # decay of the second moment
    optim.eps = 1e-9  # added to the root of the second moment
    optim.weight_decay = 0.1  # decoupled, times the learning rate
    optim.decay_mask = ("^(?!.*(norm|scale|bias|position)).*$",)  # regexes of the decayed parameters

    config.train = train = ConfigDict()
    train.duration = "1000 steps"  # steps | tokens | epochs | "chinchilla"
    train.tokens_per_parameter = 20.0  # with chinchilla
    train.parameter_count = "non_embedding"  # total | non_embedding: what chinchilla counts
    train.batch_size = 16  # sequences per step over all devices
    train.microbatches = 1  # parts in which a step's batch is processed, one after the other
    train.on_nonfinite = "stop"  # stop | skip | rollback, after a step with a non-finite number, which changes nothing
    train.on_spike = "skip"  # stop | skip | rollback, after a step with a loss spike, which changes nothing
    train.spike_score = 0.0  # a loss so many robust standard deviations above the median is a spike; 0: none is
    train.spike_window = 64  # recent losses that median and deviation are taken of, steps
    train.max_skips = 10  # consecutive skipped steps, or rollbacks to one checkpoint, before stopping

    config.evaluate = evaluate = ConfigDict()
    evaluate.every = "10%"  # duration between held-out evaluations; one always follows the last step
    evaluate.batches = 0  # held-out batches per evaluation, 0: all; the evaluation after the last step takes all
    evaluate.batch_size = 0  # sequences; 0: train.batch_size

    config.curvature = curvature = ConfigDict()
    curvature.every = 0  # steps between measurements of delta_logit and delta_func on a held-out batch; 0: never
    curvature.groups = (  # name=regex over parameter paths, layers as "layers/mlp/up/kernel/0"; "all" is always there
        "attention=attention/(query|key|value|out)/",
        "mlp=mlp/(up|gate|down)/",
        "norms=norm/",
        "tables=^(embed|position|readout)/",
    )

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = "20%"  # duration between checkpoints; one always follows the last step
    checkpoint.minutes = 0.0  # also after so many minutes without one; 0: never
    checkpoint.keep = 2  # newest checkpoints kept
    checkpoint.keep_every = "0%"  # duration whose multiples are kept for good; "0%": none
    checkpoint.directory = ""  # where they lie, also gs:// or s3://; "": WORKDIR/checkpoints

    config.log = log = ConfigDict()
    log.every = 10  # steps between lines of progress (metrics.jsonl has every step)
    log.wandb = "disabled"  # online | offline | disabled
    log.project = "steppe"  # wandb project
    log.group = ""  # wandb group
    log.name = ""  # wandb run name; "": the name of the workdir

    config.mesh = mesh = ConfigDict()
    mesh.data = -1  # devices along which the batch is split, parameters replicated; -1: all that remain
    mesh.fsdp = 1  # devices along which batch, parameters and optimizer state are split
    mesh.tensor = 1  # devices along which heads, MLP and vocabulary are split
    mesh.ascent_reduction = "float32"  # float32 | bfloat16: sums over devices of the readout's gradient at theta

    config.sample = sample = ConfigDict()
    sample.prompt = "def "  # continued at the end of the run
    sample.tokens = 200  # tokens generated; 0: none
    sample.temperature = 0.8  # 0: greedy
    return config
