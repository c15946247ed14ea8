"""The two-pass rule: gradients at theta, a perturbation, the second pass there. Every method is one of it."""

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
from steppe.optim.first_pass import FirstPass, Residuals, whole
from steppe.optim.masks import by_width, dimensions, factors, mask, path_names
from steppe.optim.options import AT_LEAST_ONE, FACTORS, NOT_NEGATIVE, PART, PATTERNS, Option, one_of, options
from steppe.optim.rule import (
    Anchor,
    Objective,
    Tree,
    accumulate,
    check_floating,
    cosine,
    inner,
    microbatched,
    norm,
    plain_pass,
    ratio,
    report,
)
from steppe.optim.second_pass import PassInput, SecondPass


class Switches(NamedTuple):
    """The settings of every method. A field that is annotated with an Option is a key of every config, optim.NAME.

    rho: step -> radius (or a constant). start, stop, every: steps on which the method perturbs; on the others, and
    where a schedule gives rho = 0, the base gradient is returned (or what SecondPass.reuse makes of it).
    microbatches: parts in which the batch is processed. rho_factors: see masks.factors. widening: the width over that
    of mup's base, see `widened`; 1 for the standard parametrisation. matrix_axes: see layer_scale.
    clip_norm: bound on the gradient climbed and on the one returned, each by itself; None leaves both, for a base that
    clips what it is given. groups: {name: regex over parameter paths} of which the report says what share of
    |epsilon|^2 they have.
    """

    rho: float | Callable = 0.0
    start: int = 0
    stop: int | None = None
    every: Annotated[int, Option("perturb on every k-th step, the base gradient in between", *AT_LEAST_ONE)] = 1
    microbatches: int = 1
    ascent_over: Annotated[
        str,
        Option(
            "what one perturbation is of: the whole batch, each microbatch (m-sharpness), or part of each microbatch",
            *one_of("global", "microbatch", "subset"),
        ),
    ] = "global"
    ascent_fraction: Annotated[
        float, Option("with subset: fraction of each microbatch's sequences used for the ascent", *PART)
    ] = 1.0
    perturb: Annotated[
        tuple, Option("regexes over parameter paths: a parameter is perturbed if one matches", *PATTERNS)
    ] = (".*",)
    layerwise_rho: Annotated[
        str,
        Option(
            "scaling of rho per parameter: norm by |theta_l|, width by 1 / sqrt(fan-in); the length stays rho",
            *one_of("none", "norm", "width"),
        ),
    ] = "none"
    rho_factors: Annotated[
        tuple,
        Option(
            'rho of groups of parameters, as ("^embed=0.1",): each rule a group, perturbed by its factor times rho',
            *FACTORS,
        ),
    ] = ()
    rho_budget: Annotated[
        float,
        Option(
            "nats that the perturbation may add to the loss, to first order: else it is shortened; 0: any "
            "(LE-SAM, arXiv 2605.10183: along the gradient rho = min(budget / |g|, rho))",
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
        """Whether this step perturbs; None when every step does, so that no conditional is compiled."""
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


def table() -> str:
    """SWITCHES as a Markdown table."""
    lines = ["switch | default | accepted | meaning", "|".join(["---"] * 4)]
    for name, (_, default, option) in SWITCHES.items():
        meaning = option.meaning.replace("|", "\\|")
        lines.append(f"`{name}` | `{default}` | {option.accepted} | {meaning}")
    return "".join(f"| {line} |\n" for line in lines)


class Plain(NamedTuple):
    """The base optimizer's own gradient, as a Rule; of the switches only microbatches and clip_norm matter."""

    switches: Switches

    def init(self, params: Tree) -> Tree:
        """No state."""
        check_floating(params)
        return ()

    def gradient(self, objective, params, batch, optimizer_state, rule_state, step):
        """See Rule.gradient."""
        loss, clean, aux = plain_pass(objective, params, batch, self.switches.microbatches)
        facts = report(loss, norm(clean), clean, groups=self.switches.groups, epsilon_norm=0.0, cosine=1.0)
        return _clip(clean, self.switches.clip_norm), rule_state, _with_aux(facts, aux)

    def perturbing(self, steps: int) -> float:
        """See Rule.perturbing."""
        return 0.0


class StepInput(NamedTuple):
    """What a step is given, beside the rule's state; moments: those of the base, None in each where none is needed."""

    objective: Objective
    params: Tree
    batch: Tree
    moments: Moments
    step: jax.Array


class TwoPass(NamedTuple):
    """The rule that climbs `ascent` and returns the gradient that `second` finds there.

    moments(optimizer_state, params) -> optim.base.Moments. Its state: (ascent state, what `second` remembers).
    """

    ascent: Ascent
    second: SecondPass
    switches: Switches
    moments: Callable[[Tree, Tree], Moments]
    first: FirstPass = whole

    def init(self, params: Tree) -> Tree:
        """The state before the first step. Raises ValueError for parameters it cannot take."""
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
        """The same of a step between: the base gradient, or what the second pass makes of it and its memory."""
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
        """(ascent state, (gradient, clean gradient or (), report), aux) of a batch that shares one perturbation."""
        params, objective = given.params, given.objective
        parts, weights = microbatched(objective, batch, microbatches)
        climbed_readout = (self.second.only_climbs and objective.ascent_readout) or objective.readout
        at_theta = objective._replace(readout=climbed_readout)

        def first(_, part):
            gradients, residuals = self.first(at_theta, params, part)
            # The scan over several parts stacks what is kept: hidden states, but neither theta nor activations.
            return (), gradients, residuals if weights is None else _slim(residuals, self.second.anchored)

        _, gradients, residuals = accumulate(first, (), parts, weights)
        known = AscentInput(
            gradient=_clip(gradients.ascent, self.switches.clip_norm), params=params, moments=given.moments,
            state=state, step=given.step,
        )  # fmt: skip
        epsilon, climbed = perturbation(self.ascent, known, self.switches.radius(given.step), self.switches)
        # Materialise theta + epsilon once, in the parameters' own dtype, rather than once per use.
        perturbed = lax.optimization_barrier(jax.tree.map(jnp.add, params, epsilon))
        clean = gradients.clean
        found = {
            "gradient_norm": None if clean is None else norm(clean), "epsilon_norm": norm(epsilon),
            **survival(params, perturbed, epsilon, objective.compute_dtype), **shares(epsilon, self.switches.groups),
        }  # fmt: skip
        # All that the first pass says is reduced before the second begins; whether it is a number does not matter.
        said = [value for value in (gradients.loss, *found.values()) if value is not None]
        perturbed = objective.after(perturbed, jnp.sum(jnp.isnan(jnp.stack(said))))
        second = partial(self.second_pass, given, epsilon, perturbed)
        first_aux, residuals = residuals.aux, residuals._replace(aux=None)
        _, (perturbed_loss, vectors), aux = accumulate(second, (), residuals, weights)

        returned = self.second.combine(gradients, vectors) if self.second.combine else vectors
        returned = _as(returned, params)
        facts = report(
            perturbed_loss if gradients.loss is None else gradients.loss, found.pop("gradient_norm"), returned,
            perturbed_loss=perturbed_loss, cosine=jnp.nan if clean is None else cosine(clean, returned),
            groups=self.switches.groups, **found,
        )  # fmt: skip
        aux = aux if first_aux is None else first_aux
        return climbed, (returned, clean if self.second.remember else (), facts), aux

    def second_pass(self, given: StepInput, epsilon: Tree, perturbed: Tree, _, residuals: Residuals):
        """((), (perturbed loss, vectors), aux) of one microbatch."""
        objective = given.objective
        # A collective in a branch is one that another may overtake, see steppe.lm.model.hlo.unordered.
        late = objective if objective.sharded else objective._replace(trunk=_late(objective.trunk))
        # None for a path that is not anchored
        anchor = cast(Anchor, residuals.anchor and residuals.anchor._replace(params=given.params))
        passed = PassInput(
            objective=late, params=given.params, epsilon=epsilon, perturbed=perturbed, batch=residuals.batch,
            anchor=anchor, loss=residuals.loss, pull=residuals.pull,
        )  # fmt: skip
        loss, vectors, aux = self.second.path(passed)
        return (), (loss, vectors), aux


def perturbation(ascent: Ascent, known: AscentInput, rho: ArrayLike, switches: Switches) -> tuple[Tree, Tree]:
    """(epsilon, ascent state): the direction, masked, scaled per parameter, of length rho; zero where the length is."""
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
    """(the direction under mup, the tree whose l2 norm rho is measured in), the direction itself at the base width.

    mu-P^2 (Haas et al. 2024, arXiv 2411.00075): every parameter's perturbation is to act on the network at every width
    as the updates of mup do: entries of matrices fall as 1 / width, others stay. `widths`, of optim.ascent.Ascent,
    says which powers do that to a direction. So perturbed a parameter with one long axis has a norm that grows as the
    root of the width; that is taken out of the measure, in which then no kind of parameter outweighs the others.
    """
    vectors, matrices = widths
    scaled = by_width(vector, switches.matrix_axes, switches.widening, vectors, matrices)
    return scaled, by_width(scaled, switches.matrix_axes, switches.widening, -0.5, 0)


def _scales(vector: Tree, length: jax.Array | None, rho: ArrayLike, rules: tuple[str, ...]) -> Tree:
    """What each leaf of the direction is multiplied by.

    length None: a group of leaves has the l2 length factor x rho. Else lengths are relative to the one given.
    """
    groups, each = factors(vector, rules)
    leaves = list(zip(jax.tree.leaves(vector), jax.tree.leaves(groups), strict=True))
    found = {
        group: norm([leaf for leaf, number in leaves if number == group]) if length is None else length
        for group in sorted({number for _, number in leaves})
    }
    scales = {group: ratio(rho, long, 0.0) for group, long in found.items()}
    return jax.tree.map(lambda group, factor: scales[group] * factor if factor != 1 else scales[group], groups, each)


def layer_scale(kind: str, vector: Tree, params: Tree, matrix_axes: Callable | None = None) -> Tree:
    """The vector rescaled per weight matrix; the whole is renormalised to rho afterwards.

    norm: in proportion to the matrix's own norm. width: by 1 / sqrt(fan-in), so that wide matrices are not perturbed
    out of proportion (the concern of mu-P^2, Haas et al. 2024).
    matrix_axes(params) -> tree of optax.contrib.MuonDimensionNumbers or None, as optim.base takes it: axes that are
    neither reduced nor output stack matrices. Default: all axes but the last are reduced. Vectors have fan-in 1.
    """

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
    dims = dimensions(params, matrix_axes)
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


def shares(epsilon: Tree, groups: Mapping[str, str]) -> dict:
    """Where epsilon lies: the share of |epsilon|^2 in its largest row (epsilon_row) and in each group (epsilon_GROUP).

    A row runs along a parameter's last axis: a token's entries in a table, what one head or unit adds to the stream.
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


def _late(trunk: Callable) -> Callable:
    """The trunk of a second pass, whose buffers are not to be there during the first.

    A scan's stacked outputs start as constants, and XLA on CPU makes those of all passes when the step begins, which
    doubles the activations held. Inside the branch of a condition it cannot see through, they are made when the pass
    begins. XLA on TPU needs no such help, and a branch keeps it from sharing memory.
    """

    def run(params, batch):
        plain = jax.jit(lambda p: trunk(p, batch), inline=True)  # traced once for its three uses

        def behind_a_branch(params):
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(plain, params))
            return lax.cond(lax.optimization_barrier(True), plain, lambda _: nothing, params)

        return lax.platform_dependent(params, cpu=behind_a_branch, default=plain)

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
