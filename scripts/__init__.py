"""Command lines: one module or package for each command. It imports every room; no room imports it."""

import sys

if sys.argv[:1] == ["-m"]:  # Python is looking for the module of `python -m steppe.scripts.NAME`
    from pathlib import Path

    _position = next((n for n, word in enumerate(sys.orig_argv) if "steppe.scripts." in word), 0)
    _name = sys.orig_argv[_position].partition("steppe.scripts.")[2]
    _file = Path(__file__).parent / _name.split(".")[0]
    if _name and not (_file.is_dir() or _file.with_suffix(".py").exists()):
        from steppe.scripts import cli

        sys.exit(cli.main([_name, *sys.orig_argv[_position + 1 :]]))
