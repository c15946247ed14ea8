"""The runs of the study: first every method and rho at one seed, then two more seeds for each method's best rho.

Blocks are in order of importance; run with --order=listed. The middle size's fixed budget is its Chinchilla budget
(20 tokens per non-embedding parameter, 1449 steps), so it serves both.
"""

SIZES = ["0.01m", "0.03m", "0.05m"]
# Four radii a factor of about three apart. Published radii of Momentum-SAM are larger than those of the others.
RHO = {
    "sam": [0.001, 0.003, 0.01, 0.03],
    "logit_sam": [0.001, 0.003, 0.01, 0.03],
    "functional_sam": [0.003, 0.01, 0.03, 0.1],
    "precond_sam": [0.003, 0.01, 0.03, 0.1],
    "precond_functional_sam": [0.003, 0.01, 0.03, 0.1],
    "msam": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0],  # the last two added when 0.3, then the largest, was the best
}
# The best rho of seed 0 at each size (fixed budget, Chinchilla budget), read off the report; two more seeds of each.
BEST = {
    "msam": {"0.01m": (0.3, 0.1), "0.03m": (0.3, None), "0.05m": (0.3, 0.3)},
    "sam": {"0.01m": (0.03, 0.001), "0.03m": (0.003, None), "0.05m": (0.01, 0.003)},
    "logit_sam": {"0.01m": (0.03, 0.03), "0.03m": (0.001, None), "0.05m": (0.03, 0.003)},
    "functional_sam": {"0.01m": (0.01, 0.01), "0.03m": (0.01, None), "0.05m": (0.01, 0.003)},
    "precond_sam": {"0.01m": (0.003, 0.003), "0.03m": (0.01, None), "0.05m": (0.003, 0.003)},
    "precond_functional_sam": {"0.01m": (0.003, 0.03), "0.03m": (0.01, None), "0.05m": (0.01, 0.01)},
}
CHINCHILLA = {"train.duration": "chinchilla", "train.tokens_per_parameter": 20.0}


def adamw(sizes, seeds, changes):
    return {"grid": {"model.size": sizes, "seed": seeds}, "set": {"optim.method": "adamw", **changes}}


def grid(sizes, changes):
    """One block per method, seed 0."""
    return [
        {"grid": {"model.size": sizes, "optim.rho": rho}, "set": {"optim.method": method, **changes}}
        for method, rho in RHO.items()
    ]


def seeds(size, budget, changes):
    """Seeds 1 and 2 of every method's best rho; budget 0: fixed, 1: Chinchilla."""
    return [
        {
            "grid": {"seed": [1, 2]},
            "set": {"model.size": size, "optim.method": m, "optim.rho": b[size][budget], **changes},
        }
        for m, b in BEST.items()
    ]


def get_spec():
    fixed = [adamw(SIZES, [0, 1, 2], {}), *grid(SIZES, {}), adamw(SIZES, [0, 1, 2], {"train.duration": "2898 steps"})]
    fixed += [block for size in SIZES for block in seeds(size, 0, {})] + seeds("0.01m", 1, CHINCHILLA)
    chinchilla = [
        block
        for size in ("0.01m", "0.05m")
        for block in (adamw([size], [0, 1, 2], CHINCHILLA), *grid([size], CHINCHILLA))
    ]
    return [*fixed, *chinchilla]
