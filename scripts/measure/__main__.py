"""`python -m steppe.scripts.measure curvature|retention ...` is `steppe curvature|retention ...`."""

import importlib
import sys
from collections.abc import Sequence

from steppe.scripts import command

KINDS = ("curvature", "retention")


def main(argv: Sequence[str]) -> int:
    """Hands the rest of the line to steppe.scripts.measure.KIND; returns its exit status."""
    kind, *rest = argv or [""]
    if kind in ("-h", "--help"):
        print(f"usage: python -m steppe.scripts.measure {{{','.join(KINDS)}}} [--help] ...")
        return 0
    if kind not in KINDS:
        return command.fail(f"{kind or 'nothing'}: must be one of {', '.join(KINDS)}")
    return importlib.import_module(f"steppe.scripts.measure.{kind}").main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
