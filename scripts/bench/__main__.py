"""Benchmark this machine: a training step, a GPU, the bytes that a step sends over a mesh.

steppe bench step|collectives|gpu [--help] ...
"""

import importlib
from collections.abc import Sequence

from steppe.configs import keys
from steppe.scripts import command, process
from steppe.scripts.cli import KINDS


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Runs steppe.scripts.bench.KIND with the remaining arguments; returns its exit status."""
    process.keep_memory()
    kinds, (kind, *rest) = KINDS["bench"], argv or [""]
    if kind in ("-h", "--help"):
        print(f"usage: steppe bench {{{','.join(kinds)}}} [--help] ...\n\n{command.headline(__doc__)}\n")
        for each in kinds:
            print(f"  {each:<13} {command.summary(f'{__package__}.{each}')}")
        return 0
    if kind not in kinds:
        hint = keys.named("optim.options:nearest")(kind, kinds)
        return process.fail(f"steppe bench {kind or 'nothing'}: must be one of {', '.join(kinds)}{hint}")
    return importlib.import_module(f"{__package__}.{kind}").main(rest)
