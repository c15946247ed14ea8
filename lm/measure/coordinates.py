"""How large activations are, and what updates and perturbations do to them: the coordinate check of a width.

Under mup none of it changes with the width (Yang et al. 2021, arXiv 2203.03466, appendix D; of perturbations Haas et
al. 2024, arXiv 2411.00075).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from steppe.lm.model.objective import readout_kernel
from steppe.lm.model.ordered import jitted
from steppe.lm.parts.assembly import Parts
from steppe.lm.parts.state import create
from steppe.lm.parts.step import compile_step
from steppe.optim import rule as rules
from steppe.optim.ascent import AscentInput
from steppe.optim.two_pass import TwoPass, perturbation

KINDS = ("residual", "logits")  # the residual stream after the last block, before its norm


def measure(parts: Parts, batches: list[dict]) -> dict[str, float]:
    """{"KIND", "KIND update", "KIND perturbation": root mean square} on the first of the batches.

    KIND: at the start. KIND update: what a step on each of the batches has changed of it. KIND perturbation: what the
    method's epsilon after them changes; absent where it has none.
    """
    batch = batches[0]
    outputs = jitted(lambda params: _outputs(parts, params, batch), parts.mesh, "outputs")
    state = create(parts.mesh, parts.initialise)
    first = outputs(state.params)
    step = compile_step(
        parts, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)
    )
    for each in batches:
        state, _ = step(state, each, jnp.float32(jnp.inf))
    last = outputs(state.params)
    found = {kind: _rms(first[kind]) for kind in KINDS}
    found |= {f"{kind} update": _rms(last[kind] - first[kind]) for kind in KINDS}
    rule = parts.optimizer.rule
    if isinstance(rule, TwoPass):
        moved = outputs(jitted(lambda state: _perturbed(parts, rule, state, batch), parts.mesh, "perturbation")(state))
        found |= {f"{kind} perturbation": _rms(moved[kind] - last[kind]) for kind in KINDS}
    return found


def _outputs(parts: Parts, params: Any, batch: dict) -> dict[str, jax.Array]:
    residual = []

    def catch(function, args, kwargs, context):
        if context.module.name == "final_norm":
            residual.append(args[0])
        return function(*args, **kwargs)

    with nn.intercept_methods(catch):
        hidden_BxTxD = parts.objective.trunk(params, batch)
    kernel_VxD = readout_kernel(params, parts.shape)[: parts.options.vocabulary]
    logits = jnp.einsum("btd,vd->btv", hidden_BxTxD.astype(jnp.float32), kernel_VxD)
    return {"residual": residual[0], "logits": logits}


def _perturbed(parts: Parts, rule: TwoPass, state: Any, batch: dict) -> Any:
    """theta + epsilon of the next step, were it on this batch."""
    _, gradient = rules.plain_gradient(parts.objective, state.params, batch)
    known = AscentInput(
        gradient=gradient,
        params=state.params,
        moments=rule.moments(state.optimizer, state.params),
        state=state.rule[0],
        step=state.step,
    )
    epsilon, _ = perturbation(rule.ascent, known, rule.switches.radius(state.step), rule.switches)
    return jax.tree.map(jnp.add, state.params, epsilon)


def _rms(x: jax.Array) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)))))
