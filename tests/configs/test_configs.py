"""The configs that ship: they hold base's keys, can run, and say what they are."""

import importlib
import pathlib
import re

import pytest

from steppe.configs import base, paper, quickstart, sizes, watts
from steppe.configs.keys import ConfigError
from steppe.configs.read import read_config, reader
from steppe.lm.parts.check import check
from steppe.optim.methods import METHODS
from steppe.scripts import command
from steppe.scripts.sweep import spec


def _flat(tree, before=""):
    for key, value in tree.items():
        yield from _flat(value, f"{before}{key}.") if isinstance(value, dict) else [before + key]


def _check_without_vocabulary(config):
    config.data.vocabulary = "bytes"  # the 32k model is the user's to fetch
    check(config, device_count=8)


@pytest.mark.parametrize(
    "config",
    [quickstart.get_config(), paper.get_config("24m,sam,fixed"), watts.get_config("20m,sam,200")],
    ids=["quick", "paper", "watts"],
)
def test_configs_change_values_of_base_and_add_nothing(config):
    assert sorted(_flat(config.to_dict())) == sorted(_flat(base.get_config().to_dict()))


BEYOND = {
    bool: [],
    str: ["no such name"],
    int: [-2],
    float: [-1.5, float("nan")],
    tuple: [("(",)],
}  # values that few keys take


def test_every_key_takes_its_default_and_refuses_by_name_what_it_does_not_take():
    refused = 0
    for name, key in base.keys().items():
        key.check(name, key.default)
        assert key.meaning
        for value in BEYOND[key.accepted.kind]:
            if not key.accepted.allows(value):
                refused += 1
                with pytest.raises(ConfigError) as refusal:
                    key.check(name, value)
                said = refusal.value
                assert (said.key, said.accepted) == (name, key.accepted.text())
                shown = value[0] if isinstance(value, tuple) else value
                assert str(said) == f"config.{name} = {shown!r}: must be {said.accepted}"
    assert refused > 70


def test_a_config_written_before_a_key_existed_has_its_default():
    whole = quickstart.get_config().to_dict()
    del whole["optim"]["clip_order"], whole["model"]["label_smoothing"], whole["curvature"]
    assert base.completed(whole).to_dict() == quickstart.get_config().to_dict()
    with pytest.raises(ConfigError, match=r"config.optim.colour = 3: must be left out: this version has no such key"):
        base.completed({"optim": {"colour": 3}})
    with pytest.raises(ConfigError, match=r"config.optim.colour = 3: .*\(nor optim.taste, shape\)"):
        base.completed({"optim": {"colour": 3, "taste": 2}, "shape": 1})
    with pytest.raises(ConfigError, match=r"config.model.width = 'wide': must be an integer >= 1"):
        base.completed({"model": {"width": "wide"}})


def test_a_run_from_before_a_default_changed_keeps_it():
    """Its config left the second moment to the method, which then took the one before the step, without a floor."""
    written = quickstart.get_config().to_dict()
    for method, kept in {"precond_sam": ("stale", 0.0), "sam": (None, None), "samm": (None, None)}.items():
        written["optim"] |= {"method": method, "precond_moment": None}
        written["optim"].pop("precond_floor", None)
        then = base.completed(written).optim
        assert (then.precond_moment, then.precond_floor) == kept
        now = base.completed({**written, "optim": {**written["optim"], "precond_floor": None}}).optim
        assert (now.precond_moment, now.precond_floor) == (None, None)
    written["optim"] |= {"method": "precond_msam", "update_length": "l2"}
    written["optim"].pop("update_floor", None)
    assert base.completed(written).optim.update_floor == 0.0
    written["optim"] |= {"method": "precond_sam", "precond_moment": "fresh"}
    assert base.completed(written).optim.precond_moment == "fresh"


def test_quickstart_trains_the_method_of_the_project_on_text_at_hand():
    config = quickstart.get_config()
    check(config, device_count=1)
    assert config.optim.method == "precond_functional_sam"
    assert (config.data.task, config.data.vocabulary) == ("embedded", "bytes")
    assert "--config=quickstart" in quickstart.__doc__


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("0.1m", 110_592),
        ("0.4m", 442_368),
        ("1.8m", 1_769_472),
        ("24m", 23_887_872),
        ("42m", 42_467_328),
        ("118m", 117_964_800),
        ("1.2b", 1_207_959_552),
        ("20m", 6_291_456),
        ("60m", 25_165_824),
        ("150m", 84_934_656),
        ("1b", 805_306_368),
        ("8b", 8_053_063_680),
    ],
)
def test_sizes_hold_the_weights_their_comment_says(name, weights, request):
    shape = sizes.SIZES[name]
    assert shape["mlp_width"] == 4 * shape["width"]
    assert shape["width"] % shape["heads"] == 0
    if name in ("24m", "42m", "118m", "1.2b", "20m", "60m", "150m", "1b"):
        assert shape["width"] // shape["heads"] == 64
    assert 12 * shape["layers"] * shape["width"] ** 2 == weights
    assert f'"{name}": dict(' in _line_with(request, f"{weights:,}")
    config = base.get_config()
    config.model.size = name
    assert sizes.resolve(config).model.width == shape["width"]
    check(config, device_count=1)


def _line_with(request, text):
    return next(
        line for line in (request.config.rootpath / "configs/sizes.py").read_text().splitlines() if text in line
    )


def test_resolve_leaves_a_config_without_size_alone_and_refuses_an_unknown_one():
    config = base.get_config()
    assert sizes.resolve(config).to_dict() == base.get_config().to_dict()
    config.model.size = "23m"
    with pytest.raises(ValueError, match=r"config.model.size = '23m': must be one of 0.003m, .*24m"):
        sizes.resolve(config)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", ["fixed", "chinchilla"])
def test_paper_config_runs_every_method(method, length):
    config = paper.get_config(f"118m, {method}, {length}")
    _check_without_vocabulary(config)
    assert config.optim.method == method
    assert (config.model.layers, config.model.width) == (6, 1280)
    assert config.train.duration == ("chinchilla" if length == "chinchilla" else "100000 steps")


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        ("24m", "SIZE,METHOD,LENGTH"),
        ("24m,sam,fixed,more", "SIZE,METHOD,LENGTH"),
        ("24m,,fixed", "SIZE,METHOD,LENGTH"),
        ("25m,sam,fixed", "'25m' must be one of 0.003m"),
        ("24m,sam,short", "'short' must be one of fixed, chinchilla"),
    ],
)
def test_paper_config_refuses_a_bad_argument_in_one_line(argument, part, request):
    path = request.config.rootpath / "configs" / "paper.py"
    with pytest.raises(command.UsageError) as refusal:
        read_config(f"{path}:{argument}")
    assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(command.UsageError, match=":ARGUMENT"):
        read_config(str(path))


@pytest.mark.parametrize("size", ["20m", "60m", "150m", "1b", "small"])
def test_watts_perturbs_by_device_and_small_has_the_same_ratios(size):
    config = watts.get_config(f"{size},sam,200")
    config.data.vocabulary = "bytes"
    check(config, device_count=1)
    optim, train = config.optim, config.train
    assert (optim.method, optim.rho, optim.ascent_over, train.microbatches) == ("sam", 0.05, "microbatch", 8)
    assert (optim.b2, optim.eps, optim.clip_norm, optim.clip_order) == (0.95, 1e-8, 1.0, "after")
    assert not config.model.tie_embeddings
    sequences = {"1b": 128, "small": 4}.get(size, 32)
    assert train.batch_size // train.microbatches == sequences
    assert watts.get_config(f"{size},adamw,200").optim.rho is None


def test_watts_rates_fall_with_the_budget():
    rates = [watts.peak_rate(tokens) for tokens in (20, 200, 800, 3200, 10_000)]
    assert rates == [3e-3, 3e-3, 9.49e-4, 3e-4, 3e-4]  # 800 is half way in the logarithm
    for argument in ("20m,sam", "20m,sam,x", "20m,sam,-1", "21m,sam,200", "20m,,200"):
        with pytest.raises(ValueError, match="must be"):
            watts.get_config(argument)


@pytest.mark.parametrize(
    ("sweep", "runs"),
    [
        ("late_sam", 63),
        ("lookahead", 96),
        ("rivals", 33),
        ("rho_by_scale", 93),
        ("equal_compute", 153),
        ("transfer", 192),
    ],
)
def test_ready_sweeps_hold_as_many_runs_as_they_say_all_of_which_can_run(sweep, runs):
    found = spec.expand(spec.load(sweep)[0])
    assert len(found) == runs
    assert re.search(rf"^{runs} runs", importlib.import_module(f"steppe.configs.sweeps.{sweep}").__doc__, re.MULTILINE)
    read = reader("quickstart")
    for run in found:
        check(read(list(run.items())), device_count=1)


STUDY = pathlib.Path(__file__).parents[2] / "configs" / "studies" / "english"
SPECS = [path for path in sorted(STUDY.glob("*.py")) if "def get_spec(" in path.read_text()]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_run_of_the_study_can_run_and_is_listed_once(path):
    found = spec.expand(spec.load(str(path))[0])
    read = reader("english:TEXT")
    for run in found:
        check(read(list(run.items())), device_count=1)
    assert len({repr(sorted(run.items())) for run in found}) == len(found) > 0


def test_a_completed_config_has_every_key_in_order_and_no_other():
    assert list(base.with_defaults({})) == list(base.keys())
    foreign = {"optim.method": "mine.py:mine", "optim.own": 1.0}
    assert list(base.with_defaults(foreign)) == [*base.keys(), "optim.own"]
