"""The main rows of the page again, from runs.jsonl alone; shares no code with the report.

    python configs/studies/english/recompute.py

Prints mean ± half of the 95 % interval over paired fresh seeds and the p-value of each, then how many of all tests at
0.03m survive Holm's correction. Exit status 1 if a cell of README.md's first table differs in its printed digits.
"""

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

HERE = Path(__file__).parent
MEASURES = {
    "held-out loss": None, "in 4 bits": "int4_channel", "4 bits by GPTQ": "int4_gptq_channel",
    "in 3 bits": "int3_channel", "3 bits by GPTQ": "int3_gptq_channel", "noise of 5 %": "noise_0.05",
}  # fmt: skip
COLUMNS = dict(zip(MEASURES, (2, 4, 5, 6, 7, 8), strict=True))  # of the page's table, after the entry and its cost


def entry(config: dict, weights: str) -> tuple:
    """What tells entries apart: all but the seed."""
    schedule = config["optim.schedule"] + (f" {config['optim.cooldown']}" if config["optim.schedule"] == "wsd" else "")
    name = config["optim.method"] if config["optim.base"] == "adamw" else config["optim.base"]
    return (
        name, config.get("optim.rho"), config["optim.peak_learning_rate"], schedule, config["optim.ascent_over"],
        config["optim.rho_schedule"], config["train.tokens_per_parameter"], weights,
    )  # fmt: skip


def values(lines: list[dict]) -> dict:
    """{entry: {measure: {seed: value}}} of the float32 runs at 0.03m."""
    found = defaultdict(lambda: defaultdict(dict))
    for run in lines:
        config = run.get("config", {})
        if config.get("model.size") != "0.03m" or config.get("model.compute_dtype") != "float32":
            continue
        for part in (run, *run.get("averages", ())):
            one = found[entry(config, part.get("weights", "last"))]
            one["held-out loss"][config["seed"]] = part["loss"]
            for name, key in MEASURES.items():
                if key and key in part.get("retention", {}):
                    one[name][config["seed"]] = part["loss"] + part["retention"][key]
    return found


def paired(one: dict, other: dict) -> tuple[int, float, float, float]:
    """(pairs, mean, half of the 95 % interval, two-sided p) of one less other, over seeds that chose no setting."""
    seeds = sorted(set(one) & set(other) - {0})
    differences = np.array([one[seed] - other[seed] for seed in seeds])
    if len(differences) < 2:
        return len(differences), math.nan, math.nan, math.nan
    error = differences.std(ddof=1) / math.sqrt(len(differences))
    half = float(stats.t.ppf(0.975, len(differences) - 1) * error)
    return (
        len(differences),
        differences.mean(),
        half,
        float(2 * stats.t.sf(abs(differences.mean()) / error, len(differences) - 1)),
    )


def printed() -> dict[tuple[str, str], list[str]]:
    """{(basis, name): cells} of the page's first table."""
    found, basis = {}, ""
    text = (HERE / "README.md").read_text().split("<!-- against_adamw -->")[1].split("\n\n**0.01m")[0]
    for line in text.splitlines():
        cells = [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        if line.startswith("| *"):
            basis = cells[0]
        elif line.startswith("| ") and cells[0]:
            found[basis, cells[0]] = cells
    return found


def main() -> int:
    found = values([json.loads(line) for line in (HERE / "runs.jsonl").read_text().splitlines()])
    adamw = ("adamw", None, 0.008, "cosine", "global", "constant")
    table, tests, wrong = printed(), [], 0
    for (basis, name), cells in table.items():
        if basis == "AdamW itself":
            continue
        what, _, settings = name.partition(", ")
        method, _, average = what.partition(" ")
        rate = float((re.search(r"rate ([\d.]+)", settings) or [0, 0.008])[1])
        rho = re.search(r"rho ([\d.]+)", settings)
        tokens = float((re.search(r"(\d+) tokens", settings) or [0, 200])[1])
        schedule = (re.search(r"schedule=(\w+)", settings) or [0, "cosine"])[1]
        schedule = str(schedule) + (f" {re.findall('cooldown=([0-9]+%)', settings)[0]}" if schedule == "wsd" else "")
        key = (method, float(rho[1]) if rho else None, rate, schedule, "global", "constant", tokens, average or "last")
        # AdamW's average is held against its last weights; everything else against AdamW's weights of its own kind.
        weights = average if average and method != "adamw" else "last"
        reference = (*adamw, 400.0 if basis == "at equal FLOPs" else 200.0, weights)
        print(f"{basis}: {name}")
        for measure, column in COLUMNS.items():
            pairs, mean, half, p = paired(found[key][measure], found[reference][measure])
            if not cells[column + 1]:
                continue
            said = f"{mean:+.3f} ± {half:.3f}".replace("-", "−")
            same = said == cells[column + 1]
            wrong += not same
            tests.append((p, f"{name}, {basis}: {measure}"))
            differs = "" if same else f"   the page says {cells[column + 1]}"
            print(f"    {measure:<16}{said}  {pairs} pairs  p = {p:.4f}{differs}")
    ordered = sorted(tests)
    kept = next((i for i, (p, _) in enumerate(ordered) if p > 0.05 / (len(ordered) - i)), len(ordered))
    print(f"{len(tests)} tests at 0.03m, {sum(p < 0.05 for p, _ in tests)} with p < 0.05, {kept} survive Holm:")
    for p, name in ordered[:kept]:
        print(f"    p = {p:.2g}  {name}")
    print(f"{wrong} cells differ from the page")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
