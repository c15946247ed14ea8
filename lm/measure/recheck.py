"""Repeats steps of a mesh on one device, which exchanges nothing, to check that the mesh computes correctly."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from steppe.lm.model.mesh import Placement
from steppe.lm.model.objective import objective
from steppe.lm.parts.assembly import Parts
from steppe.lm.parts.progress import Progress
from steppe.lm.parts.step import make_step
from steppe.lm.track.tracker import Tracker

NAMES = ("loss", "perturbed_loss", "gradient_norm", "cosine")
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # relative and absolute, because the order of sums changes rounding


class Recheck:
    """Repeats every `every`-th step of a run (0: none) on this process's first device, which must hold the whole state
    and batch. rows(step): all rows of the batch after `step` updates."""

    def __init__(self, parts: Parts, tracker: Tracker, every: int, rows: Callable[[int], dict[str, np.ndarray]]):
        nowhere = Placement()
        alone = objective(parts.shape, parts.options._replace(place=nowhere), nowhere)
        self._step, self._tolerance = jax.jit(make_step(alone, parts.optimizer)), TOLERANCE[parts.shape.dtype]

        self._tracker, self._rows, self._every = tracker, rows, 0 if parts.mesh.size == 1 else every

    def metrics(self, at: Progress) -> dict[str, float] | None:
        """The next step's metrics on one device; None if that step is not checked."""
        if not self._every or (at.done + 1) % self._every:
            return None
        everywhere = multihost_utils.process_allgather(at.state, tiled=True)
        here = jax.device_put((everywhere, self._rows(at.done)), jax.local_devices()[0])
        return jax.device_get(self._step(*here, at.watch.limit(at.done + 1))[1])

    def differing(self, number: int, one: dict[str, Any], mesh: dict[str, Any]) -> dict[str, Any] | None:
        """Records and returns the anomaly if step `number` differs between one device and the mesh, else None."""
        mesh = jax.device_get(mesh)
        pairs = {name: [float(one[name]), float(mesh[name])] for name in NAMES}
        near: dict[str, Any] = {"rtol": self._tolerance, "atol": self._tolerance, "equal_nan": True}
        differing = {name: pair for name, pair in pairs.items() if not np.isclose(pair[0], pair[1], **near)}
        if not differing:
            return None
        said = ", ".join(f"{name} {a:.6g} on one device, {b:.6g} on the mesh" for name, (a, b) in differing.items())
        self._tracker.note(f"step {number}: {said}")
        found = {"what": "mismatch", "differing": differing, "decision": "stop"}
        self._tracker.event("anomaly", number, found)
        return {"step": number, **found}
