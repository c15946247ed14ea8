"""Runs programs on several CPU devices: one at a time, and only those whose collectives XLA keeps in order.

On other devices a program is unchanged. `hlo.unordered` explains the fault. The same transport, gloo, has two more:
psum_scatter returns wrong values from jax 0.12 on (jax#40830), and it gives up after 30 seconds (jax#40831).
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from steppe.configs.keys import ConfigError
from steppe.lm.model import hlo


def several_cpus(mesh: Mesh) -> bool:
    """Whether XLA's CPU runtime exchanges data between devices of this mesh."""
    return mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"


def ordered(compiled: jax.stages.Compiled, mesh: Mesh, name: str) -> Callable:
    """A compiled program as a function. On several CPU devices it returns once all have finished.

    Two concurrent executions would block the runtime's few threads in collectives. Raises ConfigError for a program in
    which a collective may overtake another: gloo matches them by order alone, and devices of one process may wait for
    each other forever. name: of the program, for the message.
    """
    if not several_cpus(mesh):
        return compiled
    if found := hlo.unordered(compiled.as_text() or ""):
        flow, collective = found[0]
        sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        why = f"{collective} may overtake the collectives in {flow}; {len(found)} such pairs"
        raise ConfigError("mesh", sizes, f"a mesh on which CPUs keep the collectives of the {name} in order ({why})")
    # gloo gives up if a process is 30 seconds late for a group's first collective, and compile times differ.
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{name} is compiled")
    return lambda *arguments: jax.block_until_ready(compiled(*arguments))


def jitted(function: Callable, mesh: Mesh, name: str, **options: Any) -> Any:
    """jax.jit(function, **options), made safe by `ordered`. It compiles per argument types and has jit's `trace`."""
    once = jax.jit(function, **options)
    if not several_cpus(mesh):
        return once
    programs: dict[tuple, Callable] = {}

    def run(*arguments):
        leaves, structure = jax.tree.flatten(arguments)
        key = (structure, *((jax.typeof(leaf), getattr(leaf, "sharding", None)) for leaf in leaves))
        if key not in programs:
            programs[key] = ordered(once.lower(*arguments).compile(), mesh, name)
        return programs[key](*arguments)

    made: Any = wraps(once)(run)
    made.trace = once.trace
    return made
