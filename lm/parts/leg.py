"""Counts of a run from before its batch or sequence length changed; recorded then, never recomputed from a config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from steppe.configs import base
from steppe.data import stored
from steppe.lm.parts.anomaly import batch_index


@dataclass(frozen=True)
class Leg:
    """The part of a run since its batch or sequence length last changed, after `step` updates.

    Before it: rows of the training stream, read or skipped, and their batches; tokens predicted; FLOPs, and those AdamW
    would have used. branch: updates of the run that this one branched from. planned: tokens by the budget's average
    step; None: equal to tokens.
    """

    step: stored.Count = 0
    rows: stored.Count = 0
    batches: stored.Count = 0
    tokens: stored.Count = 0
    flops: stored.Amount = 0.0
    adamw_flops: stored.Amount = 0.0
    branch: stored.Count = 0
    planned: stored.Amount | None = None

    def tokens_after(self, step: int, tokens_per_step: float) -> int:
        """Tokens predicted after `step` updates."""
        return round(self.tokens + (step - self.step) * tokens_per_step)

    def planned_after(self, step: int, tokens_per_step: float) -> float:
        """Tokens after `step` updates if every step has the average size."""
        return (self.tokens if self.planned is None else self.planned) + (step - self.step) * tokens_per_step


def seen(step: int, meta: Mapping[str, Any]) -> int:
    """Tokens after `step` updates. meta: of that checkpoint; without a count, all steps have the same size."""
    if "tokens" in meta:
        return meta["tokens"]
    before = base.completed(meta["config"])
    return kept(meta).tokens_after(step, before.train.batch_size * before.data.sequence_length)


def kept(meta: Mapping[str, Any]) -> Leg:
    """The Leg stored in a checkpoint's meta."""
    return msgspec.convert(meta.get("leg", {}), Leg)


WHOLE = Leg()  # a run whose sizes never changed


def leg_of(step: int, meta: Mapping[str, Any], config: Mapping[str, Any], branched: bool = False) -> Leg:
    """The Leg of a run that resumes with `config` from the checkpoint of `step` updates. meta: of that checkpoint.

    branched: it is another run's checkpoint, whose method may have another cost.
    """
    leg, before = kept(meta), base.completed(meta["config"])
    old, new = ((c["train"]["batch_size"], c["data"]["sequence_length"]) for c in (before, config))
    if old == new and not branched:
        return leg
    batches = batch_index(meta["watch"]["windows"], step)
    rows = leg.rows + (batches - leg.batches) * old[0]
    per_step = meta.get("flops_per_step", [0.0, 0.0])
    flops, plain = (value * (step - leg.step) for value in per_step)
    tokens, planned = seen(step, meta), leg.planned_after(step, meta.get("tokens_per_step", old[0] * old[1]))
    return Leg(
        step=step,
        rows=rows * old[1] // new[1],  # rows of another length hold other text, so the same number of tokens is skipped
        batches=batches,
        tokens=tokens,
        flops=leg.flops + flops,
        adamw_flops=leg.adamw_flops + plain,
        branch=step if branched else leg.branch,
        planned=planned if planned != tokens else None,
    )
