"""`python -m steppe.scripts.measure curvature|retention ...` is `steppe curvature|retention ...`."""

import sys
from collections.abc import Sequence

from steppe.scripts import command


def main(argv: Sequence[str]) -> int:
    """Hands the rest of the line to steppe.scripts.measure.KIND; returns its exit status."""
    name = "python -m steppe.scripts.measure"
    return command.dispatch(argv, name, "steppe.scripts.measure", ("curvature", "retention"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
