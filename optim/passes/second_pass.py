"""Second passes: the gradient taken after the perturbation is known, and its combination with the gradient at theta.

A path maps PassInput to (perturbed loss, vectors, aux). vectors: trees, averaged over microbatches before `combine`.
aux: the readout's `returned` at theta + epsilon, None if the readout is not called there. The full path gives the exact
loss. The other paths do not form perturbed logits and give a first-order estimate; if the loss is convex in the
outputs, the functional path underestimates it and the logit path overestimates it.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.dtypes import float0
from jax.extend import core

from steppe.optim.options import FINITE, Option
from steppe.optim.passes.first_pass import Gradients
from steppe.optim.rule import Anchor, Objective, Tree, backward, inner, norm, ratio


class PassInput(NamedTuple):
    """The inputs of a path on one (micro)batch. pull is None if the pass at theta is no longer stored."""

    objective: Objective
    params: Tree
    epsilon: Tree
    perturbed: Tree
    batch: Tree
    anchor: Anchor
    loss: jax.Array
    pull: Callable | None


class SecondPass(NamedTuple):
    """A path, and combine(Gradients, vectors) -> gradient.

    anchored: the path needs the hidden state at theta. frozen: it uses the loss derivative at theta, which the readout
    may have stored. pulls: it uses the trunk's pullback at theta. combine: None if the vectors are the gradient;
    otherwise it may use the clean gradient of the whole batch.
    remember(clean gradient, gradient) -> memory and reuse(clean gradient, memory) -> gradient define the steps between
    perturbed ones (LookSAM); None: those steps return the clean gradient.
    """

    path: Callable[[PassInput], tuple[jax.Array, Tree, Tree]]
    combine: Callable[[Gradients, Tree], Tree] | None = None
    anchored: bool = False
    frozen: bool = False
    pulls: bool = False
    remember: Callable[[Tree, Tree], Tree] | None = None
    reuse: Callable[[Tree, Tree], Tree] | None = None

    @property
    def only_climbs(self) -> bool:
        """Whether the gradient at theta serves only the ascent, not the returned gradient."""
        return self.combine is None and self.remember is None


def _full(given: PassInput, params: Tree) -> tuple[jax.Array, Tree, Tree]:
    def loss(p):
        value, aux = given.objective.readout(p, given.objective.trunk(p, given.batch), given.batch)
        return value, aux.get("returned")

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return value, gradient, aux


def _check_frozen(given: PassInput, params: Tree, hidden: Tree, anchor: Anchor) -> None:
    """Raises ValueError if the frozen readout's gradient does not depend on the anchor."""

    def gradient(anchor):
        frozen = jax.grad(given.objective.frozen_readout, argnums=(0, 1), allow_int=True)
        return [leaf for leaf in jax.tree.leaves(frozen(params, hidden, anchor, given.batch)) if leaf.dtype != float0]

    traced = jax.make_jaxpr(gradient)(anchor).jaxpr
    if not any(_reached(traced, [True] * len(traced.invars))):
        raise ValueError(
            "the loss is linear in the outputs, so its derivative is constant: functional_sam would equal sam, and "
            "logit_sam its base. Let forward return the logits, and loss compute the loss from them"
        )


def _reached(program: core.Jaxpr, inputs: list[bool]) -> list[bool]:
    """Which outputs of a traced program may depend on the marked inputs."""
    reached = {variable for variable, marked in zip(program.invars, inputs, strict=True) if marked}
    for equation in program.eqns:
        marked = [not isinstance(v, core.Literal) and v in reached for v in equation.invars]
        if not any(marked):
            continue
        inside, outputs = [*core.jaxprs_in_params(equation.params)], [True] * len(equation.outvars)
        once = len(inside) == 1 and equation.primitive.name not in ("scan", "while")
        if once and (len(inside[0].invars), len(inside[0].outvars)) == (len(marked), len(outputs)):
            outputs = _reached(inside[0], marked)
        reached |= {variable for variable, out in zip(equation.outvars, outputs, strict=True) if out}
    return [not isinstance(v, core.Literal) and v in reached for v in program.outvars]


def _functional(given: PassInput, hidden: Tree, pull: Callable) -> tuple[jax.Array, Tree, None]:
    """The functional path. hidden, pull: the trunk's result and pullback at theta + epsilon."""
    _check_frozen(given, given.perturbed, hidden, given.anchor)
    difference, gradient = backward(
        given.objective.frozen_readout, pull, given.perturbed, hidden, given.anchor, given.batch
    )
    return given.loss + difference, gradient, None


def _logit(given: PassInput, perturbed_hidden: Tree) -> tuple[jax.Array, Tree, None]:
    frozen = Anchor(given.perturbed, perturbed_hidden)
    _check_frozen(given, given.params, given.anchor.hidden, frozen)
    # With several microbatches the pass at theta is not stored: run its forward again.
    pull = given.pull or jax.vjp(lambda p: given.objective.trunk(p, given.batch), given.params)[1]
    difference, gradient = backward(
        given.objective.frozen_readout, pull, given.params, given.anchor.hidden, frozen, given.batch
    )
    return given.loss - difference, gradient, None


def full() -> SecondPass:
    """J(theta+eps)^T dl(F(theta+eps)): the full gradient at the perturbed point."""
    return SecondPass(lambda given: _full(given, given.perturbed))


def functional() -> SecondPass:
    """J(theta+eps)^T dl(F(theta)): perturbed Jacobian, loss derivative frozen at theta (Functional-SAM)."""

    def path(given):
        return _functional(given, *jax.vjp(lambda p: given.objective.trunk(p, given.batch), given.perturbed))

    return SecondPass(path, anchored=True, frozen=True)


def logit() -> SecondPass:
    """J(theta)^T dl(F(theta+eps)): perturbed loss derivative, Jacobian at theta; the complement of functional()."""

    def path(given):
        return _logit(given, given.objective.trunk(given.perturbed, given.batch))

    return SecondPass(path, anchored=True, pulls=True)


def mixture(alpha: Annotated[float, Option("share of the functional path", *FINITE)] = 0.5) -> SecondPass:
    """alpha * functional + (1 - alpha) * logit."""

    def path(given):
        hidden, pull = jax.vjp(lambda p: given.objective.trunk(p, given.batch), given.perturbed)
        loss_f, functional_gradient, _ = _functional(given, hidden, pull)
        loss_l, logit_gradient, _ = _logit(given, hidden)
        # l + alpha (f - l), not alpha f + (1 - alpha) l: exact where the two agree.
        mixed = jax.tree.map(lambda f, l: l + alpha * (f - l), functional_gradient, logit_gradient)
        return loss_l + alpha * (loss_f - loss_l), mixed, None

    return SecondPass(path, anchored=True, frozen=True, pulls=True)


def penalty() -> SecondPass:
    """g + H eps with an exact Hessian-vector product: the gradient of L + eps^T g for fixed eps."""

    def path(given):
        def value_and_gradient(p):
            *both, aux = _full(given, p)
            return tuple(both), aux

        # The derivative of a product is two products. The gradient is already known, so only those of its parts that
        # the derivative needs are computed: 8 products, where a gradient has 3.
        at, tangent = (given.params,), (given.epsilon,)
        (loss, _), (slope, product), aux = jax.jvp(value_and_gradient, at, tangent, has_aux=True)
        return loss + slope + 0.5 * inner(given.epsilon, product), product, aux

    return SecondPass(path, lambda gradients, product: jax.tree.map(jnp.add, gradients.clean, product))


def _orthogonal(vector: Tree, along: Tree) -> Tree:
    share = ratio(inner(vector, along), inner(along, along), 0.0)
    return jax.tree.map(lambda v, a: v - share * a, vector, along)


def surrogate_gap(alpha: Annotated[float, Option("weight of the part orthogonal to g_p", *FINITE)] = 0.4) -> SecondPass:
    """g_p - alpha * (part of g orthogonal to g_p): also lowers the gap L_p - L (GSAM, Zhuang et al. 2022, alg. 1)."""

    def combine(gradients, perturbed):
        return jax.tree.map(lambda p, o: p - alpha * o, perturbed, _orthogonal(gradients.clean, perturbed))

    return SecondPass(lambda given: _full(given, given.perturbed), combine)


def reused(alpha: Annotated[float, Option("weight of the reused part", *FINITE)] = 0.7) -> SecondPass:
    """The full path; steps between reuse its part orthogonal to g (LookSAM, Liu et al. 2022, alg. 1)."""

    def reuse(clean, memory):
        share = alpha * ratio(norm(clean), norm(memory), 0.0)
        return jax.tree.map(lambda g, v: g + share * v, clean, memory)

    return SecondPass(
        lambda given: _full(given, given.perturbed),
        remember=lambda clean, gradient: _orthogonal(gradient, clean),
        reuse=reuse,
    )


def curvature_regularized(
    gamma: Annotated[float, Option("weight of the curvature g+ + g- - 2g", *FINITE)] = 0.1,
    beta: Annotated[float, Option("weight of the gradient difference g+ - g-", *FINITE)] = 0.01,
) -> SecondPass:
    """g+ + gamma (g+ + g- - 2g) + beta (g+ - g-), gradients at theta +- eps (CR-SAM, Wu, Luo, Wunsch 2024)."""

    def path(given):
        loss, up, aux = _full(given, given.perturbed)
        # The barrier orders the two passes, so that their activations are not in memory together.
        opposite, up = lax.optimization_barrier((jax.tree.map(jnp.subtract, given.params, given.epsilon), up))
        return loss, (up, _full(given, opposite)[1]), aux

    def combine(gradients, vectors):
        return jax.tree.map(lambda g, u, d: u + gamma * (u + d - 2 * g) + beta * (u - d), gradients.clean, *vectors)

    return SecondPass(path, combine)


def focused() -> SecondPass:
    """g + (focused gradient at theta+eps) - (that at theta): Focal-SAM (Li et al. 2025), with first_pass.focal."""

    def path(given):
        loss, gradient, aux = _full(given, given.perturbed)
        return given.loss + loss, gradient, aux

    def combine(gradients, perturbed):
        return jax.tree.map(lambda g, a, p: g + (p - a), gradients.clean, gradients.ascent, perturbed)

    return SecondPass(path, combine)
