"""The setting of Watts et al. (ICML 2026, arXiv 2605.02105): SAM with one epsilon per device, far beyond Chinchilla.

    steppe train --config=watts:20m,sam,200 --workdir=runs/watts
    steppe train --config=watts:small,sam,200 --workdir=runs/watts-small

The argument is SIZE,METHOD,TOKENS: 20m, 60m, 150m, 1b or small; a name of optim/methods.py; tokens per parameter,
in the paper 200 to 3,200. sam uses the paper's rho, 0.05. Other methods use their default rho: sweep it.

Read from the authors' code: width and layers, RMSNorm, SwiGLU and RoPE, untied tables; 256 sequences of 1,024 tokens
per step (1b: 1,024 sequences of 2,048), in eight parts with one epsilon each; no clipping of the ascent gradient, clip
norm 1.0 for the returned one; AdamW with b1 0.9, b2 0.95, eps 1e-8 and decay 0.1 on every parameter; cosine to a tenth
of the peak; warm-up of 1,000, 2,000 and 3,000 steps; bfloat16 compute on float32 parameters.

Inferred: layers and warm-up of 1b, heads of 64, an MLP of width 4D, a vocabulary of 32,000 pieces (the sizes count all
parameters), and the peak rate between its known ends: 3e-3 at 200 tokens per parameter and 3e-4 at 3,200, on a power
law. `small` scales the setting down, on the embedded corpus by bytes: four layers, a sixteenth of the sequence length,
eight parts of four sequences, and the warm-up fraction of 20m at 200 tokens per parameter.
"""

import math

from ml_collections import ConfigDict

from steppe.configs import base, sizes

_WARMUP = {"20m": "1000 steps", "60m": "2000 steps", "150m": "3000 steps", "1b": "3000 steps", "small": "6.5%"}


def peak_rate(tokens_per_parameter: float) -> float:
    """Peak learning rate: 3e-3 up to 200 tokens per parameter, 3e-4 from 3,200 on, a power law between."""
    beyond = math.log(tokens_per_parameter / 200) / math.log(3200 / 200)
    return float(f"{3e-3 * 10 ** -min(1.0, max(0.0, beyond)):.3g}")


def get_config(argument: str) -> ConfigDict:
    """The config of "SIZE,METHOD,TOKENS". Raises ValueError for a bad argument; the method's name is checked later."""
    wrong = ValueError(f"the argument {argument!r} must be SIZE,METHOD,TOKENS per parameter, such as 20m,sam,200")
    try:
        size, method, last = (part.strip() for part in argument.split(","))
        tokens = float(last)
    except ValueError:
        raise wrong from None
    if not (method and 0 < tokens < math.inf):
        raise wrong
    if size not in _WARMUP:
        raise ValueError(f"the size {size!r} must be one of {', '.join(_WARMUP)}")

    config = base.get_config()
    model, data, optim, train = config.model, config.data, config.optim, config.train
    model.style, model.tie_embeddings = "modern", False
    if size == "small":
        model.size = "0.05m"
        data.sequence_length, train.batch_size = 64, 32
        model.remat = "none"
    else:
        model.size = size
        model.compute_dtype = "bfloat16"
        data.task, data.vocabulary = "tfds:c4/en", "c4.model"
        data.sequence_length, train.batch_size = (2048, 1024) if size == "1b" else (1024, 256)
        config.mesh.data, config.mesh.fsdp = 1, -1

    optim.method = method
    if method == "sam":
        optim.rho = 0.05
    optim.ascent_over, train.microbatches = "microbatch", 8
    optim.peak_learning_rate = peak_rate(tokens)
    optim.end_learning_rate, optim.schedule, optim.warmup = 0.1, "cosine", _WARMUP[size]
    optim.b1, optim.b2, optim.eps = 0.9, 0.95, 1e-8
    optim.weight_decay, optim.decay_mask = 0.1, (".*",)
    optim.clip_norm, optim.clip_order = 1.0, "after"

    train.duration, train.tokens_per_parameter, train.parameter_count = "chinchilla", tokens, "total"
    config.evaluate.batches = 100
    return sizes.resolve(config)
