"""Measurements on this machine: of a training step, of the data, of what methods and curvature
products cost, of where epsilon lies.

steppe bench step|data|methods|curvature|shares [--help] ...
"""

import sys
from collections.abc import Sequence

from steppe.scripts import command

KINDS = ("step", "data", "methods", "curvature", "shares")


def main(argv: Sequence[str]) -> int:
    """Hands the rest of the line to steppe.scripts.bench.KIND; returns its exit status."""
    return command.dispatch(
        argv, "steppe bench", "steppe.scripts.bench", ("step", "data", "methods", "curvature", "shares")
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
