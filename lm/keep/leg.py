"""How far a run had come when it went on with other sizes: counted then, never computed from a config of now."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from steppe.configs import base
from steppe.lm.run.anomaly import batch_index


class Leg(NamedTuple):
    """The part of a run since its batch or sequence length last changed, which began after `step` updates.

    What came before it: rows of the training stream, read or left out, and the batches they made; tokens predicted;
    FLOPs, and those AdamW would have taken.
    """

    step: int = 0
    rows: int = 0
    batches: int = 0
    tokens: int = 0
    flops: float = 0.0
    adamw_flops: float = 0.0

    def tokens_after(self, step: int, tokens_per_step: int) -> int:
        """Tokens predicted in `step` updates."""
        return self.tokens + (step - self.step) * tokens_per_step


WHOLE = Leg()  # a run whose sizes never changed


def leg_of(step: int, meta: Mapping[str, Any], config: Mapping[str, Any], branched: bool = False) -> Leg:
    """The Leg of a run that goes on from the checkpoint of `step` updates, whose meta this is, with `config`.

    branched: from another run's checkpoint, whose method may cost something else.
    """
    leg, before = Leg(**meta.get("leg", {})), base.completed(meta["config"])
    old, new = ((c["train"]["batch_size"], c["data"]["sequence_length"]) for c in (before, config))
    if old == new and not branched:
        return leg
    batches = batch_index(meta["watch"]["windows"], step)
    rows = leg.rows + (batches - leg.batches) * old[0]
    per_step = meta.get("flops_per_step", [0.0, 0.0])
    flops, plain = (value * (step - leg.step) for value in per_step)
    return Leg(
        step=step,
        rows=rows * old[1] // new[1],  # the rows of another length hold other text: as many tokens of it count as read
        batches=batches,
        tokens=leg.tokens_after(step, old[0] * old[1]),
        flops=leg.flops + flops,
        adamw_flops=leg.adamw_flops + plain,
    )
