"""Which rho is best, per method and scale: six methods x five rho x three scales with one seed, AdamW beside them.

    steppe sweep --config=quickstart --sweep=rho_by_scale --out=sweeps/rho

93 runs of the config's own length. SIZES may be given: --sweep=rho_by_scale:24m,42m. --halving ends runs whose rho
is losing early. A best rho at an end of the grid says nothing of where the best is: add values in a copy of this file.
Expect the upper end to be worse than AdamW on small models far from convergence.
"""

from steppe.configs import sweeps


def get_spec(sizes: str = sweeps.SIZES) -> dict:
    return {
        "grid": {
            "model.size": sweeps.sizes_of(sizes),
            "optim.method": ["adamw", *sweeps.METHODS],
            "optim.rho": sweeps.RHO,
            "seed": [0],
        },
        "where": sweeps.ALONE,
    }
