"""Is Momentum-SAM's gain one of flatness, or that of another learning rate or momentum? The middle size, three seeds.

Both methods at four peak learning rates (the study's is 8e-3), and AdamW at two other momenta, all on 1449 steps.
"""

RATES = [4e-3, 8e-3, 1.6e-2, 3.2e-2]


def get_spec():
    same = {"model.size": "0.03m"}
    rates = {"optim.peak_learning_rate": RATES, "seed": [0, 1, 2]}
    momenta = {"optim.b1": [0.8, 0.95], "optim.peak_learning_rate": [8e-3, 1.6e-2], "seed": [0, 1, 2]}
    return [
        {"set": {"optim.method": "adamw", **same}, "grid": rates},
        {"set": {"optim.method": "msam", "optim.rho": 0.3, **same}, "grid": rates},
        {"set": {"optim.method": "adamw", **same}, "grid": momenta},
    ]
