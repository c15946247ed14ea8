"""Runs as steppe train and steppe sweep leave them on disk, with losses that are given instead of trained."""

import json
import math

from steppe.configs import base
from steppe.scripts.results import flatten

PARAMETERS = {"0.1m": 110_592, "0.4m": 442_368, "1.8m": 1_769_472}
FLOPS = {"adamw": 1.0, "msam": 1.0}


def plan(method, rho=None, *, size="0.1m", seed=0, duration="1000 steps", **others):
    """The overrides of one run, and its name."""
    overrides = {"optim.method": method, "optim.rho": rho, "model.size": size, "seed": seed, "train.duration": duration}
    overrides.update({key.replace("__", "."): value for key, value in others.items()})
    name = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in overrides.items()).replace(" ", "_")
    return name, overrides


def write_sweep(directory, runs):
    """Writes {name: (overrides, loss)}: a number, "diverged", "failed", "pruned" or None (not begun)."""
    plain = flatten(base.get_config().to_dict())
    resolved = {name: overrides for name, (overrides, _) in runs.items()}
    directory.mkdir(parents=True, exist_ok=True)
    sweep = {"config": "configs/x.py", "base": plain, "resolved": resolved}
    sweep["runs"] = {name: {key: str(value) for key, value in o.items()} for name, o in resolved.items()}
    (directory / "sweep.json").write_text(json.dumps(sweep))
    for name, (overrides, loss) in runs.items():
        if loss is not None:
            write_run(directory / "runs" / name, {**plain, **overrides}, loss)


def write_run(directory, config, loss, points=10):
    """One workdir; a loss of a number is reached along a curve that falls to it."""
    directory.mkdir(parents=True)
    nested = {}
    for key, value in config.items():
        section = nested
        *sections, last = key.split(".")
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    (directory / "config.json").write_text(json.dumps(nested))
    parameters, steps = PARAMETERS[config["model.size"]], int(config["train.duration"].split()[0])
    flops, cost = 6.0 * parameters * 1024, FLOPS.get(config["optim.method"], 2.0)
    records = [
        {"kind": "run", "step": 0, "parameters": {"total": parameters + 20_000, "non_embedding": parameters},
         "steps": steps, "tokens": 1024 * steps, "flops_per_step": flops * cost, "adamw_flops_per_step": flops,
         "baselines": {"unigram": 3.2}}
    ]  # fmt: skip
    finished = not isinstance(loss, str)
    end = loss if finished else 2.5
    for i in range(points + 1 if finished else points // 2):
        step, now = i * steps // points, end + (5.6 - end) * math.exp(-5 * i / points) * (1 - i / points)
        if i:
            for at in (step - 1, step):
                records.append({"kind": "train", "step": at, "seconds": 0.02 * at * cost, "loss": now + 0.01})
        records.append({"kind": "evaluate", "step": step, "name": "val", "loss": now, "bits_per_byte": now / 0.6931})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    status = "finished" if finished else loss
    outcome = {"status": status, "exit": 0 if finished else 3, "why": "" if finished else "loss nan", "seconds": 9.0}
    (directory / "outcome.json").write_text(json.dumps(outcome))
