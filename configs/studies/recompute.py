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
LADDER = {"train.batch_size": 128, "optim.ascent_over": "global", RATE: 0.064}
COLUMNS = {  # the folder, what its runs share, and what tells each row's; "ema": of that average
    0: ("english", ENGLISH, {
        "adamw": {}, "sam": {RHO: 0.1}, "functional_sam": {RHO: 0.03}, "functional_sam 0.1": {RHO: 0.1},
        "precond_functional_sam": {RHO: 0.1}, "msam": {RHO: 0.3}, "flops": {"train.tokens_per_parameter": 400.0},
    }),
    1: ("judged", JUDGED, {
        "adamw": {RATE: 0.0453}, "sam": {}, "functional_sam": {}, "msam": {},
        "flops": {RATE: 0.0453, "train.duration": "1024 steps"},
    }),
    2: ("ladder", LADDER, {"adamw": {}, "sam": {RHO: 0.03}, "functional_sam": {RHO: 0.1}, "sam 0.1": {RHO: 0.1}}),
}  # fmt: skip
ROWS = [  # per row of the table: measure, and per column the pair
    ("loss", ("sam", "adamw"), ("sam", "adamw"), ("sam", "adamw")),
    ("loss", ("sam", "functional_sam"), ("sam", "functional_sam"), ("sam", "functional_sam")),
    ("loss", ("sam", "functional_sam 0.1"), None, ("sam 0.1", "functional_sam")),
    ("loss", ("functional_sam", "adamw"), ("functional_sam", "adamw"), ("functional_sam", "adamw")),
    ("loss", ("precond_functional_sam", "adamw"), None, None),
    ("loss", ("functional_sam", "flops"), ("functional_sam", "flops"), None),
    ("loss", ("msam", "adamw"), ("msam", "adamw"), None),
    ("loss", ("msam", "adamw ema"), ("msam", "adamw ema"), None),
    ("int4_channel", ("msam", "adamw"), None, None),
    ("int4_channel", ("functional_sam 0.1", "adamw"), None, None),
]


def values(column: int, name: str, measure: str) -> dict[int, float]:
    """{seed: number} of the fresh runs of a row."""
    folder, shared, rows = COLUMNS[column]
    name, average, _ = name.partition(" ema")
    method = "adamw" if name == "flops" else name.split()[0]
    wanted = {**shared, "optim.method": method, **rows[name]}
    common, *runs = [json.loads(line) for line in (HERE / folder / "runs.jsonl").read_text().splitlines()]
    found = {}
    for run in runs:
        config = common["config"] | run["config"]
        if config["seed"] and all(config[key] == value for key, value in wanted.items()):
            part = next(each for each in run["averages"] if each["weights"] == "ema") if average else run
            rise = 0.0 if measure == "loss" else part.get("retention", {}).get(measure, math.nan)
            found[config["seed"]] = part["loss"] + rise
    return {seed: value for seed, value in found.items() if not math.isnan(value)}


def main() -> int:
    table = (HERE / "README.md").read_text().split("<!-- claims -->\n")[1].split("<!-- end")[0].splitlines()[2:]
    wrong = 0
    for line, (measure, *pairs) in zip(table, ROWS, strict=True):
        words, _, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        print(words)
        for column, pair in enumerate(pairs):
            shown = ""
            if pair:
                one, other = (values(column, name, measure) for name in pair)
                ways = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
                half = stats.t.ppf(0.975, len(ways) - 1) * statistics.stdev(ways) / math.sqrt(len(ways))
                shown = f"{statistics.mean(ways):+.3f} ± {half:.3f}".replace("-", "−")
            same = shown in cells[column] and bool(shown) == bool(cells[column])
            wrong += not same
            print(f"    {shown:<20}{cells[column]}{'' if same else '   DIFFERS'}")
    print(f"{wrong} cells differ from the page")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
