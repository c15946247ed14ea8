"""Durations in any unit, and schedules of the learning rate and rho."""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from steppe.optim.rule import OptionError

SCHEDULES = ("cosine", "linear", "constant", "rsqrt", "wsd")
RHO_SCHEDULES = ("constant", "warmup", "cosine", "linear", "rsqrt", "wsd", "late", "learning_rate")
_UNITS = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_DURATION = re.compile(r"\s*([0-9][0-9_]*\.?[0-9]*(?:e[+-]?[0-9]+)?)\s*([kKMBGT]?)\s*(%|steps?|tokens?|epochs?|)\s*")
ACCEPTED_DURATION = 'a duration such as "2000 steps", "3.2M tokens", "1.5 epochs" or "5%"'


class DurationError(ValueError):
    """An invalid duration. Fields: the text `value`, and the `accepted` durations."""

    def __init__(self, value: str, accepted: str):
        self.value, self.accepted = value, accepted
        super().__init__(f"{value!r}: must be {accepted}")


def is_number(value) -> bool:
    """Whether a value is a known number: neither a schedule (a function of the step) nor a traced value."""
    return not callable(value) and not isinstance(value, Tracer)


def duration_steps(
    text: str, *, tokens_per_step: float, total_steps: int | None = None, tokens_per_epoch: float | None = None
) -> int:
    """Converts a duration to whole steps, rounding up. A bare number means steps.

    "N steps" | "N tokens" | "N epochs" (needs tokens_per_epoch) | "N%" of total_steps (needs total_steps); N may end in
    k, M, B or T. Raises DurationError for anything else.

    >>> duration_steps("1.5M tokens", tokens_per_step=4096)
    367
    >>> duration_steps("5%", tokens_per_step=4096, total_steps=1000)
    50
    """
    match = _DURATION.fullmatch(text)
    if not match:
        raise DurationError(text, ACCEPTED_DURATION)
    number, multiple, unit = float(match[1].replace("_", "")), _UNITS[match[2]], match[3].rstrip("s")
    value = number * multiple
    if unit in ("", "step"):
        steps = value
    elif unit == "token":
        steps = value / tokens_per_step
    elif unit == "epoch":
        if not tokens_per_epoch:
            raise DurationError(
                text, "a duration in steps, tokens or % of the run, because the size of the corpus is unknown"
            )
        steps = value * tokens_per_epoch / tokens_per_step
    else:
        if total_steps is None or value > 100:
            raise DurationError(text, "a fraction of a run of known length, from 0% to 100%")
        steps = value / 100 * total_steps
    if not math.isfinite(steps):
        raise DurationError(text, "a duration that is a finite number of steps")
    # 0.05 * 1000 is 50.00000000000001 in floating point: round before taking the ceiling.
    return math.ceil(round(steps, 6))


def in_steps(text: str) -> bool:
    """Whether the unit of a duration is steps."""
    match = _DURATION.fullmatch(text)
    return bool(match) and match[3].rstrip("s") in ("", "step")


def learning_rate(
    name: str,
    peak: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    end: float = 0.1,
    cooldown_steps: int = 0,
    from_zero: bool = False,
) -> Callable:
    """Learning rate as a function of the step: a linear warm-up from `end * peak`, then the named shape.

    cosine and linear decay to end * peak at total_steps. constant stays at the peak. rsqrt decays as
    sqrt(warmup / step). wsd stays, then decays linearly to end * peak over the last cooldown_steps. If `end` is 0, the
    warm-up starts at peak / (warmup_steps + 1), so that no step has rate 0; with from_zero it starts at 0.
    """
    floor, left = end * peak, max(1, total_steps - warmup_steps)
    if name == "cosine":
        after = optax.cosine_decay_schedule(peak, left, alpha=end)
    elif name == "linear":
        after = optax.linear_schedule(peak, floor, left)
    elif name == "constant":
        after = optax.constant_schedule(peak)
    elif name == "rsqrt":
        scale = max(1, warmup_steps)
        after = lambda count: peak * jnp.sqrt(scale / (jnp.maximum(count, 0) + scale))  # noqa: E731
    elif name == "wsd":
        stable = max(0, left - cooldown_steps)
        decay = optax.linear_schedule(peak, floor, max(1, cooldown_steps))
        after = optax.join_schedules([optax.constant_schedule(peak), decay], [stable])
    else:
        raise OptionError("schedule", name, f"one of {', '.join(SCHEDULES)}")
    if not warmup_steps:
        return after
    low = floor if end or from_zero else peak / (warmup_steps + 1)
    return optax.join_schedules([optax.linear_schedule(low, peak, warmup_steps), after], [warmup_steps])


def rho(
    name: str,
    value: float,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    rate: Callable | None = None,
):
    """rho as a constant (the value itself, which may be traced) or a function of the step.

    warmup rises linearly from 0 over warmup_steps. cosine, linear, rsqrt and wsd have the learning rate's shape: they
    rise from 0 to the value and, except rsqrt, return to 0. late is 0 until the last cooldown_steps, when a wsd
    learning rate decays, and then the value. learning_rate is value * rate(step) / max(rate), as in GSAM.
    """
    if name == "constant":
        return value
    if name == "warmup":
        unit = optax.linear_schedule(0.0, 1.0, max(1, warmup_steps))
    elif name in ("cosine", "linear", "rsqrt", "wsd"):
        unit = learning_rate(
            name, 1.0, total_steps, warmup_steps=warmup_steps, end=0.0, cooldown_steps=cooldown_steps, from_zero=True
        )
    elif name == "late":
        unit = lambda step: jnp.where(jnp.asarray(step) >= total_steps - cooldown_steps, 1.0, 0.0)  # noqa: E731
    elif name == "learning_rate":
        if rate is None:
            raise OptionError("rho_schedule", name, "another schedule without the argument `rate`, the learning rate")
        with jax.ensure_compile_time_eval():
            peak = max(float(rate(step)) for step in {0, warmup_steps, total_steps})
        unit = lambda step: rate(step) / peak  # noqa: E731
    else:
        raise OptionError("rho_schedule", name, f"one of {', '.join(RHO_SCHEDULES)}")
    return lambda step: value * unit(step)
