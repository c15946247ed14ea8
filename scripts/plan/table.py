"""Many plans as one table in Markdown."""

from collections.abc import Sequence

from steppe.lm.parts.chips import chip_of, network_of
from steppe.scripts.plan.compiled import DoesNotFit, compiled_step, described, plan, setting

# size -> (topology, batch size, sequence length, vocabulary size, fsdp, compute dtype) of the table
_BYTES, _C4 = (8, 128, 256, 1, "float32"), (512, 32100)
TABLE = {
    **dict.fromkeys(("0.01m", "0.03m", "0.05m", "0.1m", "0.4m", "1.8m"), ("cpu:1", *_BYTES)),
    **dict.fromkeys(("24m", "42m", "118m"), ("v5e:2x4", 256, *_C4, 8, "bfloat16")),
    "1.2b": ("v5e:16x16", 2048, *_C4, 256, "bfloat16"),
    "8b": ("v5e:16x16", 1024, *_C4, 256, "bfloat16"),
}
TABLE_METHODS = ("adamw", "sam", "functional_sam", "precond_functional_sam")


# Long text: a sequence of LONG tokens on each device, and the remat policies from the cheapest in time.
LONG, LONG_SIZES, SLICES, REMATS = 8192, ("1.2b", "8b"), ("v5e:16x16", "v6e:16x16", "v5p:4x4x4"), ("dots", "full")


def budgets(sizes: Sequence[str] | None, methods: Sequence[str] | None) -> None:
    """Prints one line per size and method, Chinchilla budgets. None: the table's own."""
    print("| size | method | machine | tokens a step | GiB a device | parameters + optimizer | anchor | temporary "
          "| FLOPs / adamw | sent, GiB | step s | MFU | days |")  # fmt: skip
    print("|" + "---|" * 13)
    for size in sizes or TABLE:
        topology, batch, length, vocabulary, fsdp, dtype = TABLE[size]
        devices = described(topology)
        for method in methods or TABLE_METHODS:
            config = _setting(size, method, batch, length, fsdp, dtype)
            try:
                parts, program = compiled_step(config, vocabulary, 10**9, devices)
            except DoesNotFit as error:
                print(f"| {size} | {method} | {topology} | does not fit: {error} |" + " |" * 9, flush=True)
                continue
            p, gib = plan(config, parts, program, devices), 2**30
            fits = "" if p.memory <= chip_of(devices[0], len(devices)).memory else " (does not fit)"
            days = [seconds * parts.budget.steps / 86400 for seconds in p.seconds]
            cells = [
                size, method, topology, f"{batch * length:,}", f"{p.memory / gib:.2f}{fits}",
                f"{(p.parameters + p.optimizer) / gib:.3f}", f"{p.anchor / gib:.3f}", f"{p.temporary / gib:.3f}",
                f"{parts.budget.flops / parts.budget.adamw_flops:.2f}",
                f"{sum(c.bytes for c in p.collectives) / gib:.2f}", f"{p.seconds[0]:.3g} to {p.seconds[1]:.3g}",
                f"{p.mfu[0]:.0%} to {p.mfu[1]:.0%}", f"{days[0]:.2g} to {days[1]:.2g}",
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)


def long(sizes: Sequence[str] | None, methods: Sequence[str] | None, topology: str | None) -> None:
    """Prints a line per method: remat policy, GiB a device, seconds of a step on each slice. None: the table's own."""
    from steppe.optim.methods import METHODS

    machines = {each: described(each) for each in ([topology] if topology else SLICES)}
    sizes = sizes or LONG_SIZES
    print(f"| method | {' | '.join(f'{size} {topology}' for size in sizes for topology in machines)} |")
    print("|" + "---|" * (1 + len(sizes) * len(machines)), flush=True)
    for method in methods or METHODS:
        cells = [_long_cell(size, method, devices) for size in sizes for devices in machines.values()]
        print(f"| {method} | {' | '.join(cells)} |", flush=True)


def _long_cell(size: str, method: str, devices: list) -> str:
    """The first remat policy that fits, its GiB a device and its seconds. Estimates leave out what is far too large."""
    from steppe.lm.parts.budget import step_traffic
    from steppe.optim.rule import OptionError

    count, chip = len(devices), chip_of(devices[0], len(devices))
    config, least = _setting(size, method, count, LONG, count, "bfloat16"), ""
    for remat in REMATS:
        config.model.remat = remat
        estimate = step_traffic(config, _C4[1], (1, count, 1), chip, network_of(devices, chip).bandwidth)[1]
        if estimate > 1.25 * chip.memory and remat != REMATS[-1]:
            continue
        try:
            parts, program = compiled_step(config, _C4[1], 10**9, devices)
        except DoesNotFit as error:
            least = str(error)
            continue
        except OptionError as error:  # k_sam's k sequences of a shard
            return str(error)
        found = plan(config, parts, program, devices)
        least = f"{remat} {found.memory / 2**30:.1f}, {found.seconds[0]:.2g} to {found.seconds[1]:.2g} s"
        if found.memory <= chip.memory:
            return least
    return f"does not fit: {least}"


def _setting(size: str, method: str, batch: int, length: int, fsdp: int, dtype: str):
    """The config of a cell."""
    values = {"model.size": size, "model.compute_dtype": dtype, "optim.method": method, "train.batch_size": batch}
    values |= {"data.sequence_length": length, "train.duration": "chinchilla", "mesh.data": 1, "mesh.fsdp": fsdp}
    return setting(values)
