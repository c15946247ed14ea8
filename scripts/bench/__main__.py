"""Measurements on this machine: of a training step, of the data, of what methods and curvature products cost.

steppe bench step|data|methods|curvature [--help] ...
"""

import importlib
import sys
from collections.abc import Sequence

from steppe.scripts import command

KINDS = ("step", "data", "methods", "curvature")


def main(argv: Sequence[str]) -> int:
    """Hands the rest of the line to steppe.scripts.bench.KIND; returns its exit status."""
    kind, *rest = argv or [""]
    if kind in ("-h", "--help"):
        print(f"usage: steppe bench {{{','.join(KINDS)}}} [--help] ...\n\n{__doc__}")
        return 0
    if kind not in KINDS:
        return command.fail(f"steppe bench {kind or 'nothing'}: must be one of {', '.join(KINDS)}")
    return importlib.import_module(f"steppe.scripts.bench.{kind}").main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
