"""Bad steps: what makes a loss or gradient bad, what is said about it, and what the run does then.

The step itself refuses a bad update (lm.step): a non-finite number in either pass, or a loss above the limit given
here. So parameters, moments and rule state never see it, and all that is left to decide is whether to go on, to stop,
or to go back to the last checkpoint and leave out the data since.
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
UPDATE = 2.0  # the metric nonfinite where loss and gradients were finite, and the update was not
AGREED, PARTED, KNOWN = 0.9, 0.5, 8  # cosines of the two passes: before, now; and over how many steps before
LAG = 2  # metrics are read one step late: the limit of step n may depend on steps up to n - LAG, whenever they are read


class Watch:
    """Judges the steps of a run, in order. Its `memory` goes into every checkpoint, so that a resumed run judges alike.

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
        self.windows = [list(window) for window in memory.get("windows", [])]  # [after step, batches left out]

    def memory(self) -> dict[str, Any]:
        """All that later judgements and batches depend on, as JSON."""
        return {"losses": [list(entry) for entry in self._losses], "skipped": self._skipped, "windows": self.windows}

    def limit(self, step: int) -> np.float32:
        """The loss above which the update of this step is refused; infinite without spike_score or enough history."""
        if not self._score:
            return np.float32(math.inf)
        return np.float32(limit([loss for s, loss in self._losses if s <= step - LAG], self._score, self._window))

    def batch_index(self, step: int) -> int:
        """The batch of the step after `step` updates, in the corpus's own order."""
        return batch_index(self.windows, step)

    def judge(self, step: int, metrics: dict[str, float]) -> dict[str, Any] | None:
        """What is wrong with a step, None if nothing; `decision` in it is skip, stop or rollback."""
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
        """The usual cosine between the gradients of the two passes, where that of this step has left it as no small rho
        explains: a device, or what the devices exchange, may be wrong. None where all is well or nothing is known."""
        cosine = metrics["cosine"]
        if not metrics["epsilon_norm"] > 0 or not math.isfinite(cosine):
            return None
        usual = float(np.median(self._cosines)) if len(self._cosines) == KNOWN else math.nan
        if usual > AGREED and cosine < PARTED:
            return usual
        self._cosines.append(cosine)
        return None

    def roll_back(self, step: int, bad_step: int) -> bool:
        """Leaves out the batches of steps step+1 ... bad_step, restarting after `step`; False if that was too often.

        To be called on a Watch made from the memory of the checkpoint, with the windows of the one that judged.
        """
        self.windows.append([step, bad_step - step])
        return sum(after == step for after, _ in self.windows) <= self._most


def batch_index(windows: list[list[int]], step: int) -> int:
    """The batch of the step after `step` updates. windows: [after step, batches left out there]."""
    return step + sum(count for after, count in windows if after <= step)


def limit(losses: list[float], score: float, window: int) -> float:
    """Median + score x robust standard deviation (1.4826 x median absolute deviation) of the last `window` losses.

    Infinite before there are `window`. The deviation counts as at least 1 % of the median, since losses that hardly
    move would make every step a spike.
    """
    losses = losses[-window:]
    if len(losses) < window:
        return math.inf
    median = float(np.median(losses))
    deviation = 1.4826 * float(np.median(np.abs(np.asarray(losses) - median)))
    return median + score * max(deviation, 0.01 * abs(median))


def describe(step: int, found: dict[str, Any]) -> str:
    """One line of diagnosis."""
    norms = f"gradient norm {found['gradient_norm']:.4g}, epsilon norm {found['epsilon_norm']:.4g}"
    losses = f"loss {found['loss']:.4g}, perturbed loss {found['perturbed_loss']:.4g}"
    return f"step {step}: {found['what']}, {found['where']} ({losses}, {norms}); the step changed nothing"


def describe_parted(step: int, cosine: float, usual: float) -> str:
    """One line on what Watch.parted found."""
    return (
        f"step {step}: the gradients at theta and at theta + epsilon have cosine {cosine:.3f}, after {usual:.3f}: no "
        "small rho explains this, a device or what the devices exchange may be wrong"
    )


def describe_end(bad: dict[str, Any], config: ConfigDict) -> str:
    """One line on a run that ended over a bad step."""
    policy, step = f"on_{bad['what']}", bad["step"]
    other = f", --allow_change=train.{policy} may set another policy" if policy in config.train else ""
    sound = f"stopped: {bad['what']} at step {step}; what is on disk is sound. --replay_step={step} looks into it"
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
    """The first place where a number was not finite. A NaN metric may be one that the method lacks."""
    if metrics["nonfinite"] == UPDATE:
        return "the update"
    climbed = metrics["epsilon_norm"] > 0  # False for NaN: a direction from a gradient that was not finite
    if not math.isfinite(metrics["loss"]):
        return "the loss"
    if not math.isfinite(metrics["gradient_norm"]) and not (climbed and math.isnan(metrics["gradient_norm"])):
        return "the gradient at theta"
    if climbed and not math.isfinite(metrics["perturbed_loss"]):
        return "the loss at theta + epsilon"
    return "the gradient at theta + epsilon" if climbed else "the gradient"
