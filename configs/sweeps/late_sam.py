"""Late SAM: methods that perturb only while a wsd learning rate decays, for three lengths of the decay.

    steppe sweep --config=quickstart --sweep=late_sam --out=sweeps/late

63 runs: three two-pass methods with two rho, and AdamW, for three lengths and three seeds. With a decay of a tenth of
the run, late SAM costs 1.1 times AdamW. Zhou et al. (ICLR 2025, arXiv 2410.10373) find that the last few per cent give
nearly all of the gain. Other sizes: --sweep=late_sam:0.1m,0.4m; default: the config's model.
"""

from steppe.configs import sweeps


def get_spec(sizes: str = "") -> dict:
    return {
        "set": {"optim.schedule": "wsd", "optim.rho_schedule": "late"},
        "grid": {
            **sweeps.scales(sizes),
            "optim.cooldown": ["5%", "10%", "20%"],
            "optim.method": ["adamw", "sam", "functional_sam", "precond_functional_sam"],
            "optim.rho": [0.01, 0.03],
            "seed": sweeps.SEEDS,
        },
        "where": sweeps.ALONE,
    }
