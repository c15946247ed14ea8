"""The contract holds for what is here, and each check finds the fault that it is for."""

import textwrap

import pytest

from steppe.optim.outside import contract
from steppe.optim.outside.contract import Broken, Subject
from steppe.optim.rule import OptionError

EXAMPLES = "steppe.optim.outside.examples."
SOME = [
    Subject("functional_sam"),
    Subject(f"{EXAMPLES}half_sign:half_sign"),
    Subject("msam", f"{EXAMPLES}hyperball:muon_hyperball"),
]
MORE = [
    Subject(base=f"{EXAMPLES}mars:mars"),
    Subject(base=f"{EXAMPLES}ademamix:ademamix", options=()),
    Subject("msam", "muon"),
    Subject("precond_msam", "muon"),
    Subject(base=f"{EXAMPLES}hyperball:adam_hyperball"),
    *(Subject(name) for name in ("sam", "precond_functional_sam", "gsam", "friendly_sam", "precond_functional_msam")),
    *(Subject(base=name) for name in ("muon", "lion", "adafactor", "nadamw")),
]


@pytest.mark.parametrize("subject", [*SOME, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in MORE)])
def test_everything_here_keeps_the_contract(subject):
    assert [(name, said) for name, _, said in contract.outcomes(subject) if said] == []


HEAD = """
    import jax, jax.numpy as jnp, numpy as np, optax
    from steppe.optim.ascent import Ascent
    from steppe.optim.rule import norm

    def sgd(change, state=lambda params: ()):
        return lambda learning_rate: optax.GradientTransformation(state, lambda g, s, p=None: change(g, s, p))
    moved = lambda g: jax.tree.map(lambda x: -1e-2 * x, g)
"""
# {check: (the part, what breaks it)}
FAULTS = {
    "shapes": ("base", "f = sgd(lambda g, s, p: (jax.tree.map(lambda x: x.astype(jnp.float32), moved(g)), s))"),
    "jit": ("base", "f = sgd(lambda g, s, p: (moved(g), s + 1.0), lambda p: jnp.zeros((), jnp.int32))"),
    "radius": (
        "method",
        """
    def f():
        return Ascent(lambda given: (jax.tree.map(jnp.zeros_like, given.gradient), None, given.state))
    """,
    ),
    "zeros": ("base", "f = sgd(lambda g, s, p: (jax.tree.map(lambda x: -x / norm(g), g), s))"),
    "nan": (
        "rule",
        """
    class Deaf:
        init = lambda self, params: jnp.zeros(())
        perturbing = lambda self, steps: 0.0
        def gradient(self, objective, params, batch, base_state, rule_state, step):
            from steppe.optim.rule import plain_gradient, report
            loss, g = plain_gradient(objective, params, batch)
            return g, rule_state + loss, report(jnp.nan_to_num(loss), None, jax.tree.map(jnp.nan_to_num, g))
    def f():
        return Deaf()
    """,
    ),
    "microbatches": (
        "rule",
        """
    class First:
        init = lambda self, params: ()
        perturbing = lambda self, steps: 0.0
        def __init__(self, microbatches): self.parts = microbatches
        def gradient(self, objective, params, batch, base_state, rule_state, step):
            from steppe.optim.rule import plain_gradient, report
            rows = len(batch["tokens"]) // self.parts
            loss, g = plain_gradient(objective, params, {k: v[:rows] for k, v in batch.items()})
            return g, rule_state, report(loss, norm(g), g)
    def f(microbatches):
        return First(microbatches)
    """,
    ),
    "learns": ("base", "f = sgd(lambda g, s, p: (jax.tree.map(lambda x: 1e-2 * x, g), s))"),
}


@pytest.mark.parametrize("check", FAULTS)
def test_each_check_finds_its_fault(check, tmp_path):
    part, text = FAULTS[check]
    path = tmp_path / "broken.py"
    path.write_text(textwrap.dedent(HEAD) + textwrap.dedent(f"    {text}" if not text.startswith("\n") else text))
    subject = Subject(**{"base" if part == "base" else "method": f"{path}:f"})
    ((name, _, said),) = contract.outcomes(subject, [getattr(contract, check)])
    assert (name, bool(said)) == (check, True)
    assert "\n" not in said


def test_sharding_needs_eight_devices_and_says_so(monkeypatch):
    monkeypatch.setattr(contract, "DEVICES", (64, 64, 64))
    with pytest.raises(Broken, match="JAX_NUM_CPU_DEVICES"):
        contract.sharding(Subject())


def test_a_base_that_asks_for_more_than_a_step_gives_is_refused_at_once():
    with pytest.raises(OptionError, match="value_fn"):
        next(contract.outcomes(Subject(base="optax:lbfgs")))
