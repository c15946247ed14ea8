"""Every method at every scale for one number of steps, the config's own: three rho, three seeds, AdamW beside them.

    steppe sweep --config=quickstart --sweep=methods_fixed_length --out=sweeps/fixed

171 runs. SIZES may be given: --sweep=methods_fixed_length:24m,42m. Narrow the rho to what rho_by_scale found with
--only=optim.rho=0.01,None (None is AdamW). At one number of steps the methods that take two passes have twice AdamW's
compute: sweep equal_compute before calling one better.
"""

from steppe.configs import sweeps


def get_spec(sizes: str = sweeps.SIZES) -> dict:
    return {
        "grid": {
            "model.size": sweeps.sizes_of(sizes),
            "optim.method": ["adamw", *sweeps.METHODS],
            "optim.rho": [0.003, 0.01, 0.03],
            "seed": sweeps.SEEDS,
        },
        "where": sweeps.ALONE,
    }
