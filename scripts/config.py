"""Every key with its value, meaning and what it accepts; or how two configs differ.

    steppe config [NAME] [--config.key=value ...]
    steppe config diff A B

NAME, A and B are configs as --config takes them; A and B may also be workdirs of runs.
"""

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from steppe.configs import base
from steppe.configs.keys import flatten
from steppe.lm.keep import workdir
from steppe.scripts import command


@command.refusing
def main(argv: Sequence[str]) -> int:
    """Prints the keys, or a difference; returns the exit status: of diff 1 if there is one, 2 for bad input."""
    if argv and argv[0] == "diff":
        return diff(argv[1:])
    parser = command.parser("config", __doc__)
    chosen = parser.add_argument("config", nargs="?", metavar="NAME", help="default: base")
    chosen.completer = command.names("steppe.configs", "get_config", "diff")
    path, overrides, _ = command.parse_unread(argv, parser)
    print(table(flatten(command.read_config(path or "base", overrides)), shutil.get_terminal_size().columns))
    return 0


def table(values: dict[str, Any], columns: int = 100) -> str:
    """All keys for a reader, section by section, wrapped to so many columns."""
    lines, section = [], None
    for name, key in base.keys().items():
        if name.rpartition(".")[0] != section:
            section = name.rpartition(".")[0]
            lines += ["", f"[{section or 'the run'}]"]
        value, default = values[name], flatten({name: key.default})[name]
        changed = "" if value == default else f"   (base: {default!r})"
        lines.append(f"{name} = {value!r}{changed}")
        freely = "; a resumed run may change it" if key.free else ""
        text = f"{key.meaning}. Accepts {key.accepted.text()}{freely}."
        lines += textwrap.wrap(text, max(40, columns), initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines[1:])


def diff(argv: Sequence[str]) -> int:
    """`config diff A B`: the keys that differ, with both values."""
    parser = command.parser("config diff", "The keys in which two configs differ.", config=False)
    both = parser.add_argument("both", nargs=2, metavar="CONFIG", help="as --config takes it, or the workdir of a run")
    both.completer = command.names("steppe.configs", "get_config")
    one, other = (flatten(read(text)) for text in command.options_of(argv, parser).both)
    differing = [name for name in one if one[name] != other[name]]
    for name in differing:
        print(f"{name}: {one[name]!r} -> {other[name]!r}")
    if not differing:
        print("no key differs")
    return 1 if differing else 0


def read(text: str):
    """The config of a workdir, or of what --config takes."""
    return workdir.config_of(text) if os.path.isdir(text) else command.read_config(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
