"""Command lines: one module or package for each command. It imports every room; no room imports it."""

import sys

PROCESSES = ("cli", "train", "prepare_data")  # modules of processes that other commands start and schedulers repeat

if sys.argv[:1] == ["-m"]:  # Python is looking for the module of `python -m steppe.scripts.NAME`
    _position = next((n for n, word in enumerate(sys.orig_argv) if "steppe.scripts." in word), 0)
    _name = sys.orig_argv[_position].partition("steppe.scripts.")[2]
    if _name and "." not in _name and _name not in PROCESSES:
        from steppe.scripts import cli

        sys.exit(cli.main([_name, *sys.orig_argv[_position + 1 :]]))
