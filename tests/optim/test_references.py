"""Optimizers by reference: what a file makes is what the same parts make here, and bad files are refused in a line."""

import inspect
import textwrap

import jax
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.optim import methods
from steppe.optim.base import kind_of
from steppe.optim.outside import toy
from steppe.optim.outside.contract import Subject, run
from steppe.optim.references import declared, load
from steppe.optim.rule import OptionError

FILE = """
    from typing import Annotated
    import optax
    from steppe.optim import ascent
    from steppe.optim.passes import second_pass
    from steppe.optim.methods import METHODS, Method
    from steppe.optim.options import POSITIVE, Option
    from steppe.optim.rule import norm, plain_gradient, report

    ROW = METHODS["functional_sam"]._replace(source="mine")

    def climb() -> ascent.Ascent:
        "steepest"
        return ascent.gradient()

    class Plain:
        def init(self, params):
            return ()
        def perturbing(self, steps):
            return 0.0
        def gradient(self, objective, params, batch, optimizer_state, rule_state, step):
            loss, gradient = plain_gradient(objective, params, batch)
            return gradient, rule_state, report(loss, norm(gradient), gradient)

    def plain(times: Annotated[float, Option("unused", *POSITIVE)] = 1.0):
        "the base's own"
        return Plain()

    def adam(learning_rate, b1, b2, eps, damp: Annotated[float, Option("of the step", *POSITIVE)] = 1.0):
        "AdamW without decay of its own"
        rate = optax.scale_by_learning_rate(learning_rate)
        return optax.chain(optax.scale_by_adam(b1, b2, eps), optax.scale(damp), rate)

    def by_loss(learning_rate):
        update = lambda updates, state, params=None, *, value, **_: (optax.tree.scale(-value, updates), state)
        return optax.GradientTransformationExtraArgs(optax.identity().init, update)

    def wrong():
        return 3

    def stranger(learning_rate, colour):
        return optax.sgd(learning_rate)
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A name of its own in each test: a file is run once in a process."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"mine_{tmp_path.name}.py"
    path.write_text(textwrap.dedent(FILE))
    return path.name


@pytest.mark.parametrize(("name", "same"), [("climb", "sam"), ("ROW", "functional_sam"), ("plain", "adamw")])
def test_a_method_from_a_file_is_that_of_the_same_parts(file, name, same):
    found, _, report = run(Subject(f"{file}:{name}"), 2)
    known, _, _ = run(Subject(same), 2)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(known), strict=True))
    assert report["loss"] > 0


def test_a_base_from_a_file_is_that_of_the_same_transform_and_gets_decoupled_decay(file):
    def stepped(name, **given):
        made = optim.base_optimizer(name, 1e-2, b2=0.95, weight_decay=0.1, **given)
        params = {"w": np.ones((2, 3), np.float32)}
        state = made.transform.init(params)
        for _ in range(3):
            updates, state = made.transform.update(params, state, params)
            params = jax.tree.map(np.add, params, updates)
        return params["w"]

    np.testing.assert_allclose(stepped(f"{file}:adam"), stepped("adamw"), rtol=1e-6)
    assert not np.allclose(stepped(f"{file}:adam", damp=0.5), stepped("adamw"), rtol=1e-3)
    assert kind_of(f"{file}:adam").moments == ("first", "second")
    assert optim.method("msam", base=optim.base_optimizer(f"{file}:adam", 1e-3))


def test_options_are_declared_typed_and_checked(file):
    assert {name: (each.kind, each.default) for name, each in declared({"base": f"{file}:adam"}).items()} == {
        "damp": (float, 1.0)
    }
    assert methods.options_of(f"{file}:plain", {"times": 2.0}) == {"times": 2.0}
    assert "rho" in methods.options_of(f"{file}:climb", {})
    for made, name in (
        (lambda: optim.method(f"{file}:plain", times=-1.0), "times"),
        (lambda: optim.method(f"{file}:plain", rho=0.1), "rho"),
        (lambda: optim.method(f"{file}:plain", every=2), "every"),
        (lambda: optim.base_optimizer(f"{file}:adam", 1e-3, damp=0.0), "damp"),
        (lambda: optim.base_optimizer(f"{file}:adam", 1e-3, colour="red"), "colour"),
        (lambda: optim.base_optimizer(f"{file}:adam", 1e-3, widening=2.0), "base"),
    ):
        with pytest.raises(OptionError) as caught:
            made()
        assert caught.value.name == name


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("x = 1", "x", "the name of a function"),
        ("def f(: pass", "f", "line 1"),
        ("\nraise RuntimeError('no')", "f", "line 2: RuntimeError: no"),
        ("import sys\nsys.exit(3)", "f", "SystemExit"),
        ("import nowhere_at_all", "f", "ModuleNotFoundError"),
        ("def f():\n    return 3", "f", "it returns a int"),
        ("def f():\n    raise KeyError('k')", "f", "KeyError"),
    ],
)
def test_a_file_that_does_not_serve_is_refused_in_one_line(tmp_path, text, name, says):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(OptionError, match=says) as caught:
        methods.row_of(f"{path}:{name}")
    assert "\n" not in str(caught.value)
    with pytest.raises(OptionError):
        kind_of(f"{path}:{name}")


BROKEN = """
    import optax
    from steppe.optim import ascent
    from steppe.optim.rule import plain_gradient, report

    def fails(*given, **named):
        raise {}

    def init(learning_rate):
        return optax.GradientTransformation(fails, optax.identity().update)

    def update(learning_rate):
        return optax.GradientTransformation(optax.identity().init, fails)

    def made(learning_rate):
        return fails()

    def direction() -> ascent.Ascent:
        return ascent.Ascent(fails)

    def begins() -> ascent.Ascent:
        return ascent.gradient()._replace(init=fails)

    class Rule:
        init = lambda self, params: ()
        perturbing = lambda self, steps: 1.0
        gradient = fails

    def rule():
        return Rule()
"""


@pytest.mark.parametrize("error", ["KeyError('k')", "TypeError('two\\nlines')", "SystemExit(3)", "optax.nothing"])
@pytest.mark.parametrize("name", ["init", "update", "made", "direction", "begins", "rule"])
def test_whatever_the_functions_of_a_file_raise_is_one_line_that_names_its_own(tmp_path, monkeypatch, name, error):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"broken_{tmp_path.name}.py"
    path.write_text(textwrap.dedent(BROKEN.format(error)))
    part = "base" if name in ("init", "update", "made") else "method"
    with pytest.raises(OptionError, match=r"line 7: (\w+Error|SystemExit): ") as caught:
        run(Subject(**{part: f"{path.name}:{name}"}), 1)
    assert caught.value.name == part
    assert "\n" not in str(caught.value)


def libraries():
    for module in (optax, optax.contrib):
        for name, function in sorted(vars(module).items()):
            public = inspect.isfunction(function) and not name.startswith("_")
            if public and "learning_rate" in inspect.signature(function).parameters:
                yield f"{module.__name__}:{name}"


# what a step cannot give them, or what must be chosen
REFUSED = {"lbfgs": "value_fn", "sophia": "obj_fn", "dpsgd": "l2_norm_clip", "schedule_free": "base_optimizer"}
ELSEWHERE = dict.fromkeys(["schedule_free_adamw", "schedule_free_sgd"], "must be schedule_free")


@pytest.mark.parametrize("reference", [*libraries()])
@pytest.mark.filterwarnings("ignore:Specifying a key", "ignore:.optimistic_adam. is deprecated")
def test_an_optimizer_of_optax_serves_or_is_refused_by_name(reference):
    def updated():
        transform, params = optim.base_optimizer(reference, 1e-3, weight_decay=0.1).transform, toy.parameters()
        state = transform.init(params)
        return transform.update(params, state, params, value=np.float32(1))

    says = {**REFUSED, **ELSEWHERE}.get(reference.partition(":")[2])
    if says:
        with pytest.raises(OptionError, match=says):
            jax.eval_shape(updated)
    else:
        assert jax.tree.structure(jax.eval_shape(updated)[0]) == jax.tree.structure(toy.parameters())


def test_a_base_sees_the_loss_of_its_step(file):
    (after, *_), gradient, report = run(Subject(base=f"{file}:by_loss"), 1)
    before = Subject().start()[0]
    for old, new, slope in zip(*map(jax.tree.leaves, (before, after, gradient)), strict=True):
        np.testing.assert_allclose(new, old - report["loss"] * slope, rtol=1e-5, atol=1e-7)


def test_names_that_are_nowhere_are_refused(file):
    for reference in ("nowhere.py:f", "no.such.module:f", f"{file}:absent", ":", "a b:c"):
        with pytest.raises(OptionError):
            methods.row_of(reference)
    with pytest.raises(OptionError, match=r"optim\.base"):
        methods.row_of(f"{file}:adam")
    with pytest.raises(OptionError, match="colour is neither"):
        kind_of(f"{file}:stranger")


def test_a_library_serves_by_its_dotted_name_and_its_own_file_is_what_is_hashed():
    assert kind_of("optax:adamw").moments == ("first", "second")
    assert "def adamw" in load("base", "optax:adamw").text
    assert kind_of("optax.contrib:ademamix").moments == ()
