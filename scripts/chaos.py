"""Disturb small runs in every way at hand, continue them, and compare each with an undisturbed one.

    steppe chaos --runs=60 --minutes=40 [--seed=0] [--only=NAME]

Takes 10 s a run on two cores; prints a table in Markdown. Filling a disk needs root (a small tmpfs is mounted). The
disturbances are among the tests of a source tree, so it runs from one.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from steppe.configs import keys
from steppe.scripts import command, process

TESTS = Path(__file__).parents[1] / "tests"


def main(argv: Sequence[str]) -> int:
    """Runs every scenario in turn until --runs or --minutes are used up; returns 1 if any run was not as it must be."""
    parser = command.parser("chaos", __doc__, config=False)
    parser.add_argument("--runs", type=command.integer(1), default=60, metavar="N", help="disturbed runs")
    parser.add_argument(
        "--minutes", type=keys.number(least=0), default=40.0, metavar="M", help="begin no run after so many minutes"
    )
    parser.add_argument(
        "--seed", type=command.integer(), default=0, metavar="N", help="of the moments and files that are hit"
    )
    parser.add_argument(
        "--flips", type=command.integer(), default=400, metavar="N", help="single bits flipped in a checkpoint"
    )
    parser.add_argument("--only", default="", metavar="NAME", help="the scenarios whose name contains this")
    options = command.options_of(argv, parser)
    if not (TESTS / "exhaustive" / "chaos.py").exists():
        return process.fail(f"steppe chaos: needs Steppe's source tree: there is no {TESTS}/exhaustive/chaos.py")
    sys.path.append(str(TESTS))
    chaos = importlib.import_module("exhaustive.chaos")

    failures = chaos.disturb(options.runs, options.minutes, options.seed, options.flips, options.only)
    for failure in failures:
        print(f"NOT AS IT MUST BE: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
