"""Benchmark this machine: a training step, a GPU, the bytes that a step sends over a mesh.

steppe bench step|collectives|gpu [--help] ...
"""

from collections.abc import Sequence

from steppe.scripts import command, process
from steppe.scripts.cli import KINDS


def main(argv: Sequence[str]) -> int:
    """Runs steppe.scripts.bench.KIND with the remaining arguments; returns its exit status."""
    process.keep_memory()
    return command.dispatch(argv, "steppe bench", "steppe.scripts.bench", KINDS["bench"])
