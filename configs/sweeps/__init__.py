"""What the ready sweeps have in common: methods, scales, radii and seeds as plain data. Each sweep is a file beside."""

METHODS = ["sam", "logit_sam", "functional_sam", "precond_sam", "precond_functional_sam", "msam"]
SIZES = "0.1m,0.4m,1.8m"
SEEDS = [0, 1, 2]
RHO = [0.001, 0.003, 0.01, 0.03, 0.1]  # half decades; a small model far from convergence wants little
ALONE = [{"if": {"optim.method": "adamw"}, "set": {"optim.rho": None}}]  # adamw takes no rho: one run where others vary


def scales(argument: str) -> dict[str, list[str]]:
    """The sizes of a sweep's argument as part of a grid; none, which leaves the config's own model, for ""."""
    return {"model.size": sizes_of(argument)} if argument else {}


def sizes_of(argument: str) -> list[str]:
    """The sizes named in a sweep's argument, "0.1m,0.4m". Raises ValueError for none."""
    sizes = [size.strip() for size in argument.split(",") if size.strip()]
    if not sizes:
        raise ValueError("the argument must name sizes of configs/sizes.py, such as 0.1m,0.4m")
    return sizes
