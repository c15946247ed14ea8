"""Bytes that a device sends in a training step, by kind and method, next to the least for sharded parameters.

    steppe bench collectives [--topology v5e:8x8 h100:8x8] [--size=118m] [--methods adamw sam ...] [--sources]

Compiles the step for hardware you do not have (pip install '.[plan]' for TPUs, '.[gpu]' for GPUs), with parameters and
state sharded over all devices (fsdp). The least: each pass gathers every sharded parameter twice, for its forward and
its backward part, and sends each gradient once to its shard, all in the compute dtype. --sources lists the operations
that send most.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from steppe.lm.model import hlo
from steppe.scripts import command
from steppe.scripts.plan import compiled as plan

METHODS = ("adamw", "sam", "functional_sam", "precond_functional_sam", "msam", "functional_msam")
GIB = 2**30


def main(argv: Sequence[str]) -> int:
    """Prints a table for each topology; returns the exit status."""
    parser = command.parser("bench collectives", __doc__, config=False)
    add = parser.add_argument
    add("--topology", nargs="+", default=["v5e:8x8", "h100:8x8"], metavar="KIND:SIZE", help="as for steppe plan")
    add("--size", default="118m", type=command.of_key("model.size"), help="model size")
    method = command.of_key("optim.method")
    add("--methods", nargs="+", default=list(METHODS), type=method, help="default: one of each kind")
    add("--batch_size", type=command.integer(1), default=512, help="sequences, 512 tokens")
    add("--sources", action="store_true", help="list the operations that send most bytes")
    options = command.options_of(argv, parser)
    for topology in options.topology:
        devices = plan.described(topology)
        tokens = f"{options.batch_size} x 512 tokens"
        print(f"\n{options.size} on {len(devices)} devices of {topology}, fsdp, bfloat16, {tokens}")
        print("| method | gathered GiB | least | scattered GiB | least | reduced GiB | other GiB | all / least |")
        print("|---|---|---|---|---|---|---|---|")
        for method in options.methods:
            values = {"model.size": options.size, "model.compute_dtype": "bfloat16", "optim.method": method}
            values |= {"data.sequence_length": 512, "train.batch_size": options.batch_size, "mesh.data": 1}
            config = plan.setting(values | {"train.duration": "1000 steps", "mesh.fsdp": len(devices)})
            parts, program = plan.compiled_step(config, 32100, 10**9, devices)
            found = hlo.collectives(program.as_text() or "")
            print(_row(method, found, least(method, parts)), flush=True)
            if options.sources:
                for each in sorted(found, key=lambda one: -one.bytes)[:12]:
                    sent, shape = f"{each.bytes / GIB:8.4f} GiB  {each.kind:<16} x{each.times:<4}", each.shape[:60]
                    print(f"    {sent} {shape:<60} {each.source[-70:]}")
    return 0


def least(method: str, parts: Any) -> tuple[float, float]:
    """Bytes that one device must send in a step: (gathered parameters, gradients scattered to their shards)."""
    import jax

    from steppe.optim.methods import cost

    width, shards, passes = 2 if parts.shape.dtype == "bfloat16" else 4, parts.mesh.shape["fsdp"], cost(method)
    sharded = [s for s in jax.tree.leaves(parts.abstract.params) if s.sharding.shard_shape(s.shape) != s.shape]
    sent = sum(math.prod(leaf.shape) for leaf in sharded) * width * ((shards - 1) / shards)
    return (passes.forwards + passes.backwards) * sent, passes.backwards * sent


def _row(method: str, found: list[hlo.Collective], needed: tuple[float, float]) -> str:
    sent: dict[str, float] = defaultdict(float)
    for each in found:
        sent[each.kind] += each.bytes
    ratio = sum(sent.values()) / sum(needed)
    gathered, scattered, reduced = (sent.pop(kind, 0) for kind in ("all-gather", "reduce-scatter", "all-reduce"))
    numbers = gathered, needed[0], scattered, needed[1], reduced, sum(sent.values())
    return f"| {method} | {' | '.join(f'{number / GIB:.3f}' for number in numbers)} | {ratio:.2f} |"
