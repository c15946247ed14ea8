"""Measurements on this machine: of a training step, of the data, of what methods and curvature products cost.

steppe bench step|data|methods|curvature [--help] ...
"""

import sys
from collections.abc import Sequence

from steppe.scripts import command


def main(argv: Sequence[str]) -> int:
    """Hands the rest of the line to steppe.scripts.bench.KIND; returns its exit status."""
    return command.dispatch(argv, "steppe bench", "steppe.scripts.bench", ("step", "data", "methods", "curvature"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
