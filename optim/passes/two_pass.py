"""The two-pass rule that the methods share: gradients at theta, a perturbation, and a second pass there."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from steppe.optim.ascent import Ascent, AscentInput
from steppe.optim.base import Moments
from steppe.optim.masks import by_width, dimensions, factors, mask, path_names
from steppe.optim.options import AT_LEAST_ONE, FACTORS, NOT_NEGATIVE, PART, PATTERNS, Option, one_of, options
from steppe.optim.passes.first_pass import FirstPass, Residuals, whole
from steppe.optim.passes.second_pass import PassInput, SecondPass
from steppe.optim.rule import (
    Anchor,
    Objective,
    Tree,
    accumulate,
    check_floating,
    cosine,
    inner,
    microbatched,
    no_square,
    norm,
    plain_pass,
    ratio,
    report,
)


class Switches(NamedTuple):
    """The settings that all methods share. A field annotated with an Option is the config key optim.NAME.

    rho: radius, or step -> radius. start, stop, every: the steps that perturb. All others, and steps with rho = 0,
    return the base gradient or SecondPass.reuse of it. microbatches: parts of a batch. rho_factors: see masks.factors.
    widening: width / base width under mup, see `widened`; else 1. matrix_axes: see layer_scale. clip_norm: bound on the
    ascent gradient and on the returned gradient, each separately; None if the base clips. groups: {name: regex over
    parameter paths}; the report has each group's share of |epsilon|^2.
    """

    rho: float | Callable = 0.0
    start: int = 0
    stop: int | None = None
    every: Annotated[int, Option("perturb every n-th step; other steps use the base gradient", *AT_LEAST_ONE)] = 1
    microbatches: int = 1
    ascent_over: Annotated[
        str,
        Option(
            "data of one perturbation: the whole batch, each microbatch (m-sharpness), or a subset of each microbatch",
            *one_of("global", "microbatch", "subset"),
        ),
    ] = "global"
    ascent_fraction: Annotated[
        float, Option("ascent_over = subset: fraction of each microbatch's sequences for the ascent", *PART)
    ] = 1.0
    perturb: Annotated[
        tuple, Option("regexes over parameter paths; parameters that match one are perturbed", *PATTERNS)
    ] = (".*",)
    layerwise_rho: Annotated[
        str,
        Option(
            "scales rho per parameter, by |theta_l| (norm) or 1 / sqrt(fan-in) (width); the total length stays rho",
            *one_of("none", "norm", "width"),
        ),
    ] = "none"
    rho_factors: Annotated[
        tuple,
        Option(
            'per-group rho, such as ("^embed=0.1",): each rule perturbs its group by its factor times rho', *FACTORS
        ),
    ] = ()
    rho_budget: Annotated[
        float,
        Option(
            "most nats that the perturbation may add to the loss, to first order; longer ones are shortened; 0: no "
            "limit (LE-SAM, arXiv 2605.10183: along the gradient rho = min(budget / |g|, rho))",
            *NOT_NEGATIVE,
        ),
    ] = 0.0
    widening: float = 1.0
    matrix_axes: Callable | None = None
    clip_norm: float | None = None
    groups: Mapping[str, str] = {}

    def radius(self, step: jax.Array) -> float | jax.Array:
        """rho at a step."""
        return self.rho(step) if callable(self.rho) else self.rho

    def active(self, step: jax.Array) -> jax.Array | None:
        """Whether this step perturbs; None if every step does, so that no conditional is compiled."""
        tests = [self.radius(step) > 0] if callable(self.rho) else []
        if self.start > 0:
            tests.append(step >= self.start)
        if self.stop is not None:
            tests.append(step < self.stop)
        if self.every > 1:
            tests.append((step - self.start) % self.every == 0)
        return jnp.all(jnp.stack([jnp.asarray(test) for test in tests]), axis=0) if tests else None

    def perturbing(self, steps: int) -> float:
        """The share of the first `steps` steps that perturb."""
        active = self.active(jnp.arange(steps))
        return 1.0 if active is None else float(jnp.mean(active))


SWITCHES = options(Switches)


class Plain(NamedTuple):
    """The plain gradient as a Rule. Uses only microbatches, clip_norm and groups of the switches."""

    switches: Switches

    def init(self, params: Tree) -> Tree:
        """No state."""
        check_floating(params)
        return ()

    def gradient(self, objective, params, batch, optimizer_state, rule_state, step):
        """See Rule.gradient."""
        loss, clean, aux, spread = plain_pass(objective, params, batch, self.switches.microbatches)
        known = {"epsilon_norm": 0.0, "cosine": 1.0, "microbatch_norm": spread}
        facts = report(loss, norm(clean), clean, groups=self.switches.groups, **known)
        return _clip(clean, self.switches.clip_norm), rule_state, _with_aux(facts, aux)

    def perturbing(self, steps: int) -> float:
        """See Rule.perturbing."""
        return 0.0


class StepInput(NamedTuple):
    """The inputs of a step, except the rule's state. moments: of the base; all None if the ascent needs none."""

    objective: Objective
    params: Tree
    batch: Tree
    moments: Moments
    step: jax.Array


class TwoPass(NamedTuple):
    """The rule that perturbs along `ascent` and returns the gradient of the `second` pass at that point.

    moments(optimizer_state, params) -> optim.base.Moments. Rule state: (ascent state, memory of SecondPass.remember).
    """

    ascent: Ascent
    second: SecondPass
    switches: Switches
    moments: Callable[[Tree, Tree], Moments]
    first: FirstPass = whole

    def init(self, params: Tree) -> Tree:
        """The state before the first step. Raises ValueError for parameters that it cannot use."""
        check_floating(params)
        mask(params, self.switches.perturb)
        factors(params, self.switches.rho_factors)
        return self.ascent.init(params), jax.tree.map(jnp.zeros_like, params) if self.second.remember else ()

    def gradient(self, objective, params, batch, optimizer_state, rule_state, step):
        """See Rule.gradient."""
        needed = {"first", "second"} & set(self.ascent.needs)
        given = StepInput(
            objective=objective, params=params, batch=batch, step=step,
            moments=self.moments(optimizer_state, params) if needed else Moments(),
        )  # fmt: skip
        active = self.switches.active(step)
        if active is None:
            returned, state, facts = self.perturbed_step(given, rule_state)
        else:
            perturbed, base = partial(self.perturbed_step, given), partial(self.base_step, given)
            returned, state, facts = lax.cond(active, perturbed, base, rule_state)
        keep_old = facts["nonfinite"] > 0
        returned = _clip(returned, self.switches.clip_norm)
        return returned, jax.tree.map(lambda new, old: jnp.where(keep_old, old, new), state, rule_state), facts

    def perturbing(self, steps: int) -> float:
        """See Rule.perturbing."""
        return self.switches.perturbing(steps)

    def perturbed_step(self, given: StepInput, state: Tree) -> tuple[Tree, Tree, dict]:
        """(gradient, state, report) of a step that perturbs."""
        microbatches, remember = self.switches.microbatches, self.second.remember
        if self.switches.ascent_over != "microbatch":
            climbed, (returned, clean, facts), aux = self.one_epsilon(given, microbatches, state[0], given.batch)
        else:
            parts, shares = microbatched(given.objective, given.batch, microbatches)
            each = partial(self.one_epsilon, given, 1)
            climbed, (returned, clean, facts), aux = accumulate(each, state[0], parts, shares)
        memory = _as(remember(clean, returned), given.params) if remember else ()
        return returned, (climbed, memory), _with_aux(facts, aux)

    def base_step(self, given: StepInput, state: Tree) -> tuple[Tree, Tree, dict]:
        """Like perturbed_step, for the other steps: the base gradient, or SecondPass.reuse of it."""
        base = Plain(self.switches._replace(clip_norm=None))
        clean, _, facts = base.gradient(given.objective, given.params, given.batch, None, (), given.step)
        if not self.second.reuse:
            return clean, state, facts
        # Outside start and stop, and at rho = 0, the method is its base.
        within = self.switches._replace(every=1).active(given.step)
        returned = _as(self.second.reuse(clean, state[1]), given.params)
        if within is not None:
            returned = jax.tree.map(lambda r, c: jnp.where(within, r, c), returned, clean)
        return returned, state, {**facts, "cosine": cosine(clean, returned).astype(jnp.float32)}

    def one_epsilon(self, given: StepInput, microbatches: int, state: Tree, batch: Tree):
        """(ascent state, (gradient, clean gradient or (), report), aux) of a batch with one perturbation."""
        params, objective = given.params, given.objective
        parts, weights = microbatched(objective, batch, microbatches)
        climbed_readout = (self.second.only_climbs and objective.ascent_readout) or objective.readout
        at_theta = objective._replace(readout=climbed_readout)

        def first(before, part):
            if weights is None:
                gradients, residuals = self.first(at_theta, params, part)
                return before, gradients, (residuals, jnp.nan)
            gradients, residuals = self.first(at_theta, objective.after(params, before), part)
            # The scan over microbatches stacks residuals: keep hidden states, but neither theta nor activations.
            slim, clean = _slim(residuals, self.second.anchored), gradients.clean
            square = before if clean is None else inner(clean, clean)
            return square, gradients, (slim, square)

        _, gradients, (residuals, squares) = accumulate(first, no_square(params), parts, weights)
        known = AscentInput(
            gradient=_clip(gradients.ascent, self.switches.clip_norm), params=params, moments=given.moments,
            state=state, step=given.step,
        )  # fmt: skip
        epsilon, climbed = perturbation(self.ascent, known, self.switches.radius(given.step), self.switches)
        # Materialise theta + epsilon once, in the parameters' dtype, instead of once per use.
        perturbed = lax.optimization_barrier(jax.tree.map(jnp.add, params, epsilon))
        clean = gradients.clean
        measured = {
            "gradient_norm": None if clean is None else norm(clean), "epsilon_norm": norm(epsilon),
            "microbatch_norm": jnp.nan if clean is None or weights is None else jnp.sqrt(jnp.sum(weights * squares)),
            **survival(params, perturbed, epsilon, objective.compute_dtype), **shares(epsilon, self.switches.groups),
        }  # fmt: skip
        # The second pass waits for all reductions of the first. isnan, so that a NaN does not spread.
        scalars = [value for value in (gradients.loss, *measured.values()) if value is not None]
        perturbed = objective.after(perturbed, jnp.sum(jnp.isnan(jnp.stack(scalars))))
        second = partial(self.second_pass, given, epsilon, perturbed)
        first_aux, residuals = residuals.aux, residuals._replace(aux=None)
        _, (perturbed_loss, vectors), aux = accumulate(second, (), residuals, weights)

        returned = self.second.combine(gradients, vectors) if self.second.combine else vectors
        returned = _as(returned, params)
        facts = report(
            perturbed_loss if gradients.loss is None else gradients.loss, measured.pop("gradient_norm"), returned,
            perturbed_loss=perturbed_loss, cosine=jnp.nan if clean is None else cosine(clean, returned),
            groups=self.switches.groups, **measured,
        )  # fmt: skip
        aux = aux if first_aux is None else first_aux
        return climbed, (returned, clean if self.second.remember else (), facts), aux

    def second_pass(self, given: StepInput, epsilon: Tree, perturbed: Tree, _, residuals: Residuals):
        """((), (perturbed loss, vectors), aux) of one microbatch."""
        objective = given.objective
        # None if the path is not anchored
        anchor = cast(Anchor, residuals.anchor and residuals.anchor._replace(params=given.params))
        passed = PassInput(
            objective=objective, params=given.params, epsilon=epsilon, perturbed=perturbed, batch=residuals.batch,
            anchor=anchor, loss=residuals.loss, pull=residuals.pull,
        )  # fmt: skip
        # Another collective could overtake one inside a branch, see steppe.lm.model.hlo.unordered.
        path = self.second.path if objective.sharded else _late(self.second.path)
        loss, vectors, aux = path(passed)
        return (), (loss, vectors), aux


def perturbation(ascent: Ascent, known: AscentInput, rho: ArrayLike, switches: Switches) -> tuple[Tree, Tree]:
    """(epsilon, ascent state): the direction, masked and scaled to length rho; zero if the direction is zero."""
    chosen = mask(known.params, switches.perturb)

    def masked(tree):
        return tree if tree is None else jax.tree.map(lambda x, keep: x if keep else jnp.zeros_like(x), tree, chosen)

    vector, length, state = ascent.direction(known._replace(gradient=masked(known.gradient)))
    vector = masked(vector)
    if switches.layerwise_rho != "none":
        vector, length = layer_scale(switches.layerwise_rho, vector, known.params, switches.matrix_axes), None
    measured = vector
    if switches.widening != 1:
        assert ascent.widths is not None, "optim.methods.method refuses such a direction"
        vector, measured = widened(vector, ascent.widths, switches)
    scales = _scales(measured, length, rho, switches.rho_factors)
    if switches.rho_budget:
        rise = inner(known.gradient, jax.tree.map(jnp.multiply, scales, vector))
        allowed = jnp.minimum(1.0, ratio(switches.rho_budget, jnp.maximum(rise, 0.0)))
        scales = jax.tree.map(lambda scale: scale * allowed, scales)
    return jax.tree.map(lambda s, v, p: (s * v).astype(p.dtype), scales, vector, known.params), state


def widened(vector: Tree, widths: tuple[float, float], switches: Switches) -> tuple[Tree, Tree]:
    """(the direction scaled for mup, the tree whose l2 norm rho measures); at the base width both are the direction.

    Under mu-P^2 (Haas et al. 2024, arXiv 2411.00075) perturbations must scale with width like the updates of mup:
    entries of matrices fall as 1 / width, other entries stay constant. `widths`, from optim.ascent.Ascent, has the
    powers that achieve this. The norm of a parameter with one long axis then grows as sqrt(width). The measured tree
    removes that growth, so that no kind of parameter dominates at large width.
    """
    vectors, matrices = widths
    scaled = by_width(vector, switches.matrix_axes, switches.widening, vectors, matrices)
    return scaled, by_width(scaled, switches.matrix_axes, switches.widening, -0.5, 0)


def _scales(vector: Tree, length: jax.Array | None, rho: ArrayLike, rules: tuple[str, ...]) -> Tree:
    """The factor of each leaf of the direction.

    length None: each group of leaves gets the l2 length factor * rho. Else every leaf gets factor * rho / length.
    """
    groups, each = factors(vector, rules)
    leaves = list(zip(jax.tree.leaves(vector), jax.tree.leaves(groups), strict=True))
    lengths = {
        group: norm([leaf for leaf, number in leaves if number == group]) if length is None else length
        for group in sorted({number for _, number in leaves})
    }
    scales = {group: ratio(rho, long, 0.0) for group, long in lengths.items()}
    return jax.tree.map(lambda group, factor: scales[group] * factor if factor != 1 else scales[group], groups, each)


def layer_scale(kind: str, vector: Tree, params: Tree, matrix_axes: Callable | None = None) -> Tree:
    """Rescales the vector per weight matrix; the caller normalises the result to rho.

    kind: "norm" gives each matrix a length proportional to its parameter's norm. "width" multiplies by
    1 / sqrt(fan-in), so that wide matrices get no larger share (see mu-P^2, Haas et al. 2024). matrix_axes: as in
    optim.base; axes that are neither reduced nor output stack matrices. Default: all axes but the last are reduced.
    Vectors have fan-in 1.
    """

    def by_norm(v, p, dims):
        over = None if dims is None else dims[0] + dims[1]
        length = lambda x: jnp.sqrt(jnp.sum(x**2, axis=over, keepdims=True))  # noqa: E731
        return v * ratio(length(p), length(v), 0.0)

    def by_width(v, p, dims):
        fan_in = 1 if dims is None else math.prod(p.shape[axis] for axis in dims[0])
        return v / fan_in**0.5

    leaves, structure = jax.tree.flatten(params)
    dims = dimensions(params, matrix_axes)
    scaled = map({"norm": by_norm, "width": by_width}[kind], jax.tree.leaves(vector), leaves, dims)
    return jax.tree.unflatten(structure, scaled)


def survival(params: Tree, perturbed: Tree, epsilon: Tree, dtype) -> dict:
    """How much of epsilon survives the cast to the compute dtype: norm ratio and cosine."""

    def cast(x):
        # reduce_precision, because XLA may drop a pair of casts to keep excess precision.
        info = jnp.finfo(dtype or x.dtype)
        return lax.reduce_precision(x, info.nexp, info.nmant)

    moved = jax.tree.map(lambda q, p: cast(q) - cast(p), perturbed, params)
    return {"survival_norm": ratio(norm(moved), norm(epsilon)), "survival_cosine": cosine(moved, epsilon)}


def shares(epsilon: Tree, groups: Mapping[str, str]) -> dict:
    """The share of |epsilon|^2 in its largest row (epsilon_row) and in each group of parameters (epsilon_GROUP).

    A row runs along a parameter's last axis: the entries of one token in a table, or the output weights of one unit.
    """

    def squares(e):
        wide = e.astype(jnp.promote_types(e.dtype, jnp.float32)) ** 2
        return jnp.sum(wide, axis=-1) if e.ndim else wide

    rows = jax.tree.leaves(jax.tree.map(squares, epsilon))
    names, sums = jax.tree.leaves(path_names(epsilon)), [jnp.sum(row) for row in rows]
    largest = jnp.max(jnp.stack([jnp.max(row, initial=0.0) for row in rows]))
    parts = {
        f"epsilon_{group}": sum(part for name, part in zip(names, sums, strict=True) if re.search(regex, name))
        for group, regex in groups.items()
    }
    return {name: ratio(part, sum(sums), 0.0) for name, part in {"epsilon_row": largest, **parts}.items()}


def _late(path: Callable) -> Callable:
    """A second pass without memory for its buffers during the first pass.

    The stacked outputs of a scan start as constants. XLA on CPU allocates those of all passes when the step begins,
    which doubles the memory of activations. In a branch with an opaque condition it allocates them when the pass
    begins. XLA on TPU does not need this, and a branch would stop it from sharing memory.
    """

    def run(passed):
        plain = jax.jit(lambda p: path(passed._replace(perturbed=p)), inline=True)  # traced once for its three uses

        def behind_a_branch(params):
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(plain, params))
            return lax.cond(lax.optimization_barrier(True), plain, lambda _: nothing, params)

        return lax.platform_dependent(passed.perturbed, cpu=behind_a_branch, default=plain)

    return run


def _slim(residuals: Residuals, anchored: bool) -> Residuals:
    anchor = residuals.anchor._replace(params=None) if anchored and residuals.anchor else None
    return residuals._replace(pull=None, anchor=anchor)


def _with_aux(facts: dict, aux: Tree) -> dict:
    return facts if aux is None else {**facts, "aux": aux}


def _as(tree: Tree, params: Tree) -> Tree:
    return jax.tree.map(lambda x, p: x.astype(p.dtype), tree, params)


def _clip(gradient: Tree, bound: float | None) -> Tree:
    if gradient is None or not bound:
        return gradient
    return optax.tree.scale(bound / jnp.maximum(norm(gradient), bound), gradient)
