"""A step of a mesh computed again by one device, which exchanges nothing: whether the mesh computes right."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from steppe.lm.model.mesh import Placement
from steppe.lm.model.objective import objective
from steppe.lm.parts.assembly import Parts
from steppe.lm.parts.state import State
from steppe.lm.parts.step import make_step

NAMES = ("loss", "perturbed_loss", "gradient_norm", "cosine")
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}  # of a value, and as much of 1: other orders of sums round differently


class Recheck:
    """Computes steps of a run on this process's first device. The whole state and batch must fit it."""

    def __init__(self, parts: Parts):
        nowhere = Placement()
        alone = objective(parts.shape, parts.options._replace(place=nowhere), nowhere)
        self._step, self._tolerance = jax.jit(make_step(alone, parts.optimizer)), TOLERANCE[parts.shape.dtype]

    def metrics(self, state: State, batch: dict[str, np.ndarray], limit: np.float32) -> dict[str, float]:
        """The metrics of the step from a state of the mesh. batch: all rows of it. limit: as the step takes it."""
        everywhere = multihost_utils.process_allgather(state, tiled=True)
        here = jax.device_put((everywhere, batch), jax.local_devices()[0])
        return jax.device_get(self._step(*here, limit)[1])

    def differing(self, one: dict[str, Any], mesh: dict[str, Any]) -> dict[str, list[float]]:
        """{name: [by one device, by the mesh]} of the numbers in which two steps differ."""
        pairs = {name: [float(one[name]), float(mesh[name])] for name in NAMES}
        near: dict[str, Any] = {"rtol": self._tolerance, "atol": self._tolerance, "equal_nan": True}
        return {name: pair for name, pair in pairs.items() if not np.isclose(pair[0], pair[1], **near)}
