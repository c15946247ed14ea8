"""One process, one config, one id for each workdir."""

import json
import signal
import subprocess
import sys

import pytest

from steppe.configs import base
from steppe.configs.keys import ConfigError
from steppe.lm.keep.exits import WorkdirError
from steppe.lm.keep.workdir import changes, claim, config_of, is_new


@pytest.fixture
def config():
    return base.get_config()


def take(place, config, **more):
    with claim(str(place), config, True, **more) as run:
        return run


def test_a_run_keeps_its_config_and_id(tmp_path, config):
    place = tmp_path / "new" / "run"
    assert is_new(place)
    run = take(place, config)
    assert run
    assert not is_new(place)
    assert config_of(place).to_dict() == config.to_dict()
    assert take(place, config) == run
    with claim(str(place), config, False) as other:
        assert other == ""


def test_another_config_is_refused_unless_allowed(tmp_path, config):
    take(tmp_path, config)
    config.log.every, config.mesh.fsdp, config.checkpoint.keep = 7, 2, 9  # these change nothing that is computed
    take(tmp_path, config)
    config.optim.peak_learning_rate, config.seed = 0.5, 4
    before = (tmp_path / "config.json").read_text()
    match = r"peak_learning_rate = 0.5: must be 0.001 .*also differing: seed.*--allow_change=optim.peak_.*,seed"
    with pytest.raises(ConfigError, match=match):
        take(tmp_path, config)
    with pytest.raises(ConfigError, match=r"config.seed = 4"):
        take(tmp_path, config, allow=["optim.peak_learning_rate"])
    assert (tmp_path / "config.json").read_text() == before
    take(tmp_path, config, allow=["optim.peak_learning_rate", "seed"])
    take(tmp_path, config)
    with pytest.raises(WorkdirError, match="--allow_change=sead"):
        take(tmp_path, config, allow=["sead"])


def test_changes_hold_both_values_and_leave_out_what_is_free(config):
    now = base.get_config()
    now.optim.rho, now.mesh.data, now.optim.perturb = 0.1, 4, ("embed",)
    assert changes(config.to_dict(), now.to_dict()) == {"optim.rho": [None, 0.1], "optim.perturb": [[".*"], ["embed"]]}


def test_a_damaged_config_is_one_line(tmp_path, config):
    take(tmp_path, config)
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(WorkdirError, match=r"config.json: is damaged"):
        take(tmp_path, config)


def test_two_processes_cannot_hold_one_workdir(tmp_path, config):
    code = (
        "import sys, time\nfrom steppe.configs import base\nfrom steppe.lm.keep.workdir import claim\n"
        "with claim(sys.argv[1], base.get_config(), True):\n  print('held', flush=True)\n  time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(WorkdirError, match=rf"is in use by process {holder.pid} on "):
            take(tmp_path, config)
        take(tmp_path / "other", config)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    take(tmp_path, config)  # a kill gives it up


def test_every_free_key_may_change_when_a_run_continues(tmp_path, config):
    before = config.to_dict()
    other = {
        bool: lambda old: not old,
        str: lambda old: f"{old}x",
        tuple: lambda old: (*old, "more=x"),
        type(None): lambda _: "x",
    }
    for name, key in base.keys().items():
        section, _, last = name.rpartition(".")
        place = config[section] if section else config
        if key.free:
            place[last] = other.get(type(place[last]), lambda old: old + 1)(place[last])
    assert changes(before, config.to_dict()) == {}
    config.seed += 1
    assert list(changes(before, config.to_dict())) == ["seed"]


def test_a_run_of_another_version_continues_unless_its_keys_are_gone(tmp_path, config):
    old = config.to_dict()
    del old["model"]["label_smoothing"], old["curvature"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    take(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(old | {"colour": 3}))
    with pytest.raises(ConfigError, match=r"config.colour = 3: must be left out: this version has no such key"):
        take(tmp_path, config)
