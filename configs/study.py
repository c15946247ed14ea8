"""Base config of configs/studies: byte-level models of Python's sources, small enough for hundreds of runs.

    steppe sweep --config=study --sweep=configs/studies/first/spec.py --out=runs/study

A step has 512 tokens. The peak learning rate is close to the best of 4e-3, 8e-3 and 1.6e-2 for AdamW at size 0.03m:
style nanodo reached 2.235, 2.125 and 2.106 nats per byte with them, style modern 1.878 with 8e-3.
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
    config.checkpoint.keep_every = "25%"  # so that curvature can be measured over training
    config.checkpoint.keep = 1
    config.log.every = 100
    config.sample.tokens = 0
    return config
