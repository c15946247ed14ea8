"""Measurements on this machine: what a step costs, on one device, on a GPU, and what it sends over a mesh.

steppe bench step|collectives|gpu [--help] ...
"""

import sys
from collections.abc import Sequence

from steppe.scripts import command, process
from steppe.scripts.cli import KINDS


def main(argv: Sequence[str]) -> int:
    """Hands the rest of the line to steppe.scripts.bench.KIND; returns its exit status."""
    process.keep_memory()
    return command.dispatch(argv, "steppe bench", "steppe.scripts.bench", KINDS["bench"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
