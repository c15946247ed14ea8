"""Best rho at the sizes below and above 0.03m, on seed 0, with AdamW's own grid of rates at each.

    steppe sweep --config=english:TEXT --sweep=optim/study/english/sizes.py --out=runs/sizes --order=listed

The smaller sizes first: `steppe report` fits the power law of best rho through all but the largest size, and checks it
there. Methods run at 0.008, AdamW's best at 0.03m.
"""

RATE, RHO = 0.008, [0.03, 0.01, 0.1, 0.003, 0.3]
TUNED = {"optim.base": "adamw", "optim.schedule": "cosine", "seed": 0}
SIZES, METHODS = ("0.003m", "0.01m", "0.05m"), ["functional_sam", "sam", "precond_functional_sam"]


def get_spec() -> list[dict]:
    return [block for size in SIZES for block in at(size)]


def at(size: str) -> list[dict]:
    own = {**TUNED, "model.size": size}
    return [
        {"set": {**own, "optim.method": "adamw"}, "grid": {"optim.peak_learning_rate": [RATE, 2 * RATE, RATE / 2]}},
        {"set": {**own, "optim.peak_learning_rate": RATE}, "grid": {"optim.rho": RHO, "optim.method": METHODS}},
    ]
