"""The batch ladder: the same tokens in batches of 1k to 32k, and which methods part as the batch grows.

    steppe sweep --config=study --sweep=configs/studies/ladder/ladder.py:STAGE --out=OUT --order=listed --jobs=1

Stages in the order of what they decide; all go to one OUT, and each resumes. 1: grids on seed 0 at the two rungs that
decide, 16k and 1k tokens, of the four rows that the prediction names. 2: fresh seeds of what 1 chose. equal: sam at
functional_sam's rate and rho. rho: both at 1k at the rho that functional_sam chose at 16k. small: functional_sam at 16k
at the rho that sam chose there. twice: AdamW's choice on twice the tokens, as many FLOPs as two passes take. meters:
AdamW's choice once more, with the noise scale of each step and the shares of delta along the run. 3: the other rows at
both rungs. 4: the rung of 4k. 5: that of 32k. README.md in this folder has the prediction.
"""

LENGTH, EPSILON = 128, 1_024  # tokens of a sequence; tokens that one epsilon sees where microbatches have their own
RUNGS = {  # tokens of a batch: AdamW's peak rates. At 1k and 16k one more at the end where some row's best lay
    1_024: [0.001, 0.002, 0.004, 0.008, 0.016, 0.032],
    4_096: [0.008, 0.016, 0.032, 0.064],
    16_384: [0.008, 0.016, 0.032, 0.064, 0.128, 0.256],
    32_768: [0.016, 0.032, 0.064, 0.128],
}
OTHERS = {
    1_024: [0.002, 0.004, 0.008, 0.016],
    16_384: [0.032, 0.064, 0.128],
}  # every other row's; else AdamW's middle two
SHARED = {
    "model.size": "0.01m",
    "data.sequence_length": LENGTH,
    "train.duration": "16777216 tokens",  # 2 ** 24: 1,024 steps of 16k
    "evaluate.batch_size": 32,
    "average.weights": ("ema",),
}
TWICE = "33554432 tokens"
SMALL, LARGE = [0.03, 0.1], [0.3, 1.0]  # rho of two passes, and along the momentum
FIRST = {"sam": SMALL, "functional_sam": SMALL, "sam per microbatch": SMALL}
THEN = {"precond_functional_sam": SMALL, "msam": LARGE}
CHOSEN: dict[int, dict[str, dict]] = {  # rung: row: the setting of lowest final loss in stage 1
    16_384: {
        "adamw": {"optim.peak_learning_rate": 0.064},
        "sam": {"optim.peak_learning_rate": 0.064, "optim.rho": 0.03},
        "functional_sam": {"optim.peak_learning_rate": 0.064, "optim.rho": 0.1},
        "sam per microbatch": {"optim.peak_learning_rate": 0.064, "optim.rho": 0.03},
    },
    1_024: {
        "adamw": {"optim.peak_learning_rate": 0.008},
        "sam": {"optim.peak_learning_rate": 0.004, "optim.rho": 0.03},
        "functional_sam": {"optim.peak_learning_rate": 0.004, "optim.rho": 0.03},
    },
}
LARGER = {"optim.peak_learning_rate": 0.008, "optim.rho": 0.1}  # the best rate at this rho, of both rows
SEEDS = (1, 2, 3, 4, 5)


def get_spec(stage: str) -> list[dict]:
    stages = {
        "1": lambda: [block for rung in (16_384, 1_024) for block in [adamw(rung), *grids(rung, FIRST)]],
        "2": fresh,
        "equal": lambda: [
            {"set": {**at(rung), **row("sam", rung), **rows["functional_sam"], "seed": seed}}
            for seed in SEEDS
            for rung, rows in CHOSEN.items()
            if "functional_sam" in rows
        ],
        "rho": lambda: [
            {"set": {**at(1_024), **row(name, 1_024), **LARGER, "seed": seed}}
            for seed in SEEDS
            for name in ("functional_sam", "sam")
        ],
        "small": lambda: [
            {"set": {**at(16_384), **row("functional_sam", 16_384), **CHOSEN[16_384]["sam"], "seed": seed}}
            for seed in SEEDS
        ],
        "twice": lambda: [
            {"set": {**at(rung), **row("adamw", rung), **CHOSEN[rung]["adamw"], "train.duration": TWICE, "seed": seed}}
            for seed in SEEDS
            for rung in CHOSEN
        ],
        "meters": meters,
        "3": lambda: [block for rung in (16_384, 1_024) for block in grids(rung, THEN)],
        "4": lambda: [adamw(4_096), *grids(4_096, FIRST | THEN)],
        "5": lambda: [adamw(32_768), *grids(32_768, FIRST | THEN)],
    }
    return stages[stage]()


def at(rung: int) -> dict:
    return {**SHARED, "train.batch_size": rung // LENGTH}


def row(name: str, rung: int) -> dict:
    if name == "sam per microbatch":
        return {"optim.method": "sam", "optim.ascent_over": "microbatch", "train.microbatches": rung // EPSILON}
    return {"optim.method": name}


def adamw(rung: int) -> dict:
    return {"set": {**at(rung), "seed": 0}, "grid": {"optim.peak_learning_rate": RUNGS[rung]}}


def grids(rung: int, rows: dict[str, list]) -> list[dict]:
    """As many trials a row as AdamW has, or one more; a microbatch that is the batch is sam itself."""
    rates = OTHERS.get(rung, RUNGS[rung][1:3])
    return [
        {
            "set": {**at(rung), **row(name, rung), "seed": 0},
            "grid": {"optim.rho": rho, "optim.peak_learning_rate": rates},
        }
        for name, rho in rows.items()
        if rung > EPSILON or name != "sam per microbatch"
    ]


def fresh() -> list[dict]:
    """Seed by seed, so that a study that is cut short has whole pairs of all rows."""
    return [
        {"set": {**at(rung), **row(name, rung), **chosen, "seed": seed}}
        for seed in SEEDS
        for rung, rows in CHOSEN.items()
        for name, chosen in rows.items()
    ]


def meters() -> list[dict]:
    """AdamW at its best on seed 0. Microbatches give the noise scale; delta is of a held-out batch."""
    parts = {1_024: 2, 4_096: 4, 16_384: 16, 32_768: 32}
    return [
        {
            "set": {
                **at(rung), **row("adamw", rung), **rows["adamw"], "seed": 0, "train.microbatches": parts[rung],
                "curvature.every": 2**24 // rung // 25,
            }
        }
        for rung, rows in CHOSEN.items()
    ]  # fmt: skip
