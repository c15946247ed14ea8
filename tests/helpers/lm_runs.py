"""Small real runs for tests: a text, a config of a few thousand parameters, and what they recorded."""

import contextlib
import json
import math
import os
import pathlib

import jax
import pytest

from steppe.configs import base
from steppe.lm import plot
from steppe.lm.parts.memo import Memo
from steppe.lm.run import train

EVERY = jax.devices()
EVERY_AXIS = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
MEMO = Memo(64)  # of this process: tests run the same programs again and again


def write_text(place: pathlib.Path) -> tuple[str, str]:
    """Real text for `config`: (folder, cache)."""
    source = pathlib.Path(os.__file__).read_text()
    (place / "train.txt").write_text(source[:20_000])
    (place / "val.txt").write_text(source[20_000:25_000])
    return str(place), str(place / "cache")


def config(text: str, cache: str, **overrides):
    """The base config in small, on the files train.txt and val.txt in `text`; overrides as {"optim__rho": 0.1}."""
    small = base.get_config()
    small.data.update(task=f"text:{text}/train.txt@all", held_out=(f"val=text:{text}/val.txt@all",))
    small.data.update(cache=cache, sequence_length=16)
    small.model.update(layers=2, width=16, heads=2, mlp_width=32)
    small.train.update(batch_size=8, duration="20 steps")
    small.optim.update(warmup="4 steps", peak_learning_rate=0.01)
    small.evaluate.update(every="10 steps", batches=2, batch_size=8)
    small.checkpoint.every = "10 steps"
    small.log.every = 1000
    small.sample.tokens = 0
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        if name:
            small[section][name] = value
        else:
            small[section] = value
    return small.lock()


def run(config, workdir, *arguments, draws: bool = False, **options) -> int:
    """`train.run` with what earlier runs of the process have compiled, as a worker of a sweep does it.

    On as many devices as config.mesh says: on one where it says nothing. Where a second start must compile for itself
    as a new process would, call train.run.

    draws: whether it ends with its loss curve, which takes as long as all else of a run whose programs are compiled.
    """
    with (
        pytest.MonkeyPatch.context() as patch,
        MEMO,
        devices(math.prod(max(1, config.mesh[axis]) for axis in ("data", "fsdp", "tensor"))),
    ):
        if not draws:
            patch.setattr(plot, "loss_curve", lambda workdir: None)
        return train.run(config, str(workdir), *arguments, **options)


@contextlib.contextmanager
def devices(count: int):
    """A block in which this machine has `count` devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: EVERY[:count])
        yield


def records(workdir, kind: str) -> list[dict]:
    """The records of one kind in a run's metrics.jsonl."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(workdir) -> list[float]:
    """The training loss of every step, in order."""
    return [record["loss"] for record in records(workdir, "train")]
