"""The cost of a sweep before it starts: budgets of its runs, their estimated time on this machine, a table of both."""

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from steppe.data.errors import DataError
from steppe.lm.keep.exits import STATUSES
from steppe.lm.track import lines
from steppe.lm.track.waiting import clock_face, columns
from steppe.scripts import results

ASSUMED_STARTUP = 12.0  # seconds of imports and compiling, unless measured
_PRODUCTS = 16  # pairs of products in one program
ASSUMED_SHARE = 0.35  # a step's FLOP/s over those of bare matrix products of the model's size


class Run(NamedTuple):
    """One run of a sweep. overrides: [(key, text)] for steppe train's command line. flat: its config, every key.

    parameters: non-embedding; steps, tokens, flops (of the method): of the whole run.
    """

    name: str
    directory: Path
    overrides: list[tuple[str, str]]
    config: ConfigDict
    flat: dict[str, Any]
    parameters: int = 0
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0

    @property
    def outcome(self) -> dict[str, Any]:
        """Its outcome.json; {} if it has not ended for good."""
        return results.read_json(self.directory / results.OUTCOME, results.Outcome)


class Speed(NamedTuple):
    """Speed of runs: rate(run) -> FLOP/s, seconds to start one, and the source of both figures."""

    rate: Callable[[Run], float]
    startup: float
    source: str

    def seconds(self, run: Run, share: float = 1.0) -> float:
        """Estimated seconds of a share of the run, including its start."""
        return self.startup + share * run.flops / self.rate(run)


def devices_of(options: Any) -> tuple[int, str | None]:
    """(devices of a run, their backend, None where it is not known here) by the flags of sweep.__main__.add_launch.

    Of this machine those that a run would see; this process does not take the accelerator.
    """
    if options.launcher != "local":
        return options.devices, None
    import jax

    platforms = os.environ.get("JAX_PLATFORMS", "")
    plugins = [name for name in ("jax_plugins", "libtpu") if importlib.util.find_spec(name)]
    if plugins and platforms != "cpu":
        probe = "import jax; print(jax.device_count(), jax.default_backend())"
        found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
        if found.returncode == 0:
            count, backend = found.stdout.split()[-2:]
            jax.config.update("jax_platforms", "cpu")
            return int(count), backend
    jax.config.update("jax_platforms", "cpu")
    return jax.device_count(), "cpu"


def at_a_time(options: Any, backend: str | None) -> int:
    """Runs side by side by the same flags; without --jobs one on a GPU, else one for each --cores."""
    return options.jobs or (1 if backend == "gpu" else max(1, len(usable_cores()) // options.cores))


def with_budgets(runs: Sequence[Run], log: Callable[[str], None]) -> list[Run]:
    """The runs with parameters, steps, tokens and FLOPs. DataError if a corpus that a budget needs cannot be read."""
    from steppe.data import cache
    from steppe.data.vocabulary import load_tokenizer
    from steppe.lm.model.transformer import shape
    from steppe.lm.parts.assembly import planned
    from steppe.lm.parts.state import parameter_shapes

    tokenizers = {name: load_tokenizer(name) for name in {run.config.data.vocabulary for run in runs}}
    corpora, found = {}, []

    def corpus_of(data: Any) -> Any:
        if (key := json.dumps(data.to_dict())) not in corpora:
            corpora[key] = cache.open_of(data, log)
        return corpora[key]

    for run in runs:
        config = run.config
        size = tokenizers[config.data.vocabulary].vocab_size
        shape_ = shape(config.model, size, config.data.sequence_length, "")
        padded = config.data.packing == "bestfit"  # only the corpus tells how many tokens a row has
        known = corpus_of(config.data) if padded or "epoch" in config.train.duration else None
        epoch, per_row = (known.epoch_tokens, known.tokens_per_row) if known else (0, None)
        made = planned(config, shape_, parameter_shapes(shape_), epoch, per_row)
        counts = {"steps": made.steps, "tokens": made.tokens, "flops": made.flops * made.steps}
        found.append(run._replace(parameters=made.parameters.non_embedding, **counts))
    return found


def speed(runs: Sequence[Run], outcomes: dict[str, dict], cores: int, backend: str | None) -> Speed:
    """The Speed of finished runs of the sweep; without any, of matrix products of each model's size, timed now.

    outcomes: {name: outcome.json}. cores: per run. backend: of the runs; only cpu is timed, others are unknown.
    """
    measured = {}
    for run in runs:
        outcome = outcomes.get(run.name, {})
        if outcome.get("status") == "finished" and outcome.get("train_seconds"):
            rate = outcome["flops"] / outcome["train_seconds"]
            measured.setdefault(run.parameters, []).append((rate, outcome["seconds"] - outcome["train_seconds"]))
    if measured:
        rates = {count: statistics.median(rate for rate, _ in found) for count, found in measured.items()}
        startup = statistics.median(seconds for found in measured.values() for _, seconds in found)

        def rate(run: Run) -> float:
            return rates[min(rates, key=lambda count: abs(count - run.parameters))]

        number = sum(map(len, measured.values()))
        shown = ", ".join(f"{rates[count] / 1e9:.2g}" for count in sorted(rates))
        source = f"{number} finished runs here ({shown} GFLOP/s, {startup:.0f} s to start)"
        return Speed(rate, max(0.0, startup), source)
    if backend != "cpu":
        return Speed(lambda run: math.nan, math.nan, "unknown until a run of this sweep has finished")
    timed = {run.flat["model.width"]: run for run in runs}
    rates = {width: ASSUMED_SHARE * _product_rate(run, cores) for width, run in timed.items()}
    shown = ", ".join(f"{rates[width] / 1e9:.2g}" for width in sorted(rates))
    source = f"assumed: {ASSUMED_SHARE:.0%} of bare matrix products of the models' sizes, timed now ({shown} GFLOP/s), "
    source += f"and {ASSUMED_STARTUP:.0f} s to start a run"
    return Speed(lambda run: rates[run.flat["model.width"]], ASSUMED_STARTUP, source)


def _product_rate(run: Run, cores: int) -> float:
    """FLOP/s of float32 matrix products of the size of the run's MLP on this CPU, many in one program as in a step."""
    import jax
    import jax.numpy as jnp

    rows = run.flat["train.batch_size"] // run.flat["train.microbatches"] * run.flat["data.sequence_length"]
    width, wide = run.flat["model.width"], run.flat["model.mlp_width"]
    products = jax.jit(lambda x, w: jax.lax.fori_loop(0, _PRODUCTS, lambda i, x: (x @ w) @ w.T, x))
    x, w = jnp.ones((rows, width)), jnp.full((width, wide), 1 / math.sqrt(width * wide))
    products(x, w).block_until_ready()
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + 0.1:
        products(x, w).block_until_ready()
        count += 2 * _PRODUCTS
    rate = 2.0 * rows * width * wide * count / (time.perf_counter() - began)
    return rate * min(1.0, cores / len(usable_cores()))


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def table(runs: Sequence[Run], statuses: dict[str, str], speed: Speed, jobs: int) -> str:
    """The plan as text: groups of runs that differ only in rho and seed, how many are done, and the remaining cost."""
    varying = [key for key in results.varying_keys([run.flat for run in runs]) if key not in ("seed", "optim.rho")]
    ahead = {run.name: 1 - progress(run.directory)[0] / run.steps for run in runs}  # share of the steps
    groups = {}
    for run in runs:
        values = [run.flat[key] for key in varying]
        shown = (", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values)
        groups.setdefault(tuple(shown), []).append(run)
    rows = [[*(key.removeprefix("model.").removeprefix("optim.") for key in varying), "rho", "seeds"]]
    rows[0] += ["runs", "done", "parameters", "steps", "tokens", "FLOPs", "time"]
    for key, members in groups.items():
        left = [run for run in members if statuses[run.name] == "unfinished"]
        rhos = sorted({run.flat["optim.rho"] for run in members} - {None})
        seeds = len({run.flat["seed"] for run in members})
        rows.append(
            [
                *key,
                "-" if not rhos else f"{rhos[0]:g}" if len(rhos) == 1 else f"{rhos[0]:g}..{rhos[-1]:g} ({len(rhos)})",
                str(seeds),
                str(len(members)),
                str(len(members) - len(left)),
                _range(f"{run.parameters:,}" for run in members),
                _range(f"{run.steps:,}" for run in members),
                f"{sum(run.tokens for run in members):,}",
                f"{sum(run.flops for run in members):.2g}",
                clock_face(sum(speed.seconds(run, ahead[run.name]) for run in left)),
            ]
        )
    left = [run for run in runs if statuses[run.name] == "unfinished"]
    time_left = makespan([speed.seconds(run, ahead[run.name]) for run in left], jobs)
    counts = {status: sum(statuses[run.name] == status for run in runs) for status in STATUSES}
    shown = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    text = [
        columns(rows),
        "",
        f"runs    {len(runs)} ({shown})",
        f"cost    {sum(run.tokens for run in runs):,} tokens, {sum(run.flops for run in runs):.3g} FLOPs; to do: "
        f"{sum(round(run.tokens * ahead[run.name]) for run in left):,} tokens, "
        f"{sum(run.flops * ahead[run.name] for run in left):.3g} FLOPs",
        f"time    {clock_face(time_left)} with {jobs} at a time ({speed.source})",
    ]
    return "\n".join(text)


def progress(directory: Path) -> tuple[int, float]:
    """(last recorded step, its training loss) of a run, from the end of metrics.jsonl; (0, nan) if none."""
    try:
        last = lines.latest(directory, ("train",)).get("train", {})
    except DataError:
        last = {}
    return last.get("step", 0), last.get("loss", math.nan)


def makespan(seconds: Sequence[float], jobs: int) -> float:
    """Seconds until `jobs` workers that take tasks in this order have finished all."""
    ends = [0.0] * jobs
    for each in seconds:
        ends.sort()
        ends[0] += each
    return max(ends)


def _range(texts) -> str:
    different = list(dict.fromkeys(texts))
    return different[0] if len(different) == 1 else f"{different[0]}..{different[-1]}"
