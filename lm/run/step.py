"""One training step: gradient rule, optax transform, finiteness gate, metrics."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steppe.lm.run.assembly import Parts
from steppe.lm.run.state import Optimizer, State
from steppe.optim import Objective
from steppe.optim.rule import norm


def make_step(objective: Objective, optimizer: Optimizer) -> Callable:
    """step(state, batch, limit=inf) -> (state, metrics); jit it with the state donated.

    A step whose loss or gradient is not finite, in either pass, or whose loss exceeds `limit`, changes nothing but
    state.step. metrics: the report, spike (1 where the limit refused it), sharpness_gap (perturbed minus clean loss),
    update and parameter norms, learning_rate, rho; float32 scalars.
    """

    def step(state: State, batch: dict, limit: jax.Array = jnp.inf) -> tuple[State, dict]:
        gradient, rule_state, report = optimizer.rule.gradient(
            objective, state.params, batch, state.optimizer, state.rule, state.step
        )
        updates, optimizer_state = optimizer.base.transform.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        spike = report["loss"] > limit
        good = (report["nonfinite"] == 0) & ~spike
        kept = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (params, optimizer_state, rule_state), tuple(state[1:])
        )
        metrics = {
            **report,
            "spike": spike.astype(jnp.float32),
            "sharpness_gap": report["perturbed_loss"] - report["loss"],
            "update_norm": norm(updates),
            "parameter_norm": norm(kept[0]),
            "learning_rate": jnp.asarray(optimizer.learning_rate(state.step), jnp.float32),
            "rho": jnp.asarray(optimizer.rho(state.step), jnp.float32),
        }
        return State(state.step + 1, *kept), metrics

    return step


def compile_step(parts: Parts, batch: dict) -> Callable:
    """The compiled step(state, batch, limit), which takes the state's memory."""
    compiled, scalars = lower_step(parts, batch).compile(), _scalars(parts)
    return lambda state, batch, limit: compiled(state, batch, limit, scalars)


def lower_step(parts: Parts, batch: dict) -> jax.stages.Lowered:
    """The program of step(state, batch, limit, scalars): one for all runs that differ in Parts.scalars alone."""

    def step(state, batch, limit, scalars):
        return make_step(parts.objective, parts.optimizer_at(**scalars))(state, batch, limit)

    limit = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.jit(step, donate_argnums=0).lower(parts.abstract, batch, limit, _scalars(parts))


def _scalars(parts: Parts) -> dict:
    return {name: np.float32(value) for name, value in parts.scalars.items()}
