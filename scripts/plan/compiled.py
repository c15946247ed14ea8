"""A run's real step, compiled for hardware that this machine may lack: its memory, traffic and seconds."""

import math
import os
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from steppe.configs import base, sizes
from steppe.configs.keys import config_of
from steppe.lm.parts.chips import chip_of, network_of
from steppe.lm.track.waiting import compiling
from steppe.scripts import command, process

# What XLA's compiler asks about a GPU, from its maker's data sheets: the text of a GpuTargetConfigProto.
_GPU = (
    "gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536 "
    "registers_per_block_limit: 65536 shared_memory_per_block: 49152 cuda_compute_capability {{ major: {} }} "
    "core_count: {} fpus_per_core: {} clock_rate_ghz: {} shared_memory_per_core: {} "
    "shared_memory_per_block_optin: {} l2_cache_size: {} memory_bandwidth: {} device_memory_size: 85000000000 }} "
    'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{}"'
)
GPUS = {
    "h100": _GPU.format(9, 132, 128, 1.98, 233472, 232448, 52428800, 3350000000000, "NVIDIA H100 80GB HBM3"),
    "a100": _GPU.format(8, 108, 64, 1.41, 167936, 166912, 41943040, 2039000000000, "NVIDIA A100-SXM4-80GB"),
}


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

    @property
    def memory(self) -> int:
        """Bytes of a device in all."""
        return self.parameters + self.optimizer + self.anchor + self.temporary + self.batch


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


def setting(values: Mapping[str, Any]) -> ConfigDict:
    """The base config with these values of keys, "model.size" among them."""
    return sizes.resolve(config_of(base.keys(), values))


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
        optimizer = " on ".join(dict.fromkeys((config.optim.method, config.optim.base)))
        with compiling(f"the training step of {optimizer}", process.warn):
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
    from steppe.optim.methods import second_of

    def local(tree):
        leaves = jax.tree.leaves(tree)
        return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)

    shape, anchor = parts.shape, 0
    shards = parts.mesh.shape["data"] * parts.mesh.shape["fsdp"]
    rows = config.train.batch_size // shards
    small = 2 if shape.dtype == "bfloat16" else 4
    hidden = rows * shape.sequence_length * shape.width * small
    if second_of(config.optim.method).anchored:
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
