"""What one_pass.py and two_pass.py chose on seed 0, on seeds that chose nothing: the pairs that the page rests on.

    steppe sweep --config=english:TEXT --sweep=optim/study/english/seeds.py --out=runs/seeds --order=listed

Listed seed by seed, so that a study that is cut short has whole pairs; AdamW on twice the tokens stands beside the
two-pass methods.
"""

BEST = {"optim.peak_learning_rate": 0.008, "optim.schedule": "cosine", "optim.base": "adamw", "optim.method": "adamw"}
CHOSEN = (
    {},
    {"optim.method": "functional_sam", "optim.rho": 0.03},
    {"optim.method": "precond_functional_sam", "optim.rho": 0.003},
    {"optim.method": "sam", "optim.rho": 0.003},
    {"train.tokens_per_parameter": 400.0},
    {"optim.method": "msam", "optim.rho": 0.3},
)
SEEDS = (1, 2, 3, 4, 5)


def get_spec() -> list[dict]:
    return [{"set": {**BEST, **chosen, "seed": seed}} for seed in SEEDS for chosen in CHOSEN]
