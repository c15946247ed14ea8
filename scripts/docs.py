"""Read the README of a room: configs, data, optim, lm or scripts.

steppe docs [ROOM]
"""

import pydoc
import sys
from collections.abc import Sequence

from steppe.configs.packages import folder_of
from steppe.scripts import command

ROOMS = ("configs", "data", "optim", "lm", "scripts")


def main(argv: Sequence[str]) -> int:
    """Shows a room's README.md, or lists the rooms; returns the exit status, 2 for bad input."""
    parser = command.parser("docs", __doc__, config=False)
    parser.add_argument("room", nargs="?", choices=ROOMS, metavar="ROOM", help=", ".join(ROOMS))
    room = command.options_of(argv, parser).room
    pages = {name: (folder_of(f"steppe.{name}") / "README.md").read_text(encoding="utf-8") for name in ROOMS}
    if room:
        pydoc.pager(pages[room])
        return 0
    for name, text in pages.items():
        print(f"steppe docs {name:<10}{text.partition(':')[2].splitlines()[0].strip()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
