"""Every method and AdamW at every size for the config's number of steps: three rho, three seeds.

    steppe sweep --config=quickstart --sweep=methods_fixed_length --out=sweeps/fixed

171 runs. Other sizes: --sweep=methods_fixed_length:24m,42m. Select the best rho of the sweep rho_by_scale with
--only=optim.rho=0.01,None (None is AdamW). With equal steps, two-pass methods use twice AdamW's compute: run the sweep
equal_compute before you call one better.
"""

from steppe.configs import sweeps


def get_spec(sizes: str = sweeps.SIZES) -> dict:
    return sweeps.every_method(sizes, rho=[0.003, 0.01, 0.03], seeds=sweeps.SEEDS)
