"""What else may keep what a model knows at the cost of AdamW, on the seeds of seeds.py, and rho beyond its grid.

    steppe sweep --config=english:TEXT --sweep=configs/studies/english/few_bits.py --out=runs/few_bits --order=listed

A high rate, no decay and a short one are named by Watts et al. as rivals of a flat minimum; NAdamW and preconditioned
Momentum-SAM are one_pass.py's. rho above 0.1 is on seed 0, where the grids of two_pass.py are.
"""

BEST = {"optim.peak_learning_rate": 0.008, "optim.schedule": "cosine", "optim.base": "adamw", "optim.method": "adamw"}
RIVALS = (
    {"optim.peak_learning_rate": 0.032},
    {"optim.schedule": "constant"},
    {"optim.schedule": "wsd", "optim.cooldown": "5%"},
    {"optim.method": "precond_msam", "optim.rho": 0.3},
    {"optim.base": "nadamw"},
)
BEYOND = (
    {"optim.method": "functional_sam", "optim.rho": 0.3},
    {"optim.method": "msam", "optim.rho": 1.0},
    {"optim.method": "sam", "optim.rho": 0.3},
    {"optim.method": "functional_sam", "optim.rho": 1.0},
)


def get_spec() -> list[dict]:
    return [
        *({"set": {**BEST, **chosen, "seed": 0}} for chosen in BEYOND),
        *({"set": {**BEST, **chosen, "seed": seed}} for seed in (1, 2, 3) for chosen in RIVALS),
    ]
