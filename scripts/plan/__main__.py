"""Print memory and time of a run on hardware you do not have, from its real step compiled for it.

    steppe plan --config=FILE --topology=cpu:8|v5e:16x16|v5p:8x8x4|h100:8|a100:4x8|... [--search]
    steppe plan --table [--long] [--sizes 24m 1.2b] [--methods adamw sam]

TPU topologies need the TPU compiler (pip install steppe[plan]), not a TPU. GPU topologies, written as hosts x devices,
need jax's GPU plugin (pip install steppe[gpu]), not a GPU. cpu:N simulates N devices. --search estimates remat policies
and meshes and compiles the cheapest until one fits. --table plans each size of configs/sizes.py on the machine that
scripts/plan/table.py gives it. With --long it plans 1.2b and 8b with 8,192 tokens a sequence on three TPU slices.
"""

import math
import re
from collections.abc import Sequence

from steppe.configs.read import read_config
from steppe.lm.parts.chips import chip_of
from steppe.scripts import command, process
from steppe.scripts.plan import table
from steppe.scripts.plan.compiled import GPUS, DoesNotFit, compiled_step, described, plan


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Prints the plan; returns 0 if it fits, 1 if not, 2 for bad input."""
    parser = command.parser("plan", __doc__)
    add = parser.add_argument
    add("--topology", metavar="KIND:SIZE", help="cpu:8, v5e:16x16, v5p:8x8x4, v6e:4x4, h100:8, a100:4x8")
    add("--vocabulary_size", type=command.integer(1), help="instead of reading config.data.vocabulary")
    tokens = command.integer(0, 10**18)
    add("--epoch_tokens", type=tokens, default=0, help="tokens of the corpus, for durations in epochs")
    add("--search", action="store_true", help="also choose config.model.remat and config.mesh")
    add("--table", action="store_true", help="plan many sizes and methods, as a table in Markdown")
    add("--long", action="store_true", help="with --table: every method on sequences of 8,192 tokens")
    add("--sizes", nargs="+", choices=list(table.TABLE), help="rows of --table")
    add("--methods", nargs="+", type=command.of_key("optim.method"), help="methods of --table")
    path, overrides, options = command.parse_unread(argv, parser)
    if options.table:
        if options.long:
            table.long(options.sizes, options.methods, options.topology)
        else:
            table.budgets(options.sizes, options.methods)
        return 0
    config = read_config(command.required(path), overrides)
    if not options.topology:
        return process.fail("--topology is missing: cpu:8, v5e:16x16, v5p:8x8x4, ...")
    if not re.fullmatch(rf"(cpu|{'|'.join(GPUS)}):[1-9]\d*|({'|'.join(GPUS)}|v\w+):\d+(x\d+)+", options.topology):
        known = "cpu:8, v5e:16x16, v5p:8x8x4, h100:8 or a100:4x8"
        return process.fail(f"--topology={options.topology}: must be like {known}")
    if "epoch" in config.train.duration and not options.epoch_tokens:
        return process.fail(f"config.train.duration = {config.train.duration!r}: needs --epoch_tokens=N here")
    devices = described(options.topology)
    from steppe.data.vocabulary import load_tokenizer
    from steppe.lm.parts.check import check
    from steppe.scripts.plan import search

    config.unlock()
    if options.vocabulary_size:
        config.data.vocabulary = "bytes"  # only its size matters here
    processes = len({device.process_index for device in devices})
    check(config, device_count=len(devices), process_count=processes, backend=devices[0].platform)
    size = options.vocabulary_size or load_tokenizer(config.data.vocabulary).vocab_size
    if not options.search:
        fits = show(config, size, options.epoch_tokens, devices)
        if not fits:
            print("remedies    the same command with --search chooses remat, mesh and microbatches that fit")
        return 0 if fits else 1
    return search.search(config, size, options.epoch_tokens, devices, show)


def show(config, vocabulary_size: int, epoch_tokens: int, devices: list) -> bool:
    """Compiles, prints the plan, and returns whether it fits."""
    from steppe.lm.model.mesh import AXES
    from steppe.lm.parts.budget import describe
    from steppe.lm.parts.check import mesh_shape

    chip = chip_of(devices[0], len(devices))
    mesh = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, mesh_shape(config, len(devices)), strict=True))
    print(f"devices     {len(devices)} x {chip.name}, mesh {mesh}, remat {config.model.remat}", flush=True)
    try:
        parts, program = compiled_step(config, vocabulary_size, epoch_tokens, devices)
    except DoesNotFit as error:
        print(f"memory      does not fit: {error}")
        return False
    found = plan(config, parts, program, devices)
    print(describe(parts.budget, config.optim.method))
    print(f"kernels     attention {parts.shape.kernel}, derivative {'kept' if parts.options.keep else 'rebuilt'}, "
          f"logits of {parts.options.chunk} positions at a time")  # fmt: skip
    fits = found.memory <= chip.memory
    said = "fits" if fits else "does not fit"
    print(f"memory      {_gib(found.memory)} of {_gib(chip.memory)} on each device: {said}")
    for name in ("parameters", "optimizer", "anchor", "temporary", "batch"):
        print(f"  {name:<12}{_gib(getattr(found, name))}")
    print("collectives sent by each device in a step")
    for kind in sorted({c.kind for c in found.collectives}):
        of_kind = [c for c in found.collectives if c.kind == kind]
        print(f"  {kind:<20}{sum(c.times for c in of_kind):6} times {sum(c.bytes for c in of_kind) / 2**30:10.3f} GiB")
    print(f"network     {found.network}")
    if not math.isnan(found.bound):
        slower = "slower" if found.tokens < found.bound else "faster"
        print(f"            {slower} than products: {found.tokens:,} tokens a device, level at {found.bound:,.0f}")
    best, worst = found.seconds
    print(f"step        {best:.3g} s ({found.mfu[0]:.0%} MFU) if traffic hides behind products, {worst:.3g} s "
          f"({found.mfu[1]:.0%}) if nothing overlaps")  # fmt: skip
    print(f"run         {span(best * parts.budget.steps, worst * parts.budget.steps)}")
    print(f"assumes     {chip.flops / 1e12:.3g} TFLOP/s (bfloat16 peak), {chip.bandwidth / 1e9:.0f} GB/s of memory; "
          f"no input, evaluation or checkpoint time")  # fmt: skip
    return fits


_UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


def span(low: float, high: float) -> str:
    """Two times in seconds, in the unit that fits the longer: "3.2 to 4 hours"."""
    unit, name = next((unit, name) for unit, name in _UNITS if high >= 2 * unit or unit == 1)
    return f"{low / unit:.3g} to {high / unit:.3g} {name}"


def _gib(size: float) -> str:
    return f"{size / 2**30:8.2f} GiB"
