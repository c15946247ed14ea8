"""Ascent directions: the direction of the perturbation. Each takes a few lines of this file.

A direction maps an AscentInput to (vector, length, state). The perturbation is epsilon = rho * vector / length. A
length of None means the vector's global l2 norm, so |epsilon|_2 = rho.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from steppe.optim.masks import mask
from steppe.optim.options import FINITE, NATURAL, NOT_NEGATIVE, PATTERN, POSITIVE, SHARE, Option, one_of
from steppe.optim.rule import OptionError, Tree, inner, norm


class AscentInput(NamedTuple):
    """The inputs of a direction. moments: an optim.base.Moments; fields that the base lacks are None."""

    gradient: Tree
    params: Tree
    moments: Any
    state: Tree
    step: jax.Array


class Ascent(NamedTuple):
    """direction(AscentInput) -> (vector, length, new state), from theta to theta + epsilon. needs: its inputs, of
    "gradient", "first" and "second" moment. init(params) -> its state.

    widths: for mup, the powers of the width that multiply the direction, (in parameters with one long axis, in
    matrices). Entries of the former must then stay constant, and entries of matrices must fall as 1 / width. Gradient
    entries of both fall as 1 / width, so the default, for directions linear in gradients, is (1, 0). None: unknown,
    refused under mup.
    """

    direction: Callable[[AscentInput], tuple[Tree, jax.Array | None, Tree]]
    needs: tuple[str, ...] = ("gradient",)
    init: Callable[[Tree], Tree] = lambda params: ()
    widths: tuple[float, float] | None = (1, 0)


def gradient() -> Ascent:
    """g: steepest ascent in the l2 norm (SAM, Foret et al. 2021)."""
    return Ascent(lambda given: (given.gradient, None, given.state))


def preconditioner(second: Tree, unseen: jax.Array | bool, power: float = 0.5, eps: float = 1e-8) -> Tree:
    """D = v^power + eps for a bias-corrected second moment v; 1 where `unseen`."""
    return jax.tree.map(lambda v: jnp.where(unseen, 1.0, v**power + eps), second)


def filled(second: Tree, floor: float) -> Tree:
    """Replaces entries of the second moment below floor * their parameter's mean with that mean.

    A token that did not occur lately has v near 0. That means its row is unknown, not that the loss is flat along it.
    Such an entry gets a typical value, so D^-1 does not amplify it. D^-1 amplifies other entries by at most
    floor^-1/2 over a typical entry. Parameters differ in scale by orders of magnitude, so each uses its own mean; a
    parameter of zeros uses the mean of the whole tree.
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
    precond_norm: Annotated[str, Option("norm that measures rho", *one_of("l2", "ellipsoid"))] = "l2",
    precond_moment: Annotated[
        str,
        Option(
            "second moment before (stale) or after (fresh) this step's gradient",
            *one_of("stale", "fresh"),
            former=("stale", "precond_floor"),
        ),
    ] = "fresh",
    precond_floor: Annotated[
        float,
        Option(
            "stale: second moments below this fraction of their parameter's mean are set to the mean",
            *NOT_NEGATIVE,
            former=(0.0, "precond_floor"),
        ),
    ] = 0.01,
) -> Ascent:
    """D^-1 g with D = v^power + eps, v the base's bias-corrected second moment.

    precond_moment: "fresh" includes this gradient in v, which bounds each entry of D^-1 g; with Adam's moment by
    (1 - b2)^-1/2. "stale" uses v from before this step (D = 1 on the first) and needs precond_floor, see `filled`.
    Without a floor, epsilon concentrates on the few embedding rows whose tokens did not occur lately.
    precond_norm: "l2" gives |epsilon|_2 = rho. "ellipsoid" divides by sqrt(g^T D^-1 g): epsilon then maximises
    g^T epsilon under sqrt(epsilon^T D epsilon) <= rho.
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

    # Entries of D^-1 g scale like entries of g to the power 1 - 2 precond_power.
    widths = None if precond_norm == "ellipsoid" else (1 - 2 * precond_power, -2 * precond_power)
    return Ascent(direction, ("gradient", "second"), widths=widths)


def momentum() -> Ascent:
    """-m, m the base's first moment: needs no gradient at theta (Momentum-SAM, Becker, Altrock, Risse 2024)."""
    return Ascent(lambda given: (jax.tree.map(jnp.negative, given.moments.first), None, given.state), ("first",))


def update(
    update_length: Annotated[
        str, Option("unit of rho: the l2 norm of epsilon, or steps of the base", *one_of("l2", "steps"))
    ] = "l2",
    update_floor: Annotated[
        float,
        Option(
            "second moments below this fraction of their parameter's mean are set to the mean",
            *NOT_NEGATIVE,
            former=(0.0, "update_floor"),
        ),
    ] = 0.1,
) -> Ascent:
    """The base's update for a zero gradient, without decay. Needs no gradient at theta.

    This is -D^-1 m for Adam, -sign(m) for Lion, and the orthogonalised momentum for Muon. m and v contain the same
    gradients, so no entry explodes. update_floor: replaces tiny entries of v, see `filled`. Without it, every row of a
    large embedding table moves as far as a row of a layer, and a table has many more rows. update_length: "l2" gives
    |epsilon|_2 = rho. With "steps", epsilon is rho times the update, so its norm follows the learning rate.
    """

    def direction(given):
        if given.moments.update is None:
            raise OptionError("base", None, "an optim.base.Base, because this direction follows its update")
        vector = given.moments.update(given.step, lambda second: filled(second, update_floor))
        return vector, jnp.ones(()) if update_length == "steps" else None, given.state

    return Ascent(direction, ("first", "update"), widths=(0, 0))  # mup scales the base's updates already


def adaptive(
    unscaled: Annotated[str, Option('regex of the paths of parameters with T = 1; "": none', *PATTERN)] = "",
) -> Ascent:
    """T^2 g / |T g| with T = |theta| + 0.01: invariant to rescaling of parameters (ASAM, Kwon et al. 2021, eq. 8).

    unscaled: the authors' code uses T = 1 for biases ("bias$"); the paper and the default here do not.
    """

    def plain_of(params):
        try:
            return mask(params, (unscaled,) if unscaled else ())
        except ValueError as error:
            raise OptionError("unscaled", unscaled, f"a regex that matches a parameter's path: {error}") from None

    def init(params):
        plain_of(params)  # refuse a bad regex before a step is traced
        return ()

    def direction(given):
        plain = plain_of(given.params)
        size = jax.tree.map(lambda p, one: 1.0 if one else jnp.abs(p) + 0.01, given.params, plain)
        scaled = jax.tree.map(jnp.multiply, given.gradient, size)
        return jax.tree.map(jnp.multiply, scaled, size), norm(scaled), given.state

    return Ascent(direction, init=init, widths=None)


def friendly(
    sigma: Annotated[float, Option("share of the average gradient to remove", *FINITE)] = 1.0,
    decay: Annotated[float, Option("decay of the average gradient", *SHARE)] = 0.9,
) -> Ascent:
    """g - sigma * EMA(g): ascent along the noise of the batch (Friendly-SAM, Li et al. 2024). State: the average.

    As in the authors' code, the average covers only earlier gradients and starts as the first one; the first step
    climbs g itself. (With sigma = 1 the direction is the same if the average includes this gradient.)
    """

    def direction(given):
        first = norm(given.state) == 0
        vector = jax.tree.map(lambda g, m: g - sigma * m, given.gradient, given.state)
        average = jax.tree.map(
            lambda m, g: jnp.where(first, g, decay * m + (1 - decay) * g), given.state, given.gradient
        )
        return vector, None, average

    return Ascent(direction, init=lambda params: jax.tree.map(jnp.zeros_like, params))


def random(seed: Annotated[int, Option("seed of the random direction", *NATURAL)] = 0) -> Ascent:
    """A Gaussian direction that depends only on seed and step: the control for other directions."""

    def direction(given):
        leaves, structure = jax.tree.flatten(given.params)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), given.step), len(leaves))
        noise = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, noise), None, given.state

    return Ascent(direction, (), widths=None)
