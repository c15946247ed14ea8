"""The console entry: `steppe COMMAND ...` is `python -m scripts.COMMAND ...`."""

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts import command


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatches to scripts.COMMAND.main(argv), importing nothing else; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print("usage: steppe COMMAND [--help] ...\n")
        width = max(map(len, known))
        for name, summary in known.items():
            print(f"  {name:<{width}}  {summary}")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return command.fail(f"steppe {name}: no such command, must be one of {', '.join(known)}{hint}")
    return importlib.import_module(f"scripts.{name}").main(rest)


def commands() -> dict[str, str]:
    """{name: the first line of its docstring} of every module here that has main(argv), read without importing it.

    bench_* are reached through bench.
    """
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        if has_main and file.stem != Path(__file__).stem and not file.stem.startswith("bench_"):
            found[file.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


if __name__ == "__main__":
    sys.exit(main())
