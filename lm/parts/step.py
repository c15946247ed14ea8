"""One training step: gradient rule, optax transform, finiteness gate, metrics."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from steppe.lm.model.ordered import ordered
from steppe.lm.parts.anomaly import UPDATE
from steppe.lm.parts.assembly import Parts
from steppe.lm.parts.memo import once
from steppe.lm.parts.state import Optimizer, State
from steppe.optim import Objective
from steppe.optim.base import at_step
from steppe.optim.rule import norm


def make_step(objective: Objective, optimizer: Optimizer) -> Callable:
    """step(state, batch, limit=inf) -> (state, metrics); jit it with the state donated.

    A step changes only state.step, which learning rate and rho follow, if its loss, gradient or update is not finite in
    either pass, or if its loss exceeds `limit`. metrics, float32 scalars: the report, nonfinite (UPDATE if only the
    update is not finite), spike (1 if the limit refused the step), sharpness_gap (perturbed minus clean loss), update
    and parameter norms, learning_rate, rho. For packed documents also tokens, int32: those that the loss counts.
    """

    def step(state: State, batch: dict, limit: ArrayLike = jnp.inf) -> tuple[State, dict]:
        gradient, rule_state, report = optimizer.rule.gradient(
            objective, state.params, batch, state.optimizer, state.rule, state.step
        )
        counted = at_step(state.optimizer, state.step)
        updates, optimizer_state = optimizer.base.transform.update(
            gradient, counted, state.params, value=report["loss"]
        )
        params = optax.apply_updates(state.params, updates)
        length, spike = norm(updates), report["loss"] > limit
        sound = (report["nonfinite"] == 0) & jnp.isfinite(length)
        good = sound & ~spike
        before = state.params, state.optimizer, state.rule
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), (params, optimizer_state, rule_state), before)
        averages = optimizer.averages.update(state.averages, kept[0], state.step, good)
        metrics = {
            **report,
            "nonfinite": jnp.where(report["nonfinite"] > 0, 1.0, jnp.where(jnp.isfinite(length), 0.0, UPDATE)),
            "spike": spike.astype(jnp.float32),
            "sharpness_gap": report["perturbed_loss"] - report["loss"],
            "update_norm": length,
            "parameter_norm": norm(kept[0]),
            "learning_rate": jnp.asarray(optimizer.learning_rate(state.step), jnp.float32),
            "rho": jnp.asarray(optimizer.rho(state.step), jnp.float32),
        }
        if "segments" in batch:  # rows may be padded, and the loss does not count padding
            metrics["tokens"] = jnp.sum(batch["weights"] > 0)
        return State(state.step + 1, kept[0], kept[1], kept[2], averages), metrics

    return step


def compile_step(parts: Parts, batch: dict) -> Callable:
    """The compiled step(state, batch, limit), which reuses the state's memory; similar runs share its program."""
    made = lambda: ordered(lower_step(parts, batch).compile(), parts.mesh, "training step")  # noqa: E731
    return with_scalars(once("step", parts.key, made), parts)


def with_scalars(compiled: Callable, parts: Parts) -> Callable:
    """step(state, batch, limit) of a run, from a compiled `lower_step` of it or of a similar run."""
    scalars = _scalars(parts)
    return lambda state, batch, limit: compiled(state, batch, limit, scalars)


def lower_step(parts: Parts, batch: dict, platforms: tuple[str, ...] | None = None) -> jax.stages.Lowered:
    """The lowered program of `trace_step`. platforms: to lower for, by default the devices' own."""
    return trace_step(parts, batch).lower(lowering_platforms=platforms)


def trace_step(parts: Parts, batch: dict) -> jax.stages.Traced:
    """The traced step(state, batch, limit, scalars), shared by runs that differ only in Parts.scalars."""

    def step(state, batch, limit, scalars):
        return make_step(parts.objective, parts.optimizer_at(**scalars))(state, batch, limit)

    limit = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.jit(step, donate_argnums=0).trace(parts.abstract, batch, limit, _scalars(parts))


def _scalars(parts: Parts) -> dict:
    return {name: np.float32(value) for name, value in parts.scalars.items()}
