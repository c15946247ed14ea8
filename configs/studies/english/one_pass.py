"""What costs one pass a step, at size 0.03m: rates and rho on seed 0, then four more seeds of the best of each.

The first blocks are the grids, all on seed 0; the rest was chosen by them, and is listed seed by seed so that a study
that is cut short has whole pairs.
"""

RATES = [0.008, 0.016, 0.032, 0.004]
BEST = {"optim.peak_learning_rate": 0.008, "optim.schedule": "cosine", "optim.base": "adamw", "optim.method": "adamw"}
FREE = {"optim.schedule": "constant", "optim.base": "schedule_free", "optim.method": "adamw"}


def get_spec() -> list[dict]:
    blocks = [
        {
            "set": {"optim.method": "adamw", "optim.schedule": "cosine", "seed": 0},
            "grid": {"optim.base": ["adamw", "nadamw"], "optim.peak_learning_rate": RATES},
        },
        {
            "set": {key: value for key, value in BEST.items() if key != "optim.method"} | {"seed": 0},
            "grid": {"optim.method": ["msam", "precond_msam"], "optim.rho": [0.1, 0.3, 0.03, 1.0]},
        },
        {"set": {**FREE, "seed": 0}, "grid": {"optim.peak_learning_rate": [0.008, 0.016, 0.004, 0.032]}},
    ]
    for seed in (1, 2, 3, 4):
        blocks += [
            {"set": {**BEST, "seed": seed}},
            {"set": {**BEST, "optim.method": "precond_msam", "optim.rho": 0.3, "seed": seed}},
            {"set": {**BEST, "optim.method": "msam", "optim.rho": 0.3, "seed": seed}},
            {"set": {**BEST, "optim.base": "nadamw", "seed": seed}},
            {"set": {**FREE, "optim.peak_learning_rate": 0.016, "seed": seed}},
        ]
    return blocks
