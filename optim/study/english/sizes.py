"""Best rho at the sizes below and above 0.03m, on seed 0, with AdamW's own grid of rates at each.

    steppe sweep --config=english:TEXT --sweep=optim/study/english/sizes.py --out=runs/sizes --order=listed

The smaller size first: `steppe report` fits the power law of best rho through all but the largest size, and checks it
there. Methods run at 0.008, AdamW's best at 0.03m.
"""

RATE, RHO = 0.008, [0.003, 0.01, 0.03, 0.1]
TUNED = {"optim.base": "adamw", "optim.schedule": "cosine", "seed": 0}
METHODS = ["functional_sam", "precond_functional_sam", "sam", "precond_sam"]


def get_spec() -> list[dict]:
    blocks = []
    for size in ("0.01m", "0.05m"):
        own = {**TUNED, "model.size": size}
        blocks += [
            {"set": {**own, "optim.method": "adamw"}, "grid": {"optim.peak_learning_rate": [RATE, 2 * RATE, RATE / 2]}},
            {"set": {**own, "optim.peak_learning_rate": RATE}, "grid": {"optim.rho": RHO, "optim.method": METHODS}},
        ]
    return blocks
