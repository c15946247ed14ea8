"""Every impossible value is refused by name, and what runs is let through."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steppe.configs import base
from steppe.configs.keys import DURATION, ConfigError
from steppe.configs.read import UsageError, reader
from steppe.data.errors import DataError
from steppe.lm.keep.exits import REFUSALS
from steppe.lm.parts.assembly import foreseen
from steppe.lm.parts.check import check, mesh_shape
from steppe.optim.methods import METHODS, OPTIONS, method
from steppe.optim.rule import OptionError

BAD = [
    # (what is set, key named, value shown, part of what is accepted)
    ({"seed": -1}, "seed", "-1", "an integer from 0 to 4294967295"),
    ({"model.style": "gpt"}, "model.style", "'gpt'", "one of nanodo, modern"),
    ({"model.layers": 0}, "model.layers", "0", "an integer >= 1"),
    ({"model.heads": 3}, "model.heads", "3", "a divisor of model.width = 128"),
    ({"model.kv_heads": 2}, "model.kv_heads", "2", "0 in style nanodo"),
    ({"model.style": "modern", "model.kv_heads": 3}, "model.kv_heads", "3", "a divisor of model.heads = 4"),
    ({"model.style": "modern", "model.width": 132}, "model.heads", "4", "model.width / model.heads = 33 is even"),
    ({"model.rope_base": 0.0}, "model.rope_base", "0.0", "a finite number > 0"),
    ({"model.compute_dtype": "float16"}, "model.compute_dtype", "'float16'", "one of float32, bfloat16"),
    ({"model.attention": "flash"}, "model.attention", "'flash'", "einsum"),
    ({"model.remat": "all"}, "model.remat", "'all'", "one of none, full, dots"),
    ({"model.functional_readout": "store"}, "model.functional_readout", "'store'", "rebuild"),
    ({"model.readout_chunk": -1}, "model.readout_chunk", "-1", "an integer >= 0"),
    ({"model.z_loss": -1e-4}, "model.z_loss", "-0.0001", "a finite number >= 0"),
    ({"model.label_smoothing": 1.0}, "model.label_smoothing", "1.0", ">= 0 and < 1"),
    ({"data.sequence_length": 0}, "data.sequence_length", "0", "an integer from 1 to 16777216"),
    ({"data.packing": "greedy"}, "data.packing", "'greedy'", "one of concat, bestfit"),
    ({"data.held_out_fraction": 0.0}, "data.held_out_fraction", "0.0", "a number > 0 and < 1"),
    ({"optim.method": "samm"}, "optim.method", "'samm'", "functional_sam"),
    ({"optim.method": "sam", "optim.rho": -0.1}, "optim.rho", "-0.1", "a finite number >= 0"),
    ({"optim.method": "sam", "optim.rho": float("nan")}, "optim.rho", "nan", "a finite number >= 0"),
    ({"optim.rho": 0.1}, "optim.rho", "0.1", "None: rho is not an option of adamw, which takes no options"),
    ({"optim.method": "sam", "optim.k": 3}, "optim.k", "3", "None: k is not an option of sam, which takes rho"),
    ({"optim.method": "j_sam", "optim.lam": 0.1}, "optim.lam", "0.1", "None: lam is not an option of j_sam, which"),
    ({"optim.method": "precond_sam", "optim.precond_norm": "l1"}, "optim.precond_norm", "'l1'", "one of l2, ellipsoid"),
    ({"optim.method": "precond_sam", "optim.base": "lion"}, "optim.base", "'lion'", "one of adamw, nadamw, adam"),
    ({"optim.base": "rmsprop"}, "optim.base", "'rmsprop'", "one of adamw"),
    ({"optim.rho_schedule": "step"}, "optim.rho_schedule", "'step'", "one of constant"),
    ({"optim.schedule": "poly"}, "optim.schedule", "'poly'", "one of cosine"),
    ({"optim.every": 0}, "optim.every", "0", "an integer >= 1"),
    ({"optim.method": "look_sam", "optim.every": 2}, "optim.every", "2", "1 with optim.method = look_sam"),
    ({"optim.ascent_over": "batch"}, "optim.ascent_over", "'batch'", "one of global, microbatch, subset"),
    ({"optim.ascent_fraction": 0.5}, "optim.ascent_fraction", "0.5", "1.0 unless ascent_over is subset"),
    ({"optim.ascent_over": "subset", "optim.ascent_fraction": 0.0}, "optim.ascent_fraction", "0.0", "> 0 and <= 1"),
    ({"optim.layerwise_rho": "yes"}, "optim.layerwise_rho", "'yes'", "one of none, norm, width"),
    ({"optim.method": "gsam", "optim.ascent_over": "subset"}, "optim.ascent_over", "'subset'", "global or microbatch"),
    ({"optim.method": "precond_sam", "optim.precond_eps": 0.0}, "optim.precond_eps", "0.0", "a finite number > 0"),
    ({"optim.perturb": ("(",)}, "optim.perturb", "'('", "regular expressions over parameter paths"),
    ({"optim.decay_mask": ("ok", "*")}, "optim.decay_mask", "'*'", "regular expressions over parameter paths"),
    ({"optim.clip_norm": -1.0}, "optim.clip_norm", "-1.0", "a finite number >= 0"),
    ({"optim.clip_order": "never"}, "optim.clip_order", "'never'", "one of after, before"),
    ({"optim.peak_learning_rate": 0.0}, "optim.peak_learning_rate", "0.0", "a finite number > 0"),
    ({"optim.peak_learning_rate": float("inf")}, "optim.peak_learning_rate", "inf", "a finite number > 0"),
    ({"optim.end_learning_rate": 1.5}, "optim.end_learning_rate", "1.5", "a number from 0 to 1"),
    ({"optim.b2": 1.0}, "optim.b2", "1.0", "a number >= 0 and < 1"),
    ({"optim.warmup": "soon"}, "optim.warmup", "'soon'", "a duration such as"),
    ({"optim.warmup": "2000 steps"}, "optim.warmup", "'2000 steps'", "no longer than the run, which has 1000 steps"),
    ({"optim.schedule": "wsd", "optim.cooldown": "96%"}, "optim.cooldown", "'96%'", "the 950 steps that remain"),
    ({"optim.start": "60%", "optim.stop": "50%"}, "optim.stop", "'50%'", "no earlier than optim.start = '60%'"),
    ({"optim.stop": "150%"}, "optim.stop", "'150%'", "a fraction of a run"),
    ({"train.duration": "long"}, "train.duration", "'long'", "a duration such as"),
    ({"train.duration": "50%"}, "train.duration", "'50%'", "a fraction of a run of known length"),
    ({"train.duration": "0 steps"}, "train.duration", "'0 steps'", "at least one step, which is 4096 tokens"),
    ({"train.duration": "chinchilla", "optim.warmup": "x"}, "optim.warmup", "'x'", "a duration such as"),
    ({"train.tokens_per_parameter": 0.0}, "train.tokens_per_parameter", "0.0", "a finite number > 0"),
    ({"train.parameter_count": "all"}, "train.parameter_count", "'all'", "one of total, non_embedding"),
    ({"train.microbatches": 3}, "train.batch_size", "16", "a multiple of 3 (microbatches 3 x mesh.data 1"),
    ({"train.on_nonfinite": "pray"}, "train.on_nonfinite", "'pray'", "one of stop, skip"),
    ({"evaluate.every": "0 steps"}, "evaluate.every", "'0 steps'", "at least one step"),
    ({"evaluate.every": "1 epoch"}, "evaluate.every", "'1 epoch'", "steps, tokens or % of the run"),
    ({"evaluate.batches": -1}, "evaluate.batches", "-1", "an integer >= 0"),
    ({"checkpoint.every": ""}, "checkpoint.every", "''", "a duration such as"),
    ({"checkpoint.keep": 0}, "checkpoint.keep", "0", "an integer >= 1"),
    ({"log.every": 0}, "log.every", "0", "an integer >= 1"),
    ({"log.wandb": "on"}, "log.wandb", "'on'", "one of online, offline, disabled"),
    ({"mesh.data": 0}, "mesh.data", "0", "an integer >= 1, or -1"),
    ({"mesh.fsdp": -1}, "mesh.fsdp", "-1", "because mesh.data is -1 already"),
    ({"mesh.tensor": 2}, "mesh.tensor", "2", "such that fsdp 1 x tensor 2 = 2 divides the 1 devices"),
    ({"sample.prompt": "a\ud800b"}, "sample.prompt", r"'a\ud800b'", "a text, without lone surrogates"),
    ({"sample.temperature": -0.1}, "sample.temperature", "-0.1", "a finite number >= 0"),
    ({"optim.method": "k_sam", "optim.k": 17}, "optim.k", "17", "at most 16, the sequences of one microbatch"),
    (
        {"optim.method": "k_sam", "train.batch_size": 16, "train.microbatches": 8},  # the default k
        "optim.k",
        "4",
        "at most 2, the sequences of one microbatch",
    ),
    ({"optim.eps": 0.0}, "optim.eps", "0.0", "a finite number > 0"),
    ({"model.init": "xavier"}, "model.init", "'xavier'", "one of steppe, nanodo"),
    (
        {"optim.method": "gsam", "mesh.ascent_reduction": "bfloat16"},
        "mesh.ascent_reduction",
        "'bfloat16'",
        "float32 with optim.method = gsam, whose gradient at theta is not only climbed",
    ),
]

BAD_ON_8 = [
    ({"mesh.fsdp": 3}, "mesh.fsdp", "3", "fsdp 3 x tensor 1 = 3 divides the 8 devices"),
    ({"mesh.data": 2, "mesh.fsdp": 2}, "mesh.data", "2", "data 2 x fsdp 2 x tensor 1 = 4 equals the 8 devices"),
    ({"mesh.data": 1, "mesh.fsdp": 8, "model.width": 132}, "mesh.fsdp", "8", "a divisor of model.width = 132"),
    ({"mesh.tensor": 8}, "mesh.tensor", "8", "a divisor of model.heads = 4"),
    ({"mesh.tensor": 2, "model.style": "modern", "model.kv_heads": 1}, "mesh.tensor", "2", "model.kv_heads = 1"),
    ({"mesh.tensor": 4, "model.mlp_width": 510}, "mesh.tensor", "4", "a divisor of model.mlp_width = 510"),
    (
        {"train.batch_size": 12},
        "train.batch_size",
        "12",
        "a multiple of 8 (microbatches 1 x mesh.data 8 x mesh.fsdp 1)",
    ),
    ({"train.microbatches": 4}, "train.batch_size", "16", "a multiple of 32 (microbatches 4 x mesh.data 8"),
    ({"evaluate.batch_size": 4}, "evaluate.batch_size", "4", "0 or a multiple of 8"),
]


def _with(**changes):
    config = base.get_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


@pytest.mark.parametrize(
    ("changes", "key", "value", "accepted", "devices"),
    [(*row, 1) for row in BAD] + [(*row, 8) for row in BAD_ON_8],
    ids=lambda item: " ".join(f"{k}={v}" for k, v in item.items()) if isinstance(item, dict) else "",
)
def test_an_impossible_value_is_refused_by_name(changes, key, value, accepted, devices):
    with pytest.raises(ConfigError) as refusal:
        check(_with(**changes), device_count=devices)
    message = str(refusal.value)
    assert message.startswith(f"config.{key} = {value}: must be ")
    assert accepted in message
    assert "\n" not in message
    assert refusal.value.key == key
    assert refusal.value.accepted in message


def test_a_batch_that_the_processes_cannot_share():
    config = _with(**{"mesh.data": 1, "mesh.tensor": 4, "train.batch_size": 3})
    check(config, device_count=4, process_count=1)
    with pytest.raises(ConfigError, match=r"config.train.batch_size = 3: must be a multiple of the 2 processes"):
        check(config, device_count=4, process_count=2)


def test_a_kernel_that_the_backend_has_not():
    config = _with(**{"model.attention": "cudnn"})
    check(config, device_count=1)
    with pytest.raises(
        ConfigError, match=r"config.model.attention = 'cudnn': must be a kernel that runs on cpu \(needs"
    ):
        check(config, device_count=1, backend="cpu")


@pytest.mark.parametrize(
    "changes",
    [{"data.task": "embeded"}, {"data.task": "text:"}, {"data.vocabulary": "missing.model"}, {"data.held_out": ("x",)}],
)
def test_a_bad_source_is_refused_by_the_data_room(changes):
    with pytest.raises(DataError) as refusal:
        check(_with(**changes), device_count=1)
    assert f"config.{next(iter(changes))}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_every_option_it_takes(method):
    config = _with(**{"optim.method": method})
    check(config, device_count=1)
    for key, declared in (METHODS[method].declared() if METHODS[method] else {}).items():
        value = declared.default
        if key in OPTIONS:
            config.optim[key] = value
    check(config, device_count=1)


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, 1),
        ({}, 8),
        ({"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}, 8),
        ({"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": 4}, 8),
        ({"model.style": "modern", "model.kv_heads": 2, "mesh.tensor": 2}, 8),
        ({"train.duration": "chinchilla", "optim.warmup": "100 steps"}, 1),
        ({"train.duration": "3 epochs"}, 1),
        ({"train.duration": "3.2M tokens", "evaluate.every": "100k tokens"}, 1),
        ({"optim.ascent_over": "subset", "optim.ascent_fraction": 0.25, "optim.method": "sam"}, 1),
        ({"optim.schedule": "wsd"}, 1),
    ],
)
def test_what_can_run_is_let_through(changes, devices):
    check(_with(**changes), device_count=devices)


DURATIONS = [name for name, key in base.keys().items() if key.accepted is DURATION and name != "train.duration"]


@pytest.mark.parametrize("text", ["1 epochs", "soon", "101%", "1e400 steps"])
@pytest.mark.parametrize("key", DURATIONS)
def test_every_key_that_is_a_duration_is_looked_at(key, text):
    with pytest.raises(ConfigError) as refused:
        check(_with(**{key: text}), device_count=1)
    assert (refused.value.key, refused.value.value) == (key, text)


WHATEVER = [
    "0", "1", "3", "0.5", "-1", "1e-8", "1e30", "5%", "100%", "10 steps", "1 epochs", "('layers/',)", "('typo',)",
    "('layers/=0.5',)", "true", "false", "",
]  # fmt: skip
SECTIONS = ("optim.", "model.", "train.", "average.", "evaluate.", "data.")
OF_PARTS = [name for name in list(base.keys()) if name.startswith(SECTIONS)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_what_check_takes_is_assembled_or_refused(data):
    """No value of a key comes as far as the parts of a run and fails there in another way."""
    key = data.draw(st.sampled_from(OF_PARTS))
    names = base.keys()[key].accepted.names
    value = data.draw(st.sampled_from([*(names() if callable(names) else names or ()), *WHATEVER]))
    try:
        config = reader("quickstart")([("model.size", "0.01m"), (key, value)])
        check(config, device_count=1, backend="cpu")
        foreseen(config)
    except (*REFUSALS, UsageError):
        pass


def test_mesh_shape_fills_the_one_free_axis():
    assert mesh_shape(_with(**{"mesh.tensor": 2}), 8) == (4, 1, 2)
    assert mesh_shape(_with(**{"mesh.data": 2, "mesh.fsdp": -1}), 8) == (2, 4, 1)


NAMED = [(key, name) for key, declared in base.keys().items() for name in declared.accepted.names()]


@pytest.mark.parametrize("change", [str.upper, str.title, lambda name: name.replace("_", "-"), lambda name: f"{name}x"])
def test_the_name_that_a_wrong_one_comes_close_to_is_suggested(change):
    assert ("optim.method", "functional_sam") in NAMED
    for key, name in NAMED:
        wrong, declared = change(name), base.keys()[key]
        value = (wrong,) if declared.accepted.kind is tuple else wrong
        if declared.accepted.kind is bool or declared.accepted.allows(value):
            continue
        with pytest.raises(ConfigError) as refused:
            declared.check(key, value)
        assert str(refused.value).endswith(f"; did you mean {name}?")


@pytest.mark.parametrize(("wrong", "right"), [("functional-sam", "functional_sam"), ("SAM", "sam"), ("J SAM", "j_sam")])
def test_so_it_is_in_the_library(wrong, right):
    with pytest.raises(OptionError, match=f"; did you mean {right}\\?$"):
        method(wrong)


def test_nothing_is_suggested_for_a_name_like_none():
    with pytest.raises(ConfigError) as refused:
        base.keys()["optim.method"].check("optim.method", "zzz")
    assert "did you mean" not in str(refused.value)
