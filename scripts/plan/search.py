"""Which remat policy, mesh and number of microbatches fit: ranked by an estimate, decided by the compiler."""

import itertools
from collections.abc import Callable

from steppe.configs.keys import ConfigError
from steppe.lm.model.mesh import AXES
from steppe.lm.parts.budget import fixed_memory, step_traffic
from steppe.lm.parts.check import check
from steppe.lm.parts.chips import chip_of, network_of

TRIES = 4  # settings that are compiled for each number of microbatches


def candidates(config, vocabulary_size: int, devices: list) -> list[tuple[float, str, tuple]]:
    """[(seconds by estimate, remat, mesh)] of everything that should fit, cheapest first."""
    chip, count, found = chip_of(devices[0], len(devices)), len(devices), []
    link = network_of(devices, chip).bandwidth
    processes = len({device.process_index for device in devices})
    remats = ("none", "dots", "full") if chip.name == "cpu" else ("none", "dots", "offload", "full")
    sizes = [size for size in (2**n for n in range(count.bit_length())) if count % size == 0]
    for remat, fsdp, tensor in itertools.product(remats, sizes, sizes):
        if count % (fsdp * tensor) or tensor > 16:
            continue
        config.model.remat, mesh = remat, (count // fsdp // tensor, fsdp, tensor)
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
        try:
            check(config, device_count=count, process_count=processes, backend=devices[0].platform)
        except ConfigError:
            continue
        seconds, memory = step_traffic(config, vocabulary_size, mesh, chip, link)
        if memory < chip.memory:
            found.append((seconds, remat, mesh))
    return sorted(found)


def search(config, vocabulary_size: int, epoch_tokens: int, devices: list, show: Callable[..., bool]) -> int:
    """Compiles the cheapest candidates in turn until one fits, with more microbatches where none does.

    show(config, vocabulary_size, epoch_tokens, devices): compiles, prints, and returns whether it fits. Prints the
    flags that fit, or what is the least that is missing; returns the exit status.
    """
    begun, batch = config.train.microbatches, config.train.batch_size
    doubles = itertools.takewhile(lambda n: batch % n == 0, (begun * 2**power for power in itertools.count(1)))
    for microbatches in (begun, *doubles):
        config.train.microbatches = microbatches
        found = candidates(config, vocabulary_size, devices)
        said = f" with {microbatches} microbatches" if microbatches > begun else ""
        print(f"search      {len(found)} combinations of remat and mesh should fit{said}", flush=True)
        for _, remat, mesh in found[:TRIES]:
            config.model.remat = remat
            config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
            if show(config, vocabulary_size, epoch_tokens, devices):
                flags = {"model.remat": remat, **{f"mesh.{axis}": size for axis, size in zip(AXES, mesh, strict=True)}}
                flags |= {"train.microbatches": microbatches} if microbatches > begun else {}
                print("use it with " + " ".join(f"--config.{key}={value}" for key, value in flags.items()))
                return 0
    print(f"search      nothing fits these devices, whatever the batch: {_missing(config, vocabulary_size, devices)}")
    return 1


def _missing(config, vocabulary_size: int, devices: list) -> str:
    """By estimate, how many of these devices hold what no batch size changes."""
    needed, count = fixed_memory(config, vocabulary_size), len(devices)
    each = chip_of(devices[0], count).memory
    while count * each < needed:
        count *= 2
    sizes = f"{needed / 2**30:,.3g} GiB, a device has {each / 2**30:,.3g}"
    remedy = f"use {max(count, 2 * len(devices))} or more devices, or a smaller config.model.size"
    return f"parameters, optimizer state and gradients alone take {sizes}; {remedy}"
