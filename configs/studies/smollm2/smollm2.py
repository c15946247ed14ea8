"""SmolLM2-135M trained on for 200k tokens of English, by three methods: an example of mid-training, not evidence.

    steppe sweep --config=theirs.py --sweep=configs/studies/smollm2/smollm2.py --out=OUT --order=listed --jobs=1

README.md in this folder says how theirs.py and the texts are made. TEXT is the folder of the texts.
"""

import os

TEXT = os.environ.get("TEXT", "TEXT")
SHARED = {
    "data.task": f"jsonl:{TEXT}/english.jsonl@all",
    "data.held_out": (f"english=jsonl:{TEXT}/short.jsonl@all", f"own=jsonl:{TEXT}/own.jsonl@all"),
    "data.sequence_length": 256,
    "train.batch_size": 8,
    "train.duration": "100 steps",  # 204,800 tokens
    "optim.peak_learning_rate": 1e-4,
    "optim.warmup": "10%",
    "evaluate.every": "25%",
    "evaluate.batch_size": 8,
    "checkpoint.every": "20%",
    "checkpoint.keep": 1,
    "sample.tokens": 0,
    "log.every": 5,
}
METHODS = (  # the longest first, so that two jobs end together
    {"optim.method": "functional_sam", "optim.rho": 0.03},
    {"optim.method": "adamw"},
    {"optim.method": "msam", "optim.rho": 0.1},
)


def get_spec() -> list[dict]:
    return [{"set": {**SHARED, **method, "seed": seed}} for seed in (0, 1) for method in METHODS]
