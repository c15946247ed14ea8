"""Counts the FLOPs of matrix products and factorisations in any function, from its jaxpr.

A multiply-add counts two, elementwise work nothing, like the FLOPs of a run. Branches that depend on the step, such as
the refresh of SOAP's bases, are evaluated for given steps.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

LARGEST_KNOWN = 64  # largest array whose values are computed while counting: step counters and their functions


def counted(function: Callable, *arguments: Any, steps: Sequence[int] = (1,)) -> float:
    """Mean FLOPs of function(*arguments) over steps. Arguments may be ShapeDtypeStructs.

    steps: the values that all integer scalars among the arguments (an optimizer's counters) take together. A condition
    with an unknown value counts its most expensive branch; a loop of unknown length counts one turn.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    leaves = jax.tree.leaves(arguments)
    if not _branches(closed.jaxpr):
        steps = steps[:1]

    def at(step: int) -> float:
        known = [
            np.asarray(step, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.integer) and not leaf.shape else None
            for leaf in leaves
        ]
        return _count(closed.jaxpr, [_small(const) for const in closed.consts], known)[0]

    return sum(map(at, steps)) / len(steps)


def _branches(jaxpr: Any) -> bool:
    """Whether a program contains a condition, so that its cost may depend on the step."""
    return any(equation.primitive.name == "cond" for equation in jaxpr.eqns) or any(
        map(_branches, core.subjaxprs(jaxpr))
    )


def _small(value: Any) -> np.ndarray | None:
    return np.asarray(value) if np.size(value) <= LARGEST_KNOWN and not hasattr(value, "aval") else None


def _count(jaxpr: Any, consts: Sequence, known: Sequence) -> tuple[float, list]:
    """(FLOPs, output values) of a jaxpr with the given constants and inputs; None stands for an unknown value."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *known), strict=True))

    def read(atom):
        return np.asarray(atom.val) if isinstance(atom, core.Literal) else values.get(atom)

    total = 0.0
    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        flops, outputs = _equation(equation, given)
        total += flops
        values.update(zip(equation.outvars, outputs, strict=True))
    return total, [read(atom) for atom in jaxpr.outvars]


def _equation(equation: Any, given: list) -> tuple[float, list]:
    name, parameters, unknown = equation.primitive.name, equation.params, [None] * len(equation.outvars)
    if name in PRODUCTS:
        return PRODUCTS[name](equation), unknown
    if name == "cond":
        branches = [_count(branch.jaxpr, branch.consts, given[1:]) for branch in parameters["branches"]]
        if given[0] is not None:
            return branches[min(max(int(given[0]), 0), len(branches) - 1)]
        return max(flops for flops, _ in branches), unknown
    if name == "scan":
        body = parameters["jaxpr"]
        return parameters["length"] * _count(body.jaxpr, body.consts, [None] * len(body.jaxpr.invars))[0], unknown
    if name == "while":
        body = parameters["body_jaxpr"]
        return _count(body.jaxpr, body.consts, [None] * len(body.jaxpr.invars))[0], unknown
    inner = parameters.get("jaxpr") or parameters.get("call_jaxpr") or parameters.get("fun_jaxpr")
    if inner is not None:
        jaxpr, consts = (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, [])
        if len(jaxpr.invars) == len(given):
            return _count(jaxpr, consts, given)
        return _count(jaxpr, consts, [None] * len(jaxpr.invars))[0], unknown
    small = all(math.prod(atom.aval.shape) <= LARGEST_KNOWN for atom in equation.outvars)
    if small and not equation.effects and all(value is not None for value in given):
        result = equation.primitive.bind(*given, **parameters)
        return 0.0, [np.asarray(each) for each in (result if equation.primitive.multiple_results else [result])]
    return 0.0, unknown


def _dot(equation: Any) -> float:
    (summed, _), _ = equation.params["dimension_numbers"]
    terms = math.prod(equation.invars[0].aval.shape[axis] for axis in summed)
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * terms


def _convolution(equation: Any) -> float:
    kernel, outputs = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / kernel[outputs]


def _factorised(times: float) -> Callable[[Any], float]:
    """times * n^2 (m - n/3) per [m, n] in a stack, n <= m (Golub and Van Loan, Matrix Computations, 5.2 and 8.6)."""

    def flops(equation: Any) -> float:
        *stack, m, n = equation.invars[0].aval.shape
        m, n = max(m, n), min(m, n)
        return math.prod(stack) * times * n * n * (m - n / 3)

    return flops


# jax computes a QR as geqrf (R), then householder_product (Q)
PRODUCTS = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "qr": _factorised(4),
    "geqrf": _factorised(2),
    "householder_product": _factorised(2),
    "cholesky": _factorised(0.5),
    "eigh": _factorised(13.5),
    "svd": _factorised(6),
}
