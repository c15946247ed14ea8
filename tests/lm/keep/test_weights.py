"""Averages of a run's weights: recorded, resumed, sharded, and read by name."""

import json
from collections import namedtuple

import jax
import numpy as np
import pytest

from helpers import lm_runs
from steppe.configs.keys import ConfigError
from steppe.lm.keep import checkpoint, saved
from steppe.lm.keep.exits import WorkdirError
from steppe.lm.parts.budget import averages_kept
from steppe.lm.parts.check import check
from steppe.lm.run import train
from steppe.scripts import results
from steppe.scripts.measure import __main__ as measure
from steppe.scripts.model import evaluate

pytestmark = pytest.mark.usefixtures("one_device")

KEPT = {"average__weights": ("ema", "lawa"), "average__horizon": "6 steps", "average__snapshots": 3}
METHOD = {"optim__method": "msam", "optim__rho": 0.05, "checkpoint__keep": 20}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return lm_runs.write_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An undisturbed run of 20 steps with averages, every second of whose states is kept."""
    place = tmp_path_factory.mktemp("whole")
    config = lm_runs.config(*corpus, **METHOD, **KEPT, checkpoint__every="2 steps")
    assert lm_runs.run(config, str(place)) == train.FINISHED
    return place


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """The same run without averages."""
    place = tmp_path_factory.mktemp("plain")
    assert lm_runs.run(lm_runs.config(*corpus, **METHOD), str(place)) == train.FINISHED
    return place


def state(workdir, step=20):
    return checkpoint.ocp.StandardCheckpointer().restore(f"{workdir}/checkpoints/{step}/state")


def test_lawa_is_the_mean_of_the_parameters_that_were_saved(whole):
    slots = state(whole)["averages"]["lawa"].values()
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *slots)
    expected = jax.tree.map(lambda *leaves: sum(leaves) / 3, *(state(whole, step)["params"] for step in (18, 20, 16)))
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # the order of a sum in float32


def test_a_run_with_averages_trains_as_one_without(plain, whole):
    assert lm_runs.losses(plain) == lm_runs.losses(whole)


def test_averages_resume_bit_for_bit(corpus, whole, tmp_path):
    config = lm_runs.config(*corpus, **METHOD, **KEPT)
    assert lm_runs.run(config, str(tmp_path), until=7) == train.FINISHED
    assert lm_runs.run(config, str(tmp_path)) == train.FINISHED
    for a, b in zip(jax.tree.leaves(state(tmp_path)), jax.tree.leaves(state(whole)), strict=True):
        assert np.array_equal(a, b)
    ends = [lm_runs.records(place, "average")[-2:] for place in (tmp_path, whole)]
    assert ends[0] == ends[1]


@pytest.mark.exhaustive  # resumed on a mesh: run/test_train.py
@pytest.mark.parametrize("mesh", [{"mesh__fsdp": 2}, lm_runs.EVERY_AXIS])
def test_averages_are_sharded_as_the_parameters_are(corpus, whole, tmp_path, mesh):
    config = lm_runs.config(*corpus, **METHOD, **KEPT, **mesh)
    assert lm_runs.run(config, str(tmp_path)) == train.FINISHED
    for mine, other in zip(*(lm_runs.records(place, "average")[-2:] for place in (tmp_path, whole)), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)  # sums over devices in another order, 20 steps
    run = saved.load(str(tmp_path), weights="ema", log=lambda line: None)
    specs = [{leaf.sharding.spec for leaf in jax.tree.leaves(tree)} for tree in (run.params, run.parts.abstract.params)]
    assert len(specs[1]) > 1
    placed = jax.tree.map(lambda leaf: leaf.sharding.spec, run.parts.abstract)
    trees = [tree for slots in placed.averages.values() for tree in slots.values()]
    assert trees == [placed.params] * averages_kept(run.config)


def test_every_command_reads_the_weights_that_are_named(whole, capsys):
    losses = {record["weights"]: record["loss"] for record in lm_runs.records(whole, "average")}
    losses["last"] = lm_runs.records(whole, "evaluate")[-1]["loss"]
    assert len(set(losses.values())) == 3
    for name, loss in losses.items():
        assert evaluate.main([f"--workdir={whole}", f"--weights={name}"]) == 0
        assert float(capsys.readouterr().out.splitlines()[-1].split()[1]) == pytest.approx(loss, abs=1e-4)  # as printed
        streamed = saved.unread(str(whole), weights=name, log=lambda line: None)
        loaded = saved.load(str(whole), weights=name, log=lambda line: None).params["embed"]["embedding"]
        np.testing.assert_allclose(streamed.read(["embed/embedding"])["embed/embedding"], loaded, rtol=1e-6)
    assert evaluate.main([f"--workdir={whole}", "--weights=best"]) == 2
    assert "--weights=best: must be one of the run's, which are last, ema, lawa" in capsys.readouterr().err


def test_measurements_of_an_average_stand_by_themselves(whole):
    plain = ["--fine_tune=none", "--noise=0.1", "--samples=1", "--bits=4", "--batches=2", "--gptq=1"]
    assert measure.main(["retention", f"--workdir={whole}", "--weights=last", "--weights=ema", *plain]) == 0
    found = {name: json.loads((place / "retention.json").read_text()) for name, place in
             (("last", whole), ("ema", whole / "averages" / "ema"))}  # fmt: skip
    assert [record["weights"] for record in found.values()] == ["last", "ema"]
    assert found["last"]["loss"] != found["ema"]["loss"]
    (result,) = results.read([str(whole)])
    assert [(each.name.split()[-1], each.directory) for each in result.averages] == [
        (name, whole / "averages" / name) for name in ("ema", "lawa")
    ]
    assert all(each.status == "finished" and each.loss > 0 for each in result.averages)


def test_schedule_free_is_judged_by_its_average(corpus, tmp_path, capsys):
    free = {"optim__base": "schedule_free", "optim__schedule": "constant"}
    assert lm_runs.run(lm_runs.config(*corpus, **free), str(tmp_path)) == train.FINISHED
    judged, last = (lm_runs.records(tmp_path, kind)[-1] for kind in ("evaluate", "average"))
    assert last["weights"] == "last"
    assert judged["loss"] != last["loss"]
    for flags, record in (([], judged), (["--weights=schedule_free"], judged), (["--weights=last"], last)):
        capsys.readouterr()
        assert evaluate.main([f"--workdir={tmp_path}", *flags]) == 0
        assert float(capsys.readouterr().out.splitlines()[-1].split()[1]) == pytest.approx(record["loss"], abs=1e-4)


@pytest.mark.exhaustive  # two runs; averages of a branch are also in test_branch.py at night
def test_a_branch_may_begin_averages(corpus, plain, whole, tmp_path):
    for name, parent in (("new", plain), ("kept", whole)):
        config = lm_runs.config(*corpus, **METHOD, **KEPT, branch_from=f"{parent}@10")
        assert lm_runs.run(config, str(tmp_path / name)) == train.FINISHED
    new, kept, trunk = (state(place) for place in (tmp_path / "new", tmp_path / "kept", whole))
    averages = [found.pop("averages") for found in (new, kept, trunk)]
    for one, other in ((kept, trunk), tuple(averages[:2])):  # averages begin at the branch, whatever its parent has
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            assert np.array_equal(a, b)
    assert averages[0].keys() == {"ema", "lawa"}
    first = (jax.tree.leaves(found)[0] for found in averages[1:])
    assert not np.array_equal(*first)


def test_a_new_run_starts_from_the_weights_that_are_named(corpus, whole, tmp_path):
    losses = {record["weights"]: record["loss"] for record in lm_runs.records(whole, "average")}
    losses[""] = losses["last"] = lm_runs.records(whole, "evaluate")[-1]["loss"]
    for name in ("ema", "lawa", "last", ""):
        place = tmp_path / f"from {name}"
        config = lm_runs.config(*corpus, **METHOD, init_from=str(whole), init_weights=name, evaluate__batches=0)
        assert lm_runs.run(config, str(place), until=1) == train.FINISHED
        assert lm_runs.records(place, "evaluate")[0]["loss"] == pytest.approx(losses[name], rel=1e-6)
    other = lm_runs.config(*corpus, **METHOD, init_from=str(whole), init_weights="best")
    with pytest.raises(WorkdirError, match="must be one of the run's, which are last, ema, lawa"):
        lm_runs.run(other, str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="init_weights = 'ema': must be \"\" without init_from"):
        check(lm_runs.config(*corpus, **METHOD, init_weights="ema"), device_count=8)
    bare = lm_runs.config(*corpus, **METHOD, init_from=str(whole / "checkpoints"), init_weights="ema")
    with pytest.raises(ConfigError, match="init_weights = 'ema'"):
        lm_runs.run(bare, str(tmp_path / "other"))


def test_a_checkpoint_of_before_there_were_averages_opens(tmp_path):
    before = namedtuple("State", "step params optimizer rule")
    old = before(np.int32(3), {"w": np.arange(4.0)}, {"m": np.ones(4)}, ())
    with checkpoint.Checkpoints(str(tmp_path), run="r") as kept:
        args = checkpoint.ocp.args
        kept._orbax.save(
            kept.directory / "3", args=args.Composite(state=args.StandardSave(old), meta=args.JsonSave({}))
        )
        kept._finish(kept.directory / "3", 3, checkpoint.seal.tree_of(old))
        assert kept.newest() == 3
        now = checkpoint.State(*jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), old), averages={})
        state, _ = kept.restore(3, now)
    assert np.array_equal(state.params["w"], np.arange(4.0))
    assert state.averages == {}
