"""Shared by the benchmarks: options, the config and batch they describe, and alternating timed runs."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from steppe.configs import sizes
from steppe.scripts import command
from steppe.scripts.plan.compiled import setting

if TYPE_CHECKING:
    from steppe.lm.model.transformer import Shape


class Times(NamedTuple):
    """Seconds of each turn of a program: wall clock, and this process's CPU time, which other load disturbs less."""

    wall: list[float]
    cpu: list[float]


def parser(name: str, summary: str | None, turns: int) -> command.Parser:
    """A parser with the options that config_of and batch_of read."""
    made = command.parser(name, summary, config=False)
    made.add_argument("--sizes", nargs="+", default=["24m"], choices=list(sizes.SIZES), help="see configs/sizes.py")
    made.add_argument("--batch_size", type=command.integer(1), default=4, help="sequences")
    made.add_argument("--sequence_length", type=command.integer(1), default=512, help="tokens of a sequence")
    made.add_argument("--vocabulary_size", type=command.integer(1), default=32100, help="tokens in the vocabulary")
    made.add_argument("--remat", default="dots", type=command.of_key("model.remat"), help="config.model.remat")
    made.add_argument(
        "--runs", type=command.integer(), default=turns, help="timed turns of each program after a warm-up; 0: none"
    )
    return made


def method(text: str) -> str:
    """An argparse type: METHOD or METHOD:keep|rebuild."""
    name, colon, readout = text.partition(":")
    command.of_key("optim.method")(name)
    if colon:
        command.of_key("model.functional_readout")(readout)
    return text


def config_of(size: str, options: argparse.Namespace, method: str = "adamw") -> ConfigDict:
    """The base config with a named size and the options' shapes, for METHOD or METHOD:keep|rebuild."""
    name, _, readout = method.partition(":")
    values = {"model.size": size, "model.remat": options.remat, "model.functional_readout": readout or "auto"}
    values |= {"optim.method": name, "train.batch_size": options.batch_size, "mesh.data": 1, "mesh.fsdp": 1}
    return setting(values | {"data.sequence_length": options.sequence_length, "mesh.tensor": 1})


def shape_of(size: str, options: argparse.Namespace, layers: int | None = None) -> "Shape":
    """The shape of a baseline's model."""
    from steppe.lm.model.transformer import shape

    config = config_of(size, options)
    config.model.layers = layers or config.model.layers
    return shape(config.model, options.vocabulary_size, options.sequence_length, "")


def batch_of(options: argparse.Namespace) -> dict:
    """A batch of random tokens [B, T]."""
    import jax
    import jax.numpy as jnp

    shape = (options.batch_size, options.sequence_length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, options.vocabulary_size)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones(tokens[:, 1:].shape, jnp.float32)}


def take(programs: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, Times]:
    """Runs every program once per turn and waits for its result; the first turn warms up and is not counted."""
    import jax

    times = {name: Times([], []) for name in programs}
    for turn in range(turns + 1 if turns else 0):
        for name, program in programs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(program())
            if turn:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    return times


def ratio(mine: list[float], base: list[float]) -> float:
    """Median over turns of one program's time divided by the other's in the same turn."""
    return statistics.median(a / b for a, b in zip(mine, base, strict=True))


def repeat(step: Callable[[Any], Any], state: Any, seconds: float, finish: Callable[[Any], Any]) -> tuple[float, Any]:
    """(seconds of a step(state) -> state, the last state) over `seconds`, after three; finish(state) waits for it."""
    count, began = -3, 0.0
    while count < 3 or time.perf_counter() - began < seconds:
        if count == 0:
            finish(state)
            began = time.perf_counter()
        state = step(state)
        count += 1
        if count > 0 and count % 4 == 0:
            finish(state)
    finish(state)
    return (time.perf_counter() - began) / count, state
