"""The interface between a model and a gradient rule, and the plain gradient.

A rule receives an objective, not a model. The objective splits the model at its last hidden state. This keeps arrays
[batch, seq, vocabulary] out of memory, and the functional path can freeze the loss derivative without perturbed logits.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

Tree = Any
# loss: at theta, or at theta + epsilon for methods without a pass at theta. cosine: of clean and returned gradient.
# survival: how much of epsilon survives the cast to the compute dtype. epsilon_row: share of |epsilon|^2 in its largest
# row. epsilon_GROUP: the share of a group of parameters. If each microbatch has its own epsilon, these are averages.
# microbatch_norm: root mean square norm of the gradients of microbatches; see curvature.noise.from_norms.
REPORT = (
    *("loss", "perturbed_loss", "gradient_norm", "microbatch_norm", "epsilon_norm", "epsilon_row", "cosine"),
    *("survival_norm", "survival_cosine", "nonfinite"),
)


class OptionError(ValueError):
    """An invalid option of a method or base, in one line. Fields: `name`, `value`, and the `accepted` values."""

    def __init__(self, name: str, value: Any, accepted: str):
        self.name, self.value, self.accepted = name, value, accepted
        super().__init__(f"optim.{name} = {value!r}: must be {accepted}")


class Anchor(NamedTuple):
    """The point where a loss derivative is frozen: parameters, hidden state, and the readout's `kept` or None."""

    params: Tree
    hidden: Tree
    kept: Tree = None


class Trunk(Protocol):
    """The model up to its last hidden state."""

    def __call__(self, params: Tree, batch: Tree, /) -> Tree:
        """The hidden state of a batch, [B, T, D] for a language model."""
        ...


class Readout(Protocol):
    """The model after its last hidden state, and the loss."""

    def __call__(self, params: Tree, hidden: Tree, batch: Tree, /) -> tuple[jax.Array, dict]:
        """(mean loss of the batch, aux). aux may hold `per_sequence_loss` [B]; `kept`, passed on in the anchor; and
        `returned`, a tree of arrays for the report."""
        ...


class FrozenReadout(Protocol):
    """The readout with its loss derivative frozen."""

    def __call__(self, params: Tree, hidden: Tree, anchor: Anchor, batch: Tree, /) -> jax.Array:
        """<dl/dF at the anchor, F(params, hidden) - F(anchor)>, a scalar. Its gradient in (params, hidden) is the
        functional path; its value is the first-order change of the loss."""
        ...


class Objective(NamedTuple):
    """A loss as functions of (params, batch), split before the readout.

    weight(batch) -> scalar: the weight of this batch's mean loss among microbatches, such as its token count.
    ascent_readout: a readout, possibly less exact, for gradients that serve the ascent only; None: readout.
    compute_dtype: the dtype that trunk and readout cast parameters to; None: no cast.
    sharded: whether devices communicate inside trunk and readout.
    """

    trunk: Trunk
    readout: Readout
    frozen_readout: FrozenReadout
    weight: Callable[[Tree], jax.Array | float] = lambda batch: 1.0
    compute_dtype: Any = None
    ascent_readout: Readout | None = None
    sharded: bool = False

    def after(self, tree: Tree, known: Tree) -> Tree:
        """Returns the tree, delayed until `known` is computed if the objective is sharded: see `after`."""
        return after(tree, known) if self.sharded else tree


class Rule(Protocol):
    """A gradient rule: pure functions that can be jitted. Outputs are sharded like the inputs."""

    def init(self, params: Tree) -> Tree:
        """The rule's initial state. Raises ValueError for parameters that the rule cannot use."""
        ...

    def gradient(
        self, objective: Objective, params: Tree, batch: Tree, optimizer_state: Tree, rule_state: Tree, step: jax.Array
    ) -> tuple[Tree, Tree, dict]:
        """(gradient for the base optimizer, rule state, report) of step number `step`.

        report: float32 scalars named in REPORT, one more per group of parameters (see Switches.groups), and NaN for
        those that the method does not compute. nonfinite is 0 if every loss and gradient of the step is finite. Else
        the caller must not use the gradient and must keep its optimizer state; the returned rule state is the old one.
        report["aux"] is the readout's `returned` for the whole batch, at theta, or at theta + epsilon if the method
        has no pass over the whole batch at theta. K > 1 microbatches: stacked [K, ...].
        """
        ...

    def perturbing(self, steps: int) -> float:
        """The share of the first `steps` steps on which the rule computes more than its base."""
        ...


def objective(forward: Callable, loss: Callable, *, has_aux: bool = False, weight: Callable | None = None) -> Objective:
    """Makes an objective from any model: forward(params, batch) -> outputs, loss(outputs, batch) -> scalar.

    outputs: the inputs of the loss, such as logits, and possibly other arrays, such as the state of batch
    normalisation. With has_aux, loss returns (scalar, tree of arrays), and the report has that tree as "aux".
    weight(batch) -> scalar: the weight of a microbatch (default: equal weights).
    """

    def readout(params, outputs, batch):
        if not has_aux:
            return loss(outputs, batch), {}
        value, aux = loss(outputs, batch)
        known = {key: aux[key] for key in ("per_sequence_loss",) if isinstance(aux, Mapping) and key in aux}
        return value, {**known, "returned": aux}

    def frozen_readout(params, outputs, anchor, batch):
        at_anchor = lax.stop_gradient(anchor.hidden)
        derivative = jax.grad(lambda o: readout(None, o, batch)[0], allow_int=True)(at_anchor)
        moved = jax.tree.map(_difference, derivative, outputs, at_anchor)
        return inner(lax.stop_gradient(jax.tree.map(_number, derivative)), moved)

    return Objective(forward, readout, frozen_readout, weight or (lambda batch: 1.0))


def _number(derivative: jax.Array) -> jax.Array:
    """A derivative; 0 for outputs that have none, such as an integer counter."""
    return jnp.zeros(()) if derivative.dtype == jax.dtypes.float0 else derivative


def _difference(derivative: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.zeros(()) if derivative.dtype == jax.dtypes.float0 else a - b


def backward(readout: Callable, pull: Callable, params: Tree, hidden: Tree, *rest: Tree, has_aux: bool = False):
    """(value, gradient in params) of readout(params, trunk(params), *rest). pull: the trunk's pullback."""
    both = jax.value_and_grad(readout, argnums=(0, 1), has_aux=has_aux, allow_int=True)
    value, (direct, cotangent) = both(params, hidden, *rest)
    return value, jax.tree.map(jnp.add, pull(cotangent)[0], direct)


class Clean(NamedTuple):
    """Results of the pass at theta. pull: the trunk's pullback, hidden cotangent -> (parameter cotangent,)."""

    loss: jax.Array
    aux: dict
    gradient: Tree
    anchor: Anchor
    pull: Callable


def clean_pass(objective: Objective, params: Tree, batch: Tree) -> Clean:
    """One forward and one backward at theta; returns everything that later passes can reuse."""
    hidden, pull = jax.vjp(lambda p: objective.trunk(p, batch), params)
    (loss, aux), gradient = backward(objective.readout, pull, params, hidden, batch, has_aux=True)
    return Clean(loss, aux, gradient, Anchor(params, hidden, aux.get("kept")), pull)


def row_count(batch: Tree) -> int:
    """The number of rows B of a batch, without scalars and PRNG keys. Raises ValueError if leaves differ in it."""
    leaves = [(path, jnp.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(batch) if not _may_be_key(leaf)]
    (first, shape), *others = [(path, shape) for path, shape in leaves if shape] or [((), (0,))]
    for path, other in others:
        if other[0] != shape[0]:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has {other[0]} rows and batch{jax.tree_util.keystr(first)} "
                f"{shape[0]}: a batch in microbatches may only have arrays [rows, ...], scalars and PRNG keys"
            )
    return shape[0]


def _may_be_key(leaf: Any) -> bool:
    """Whether a leaf may be a PRNG key in the old format, an array of integers."""
    old = jax.eval_shape(jax.random.PRNGKey, 0)
    return getattr(leaf, "dtype", None) == old.dtype and jnp.shape(leaf) == old.shape


def by_rows(batch: Tree, rows: Callable, key: Callable = lambda key: key, other: Callable = lambda x: x) -> Tree:
    """Applies rows(leaf) to leaves [B, ...], key(leaf) to PRNG keys, and other(leaf) to scalars of a batch."""
    count = row_count(batch)

    def one(path, leaf):
        if _may_be_key(leaf):
            if len(leaf) == count:
                raise ValueError(
                    f"batch{jax.tree_util.keystr(path)} is {len(leaf)} integers: a PRNG key, or one number for each of "
                    f"the {count} rows? Make a key with jax.random.key, and numbers int32"
                )
            return key(leaf)
        if jnp.ndim(leaf):
            return rows(leaf)
        return key(leaf) if jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key) else other(leaf)

    return jax.tree.map_with_path(one, batch)


def split(objective: Objective, batch: Tree, microbatches: int) -> tuple[Tree, jax.Array]:
    """Splits a batch [B, ...] into K = `microbatches` parts [K, B/K, ...], each with a share [K] of the total weight.

    Row i goes to part i mod K, so rows stay on their devices. A PRNG key becomes K keys; all parts share a scalar.
    Raises OptionError if K does not divide B.
    """
    if row_count(batch) % microbatches:
        raise OptionError("microbatches", microbatches, f"a divisor of the {row_count(batch)} rows of a batch")
    parts = by_rows(
        batch,
        lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1),
        lambda key: jax.random.split(key, microbatches),
        lambda x: jnp.broadcast_to(x, (microbatches,)),
    )
    weights = jnp.asarray([objective.weight(jax.tree.map(lambda x, k=k: x[k], parts)) for k in range(microbatches)])
    return parts, weights / jnp.sum(weights)


def accumulate(function: Callable, state: Tree, parts: Tree, shares: jax.Array | None) -> tuple[Tree, Tree, Tree]:
    """Runs function(state, part) -> (state, total, output) over the parts in turn.

    Returns (last state, share-weighted sum of totals, stacked outputs). With shares None, `parts` is the whole batch.
    Sums are computed in float32 or better and returned in the dtype of the totals.
    """
    if shares is None:
        return function(state, parts)

    def body(carry, part):
        state, sums = carry
        state, total, output = function(state, part[0])
        return (state, jax.tree.map(lambda s, t: s + (part[1] * t).astype(s.dtype), sums, total)), output

    totals = jax.eval_shape(function, state, jax.tree.map(lambda x: x[0], parts))[1]
    zeros = jax.tree.map(lambda t: jnp.zeros(t.shape, jnp.promote_types(t.dtype, jnp.float32)), totals)
    (state, sums), outputs = lax.scan(body, (state, zeros), (parts, shares))
    return state, jax.tree.map(lambda s, t: s.astype(t.dtype), sums, totals), outputs


def after(tree: Tree, known: Tree) -> Tree:
    """Returns the tree; on CPUs only after `known`, a scalar or a similar tree, is computed. NaN where `known` is NaN.

    Its collectives then cannot overtake those in an earlier loop or branch, see steppe.lm.model.hlo.unordered.
    """

    def waiting(tree, known):
        known = jax.tree.map(lambda x, y: jnp.asarray(y).astype(x.dtype), tree, jax.tree.broadcast(known, tree))
        return jax.tree.map(lambda x, y: jnp.where(y == y, x, y), tree, known)

    return lax.platform_dependent(tree, known, cpu=waiting, default=lambda tree, known: tree)


def microbatched(objective: Objective, batch: Tree, microbatches: int) -> tuple[Tree, jax.Array | None]:
    """(parts, shares) for accumulate; (batch, None) for one microbatch."""
    return (batch, None) if microbatches == 1 else split(objective, batch, microbatches)


def report(
    loss: jax.Array, gradient_norm: jax.Array | None, returned: Tree, *, groups: Iterable[str] = (), **others
) -> dict:
    """{key: float32 scalar} for REPORT and the groups, NaN for missing values. gradient_norm: None if not computed."""
    values = {"loss": loss, **others}
    if gradient_norm is not None:
        values["gradient_norm"] = gradient_norm
    checked = [norm(returned), *(values[key] for key in ("loss", "perturbed_loss", "gradient_norm") if key in values)]
    values["nonfinite"] = ~jnp.all(jnp.stack([jnp.isfinite(value) for value in checked]))
    keys = (*REPORT, *(f"epsilon_{group}" for group in groups))
    return {key: jnp.asarray(values.get(key, jnp.nan), jnp.float32) for key in keys}


def check_floating(params: Tree) -> None:
    """Raises ValueError naming the first parameter that is not an array of a real floating-point dtype."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"parameter {name} is {dtype or type(leaf).__name__}: parameters must be floating-point arrays (for an "
                "equinox module: eqx.partition(module, eqx.is_inexact_array); combine it with the rest in the loss)"
            )


def plain_gradient(objective: Objective, params: Tree, batch: Tree, microbatches: int = 1) -> tuple[jax.Array, Tree]:
    """(mean loss, its gradient at theta), computed in `microbatches` parts."""
    return plain_pass(objective, params, batch, microbatches)[:2]


def plain_pass(
    objective: Objective, params: Tree, batch: Tree, microbatches: int
) -> tuple[jax.Array, Tree, Tree, jax.Array | float]:
    """(mean loss, its gradient at theta, the readout's `returned` of each part or None, microbatch_norm)."""

    def one(before, part):
        clean = clean_pass(objective, objective.after(params, before), part)
        square = inner(clean.gradient, clean.gradient)
        return square, (clean.loss, clean.gradient), (clean.aux.get("returned"), square)

    parts, shares = microbatched(objective, batch, microbatches)
    if shares is None:
        clean = clean_pass(objective, params, batch)
        return clean.loss, clean.gradient, clean.aux.get("returned"), jnp.nan
    _, (loss, gradient), (aux, squares) = accumulate(one, no_square(params), parts, shares)
    return loss, gradient, aux, jnp.sqrt(jnp.sum(shares * squares))


def no_square(params: Tree) -> jax.Array:
    """0 in the dtype of `inner` of trees like the parameters."""
    return jnp.zeros((), jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32))


def inner(a: Tree, b: Tree) -> jax.Array:
    """Inner product of two trees, in float32 or better. Does not flatten leaves, so they stay sharded."""

    def product(x, y):
        wide = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
        return jnp.sum(x.astype(wide) * y.astype(wide))

    return cast(jax.Array, sum(jax.tree.leaves(jax.tree.map(product, a, b))))


def norm(tree: Tree) -> jax.Array:
    """Global l2 norm over a whole tree and all its shards."""
    return jnp.sqrt(inner(tree, tree))


def ratio(a: ArrayLike, b: ArrayLike, at_zero: float = 1.0) -> jax.Array:
    """a / b for b >= 0; at_zero where b is 0, NaN where b is NaN."""
    return jnp.where(b == 0, at_zero, a / jnp.where(b == 0, 1.0, b))


def cosine(a: Tree, b: Tree) -> jax.Array:
    """Cosine of the angle between two trees; 1 if either is zero."""
    return ratio(inner(a, b), norm(a) * norm(b))
