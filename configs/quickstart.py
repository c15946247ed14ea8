"""A few minutes on two CPU cores: a byte-level model of Python's own sources, with Preconditioned Functional-SAM.

    python -m scripts.train --config=configs/quickstart.py --workdir=runs/quickstart

Cost, expected loss: see README.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    model, train, optim = config.model, config.train, config.optim
    model.layers, model.width, model.heads, model.mlp_width = 4, 128, 4, 512

    config.data.sequence_length = 128
    train.batch_size = 16
    train.duration = "400 steps"

    optim.method = "precond_functional_sam"
    optim.peak_learning_rate = 3e-3
    config.sample.tokens = 300
    return config
