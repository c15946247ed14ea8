"""Methods, sizes, radii and seeds that the ready sweeps share. Each sweep is a file in this folder."""

from typing import Any

METHODS = ["sam", "logit_sam", "functional_sam", "precond_sam", "precond_functional_sam", "msam"]
SIZES = "0.1m,0.4m,1.8m"
SEEDS = [0, 1, 2]
RHO = [0.001, 0.003, 0.01, 0.03, 0.1]  # half decades; small models far from convergence need a small rho
ALONE = [
    {"if": {"optim.method": "adamw"}, "set": {"optim.rho": None}}
]  # adamw has no rho: one run instead of one per rho


def every_method(sizes: str, rho: list[float], seeds: list[int]) -> dict[str, Any]:
    """A sweep of AdamW and every method at these sizes."""
    grid = {"model.size": sizes_of(sizes), "optim.method": ["adamw", *METHODS], "optim.rho": rho, "seed": seeds}
    return {"grid": grid, "where": ALONE}


def scales(argument: str) -> dict[str, list[str]]:
    """The sizes in a sweep's argument as part of a grid; "" keeps the config's model."""
    return {"model.size": sizes_of(argument)} if argument else {}


def sizes_of(argument: str) -> list[str]:
    """The sizes in a sweep's argument, such as "0.1m,0.4m". Raises ValueError if there are none."""
    sizes = [size.strip() for size in argument.split(",") if size.strip()]
    if not sizes:
        raise ValueError("the argument must name sizes of configs/sizes.py, such as 0.1m,0.4m")
    return sizes
