"""The directory of a run: which config it belongs to, and which keys may change when it continues."""

import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from lm.check import ConfigError

CONFIG = "config.json"
# Keys that do not change what a run computes, beyond the order of sums.
FREE = (
    *("mesh.", "log.", "sample.", "checkpoint.", "model.attention", "model.remat", "model.readout_chunk"),
    *("data.directory", "data.cache", "data.verify", "data.prefetch", "data.workers", "data.tfds_dir"),
)


def flatten(config: dict, prefix: str = "") -> dict:
    """{"optim.rho": 0.1, ...} of a nested dict; tuples as lists, as JSON has them."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def claim(workdir: str, config: ConfigDict, primary: bool) -> None:
    """Takes a new or empty workdir for this config, or checks that it belongs to it; process 0 writes config.json.

    ConfigError names the first key that differs, with both values, and the others by name. FREE keys may differ.
    """
    path = Path(workdir) / CONFIG
    now = flatten(config.to_dict())
    if path.exists():
        before = flatten(json.loads(path.read_text()))
        differing = [
            key
            for key in sorted({*now, *before})
            if not key.startswith(FREE) and now.get(key, "absent") != before.get(key, "absent")
        ]
        if differing:
            first = differing[0]
            others = f" (also differing: {', '.join(differing[1:])})" if differing[1:] else ""
            raise ConfigError(
                first, now.get(first, "absent"),
                f"{before.get(first, 'absent')!r} to continue the run in {workdir}{others}; take another for a new run",
            )  # fmt: skip
    if primary:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(config.to_dict(), indent=1))
        os.replace(aside, path)
