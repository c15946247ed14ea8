"""`python -m steppe.scripts.measure KIND ...` is `steppe KIND ...`, of curvature, retention and coordinates."""

import sys
from collections.abc import Sequence

from steppe.scripts import command


def main(argv: Sequence[str]) -> int:
    """Hands the rest of the line to steppe.scripts.measure.KIND; returns its exit status."""
    name = "python -m steppe.scripts.measure"
    return command.dispatch(argv, name, "steppe.scripts.measure", ("curvature", "retention", "coordinates"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
