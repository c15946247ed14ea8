"""Speed, memory and compile time of a training step, method by method, on this machine.

    steppe bench step [--sizes 24m ...] [--methods adamw sam functional_sam:keep ...] [--against]

Variants take turns, and medians over the turns are reported: tokens/s by the clock, and CPU seconds of this process,
which other load on the machine disturbs less. METHOD:keep and METHOD:rebuild choose the functional readout. --against
adds a straightforward flax and optax step of the same shapes, with AdamW and with optax.contrib.sam.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from steppe.scripts import command

METHODS = ("adamw", "sam", "functional_sam:rebuild", "functional_sam:keep")


class Variant(NamedTuple):
    """One compiled step and where it stands. temporary: bytes; compile: seconds."""

    name: str
    step: Callable
    state: Any
    batch: Any
    temporary: int
    compile: float
    wall: list
    cpu: list


def main(argv: Sequence[str]) -> int:
    """Prints one table per size; returns the exit status."""
    parser = command.parser("bench step", __doc__, config=False)
    parser.add_argument("--sizes", nargs="+", default=["24m"], help="names of configs/sizes.py")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="METHOD or METHOD:keep|rebuild")
    parser.add_argument("--layers", type=int, help="instead of the size's own")
    parser.add_argument("--batch_size", type=int, default=4, help="sequences")
    parser.add_argument("--sequence_length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--vocabulary_size", type=int, default=32100, help="tokens of the vocabulary")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of products")
    parser.add_argument("--remat", default="dots", help="as config.model.remat")
    parser.add_argument("--chunk", type=int, default=0, help="as config.model.readout_chunk")
    parser.add_argument("--runs", type=int, default=7, help="turns of each variant, after one to warm up; 0: none")
    parser.add_argument("--against", action="store_true", help="also measure the straightforward reference")
    options = command.options_of(argv, parser)
    from steppe.configs.sizes import SIZES
    from steppe.optim.methods import canonical

    for size in options.sizes:
        if size not in SIZES:
            return command.fail(f"--sizes {size}: must be one of {', '.join(SIZES)}")
    try:
        for method in options.methods:
            canonical(method.partition(":")[0])
    except ValueError as error:
        return command.fail(error)
    for size in options.sizes:
        variants = [ours(size, method, options) for method in options.methods]
        if options.against:
            variants += [reference(size, sam, options) for sam in (False, True)]
        print_table(size, take_turns(variants, options.runs), options)
    return 0


def ours(size: str, method: str, options) -> Variant:
    """Steppe's own step for METHOD[:keep|rebuild]."""
    import jax

    from steppe.configs import base, sizes
    from steppe.lm.run.state import create
    from steppe.scripts.plan import compiled_step

    config = base.get_config()
    name, _, readout = method.partition(":")
    config.model.size, config.optim.method = size, name
    sizes.resolve(config)
    config.model.update(
        functional_readout=readout or "auto", compute_dtype=options.dtype, remat=options.remat,
        readout_chunk=options.chunk,
    )  # fmt: skip
    if options.layers:
        config.model.layers = options.layers
    config.train.batch_size, config.data.sequence_length = options.batch_size, options.sequence_length
    config.optim.clip_norm = 0.0  # the reference does not clip either
    began = time.process_time()
    parts, program = compiled_step(config, options.vocabulary_size, 10**9, jax.devices()[:1])
    spent = time.process_time() - began
    state = create(parts.mesh, parts.initialise) if options.runs else None
    return Variant(
        method, program, state, batch_of(options), program.memory_analysis().temp_size_in_bytes, spent, [], []
    )


def reference(size: str, sam: bool, options) -> Variant:
    """The straightforward step."""
    import jax

    from steppe.configs.sizes import SIZES
    from steppe.lm.model.transformer import Shape, padded_vocabulary
    from steppe.scripts.bench.reference import make

    found = dict(SIZES[size])
    found["layers"] = options.layers or found["layers"]
    shape = Shape(
        "nanodo", kv_heads=found["heads"], vocabulary=padded_vocabulary(options.vocabulary_size, 32),
        sequence_length=options.sequence_length, **found,
    )  # fmt: skip
    initialise, step = make(shape, sam)
    state = jax.jit(initialise)(jax.random.key(0))
    batch = batch_of(options)
    began = time.process_time()
    program = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    spent = time.process_time() - began
    name = "optax.contrib.sam" if sam else "plain adamw"
    return Variant(name, program, state, batch, program.memory_analysis().temp_size_in_bytes, spent, [], [])


def batch_of(options) -> dict:
    """Random tokens."""
    import jax
    import jax.numpy as jnp

    shape = (options.batch_size, options.sequence_length + 1)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, options.vocabulary_size)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones(tokens[:, 1:].shape, jnp.float32)}


def take_turns(variants: list[Variant], runs: int) -> list[Variant]:
    """Runs every variant once per turn and records wall and CPU seconds, the first turn left out."""
    import jax

    states = [variant.state for variant in variants]
    for turn in range(runs + 1 if runs else 0):
        for index, variant in enumerate(variants):
            wall, cpu = time.perf_counter(), time.process_time()
            states[index], metrics = variant.step(states[index], variant.batch)
            jax.block_until_ready(states[index])
            if turn:
                variant.wall.append(time.perf_counter() - wall)
                variant.cpu.append(time.process_time() - cpu)
            if metrics["loss"] != metrics["loss"]:
                raise FloatingPointError(f"{variant.name}: the loss is not a number")
    return variants


def print_table(size: str, variants: list[Variant], options) -> None:
    """Markdown. Ratios are medians over the turns of what a variant took over what the first one took in that turn."""
    first = variants[0]
    print(
        f"\n{size}: {options.batch_size} x {options.sequence_length} tokens, vocabulary {options.vocabulary_size}, "
        f"{options.dtype}, remat {options.remat}; medians of {options.runs} alternating turns\n"
    )
    print(f"| step | tokens/s | wall / {first.name} | CPU s | CPU / {first.name} | temporary MiB | compile CPU s |")
    print("|---|---|---|---|---|---|---|")
    for v in variants:
        cells = ["", "", "", ""]
        if options.runs:
            ratios = (
                statistics.median(a / b for a, b in zip(mine, base, strict=True))
                for mine, base in ((v.wall, first.wall), (v.cpu, first.cpu))
            )
            wall, cpu = (f"{ratio:.2f}" for ratio in ratios)
            tokens = options.batch_size * options.sequence_length / statistics.median(v.wall)
            cells = [f"{tokens:,.0f}", wall, f"{statistics.median(v.cpu):.2f}", cpu]
        print(f"| {v.name} | {' | '.join(cells)} | {v.temporary / 2**20:.0f} | {v.compile:.1f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
