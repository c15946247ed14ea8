"""The figure of this study from numbers.csv; with the directory of the sweep, its runs go into numbers.csv first.

    python configs/studies/smollm2/figure.py [OUT]

numbers.csv has a line for each run and evaluation: method, seed, step, and the losses of both held-out texts, nats a
token. After the last step it has the rise of the loss on English that 4 bits bring, by nearest and by GPTQ.
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
NUMBERS, FIGURE = HERE / "numbers.csv", HERE / "forgotten.png"
TEXTS = ("english", "own")
BITS = {"nearest": "q4_group64", "gptq": "q4_gptq_group64"}  # as retention.json names them
COLOURS = {"adamw": "black", "msam": "tab:orange", "functional_sam": "tab:blue"}


def collected(out: Path) -> Iterator[dict]:
    """The lines of numbers.csv. Runs that have not finished are left out, and named."""
    for run in sorted((out / "runs").iterdir()):
        if not (run / "outcome.json").exists() or not (run / "retention.json").exists():
            print(f"{run.name}: not finished or not measured by steppe retention", file=sys.stderr)
            continue
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        rounded = json.loads((run / "retention.json").read_text(encoding="utf-8"))["summary"]
        steps: dict[int, dict] = {}
        for record in records:
            if record["kind"] == "evaluate":
                steps.setdefault(record["step"], {})[record["name"]] = record["loss"]
        for step, losses in sorted(steps.items()):
            last = {key: rounded[name] for key, name in BITS.items()} if step == max(steps) else {}
            yield {"method": config["optim"]["method"], "seed": config["seed"], "step": step, **losses, **last}


def draw(rows: list[dict[str, str]]) -> None:
    """Own text lost over English gained along the runs, and what 4 bits cost at their ends."""
    from matplotlib.figure import Figure

    runs: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        runs.setdefault((row["method"], row["seed"]), []).append(row)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    path, bits = figure.subplots(1, 2, width_ratios=(2, 1))
    for (method, seed), run in runs.items():
        gained = [float(run[0]["english"]) - float(row["english"]) for row in run]
        lost = [float(row["own"]) - float(run[0]["own"]) for row in run]
        label = method if seed == min(key[1] for key in runs) else None
        path.plot(gained, lost, marker="o", color=COLOURS[method], label=label, linestyle="-" if label else "--")
        for place, key in enumerate(BITS):
            at = place + 0.2 * list(COLOURS).index(method) - 0.2
            bits.plot(at, float(run[-1][key]), "o", color=COLOURS[method], fillstyle="full" if label else "none")
    path.set(
        xlabel="English gained, nats a token",
        ylabel="own text lost, nats a token",
        title="Forgotten as English is learnt: lower is better",
    )
    bits.set(ylabel="rise of the loss by 4 bits, nats a token", xticks=range(len(BITS)), xticklabels=BITS)
    bits.set(ylim=(0, None), title="Cost of 4 bits: lower is better")
    path.legend(frameon=False)
    figure.savefig(FIGURE, dpi=110)


def main(arguments: list[str]) -> int:
    rows = list(csv.DictReader(NUMBERS.open(encoding="utf-8"))) if NUMBERS.exists() else []
    if arguments:
        new = list(collected(Path(arguments[0])))
        again = {(row["method"], str(row["seed"])) for row in new}
        rows = [row for row in rows if (row["method"], row["seed"]) not in again] + new
        rows.sort(key=lambda row: (list(COLOURS).index(row["method"]), int(row["seed"]), int(row["step"])))
        with NUMBERS.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["method", "seed", "step", *TEXTS, *BITS], lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        rows = list(csv.DictReader(NUMBERS.open(encoding="utf-8")))
    draw(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
