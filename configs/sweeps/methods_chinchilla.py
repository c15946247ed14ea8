"""Every method at every size for 20 tokens per parameter (train.tokens_per_parameter): three rho, three seeds.

    steppe sweep --config=quickstart --sweep=methods_chinchilla --out=sweeps/chinchilla

171 runs whose length grows with the model: run with --plan first. Other sizes: --sweep=methods_chinchilla:24m,42m.
Select rho with --only=optim.rho=0.01,None (None is AdamW).
"""

from steppe.configs import sweeps


def get_spec(sizes: str = sweeps.SIZES) -> dict:
    return {
        "set": {"train.duration": "chinchilla"},
        **sweeps.every_method(sizes, rho=[0.003, 0.01, 0.03], seeds=sweeps.SEEDS),
    }
