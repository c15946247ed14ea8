"""Makes this folder's figures, numbers and tables anew from the runs that are kept in runs.jsonl.

    python configs/studies/english/page.py

Writes the report's figures and CSV files that README.md shows here, and the tables between its markers.
"""

import csv
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# what of the report's files is kept here
FILES = (
    *("answer*.png", "answer*.csv", "kept_against_rho.*", "best_rho.*", "forgetting.png"),
    *("against_adamw_table.csv", "fine_tuning_table.csv", "power_table.csv", "curvature_table.csv"),
)
COLUMNS = {
    "loss": "held-out loss",
    "forgetting": "forgotten",
    "int4_channel": "in 4 bits",
    "int4_gptq_channel": "by GPTQ",
    "int3_channel": "in 3 bits",
    "int3_gptq_channel": "by GPTQ",
    "noise_0.05": "noise of 5 %",
}
GROUPED = {
    "int4_group64": "4 bits",
    "int4_gptq_group64": "by GPTQ",
    "int3_group64": "3 bits",
    "int3_gptq_group64": "by GPTQ",
}
AT_ONE_RATE = {
    f"fine_tune_lr={rate}: {what}": f"{words} {rate}"
    for rate in ("0.0001", "0.0008")
    for what, words in (("gained", "learned at"), ("lost", "forgotten at"), ("curvature", "curvature at"))
}
BENDS = {
    "lambda_max": "λmax",
    "ggn_lambda_max": "of the GGN",
    "nme_lambda_max": "of the NME",
    "trace": "trace",
    "precond_lambda_max": "λmax in AdamW's metric",
    "sam_sharpness": "worst case",
    "average_sharpness": "average case",
}
ITSELF = "AdamW itself"  # of rows that are values, not differences
PAIRS = 2  # fewer have no interval


def main() -> int:
    """Runs the report, and puts its files into this folder; returns the exit status."""
    with tempfile.TemporaryDirectory() as place:
        steppe = [sys.executable, "-P", "-m", "steppe.scripts.cli"]
        subprocess.run([*steppe, "report", str(HERE / "runs.jsonl"), f"--out={place}"], check=True)
        for pattern in FILES:
            for before in HERE.glob(pattern):
                before.unlink()
            for made in Path(place).glob(pattern):
                shutil.copy(made, HERE)
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    for name, made in tables().items():
        marks = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, begin, rest = text.partition(marks[0])
        _, end, after = rest.partition(marks[1])
        if not (begin and end):
            print(f"{page}: must have a place for a table, between {marks[0].strip()} and {marks[1]}", file=sys.stderr)
            return 2
        text = f"{before}{begin}{made}{end}{after}"
    page.write_text(text, encoding="utf-8")
    return 0


def tables() -> dict[str, str]:
    """{name of its marker: Markdown} of the tables of README.md, from the CSV files next to it."""
    return {
        "against_adamw": against(read("against_adamw"), COLUMNS),
        "grouped": against(read("against_adamw"), GROUPED),
        "fine_tuning": against(read("fine_tuning"), AT_ONE_RATE),
        "power": power(read("power")),
        "curvature": curvature(read("curvature")),
    }


def read(name: str) -> list[dict[str, str]]:
    """The rows of a table of the report."""
    with open(HERE / f"{name}_table.csv", newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def against(rows: list[dict[str, str]], columns: dict[str, str]) -> str:
    """A Markdown table a scale and budget: entries of two pairs or more, at equal tokens, then at equal FLOPs."""
    key = next(iter(columns))
    rows = [row for row in rows if int(row[f"{key}_n"] or 0) >= PAIRS]
    said, head = [], f"| | cost | pairs | {' | '.join(columns.values())} |"
    for group in dict.fromkeys(row["group"] for row in rows):
        said += [f"**{group}**", "", head, "|---" * (3 + len(columns)) + "|"]
        for basis in dict.fromkeys(row["basis"] for row in rows):
            own = [row for row in rows if (row["group"], row["basis"]) == (group, basis)]
            said += [f"| *{basis}* |{' |' * (2 + len(columns))}"] * bool(own)
            for row in own:
                rho = f", rho {float(row['rho']):g}" if row["rho"] and "rho" not in row["entry"] else ""
                cells = [row["entry"] + rho, f"{float(row['cost']):.0f}", row[f"{key}_n"]]
                said.append(f"| {' | '.join([*cells, *(difference(row, column) for column in columns)])} |")
        said.append("")
    return "\n".join(said)


def difference(row: dict[str, str], key: str) -> str:
    """Mean ± half of the interval, three decimals, bold where it has no zero in it."""
    if not row[key]:
        return ""
    value = f"{float(row[key]):{'' if row['basis'] == ITSELF else '+'}.3f}".replace("-", "−")
    if not row[f"{key}_low"]:
        return value
    low, high = float(row[f"{key}_low"]), float(row[f"{key}_high"])
    shown = f"{value} ± {(high - low) / 2:.3f}"
    return f"**{shown}**" if (low > 0 or high < 0) and row["basis"] != ITSELF else shown


def power(rows: list[dict[str, str]]) -> str:
    """A Markdown table: the smallest difference that three, five and ten pairs would show."""
    said = ["| | compared with AdamW | sd of a pair | 3 pairs | 5 pairs | 10 pairs |", "|---" * 6 + "|"]
    for row in rows:
        numbers = [f"{float(row[key]):.3f}" for key in ("sigma", "pairs_3", "pairs_5", "pairs_10")]
        said.append(f"| {row['group']}: {row['aspect']} | {row['basis']} | {' | '.join(numbers)} |")
    return "\n".join([*said, ""])


def curvature(rows: list[dict[str, str]]) -> str:
    """A Markdown table of what curvature measured, means over seeds."""
    said = [f"| | rho | seeds | {' | '.join(BENDS.values())} |", "|---" * (3 + len(BENDS)) + "|"]
    for row in rows:
        rho = f"{float(row['rho']):g}" if row["rho"] and float(row["rho"]) else ""
        numbers = [f"{float(row[key]):.3g}" for key in BENDS]
        said.append(f"| {row['cell']}: {row['variant']} | {rho} | {row['seeds']} | {' | '.join(numbers)} |")
    return "\n".join([*said, ""])


if __name__ == "__main__":
    sys.exit(main())
