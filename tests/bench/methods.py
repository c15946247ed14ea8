"""What each method costs: FLOPs and temporary memory of one step over the base's, as XLA counts them.

    python tests/bench/methods.py [METHOD ...] [--layers=4] [--width=240] ...

XLA counts the body of a loop once, so to count FLOPs layers are unrolled and the readout takes all tokens in one piece;
memory is that of a second program, its readout in chunks as in training. Nothing is run.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from steppe.scripts import command, process

COLUMNS = "method | FLOPs | predicted | temporary MiB | over AdamW | FLOPs, derivative kept"


def main(argv: Sequence[str]) -> int:
    """Prints the table as Markdown; returns the exit status."""
    parser = command.parser("tests/bench/methods.py", __doc__, config=False)
    parser.add_argument("--layers", type=command.integer(1), default=4, help="Transformer blocks")
    parser.add_argument("--width", type=command.integer(1), default=240, help="width; the MLP is four times as wide")
    parser.add_argument("--vocabulary", type=command.integer(1), default=32128, help="vocabulary, tied to the readout")
    parser.add_argument("--batch_size", type=command.integer(1), default=16, help="sequences")
    parser.add_argument("--sequence_length", type=command.integer(1), default=256, help="tokens of a sequence")
    parser.add_argument(
        "--chunks", type=command.integer(1), default=8, help="pieces of the readout, when memory is measured"
    )
    parser.add_argument("methods", nargs="*", help="names of optim/methods.py; none: all")
    options = command.options_of(argv, parser)
    from steppe.optim.methods import METHODS, canonical

    try:
        options.methods = [canonical(name) for name in options.methods] or list(METHODS)
    except ValueError as error:
        return process.fail(error)
    for line in table(options):
        print(line, flush=True)
    return 0


def table(options: argparse.Namespace):
    """Yields the lines of the table: FLOPs over AdamW's, measured and predicted, and temporary memory."""
    from steppe.optim.methods import cost, row_of, second_of

    flops, memory, parameters = measure("adamw", options)
    yield (
        f"{parameters / 1e6:.2f}M parameters ({options.layers} layers of width {options.width}, vocabulary "
        f"{options.vocabulary}, tied), {options.batch_size} x {options.sequence_length} tokens, float32, base adamw. "
        f"AdamW alone: {flops / 1e9:.1f} GFLOP and {memory / 2**20:.0f} MiB of temporary memory a step; one copy of "
        f"the parameters is {parameters / 2**18:.0f} MiB, all logits are "
        f"{options.batch_size * options.sequence_length * options.vocabulary / 2**18:.0f} MiB."
    )
    yield ""
    yield f"| {COLUMNS} |"
    yield "|---" * 6 + "|"
    for name in options.methods:
        row, one = row_of(name), cost(name, sequences=options.batch_size)
        share = 1 / row.period() if row and row.period else 1.0
        ratio = predicted(options, one.averaged(share)) / predicted(options, cost("adamw"))
        measured, temporary, _ = measure(name, options)

        def average(perturbed, share=share):
            return (share * perturbed + (1 - share) * flops) / flops

        kept = f"{average(measure(name, options, keep=True, memory=False)[0]):.2f}" if second_of(name).frozen else ""
        yield (
            f"| `{name}` | {average(measured):.2f} | {ratio:.2f} | {temporary / 2**20:.0f} | "
            f"{(temporary - memory) / 2**20:+.0f} | {kept} |"
        )


def predicted(options: argparse.Namespace, cost) -> float:
    """FLOPs of a step of this Cost as they are printed for a run."""
    from steppe.lm.parts.budget import step_flops

    return step_flops(shape_of(options), options.batch_size * options.sequence_length, cost)


def measure(
    name: str, options: argparse.Namespace, keep: bool = False, memory: bool = True, optimize: bool = True, **given
) -> tuple[float, int, int]:
    """(FLOPs of a step that perturbs, bytes of temporary memory of its program or 0, number of parameters).

    optimize: count them after XLA's optimizations, which leave out what is computed twice. given: options and switches
    of the method. XLA counts one microbatch: the others are added here.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from steppe.optim import base_optimizer, method
    from steppe.optim.methods import row_of
    from steppe.optim.options import options as options_of

    adamw = base_optimizer("adamw", 1e-3, weight_decay=0.1)

    def update(params, state, gradient):
        updates, state = adamw.transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    first: Any = 0  # known while it is traced: a step that perturbs

    def lowered(chunks):
        objective, params, batch = language_model(options, chunks, keep)

        def step(params, state, rule_state, batch):
            gradient, rule_state, report = rule.gradient(objective, params, batch, state, rule_state, first)
            return *update(params, state, gradient), rule_state, report

        states = jax.eval_shape(adamw.transform.init, params), jax.eval_shape(rule.init, params)
        return jax.jit(step, donate_argnums=(0, 1, 2)).lower(params, *states, batch), params, states[0]

    def count(program):
        return (program.compile() if optimize else program).cost_analysis()["flops"]

    frequency = jnp.full(options.vocabulary, 1 / options.vocabulary)
    # A method with a period as a step that perturbs: XLA counts both branches of the conditional between the two kinds.
    row = row_of(name)
    own = dict.fromkeys(options_of(row.period), 1) if row and row.period else {}
    needs = row.needs() if row else {}
    rule = method(name, base=adamw, **{**own, **dict.fromkeys(needs, frequency), **given})
    program, params, state = lowered(1)
    flops, parts = count(program), given.get("microbatches", 1)
    if parts > 1:
        flops += (parts - 1) * (flops - count(jax.jit(update).lower(params, state, params)))
    used: Any = lowered(options.chunks)[0].compile().memory_analysis() if memory else None
    temporary = used.temp_size_in_bytes if memory else 0
    return flops, temporary, sum(leaf.size for leaf in jax.tree.leaves(params))


def shape_of(options: argparse.Namespace):
    """The Shape of the model that is measured."""
    from steppe.lm.model.transformer import Shape

    return Shape(
        style="nanodo",
        layers=options.layers,
        width=options.width,
        heads=4,
        kv_heads=4,
        mlp_width=4 * options.width,
        vocabulary=options.vocabulary,
        sequence_length=options.sequence_length,
    )


def language_model(options: argparse.Namespace, chunks: int, keep: bool):
    """(objective, abstract params, abstract batch): lm's model with its layers unrolled, its readout in chunks."""
    import jax
    import jax.numpy as jnp

    from steppe.lm.model.mesh import Placement
    from steppe.lm.model.objective import objective
    from steppe.lm.model.readout import Options
    from steppe.lm.model.transformer import Block, Norm, Trunk

    length, shape = options.sequence_length, shape_of(options)
    free = Placement()
    scanned = objective(shape, Options(options.vocabulary, length // chunks, keep=keep), free)

    def trunk(params, batch):
        tokens = batch["inputs"]
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        x_BxTxD = params["embed"]["embedding"][tokens] + params["position"]["embedding"][positions]
        for layer in range(options.layers):
            weights = jax.tree.map(lambda w, layer=layer: w[layer], params["layers"])
            x_BxTxD, _ = Block(shape, free).apply({"params": weights}, x_BxTxD, positions, None)
        return Norm(shape).apply({"params": params["final_norm"]}, x_BxTxD)

    def frozen_readout(params, hidden, anchor, batch):
        # In one piece XLA would take the rebuilt logits from the pass at theta, which no chunked readout can: times 1.
        one = jnp.max(batch["weights"])
        return scanned.frozen_readout(params, hidden, anchor._replace(hidden=anchor.hidden * one), batch)

    tokens = jax.ShapeDtypeStruct((options.batch_size, length), jnp.int32)
    params = jax.eval_shape(Trunk(shape).init, jax.random.key(0), tokens)["params"]
    batch = {"inputs": tokens, "targets": tokens, "weights": jax.ShapeDtypeStruct(tokens.shape, jnp.float32)}
    return scanned._replace(trunk=trunk, frozen_readout=frozen_readout), params, batch


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
