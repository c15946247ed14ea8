"""The numbers that README.md's predictions ask for, from runs.jsonl alone.

    python configs/studies/ladder/predictions.py

Prints a line each: mean ± half of the 95 % interval, nats a byte, over the fresh seeds that both rows have.
"""

import json
import statistics
import sys
from pathlib import Path

from scipy import stats

RUNS = Path(__file__).parent / "runs.jsonl"
SMALL, LARGE = 1_024, 16_384  # tokens of a batch
ADAMW, SAM, FUNCTIONAL = ("adamw", None), ("sam", 0.03), ("functional_sam", 0.03)
FUNCTIONAL_LARGE, SAM_LARGE, PARTS = ("functional_sam", 0.1), ("sam", 0.1), ("sam per microbatch", 0.03)
RATES = {(SMALL, "adamw"): 0.008, (SMALL, 0.1): 0.008, SMALL: 0.004, LARGE: 0.064}  # by row, by rho; the chosen ones


def losses() -> dict[tuple, dict[int, float]]:
    """{(tokens of a batch, (row, rho)): {seed: final loss}} of the fresh seeds at the chosen rates."""
    first, *rest = map(json.loads, RUNS.read_text(encoding="utf-8").splitlines())
    found: dict[tuple, dict[int, float]] = {}
    for run in rest:
        config = first["config"] | run["config"]
        tokens, method = config["train.batch_size"] * config["data.sequence_length"], config["optim.method"]
        row = method + " per microbatch" * (config["optim.ascent_over"] == "microbatch")
        rho = config["optim.rho"]
        rate = RATES.get((tokens, row)) or RATES.get((tokens, rho)) or RATES[tokens]
        if config["seed"] and config["optim.peak_learning_rate"] == rate:
            found.setdefault((tokens, (row, rho)), {})[config["seed"]] = run["loss"]
    return found


def main() -> int:
    found = losses()

    def pairs(tokens: int, one: tuple, other: tuple) -> list[float]:
        a, b = found.get((tokens, one), {}), found.get((tokens, other), {})
        return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]

    def shown(words: str, values: list[float], less: list[float] | None = None) -> None:
        """less: values of other seeds and batches, by Welch's interval."""
        if less is None:
            bounds = stats.ttest_1samp(values, 0.0).confidence_interval()
        else:
            bounds = stats.ttest_ind(values, less, equal_var=False).confidence_interval()
        mean = statistics.mean(values) - (statistics.mean(less) if less else 0.0)
        print(f"{words}: {mean:+.4f} ± {(bounds.high - bounds.low) / 2:.4f} ({len(values)} pairs)".replace("-", "−"))

    small, large = pairs(SMALL, SAM, FUNCTIONAL), pairs(LARGE, SAM, FUNCTIONAL_LARGE)
    equal, before = pairs(LARGE, SAM_LARGE, FUNCTIONAL_LARGE), pairs(SMALL, SAM_LARGE, FUNCTIONAL_LARGE)
    shown("1. sam less functional_sam at 1k", small)
    shown("1. sam less functional_sam at 16k", large)
    shown("1. the second less the first", large, small)
    shown("1. sam less functional_sam at 1k, one rate and rho 0.1", before)
    shown("1. sam less functional_sam at 16k, one rate and rho 0.1", equal)
    shown("1. the second less the first", equal, before)
    shown("1. at 1k, rho 0.1 less rho 0.03", before, small)
    kept = pairs(LARGE, SAM, FUNCTIONAL)
    shown("1. sam less functional_sam at 16k, one rate and rho 0.03", kept)
    shown("1. at 16k, rho 0.1 less rho 0.03", equal, kept)
    shown("2. sam per microbatch less functional_sam at 16k", pairs(LARGE, PARTS, FUNCTIONAL_LARGE))
    shown("2. sam less sam per microbatch at 16k", pairs(LARGE, SAM, PARTS))
    for tokens, row, words in ((SMALL, FUNCTIONAL, "1k"), (LARGE, FUNCTIONAL_LARGE, "16k")):
        shown(f"3. functional_sam less adamw at {words}", pairs(tokens, row, ADAMW))
        shown(f"3. sam less adamw at {words}", pairs(tokens, SAM, ADAMW))
    return 0


if __name__ == "__main__":
    sys.exit(main())
