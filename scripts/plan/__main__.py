"""What a run will cost and whether it fits, from its real step compiled for devices that need not be here.

    steppe plan --config=FILE --topology=cpu:8|v5e:16x16|v5p:8x8x4|h100:8|a100:4x8|... [--search]
    steppe plan --table [--sizes 24m 1.2b] [--methods adamw sam]

TPU topologies need the TPU compiler (pip install steppe[plan]), not a TPU; GPUs, as hosts x devices, need what GPUs do
(pip install steppe[gpu]), but none of them. cpu:N simulates N devices. --search tries remat policies and meshes by
estimate and compiles the cheapest that should fit, until one does. --table plans the sizes of configs/sizes.py, each on
the machine TABLE gives it.
"""

import math
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from steppe.configs import base
from steppe.configs.read import read_config
from steppe.scripts import command, process

# size -> (topology, batch size, sequence length, vocabulary size, fsdp, compute dtype) of the table
_BYTES, _C4 = (8, 128, 256, 1, "float32"), (512, 32100)
TABLE = {
    **dict.fromkeys(("0.01m", "0.03m", "0.05m", "0.1m", "0.4m", "1.8m"), ("cpu:1", *_BYTES)),
    **dict.fromkeys(("24m", "42m", "118m"), ("v5e:2x4", 256, *_C4, 8, "bfloat16")),
    "1.2b": ("v5e:16x16", 2048, *_C4, 256, "bfloat16"),
    "8b": ("v5e:16x16", 1024, *_C4, 256, "bfloat16"),
}
# What XLA's compiler asks about a GPU, from its maker's data sheets: the text of a GpuTargetConfigProto.
_GPU = (
    "gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536 "
    "registers_per_block_limit: 65536 shared_memory_per_block: 49152 {} }} "
    'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{}"'
)
GPUS = {
    "h100": _GPU.format(
        "cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 "
        "shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 l2_cache_size: 52428800 "
        "memory_bandwidth: 3350000000000 device_memory_size: 85000000000",
        "NVIDIA H100 80GB HBM3",
    ),
    "a100": _GPU.format(
        "cuda_compute_capability { major: 8 } core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 "
        "shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 l2_cache_size: 41943040 "
        "memory_bandwidth: 2039000000000 device_memory_size: 85000000000",
        "NVIDIA A100-SXM4-80GB",
    ),
}
METHODS = ("adamw", "sam", "functional_sam", "precond_functional_sam")


class Plan(NamedTuple):
    """Bytes are of one device. temporary: of the compiled step, without the anchor; seconds: (best, worst) a step;
    tokens: a device takes a step; bound: fewer of them wait for the network, NaN where what is sent grows with them."""

    parameters: int
    optimizer: int
    anchor: int
    temporary: int
    batch: int
    collectives: list
    seconds: tuple[float, float]
    mfu: tuple[float, float]
    network: str
    tokens: int
    bound: float


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Prints the plan; returns 0 if it fits, 1 if not, 2 for bad input."""
    parser = command.parser("plan", __doc__)
    parser.add_argument(
        "--topology", metavar="KIND:SIZE", help="cpu:8, v5e:16x16, v5p:8x8x4, v6e:4x4, h100:8, a100:4x8"
    )
    parser.add_argument(
        "--vocabulary_size", type=command.integer(1), metavar="N", help="instead of reading config.data.vocabulary"
    )
    parser.add_argument(
        "--epoch_tokens",
        type=command.integer(0, 10**18),
        default=0,
        metavar="N",
        help="of the corpus, for runs in epochs",
    )
    parser.add_argument("--search", action="store_true", help="also choose config.model.remat and config.mesh")
    parser.add_argument("--table", action="store_true", help="plan many sizes and methods, as a table in Markdown")
    parser.add_argument("--sizes", nargs="+", default=list(TABLE), choices=list(TABLE), help="of --table")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), type=command.of_key("optim.method"), help="of --table"
    )
    path, overrides, options = command.parse_unread(argv, parser)
    if options.table:
        return table(options.sizes, options.methods)
    config = read_config(command.required(path), overrides)
    if not options.topology:
        return process.fail("--topology is missing: cpu:8, v5e:16x16, v5p:8x8x4, ...")
    if not re.fullmatch(rf"(cpu|{'|'.join(GPUS)}):[1-9]\d*|({'|'.join(GPUS)}|v\w+):\d+(x\d+)+", options.topology):
        return process.fail(
            f"--topology={options.topology}: must be like cpu:8, v5e:16x16, v5p:8x8x4, h100:8 or a100:4x8"
        )
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


def described(topology: str) -> list:
    """Devices of a topology that is described, not present. UsageError if it cannot be."""
    kind, _, size = topology.partition(":")
    flags = os.environ.get("XLA_FLAGS", "")
    if kind == "cpu":
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={size}".strip()
    elif kind in GPUS:
        # Kernels cannot be timed on a device that is not here.
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    else:
        # Without these the library asks the cloud which host it is on.
        os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        if len(jax.devices()) < int(size):
            raise command.UsageError(f"--topology={topology}: this process has only {len(jax.devices())} devices")
        return jax.devices()[: int(size)]
    from jax.experimental import topologies

    if kind in GPUS:
        hosts, _, each = size.rpartition("x")
        asked = {"platform": "cuda", "topology": f"1x{hosts or 1}x{each}", "target_config": GPUS[kind]}
    else:
        asked = {"platform": "tpu", "topology_name": topology}
    try:
        if kind in GPUS:  # without cuDNN no step of theirs can be traced
            tiny = jax.ShapeDtypeStruct((1, 64, 1, 64), "bfloat16")
            jax.eval_shape(partial(jax.nn.dot_product_attention, implementation="cudnn"), tiny, tiny, tiny)
        return list(topologies.get_topology_desc(**asked).devices)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        needs = "GPU topologies need steppe[gpu]" if kind in GPUS else "TPU topologies need steppe[plan]"
        raise command.UsageError(f"--topology={topology}: {reason} ({needs}: pip install it)") from None


class DoesNotFit(command.UsageError):
    """A step that needs more memory than its devices have; its message is the compiler's."""


def compiled_step(config, vocabulary_size: int, epoch_tokens: int, devices: list):
    """(lm.assembly.Parts, the compiled training step) for these devices. Raises DoesNotFit."""
    import jax
    import jax.numpy as jnp

    from steppe.lm.model.mesh import batch_sharding
    from steppe.lm.parts.assembly import assemble
    from steppe.lm.parts.step import lower_step

    frequency = jnp.full(vocabulary_size, 1 / vocabulary_size)
    parts = assemble(config, vocabulary_size, epoch_tokens, frequency, devices)
    size = (config.train.batch_size, config.data.sequence_length)
    names = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if config.data.packing == "bestfit":
        names |= {"segments": jnp.int32, "positions": jnp.int32}
    sharding = batch_sharding(parts.mesh)
    batch = {name: jax.ShapeDtypeStruct(size, dtype, sharding=sharding) for name, dtype in names.items()}
    lowered = lower_step(parts, batch)
    try:
        return parts, lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        status, _, why = str(error).splitlines()[0].partition(": ")
        if status != "RESOURCE_EXHAUSTED":
            raise
        raise DoesNotFit(why) from None


def plan(config, parts, program, devices: list) -> Plan:
    """The Plan of a compiled step."""
    import jax

    from steppe.lm.model import hlo
    from steppe.lm.parts.budget import roofline
    from steppe.lm.parts.chips import chip_of, network_of
    from steppe.optim.methods import is_anchored

    def local(tree):
        leaves = jax.tree.leaves(tree)
        return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)

    shape, anchor = parts.shape, 0
    shards = parts.mesh.shape["data"] * parts.mesh.shape["fsdp"]
    rows = config.train.batch_size // shards
    small = 2 if shape.dtype == "bfloat16" else 4
    hidden = rows * shape.sequence_length * shape.width * small
    if is_anchored(config.optim.method):
        anchor = hidden
        if parts.options.keep:
            anchor = rows * shape.sequence_length * shape.vocabulary * 2 // parts.mesh.shape["tensor"]
    memory = program.memory_analysis()
    parameters, optimizer = local(parts.abstract.params), local(tuple(parts.abstract)[2:])
    found = hlo.collectives(program.as_text())
    chip = chip_of(devices[0], len(devices))
    network = network_of(devices, chip)
    activations, sent = shape.layers * hidden * 8, sum(c.bytes for c in found)
    estimate = roofline(
        parts.budget.flops / len(devices), parameters, activations, sent, chip, network.bandwidth,
        passes=parts.budget.flops / parts.budget.adamw_flops,
    )  # fmt: skip
    useful = parts.budget.flops / len(devices) / chip.flops
    tokens = config.train.batch_size * shape.sequence_length // len(devices)
    grows = parts.mesh.shape["tensor"] > 1
    return Plan(
        parameters, optimizer, anchor, max(0, memory.temp_size_in_bytes - anchor),
        max(0, memory.argument_size_in_bytes - parameters - optimizer), found, estimate,
        (useful / estimate[0], useful / estimate[1]), network.name, tokens,
        math.nan if grows else tokens * sent / network.bandwidth / useful,
    )  # fmt: skip


def show(config, vocabulary_size: int, epoch_tokens: int, devices: list) -> bool:
    """Compiles, prints the plan, and returns whether it fits."""
    from steppe.lm.model.mesh import AXES
    from steppe.lm.parts.budget import describe
    from steppe.lm.parts.check import mesh_shape
    from steppe.lm.parts.chips import chip_of

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
    total = found.parameters + found.optimizer + found.anchor + found.temporary + found.batch
    fits = total <= chip.memory
    print(f"memory      {_gib(total)} of {_gib(chip.memory)} on each device: {'fits' if fits else 'does not fit'}")
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


def table(sizes: Sequence[str], methods: Sequence[str]) -> int:
    """Prints one line per size and method, Chinchilla budgets; returns the exit status."""
    from steppe.configs.sizes import resolve
    from steppe.lm.parts.chips import chip_of

    print("| size | method | machine | tokens a step | GiB a device | parameters + optimizer | anchor | temporary "
          "| FLOPs / adamw | sent, GiB | step s | MFU | days |")  # fmt: skip
    print("|" + "---|" * 13)
    for size in sizes:
        topology, batch, length, vocabulary, fsdp, dtype = TABLE[size]
        devices = described(topology)
        for method in methods:
            config = base.get_config()
            config.model.size, config.model.compute_dtype, config.optim.method = size, dtype, method
            resolve(config)
            config.data.sequence_length, config.train.batch_size = length, batch
            config.train.duration, config.mesh.data, config.mesh.fsdp = "chinchilla", 1, fsdp
            try:
                parts, program = compiled_step(config, vocabulary, 10**9, devices)
            except DoesNotFit as error:
                print(f"| {size} | {method} | {topology} | does not fit: {error} |" + " |" * 9, flush=True)
                continue
            p, gib = plan(config, parts, program, devices), 2**30
            total = p.parameters + p.optimizer + p.anchor + p.temporary + p.batch
            fits = "" if total <= chip_of(devices[0], len(devices)).memory else " (does not fit)"
            days = [seconds * parts.budget.steps / 86400 for seconds in p.seconds]
            cells = [
                size, method, topology, f"{batch * length:,}", f"{total / gib:.2f}{fits}",
                f"{(p.parameters + p.optimizer) / gib:.3f}", f"{p.anchor / gib:.3f}", f"{p.temporary / gib:.3f}",
                f"{parts.budget.flops / parts.budget.adamw_flops:.2f}",
                f"{sum(c.bytes for c in p.collectives) / gib:.2f}", f"{p.seconds[0]:.3g} to {p.seconds[1]:.3g}",
                f"{p.mfu[0]:.0%} to {p.mfu[1]:.0%}", f"{days[0]:.2g} to {days[1]:.2g}",
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


def _gib(size: float) -> str:
    return f"{size / 2**30:8.2f} GiB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
