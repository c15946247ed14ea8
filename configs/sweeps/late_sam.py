"""SAM in the decay alone: methods that perturb only while a wsd learning rate falls, at three lengths of the decay.

    steppe sweep --config=quickstart --sweep=late_sam --out=sweeps/late

63 runs, AdamW with the same decays beside them: three methods of two passes, two rho, three lengths, three seeds. At a
tenth of the run late SAM costs 1.1 times AdamW (Zhou et al., ICLR 2025, arXiv 2410.10373: the last few per cent give
nearly all of it). SIZES may be given: --sweep=late_sam:0.1m,0.4m; default is the config's own model.
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
