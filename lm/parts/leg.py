"""How far a run had come when it went on with other sizes: counted then, never computed from a config of now."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from steppe.configs import base
from steppe.lm.parts.anomaly import batch_index


class Leg(NamedTuple):
    """The part of a run since its batch or sequence length last changed, which began after `step` updates.

    What came before it: rows of the training stream, read or left out, and the batches they made; tokens predicted;
    FLOPs, and those AdamW would have taken. branch: the updates of another run that this one goes on from. planned: the
    tokens as budgets have them, of average steps; None: they are all of one size.
    """

    step: int = 0
    rows: int = 0
    batches: int = 0
    tokens: int = 0
    flops: float = 0.0
    adamw_flops: float = 0.0
    branch: int = 0
    planned: float | None = None

    def tokens_after(self, step: int, tokens_per_step: float) -> int:
        """Tokens predicted in `step` updates."""
        return round(self.tokens + (step - self.step) * tokens_per_step)

    def planned_after(self, step: int, tokens_per_step: float) -> float:
        """The same, every step being an average one."""
        return (self.tokens if self.planned is None else self.planned) + (step - self.step) * tokens_per_step


def seen(step: int, meta: Mapping[str, Any]) -> int:
    """Tokens of `step` updates, after which this is a checkpoint's meta: counted, or as many in every step."""
    if "tokens" in meta:
        return meta["tokens"]
    before = base.completed(meta["config"])
    return kept(meta).tokens_after(step, before.train.batch_size * before.data.sequence_length)


def kept(meta: Mapping[str, Any]) -> Leg:
    """The Leg that a checkpoint's meta holds."""
    return Leg(**{name: value for name, value in meta.get("leg", {}).items() if name in Leg._fields})


WHOLE = Leg()  # a run whose sizes never changed


def leg_of(step: int, meta: Mapping[str, Any], config: Mapping[str, Any], branched: bool = False) -> Leg:
    """The Leg of a run that goes on from the checkpoint of `step` updates, whose meta this is, with `config`.

    branched: from another run's checkpoint, whose method may cost something else.
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
        rows=rows * old[1] // new[1],  # the rows of another length hold other text: as many tokens of it count as read
        batches=batches,
        tokens=tokens,
        flops=leg.flops + flops,
        adamw_flops=leg.adamw_flops + plain,
        branch=step if branched else leg.branch,
        planned=planned if planned != tokens else None,
    )
