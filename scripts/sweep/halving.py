"""Successive halving: runs that differ only in rho, or in given keys, are compared at rungs; the worse ones stop.

A rung is a fraction of the run. At each rung, every run of a group stops with a checkpoint; the best 1/eta of the group
continue. Runs of a group share seed and data, so the comparison is paired. Their schedules are those of the full
length, so a run that continues equals an uninterrupted one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

from steppe.configs.read import UsageError
from steppe.data import stored
from steppe.lm.keep.exits import STOPPED
from steppe.lm.track import lines
from steppe.scripts.sweep import launch as sweep_launch
from steppe.scripts.sweep.plan import Run


class Halving(NamedTuple):
    """The best 1/eta of a group pass each rung; rungs: increasing fractions of the run; over: keys that may differ."""

    eta: float = 2.0
    rungs: tuple[float, ...] = (0.25, 0.5)
    over: tuple[str, ...] = ("optim.rho",)


class _Given(TypedDict, total=False):
    eta: float
    rungs: list[float]
    over: list[str]


def parse(text: str) -> Halving:
    """ "2:0.25,0.5", "3" or "" as a Halving; omitted parts have their defaults. Raises UsageError."""
    eta, _, rungs = text.partition(":")
    try:
        given = {"rungs": [float(rung) for rung in rungs.split(",")]} if rungs else {}
        return settings(given | ({"eta": float(eta)} if eta else {}))
    except ValueError:
        raise UsageError(f"--halving={text}: must be ETA:RUNG,RUNG, such as 2:0.25,0.5") from None


def settings(given: Mapping[str, Any]) -> Halving:
    """A Halving from the `halving` entry of a spec. Raises UsageError, or stored.Wrong for one of another shape."""
    stored.typed(given, dict[str, Any], "halving of the sweep")
    if unknown := [key for key in given if key not in Halving._fields]:
        raise UsageError(f"halving of the sweep: {unknown[0]}: must be eta, rungs or over")
    stored.typed(given, _Given, "halving of the sweep")
    typed: dict[str, Any] = {key: value if key == "eta" else tuple(value) for key, value in given.items()}
    made = Halving(**typed)
    if not made.eta > 1:
        raise UsageError(f"halving of the sweep: eta = {made.eta}: must be > 1")
    if not made.rungs or list(made.rungs) != sorted(set(made.rungs)) or not 0 < made.rungs[0] <= made.rungs[-1] < 1:
        raise UsageError(f"halving of the sweep: rungs = {list(made.rungs)}: must be growing fractions of the run")
    return made


def groups(runs: Sequence[Run], over: Sequence[str]) -> list[list[Run]]:
    """Groups of at least two runs that differ only in these keys."""
    found = {}
    for run in runs:
        key = tuple((name, str(value)) for name, value in run.flat.items() if name not in (*over, "log.name"))
        found.setdefault(key, []).append(run)
    return [members for members in found.values() if len(members) > 1]


def rung_step(run: Run, fraction: float) -> int:
    """The step of a rung: the evaluation closest to that fraction of the run; 0 if that is the end."""
    from steppe.optim.schedules import duration_steps

    tokens = run.tokens // run.steps
    every = max(1, duration_steps(run.config.evaluate.every, tokens_per_step=tokens, total_steps=run.steps))
    step = max(1, round(fraction * run.steps / every)) * every
    return step if step < run.steps else 0


def loss_at(run: Run, step: int) -> float:
    """Loss of a run on its first held-out set at this step, nats a token; infinite if absent or not finite."""
    for record in lines.read(run.directory).of("evaluate"):
        if record["step"] == step:
            loss = float(record["loss"])
            return loss if math.isfinite(loss) else math.inf
    return math.inf


def is_to_reach(run: Run, step: int) -> bool:
    """Whether a run has yet to reach this step; 0 is none."""
    return bool(step) and not run.outcome and not math.isfinite(loss_at(run, step))


def prune(group: Sequence[Run], step: int, share: float) -> list[Run]:
    """Ends the runs of a group that are not among its best at this step, for good; returns them.

    share: of the group that continues, rounded up. Ranks cover runs of every status, so a second call changes nothing.
    """
    losses = {run.name: loss_at(run, step) for run in group}
    ranked = sorted(group, key=lambda run: losses[run.name])
    kept = max(1, math.ceil(len(group) * share))
    ended = [(rank, run) for rank, run in enumerate(ranked, 1) if rank > kept and not run.outcome]
    for rank, run in ended:
        best = f"the best has {losses[ranked[0].name]:.4f}"
        why = f"loss {losses[run.name]:.4f} at step {step}, rank {rank} of {len(group)}; {best}"
        sweep_launch.record(run.directory, "pruned", STOPPED, why)
    return [run for _, run in ended]


def saved(runs: Sequence[Run]) -> str:
    """A line that says what stopping runs early saved."""
    pruned = [run for run in runs if run.outcome.get("status") == "pruned"]
    rests = [(run, 1 - max(lines.read(run.directory).train.step, default=0) / run.steps) for run in pruned]
    tokens, flops = sum(rest * run.tokens for run, rest in rests), sum(rest * run.flops for run, rest in rests)
    return (
        f"halving  stopped {len(pruned)} of {len(runs)} runs early and saved {tokens:,.0f} tokens, {flops:.3g} FLOPs, "
        f"{flops / sum(run.flops for run in runs):.0%} of the whole"
    )
