"""The setting of the Functional-SAM paper (arXiv 2502.02407), where it is known.

    steppe train --config=paper:24m,precond_functional_sam,fixed --workdir=runs/24m

The argument is SIZE,METHOD,LENGTH: a name of configs/sizes.py, a name of optim/methods.py, and `fixed` (100,000 steps
of 131,072 tokens, NanoDO's default) or `chinchilla` (20 tokens per non-embedding parameter).

The paper states C4, decoder-only Transformers in NanoDO and the two kinds of length. The rest is NanoDO's default,
which the paper may have changed: sequence length 512, batch 256, bfloat16 compute, warm-up of 1,000 steps to 1.6e-3,
cosine to 1.6e-4, AdamW with b2 0.98, eps 1e-9 and weight decay 0.1 on every parameter, no clipping, Xavier-uniform
kernels and normal tables (model.init). As in NanoDO, warm-up starts at 1.6e-4, the final rate of the cosine. rho is the
method's default: sweep it.

Differences from NanoDO: a row of 512 tokens predicts 512 tokens, not 511; documents begin after id 0, not after a BOS
token; held-out text is packed into whole rows; the residual stream is bfloat16, not float32.

Needs C4 prepared by tensorflow-datasets and the 32,000-piece C4 vocabulary of the T5 release
(cc_all.32000.100extra/sentencepiece.model) as `c4.model`. Pass its path with --config.data.vocabulary=FILE, or prepare
the text once by prepare_data and pass --config.data.directory=DIR.
"""

from ml_collections import ConfigDict

from steppe.configs import base, sizes

_LENGTHS = {"fixed": "100000 steps", "chinchilla": "chinchilla"}


def get_config(argument: str) -> ConfigDict:
    """The config of "SIZE,METHOD,LENGTH". Raises ValueError for a bad argument; the method's name is checked later."""
    parts = [part.strip() for part in argument.split(",")]
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"the argument {argument!r} must be SIZE,METHOD,LENGTH, such as 24m,functional_sam,fixed")
    size, method, length = parts
    if size not in sizes.SIZES:
        raise ValueError(f"the size {size!r} must be one of {', '.join(sizes.SIZES)}")
    if length not in _LENGTHS:
        raise ValueError(f"the length {length!r} must be one of {', '.join(_LENGTHS)}")

    config = base.get_config()
    model, data, optim, train = config.model, config.data, config.optim, config.train
    model.size = size
    model.style = model.init = "nanodo"
    model.compute_dtype = "bfloat16"

    data.task = "tfds:c4/en"
    data.vocabulary = "c4.model"
    data.sequence_length = 512

    optim.method = method
    optim.peak_learning_rate = 1.6e-3
    optim.end_learning_rate = 0.1
    optim.schedule = "cosine"
    optim.warmup = "1000 steps"
    optim.b1, optim.b2, optim.eps = 0.9, 0.98, 1e-9
    optim.weight_decay = 0.1
    optim.decay_mask = (".*",)
    optim.clip_norm = 0.0

    train.duration = _LENGTHS[length]
    train.tokens_per_parameter = 20.0
    train.parameter_count = "non_embedding"
    train.batch_size = 256

    config.evaluate.batches = 100
    config.mesh.data, config.mesh.fsdp = 1, -1
    return sizes.resolve(config)
