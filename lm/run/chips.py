"""What one accelerator can do, by the kind JAX reports, and how much memory a device has."""

import os
from typing import NamedTuple


class Chip(NamedTuple):
    """One device. memory: bytes a program may use; flops: dense bfloat16 peak, 1/s; bandwidth: of its memory, bytes/s;
    link: bytes/s a ring collective moves through it along one axis of the network, both directions."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float


# Makers' published figures; TPU links are per torus axis (v5e: 2 x 45 GB/s), GPU links NVLink within one host. TPU v5e
# memory is what its compiler allows, 15.75 GiB.
CHIPS = {
    "TPU v4": Chip("v4", 31.25 * 2**30, 275e12, 1.228e12, 0.9e11),
    "TPU v5 lite": Chip("v5e", 15.75 * 2**30, 197e12, 0.819e12, 0.9e11),
    "TPU v5": Chip("v5p", 95.74 * 2**30, 459e12, 2.765e12, 1.8e11),
    "TPU v6 lite": Chip("v6e", 31.25 * 2**30, 918e12, 1.640e12, 1.8e11),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 79e9, 312e12, 2.039e12, 3.0e11),
    "NVIDIA H100 80GB HBM3": Chip("H100", 79e9, 989e12, 3.35e12, 4.5e11),
    "NVIDIA H200": Chip("H200", 139e9, 989e12, 4.8e12, 4.5e11),
}


def peak_flops(mesh) -> float:
    """FLOP/s of all devices of a mesh together, in bfloat16; 0 where a device's are not known, as a CPU's."""
    device = mesh.devices.flat[0]
    return CHIPS[device.device_kind].flops * mesh.size if device.device_kind in CHIPS else 0.0


def chip_of(device, devices_here: int = 1) -> Chip:
    """The Chip of a JAX device, also of one that is only described. Unknown kinds get what the device itself reports.

    A CPU device gets its share of the host's memory, among `devices_here`; its speeds are those of one measured
    two-core machine, so that a plan for it has a number at all.
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
