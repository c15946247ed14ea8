"""Command lines, one module or package for each thing a user does. Imports every room; no room imports this one."""

import sys

if sys.argv[:1] == ["-m"]:  # Python is looking for the module of `python -m steppe.scripts.NAME`
    from pathlib import Path

    _, _, _name = sys.orig_argv[sys.orig_argv.index("-m") + 1].partition("steppe.scripts.")
    _at = Path(__file__).parent / _name.split(".")[0]
    if _name and not (_at.is_dir() or _at.with_suffix(".py").exists()):
        from steppe.scripts import cli

        sys.exit(cli.main([_name, *sys.orig_argv[sys.orig_argv.index("-m") + 2 :]]))
