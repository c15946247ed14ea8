"""The largest size that was run, 0.05m, on three seeds that chose nothing, with AdamW's own rates on seed 0.

    steppe sweep --config=english:TEXT --sweep=configs/studies/english/larger.py --out=runs/larger --order=listed

Methods at the rho that is best under few bits at 0.03m, as overtrained.py has them at 0.01m: what the three sizes say
together is how an effect goes with size. At 0.008, the best rate of the smaller sizes, and at 0.004, AdamW's best
for this one (on twice the tokens at 0.008 alone). Seed by seed, so that a study that is cut short has whole pairs.
"""

TUNED = {"model.size": "0.05m", "optim.base": "adamw", "optim.method": "adamw", "optim.schedule": "cosine"}
FUNCTIONAL = {"optim.method": "functional_sam", "optim.rho": 0.1}
ENTRIES = ({}, FUNCTIONAL, {"optim.method": "msam", "optim.rho": 0.3})
LONGER = {"train.tokens_per_parameter": 400.0}


def get_spec() -> list[dict]:
    return [
        {"set": {**TUNED, "seed": 0}, "grid": {"optim.peak_learning_rate": [0.008, 0.016, 0.004, 0.002]}},
        *(
            {"set": {**TUNED, "optim.peak_learning_rate": rate, **entry, "seed": seed}}
            for rate, entries in ((0.008, (*ENTRIES, LONGER)), (0.004, ENTRIES))
            for seed in (1, 2, 3)
            for entry in entries
        ),
    ]
