"""The two-pass rule: look at theta, perturb, take the descent path there. Every method is one call of it."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optim import looks
from optim.ascent import Ascent, Seen
from optim.base import Moments
from optim.descent import At, Descent
from optim.masks import path_names
from optim.rule import Rule, Tree, accumulate, inner, microbatched, norm, plain_gradient, report

LAYERWISE = ("none", "norm", "width")
ASCENT_OVER = ("global", "microbatch", "subset")
CLIP_ORDER = ("after", "before")


class Switches(NamedTuple):
    """What every method takes beside its own parts.

    rho: step -> radius (or a constant). start, stop, every: steps on which the method perturbs; on the others, and
    where a schedule gives rho = 0, the base gradient is returned (or what Descent.reuse makes of it).
    microbatches: parts in which the batch is processed. ascent_over: "global" one epsilon from the whole batch,
    "microbatch" one per part (m-sharpness), "subset" one from ascent_fraction of the sequences.
    perturb: regexes over parameter paths, one must match. layerwise_rho: scales each parameter's share of epsilon.
    clip_norm: bound on the clean gradient before it is climbed or combined; None leaves it.
    """

    rho: float | Callable = 0.0
    start: int = 0
    stop: int | None = None
    every: int = 1
    microbatches: int = 1
    ascent_over: str = "global"
    ascent_fraction: float = 1.0
    perturb: tuple[str, ...] = (".*",)
    layerwise_rho: str = "none"
    clip_norm: float | None = None


def plain(switches: Switches) -> Rule:
    """The base optimizer's own gradient; of the switches only microbatches and clip_norm matter."""

    def gradient(objective, params, batch, optimizer_state, rule_state, step):
        loss, clean = plain_gradient(objective, params, batch, switches.microbatches)
        clean, length = _clip(clean, switches.clip_norm)
        return clean, rule_state, report(loss, length, clean, epsilon_norm=0.0, cosine=1.0)

    return Rule(lambda params: (), gradient)


def sharpness_aware(
    ascent: Ascent, descent: Descent, switches: Switches, moments: Callable, look: looks.Look = looks.whole
) -> Rule:
    """The rule climbing `ascent` and returning `descent`'s gradient there.

    moments(optimizer_state) -> optim.base.Moments. Rule state: (ascent state, descent memory).
    """
    rho = switches.rho if callable(switches.rho) else lambda step: switches.rho
    base = plain(switches)

    def init(params):
        return ascent.init(params), jax.tree.map(jnp.zeros_like, params) if descent.remember else ()

    def gradient(objective, params, batch, optimizer_state, rule_state, step):
        seen_moments = moments(optimizer_state) if {"first", "second"} & set(ascent.needs) else Moments()

        def one_epsilon(state, batch, microbatches):
            parts, shares = microbatched(objective, batch, microbatches)

            def first(_, part):
                looked, kept = look(objective, params, part)
                # A pullback holds the activations of one part; the scan over several must not stack them.
                return (), looked, kept if shares is None else kept._replace(pull=None)

            _, looked, kept = accumulate(first, (), parts, shares)
            clean, length = _clip(looked.clean, switches.clip_norm)
            looked = looked._replace(clean=clean, ascent=_clip(looked.ascent, switches.clip_norm)[0])
            seen = Seen(looked.ascent, params, seen_moments, state[0], step)
            epsilon, climbed = perturbation(ascent, seen, rho(step), switches)
            # Materialise theta + epsilon once, in the parameters' own dtype, rather than once per use.
            perturbed = lax.optimization_barrier(jax.tree.map(jnp.add, params, epsilon))

            def second(_, kept):
                at = At(objective, params, epsilon, perturbed, kept.batch, kept.anchor, kept.loss, kept.pull)
                return (), descent.path(at), ()

            _, (perturbed_loss, vectors), _ = accumulate(second, (), kept, shares)
            returned = descent.combine(looked, vectors)
            memory = descent.remember(clean, returned) if descent.remember else ()
            facts = report(
                perturbed_loss if looked.loss is None else looked.loss, length, returned, perturbed_loss=perturbed_loss,
                epsilon_norm=norm(epsilon), cosine=jnp.nan if clean is None else _cosine(clean, returned),
                **survival(params, perturbed, epsilon, objective.compute_dtype),
            )  # fmt: skip
            return (climbed, memory), (returned, facts), ()

        def perturbed_step(state):
            if switches.ascent_over != "microbatch":
                state, (returned, facts), _ = one_epsilon(state, batch, switches.microbatches)
            else:
                parts, shares = microbatched(objective, batch, switches.microbatches)
                state, (returned, facts), _ = accumulate(lambda s, part: one_epsilon(s, part, 1), state, parts, shares)
            return returned, state, facts

        def base_step(state):
            returned, _, facts = base.gradient(objective, params, batch, optimizer_state, (), step)
            if descent.reuse:
                returned = descent.reuse(returned, state[1])
            return returned, state, facts

        active = is_active(switches, rho, step)
        returned, state, facts = (
            perturbed_step(rule_state) if active is None else lax.cond(active, perturbed_step, base_step, rule_state)
        )
        keep_old = facts["nonfinite"] > 0
        return returned, jax.tree.map(lambda new, old: jnp.where(keep_old, old, new), state, rule_state), facts

    return Rule(init, gradient)


def is_active(switches: Switches, rho: Callable, step: jax.Array) -> jax.Array | None:
    """Whether this step perturbs; None when every step does, so that no conditional is compiled."""
    tests = [rho(step) > 0] if callable(switches.rho) else []
    if switches.start > 0:
        tests.append(step >= switches.start)
    if switches.stop is not None:
        tests.append(step < switches.stop)
    if switches.every > 1:
        tests.append((step - switches.start) % switches.every == 0)
    return jnp.all(jnp.stack(tests)) if tests else None


def perturbation(ascent: Ascent, seen: Seen, rho: jax.Array, switches: Switches) -> tuple[Tree, Tree]:
    """(epsilon, ascent state): the direction, masked, scaled per parameter, of length rho; zero where the length is."""
    chosen = jax.tree.map(lambda name: any(re.search(r, name) for r in switches.perturb), path_names(seen.params))

    def masked(tree):
        return tree if tree is None else jax.tree.map(lambda x, keep: x if keep else jnp.zeros_like(x), tree, chosen)

    vector, length, state = ascent.direction(seen._replace(gradient=masked(seen.gradient)))
    vector = masked(vector)
    if switches.layerwise_rho != "none":
        vector, length = jax.tree.map(layer_scale(switches.layerwise_rho), vector, seen.params), None
    length = norm(vector) if length is None else length
    scale = jnp.where(length > 0, rho / jnp.where(length > 0, length, 1.0), 0.0)
    return jax.tree.map(lambda v, p: (scale * v).astype(p.dtype), vector, seen.params), state


def layer_scale(kind: str) -> Callable:
    """(vector, parameter) -> vector rescaled for one parameter; the whole is renormalised to rho afterwards.

    norm: in proportion to the parameter's own norm. width: by 1 / sqrt(fan-in), so that wide matrices are not
    perturbed out of proportion (the concern of mu-P^2, Haas et al. 2024). Fan-in is the second last dimension.
    """

    def by_norm(vector, parameter):
        length = jnp.sqrt(jnp.sum(vector**2))
        return vector * jnp.where(length > 0, jnp.sqrt(jnp.sum(parameter**2)) / jnp.where(length > 0, length, 1.0), 0.0)

    def by_width(vector, parameter):
        return vector / jnp.sqrt(parameter.shape[-2] if parameter.ndim > 1 else 1.0)

    return {"norm": by_norm, "width": by_width}[kind]


def survival(params: Tree, perturbed: Tree, epsilon: Tree, dtype) -> dict:
    """How much of epsilon is left after the cast to the compute dtype: norm ratio and cosine."""

    def cast(x):
        # reduce_precision, because XLA may drop a pair of casts (it is allowed to keep excess precision).
        info = jnp.finfo(dtype or x.dtype)
        return lax.reduce_precision(x, info.nexp, info.nmant)

    moved = jax.tree.map(lambda q, p: cast(q) - cast(p), perturbed, params)
    return {"survival_norm": norm(moved) / norm(epsilon), "survival_cosine": _cosine(moved, epsilon)}


def _cosine(a: Tree, b: Tree) -> jax.Array:
    return inner(a, b) / (norm(a) * norm(b))


def _clip(gradient: Tree, bound: float | None) -> tuple[Tree, jax.Array]:
    if gradient is None:
        return None, None
    length = norm(gradient)
    if not bound:
        return gradient, length
    return optax.tree.scale(jnp.minimum(1.0, bound / jnp.maximum(length, 1e-30)), gradient), length
