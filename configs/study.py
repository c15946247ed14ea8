"""What the runs of configs/studies share: byte-level models of Python's own sources, small enough for hundreds of runs.

    steppe sweep --config=study --sweep=configs/studies/spec.py --out=runs/study

512 tokens a step. The peak learning rate is the better of 4e-3, 8e-3 and 1.6e-2 for AdamW at size 0.03m, near enough:
style nanodo lost 2.235, 2.125 and 2.106 nats a byte with them, style modern 1.878 with 8e-3.
"""

from ml_collections import ConfigDict

from steppe.configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.style = "modern"
    config.model.size = "0.03m"
    config.model.remat = "none"
    config.data.sequence_length = 64
    config.train.batch_size = 8
    config.train.duration = "1449 steps"  # 20 tokens per non-embedding parameter of size 0.03m
    config.optim.peak_learning_rate = 8e-3
    config.evaluate.every = "25%"
    config.evaluate.batches = 30
    config.checkpoint.every = "25%"
    config.checkpoint.keep_every = "25%"  # so that curvature can be followed over training
    config.checkpoint.keep = 1
    config.log.every = 100
    config.sample.tokens = 0
    return config
