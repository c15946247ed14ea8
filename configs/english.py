"""Base config of configs/studies/english: byte-level models on English, far beyond 20 tokens per parameter.

    python configs/studies/english/text.py TEXT
    steppe sweep --config=english:TEXT --sweep=configs/studies/english/one_pass.py --out=runs/one_pass

The argument is the folder of the text. A step has 1,024 bytes in sequences of 128. A run has 200 tokens per
non-embedding parameter, 7,243 steps at size 0.03m, and evaluates averages of the weights.
"""

from ml_collections import ConfigDict

from steppe.configs import study


def get_config(text: str) -> ConfigDict:
    config = study.get_config()
    config.data.task = f"jsonl:{text}/english.jsonl@all"
    config.data.held_out = (f"english=jsonl:{text}/held_out.jsonl@all",)
    config.data.sequence_length = 128
    config.train.batch_size = 8
    config.train.duration = "chinchilla"
    config.train.tokens_per_parameter = 200.0
    config.average.weights = ("ema", "lawa")
    return config
