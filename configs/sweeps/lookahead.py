"""Compares one-pass methods that take the gradient ahead of theta (Nesterov) or behind it, at four learning rates.

    steppe sweep --config=quickstart --sweep=lookahead --out=sweeps/lookahead

96 runs of equal cost: adamw and nadamw at four peak learning rates; msam and precond_msam at the same rates and three
rho; three seeds. Peaks are factors of two around 8e-3: copy this file for others. The argument may name sizes.
"""

from steppe.configs import sweeps

RATES = [0.004, 0.008, 0.016, 0.032]


def get_spec(sizes: str = "") -> list[dict]:
    shared = {**sweeps.scales(sizes), "optim.peak_learning_rate": RATES, "seed": sweeps.SEEDS}
    return [
        {"set": {"optim.method": "adamw", "optim.rho": None}, "grid": {"optim.base": ["adamw", "nadamw"], **shared}},
        {"grid": {"optim.method": ["msam", "precond_msam"], "optim.rho": [0.1, 0.3, 1.0], **shared}},
    ]
