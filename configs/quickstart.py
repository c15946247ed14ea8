"""Trains a byte-level model on Python's sources with Preconditioned Functional-SAM, in minutes on two CPU cores.

    steppe train --config=quickstart --workdir=runs/quickstart

The model has 0.8 M parameters and sees 0.8 M bytes. The run takes about two minutes. Held-out text costs about 2.18
bits per byte; a unigram model needs 4.7 and gzip -9 needs 2.2. README.md has the transcript.
"""

from ml_collections import ConfigDict

from steppe.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    model, train, optim = config.model, config.train, config.optim
    model.style = "modern"
    model.layers, model.width, model.heads, model.mlp_width = 4, 128, 4, 352

    config.data.sequence_length = 128
    train.batch_size = 8
    train.duration = "800 steps"

    optim.method = "precond_functional_sam"
    optim.rho = 0.02
    optim.peak_learning_rate = 3e-3
    config.log.every = 25
    config.evaluate.every = "25%"
    config.evaluate.batches = 30
    config.sample.tokens = 300
    return config
