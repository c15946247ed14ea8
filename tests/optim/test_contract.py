"""What every method promises with every base: one compiled step per pair, driven through all the cases.

A method whose direction asks for no moments never reads the base's state (shown below on its jaxpr), so it is run on
one base; the others are run on each base that they accept. Each base but adamw takes one of them, in turn: test_parts
and test_ascent have the moments and the way of each base. All pairs: pytest -m exhaustive.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from helpers import optim_problems as problems
from steppe import optim
from steppe.optim import methods
from steppe.optim.base import BASES
from steppe.optim.rule import REPORT, norm

MOMENTLESS = [name for name in methods.METHODS if methods.accepted_bases(name) == list(BASES)]
PAIRS = [(name, "adamw") for name in methods.METHODS] + [
    (name, base)
    for name in methods.METHODS
    for base in methods.accepted_bases(name)
    if name not in MOMENTLESS and base != "adamw"
]
NIGHTLY = pytest.mark.exhaustive


def in_turn():
    """PAIRS, all but one of each base other than adamw left to the night."""
    others = [base for base in BASES if base != "adamw"]
    for name, base in PAIRS:
        takers = [method for method, its in PAIRS if its == base]
        told = base == "adamw" or name == takers[others.index(base) % len(takers)]
        yield pytest.param(name, base, marks=[] if told else NIGHTLY)


# At a rho too small to move theta both passes run and give the base bit for bit, but for these. gsam: the part of g
# orthogonal to g_p is rounding noise. logit_sam, functional_msam: XLA fuses the loss derivative with what surrounds it,
# which is not what surrounds the base's. None, no limit: k_sam trains on the chosen sequences alone, and look_sam
# rescales the part of the sam gradient orthogonal to g to a fixed share of |g|, even where that part is noise.
LIMIT = {"gsam": 1e-5, "logit_sam": 1e-6, "functional_msam": 1e-6, "k_sam": None, "look_sam": None}
OWN_NORM = ("asam",)
IN_PARTS = {"microbatch_norm"}  # of batches in microbatches alone
ABSENT = {
    *IN_PARTS,
    "perturbed_loss",
    "survival_norm",
    "survival_cosine",
    "epsilon_row",
}  # on steps that do not perturb
NEVER_AT_THETA = {"gradient_norm", "cosine"}  # of methods that take no gradient there


def trapped():
    """The problem with traps, by batch["trap"]: 1, every loss is NaN; 2, those away from theta; 3, gradients there."""
    made = problems.language_model()

    def trunk(params, batch):
        scale, kind = params["norm"]["scale"], batch["trap"]
        moved = jnp.any(scale != batch["theta"])
        # sqrt(0 x) is 0, its derivative in x NaN.
        zero = jnp.sqrt(jnp.where((kind == 3) & moved, 0 * scale, 1.0))[..., :1] - jnp.where((kind == 3) & moved, 0, 1)
        return made.trunk(params, batch) * jnp.where((kind == 1) | ((kind == 2) & moved), jnp.nan, 1.0) + zero

    return made._replace(trunk=trunk)


OBJECTIVE = trapped()


def trap(batch, kind=0, params=None):
    rows = len(batch["tokens"])
    theta = jnp.ones(problems.D) if params is None else params["norm"]["scale"]
    return {**batch, "trap": jnp.full((rows, 1, 1), kind), "theta": jnp.tile(theta, (rows, 1, 1))}


def base_of(name):
    return optim.base_optimizer(name, 1e-2, b1=0.9, b2=0.95)


@functools.cache
def step_of(name, base_name="adamw", microbatches=1):
    """A training step as a trainer takes it: nothing advances when the report says so. rho is traced."""
    base = base_of(base_name)

    def step(rho, params, base_state, rule_state, batch, i):
        radius = {"rho": lambda _: rho} if methods.row_of(name) else {}
        rule = optim.method(name, base=base, **radius, **problems.needs(name), microbatches=microbatches)
        g, rule_state, report = rule.gradient(OBJECTIVE, params, batch, base_state, rule_state, i)
        del report["aux"]  # see test_library
        updates, new_state = base.transform.update(g, base_state, params)
        keep = lambda new, old: jnp.where(report["nonfinite"] > 0, old, new)  # noqa: E731
        new = jax.tree.map(keep, (optax.apply_updates(params, updates), new_state), (params, base_state))
        return *new, rule_state, g, report

    return jax.jit(step)


def start(name, base):
    params = problems.parameters()
    return params, base.transform.init(params), optim.method(name, **problems.needs(name)).init(params)


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y, equal_nan=True), a, b)))


@pytest.fixture(scope="module")
def plain_run():
    """base name -> (params, state) after three steps of the base alone; each compiled once."""
    runs = {}

    def run(name):
        if name not in runs:
            step, carry = step_of("adamw", name), start("adamw", base_of(name))
            for i in range(3):
                *carry, _, _ = step(0.0, *carry, trap(problems.batch(i)), i)
            runs[name] = carry[:2]
        return runs[name]

    return run


@pytest.mark.parametrize(("name", "base_name"), list(in_turn()))
def test_contract(name, base_name, plain_run):
    base, step = base_of(base_name), step_of(name, base_name)
    row = methods.METHODS[name]
    never = NEVER_AT_THETA if row and "gradient" not in row.ascent().needs else set()
    steps = 1 if name == "look_sam" else 3  # a last step that perturbs

    def run(rho, steps, batches=lambda i: trap(problems.batch(i))):
        carry = start(name, base)
        for i in range(steps):
            *carry, g, report = step(rho, *carry, batches(i), i)
        return carry, g, report

    # rho = 0 is the base bit for bit, and so is a rho too small to move theta, although both passes run then.
    carry, _, report = run(0.0, 3)
    assert same(carry[:2], plain_run(base_name))
    assert {key for key in REPORT if np.isnan(report[key])} == ABSENT
    tiny, _, _ = run(1e-30, 3)
    if LIMIT.get(name, 0) is not None:
        close(tiny[0], carry[0], LIMIT.get(name, 0))

    # Three steps at a real radius: finite, different from the base, and of the stated length.
    carry, g, report = run(0.1, steps)
    assert report["nonfinite"] == 0
    assert set(report) == set(REPORT)
    assert all(value.dtype == jnp.float32 and value.shape == () for value in report.values())
    if row:
        assert {key for key in REPORT if np.isnan(report[key])} == never | IN_PARTS
        assert report["perturbed_loss"] != report["loss"] or never
        assert np.isclose(report["epsilon_norm"], 0.1, rtol=1e-5) == (name not in OWN_NORM)
        assert np.isclose(report["survival_norm"], 1, atol=1e-5)
        assert np.isclose(report["survival_cosine"], 1, atol=1e-5)
    if not never:
        assert np.isclose(report["cosine"], 1, atol=1e-6) == (row is None)

    # Zero gradients: nothing moves, nothing is NaN that a step at rho > 0 reports.
    zero = trap(problems.batch(weights=jnp.zeros((problems.B, problems.T))))
    carry, g, report = run(0.1, 2, lambda i: zero)
    # schedule_free finds its mean again from where its gradients are taken: up to rounding
    close(carry[0], problems.parameters(), 1e-7 if base_name == "schedule_free" else 0)
    assert norm(g) == 0
    nan_keys = {key for key in REPORT if np.isnan(report[key])}
    assert nan_keys == (never | IN_PARTS if row and name != "look_sam" else ABSENT)
    assert report["epsilon_norm"] == (0 if name != "random_sam" else pytest.approx(0.1))

    # A non-finite first or second pass advances neither parameters, nor base, nor rule state.
    before, _, _ = run(0.1, 2)  # look_sam, of period 2, perturbs next
    # penalty_sam evaluates nothing away from theta, logit_sam no derivative.
    kinds = {1: True, 2: row and name != "penalty_sam", 3: row and name not in ("penalty_sam", "logit_sam")}
    for kind, bad in kinds.items():
        *after, g, report = step(0.1, *before, trap(problems.batch(5), kind, before[0]), 2)
        assert (report["nonfinite"] > 0) == bool(bad), kind
        assert same(after, before) == bool(bad)
        if kind == 3 and bad:
            assert np.isfinite(report["loss"])
            assert not np.isfinite(norm(g))


def close(a, b, tolerance):
    if tolerance == 0:
        assert same(a, b)
    difference = jax.tree.map(jnp.subtract, a, b)
    assert norm(difference) <= tolerance * norm(b)


@pytest.mark.parametrize("name", MOMENTLESS)
def test_momentless_methods_never_read_the_base(name):
    params, rule = problems.parameters(), optim.method(name, **problems.needs(name))

    def program(base_state):
        batch = trap(problems.batch())
        run = lambda s: rule.gradient(OBJECTIVE, params, batch, s, rule.init(params), 0)  # noqa: E731
        return str(jax.make_jaxpr(run)(base_state))

    read = program(())
    assert program(None) == read
    assert len(read) > 100


SECOND = [*problems.telling("second")]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SECOND else NIGHTLY) for name in methods.METHODS]
)
def test_static_zero_rho_is_the_same_program_as_the_base(name):
    params, batch = problems.parameters(), trap(problems.batch())

    def program(rule):
        return str(jax.make_jaxpr(lambda p: rule.gradient(OBJECTIVE, p, batch, None, rule.init(p), 0))(params))

    base = program(optim.method("adamw", microbatches=2))
    assert program(optim.method(name, rho=0.0, microbatches=2, **problems.needs(name))) == base
    if name != "adamw" and name in MOMENTLESS:
        assert program(optim.method(name, rho=0.1, microbatches=2, **problems.needs(name))) != base


HUGE = {"huge": jax.ShapeDtypeStruct((70_000, 40_000), jnp.float32)}  # more entries than an int32 counts


@pytest.mark.parametrize(
    ("name", "base_name"),
    [(name, "adamw") for name in methods.METHODS]
    + [("precond_msam", base) for base in methods.accepted_bases("precond_msam")],
)
def test_a_step_traces_on_parameters_beyond_two_to_the_31(name, base_name):
    base = base_of(base_name)
    radius = {"rho": 0.1} if methods.row_of(name) else {}
    rule = optim.method(name, base=base, **radius, **problems.needs(name))

    def step(params):
        state = base.transform.init(params)
        g, _, report = rule.gradient(OBJECTIVE, params, trap(problems.batch()), state, rule.init(params), 0)
        return base.transform.update(g, state, params)[0], report["epsilon_norm"]

    updates, length = jax.eval_shape(step, jax.eval_shape(lambda: problems.parameters()) | HUGE)
    assert updates["huge"].shape == HUGE["huge"].shape
    assert length.dtype == jnp.float32


SPECS = {
    problems.parameters()["embed"].shape: P(None, "fsdp"),
    problems.parameters()["layers"]["kernel"].shape: P(None, "fsdp", "tensor"),
    problems.parameters()["readout"].shape: P("fsdp", None),
}


# Both first passes that choose or weigh sequences, a split pass and a state; every path: pytest -m exhaustive.
DISTINCT = ["precond_functional_sam", "k_sam", "focal_sam", "look_sam"]
MORE = [pytest.param(name, marks=NIGHTLY) for name in ("mixture_sam", "cr_sam", "friendly_sam")]


@pytest.mark.parametrize("name", [*DISTINCT, *MORE])
def test_sharded_in_microbatches_equals_whole_on_one_device(name):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    place = lambda x: jax.device_put(x, NamedSharding(mesh, SPECS.get(x.shape, P())))  # noqa: E731
    over_rows = lambda x: jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"))))  # noqa: E731
    # k_sam chooses within each microbatch, so it takes the batch whole.
    single, sharded = step_of(name), step_of(name, microbatches=1 if name == "k_sam" else 2)
    *carry, _, _ = single(0.1, *start(name, base_of("adamw")), trap(problems.batch()), 0)
    carry_8 = jax.tree.map(place, carry)
    for i in (1, 2) if name == "look_sam" else (1,):
        batch = trap(problems.batch(i))
        *new, g, report = single(0.1, *carry, batch, i)
        *new_8, g_8, report_8 = sharded(0.1, *carry_8, jax.tree.map(over_rows, batch), i)
        assert len(g_8["layers"]["kernel"].sharding.device_set) == 8
        close(jax.tree.map(np.asarray, g_8), g, 1e-5)
        close(jax.tree.map(np.asarray, new_8), new, 1e-5)
        for key in set(REPORT) - IN_PARTS:
            np.testing.assert_allclose(report_8[key], report[key], rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ["precond_functional_sam", pytest.param("k_sam", marks=NIGHTLY)])
def test_compiled_equals_op_by_op(name):
    step, carry = step_of(name), start(name, base_of("adamw"))
    *carry, _, _ = step(0.1, *carry, trap(problems.batch()), 0)
    compiled = step(0.1, *carry, trap(problems.batch(1)), 1)
    with jax.disable_jit():
        op_by_op = step(0.1, *carry, trap(problems.batch(1)), 1)
    close(op_by_op[3], compiled[3], 1e-5)


PRECISIONS = [(jnp.bfloat16, None), (jnp.float32, jnp.bfloat16)]  # of the parameters, of the computation
SEEN = [*problems.telling("ascent", "first", "second")]


@pytest.mark.parametrize(("name", "dtype", "compute"), [
    # each of SEEN in one precision, in turn
    pytest.param(name, *both, marks=[] if name in SEEN and PRECISIONS[SEEN.index(name) % 2] == both else NIGHTLY)
    for name in methods.METHODS for both in PRECISIONS
])  # fmt: skip
def test_dtypes_in_bfloat16(name, dtype, compute):
    """Returned gradients have the parameters' dtype, whatever the compute dtype, in parts and in branches."""
    objective, params = problems.language_model(compute), problems.parameters(dtype)
    base = base_of("adamw")
    radius = {"rho": lambda step: 0.1 * step} if methods.row_of(name) else {}
    rule = optim.method(name, microbatches=2, base=base, **radius, **problems.needs(name))
    state = rule.init(params)
    run = lambda p: rule.gradient(objective, p, problems.batch(), base.transform.init(p), state, jnp.int32(3))  # noqa: E731
    g, new_state, report = jax.eval_shape(run, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(g)} == {jnp.dtype(dtype)}
    kinds = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (new_state, state)]
    assert kinds[0] == kinds[1]
    assert {report[key].dtype for key in REPORT} == {jnp.dtype(jnp.float32)}


def test_bfloat16_compute_keeps_the_direction_and_reports_what_survives():
    params, batch, reports = problems.parameters(), problems.batch(), {}
    for compute in (None, jnp.bfloat16):
        rule = optim.method("friendly_sam", rho=3e-3, sigma=0.5)
        run = jax.jit(lambda p: rule.gradient(problems.language_model(compute), p, batch, None, rule.init(p), 0))  # noqa: B023
        reports[compute] = run(params)
    (g, _, exact), (g_16, _, rounded) = reports.values()
    assert optim.rule.cosine(g, g_16) > 0.999
    assert exact["survival_cosine"] > 0.999 > 0.9 > rounded["survival_cosine"] > 0.2
    assert rounded["epsilon_norm"] == pytest.approx(3e-3, rel=1e-4)


def test_states_round_trip_through_orbax(tmp_path):
    states = {}
    for name, base_name in PAIRS:
        base = base_of(base_name)
        _, base_state, rule_state = start(name, base)
        fill = lambda tree: jax.tree.map(lambda x: x + 1, tree)  # noqa: E731
        states[f"{name} {base_name}"] = fill(base_state), fill(rule_state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", states)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, states))
    assert jax.tree.structure(restored) == jax.tree.structure(states)
    assert same(restored, states)
