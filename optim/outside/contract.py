"""The contract of a method or base with a training run, as checks for optimizers from outside.

Each check tests a Subject on the toy problem. It raises Broken with the observed and the required behaviour. Steppe's
own methods pass all checks in the tests.
"""

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from steppe.optim.base import Base, base
from steppe.optim.methods import method, row_of
from steppe.optim.outside import toy
from steppe.optim.rule import REPORT, OptionError, Tree, cosine, norm

DEVICES = (2, 2, 2)  # of the mesh: data, fsdp, tensor
CLOSE = 1e-5  # tolerance for sums in another order, relative to the norm


class Broken(Exception):
    """A violation of the contract; its message is for the user."""


class Subject(NamedTuple):
    """A method and a base, by name or reference, with options and a radius rho > 0."""

    method: str = "adamw"
    base: str = "adamw"
    options: tuple[tuple[str, Any], ...] = ()
    rho: float = 0.1

    @property
    def has_radius(self) -> bool:
        """Whether the method takes rho."""
        row = row_of(self.method)
        return row is not None and "rho" in row.declared()

    def made(self) -> Base:
        """Makes its base."""
        return base(self.base, 1e-2, b1=0.9, b2=0.95)

    def start(self, dtype=jnp.float32) -> tuple:
        """(params, base state, rule state) at step 0."""
        params = toy.parameters(dtype)
        return params, self.made().transform.init(params), self.rule(self.rho).init(params)

    def rule(self, rho: Any, **switches: Any):
        """Makes its rule for a radius."""
        given = {"rho": rho} if self.has_radius else {}
        return method(self.method, base=self.made(), **given, **dict(self.options), **switches)


@functools.cache
def step_of(subject: Subject, microbatches: int = 1, broken: bool = False) -> Any:
    """A jitted step(rho, params, base state, rule state, batch, i) -> (params, states, gradient, report), as in a run:
    params and base state stay if the report has non-finite numbers. broken: every loss is NaN."""
    problem, transform = toy.language_model(), subject.made().transform
    if broken:
        trunk = problem.trunk
        problem = problem._replace(trunk=lambda params, batch: trunk(params, batch) * jnp.nan)

    def step(rho, params, base_state, rule_state, batch, i):
        rule = subject.rule(lambda _: rho, microbatches=microbatches)
        gradient, new_rule, report = rule.gradient(problem, params, batch, base_state, rule_state, i)
        report.pop("aux", None)
        updates, new_base = transform.update(gradient, base_state, params, value=report["loss"])
        keep = lambda new, old: jnp.where(report["nonfinite"] > 0, old, new)  # noqa: E731
        new = jax.tree.map(keep, (optax.apply_updates(params, updates), new_base), (params, base_state))
        return *new, new_rule, gradient, report

    return jax.jit(step)


def run(subject: Subject, steps: int, rho: float | None = None, **given: Any) -> tuple[tuple, Tree, dict]:
    """((params, base state, rule state), gradient, report) after `steps` steps on different batches."""
    step, carry = step_of(subject, **given), subject.start()
    gradient = report = None
    for i in range(steps):
        *carry, gradient, report = step(subject.rho if rho is None else rho, *carry, toy.batch(i), i)
    return tuple(carry), gradient, report or {}


def need(true: Any, said: str) -> None:
    """Raises Broken with the message `said` unless `true`."""
    if not true:
        raise Broken(said)


def _kinds(tree: Tree) -> list:
    return [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]


def _same(a: Tree, b: Tree) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), a, b)))


def _apart(a: Tree, b: Tree) -> float:
    """|a - b| relative to |b|."""
    a, b = (jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), tree) for tree in (a, b))
    return float(norm(jax.tree.map(jnp.subtract, a, b)) / jnp.maximum(norm(b), 1e-30))


def shapes(subject: Subject) -> None:
    """Gradient, update and states keep the shapes and dtypes of their inputs, in float32 and bfloat16."""
    for dtype in (jnp.float32, jnp.bfloat16):
        start, transform = jax.eval_shape(lambda dtype=dtype: subject.start(dtype)), subject.made().transform
        rule = subject.rule(subject.rho)
        run = lambda *s, rule=rule: rule.gradient(toy.language_model(), s[0], toy.batch(), s[1], s[2], jnp.int32(3))  # noqa: E731
        gradient, rule_state, report = jax.eval_shape(run, *start)
        updates, base_state = jax.eval_shape(transform.update, gradient, start[1], start[0], value=report["loss"])
        for name, made, given in (
            ("gradient", gradient, start[0]),
            ("update", updates, start[0]),
            ("base's state", base_state, start[1]),
            ("rule's state", rule_state, start[2]),
        ):
            tree, wanted = jax.tree.structure(made), jax.tree.structure(given)
            need(tree == wanted, f"the {name} must be a tree like its input: {wanted}, not {tree}")
            pairs = zip(_kinds(made), _kinds(given), strict=True)
            wrong = [f"{a[1]}{list(a[0])} for {b[1]}{list(b[0])}" for a, b in pairs if a != b]
            need(not wrong, f"the {name} must keep shapes and dtypes ({jnp.dtype(dtype).name} parameters): {wrong[:3]}")
        missing = set(REPORT) - set(report)
        need(not missing, f"the report must hold {', '.join(sorted(missing))}: optim.rule.report makes it")


def jit(subject: Subject) -> None:
    """One compiled step serves all steps, and two runs are bitwise equal."""
    step = step_of(subject)
    first, second = run(subject, 3)[0], run(subject, 3)[0]
    need(_same(first, second), "two runs of three steps must be bitwise equal; they differ")
    programs = step._cache_size()
    need(programs == 1, f"a step must compile once, not {programs} times: a state changes its dtype or shape")


def radius(subject: Subject) -> None:
    """rho = 0 equals the base bitwise; a larger rho changes the gradient."""
    if not subject.has_radius:
        return
    plain = run(subject._replace(method="adamw", options=()), 3, 0.0)[0]
    zero = run(subject, 3, 0.0)[0]
    need(_same(zero[:2], plain[:2]), "rho = 0 must equal the base bitwise; after 3 steps it differs")
    at, base_alone = run(subject, 3)[1], run(subject, 3, 0.0)[1]  # at the first step there is no momentum to climb
    need(not _same(at, base_alone), f"rho = {subject.rho} must change the gradient; it equals the base's")


def zeros(subject: Subject) -> None:
    """Zero gradients give no NaN and change no parameter."""
    step, carry, gradient = step_of(subject), subject.start(), None
    batch = toy.batch(weights=jnp.zeros((toy.B, toy.T)))
    for i in range(2):
        *carry, gradient, _ = step(subject.rho, *carry, batch, i)
    finite = all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((gradient, carry)))
    need(finite, "zero gradients must give finite numbers; a division by a zero norm or moment gives NaN")
    moved = _apart(carry[0], toy.parameters())
    need(moved <= 1e-6, f"zero gradients must change no parameter; two steps changed them by {moved:.1e} of their norm")


def nan(subject: Subject) -> None:
    """A NaN loss is reported and does not change the rule's state."""
    carry = run(subject, 2)[0]
    *after, _, report = step_of(subject, broken=True)(subject.rho, *carry, toy.batch(5), 2)
    need(report["nonfinite"] > 0, "the report must have nonfinite > 0 if the loss is NaN: use optim.rule.report")
    need(_same(tuple(after), carry), "a step with a NaN must change no state; it changed the rule's state")


def microbatches(subject: Subject) -> None:
    """Two microbatches give the gradient of the whole batch."""
    one, two = run(subject, 2), run(subject, 2, microbatches=2)
    apart = _apart(two[1], one[1])
    need(
        apart <= CLOSE,
        f"two microbatches must give the gradient of the whole batch; it differs by {apart:.1e} of its norm",
    )


def sharding(subject: Subject) -> None:
    """Eight devices that split batch, parameters and states give the result of one device."""
    count = int(np.prod(DEVICES))
    need(len(jax.devices()) >= count, f"needs eight devices: set JAX_NUM_CPU_DEVICES={count} on a CPU")
    axes = ("data", "fsdp", "tensor")
    mesh = jax.make_mesh(DEVICES, axes, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:count])
    params = toy.parameters()
    specs = {
        params["embed"].shape: P(None, "fsdp"),
        params["layers"]["kernel"].shape: P(None, "fsdp", "tensor"),
        params["readout"].shape: P("fsdp", None),
    }
    place = lambda x: jax.device_put(x, NamedSharding(mesh, specs.get(jnp.shape(x), P())))  # noqa: E731
    rows = lambda x: jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))  # noqa: E731
    step, carry = step_of(subject), run(subject, 1)[0]
    *one, gradient, _ = step(subject.rho, *carry, toy.batch(1), 1)
    *many, split, _ = step(subject.rho, *jax.tree.map(place, carry), jax.tree.map(rows, toy.batch(1)), 1)
    apart = max(_apart(split, gradient), _apart(many[0], one[0]))
    need(apart <= CLOSE, f"eight devices must give the result of one; it differs by {apart:.1e} of its norm")


def resume(subject: Subject) -> None:
    """A checkpoint restores the states bitwise, so that a run can resume."""
    carry = run(subject, 2)[0]
    state = {"base": carry[1], "rule": carry[2]}
    with tempfile.TemporaryDirectory() as directory, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{directory}/state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(f"{directory}/state", jax.tree.map(jnp.zeros_like, state))
    need(
        jax.tree.structure(restored) == jax.tree.structure(state),
        "a checkpoint must restore the structure of the states",
    )
    need(_same(restored, state), "a checkpoint must restore the states bitwise")


def learns(subject: Subject) -> None:
    """Thirty steps on one batch lower its loss, and the gradient has a positive cosine with the plain one."""
    step, carry = step_of(subject), subject.start()
    losses, batch = [], toy.batch()
    for i in range(30):
        *carry, gradient, report = step(subject.rho, *carry, batch, i)
        losses.append(float(report["loss"]))
        if i == 0:
            plain = jax.grad(lambda p: toy.token_loss(toy.trunk(p, batch) @ p["readout"], batch)[0])(toy.parameters())
            along = float(cosine(gradient, plain))
            need(along > 0, f"the gradient must descend: its cosine with the plain one is {along:.2f}")
    need(np.isfinite(losses).all(), f"thirty steps must stay finite; step {int(np.argmin(np.isfinite(losses)))} is not")
    need(losses[-1] < losses[0], f"thirty steps must lower the loss; it went from {losses[0]:.3f} to {losses[-1]:.3f}")


CHECKS = (shapes, jit, radius, zeros, nan, microbatches, sharding, resume, learns)


def outcomes(subject: Subject, checks: Sequence[Callable[[Subject], None]] = CHECKS) -> Iterator[tuple[str, str, str]]:
    """Yields (name, meaning, error message or "") of every check. Raises OptionError where the subject cannot run."""
    for check in checks:
        try:
            check(subject)
            said = ""
        except OptionError:
            raise
        except Broken as error:
            said = str(error)
        except Exception as error:  # a user's function may raise anything
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield check.__name__, (check.__doc__ or "").partition("\n")[0], said
