"""Runs as one file, for keeping and passing on: everything a report shows of them, without checkpoints or steps.

    steppe report pack DIR [RUN ...] --out=FILE.jsonl [--call NAME=FOLDER]

Every report accepts the file in place of a directory. It holds configs, held-out losses during and after training,
costs, and the results of curvature and retention. Runs that the file has already stay in it, unless they are read anew.
--call names a folder of this machine, so that runs of the same text from another machine count as the same.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from steppe.data import files
from steppe.scripts import command, process


def _computed(run) -> str:
    """The identity of a run: every key that changes its result."""
    from steppe.configs.base import FREE

    told = {key: value for key, value in run.config.items() if key not in FREE and not key.startswith("log.")}
    return json.dumps(told, sort_keys=True)


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text or 'nothing'}: must be NAME=FOLDER")
    return name, folder.rstrip("/")


def _called(run, names: Sequence[tuple[str, str]]):
    """A run, and its averages, with the names of folders for their paths in its config."""

    def renamed(value):
        if isinstance(value, (list, tuple)):
            return [renamed(each) for each in value]
        for name, folder in names if isinstance(value, str) else ():
            value = value.replace(folder, name)
        return value

    config = {key: renamed(value) for key, value in run.config.items()} if names else run.config
    return run._replace(config=config, averages=tuple(_called(each, names) for each in run.averages))


def pack(argv: Sequence[str]) -> int:
    """`report pack DIR [RUN ...] --out=FILE.jsonl`; returns the exit status, 2 for bad input."""
    from steppe.scripts import results

    parser = command.parser("report pack", __doc__, config=False)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a sweep, a file of pack, or workdirs of runs")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="the file, made or added to")
    parser.add_argument(
        "--call", action="append", default=[], type=_named, metavar="NAME=FOLDER", help="the folder's name; repeatable"
    )
    command.add_only(parser)
    options = command.options_of(argv, parser)
    out = Path(options.out)
    if out.suffix != results.PACK or out.is_dir():
        return process.fail(f"--out={out}: must be a file that ends in {results.PACK}")
    try:
        command.writable_directory(str(out.parent))
    except argparse.ArgumentTypeError as error:
        return process.fail(f"--out={out}: {error}")
    found = results.read(options.directories, options.only)
    ended = [_called(run, options.call) for run in found if run.status in ("finished", "diverged", "pruned")]
    before = {_computed(run): run for run in results.read(str(out))} if out.exists() else {}
    now = {_computed(run): run for run in ended}
    if not now:
        return process.fail(f"{', '.join(options.directories)}: must hold a finished run")
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, results.pack((before | now).values()))
    process.say(f"wrote {out}: {len(before | now)} runs, {len(now)} of them now")
    return 0
