"""Every key of config.optim and config.train, and some others, reaches the traced step, its operands, or the watch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.configs import base
from steppe.lm.model.mesh import batch_sharding
from steppe.lm.parts.anomaly import Watch
from steppe.lm.parts.assembly import assemble, program_key
from steppe.lm.parts.step import trace_step
from steppe.optim.passes.two_pass import SWITCHES

SAM = {"optim.method": "sam"}
PRECOND = {"optim.method": "precond_sam"}
# key: (another value, what must be set for it to matter)
STEP = {
    "optim.method": ("functional_sam", SAM),
    "optim.rho": (0.0, SAM),
    "optim.rho_schedule": ("cosine", SAM),
    "optim.start": ("10%", SAM),
    "optim.stop": ("90%", SAM),
    "optim.ascent_over": ("microbatch", {**SAM, "train.microbatches": 2}),
    "optim.ascent_fraction": (0.5, {**SAM, "optim.ascent_over": "subset"}),
    "optim.rate_factors": (("layers/=0.5",), {}),
    "average.weights": (("ema",), {}),
    "average.horizon": ("50%", {"average.weights": ("ema",)}),
    "average.snapshots": (2, {"average.weights": ("lawa",)}),
    "model.parametrisation": ("mup", {"model.base_width": 8}),
    "model.base_width": (4, {"model.parametrisation": "mup"}),
    "optim.precond_power": (0.25, PRECOND),
    "optim.precond_eps": (1e-3, PRECOND),
    "optim.precond_norm": ("ellipsoid", PRECOND),
    "optim.precond_moment": ("stale", PRECOND),
    "optim.precond_floor": (0.5, {**PRECOND, "optim.precond_moment": "stale"}),
    "optim.unscaled": ("norm", {"optim.method": "asam"}),
    "optim.alpha": (0.3, {"optim.method": "gsam"}),
    "optim.beta": (0.3, {"optim.method": "cr_sam"}),
    "optim.gamma": (0.3, {"optim.method": "cr_sam"}),
    "optim.lam": (0.3, {"optim.method": "focal_sam"}),
    "optim.sigma": (0.3, {"optim.method": "friendly_sam"}),
    "optim.update_length": ("steps", {"optim.method": "precond_msam"}),
    "optim.update_floor": (0.5, {"optim.method": "precond_msam"}),
    "optim.decay": (0.3, {"optim.method": "friendly_sam"}),
    "optim.k": (2, {"optim.method": "k_sam", "optim.k": 1}),
    "optim.seed": (2, {"optim.method": "random_sam"}),
    "optim.clip_order": ("before", SAM),
    "optim.clip_norm": (0.5, {}),
    "optim.base": ("lion", {}),
    "optim.end_learning_rate": (0.2, {}),
    "optim.schedule": ("linear", {}),
    "optim.warmup": ("10%", {}),
    "optim.warmup_from_zero": (True, {"optim.end_learning_rate": 0.0}),
    "optim.cooldown": ("30%", {"optim.schedule": "wsd"}),
    "optim.b1": (0.8, {}),
    "optim.b2": (0.9, {}),
    "optim.eps": (1e-3, {}),
    "optim.weight_decay": (0.2, {}),
    "optim.decay_mask": (("layers/",), {}),
    "train.duration": ("200 steps", {}),
    "train.counted": ("positions", {"data.packing": "bestfit", "train.duration": "10k tokens"}),
    "train.tokens_per_parameter": (40.0, {"train.duration": "chinchilla"}),
    "train.parameter_count": ("total", {"train.duration": "chinchilla"}),
    "train.batch_size": (16, {}),
    "train.microbatches": (2, {}),
}


def another(name: str):
    """A value that a switch accepts and that is not its default."""
    kind, default, option = SWITCHES[name]
    tried = {tuple: (("layers/",), ("layers/=0.5",)), str: option.names, bool: (True, False)}.get(kind, (0.1, 2))
    return next(value for value in tried if value != default and isinstance(value, kind) and option.allows(value))


for name in SWITCHES:
    STEP.setdefault(f"optim.{name}", (another(name), SAM))
OPERANDS = {"optim.peak_learning_rate": (2e-3, {}), "optim.rho": (0.2, SAM)}
WATCH = {
    "train.on_nonfinite": "skip",
    "train.on_spike": "rollback",
    "train.spike_score": 2.0,
    "train.spike_window": 4,
    "train.max_skips": 1,
}


def config_of(changes: dict):
    config = base.get_config()
    config.model.update(style="nanodo", layers=1, width=16, heads=2, mlp_width=32)  # the one that is traced sooner
    config.data.sequence_length = 8
    config.train.update(batch_size=8, duration="100 steps")
    config.mesh.update(data=1, fsdp=1, tensor=1)
    for key, value in changes.items():
        section, name = key.split(".")
        config[section][name] = value
    return config


@functools.cache
def traced(changes: tuple) -> tuple[str, dict]:
    """(the traced step, with its constants, its operands) of a small config with these changes."""
    config = config_of(dict(changes))
    frequency = jnp.full(288, 1 / 288)
    parts = assemble(config, 259, 10**6, frequency, jax.devices()[:1], tokens_per_row=4.5)
    shape, place = (config.train.batch_size, config.data.sequence_length), batch_sharding(parts.mesh)
    names = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in names.items()}
    program = trace_step(parts, batch).jaxpr
    return f"{program}\n{[np.asarray(value).tolist() for value in program.consts]}", parts.scalars


def both(key: str, value, context: dict) -> tuple:
    """The step without and with a key turned."""
    return traced(tuple(context.items())), traced(tuple({**context, key: value}.items()))


def keyed(key: str, value, context: dict) -> bool:
    """Whether the programs of two runs, without and with a key turned, are kept under one key."""
    before, after = (program_key(config_of(changes), "of the text") for changes in (context, {**context, key: value}))
    return before == after


def judged(changes: dict) -> list:
    """What a watch makes of a made-up run with a spike, two steps that are not finite, and a quiet end."""
    config = config_of({"train.spike_score": 6.0, "train.spike_window": 8, "train.max_skips": 3, **changes})
    watch, said = Watch(config), []
    for step in range(1, 40):
        limit = watch.limit(step)
        loss = 3.0 - 0.01 * step + 0.05 * (-1) ** step + (5.0 if step in (30, 31) else 0.2 if step == 20 else 0.0)
        bad = step in (34, 35)
        facts = {"loss": loss, "perturbed_loss": loss, "gradient_norm": 1.0, "epsilon_norm": 0.1}
        found = watch.judge(step, {**facts, "nonfinite": float(bad), "spike": float(loss > limit)})
        said.append((float(limit), found and found["decision"]))
    return said


@pytest.mark.parametrize(
    "key", dict.fromkeys((*STEP, *(key for key in list(base.keys()) if key.startswith(("optim.", "train.")))))
)
def test_each_key_changes_what_runs(key):
    if key in WATCH:
        assert judged({key: WATCH[key]}) != judged({})
        return
    if key in OPERANDS:  # one program serves them all
        (program, before), (same, after) = both(key, *OPERANDS[key])
        assert program == same
        assert before != after
        assert keyed(key, *OPERANDS[key]), "a worker takes the program of a run before it"
    if key in STEP or key not in OPERANDS:
        (program, _), (other, _) = both(key, *STEP[key])
        assert program != other
        assert not keyed(key, *STEP[key])


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_clip_is_made_in_either_order(order):
    (program, _), (other, _) = both("optim.clip_norm", 0.5, {**SAM, "optim.clip_order": order})
    assert program != other


def test_the_gap_is_what_the_loss_rises_by():
    """On a step of plain gradient ascent at a small radius the loss at theta + epsilon is above that at theta."""
    from steppe.lm.parts.state import create
    from steppe.lm.parts.step import compile_step

    config = config_of({**SAM, "optim.rho": 0.05})
    parts = assemble(config, 259, 10**6, None, jax.devices()[:1])
    tokens = jax.random.randint(jax.random.key(0), (8, 9), 0, 259)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jnp.ones((8, 8), jnp.float32)}
    batch = jax.device_put(batch, batch_sharding(parts.mesh))
    _, metrics = compile_step(parts, batch)(create(parts.mesh, parts.initialise), batch, np.float32(np.inf))
    assert float(metrics["sharpness_gap"]) > 0
    assert float(metrics["sharpness_gap"]) == float(metrics["perturbed_loss"]) - float(metrics["loss"])


def test_the_same_config_is_the_same_step():
    """So that a difference is the key's: nothing of a trace is of this process or of the time."""
    changes = (("optim.method", "precond_functional_sam"), ("optim.rate_factors", ("layers/=0.5",)))
    assert traced(changes)[0] == traced.__wrapped__(changes)[0]
