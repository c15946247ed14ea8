"""Branches: the parent's own future where nothing differs, another schedule, method or text where it does."""

import json
import shutil

import jax
import numpy as np
import pytest

from helpers import lm_runs
from steppe.configs.keys import ConfigError
from steppe.lm.keep import checkpoint
from steppe.lm.keep.exits import Unusable
from steppe.lm.keep.workdir import RUN
from steppe.lm.run import train
from steppe.scripts import results

pytestmark = pytest.mark.usefixtures("one_device")

METHOD = {"optim__method": "look_sam", "optim__rho": 0.05, "optim__schedule": "wsd", "optim__cooldown": "0 steps"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return lm_runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trunk(text, tmp_path_factory):
    place = tmp_path_factory.mktemp("trunk")
    assert lm_runs.run(lm_runs.config(*text, **METHOD, checkpoint__keep=9), str(place)) == train.FINISHED
    return place


def test_a_branch_that_changes_nothing_is_the_trunk_bit_for_bit(text, trunk, tmp_path):
    config = lm_runs.config(*text, **METHOD, branch_from=f"{trunk}@10")
    assert lm_runs.run(config, str(tmp_path / "b"), until=15) == train.FINISHED
    # as a kill before its first checkpoint leaves it: it branches again, and records that once
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    assert lm_runs.run(config, str(tmp_path / "b"), until=15) == train.FINISHED
    # from then on it needs its parent no more
    assert [path.name for path in (tmp_path / "b" / "checkpoints").iterdir() if path.name == "10"]
    hidden = trunk.rename(trunk.parent / "hidden")
    try:
        assert lm_runs.run(config, str(tmp_path / "b")) == train.FINISHED
    finally:
        hidden.rename(trunk)
    assert lm_runs.losses(tmp_path / "b") == lm_runs.losses(trunk)
    (found,) = lm_runs.records(tmp_path / "b", "branch")
    assert (found["step"], found["parent"], found["parent_run"]) == (10, str(trunk), (trunk / RUN).read_text())
    assert (tmp_path / "b" / RUN).read_text() != (trunk / RUN).read_text()
    (result,) = results.read(tmp_path / "b")
    assert (result.status, result.branch, len(result.train_curve.step)) == ("finished", f"{trunk.name}@10", 20)


def test_two_cooldowns_share_a_trunk(text, trunk, tmp_path):
    ends = {}
    for steps in (12, 20):
        config = lm_runs.config(
            *text,
            **{**METHOD, "optim__cooldown": "2 steps"},
            branch_from=f"{trunk}@10",
            train__duration=f"{steps} steps",
        )
        assert lm_runs.run(config, str(tmp_path / str(steps))) == train.FINISHED
        rates = [record["learning_rate"] for record in lm_runs.records(tmp_path / str(steps), "train")]
        trunk_rates = [record["learning_rate"] for record in lm_runs.records(trunk, "train")]
        assert rates[: steps - 1] == trunk_rates[: steps - 1]
        assert rates[-1] < 0.6 * rates[-3]
        ends[steps] = lm_runs.losses(tmp_path / str(steps))
    assert ends[12][:10] == ends[20][:10] == lm_runs.losses(trunk)[:10]


def test_another_method_begins_anew_with_the_same_optimizer(text, trunk, tmp_path):
    late = {**METHOD, "optim__method": "functional_sam"}
    assert lm_runs.run(lm_runs.config(*text, **late, branch_from=f"{trunk}@10"), str(tmp_path)) == train.FINISHED
    record = lm_runs.records(tmp_path, "train")[10]
    assert record["loss"] == lm_runs.losses(trunk)[10]  # the loss at theta, of the same parameters and batch
    about = lm_runs.records(tmp_path, "run")[-1]
    before = lm_runs.records(trunk, "run")[-1]["flops_per_step"]
    assert about["flops"] == pytest.approx(10 * before + 10 * about["flops_per_step"])
    assert lm_runs.records(tmp_path, "change")[0]["before"] != lm_runs.records(tmp_path, "change")[0]["after"]


def saved_weights(workdir, step, kind):
    """{number: array} of the parameters, or of an average, in a checkpoint."""
    state = checkpoint.ocp.StandardCheckpointer().restore(f"{workdir}/checkpoints/{step}/state")
    slots = [state["params"]] if kind == "last" else state["averages"][kind].values()
    return dict(enumerate(np.mean([jax.tree.leaves(slot)[n] for slot in slots], axis=0) for n in range(4)))


def test_a_run_of_before_a_key_goes_on_with_what_it_did(text, tmp_path):
    """A warm-up from 0 spent its first step there."""
    ends = {"optim__end_learning_rate": 0.0}
    former = lm_runs.config(*text, **ends, optim__warmup_from_zero=True)
    for name in ("whole", "b"):
        assert lm_runs.run(former, str(tmp_path / name), until=20 if name == "whole" else 10) == train.FINISHED
    config = tmp_path / "b" / "config.json"
    stored = json.loads(config.read_text())
    del stored["optim"]["warmup_from_zero"]
    config.write_text(json.dumps(stored))
    assert lm_runs.run(lm_runs.config(*text, **ends), str(tmp_path / "b")) == train.FINISHED
    assert lm_runs.losses(tmp_path / "b") == lm_runs.losses(tmp_path / "whole")
    assert lm_runs.records(tmp_path / "b", "train")[0]["learning_rate"] == 0
    with pytest.raises(ConfigError, match="warmup_from_zero = False"):  # it knows the key now
        lm_runs.run(lm_runs.config(*text, **ends), str(tmp_path / "b"))
    assert lm_runs.run(lm_runs.config(*text, **ends), str(tmp_path / "new"), until=1) == train.FINISHED
    assert lm_runs.records(tmp_path / "new", "train")[0]["learning_rate"] > 0


@pytest.mark.exhaustive  # six runs; where an average begins: test_weights.py
def test_averages_of_a_branch_hold_nothing_of_before_it(text, trunk, tmp_path):
    averaged = {"average__weights": ("ema", "lawa"), "average__horizon": "100%", "average__snapshots": 10}
    config = lm_runs.config(
        *text, **METHOD, **averaged, branch_from=f"{trunk}@10", checkpoint__every="2 steps", checkpoint__keep=9
    )
    assert lm_runs.run(config, str(tmp_path / "b"), until=14) == train.FINISHED
    shown = {kind: saved_weights(tmp_path / "b", 14, kind) for kind in ("ema", "lawa")}
    with_steps = lm_runs.config(*text, **METHOD, checkpoint__every="1 steps", checkpoint__keep=30)
    assert lm_runs.run(with_steps, str(tmp_path / "steps"), until=14) == train.FINISHED
    paths = [saved_weights(tmp_path / "steps", step, "last") for step in range(11, 15)]
    for name, leaf in shown["ema"].items():  # horizon 20: the mean of all four steps since
        np.testing.assert_allclose(leaf, np.mean([one[name] for one in paths], axis=0), rtol=1e-4, atol=1e-6)
    for name, leaf in shown["lawa"].items():  # a snapshot every second step
        np.testing.assert_allclose(leaf, np.mean([one[name] for one in paths[1::2]], axis=0), rtol=1e-4, atol=1e-6)
    # it goes on so, and a trunk's own averages are no part of its branches'
    assert lm_runs.run(config, str(tmp_path / "b")) == train.FINISHED
    again = lm_runs.config(*text, **METHOD, **averaged, branch_from=f"{tmp_path}/b@14", checkpoint__every="2 steps")
    assert lm_runs.run(again, str(tmp_path / "c"), until=15) == train.FINISHED
    last = saved_weights(tmp_path / "c", 15, "last")
    for name, leaf in saved_weights(tmp_path / "c", 15, "ema").items():
        np.testing.assert_allclose(leaf, last[name], rtol=1e-6)


def test_other_text_is_read_from_its_beginning(text, trunk, tmp_path):
    (tmp_path / "other.txt").write_text("0123456789 " * 900)
    config = lm_runs.config(*text, **METHOD, branch_from=f"{trunk}@10", data__task=f"text:{tmp_path}/other.txt@all")
    assert lm_runs.run(config, str(tmp_path / "b"), until=11) == train.FINISHED
    alone = lm_runs.config(
        *text, **METHOD, data__task=f"text:{tmp_path}/other.txt@all", init_from=f"{trunk}/checkpoints/10"
    )
    assert lm_runs.run(alone, str(tmp_path / "alone"), until=1) == train.FINISHED
    assert lm_runs.losses(tmp_path / "b")[10] == lm_runs.losses(tmp_path / "alone")[0]  # the same first batch


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"branch_from": "nothing"}, ConfigError, "config.branch_from = 'nothing'"),
        ({"branch_from": "{trunk}@7"}, Unusable, "holds no checkpoint"),
        ({"branch_from": "{trunk}", "model__width": 32}, Unusable, "does not fit this config"),
        ({"branch_from": "{trunk}", "optim__base": "sgd"}, Unusable, "does not fit this config"),
    ],
)
def test_what_cannot_be_branched_from_is_refused_and_leaves_nothing(text, trunk, tmp_path, changed, error, said):
    changed["branch_from"] = changed["branch_from"].replace("{trunk}", str(trunk))
    with pytest.raises(error, match=said):
        lm_runs.run(lm_runs.config(*text, **{**METHOD, **changed}), str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_a_damaged_parent_is_named(text, trunk, tmp_path):
    shutil.copytree(trunk, tmp_path / "trunk")
    state = next(
        path for path in (tmp_path / "trunk/checkpoints/10").rglob("*") if path.is_file() and path.name != "SEAL"
    )
    state.write_bytes(state.read_bytes() + b"x")
    with pytest.raises(Unusable, match="was altered"):
        lm_runs.run(lm_runs.config(*text, **METHOD, branch_from=f"{tmp_path}/trunk@10"), str(tmp_path / "b"))
