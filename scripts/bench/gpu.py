"""Benchmark a GPU in under eight minutes: kernels, training steps, a profile, and PyTorch for comparison.

    steppe bench gpu [--sizes 118m 1.2b] [--methods adamw sam functional_sam:keep ...] [--seconds=6]

Steps are compiled for one GPU, with bfloat16 compute and float32 weights. MFU divides the model's FLOPs, as `steppe
plan` counts them, by the chip's dense bfloat16 peak. The PyTorch steps use torch.compile and the same shapes (see
against/torch_step.py); they run in their own process before jax takes the memory. --anywhere runs everything without a
GPU, slowly, to test the command.
"""

import argparse
import glob
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, cast

from steppe.configs import keys, sizes
from steppe.scripts import command, process
from steppe.scripts.bench import turns

METHODS = (
    *("adamw", "sam", "functional_sam:rebuild", "functional_sam:keep", "precond_functional_sam:keep", "msam"),
    "functional_msam",
)
SEQUENCES = {"118m": 32, "1.2b": 16}  # of 1,024 tokens, a step; other sizes: 64


def main(argv: Sequence[str]) -> int:
    """Prints tables in Markdown; returns the exit status."""
    parser = command.parser("bench gpu", __doc__, config=False)
    add = parser.add_argument
    add("--sizes", nargs="+", default=["118m", "1.2b"], choices=list(sizes.SIZES), help="sizes of configs/sizes.py")
    add("--methods", nargs="+", default=list(METHODS), type=turns.method, help="METHOD or METHOD:keep|rebuild")
    add("--seconds", type=keys.number(above=0), default=6.0, metavar="S", help="seconds per measurement (default 6)")
    add("--batch_size", type=command.integer(1), help="sequences a step; default: by size")
    add("--sequence_length", type=command.integer(1), default=1024, help="tokens of a sequence")
    add("--remat", default="dots", type=command.of_key("model.remat"), help="config.model.remat")
    add("--anywhere", action="store_true", help="also run without a GPU")
    parser.set_defaults(vocabulary_size=32_128)
    options = command.options_of(argv, parser)
    import jax

    if not options.anywhere and _apart(jax.default_backend) != "gpu":
        return process.fail(
            "steppe bench gpu: needs a GPU that jax can use (pip install '.[gpu]'); --anywhere runs it here"
        )
    began = time.monotonic()
    sequences = {size: options.batch_size or SEQUENCES.get(size, 64) for size in options.sizes}
    own = {size: argparse.Namespace(**{**vars(options), "batch_size": n}) for size, n in sequences.items()}
    by_torch = {size: _torch(size, own[size]) for size in options.sizes}
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, bfloat16, remat {options.remat}")
    _print_kernels(options)
    for size in options.sizes:
        _print_steps(size, by_torch[size], own[size])
    _print_quickstart()
    print(f"\nthe benchmark took {time.monotonic() - began:.0f} s")
    return 0


def _apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in another process, which gives the GPU's memory back when it ends."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _print_kernels(options: Any) -> None:
    """Compares every available kernel with einsum in float32: norm of the difference over norm."""
    import jax
    import jax.numpy as jnp

    from steppe.lm.model import attention

    def of(kernel, dtype, arrays):
        def total(query, key, value):
            return jnp.sum(jnp.sin(attention.attention(query, key, value, None, kernel).astype(jnp.float32)))

        value, gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*(a.astype(dtype) for a in arrays))
        return [jnp.asarray(leaf, jnp.float32) for leaf in (value, *gradient)]

    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (2, options.sequence_length, 8, 64)) for key in keys]
    exact = of("einsum", jnp.float32, arrays)
    print("\n| attention kernel | dtype | total | query's gradient | key's | value's |\n|---|---|---|---|---|---|")
    for kernel in attention.KERNELS:
        for dtype in ("float32", "bfloat16"):
            try:
                name = attention.choose(kernel, jax.default_backend(), options.sequence_length, dtype, segmented=False)
            except attention.NoKernel as reason:
                print(f"| {kernel} | {dtype} | {reason} | | | |")
                continue
            found = of(name, dtype, arrays)
            apart = [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(found, exact, strict=True)]
            label = f"{kernel} ({name})" if name != kernel else kernel
            print(f"| {label} | {dtype} | {' | '.join(f'{one:.1e}' for one in apart)} |", flush=True)


def _print_steps(size: str, by_torch: dict[str, Any], options: Any) -> None:
    """Prints one table of Steppe's steps and of the PyTorch steps, which were measured before."""
    import jax

    from steppe.lm.parts.chips import peak_flops
    from steppe.lm.parts.state import create
    from steppe.lm.parts.step import with_scalars
    from steppe.scripts.plan.compiled import compiled_step

    sequences, length = options.batch_size, options.sequence_length
    print(f"\n{size}: {sequences} x {length} tokens a step, {options.seconds:g} s each\n")
    print("| step | tokens/s | time / adamw | FLOPs / adamw | MFU | GiB | compile s |\n|---|---|---|---|---|---|---|")
    first, trace = (math.nan, math.nan, None), []

    def line(name: str, spent: float, flops: float, used: float, compiling: str = "") -> None:
        base, adamw_flops, peak = first
        mfu = f"{flops / spent / peak:.1%}" if peak else "?"
        cells = [name, f"{sequences * length / spent:,.0f}", f"{spent / base:.2f}", f"{flops / adamw_flops:.2f}", mfu]
        print(f"| {' | '.join(cells)} | {used / 2**30:.1f} | {compiling} |", flush=True)

    for method in options.methods:
        config, since = turns.config_of(size, options, method), time.monotonic()
        config.model.compute_dtype = "bfloat16"
        parts, program = compiled_step(config, options.vocabulary_size, 10**9, jax.devices()[:1])
        compiling, memory = f"{time.monotonic() - since:.0f}", cast(Any, program.memory_analysis())
        run, batch = with_scalars(program, parts), turns.batch_of(options)
        step = lambda state, run=run, batch=batch: run(state, batch, math.inf)[0]  # noqa: E731
        state = create(parts.mesh, parts.initialise)
        spent, state = turns.repeat(step, state, options.seconds, jax.block_until_ready)
        if method == options.methods[0]:
            first, trace = (spent, parts.budget.adamw_flops, peak_flops(parts.mesh)), _trace(step, state)
        line(method, spent, parts.budget.flops, memory.temp_size_in_bytes + memory.argument_size_in_bytes, compiling)
        del state  # before the next method takes as much
    for name, (spent, used) in by_torch.get("steps", {}).items():
        line(name, spent, first[1] * (2 if "SAM" in name else 1), used)
    if "error" in by_torch:
        print(f"\nno torch step: {by_torch['error']}")
    print(f"\nmost expensive operations of {options.methods[0]}, ms of a step:")
    for name, spent in trace:
        print(f"  {spent:8.3f}  {name[:100]}")


def _trace(step: Callable[[Any], Any], state: Any, steps: int = 5, most: int = 12) -> list[tuple[str, Any]]:
    """(operation, ms of a step) of the `most` most expensive operations on the device, or in a CPU's threads."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                state = step(state)
            jax.block_until_ready(state)
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        spent: Counter[str] = Counter()
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            for line in plane.lines:
                if ("GPU" in plane.name and "Stream" in line.name) or "XLAEigen" in line.name:
                    for event in line.events:
                        spent[event.name] += event.duration_ns / 1e6 / steps
        return spent.most_common(most)


def _torch(size: str, options: Any) -> dict[str, Any]:
    """{"steps": {name: (seconds, bytes)}} of PyTorch, or {"error": why there are none}."""
    try:
        return {"steps": _apart(_torch_steps, size, options)}
    except Exception as error:  # torch may be missing, or run out of memory
        return {"error": f"{type(error).__name__}: {error}".splitlines()[-1]}


def _torch_steps(size: str, options: Any) -> dict[str, tuple[float, float]]:
    from steppe.scripts.bench.against.torch_step import measure

    shape, kinds = turns.shape_of(size, options), {"torch.compile adamw": False, "torch.compile SAM": True}
    return {name: measure(shape, options.batch_size, sam, options.seconds) for name, sam in kinds.items()}


def _print_quickstart() -> None:
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-P", "-m", "steppe.scripts.train", "--config=quickstart", f"--workdir={folder}/run"]
        began = time.monotonic()
        done = subprocess.run(
            [*line, "--config.train.duration=300 steps", "--config.sample.tokens=0"], capture_output=True, text=True
        )
        said = [text for text in done.stdout.splitlines() if text.startswith(("goodput", "result"))]
        print(f"\nquickstart, 300 steps: {time.monotonic() - began:.1f} s, exit status {done.returncode}")
        print("\n".join(said or done.stderr.splitlines()[-1:]))
