"""Counted FLOPs are XLA's for straight programs, and know loops and branches that XLA counts once or in full."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from steppe.lm.model.transformer import Shape
from steppe.lm.parts.budget import base_flops, rule_flops, step_flops
from steppe.optim import base_optimizer, method
from steppe.optim.methods import Cost
from steppe.optim.outside.flops import counted

A, B = jax.ShapeDtypeStruct((8, 512), jnp.float32), jax.ShapeDtypeStruct((512, 4), jnp.float32)
COUNT = jax.ShapeDtypeStruct((), jnp.int32)
SHAPE = Shape(
    style="nanodo", layers=2, width=64, heads=4, kv_heads=4, mlp_width=256, vocabulary=256, sequence_length=128
)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a @ b,
        lambda a, b: jnp.einsum("ij,jk->ki", a, b) @ (a @ b),
        jax.jit(lambda a, b: jax.checkpoint(jnp.matmul)(a, b)),
        jax.grad(lambda a, b: jnp.tanh(a @ b).sum(), argnums=(0, 1)),
    ],
)
def test_products_are_counted_as_xla_counts_them(function):
    compiled = jax.jit(function).lower(A, B).compile().cost_analysis()["flops"]
    assert counted(function, A, B) == pytest.approx(compiled, rel=0.02)  # XLA counts sums too


def test_loops_count_each_turn_and_branches_by_the_step():
    one = counted(jnp.matmul, A, B)
    assert counted(lambda a, b: lax.scan(lambda c, _: (c, a @ b), 0, length=5), A, B) == 5 * one
    assert counted(lambda a, b: lax.fori_loop(0, 5, lambda i, c: c + a @ b, jnp.zeros((8, 4))), A, B) == 5 * one

    def every_tenth(a, b, count):
        return lax.cond(count % 10 == 0, lambda: a @ b, lambda: jnp.zeros((8, 4)))

    assert counted(every_tenth, A, B, COUNT, steps=range(100, 200)) == pytest.approx(one / 10)
    unknown = lambda a, b: lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((8, 4)))  # noqa: E731
    assert counted(unknown, A, B) == one


def test_muon_costs_its_newton_schulz_steps_and_adamw_nothing():
    """Five steps of X X^T, its square, and a product with X, of which the shorter side is n."""
    n, m = 64, 256
    each = lambda short, long: 5 * (4 * short**2 * long + 2 * short**3)  # noqa: E731
    assert base_flops(SHAPE, "muon") == 2 * (4 * each(n, n) + 2 * each(n, m))
    assert base_flops(SHAPE, "adamw") == 0
    assert base_flops(SHAPE, "soap") > 0


def test_a_rule_of_two_gradients_costs_two():
    base = base_optimizer("adamw", 1e-3)
    extra = rule_flops(SHAPE, method("sam", rho=0.1, base=base), base, 4)
    assert extra == pytest.approx(step_flops(SHAPE, 4 * 128, Cost()), rel=0.01)
