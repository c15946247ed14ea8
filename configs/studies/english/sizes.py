"""Best rho at the sizes below 0.03m, on seed 0, with AdamW's own grid of rates at each.

    steppe sweep --config=english:TEXT --sweep=configs/studies/english/sizes.py --out=runs/sizes --order=listed

`steppe report` fits the power law of best rho through all but the largest size, and checks it there. Methods run at
AdamW's best rate of each size; at 0.01m its second best, the better with an EMA, has further seeds, as overtrained.py
has of the best.
"""

RATES = {  # the best first
    "0.003m": [0.032, 0.016, 0.064, 0.008, 0.004],
    "0.01m": [0.008, 0.016, 0.004],
}
RHO, METHODS = [0.03, 0.01, 0.1, 0.003, 0.3], ["functional_sam", "sam", "precond_functional_sam"]
TUNED = {"optim.base": "adamw", "optim.schedule": "cosine", "seed": 0}


def get_spec() -> list[dict]:
    return [block for size in RATES for block in at(size)] + [further()]


def at(size: str) -> list[dict]:
    own = {**TUNED, "model.size": size}
    return [
        {"set": {**own, "optim.method": "adamw"}, "grid": {"optim.peak_learning_rate": RATES[size]}},
        {
            "set": {**own, "optim.peak_learning_rate": RATES[size][0]},
            "grid": {"optim.rho": RHO, "optim.method": METHODS},
        },
    ]


def further() -> dict:
    own = {**TUNED, "model.size": "0.01m", "optim.method": "adamw", "optim.peak_learning_rate": 0.016}
    return {"list": [{**own, "seed": seed} for seed in (1, 2, 3)]}
