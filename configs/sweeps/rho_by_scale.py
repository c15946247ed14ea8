"""Which rho is best, per method and scale: six methods x five rho x three scales with one seed, AdamW beside them.

    python -m scripts.sweep --config=configs/quickstart.py --sweep=rho_by_scale --out=sweeps/rho

93 runs of the config's own length. SIZES may be given: --sweep=rho_by_scale:24m,42m. --halving leaves out most of the
rest of runs whose rho is losing. Expect the best rho to differ between methods by more than between scales, and runs at
its upper end to be worse than AdamW; if the best lies at an end of the grid, widen it (--grid optim.rho=...).
"""

from configs import sweeps


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
