"""Ascent directions: where to look for a sharper point. Each is a few lines; a new one needs nothing outside this file.

A direction maps what is known at theta to (vector, length, state); the perturbation is rho * vector / length. A length
of None means the vector's global l2 norm, so that |epsilon|_2 = rho.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from steppe.optim.masks import mask
from steppe.optim.options import FINITE, NATURAL, NOT_NEGATIVE, PATTERN, POSITIVE, SHARE, Option, one_of
from steppe.optim.rule import OptionError, Tree, inner, norm


class AscentInput(NamedTuple):
    """What a direction is made from. `moments` is optim.base.Moments, its fields None where the base has none."""

    gradient: Tree
    params: Tree
    moments: Any
    state: Tree
    step: jax.Array


class Direction(Protocol):
    """Where theta + epsilon lies from theta."""

    def __call__(self, given: AscentInput) -> tuple[Tree, jax.Array | None, Tree]:
        """(vector, its length, state): epsilon is rho * vector / length; a length of None is the vector's l2 norm."""
        ...


class Ascent(NamedTuple):
    """A direction; `needs` names what must exist for it: gradient, first, second; init(params) -> its state.

    widths: under mup, the powers of the width that the direction's entries are multiplied by, in parameters with one
    long axis and in matrices, so that the former stay as they are and the latter fall as 1 / width. Those of a gradient
    both fall so: (1, 0), the default, of all that is linear in gradients. None: unknown, refused under mup.
    """

    direction: Direction
    needs: tuple[str, ...] = ("gradient",)
    init: Callable[[Tree], Tree] = lambda params: ()
    widths: tuple[float, float] | None = (1, 0)


def gradient() -> Ascent:
    """g: steepest ascent in the l2 norm (SAM, Foret et al. 2021)."""
    return Ascent(lambda given: (given.gradient, None, given.state))


def preconditioner(second: Tree, unseen: jax.Array | bool, power: float = 0.5, eps: float = 1e-8) -> Tree:
    """D = v^power + eps of a bias-corrected second moment, 1 where none has been given yet."""
    return jax.tree.map(lambda v: jnp.where(unseen, 1.0, v**power + eps), second)


def filled(second: Tree, floor: float) -> Tree:
    """The second moment whose unseen entries, those below floor * the mean of their parameter, have that mean.

    A token not met lately has v near 0, which says that nothing is known of its row, not that the loss is flat along
    it. Such an entry is taken for a typical one of its parameter, so that D^-1 leaves it as it is relative to the
    others; what is seen is amplified by at most floor^-1/2 over a typical entry. The mean is the parameter's own
    because parameters differ in scale by orders of magnitude; a parameter of zeros takes that of the whole tree.
    """
    count = float(sum(v.size for v in jax.tree.leaves(second)))  # above 2^31 no integer of a program
    whole = sum(jnp.sum(v) for v in jax.tree.leaves(second)) / count

    def one(v):
        typical = jnp.mean(v)
        typical = jnp.where(typical > 0, typical, whole)
        return jnp.where(v < floor * typical, typical, v)

    return jax.tree.map(one, second) if floor else second


def preconditioned(
    precond_power: Annotated[float, Option("exponent of the second moment in D", *NOT_NEGATIVE)] = 0.5,
    precond_eps: Annotated[float, Option("added to D", *POSITIVE)] = 1e-8,
    precond_norm: Annotated[str, Option("the norm in which rho is measured", *one_of("l2", "ellipsoid"))] = "l2",
    precond_moment: Annotated[
        str,
        Option(
            "second moment before or after this gradient", *one_of("stale", "fresh"), former=("stale", "precond_floor")
        ),
    ] = "fresh",
    precond_floor: Annotated[
        float,
        Option(
            "stale: share of its parameter's mean below which an entry is unseen",
            *NOT_NEGATIVE,
            former=(0.0, "precond_floor"),
        ),
    ] = 0.01,
) -> Ascent:
    """D^-1 g with D = v^power + eps, v the base's bias-corrected second moment.

    precond_moment: "fresh" includes this gradient, which bounds |D^-1 g| entry by entry: with Adam's moment by
    (1 - b2)^-1/2. "stale" takes v from before this step, D = 1 before the first, and needs precond_floor, see `filled`:
    without one (0) epsilon lies on the few rows of an embedding table that were not met lately.
    precond_norm: "l2" gives |epsilon|_2 = rho; "ellipsoid" divides by sqrt(g^T D^-1 g), the maximiser of g^T epsilon
    under sqrt(epsilon^T D epsilon) <= rho.
    """

    def direction(given):
        if precond_moment == "fresh":
            second, unseen = given.moments.fresh(given.gradient), False
        else:
            second, unseen = filled(given.moments.second, precond_floor), given.moments.count == 0
        scale = preconditioner(second, unseen, precond_power, precond_eps)
        vector = jax.tree.map(jnp.divide, given.gradient, scale)
        length = jnp.sqrt(inner(given.gradient, vector)) if precond_norm == "ellipsoid" else None
        return vector, length, given.state

    # Of D^-1 g the entries are those of g to the power 1 - 2 precond_power.
    widths = None if precond_norm == "ellipsoid" else (1 - 2 * precond_power, -2 * precond_power)
    return Ascent(direction, ("gradient", "second"), widths=widths)


def momentum() -> Ascent:
    """-m, against the base's first moment: costs no gradient (Momentum-SAM, Becker, Altrock, Risse 2024)."""
    return Ascent(lambda given: (jax.tree.map(jnp.negative, given.moments.first), None, given.state), ("first",))


def update(
    update_length: Annotated[
        str, Option("what rho counts: the l2 norm of epsilon, or steps of the base", *one_of("l2", "steps"))
    ] = "l2",
    update_floor: Annotated[
        float,
        Option(
            "share of its parameter's mean below which the second moment of an entry is that mean",
            *NOT_NEGATIVE,
            former=(0.0, "update_floor"),
        ),
    ] = 0.1,
) -> Ascent:
    """The way the base is going: what it would add to the parameters now if this gradient were zero, without decay.

    Of Adam -D^-1 m, of Lion -sign(m), of Muon its orthogonalised momentum; m and v hold the same gradients, so no entry
    explodes, and it costs no gradient. update_floor: what is as good as unseen has a typical v, see `filled`: else each
    row of a large embedding table moves as far as any of a layer, and there are many more of them. update_length: "l2"
    gives |epsilon|_2 = rho; with "steps" epsilon is rho times that update, so its radius follows learning rate and
    update.
    """

    def direction(given):
        if given.moments.update is None:
            raise OptionError("base", None, "an optim.base.Base, whose update this direction follows")
        vector = given.moments.update(given.step, lambda second: filled(second, update_floor))
        return vector, jnp.ones(()) if update_length == "steps" else None, given.state

    return Ascent(direction, ("first", "update"), widths=(0, 0))  # mup scales the base's updates already


def adaptive(
    unscaled: Annotated[str, Option('regex over the paths of parameters with T = 1; "": none', *PATTERN)] = "",
) -> Ascent:
    """T^2 g / |T g| with T = |theta| + 0.01: invariant to rescaling of parameters (ASAM, Kwon et al. 2021, eq. 8).

    unscaled: its authors' code has T = 1 for biases, "bias$"; the paper has no exception, nor has the default here.
    """

    def plain_of(params):
        try:
            return mask(params, (unscaled,) if unscaled else ())
        except ValueError as error:
            raise OptionError("unscaled", unscaled, f"a regex of some parameter's path: {error}") from None

    def init(params):
        plain_of(params)  # refused before a step is traced
        return ()

    def direction(given):
        plain = plain_of(given.params)
        size = jax.tree.map(lambda p, one: 1.0 if one else jnp.abs(p) + 0.01, given.params, plain)
        scaled = jax.tree.map(jnp.multiply, given.gradient, size)
        return jax.tree.map(jnp.multiply, scaled, size), norm(scaled), given.state

    return Ascent(direction, init=init, widths=None)


def friendly(
    sigma: Annotated[float, Option("share of the average gradient removed", *FINITE)] = 1.0,
    decay: Annotated[float, Option("decay of the average gradient", *SHARE)] = 0.9,
) -> Ascent:
    """g - sigma * EMA(g): ascent along the batch's own noise (Friendly-SAM, Li et al. 2024). State: the average.

    As in its authors' code the average is that of the gradients before this one, starts as the first of them, and the
    first step climbs g itself. (At sigma = 1 it makes no difference whether this gradient is in the average.)
    """

    def direction(given):
        first = norm(given.state) == 0
        vector = jax.tree.map(lambda g, m: g - sigma * m, given.gradient, given.state)
        average = jax.tree.map(
            lambda m, g: jnp.where(first, g, decay * m + (1 - decay) * g), given.state, given.gradient
        )
        return vector, None, average

    return Ascent(direction, init=lambda params: jax.tree.map(jnp.zeros_like, params))


def random(seed: Annotated[int, Option("of the random direction", *NATURAL)] = 0) -> Ascent:
    """A Gaussian direction, the same at a given step for a given seed: the control for every other one."""

    def direction(given):
        leaves, structure = jax.tree.flatten(given.params)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), given.step), len(leaves))
        noise = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, noise), None, given.state

    return Ascent(direction, (), widths=None)
