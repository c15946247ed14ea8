"""Every method at every scale for 20 tokens per parameter (train.tokens_per_parameter): three rho, three seeds.

    steppe sweep --config=quickstart --sweep=methods_chinchilla --out=sweeps/chinchilla

171 runs, each as long as its model is large: look at --plan first. SIZES may be given:
--sweep=methods_chinchilla:24m,42m. Narrow the rho with --only=optim.rho=0.01,None (None is AdamW).
"""

from steppe.configs import sweeps


def get_spec(sizes: str = sweeps.SIZES) -> dict:
    return {
        "set": {"train.duration": "chinchilla"},
        "grid": {
            "model.size": sweeps.sizes_of(sizes),
            "optim.method": ["adamw", *sweeps.METHODS],
            "optim.rho": [0.003, 0.01, 0.03],
            "seed": sweeps.SEEDS,
        },
        "where": sweeps.ALONE,
    }
