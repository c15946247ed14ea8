"""Compares two-pass methods with AdamW at twice the steps, so at equal cost: three sizes, three seeds.

    steppe sweep --config=quickstart --sweep=equal_compute --out=sweeps/equal

153 runs: AdamW at 20 and 40 tokens per parameter, the others at 20, with three rho and three seeds each. msam takes
one pass, so methods_chinchilla covers it. Other sizes: --sweep=equal_compute:24m,42m. Run with --plan first. A method
gains nothing from its second pass unless it beats AdamW at 40.
"""

from steppe.configs import sweeps


def get_spec(sizes: str = sweeps.SIZES) -> list[dict]:
    scales = {"model.size": sweeps.sizes_of(sizes), "seed": sweeps.SEEDS}
    length = {"train.duration": "chinchilla"}
    two_passes = [method for method in sweeps.METHODS if method != "msam"]
    return [
        {
            "set": {**length, "optim.method": "adamw", "optim.rho": None},
            "grid": {**scales, "train.tokens_per_parameter": [20.0, 40.0]},
        },
        {
            "set": {**length, "train.tokens_per_parameter": 20.0},
            "grid": {**scales, "optim.method": two_passes, "optim.rho": [0.003, 0.01, 0.03]},
        },
    ]
