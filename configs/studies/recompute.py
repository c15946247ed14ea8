"""The claims of this folder's page again, from the runs alone; shares no code with the report or with page.py.

    python configs/studies/recompute.py

Prints every cell of README.md's table next to mean ± half of the 95 % interval over paired seeds that chose nothing.
Exit status 1 if a printed digit differs.
"""

import json
import math
import statistics
import sys
from pathlib import Path

from scipy import stats

HERE = Path(__file__).parent
RATE, RHO = "optim.peak_learning_rate", "optim.rho"
ENGLISH = {"model.size": "0.03m", "model.compute_dtype": "float32", "optim.schedule": "cosine", RATE: 0.008,
           "optim.ascent_over": "global", "train.tokens_per_parameter": 200.0, "optim.base": "adamw"}  # fmt: skip
JUDGED = {"train.duration": "512 steps", "optim.base": "adamw", "optim.schedule": "cosine"}
LADDER = {"optim.ascent_over": "global"}
COLUMNS = {  # the folder, what its runs share, and what tells each row's; "ema": of that average
    0: ("english", ENGLISH, {
        "adamw": {}, "sam": {RHO: 0.1}, "functional_sam": {RHO: 0.03}, "functional_sam 0.1": {RHO: 0.1},
        "precond_functional_sam": {RHO: 0.1}, "msam": {RHO: 0.3}, "flops": {"train.tokens_per_parameter": 400.0},
    }),
    1: ("ladder", LADDER | {"train.batch_size": 8}, {
        "adamw": {RATE: 0.008}, "sam": {RATE: 0.004, RHO: 0.03}, "functional_sam": {RATE: 0.004, RHO: 0.03},
        "sam 0.1": {RATE: 0.008, RHO: 0.1}, "functional_sam 0.1": {RATE: 0.008, RHO: 0.1},
    }),
    2: ("judged", JUDGED, {
        "adamw": {RATE: 0.0453}, "sam": {}, "functional_sam": {}, "msam": {},
        "flops": {RATE: 0.0453, "train.duration": "1024 steps"},
    }),
    3: ("ladder", LADDER | {"train.batch_size": 128, RATE: 0.064}, {
        "adamw": {}, "sam": {RHO: 0.03}, "functional_sam": {RHO: 0.1}, "sam 0.1": {RHO: 0.1},
    }),
}  # fmt: skip
SAM, FUNCTIONAL = ("sam", "adamw"), ("functional_sam", "adamw")
BOTH, MSAM, LARGER = ("sam", "functional_sam"), ("msam", "adamw"), ("sam 0.1", "functional_sam 0.1")
ROWS = [  # per row of the table: measure, and per column the pair; a third part: the pair of 1k that is subtracted
    ("loss", SAM, SAM, SAM, SAM),
    ("loss", BOTH, BOTH, BOTH, BOTH),
    ("loss", ("sam", "functional_sam 0.1"), LARGER, None, ("sam 0.1", "functional_sam")),
    ("loss", None, None, None, ("sam 0.1", "functional_sam", LARGER)),
    ("loss", FUNCTIONAL, FUNCTIONAL, FUNCTIONAL, FUNCTIONAL),
    ("loss", ("precond_functional_sam", "adamw"), None, None, None),
    ("loss", ("functional_sam", "flops"), None, ("functional_sam", "flops"), None),
    ("loss", MSAM, None, MSAM, None),
    ("loss", ("msam", "adamw ema"), None, ("msam", "adamw ema"), None),
    ("4 bits", MSAM, None, None, None),
    ("4 bits", ("functional_sam 0.1", "adamw"), FUNCTIONAL, None, None),
    ("forgotten", None, FUNCTIONAL, None, None),
]


def values(column: int, name: str, measure: str) -> dict[int, float]:
    """{seed: number} of the fresh runs of a row."""
    folder, shared, rows = COLUMNS[column]
    name, average, _ = name.partition(" ema")
    method = "adamw" if name == "flops" else name.split()[0]
    wanted = {**shared, "optim.method": method, **rows[name]}
    common, *runs = [json.loads(line) for line in (HERE / folder / "runs.jsonl").read_text().splitlines()]
    level = max((lowest(run) for run in runs if run.get("fine_tune")), default=math.nan)
    found = {}
    for run in runs:
        config = common["config"] | run["config"]
        if config["seed"] and all(config[key] == value for key, value in wanted.items()):
            part = next(each for each in run["averages"] if each["weights"] == "ema") if average else run
            found[config["seed"]] = number(run, part, measure, level)
    return {seed: value for seed, value in found.items() if not math.isnan(value)}


def number(run: dict, part: dict, measure: str, level: float) -> float:
    """part: the run itself or its average; level: the loss on the second text at which runs are compared."""
    if measure == "forgotten":
        tuned = run["fine_tune"]
        return min(forgotten(path, tuned["loss"] - level) for path in tuned["paths"])
    kept = part.get("retention", {})
    return part["loss"] + (kept.get("q4_channel", kept.get("int4_channel", math.nan)) if measure == "4 bits" else 0.0)


def lowest(run: dict) -> float:
    """The loss on the second text after 0.8 of a run's best gain."""
    gains = [point["gained"] for path in run["fine_tune"]["paths"] for point in path["points"]]
    return run["fine_tune"]["loss"] - 0.8 * max(gains)


def forgotten(path: dict, gain: float) -> float:
    """What is lost where a path first has this gain, on the straight line between its points; infinite if nowhere."""
    gained, lost = ([0.0, *(point[key] for point in path["points"])] for key in ("gained", "lost"))
    for at in range(1, len(gained)):
        if gained[at] >= gain:
            share = (gain - gained[at - 1]) / (gained[at] - gained[at - 1])
            return lost[at - 1] + share * (lost[at] - lost[at - 1])
    return math.inf


def main() -> int:
    table = (HERE / "README.md").read_text().split("<!-- claims -->\n")[1].split("<!-- end")[0].splitlines()[2:]
    wrong = 0
    for line, (measure, *pairs) in zip(table, ROWS, strict=True):
        words, _, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        print(words)
        for column, pair in enumerate(pairs):
            shown = ""
            if pair:
                one, other = (values(column, name, measure) for name in pair[:2])
                ways = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
                mean, bounds = statistics.mean(ways), stats.ttest_1samp(ways, 0.0).confidence_interval()
                if len(pair) > 2:
                    one, other = (values(1, name, measure) for name in pair[2])
                    before = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
                    mean -= statistics.mean(before)
                    bounds = stats.ttest_ind(ways, before, equal_var=False).confidence_interval()
                shown = f"{mean:+.3f} ± {(bounds.high - bounds.low) / 2:.3f}".replace("-", "−")
            same = shown in cells[column] and bool(shown) == bool(cells[column])
            wrong += not same
            print(f"    {shown:<20}{cells[column]}{'' if same else '   DIFFERS'}")
    print(f"{wrong} cells differ from the page")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
