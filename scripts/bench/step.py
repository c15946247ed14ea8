"""Speed, memory and compile time of a training step on this machine, for each method.

    steppe bench step [--sizes 24m ...] [--methods adamw sam functional_sam:keep ...] [--against]

Variants alternate, and the table holds medians over the turns: tokens/s of wall-clock time, and CPU seconds of this
process, which other load disturbs less. METHOD:keep and METHOD:rebuild choose the functional readout. --against adds a
plain flax and optax step of the same shapes, with AdamW and with optax.contrib.sam.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from steppe.lm.track.waiting import compiling
from steppe.scripts import command, process
from steppe.scripts.bench import turns

METHODS = ("adamw", "sam", "functional_sam:rebuild", "functional_sam:keep")


class Variant(NamedTuple):
    """One compiled step. run() executes it once; temporary: bytes; compile: CPU seconds."""

    name: str
    run: Callable[[], Any]
    temporary: int
    compile: float


def main(argv: Sequence[str]) -> int:
    """Prints one table per size; returns the exit status."""
    parser = turns.parser("bench step", __doc__, turns=7)
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), type=turns.method, help="METHOD or METHOD:keep|rebuild"
    )
    parser.add_argument("--layers", type=command.integer(1), help="layers; default: those of the size")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")
    parser.add_argument("--chunk", type=command.integer(), default=0, help="tokens: config.model.readout_chunk")
    parser.add_argument("--against", action="store_true", help="also measure plain flax and optax steps")
    options = command.options_of(argv, parser)
    for size in options.sizes:
        variants = [ours(size, method, options) for method in options.methods]
        if options.against:
            variants += [reference(size, sam, options) for sam in (False, True)]
        print_table(size, variants, options)
    return 0


def ours(size: str, method: str, options) -> Variant:
    """Steppe's step for METHOD[:keep|rebuild]."""
    import jax

    from steppe.lm.parts.state import create
    from steppe.scripts.plan.compiled import compiled_step

    config = turns.config_of(size, options, method)
    config.model.update(compute_dtype=options.dtype, readout_chunk=options.chunk)
    config.model.layers = options.layers or config.model.layers
    config.optim.clip_norm = 0.0  # the reference does not clip either
    began = time.process_time()
    parts, program = compiled_step(config, options.vocabulary_size, 10**9, jax.devices()[:1])
    spent = time.process_time() - began
    state = create(parts.mesh, parts.initialise) if options.runs else None
    step = lambda state, batch: program(state, batch, math.inf, parts.scalars)  # noqa: E731
    return variant(method, program, step, state, turns.batch_of(options), spent)


def reference(size: str, sam: bool, options) -> Variant:
    """The plain flax and optax step."""
    import jax

    from steppe.scripts.bench.against.flax_step import make

    initialise, step = make(turns.shape_of(size, options, options.layers), sam)
    state, batch = jax.jit(initialise)(jax.random.key(0)), turns.batch_of(options)
    began, name = time.process_time(), "optax.contrib.sam" if sam else "plain adamw"
    with compiling(f"{size} {name}", process.warn):
        program = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    spent = time.process_time() - began
    return variant(name, program, program, state, batch, spent)


def variant(name: str, program: Any, step: Callable, state: Any, batch: dict, spent: float) -> Variant:
    """The Variant of step(state, batch) -> (state, metrics), each time on the state that the last call returned."""

    def run():
        nonlocal state
        state, metrics = step(state, batch)
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"{name}: the loss is not a number")
        return state

    return Variant(name=name, run=run, temporary=program.memory_analysis().temp_size_in_bytes, compile=spent)


def print_table(size: str, variants: list[Variant], options) -> None:
    """Prints a Markdown table. A ratio is the median over turns of a variant's time over the first variant's."""
    times = turns.take({variant.name: variant.run for variant in variants}, options.runs)
    first = variants[0].name
    print(
        f"\n{size}: {options.batch_size} x {options.sequence_length} tokens, vocabulary {options.vocabulary_size}, "
        f"{options.dtype}, remat {options.remat}; medians of {options.runs} alternating turns\n"
    )
    print(f"| step | tokens/s | wall / {first} | CPU s | CPU / {first} | temporary MiB | compile CPU s |")
    print("|---|---|---|---|---|---|---|")
    for variant in variants:
        cells = ["", "", "", ""]
        if options.runs:
            wall, cpu = times[variant.name]
            cells = [
                f"{options.batch_size * options.sequence_length / statistics.median(wall):,.0f}",
                f"{turns.ratio(wall, times[first].wall):.2f}",
                f"{statistics.median(cpu):.2f}",
                f"{turns.ratio(cpu, times[first].cpu):.2f}",
            ]
        memory = f"{variant.temporary / 2**20:.0f}"
        print(f"| {variant.name} | {' | '.join(cells)} | {memory} | {variant.compile:.1f} |", flush=True)
