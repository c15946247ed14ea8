"""Does an optimizer from outside keep what a training run relies on, and what does it cost?

steppe check mine.py:half_sign [--base=muon] [--config=quickstart] [--config.optim.mix=0.3]

The file makes a direction, a rule or a row (optim/README.md), or an optax transformation of a learning rate. Steppe's
own methods pass the same checks, on eight simulated devices of this CPU. FLOPs are counted from the program; memory is
the compiler's figure. Both are for the given config (default: quickstart). The exit status is 1 if a check fails.
"""

import time
from collections.abc import Sequence
from typing import Any

from steppe.configs.read import read_config
from steppe.scripts import command, process


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Prints every check, then the cost; returns the exit status: 1 where a check fails, 2 for bad input."""
    parser = command.parser("check", __doc__)
    parser.add_argument("reference", metavar="FILE.py:NAME", help="or a.module:NAME")
    parser.add_argument("--method", metavar="NAME", help="method to use with a base (default adamw: none)")
    parser.add_argument("--base", metavar="NAME", help="base optimizer of a method (default adamw)")
    path, overrides, options = command.parse_unread(argv, parser)

    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    process.ready_to_compute()
    from steppe.lm.parts.check import base_options, check, method_options, options_as_keys
    from steppe.optim import references
    from steppe.optim.options import needs
    from steppe.optim.outside import contract
    from steppe.optim.rule import OptionError

    try:
        source = references.load("method", options.reference)
    except OptionError as error:
        return process.fail(f"{options.reference}: must be {error.accepted}")
    names = {"method": options.method or "adamw", "base": options.base or "adamw"}
    part = "base" if "learning_rate" in needs(source.made) else "method"
    if names[part] != "adamw":
        return process.fail(f"--{part}={names[part]}: must be left out, as {options.reference} is one")
    names[part] = options.reference
    chosen = [(f"optim.{key}", name) for key, name in names.items()]
    config = read_config(path or "quickstart", [*chosen, *overrides])
    check(config, device_count=None)
    known = (method_options(config) | base_options(config)).items()
    given = {name: value for name, value in known if value is not None}
    rho = given.pop("rho", None) or 0.1

    process.say(f"{options.reference} as a {part}, {names['base' if part == 'method' else 'method']} as the other part")
    broken = 0
    with options_as_keys():
        for name, meaning, said in contract.outcomes(contract.Subject(**names, options=tuple(given.items()), rho=rho)):
            process.say(f"{'FAILS' if said else 'holds':<6} {name:<13} {said or meaning}")
            broken += bool(said)
    process.say(f"\n{cost(config)}")
    process.say(f"\n{broken} of {len(contract.CHECKS)} checks fail" if broken else "\nall checks hold")
    return 1 if broken else 0


def cost(config) -> str:
    """FLOPs and memory of a step of a config, next to AdamW's, for a reader."""
    import jax

    from steppe.data.vocabulary import load_tokenizer
    from steppe.optim.methods import OPTIONS
    from steppe.scripts.plan.compiled import compiled_step

    vocabulary, device = load_tokenizer(config.data.vocabulary).vocab_size, jax.devices()[:1]
    adamw = config.copy_and_resolve_references().unlock()
    adamw.optim.update(method="adamw", base="adamw", **dict.fromkeys(OPTIONS))
    found = []
    for each in (config, adamw):
        begun = time.monotonic()
        parts, program = compiled_step(each, vocabulary, 10**9, device)
        state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts.abstract))
        analysed: Any = program.memory_analysis()
        found.append((parts.budget.flops, state, analysed.temp_size_in_bytes, time.monotonic() - begun))
    lines = [f"cost of a step    {'this':>12} {'adamw':>12}   ratio"]
    units = {"GFLOPs": 1e9, "state, MiB": 2**20, "temporary, MiB": 2**20, "compiling, s": 1}
    for (name, unit), own, plain in zip(units.items(), *found, strict=True):
        lines.append(f"{name:<17} {own / unit:>12,.3f} {plain / unit:>12,.3f} {own / plain:>7.2f}")
    return "\n".join(lines)
