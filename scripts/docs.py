"""Read the README of a room: configs, data, optim, lm or scripts.

steppe docs ROOM
"""

import sys
from collections.abc import Sequence

from steppe.configs.packages import folder_of
from steppe.scripts import command

ROOMS = ("configs", "data", "optim", "lm", "scripts")


def main(argv: Sequence[str]) -> int:
    """Prints a room's README.md, on a terminal through a pager; returns the exit status, 2 for bad input."""
    parser = command.parser("docs", __doc__, config=False)
    parser.add_argument("room", choices=ROOMS, metavar="ROOM", help=", ".join(ROOMS))
    options = command.options_of(argv, parser)
    text = (folder_of(f"steppe.{options.room}") / "README.md").read_text(encoding="utf-8")
    if not sys.stdout.isatty():
        print(text)
        return 0
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    with console.pager(styles=True):
        console.print(Markdown(text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
