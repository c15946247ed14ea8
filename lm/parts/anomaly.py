"""Bad steps: how they are detected and described, and how the run responds.

The step itself refuses a bad update (lm.parts.step): a non-finite number in either pass, or a loss above the limit set
here. Parameters, moments and rule state therefore stay sound. The run then continues, stops, or goes back to the last
checkpoint and skips the data since.
"""

import collections
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from steppe.data import files

FOLDER = "anomalies"
UPDATE = 2.0  # the metric nonfinite if only the update is not finite, while loss and gradients are
AGREED, PARTED, KNOWN = 0.9, 0.5, 8  # cosine of the two passes: usual, suspicious; steps that define the usual one
LAG = 2  # metrics are read one step late, so the limit of step n uses steps up to n - LAG, whenever they are read


class Watch:
    """Judges the steps of a run, in order. Checkpoints hold its `memory`, so that a resumed run judges the same way.

    config.train: spike_score (0: no limit), spike_window, on_nonfinite, on_spike, max_skips.
    """

    def __init__(self, config: ConfigDict, memory: Mapping[str, Any] | None = None):
        train = config.train
        self._score, self._window, self._most = train.spike_score, train.spike_window, train.max_skips
        self._policy = {"nonfinite": train.on_nonfinite, "spike": train.on_spike}
        memory = memory or {}
        self._losses = collections.deque(memory.get("losses", []), maxlen=train.spike_window + LAG)  # [step, loss]
        self._skipped = memory.get("skipped", 0)
        self._cosines = collections.deque(maxlen=KNOWN)  # of steps that perturb
        self.windows = [list(window) for window in memory.get("windows", [])]  # [after step, batches skipped]

    def memory(self) -> dict[str, Any]:
        """The state that later judgements and batches depend on, as JSON."""
        return {"losses": [list(entry) for entry in self._losses], "skipped": self._skipped, "windows": self.windows}

    def limit(self, step: int) -> np.float32:
        """The loss above which this step's update is refused; infinite without spike_score or enough history."""
        if not self._score:
            return np.float32(math.inf)
        return np.float32(limit([loss for s, loss in self._losses if s <= step - LAG], self._score, self._window))

    def batch_index(self, step: int) -> int:
        """The index in the corpus of the batch of the step after `step` updates."""
        return batch_index(self.windows, step)

    def judge(self, step: int, metrics: dict[str, float]) -> dict[str, Any] | None:
        """What is wrong with a step, None if nothing; its `decision` is skip, stop or rollback."""
        what = "nonfinite" if metrics["nonfinite"] else "spike" if metrics["spike"] else None
        if what is None:
            self._skipped = 0
            if self._score:
                self._losses.append([step, metrics["loss"]])
            return None
        self._skipped += 1
        decision = self._policy[what]
        if decision == "skip" and self._skipped >= self._most:
            decision = "stop"
        names = ("loss", "perturbed_loss", "gradient_norm", "epsilon_norm")
        return {
            "what": what,
            "where": _where(metrics) if what == "nonfinite" else f"loss above {self.limit(step):.4f}",
            **{name: metrics[name] for name in names},
            "decision": decision,
        }

    def parted(self, metrics: dict[str, float]) -> float | None:
        """The usual cosine between the two passes' gradients, if this step's is far below it: the loss bends sharply
        here, or a device or an exchange is faulty. None if the cosine is normal or unknown."""
        cosine = metrics["cosine"]
        if not metrics["epsilon_norm"] > 0 or not math.isfinite(cosine):
            return None
        usual = float(np.median(self._cosines)) if len(self._cosines) == KNOWN else math.nan
        if usual > AGREED and cosine < PARTED:
            return usual
        self._cosines.append(cosine)
        return None

    def roll_back(self, step: int, bad_step: int) -> bool:
        """Skips the batches of steps step+1 ... bad_step after going back to `step`; False after too many tries.

        Call it on a Watch made from the checkpoint's memory, with the windows of the Watch that judged.
        """
        self.windows.append([step, bad_step - step])
        return sum(after == step for after, _ in self.windows) <= self._most


def batch_index(windows: list[list[int]], step: int) -> int:
    """The batch of the step after `step` updates. windows: [after step, batches skipped there]."""
    return step + sum(count for after, count in windows if after <= step)


def limit(losses: list[float], score: float, window: int) -> float:
    """Median + score x robust standard deviation (1.4826 x median absolute deviation) of the last `window` losses.

    Infinite with fewer losses. The deviation counts as at least 1 % of the median; otherwise, losses that hardly vary
    would make every step a spike.
    """
    losses = losses[-window:]
    if len(losses) < window:
        return math.inf
    median = float(np.median(losses))
    deviation = 1.4826 * float(np.median(np.abs(np.asarray(losses) - median)))
    return median + score * max(deviation, 0.01 * abs(median))


def describe(step: int, found: dict[str, Any]) -> str:
    """One line about a bad step."""
    norms = f"gradient norm {found['gradient_norm']:.4g}, epsilon norm {found['epsilon_norm']:.4g}"
    losses = f"loss {found['loss']:.4g}, perturbed loss {found['perturbed_loss']:.4g}"
    return f"step {step}: {found['what']}, {found['where']} ({losses}, {norms}); the update was not applied"


def describe_parted(step: int, cosine: float, usual: float) -> str:
    """One line about a result of Watch.parted."""
    return (
        f"step {step}: the gradients at theta and at theta + epsilon have cosine {cosine:.3f}, after {usual:.3f}: the "
        "loss bends sharply at this batch, or a device or the exchange between devices is faulty; "
        "--config.mesh.check_every tells the two apart"
    )


def describe_end(bad: dict[str, Any], config: ConfigDict) -> str:
    """One line about a run that ended because of a bad step."""
    policy, step = f"on_{bad['what']}", bad["step"]
    other = f", --allow_change=train.{policy} may set another policy" if policy in config.train else ""
    sound = f"stopped: {bad['what']} at step {step}; stored files are intact. --replay_step={step} shows its details"
    return sound + other


def save_batch(workdir: str, step: int, batch: dict[str, np.ndarray]) -> str:
    """Writes the whole batch of a bad step to WORKDIR/anomalies/step-K.npz; returns the path."""
    path = Path(workdir) / FOLDER / f"step-{step}.npz"
    path.parent.mkdir(exist_ok=True)
    with files.replacing(path) as aside, open(aside, "wb") as handle:
        arrays: dict[str, Any] = batch
        np.savez_compressed(handle, **arrays)
    return str(path)


def _where(metrics: dict[str, float]) -> str:
    """Where the first non-finite number occurred. A NaN metric may also be one that the method does not compute."""
    if metrics["nonfinite"] == UPDATE:
        return "the update"
    climbed = metrics["epsilon_norm"] > 0  # False for NaN: the direction came from a non-finite gradient
    if not math.isfinite(metrics["loss"]):
        return "the loss"
    if not math.isfinite(metrics["gradient_norm"]) and not (climbed and math.isnan(metrics["gradient_norm"])):
        return "the gradient at theta"
    if climbed and not math.isfinite(metrics["perturbed_loss"]):
        return "the loss at theta + epsilon"
    return "the gradient at theta + epsilon" if climbed else "the gradient"
