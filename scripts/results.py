"""What runs have left on disk, read for tables, figures and estimates. Imports no jax; holds no command.

    for result in results.read("sweeps/rho"): print(result.name, result.status, result.loss)

A sweep's directory holds `sweep.json` (what its runs are: steppe sweep writes it), `runs/NAME/`, each the ordinary
workdir of steppe train, and in each `outcome.json` once the run has ended for good.
"""

import json
import math
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from steppe.configs.base import FREE, with_defaults
from steppe.configs.keys import flatten
from steppe.lm.run import tracking
from steppe.scripts.command import UsageError

SWEEP, RUNS, OUTCOME = "sweep.json", "runs", "outcome.json"
STATUSES = ("finished", "diverged", "failed", "pruned", "unfinished")
# Keys that model.size sets: they vary with it and are not named beside it.
OF_SIZE = ("model.layers", "model.width", "model.heads", "model.mlp_width")


class ResultsError(UsageError):
    """A directory that holds no results, or damaged ones; one line."""


class Point(NamedTuple):
    """A loss on the way, nats a token, after `step` updates; seconds of training until then, FLOPs of the method."""

    step: int
    tokens: int
    flops: float
    seconds: float
    loss: float


class Result(NamedTuple):
    """One run. What is not known (yet) is NaN, 0 or empty.

    config: {"optim.rho": 0.03, ...}, every key. varied: those that differ between the runs read together.
    status: finished | diverged | failed | pruned | unfinished; why: its reason, "" for finished. A run that was to
    finish and whose loss is not finite, or above that of a unigram model, has diverged.
    parameters: non-embedding. steps, tokens, flops, adamw_flops: of the whole run as planned, the last two in FLOPs of
    the method and of plain AdamW. seconds: of training so far, without compiling, evaluating and saving.
    loss, bits_per_byte: after the last step, on the whole first held-out set (nats a token; bits). curve: held-out
    losses of that set on the way; train_curve: those of every training step. code: a hash of the sources that ran.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    varied: dict[str, Any]
    status: str
    why: str
    parameters: int
    total_parameters: int
    steps: int
    tokens: int
    flops: float
    adamw_flops: float
    seconds: float
    loss: float
    bits_per_byte: float
    curve: list[Point]
    train_curve: list[Point]
    code: str = ""


def read(runs: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Result]:
    """The runs of a sweep's directory, of one workdir, or of several workdirs. ResultsError where there are none."""
    if isinstance(runs, (str, os.PathLike)):
        found = _of_directory(Path(runs))
    else:
        found = [_of_workdir(str(directory), Path(directory), {}) for directory in runs]
    if not found:
        raise ResultsError(f"{runs}: must be the directory of a sweep, or workdirs of runs; there is no run in it")
    flats = [result.config for result in found]  # of workdirs that other versions wrote, perhaps with other keys
    varying = varying_keys(flats)
    varied = [{key: flat.get(key) for key in varying} for flat in flats]
    return [result._replace(varied=some) for result, some in zip(found, varied, strict=True)]


def read_json(path: Path) -> dict:
    """A JSON file that Steppe wrote; {} where there is none. ResultsError for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ResultsError(f"{path}: is damaged ({error})") from None


def varying_keys(configs: list[dict[str, Any]]) -> list[str]:
    """The keys in which flat configs differ, in their own order.

    Left out: log.*; a shape that model.size names; and keys that do not change what a run computes, unless nothing else
    tells some runs apart.
    """
    keys = list(dict.fromkeys(key for config in configs for key in config if not key.startswith("log.")))
    named = all(flat.get("model.size") for flat in configs)
    found = [
        key
        for key in keys
        if not (named and key in OF_SIZE) and len({json.dumps(flat.get(key)) for flat in configs}) > 1
    ]
    telling = [key for key in found if key not in FREE]

    def different(keys: list[str]) -> int:
        return len({json.dumps([flat.get(key) for key in keys]) for flat in configs})

    return telling if different(telling) == different(found) else found


def _of_directory(directory: Path) -> list[Result]:
    sweep = read_json(directory / SWEEP)
    if sweep:
        configs = {name: {**sweep["base"], **sweep["resolved"][name]} for name in sweep["runs"]}
        return [_of_workdir(name, directory / RUNS / name, config) for name, config in configs.items()]
    if (directory / "config.json").exists():
        return [_of_workdir(directory.name, directory, {})]
    return [_of_workdir(path.parent.name, path.parent, {}) for path in sorted(directory.glob("*/config.json"))]


def _of_workdir(name: str, directory: Path, planned: dict[str, Any]) -> Result:
    """The Result of one run, `varied` left empty; planned: its flat config if it has not begun."""
    config = flatten(read_json(directory / "config.json")) or planned
    config = config and with_defaults(config)
    if not config:
        raise ResultsError(f"{directory}: must be the workdir of a run, with a config.json")
    outcome = read_json(directory / OUTCOME)
    records = tracking.read(directory) if (directory / tracking.METRICS).exists() else []
    runs = [record for record in records if record["kind"] == "run"]
    about = runs[-1] if runs else {}
    steps, seconds = about.get("steps", 0), _seconds(records)
    seen = {record["step"]: record["tokens"] for record in records if record["kind"] == "train" and "tokens" in record}

    def point(record: dict) -> Point:
        step = record["step"]
        return Point(step, seen.get(step, 0), _flops(runs, step), seconds.get(step, 0.0), float(record["loss"]))

    evaluations = [record for record in records if record["kind"] == "evaluate"]
    first = evaluations[0]["name"] if evaluations else ""
    evaluations = [record for record in evaluations if record["name"] == first]
    last = evaluations[-1] if evaluations and steps and evaluations[-1]["step"] == steps else {}
    status, why = _status(outcome, records, last, _unigram(about, first))
    parameters = about.get("parameters", {})
    return Result(
        name=name,
        directory=directory,
        config=config,
        varied={},
        status=status,
        why=why,
        parameters=parameters.get("non_embedding", 0),
        total_parameters=parameters.get("total", 0),
        steps=steps,
        tokens=about.get("tokens", 0),
        flops=about.get("flops", about.get("flops_per_step", 0.0) * steps),
        adamw_flops=about.get("adamw_flops", about.get("adamw_flops_per_step", 0.0) * steps),
        seconds=max(seconds.values(), default=0.0),
        loss=float(last.get("loss", math.nan)),
        bits_per_byte=float(last.get("bits_per_byte", math.nan)),
        curve=[point(record) for record in evaluations],
        train_curve=[point(record) for record in records if record["kind"] == "train"],
        code=about.get("versions", {}).get("code", ""),
    )


def _flops(runs: list[dict], step: int) -> float:
    """FLOPs of the first `step` steps, each at the rate of the start that made it."""
    total, until = 0.0, step
    for run in reversed(runs):
        began = min(run["step"], until)
        total, until = total + run.get("flops_per_step", 0.0) * (until - began), began
    return total


def _status(outcome: dict, records: list[dict], last: dict, unigram: float) -> tuple[str, str]:
    """(status, why) from what the sweep recorded, or else from what the run itself recorded."""
    status, why = outcome.get("status", ""), outcome.get("why", "")
    if not status:
        stops = [record for record in records if record["kind"] == "anomaly" and record.get("decision") == "stop"]
        if last:
            status = "finished"
        elif stops and stops[-1]["step"] >= max(record["step"] for record in records):
            status, why = "diverged", f"{stops[-1]['what']} at step {stops[-1]['step']}"
        else:
            status, why = "unfinished", f"after step {records[-1]['step']}" if records else "not begun"
    if status == "finished":
        if not last:
            return "failed", "its metrics.jsonl has no evaluation after the last step"
        loss = float(last["loss"])
        if not math.isfinite(loss):
            return "diverged", f"held-out loss {loss}"
        if loss > unigram:
            return "diverged", f"held-out loss {loss:.4f} above the unigram model's {unigram:.4f}"
    return status, why


def _unigram(about: dict, name: str) -> float:
    """Loss of a unigram model on a held-out set, nats a token; infinite where unknown."""
    known = about.get("baselines", {})
    return float(known.get(f"unigram {name}", known.get("unigram", math.inf)))


def _seconds(records: list[dict]) -> dict[int, float]:
    """{step: seconds of training until then}.

    The clock of a run starts anew with each of its starts and also runs while it evaluates and saves; so a step with
    anything else recorded before it counts as the median of the others.
    """
    gaps, before = [], None  # (step, seconds, or None where something else happened)
    for record in records:
        if record["kind"] == "train":
            gap = record["seconds"] - before if before is not None else None
            gaps.append((record["step"], gap if gap is None or gap > 0 else None))
        before = record["seconds"] if record["kind"] == "train" else None
    clean = [gap for _, gap in gaps if gap is not None]
    typical = statistics.median(clean) if clean else 0.0
    found, total = {}, 0.0
    for step, gap in gaps:
        total += typical if gap is None else gap
        found[step] = total
    return found
