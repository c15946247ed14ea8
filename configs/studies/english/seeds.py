"""What the grids on seed 0 chose, on seeds that chose nothing: the pairs that the page rests on.

    steppe sweep --config=english:TEXT --sweep=configs/studies/english/seeds.py --out=runs/seeds --order=listed

On seed 0 the loss of the two-pass methods is flat in rho or lowest at the smallest, and what they lose in 4 bits falls
up to the largest, 0.1: there they are tried, and functional_sam also at its lowest loss, 0.03. AdamW on twice the
tokens stands next to the methods of two passes. Listed so that a study that is cut short has whole pairs of what comes
first.
"""

BEST = {"optim.peak_learning_rate": 0.008, "optim.schedule": "cosine", "optim.base": "adamw", "optim.method": "adamw"}
FIRST = (
    {},
    {"optim.method": "functional_sam", "optim.rho": 0.1},
    {"train.tokens_per_parameter": 400.0},
    {"optim.method": "sam", "optim.rho": 0.1},
    {"optim.method": "msam", "optim.rho": 0.3},
)
THEN = (
    {"optim.method": "precond_functional_sam", "optim.rho": 0.1},
    {"optim.method": "functional_sam", "optim.rho": 0.03},
)


def get_spec() -> list[dict]:
    return [
        {"set": {**BEST, **chosen, "seed": seed}}
        for seeds, entries in (((1, 2, 3), FIRST), ((1, 2, 3), THEN), ((4, 5), (*FIRST, *THEN)))
        for seed in seeds
        for chosen in entries
    ]
