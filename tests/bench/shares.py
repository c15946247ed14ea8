"""Where epsilon lies: the share of |epsilon|^2 by group of parameters over training, as a Markdown table.

    python tests/bench/shares.py [VOCABULARY ...] [--steps 1 5 20 60 120]

Each VOCABULARY is a value of data.vocabulary, "bytes" by default. Runs of the embedded corpus, 8 x 256 tokens a step,
b2 0.98, tied and untied; with the defaults and 32k pieces each takes two minutes on two cores, all of them forty
minutes.
"""

import sys
from collections.abc import Iterator, Sequence

from steppe.configs.read import read_config
from steppe.configs.sizes import SIZES
from steppe.scripts import command, process

STALE = {"optim.precond_moment": "stale"}
DIRECTIONS = {
    "sam": {"optim.method": "sam"},
    "functional_sam": {"optim.method": "functional_sam"},
    "precond_sam, fresh": {"optim.method": "precond_sam"},
    "precond_sam, stale": {"optim.method": "precond_sam", **STALE},
    "precond_functional_sam, fresh": {"optim.method": "precond_functional_sam"},
    "precond_functional_sam, stale": {"optim.method": "precond_functional_sam", **STALE},
    "precond_functional_sam, stale, no floor": {
        "optim.method": "precond_functional_sam", **STALE, "optim.precond_floor": "0.0"
    },
    "precond_msam": {"optim.method": "precond_msam"},
    "precond_msam, no floor": {"optim.method": "precond_msam", "optim.update_floor": "0.0"},
    "precond_functional_msam": {"optim.method": "precond_functional_msam"},
}  # fmt: skip


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Prints the table, each row once it is known; returns the exit status."""
    parser = command.parser("tests/bench/shares.py", __doc__, config=False)
    parser.add_argument("--size", default="0.4m", choices=list(SIZES), help="a name of configs/sizes.py")
    parser.add_argument(
        "--steps", nargs="+", type=command.integer(1), default=[1, 5, 20, 60, 120], help="that are looked at"
    )
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=list(DIRECTIONS), metavar="NAME")
    parser.add_argument("vocabularies", nargs="*", help="values of data.vocabulary; none: bytes")
    options = command.options_of(argv, parser)
    from steppe.lm.model.parameters import GROUPS

    print(f"| vocabulary | embeddings | direction | step | {' | '.join([*GROUPS, 'largest row'])} |")
    print("|---" * (5 + len(GROUPS)) + "|")
    for vocabulary in options.vocabularies or ["bytes"]:
        for tied in ("tied", "untied"):
            for name in options.directions:
                run = {
                    "model.size": options.size,
                    "data.sequence_length": "256",
                    "train.batch_size": "8",
                    "train.duration": f"{max(options.steps)} steps",
                    "optim.b2": "0.98",
                    "data.vocabulary": vocabulary,
                    "model.tie_embeddings": str(tied == "tied"),
                    **DIRECTIONS[name],
                }
                for entries, step, found in shares(run, options.steps, [*GROUPS, "row"]):
                    cells = [str(entries), tied, name, str(step), *(f"{share:.4f}" for share in found)]
                    print(f"| {' | '.join(cells)} |", flush=True)
    return 0


def shares(overrides: dict[str, str], steps: Sequence[int], names: Sequence[str]) -> Iterator[tuple]:
    """(tokens of the vocabulary, step, [share of each name]) at these steps of a run of the quickstart."""
    import jax
    import numpy as np

    from steppe.lm.parts.assembly import abstract_batch, batch_reader, open_parts
    from steppe.lm.parts.state import create
    from steppe.lm.parts.step import compile_step

    config = read_config("quickstart", list(overrides.items()))
    corpus, parts, _ = open_parts(config, lambda line: None)
    step = compile_step(parts, abstract_batch(parts, corpus, config.train.batch_size))
    read, state = batch_reader(config, corpus, parts, lambda index: index), create(parts.mesh, parts.initialise)
    for number in range(1, max(steps) + 1):
        state, metrics = step(state, read(number - 1), np.float32(np.inf))
        if number in steps:
            found = jax.device_get(metrics)
            yield corpus.tokenizer.vocab_size, number, [float(found[f"epsilon_{name}"]) for name in names]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
