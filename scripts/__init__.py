"""Command lines: one module or package for each command. It imports every room; no room imports it."""

import os
import sys

# modules of processes that other commands start and schedulers repeat
PROCESSES = ("cli", "train", "prepare_data", "sweep.worker")

if sys.argv[:1] == ["-m"]:  # Python is looking for the module of `python -m steppe.scripts.NAME`
    _position = next((n for n, word in enumerate(sys.orig_argv) if "steppe.scripts." in word), 0)
    _before, _, _name = sys.orig_argv[_position].partition("steppe.scripts.")
    if _name and _name not in PROCESSES:
        # a process of its own: a thread of the command could not import from this package while it is imported
        _command = [*sys.orig_argv[:_position], f"{_before}steppe.scripts.cli", _name, *sys.orig_argv[_position + 1 :]]
        os.execv(sys.executable, _command)
