"""AdamW with twice the steps beside methods of two passes, which then cost the same: three scales, three seeds.

    steppe sweep --config=quickstart --sweep=equal_compute --out=sweeps/equal

153 runs: AdamW at 20 and at 40 tokens per parameter, the others at 20, three rho and three seeds each; msam, which
takes one pass, is left to methods_chinchilla. SIZES may be given: --sweep=equal_compute:24m,42m. Look at --plan first.
A method that does not beat AdamW at 40 here buys nothing for its second pass.
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
