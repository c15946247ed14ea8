"""The largest size that was run, 0.05m, on three seeds that chose nothing, with AdamW's own rates on seed 0 first.

    steppe sweep --config=english:TEXT --sweep=optim/study/english/larger.py --out=runs/larger --order=listed

Methods at the rho that is best under few bits at 0.03m, as overtrained.py has them at 0.01m: what the three sizes say
together is how an effect goes with size. Seed by seed, so that a study that is cut short has whole pairs.
"""

RATE = 0.008
TUNED = {"model.size": "0.05m", "optim.base": "adamw", "optim.method": "adamw", "optim.schedule": "cosine"}
BEST = {**TUNED, "optim.peak_learning_rate": RATE}
ENTRIES = (
    {},
    {"optim.method": "functional_sam", "optim.rho": 0.1},
    {"optim.method": "msam", "optim.rho": 0.3},
    {"train.tokens_per_parameter": 400.0},
)


def get_spec() -> list[dict]:
    return [
        {"set": {**TUNED, "seed": 0}, "grid": {"optim.peak_learning_rate": [RATE, 2 * RATE, RATE / 2]}},
        *({"set": {**BEST, **entry, "seed": seed}} for seed in (1, 2, 3) for entry in ENTRIES),
    ]
