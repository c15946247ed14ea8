"""A small sweep for tests: a config file on a few hundred lines of real text, and the command that runs it."""

import os
import pathlib
import subprocess
import sys

from helpers import processes

CONFIG = """
from steppe.configs import base

def get_config():
    config = base.get_config()
    config.data.update(task="text:{text}/train.txt@all", held_out=("val=text:{text}/val.txt@all",))
    config.data.update(cache="{text}/cache", sequence_length=16)
    config.model.update(layers=1, width=16, heads=2, mlp_width=32)
    config.train.update(batch_size=8, duration="90 steps")
    config.optim.update(warmup="4 steps", peak_learning_rate=0.01)
    config.evaluate.update(every="30 steps", batches=2)
    config.checkpoint.every = "10 steps"
    config.sample.tokens = 0
    return config
"""


def write_config(place: pathlib.Path) -> pathlib.Path:
    """A config file in `place`, and the text it reads."""
    place.mkdir(parents=True, exist_ok=True)
    source = pathlib.Path(os.__file__).read_text()
    (place / "train.txt").write_text(source[:20_000])
    (place / "val.txt").write_text(source[20_000:22_000])
    path = place / "small.py"
    path.write_text(CONFIG.format(text=place))
    return path


def start(config: pathlib.Path, out: pathlib.Path, *arguments: str, **pipes) -> subprocess.Popen:
    """`steppe sweep ...` begun."""
    command = [sys.executable, "-P", "-m", "steppe.scripts.sweep", f"--config={config}", f"--out={out}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **pipes}
    return subprocess.Popen(command, env=processes.environment(), **pipes)


def run(config: pathlib.Path, out: pathlib.Path, *arguments: str) -> tuple[int, str]:
    """(exit status, everything printed) of a whole sweep command."""
    process = start(config, out, *arguments)
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


def saved(directory: pathlib.Path) -> int:
    """The step of a run's newest checkpoint, 0 where there is none; older ones are deleted, so none is waited for."""
    return max((int(path.name) for path in (directory / "checkpoints").glob("*") if path.name.isdigit()), default=0)
