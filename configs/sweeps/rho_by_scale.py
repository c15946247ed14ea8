"""Finds the best rho per method and size: six methods x five rho x three sizes with one seed, and AdamW.

    steppe sweep --config=quickstart --sweep=rho_by_scale --out=sweeps/rho

93 runs of the config's length. Other sizes: --sweep=rho_by_scale:24m,42m. --halving ends losing runs early. If the best
rho is at an end of the grid, the true best may lie beyond: add values in a copy of this file. Expect the largest rho
to be worse than AdamW on small models far from convergence.
"""

from steppe.configs import sweeps


def get_spec(sizes: str = sweeps.SIZES) -> dict:
    return sweeps.every_method(sizes, rho=sweeps.RHO, seeds=[0])
