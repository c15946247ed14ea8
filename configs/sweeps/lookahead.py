"""Whose gain is Nesterov's? Methods of one pass that take their gradient ahead of theta or behind it, at four rates.

    steppe sweep --config=quickstart --sweep=lookahead --out=sweeps/lookahead

96 runs at one cost: adamw and nadamw at four peak learning rates, msam and precond_msam at the same and three rho,
three seeds. Peaks are factors of two around 8e-3: copy this file for others. SIZES may be given.
"""

from steppe.configs import sweeps

RATES = [0.004, 0.008, 0.016, 0.032]


def get_spec(sizes: str = "") -> list[dict]:
    shared = {**sweeps.scales(sizes), "optim.peak_learning_rate": RATES, "seed": sweeps.SEEDS}
    return [
        {"set": {"optim.method": "adamw", "optim.rho": None}, "grid": {"optim.base": ["adamw", "nadamw"], **shared}},
        {"grid": {"optim.method": ["msam", "precond_msam"], "optim.rho": [0.1, 0.3, 1.0], **shared}},
    ]
