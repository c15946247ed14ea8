"""What costs two passes a step, at size 0.03m on seed 0: four rho each, and AdamW on twice the tokens.

    steppe sweep --config=english:TEXT --sweep=configs/studies/english/two_pass.py --out=runs/two_pass

Rates are AdamW's best of one_pass.py; AdamW on twice the tokens has its own grid. sam is there with one epsilon for the
batch, and with one for each quarter of it, as Watts et al. have one a device. Late functional_sam perturbs while the
rate of a wsd schedule falls, and AdamW with that schedule.
"""

RATE, RHO = 0.008, [0.01, 0.03, 0.003, 0.1]
BASE = {"optim.base": "adamw", "seed": 0}


def get_spec() -> list[dict]:
    tuned = {**BASE, "optim.peak_learning_rate": RATE, "optim.schedule": "cosine"}
    methods = ["functional_sam", "precond_functional_sam", "sam", "precond_sam"]
    decay = {**BASE, "optim.schedule": "wsd", "optim.peak_learning_rate": RATE, "optim.cooldown": "20%"}
    return [
        {"set": {**tuned, "optim.method": "adamw"}},
        {"set": tuned, "grid": {"optim.rho": RHO, "optim.method": methods}},
        {
            "set": {**BASE, "optim.method": "adamw", "optim.schedule": "cosine", "train.tokens_per_parameter": 400.0},
            "grid": {"optim.peak_learning_rate": [RATE, RATE / 2, 2 * RATE]},
        },
        {"set": {**decay, "optim.method": "adamw"}},
        {
            "set": {**decay, "optim.method": "functional_sam", "optim.rho_schedule": "late"},
            "grid": {"optim.rho": [0.03, 0.1, 0.01, 0.3]},
        },
        {
            "set": {**tuned, "optim.method": "sam", "optim.ascent_over": "microbatch", "train.microbatches": 4},
            "grid": {"optim.rho": RHO},
        },
    ]
