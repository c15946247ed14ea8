"""Speed and memory of accelerators, by the device kind that JAX reports."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Chip(NamedTuple):
    """One device as JAX counts devices.

    memory: bytes a program may use; flops: dense bfloat16 peak, FLOP/s; bandwidth: of its memory, bytes/s; link:
    bytes/s of a ring collective through it (TPU: along one torus axis in both directions); hosts: bytes/s to another
    host (GPU) or slice (TPU); closes: devices at which a torus axis becomes a ring, 0 without a torus.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    hosts: float = 0.0
    closes: int = 0


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. A program gets nine tenths of a link's rate
# (jax-ml.github.io/scaling-book/tpus). v5e memory is the 15.75 GiB its compiler allows. A TPU7x chip is two devices.
# GPUs: NVIDIA's data sheets, without sparsity; NVLink in one direction, else PCIe. To other hosts: a DGX's network
# adapters, one per GPU, of 400 Gb/s (A100: 200 Gb/s); PCIe cards are assumed to have 100 Gb/s each.
CHIPS = {
    "TPU v4": Chip("v4", 31.25 * 2**30, 275e12, 1.228e12, 0.9e11, 6.25e9, 4),
    "TPU v5 lite": Chip("v5e", 15.75 * 2**30, 197e12, 0.819e12, 0.9e11, 3.125e9, 16),
    "TPU v5": Chip("v5p", 95.74 * 2**30, 459e12, 2.765e12, 1.8e11, 6.25e9, 4),
    "TPU v6 lite": Chip("v6e", 31.25 * 2**30, 918e12, 1.640e12, 1.8e11, 12.5e9, 16),
    "TPU7x": Chip("TPU7x", 94.75 * 2**30, 1153e12, 3.690e12, 0.9e11, 6.25e9, 4),
    "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 39e9, 312e12, 1.555e12, 3.0e11, 25e9),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 79e9, 312e12, 2.039e12, 3.0e11, 25e9),
    "NVIDIA H100 80GB HBM3": Chip("H100", 79e9, 989e12, 3.35e12, 4.5e11, 50e9),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 79e9, 756e12, 2.0e12, 0.64e11, 12.5e9),
    "NVIDIA H100 NVL": Chip("H100 NVL", 93e9, 835e12, 3.9e12, 0.64e11, 12.5e9),
    "NVIDIA H200": Chip("H200", 139e9, 989e12, 4.8e12, 4.5e11, 50e9),
    "NVIDIA B200": Chip("B200", 178e9, 2250e12, 7.7e12, 9.0e11, 50e9),
    "NVIDIA L40S": Chip("L40S", 47e9, 362e12, 0.864e12, 0.32e11, 12.5e9),
}


class Network(NamedTuple):
    """How devices are connected. bandwidth: bytes/s of a ring collective over all of them, through each."""

    bandwidth: float
    name: str


def network_of(devices: Sequence, chip: Chip) -> Network:
    """The Network of devices, real or described.

    On a TPU slice the step's collectives use one torus axis after the other, so the slowest one counts. An axis too
    short to close is a line, on which a ring goes back and has half the bandwidth. Between hosts or slices, a ring
    uses all network adapters of each.
    """
    if devices[0].platform == "cpu":
        return Network(chip.link, "memory of one host")
    apart = "slice_index" if devices[0].platform == "tpu" else "process_index"
    groups = Counter(getattr(device, apart, 0) for device in devices)
    name, within = f"links of one host, {chip.link / 1e9:.0f} GB/s", chip.link
    if devices[0].platform == "tpu":
        sizes = [len(set(places)) for places in zip(*(device.coords for device in devices), strict=True)]
        axes = [size for size in sizes if size > 1] or [1]
        closed = [chip.closes and size % chip.closes == 0 for size in axes]
        within = min(chip.link if ring else chip.link / 2 for ring in closed)
        kinds = ", ".join(f"{size} in a {'ring' if ring else 'line'}" for size, ring in zip(axes, closed, strict=True))
        name = f"torus ({kinds}), {within / 1e9:.0f} GB/s along an axis"
    between = chip.hosts * min(groups.values())
    if len(groups) == 1 or not between:
        return Network(within, name)
    what = "slices" if devices[0].platform == "tpu" else "hosts"
    return Network(min(within, between), f"{name}; {len(groups)} {what}, {between / 1e9:.0f} GB/s between them")


def peak_flops(mesh) -> float:
    """bfloat16 FLOP/s of all devices of a mesh; 0 if unknown, as for a CPU."""
    device = mesh.devices.flat[0]
    return CHIPS[device.device_kind].flops * mesh.size if device.device_kind in CHIPS else 0.0


def chip_of(device, devices_here: int = 1) -> Chip:
    """The Chip of a JAX device, real or described. Unknown kinds get the memory that the device reports.

    A CPU device gets its share of the host's memory, one of `devices_here`. Its speeds were measured on one two-core
    machine, so that a plan for CPUs has figures at all.
    """
    if device.platform == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Chip("cpu", total / devices_here, 89e9 / devices_here, 10e9 / devices_here, 5e9 / devices_here)
    known = CHIPS.get(device.device_kind) or Chip(device.device_kind, 0.0, 1e14, 1e12, 1e11)
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    except Exception:  # a described device has no statistics
        limit = 0
    return known._replace(memory=limit or known.memory)
