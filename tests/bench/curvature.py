"""What a product with H, GGN or NME costs, in units of a gradient, and the memory it takes, on this machine.

    python tests/bench/curvature.py [--sizes 24m ...] [--batch_size=4] [--sequence_length=512] [--runs=5]

Programs take turns, and ratios are medians over the turns: by the clock, and in CPU seconds of this process, which
other load on the machine disturbs less. Memory is XLA's own count of what the program needs apart from its arguments.
"""

import statistics
import sys
from collections.abc import Sequence
from typing import Any

from steppe.scripts import command, process
from steppe.scripts.bench import turns

NAMES = ("gradient", "hessian", "ggn", "nme", "preconditioned hessian")


def main(argv: Sequence[str]) -> int:
    """Prints one table per size; returns the exit status."""
    options = command.options_of(argv, turns.parser("tests/bench/curvature.py", __doc__, turns=5))
    process.keep_memory()
    for size in options.sizes:
        for line in table(size, options):
            print(line, flush=True)
    return 0


def table(size: str, options):
    """Yields the lines of one size's table, as Markdown."""
    count, programs, arguments = programs_of(size, options)
    times = turns.take({name: lambda name=name: programs[name](*arguments[name]) for name in programs}, options.runs)
    yield (
        f"\n{size}, {count:,} parameters: {options.batch_size} x {options.sequence_length} tokens, vocabulary "
        f"{options.vocabulary_size}, float32, remat {options.remat}; medians of {options.runs} alternating turns. One "
        f"copy of the parameters is {count / 2**18:.0f} MiB, of which a Lanczos run keeps one for each step.\n"
    )
    yield "| program | wall / gradient | CPU s | CPU / gradient | temporary MiB |"
    yield "|---|---|---|---|---|"
    for name, program in programs.items():
        cells = ["", "", ""]
        if options.runs:
            wall, cpu = times[name]
            cells = [
                f"{turns.ratio(wall, times['gradient'].wall):.2f}",
                f"{statistics.median(cpu):.2f}",
                f"{turns.ratio(cpu, times['gradient'].cpu):.2f}",
            ]
        memory: Any = program.memory_analysis()
        yield f"| {name} | {' | '.join(cells)} | {memory.temp_size_in_bytes / 2**20:.0f} |"


def programs_of(size: str, options):
    """(number of parameters, {name: compiled program}, {name: its arguments, if any turn is taken}), on one device."""
    import jax
    import jax.numpy as jnp

    from steppe.lm.parts.assembly import assemble
    from steppe.lm.parts.state import create
    from steppe.optim.curvature import products
    from steppe.optim.rule import plain_gradient

    config = turns.config_of(size, options)
    config.optim.base = "sgd"  # whose state is small; no step is taken
    parts = assemble(config, options.vocabulary_size, 10**9, devices=jax.devices()[:1])
    batch = turns.batch_of(options)

    def preconditioned(params, batch, vector, scale):
        product = lambda v: products.hessian_product(parts.objective, params, batch, v)  # noqa: E731
        return products.preconditioned(product, scale)(vector)

    functions: dict[str, Any] = {"gradient": lambda params, batch: plain_gradient(parts.objective, params, batch)}
    for name, product in products.PRODUCTS.items():
        functions[name] = lambda params, batch, vector, product=product: product(parts.objective, params, batch, vector)
    functions["preconditioned hessian"] = preconditioned
    like = parts.abstract.params
    abstract: dict[str, tuple] = {name: (like, batch) if name == "gradient" else (like, batch, like) for name in NAMES}
    abstract["preconditioned hessian"] = (like, batch, like, like)
    programs = {name: jax.jit(functions[name]).lower(*abstract[name]).compile() for name in NAMES}
    count = sum(leaf.size for leaf in jax.tree.leaves(like))
    if not options.runs:
        return count, programs, {}
    params = create(parts.mesh, parts.initialise).params
    ones = jax.tree.map(jnp.ones_like, params)
    given = {name: (params, batch, *[ones] * (len(abstract[name]) - 2)) for name in NAMES}
    return count, programs, given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
