"""Base optimizers from optax, and a reader of the moments in their state for ascent directions."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from optax.contrib import MuonState, ScheduleFreeState

from steppe.optim import references
from steppe.optim.masks import by_width, factors
from steppe.optim.options import make, nearest, needs, options
from steppe.optim.rule import OptionError, Tree, ratio
from steppe.optim.soap import SoapState, scale_by_soap


class Moments(NamedTuple):
    """Moments of the base before this step's update: first, second (bias-corrected), and the count of updates.

    fresh(gradient) -> the bias-corrected second moment after an update with this gradient.
    update(step, fill) -> the base's update for a zero gradient and second moment fill(second), without weight decay;
    None unless read through a Base.
    """

    first: Tree = None
    second: Tree = None
    count: ArrayLike | None = None  # pyright: ignore[reportIncompatibleMethodOverride]: a field, of the name that optax gives it
    fresh: Callable | None = None
    update: Callable | None = None


class Base(NamedTuple):
    """An optax transform, and moments(state, params) -> Moments, which reads its state.

    transform: its update also takes `value`, the loss at the parameters, which some optimizers need.
    """

    name: str
    transform: optax.GradientTransformationExtraArgs
    moments: Callable[[Any, Tree], Moments]


@functools.cache
def _kinds() -> tuple[type, ...]:
    """The state types that hold moments. One has no public name, so a state is made to get its type. That computes,
    which is forbidden before jax.distributed starts; so the tuple is made on demand."""
    rms = type(optax.scale_by_rms(bias_correction=True).init(()))  # Adam without a first moment
    return (
        optax.ScaleByAdamState,
        rms,
        optax.ScaleByLionState,
        optax.TraceState,
        optax.FactoredState,
        MuonState,
        SoapState,
    )


def moments(state: Any, params: Tree, b2: float = 0.999) -> Moments:
    """Reads the moments from an optax state that contains one Adam, Lion, momentum, Adafactor or Muon state.

    b2: the base's decay, to correct Adam's second moment. Raises ValueError unless there is exactly one such state.
    """
    found = [s for s in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, _kinds())) if isinstance(s, _kinds())]
    if {type(s) for s in found} == {MuonState, optax.ScaleByAdamState} and len(found) == 2:
        return Moments(first=_merge(found[0].mu, found[1].mu))
    if len(found) != 1:
        raise ValueError(f"the optimizer state holds {len(found)} moment estimates: use a base with exactly one")
    (inside,) = found
    if hasattr(inside, "nu") and not isinstance(inside, SoapState):  # its second moment is in eigenbases
        return _adam(inside, b2)
    if isinstance(inside, optax.FactoredState):
        return _factored(inside, params)
    return Moments(first=inside.trace if isinstance(inside, optax.TraceState) else inside.mu)


def at_step(state: Any, step: jax.Array) -> Any:
    """The optimizer state with its schedules' counts set to `step`, the run's count, which includes skipped steps.

    Does not change the counts of moments, because skipped gradients did not update them.
    """

    def free(x):  # counts from 1 and contains another state
        return x._replace(step_count=step + 1, base_optimizer_state=at_step(x.base_optimizer_state, step))

    def scheduled(x):
        return x._replace(count=step.astype(jnp.result_type(x.count)))

    return _replaced(state, {ScheduleFreeState: free, optax.ScaleByScheduleState: scheduled})


def _replaced(state: Any, by: dict[type, Callable[[Any], Any]]) -> Any:
    return jax.tree.map(lambda x: by.get(type(x), lambda x: x)(x), state, is_leaf=lambda x: type(x) in by)


def _with_second(state: Any, fill: Callable[[Tree], Tree]) -> Any:
    """The optimizer state with fill(second) in place of Adam's second moments; in SOAP only for non-matrices."""

    def soap(x):  # a small moment along an eigenvector is a measured one
        leaves, structure = jax.tree.flatten(x.nu)
        rest = iter(fill([v for v, sides in zip(leaves, x.sides, strict=True) if not sides]))
        kept = [v if sides else next(rest) for v, sides in zip(leaves, x.sides, strict=True)]
        return x._replace(nu=jax.tree.unflatten(structure, kept))

    return _replaced(state, {optax.ScaleByAdamState: lambda x: x._replace(nu=fill(x.nu)), SoapState: soap})


def _merge(a: Tree, b: Tree) -> Tree:
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda x, y: y if masked(x) else x, a, b, is_leaf=masked)


def _adam(inside: Any, b2: float) -> Moments:
    def corrected(second, count):
        # Before the first update the moments are zero; directions then use D = 1.
        return jax.tree.map(lambda v: v / jnp.where(count > 0, 1 - b2**count, 1.0).astype(v.dtype), second)

    def fresh(gradient):
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, inside.nu, gradient)
        return corrected(second, inside.count + 1)

    return Moments(getattr(inside, "mu", None), corrected(inside.nu, inside.count), inside.count, fresh)


def _factored(inside: optax.FactoredState, params: Tree) -> Moments:
    """Adafactor needs no bias correction, because its decay, 1 - t^-0.8, starts at zero."""

    def second(state):
        return jax.tree.map(_outer, params, state.v_row, state.v_col, state.v)

    def fresh(gradient):
        return second(optax.scale_by_factored_rms().update(gradient, inside, params)[1])

    return Moments(second=second(inside), count=inside.count, fresh=fresh)


def _outer(param: jax.Array, row: jax.Array, column: jax.Array, whole: jax.Array) -> jax.Array:
    if whole.shape == param.shape:
        return whole
    # optax factors the two largest axes; `row` averages over the larger.
    second, largest = (int(axis) for axis in np.argsort(param.shape)[-2:])
    axis = second - 1 if second > largest else second
    row = row * ratio(jnp.ones((), row.dtype), jnp.mean(row, axis=axis, keepdims=True), 0.0)
    return jnp.expand_dims(row, largest) * jnp.expand_dims(column, second)


class Settings(NamedTuple):
    """The arguments of a base optimizer; see `base`."""

    learning_rate: float | Callable
    b1: float
    b2: float
    eps: float
    weight_decay: float
    decay_mask: Tree | Callable | None
    matrix_axes: Callable | None
    rate_factors: tuple[str, ...] = ()
    widening: float = 1.0
    options: Mapping[str, Any] = {}

    def decay(self) -> optax.GradientTransformation:
        """Weight decay, or the identity if it is 0."""
        return optax.add_decayed_weights(self.weight_decay, self.decay_mask) if self.weight_decay else optax.identity()

    def rate(self) -> optax.GradientTransformation:
        """Multiplies by minus the learning rate of each parameter."""
        common, own = optax.scale_by_learning_rate(self.learning_rate), self.factors()
        return optax.chain(common, *own) if own else common

    def widths(self, vectors: float, matrices: float) -> list[optax.GradientTransformation]:
        """mup's learning rates: multiplies a direction by powers of the widening, before decoupled decay.

        `vectors` and `matrices` are the powers. Under mup, gradient entries of all parameters fall as 1 / width.
        Update entries of matrices must fall the same way; those of other parameters, which have one long axis, must
        stay constant (Yang et al. 2021, arXiv 2203.03466, tables 3 and 8). The powers depend on the direction's scale.
        """
        if self.widening == 1:
            return []
        scaled = lambda updates, _: by_width(updates, self.matrix_axes, self.widening, vectors, matrices)  # noqa: E731
        return [optax.stateless(scaled)]

    def factors(self) -> list[optax.GradientTransformation]:
        """Multiplies the updates of parameters that have their own learning-rate factor."""
        if not self.rate_factors:
            return []
        scaled = lambda updates, _: jax.tree.map(jnp.multiply, updates, factors(updates, self.rate_factors)[1])  # noqa: E731
        return [optax.stateless(scaled)]

    def decoupled(self, *direction: optax.GradientTransformation) -> list[optax.GradientTransformation]:
        """A direction with entries of the scale of Adam's, then mup's rates, decoupled decay and the learning rate."""
        return [*direction, *self.widths(0, -1), self.decay(), self.rate()]

    def adam(self, nesterov: bool = False) -> optax.GradientTransformation:
        """Adam's direction, or NAdam's (Dozat 2016)."""
        return optax.scale_by_adam(self.b1, self.b2, self.eps, nesterov=nesterov)


class Evaluated(NamedTuple):
    """For a base that is evaluated at other parameters than it steps: at(b1, parameter, leaf) returns them. `leaf` is
    from the tree in its state whose path ends in `stored_as`."""

    stored_as: str
    at: Callable[[float, jax.Array, jax.Array], jax.Array]


class Kind(NamedTuple):
    """A row of BASES. moments: names of the moments that a direction can use. parts(Settings) -> its optax transforms.

    evaluated: None if the base is evaluated at the parameters it steps.
    """

    moments: tuple[str, ...]
    parts: Callable[[Settings], list[optax.GradientTransformation]]
    evaluated: Evaluated | None = None


def _muon(s: Settings) -> list[optax.GradientTransformation]:
    return [
        optax.contrib.muon(
            s.learning_rate,
            beta=s.b1,
            eps=s.eps,
            weight_decay=s.weight_decay,
            weight_decay_mask=s.decay_mask,
            adam_b1=s.b1,
            adam_b2=s.b2,
            adam_weight_decay=0.0,
            muon_weight_dimension_numbers=s.matrix_axes,
            consistent_rms=0.2,  # so that one learning rate suits both parts (Liu et al. 2025, arXiv 2502.16982)
        ),
        *s.widths(0, -0.5),  # updates are orthogonal matrices times 0.2 sqrt(longer side)
        *s.factors(),
    ]


def _schedule_free(s: Settings) -> list[optax.GradientTransformation]:
    second = optax.scale_by_rms(s.b2, s.eps, eps_in_sqrt=False, bias_correction=True)
    steps = optax.chain(*s.decoupled(second))
    # optax weighs steps with counts from 1 but takes them with counts from 0: align the weight with the rate
    rate = s.learning_rate
    return [optax.contrib.schedule_free(steps, (lambda count: rate(count - 1)) if callable(rate) else rate, s.b1)]


def _averaged(b1: float, y: jax.Array, z: jax.Array) -> jax.Array:
    """x of y = (1 - b1) z + b1 x."""
    return (y - (1 - b1) * z) / b1


# adafactor's second moment is its factored estimate, row x column. muon has a second moment only where it falls back to
# Adam, and soap's is in eigenbases, so neither counts.
BASES = {
    "adamw": Kind(("first", "second"), lambda s: s.decoupled(s.adam())),
    "nadamw": Kind(("first", "second"), lambda s: s.decoupled(s.adam(nesterov=True))),
    "adam": Kind(("first", "second"), lambda s: [s.decay(), s.adam(), *s.widths(0, -1), s.rate()]),
    "sgd": Kind(("first",), lambda s: [s.decay(), optax.trace(s.b1), *s.widths(1, 0), s.rate()]),
    "lion": Kind(("first",), lambda s: s.decoupled(optax.scale_by_lion(s.b1, s.b2))),
    "adafactor": Kind(("second",), lambda s: s.decoupled(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))),
    "muon": Kind(("first",), _muon),
    "soap": Kind(("first",), lambda s: s.decoupled(scale_by_soap(s.b1, s.b2, s.eps, s.matrix_axes))),
    "schedule_free": Kind(("second",), _schedule_free, Evaluated("/z", _averaged)),
}


def _decoupled(s: Settings) -> optax.GradientTransformation:
    """Adds decoupled weight decay to finished updates."""
    alone = optax.chain(s.decay(), s.rate())

    def update(updates, state, params=None):
        decayed, state = alone.update(jax.tree.map(jnp.zeros_like, updates), state, params)
        return jax.tree.map(jnp.add, updates, decayed), state

    return optax.GradientTransformation(alone.init, update)


def kind_of(name: str) -> Kind:
    """The row of a base or a reference; runs the file of a reference. Raises OptionError for an unknown name."""
    if references.is_reference(name):
        return _kind_from_outside(name)
    if name not in BASES:
        raise OptionError("base", name, f"one of {', '.join(BASES)}, or {references.ACCEPTED}{nearest(name, BASES)}")
    return BASES[name]


@functools.cache
def _kind_from_outside(reference: str) -> Kind:
    """The row of a function(learning_rate, ...) whose other parameters name fields of Settings, or `mask` (decay_mask).
    Adds decoupled decay if it has no parameter weight_decay."""
    made = references.load("base", reference).made
    taken = needs(made)
    if "learning_rate" not in taken:
        raise OptionError("base", reference, "a function of learning_rate that returns an optax transformation")
    for need, must in taken.items():
        if must and need not in Settings._fields:
            known = ", ".join(field for field in Settings._fields if field != "options")
            accepted = (
                f"a function whose parameters are options (annotated with Option) or one of {known}; {need} is neither"
            )
            raise OptionError("base", reference, accepted)

    def parts(s: Settings) -> list[optax.GradientTransformation]:
        if s.widening != 1 and "widening" not in taken:
            raise OptionError("base", reference, "another base under mup, one with a parameter `widening`")
        given = {name: each.default for name, each in options(made).items()} | dict(s.options)
        with references.running("base", reference, "a function that returns an optax transformation"):
            transform = make(made, {**s._asdict(), "mask": s.decay_mask, **given})
        if not isinstance(transform, optax.GradientTransformation):
            accepted = f"a function that returns an optax.GradientTransformation, not a {type(transform).__name__}"
            raise OptionError("base", reference, accepted)
        decay = [] if "weight_decay" in taken or not s.weight_decay else [_decoupled(s)]
        return [_guarded(reference, transform), *s.factors(), *decay]

    state = _toy_state(optax.chain(*parts(Settings(1e-3, 0.9, 0.99, 1e-8, 0.0, None, None))))
    kinds = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ScheduleFreeState))
    if any(isinstance(kind, ScheduleFreeState) for kind in kinds):
        raise OptionError(
            "base",
            reference,
            "schedule_free, which a run evaluates at the averaged weights; of this base it would evaluate others",
        )
    return Kind(_kept(state), parts)


def _guarded(reference: str, transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transform of a user's file, whose errors are OptionErrors."""
    init = references.running("base", reference, "a base whose init takes the model's parameters")
    accepted = "a base whose update takes a gradient, its state, the parameters and, by keyword, value (the loss)"
    update = references.running("base", reference, accepted)
    return optax.GradientTransformationExtraArgs(
        init(transform.init), update(optax.with_extra_args_support(transform).update)
    )


def _toy_state(transform: optax.GradientTransformation) -> Any:
    """The shapes of its state for two small parameters; () if it takes only those of a certain model."""
    toy = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in (("matrix", (2, 2)), ("vector", (2,)))}
    try:
        return jax.eval_shape(transform.init, toy)
    except OptionError:
        return ()


def _kept(state: Any) -> tuple[str, ...]:
    """The names of the moments that `moments` can read from an optimizer state."""
    try:
        found = jax.eval_shape(lambda state: moments(state, None)._replace(fresh=None), state)
    except (ValueError, TypeError, AttributeError):
        return ()
    return tuple(name for name in ("first", "second") if getattr(found, name) is not None)


def options_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `given` that are options of a base from outside and not None; {} for Steppe's bases. Raises OptionError
    for a value that the option does not accept."""
    if not references.is_reference(name):
        return {}
    declared = references.load("base", name).declared()
    found = {option: given[option] for option in declared if given.get(option) is not None}
    for option, value in found.items():
        if not declared[option].option.allows(value):
            raise OptionError(option, value, declared[option].option.accepted)
    return found


def base(
    name: str,
    learning_rate: float | Callable,
    *,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-9,
    weight_decay: float = 0.0,
    decay_mask: Tree | Callable | None = None,
    clip_norm: float = 0.0,
    matrix_axes: Callable | None = None,
    rate_factors: tuple[str, ...] = (),
    widening: float = 1.0,
    **given: Any,
) -> Base:
    """Makes a base optimizer by name (see BASES), or by reference (see optim.references).

    adamw, nadamw, lion, adafactor: decoupled decay. adam, sgd: decay added to the gradient (L2). muon: orthogonalised
    momentum and decoupled decay for matrices, Adam for the rest. schedule_free: AdamW without momentum, averaged
    (Defazio et al. 2024, arXiv 2405.15682); use a constant rate and evaluate it at BASES[name].evaluated. soap: Adam in
    the eigenbases of each matrix's gradients, see optim.soap; decoupled decay.

    b1: momentum of sgd and muon; in schedule_free the weight of the average in the point where gradients are taken.
    clip_norm: largest global l2 norm of the returned gradient, 0 for no clipping. matrix_axes(params) -> tree of
    optax.contrib.MuonDimensionNumbers or None (AdamW updates those leaves); default: every 2-d parameter is a matrix.
    rate_factors: learning-rate factors, rules of masks.factors. widening: width / base width under mup (see
    Settings.widths), else 1. given: options of a base from outside. Raises OptionError for an invalid name or option.
    """
    kind, own = kind_of(name), options_of(name, given)
    for option in given.keys() - own.keys():
        if given[option] is not None:
            raise OptionError(option, given[option], f"left out: {option} is not an option of {name}")
    if name == "schedule_free" and not b1 > 0:
        raise OptionError("b1", b1, "a number > 0 with schedule_free")
    settings = Settings(
        learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, decay_mask=decay_mask,
        matrix_axes=matrix_axes, rate_factors=tuple(rate_factors), widening=widening, options=own,
    )  # fmt: skip
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    transform = optax.with_extra_args_support(optax.chain(*clip, *kind.parts(settings)))

    def read(state: Any, params: Tree) -> Moments:
        nothing = jax.tree.map(jnp.zeros_like, params)  # zero gradients, and zero parameters: no decay
        return moments(state, params, b2)._replace(
            update=lambda step, fill=lambda second: second: transform.update(
                nothing, _with_second(at_step(state, step), fill), nothing, value=jnp.float32(0)
            )[0]
        )

    return Base(name, transform, read)
