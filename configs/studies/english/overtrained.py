"""800 tokens a parameter, at size 0.01m: four times as far beyond its budget as the other cells of this folder.

    steppe sweep --config=english:TEXT --sweep=configs/studies/english/overtrained.py --out=runs/over --order=listed

AdamW's rates on seed 0 first, and each method at its best rho under few bits of the larger size, on three seeds that
chose nothing, with AdamW on twice the tokens for the methods of two passes. The same entries at 200 tokens a parameter
last: what both say together is how an effect grows with tokens.
"""

RATE = 0.008
TUNED = {"model.size": "0.01m", "optim.base": "adamw", "optim.method": "adamw", "optim.schedule": "cosine"}
ENTRIES = ({}, {"optim.method": "msam", "optim.rho": 0.3}, {"optim.method": "functional_sam", "optim.rho": 0.1})


def get_spec() -> list[dict]:
    long, short = {**TUNED, "train.tokens_per_parameter": 800.0}, {**TUNED, "train.tokens_per_parameter": 200.0}
    twice = {**TUNED, "train.tokens_per_parameter": 1600.0, "optim.peak_learning_rate": RATE}
    return [
        {"set": {**long, "seed": 0}, "grid": {"optim.peak_learning_rate": [RATE, 2 * RATE, RATE / 2]}},
        *(
            {"set": {**long, "optim.peak_learning_rate": RATE, **entry, "seed": seed}}
            for seed in (1, 2, 3)
            for entry in ENTRIES
        ),
        *({"set": {**twice, "seed": seed}} for seed in (1, 2, 3)),
        *(
            {"set": {**short, "optim.peak_learning_rate": RATE, **entry, "seed": seed}}
            for seed in (1, 2, 3)
            for entry in ENTRIES
        ),
    ]
