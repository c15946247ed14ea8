"""The two-pass rule: look at theta, perturb, take the descent path there. Every method is one call of it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax.contrib import MuonDimensionNumbers

from steppe.optim import first_pass as looks
from steppe.optim.ascent import Ascent, Seen
from steppe.optim.base import Moments
from steppe.optim.masks import mask
from steppe.optim.rule import (
    Rule,
    Tree,
    accumulate,
    check_floating,
    cosine,
    microbatched,
    norm,
    plain_gradient,
    ratio,
    report,
)
from steppe.optim.second_pass import At, Descent

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
    matrix_axes: see layer_scale. clip_norm: bound on the gradient climbed and on the one returned, each by itself;
    None leaves both, for a base that clips what it is given.
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
    matrix_axes: Callable | None = None
    clip_norm: float | None = None


def plain(switches: Switches) -> Rule:
    """The base optimizer's own gradient; of the switches only microbatches and clip_norm matter."""

    def init(params):
        check_floating(params)
        return ()

    def gradient(objective, params, batch, optimizer_state, rule_state, step):
        loss, clean = plain_gradient(objective, params, batch, switches.microbatches)
        facts = report(loss, norm(clean), clean, epsilon_norm=0.0, cosine=1.0)
        return _clip(clean, switches.clip_norm), rule_state, facts

    return Rule(init, gradient)


def sharpness_aware(
    ascent: Ascent, descent: Descent, switches: Switches, moments: Callable, look: looks.Look = looks.whole
) -> Rule:
    """The rule climbing `ascent` and returning `descent`'s gradient there.

    moments(optimizer_state, params) -> optim.base.Moments. Rule state: (ascent state, descent memory).
    """
    rho = switches.rho if callable(switches.rho) else lambda step: switches.rho
    base = plain(switches._replace(clip_norm=None))

    def init(params):
        base.init(params)
        mask(params, switches.perturb)
        return ascent.init(params), jax.tree.map(jnp.zeros_like, params) if descent.remember else ()

    def gradient(objective, params, batch, optimizer_state, rule_state, step):
        needed = {"first", "second"} & set(ascent.needs)
        seen_moments = moments(optimizer_state, params) if needed else Moments()

        def one_epsilon(state, batch, microbatches):
            parts, shares = microbatched(objective, batch, microbatches)

            def first(_, part):
                looked, kept = look(objective, params, part)
                # The scan over several parts stacks what it keeps: hidden states, but neither theta nor activations.
                return (), looked, kept if shares is None else _slim(kept, descent.anchored)

            _, looked, kept = accumulate(first, (), parts, shares)
            seen = Seen(_clip(looked.ascent, switches.clip_norm), params, seen_moments, state, step)
            epsilon, climbed = perturbation(ascent, seen, rho(step), switches)
            # Materialise theta + epsilon once, in the parameters' own dtype, rather than once per use.
            perturbed = lax.optimization_barrier(jax.tree.map(jnp.add, params, epsilon))

            def second(_, kept):
                anchor = kept.anchor and kept.anchor._replace(params=params)
                late = objective._replace(trunk=_late(objective.trunk))
                return (), descent.path(At(late, params, epsilon, perturbed, kept.batch, anchor, *kept[2:])), ()

            _, (perturbed_loss, vectors), _ = accumulate(second, (), kept, shares)
            returned = descent.combine(looked, vectors) if descent.combine else vectors
            returned, clean = _as(returned, params), looked.clean
            facts = report(
                perturbed_loss if looked.loss is None else looked.loss, None if clean is None else norm(clean),
                returned, perturbed_loss=perturbed_loss, epsilon_norm=norm(epsilon),
                cosine=jnp.nan if clean is None else cosine(clean, returned),
                **survival(params, perturbed, epsilon, objective.compute_dtype),
            )  # fmt: skip
            return climbed, (returned, clean if descent.remember else (), facts), ()

        def perturbed_step(state):
            if switches.ascent_over != "microbatch":
                climbed, (returned, clean, facts), _ = one_epsilon(state[0], batch, switches.microbatches)
            else:
                parts, shares = microbatched(objective, batch, switches.microbatches)
                each = lambda state, part: one_epsilon(state, part, 1)  # noqa: E731
                climbed, (returned, clean, facts), _ = accumulate(each, state[0], parts, shares)
            return (
                returned,
                (climbed, _as(descent.remember(clean, returned), params) if descent.remember else ()),
                facts,
            )

        def base_step(state):
            clean, _, facts = base.gradient(objective, params, batch, optimizer_state, (), step)
            if not descent.reuse:
                return clean, state, facts
            # Outside start and stop, and at rho = 0, the method is its base.
            within = is_active(switches._replace(every=1), rho, step)
            reused = _as(descent.reuse(clean, state[1]), params)
            returned = reused if within is None else jax.tree.map(lambda r, c: jnp.where(within, r, c), reused, clean)
            return returned, state, {**facts, "cosine": cosine(clean, returned).astype(jnp.float32)}

        active = is_active(switches, rho, step)
        returned, state, facts = (
            perturbed_step(rule_state) if active is None else lax.cond(active, perturbed_step, base_step, rule_state)
        )
        keep_old = facts["nonfinite"] > 0
        returned = _clip(returned, switches.clip_norm)
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
    return jnp.all(jnp.stack([jnp.asarray(test) for test in tests])) if tests else None


def perturbation(ascent: Ascent, seen: Seen, rho: jax.Array, switches: Switches) -> tuple[Tree, Tree]:
    """(epsilon, ascent state): the direction, masked, scaled per parameter, of length rho; zero where the length is."""
    chosen = mask(seen.params, switches.perturb)

    def masked(tree):
        return tree if tree is None else jax.tree.map(lambda x, keep: x if keep else jnp.zeros_like(x), tree, chosen)

    vector, length, state = ascent.direction(seen._replace(gradient=masked(seen.gradient)))
    vector = masked(vector)
    if switches.layerwise_rho != "none":
        vector, length = layer_scale(switches.layerwise_rho, vector, seen.params, switches.matrix_axes), None
    scale = ratio(rho, norm(vector) if length is None else length, 0.0)
    return jax.tree.map(lambda v, p: (scale * v).astype(p.dtype), vector, seen.params), state


def layer_scale(kind: str, vector: Tree, params: Tree, matrix_axes: Callable | None = None) -> Tree:
    """The vector rescaled per weight matrix; the whole is renormalised to rho afterwards.

    norm: in proportion to the matrix's own norm. width: by 1 / sqrt(fan-in), so that wide matrices are not perturbed
    out of proportion (the concern of mu-P^2, Haas et al. 2024).
    matrix_axes(params) -> tree of optax.contrib.MuonDimensionNumbers or None, as optim.base takes it: axes that are
    neither reduced nor output stack matrices. Default: all axes but the last are reduced. Vectors have fan-in 1.
    """

    def axes(p):
        return MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1) if p.ndim > 1 else None

    def by_norm(v, p, dims):
        over = None if dims is None else dims_of(dims.reduction_axis) + dims_of(dims.output_axis)
        length = lambda x: jnp.sqrt(jnp.sum(x**2, axis=over, keepdims=True))  # noqa: E731
        return v * ratio(length(p), length(v), 0.0)

    def by_width(v, p, dims):
        fan_in = 1 if dims is None else math.prod(p.shape[axis] for axis in dims_of(dims.reduction_axis))
        return v / fan_in**0.5

    def dims_of(axis):
        return (axis,) if isinstance(axis, int) else tuple(axis)

    leaves, structure = jax.tree.flatten(params)
    found = matrix_axes(params) if matrix_axes else jax.tree.map(axes, params)
    dims = jax.tree.leaves(found, is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers))
    scaled = map({"norm": by_norm, "width": by_width}[kind], jax.tree.leaves(vector), leaves, dims)
    return jax.tree.unflatten(structure, scaled)


def survival(params: Tree, perturbed: Tree, epsilon: Tree, dtype) -> dict:
    """How much of epsilon is left after the cast to the compute dtype: norm ratio and cosine."""

    def cast(x):
        # reduce_precision, because XLA may drop a pair of casts (it is allowed to keep excess precision).
        info = jnp.finfo(dtype or x.dtype)
        return lax.reduce_precision(x, info.nexp, info.nmant)

    moved = jax.tree.map(lambda q, p: cast(q) - cast(p), perturbed, params)
    return {"survival_norm": ratio(norm(moved), norm(epsilon)), "survival_cosine": cosine(moved, epsilon)}


def _late(trunk: Callable) -> Callable:
    """The trunk of a second pass, whose buffers are not to be there during the first.

    A scan's stacked outputs start as constants, and XLA on CPU makes those of all passes when the step begins, which
    doubles the activations held. Inside the branch of a condition it cannot see through, they are made when the pass
    begins. XLA on TPU needs no such help, and a branch keeps it from sharing memory.
    """

    def run(params, batch):
        def behind_a_branch(params):
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(trunk, params, batch))
            return lax.cond(lax.optimization_barrier(True), lambda p: trunk(p, batch), lambda _: nothing, params)

        return lax.platform_dependent(params, cpu=behind_a_branch, default=lambda p: trunk(p, batch))

    return run


def _slim(kept: looks.Kept, anchored: bool) -> looks.Kept:
    return kept._replace(pull=None, anchor=kept.anchor._replace(params=None) if anchored else None)


def _as(tree: Tree, params: Tree) -> Tree:
    return jax.tree.map(lambda x, p: x.astype(p.dtype), tree, params)


def _clip(gradient: Tree, bound: float | None) -> Tree:
    if gradient is None or not bound:
        return gradient
    return optax.tree.scale(bound / jnp.maximum(norm(gradient), bound), gradient)
