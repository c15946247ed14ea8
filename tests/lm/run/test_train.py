"""Whole runs in small: resume, refusal, non-finite steps, what is left in the workdir."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import lm_runs, processes
from steppe.configs.keys import ConfigError
from steppe.lm.keep import checkpoint, saved
from steppe.lm.keep.exits import Unusable
from steppe.lm.measure import evaluate as measure
from steppe.lm.parts import anomaly
from steppe.lm.parts.progress import Event, each
from steppe.lm.run import replay, signals, train
from steppe.lm.track import tracker
from steppe.optim.rule import norm
from steppe.scripts.model import evaluate, generate

pytestmark = pytest.mark.usefixtures("one_device")


def stop_at(step):
    """A StopSignals.requested that asks to stop after a number of steps of this start, in no evaluation."""
    count = iter(range(1, 10**6))
    return lambda self: sys._getframe(1).f_code.co_name == train.Run.advance.__name__ and next(count) == step


METHOD = {"optim__method": "precond_functional_sam", "optim__rho": 0.05}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder, cache) of a few hundred lines of real text."""
    place = tmp_path_factory.mktemp("corpus")
    return lm_runs.write_text(place)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An undisturbed run of 20 steps, which also measures curvature."""
    place = tmp_path_factory.mktemp("whole")
    assert lm_runs.run(lm_runs.config(*corpus, **METHOD, curvature__every=10), str(place), draws=True) == train.FINISHED
    return place


def final_state(workdir):
    """The arrays of the last checkpoint, as they were written."""
    with checkpoint.Checkpoints(f"{workdir}/checkpoints", read_only=True) as checkpoints:
        assert checkpoints.newest() == 20
    return checkpoint.ocp.StandardCheckpointer().restore(checkpoints.directory / "20" / "state")


def test_an_interrupted_run_ends_bit_for_bit_like_an_undisturbed_one(corpus, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(signals.StopSignals, "requested", stop_at(7))
        assert train.run(lm_runs.config(*corpus, **METHOD), str(tmp_path)) == train.STOPPED
    assert [r["step"] for r in lm_runs.records(tmp_path, "train")] == list(range(1, 8))
    assert train.run(lm_runs.config(*corpus, **METHOD), str(tmp_path)) == train.FINISHED
    assert lm_runs.losses(tmp_path) == lm_runs.losses(whole)
    for a, b in zip(jax.tree.leaves(final_state(tmp_path)), jax.tree.leaves(final_state(whole)), strict=True):
        assert np.array_equal(a, b)
    ends = [lm_runs.records(place, "evaluate")[-1] for place in (tmp_path, whole)]
    assert ends[0] == ends[1]


def test_a_run_stops_where_it_is_told_to_and_goes_on_to_the_same_end(corpus, whole, tmp_path, capsys):
    config = lm_runs.config(*corpus, **METHOD)
    for until in (7, 5):  # it is past 5 by then: nothing to do
        assert lm_runs.run(config, str(tmp_path), until=until) == train.FINISHED
        assert "without" in capsys.readouterr().out.splitlines()[-1]
        assert [r["step"] for r in lm_runs.records(tmp_path, "train")] == list(range(1, 8))
        assert checkpoint.Checkpoints(f"{tmp_path}/checkpoints", read_only=True).newest() == 7
    assert lm_runs.run(config, str(tmp_path), until=50) == train.FINISHED
    assert lm_runs.losses(tmp_path) == lm_runs.losses(whole)


def test_steps_to_keep_are_saved_wherever_they_lie(corpus, tmp_path):
    changes = {"checkpoint__every": "10 steps", "checkpoint__keep_every": "7 steps", "checkpoint__keep": 1}
    assert lm_runs.run(lm_runs.config(*corpus, **changes), str(tmp_path)) == train.FINISHED
    assert saved.steps(str(tmp_path)) == [7, 14, 20]


def test_a_run_learns_and_leaves_its_evidence(whole):
    losses = lm_runs.losses(whole)
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    (run,) = lm_runs.records(whole, "run")
    assert run["parameters"]["total"] > run["parameters"]["non_embedding"] > 0
    assert 0 < run["baselines_bits_per_byte"]["val"]["gzip"] < 8
    held_out = lm_runs.records(whole, "evaluate")
    assert [record["step"] for record in held_out] == [0, 10, 20]
    assert held_out[-1]["bytes"] == 5_000  # the last evaluation takes the whole set
    step = lm_runs.records(whole, "train")[-1]
    assert step["epsilon_norm"] == pytest.approx(0.05, rel=1e-5)
    assert step["data_wait"] >= 0
    bends = lm_runs.records(whole, "curvature")
    assert [record["step"] for record in bends] == [10, 20]
    assert all(0 < record["seconds"] < 60 for record in bends)
    assert all(record["critical_sharpness"] * record["critical_learning_rate"] == pytest.approx(2) for record in bends)
    assert all(record["critical_forwards"] < 40 for record in bends)
    assert "displacement" not in bends[-1]  # it began with parameters of its own
    groups = [bends[-1][name] for name in ("attention", "mlp", "norms", "embeddings")]
    for part in ("logit_share", "functional_share"):
        assert sum(group[part] for group in groups) == pytest.approx(1, rel=1e-4)  # the groups are all there is
    assert bends[-1]["all"]["logit_norm"] > 0
    assert -1 <= bends[-1]["all"]["cosine"] <= 1


@pytest.mark.parametrize("mesh", [{"mesh__tensor": 2}, pytest.param(lm_runs.EVERY_AXIS, marks=pytest.mark.exhaustive)])
def test_a_finished_run_shows_a_sample_of_its_model_on_any_mesh(corpus, whole, tmp_path, capsys, mesh):
    shutil.copytree(whole, tmp_path / "run")
    config = lm_runs.config(*corpus, **METHOD, sample__tokens=6, sample__temperature=0.0, **mesh)
    assert lm_runs.run(config, str(tmp_path / "run")) == train.FINISHED
    text = capsys.readouterr().out.split("sample\n------\n")[1].split("\n------\n")[0]
    own = (Path(corpus[0]) / "val.txt").read_text().lstrip().splitlines()[0]
    assert text.startswith(own[:8]), "it continues the beginning of the run's own text"
    generate.main([f"--workdir={whole}", "--tokens=6", "--temperature=0"])
    assert f"{text}\n" == capsys.readouterr().out != f"{own}\n"


def test_what_was_trained_can_be_evaluated_and_sampled(whole, capsys):
    assert evaluate.main([f"--workdir={whole}"]) == 0
    line = capsys.readouterr().out.splitlines()[-1].split()
    at_the_end = lm_runs.records(whole, "evaluate")[-1]
    assert line[0] == "val"
    assert float(line[1]) == pytest.approx(at_the_end["loss"], abs=1e-4)  # as printed
    assert generate.main([f"--workdir={whole}", "--prompt=import", "--tokens=5"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("import")
    generate.main([f"--workdir={whole}", "--prompt=import", "--tokens=5"])
    assert capsys.readouterr().out == first
    assert evaluate.main([f"--workdir={whole}", "--step=3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_one_signal_in_the_last_evaluation_ends_the_run_which_then_owes_it(corpus, whole, tmp_path, monkeypatch):
    real = measure.held_out

    def signalled(*arguments):
        if arguments[-1] == 0:  # batches, of the end
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    config = lm_runs.config(*corpus, **METHOD, curvature__every=10)
    with monkeypatch.context() as patched:
        patched.setattr(measure, "held_out", signalled)
        assert lm_runs.run(config.copy_and_resolve_references(), str(tmp_path)) == train.STOPPED
    assert [record["step"] for record in lm_runs.records(tmp_path, "evaluate")] == [0, 10]
    assert lm_runs.run(config.copy_and_resolve_references(), str(tmp_path)) == train.FINISHED
    for _ in range(2):  # then it is finished, whatever the checkpoint says
        assert lm_runs.run(config.copy_and_resolve_references(), str(tmp_path)) == train.FINISHED
    ends = [[(r["step"], r["loss"]) for r in lm_runs.records(run, "evaluate")] for run in (tmp_path, whole)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("where", ["the first batch", "the second record"])
def test_what_ends_a_run_in_its_last_evaluation_costs_no_step_and_leaves_each_record_once(
    corpus, tmp_path, monkeypatch, where
):
    config = lm_runs.config(*corpus, average__weights=("ema",), checkpoint__every="100%", evaluate__every="100%")
    real, calls = {"held_out": measure.held_out, "evaluation": tracker.Tracker.evaluation}, []

    def failing(name, last):
        def call(*arguments, **keywords):
            calls.append(name)
            if calls.count(name) == last:
                raise RuntimeError("a cable is pulled")
            return real[name](*arguments, **keywords)

        return call

    with monkeypatch.context() as patched:
        if where == "the first batch":
            patched.setattr(measure, "held_out", failing("held_out", 3))
        else:
            patched.setattr(tracker.Tracker, "evaluation", failing("evaluation", 4))
        with pytest.raises(RuntimeError, match="cable"):
            lm_runs.run(config.copy_and_resolve_references(), str(tmp_path))
    assert [r["step"] for r in lm_runs.records(tmp_path, "train")] == list(range(1, 21))
    for _ in range(2):
        assert lm_runs.run(config.copy_and_resolve_references(), str(tmp_path)) == train.FINISHED
    for kind in ("evaluate", "average"):
        assert [(r["step"], r["name"]) for r in lm_runs.records(tmp_path, kind)] == [(0, "val"), (20, "val")]
    assert [r["step"] for r in lm_runs.records(tmp_path, "run")] == [0, 20, 20]  # where each start began


def test_a_finished_run_does_nothing_more(corpus, whole):
    before = (whole / "metrics.jsonl").read_text().count('"kind": "train"')
    assert lm_runs.run(lm_runs.config(*corpus, **METHOD), str(whole)) == train.FINISHED
    assert (whole / "metrics.jsonl").read_text().count('"kind": "train"') == before


def test_a_workdir_of_another_config_is_refused_with_the_difference(corpus, whole):
    other = lm_runs.config(*corpus, **{**METHOD, "optim__rho": 0.1, "seed": 3})
    with pytest.raises(ConfigError, match=r"config.optim.rho = 0.1: must be 0.05 to resume .*also differing: seed"):
        lm_runs.run(other, str(whole))


def test_the_mesh_may_change_between_starts(corpus, whole, tmp_path, monkeypatch):
    """One device, stopped, continued on 2 x 2 x 2: the same losses up to the order of sums (1e-5)."""
    with monkeypatch.context() as patched:
        patched.setattr(signals.StopSignals, "requested", stop_at(10))
        lm_runs.run(lm_runs.config(*corpus, **METHOD), str(tmp_path))
    lm_runs.run(lm_runs.config(*corpus, **METHOD, mesh__data=2, mesh__fsdp=2, mesh__tensor=2), str(tmp_path))
    np.testing.assert_allclose(lm_runs.losses(tmp_path), lm_runs.losses(whole), atol=1e-5)


@pytest.mark.exhaustive  # the profiler takes half a minute
def test_named_steps_are_traced_also_those_that_a_stop_leaves_for_later(corpus, tmp_path, capsys):
    config = lm_runs.config(*corpus, log__profile="steps 5-8")
    assert lm_runs.run(config, str(tmp_path), until=6) == train.FINISHED
    assert "profile     steps 5 to 6 in" in capsys.readouterr().out
    assert lm_runs.run(config, str(tmp_path)) == train.FINISHED
    assert "profile     steps 7 to 8 in" in capsys.readouterr().out
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len({trace.parent for trace in traces}) == len(traces) >= 1
    assert all(trace.stat().st_size > 10_000 for trace in traces)


BROKEN = {"optim__method": "sam", "optim__rho": 0.1, "optim__peak_learning_rate": 1e15, "optim__warmup": "0%"}


def test_a_non_finite_step_stops_the_run_and_is_named(corpus, tmp_path):
    """By a learning rate that breaks the run."""
    assert lm_runs.run(lm_runs.config(*corpus, **BROKEN), str(tmp_path / "stop")) == train.ANOMALY
    last = lm_runs.records(tmp_path / "stop", "train")[-1]
    assert last["nonfinite"] == 1
    (found,) = lm_runs.records(tmp_path / "stop", "anomaly")
    assert (found["step"], found["what"], found["decision"]) == (last["step"], "nonfinite", "stop")
    assert found["where"] in ("the loss", "the gradient at theta")
    with np.load(found["batch"], allow_pickle=False) as batch:
        assert batch["inputs"].shape == (8, 16)
    said = []
    metrics = replay.replay(lm_runs.config(*corpus, **BROKEN), str(tmp_path / "stop"), found["step"], said.append)
    assert metrics["nonfinite"] == 1
    assert any(line.startswith(f"step {found['step']}: nonfinite, {found['where']}") for line in said)
    assert "invalid value" in said[-1]


@pytest.mark.exhaustive  # a refused step: parts/test_step.py
def test_non_finite_steps_are_skipped_until_there_are_too_many(corpus, tmp_path):
    skip = {**BROKEN, "train__on_nonfinite": "skip", "train__max_skips": 3}
    assert lm_runs.run(lm_runs.config(*corpus, **skip), str(tmp_path / "skip")) == train.ANOMALY
    bad = [r for r in lm_runs.records(tmp_path / "skip", "train") if r["nonfinite"]]
    assert len(bad) == 3
    assert len({r["parameter_norm"] for r in bad}) == 1  # nothing moved


SPIKE = {
    **METHOD, "train__spike_score": 0.5, "train__spike_window": 2, "train__max_skips": 30,
    "checkpoint__every": "5 steps",
}  # fmt: skip


@pytest.mark.exhaustive  # six runs; the watch itself: parts/test_anomaly.py
def test_a_spike_rolls_back_past_its_data_also_when_interrupted(corpus, tmp_path, monkeypatch):
    """A limit so low that steps of this text exceed it: back to the multiple of 5 before, other batches from there."""
    rolling = lm_runs.config(*corpus, **SPIKE, train__on_spike="rollback")
    assert lm_runs.run(rolling, str(tmp_path / "one")) == train.FINISHED
    back = lm_runs.records(tmp_path / "one", "rollback")[0]
    to, bad = back["to"], back["because"]
    assert (back["step"], to) == (to + 1, (bad["step"] - 1) // 5 * 5)
    assert back["windows"][-1] == [to, bad["step"] - to]
    assert bad["loss"] > float(bad["where"].split()[-1]) - 1e-3  # the limit it exceeded
    assert [r["step"] for r in lm_runs.records(tmp_path / "one", "train")] == list(range(1, 21))
    with np.load(tmp_path / "one" / anomaly.FOLDER / f"step-{bad['step']}.npz", allow_pickle=False) as batch:
        assert batch["targets"].shape == (8, 16)

    metrics = replay.replay(rolling, str(tmp_path / "one"), bad["step"], lambda line: None)
    assert (metrics["spike"], metrics["loss"]) == (1, bad["loss"])  # the step that was left, not the one in its place

    # stopped twice, before and after rollbacks, which leaves checkpoints in between; then continued
    for calls in (to + 2, 4):
        with monkeypatch.context() as patched:
            patched.setattr(signals.StopSignals, "requested", stop_at(calls))
            assert lm_runs.run(rolling, str(tmp_path / "two")) == train.STOPPED
    assert lm_runs.run(rolling, str(tmp_path / "two")) == train.FINISHED
    assert lm_runs.losses(tmp_path / "two") == lm_runs.losses(tmp_path / "one")
    assert lm_runs.records(tmp_path / "two", "rollback") == [
        {**r, "because": {**r["because"], "batch": r["because"]["batch"].replace("/one/", "/two/")}}
        for r in lm_runs.records(tmp_path / "one", "rollback")
    ]

    skipping = lm_runs.config(*corpus, **SPIKE, train__on_spike="skip")
    assert lm_runs.run(skipping, str(tmp_path / "skip")) == train.FINISHED
    norms = {r["step"]: (r["spike"], r["parameter_norm"]) for r in lm_runs.records(tmp_path / "skip", "train")}
    refused = [step for step, (spike, _) in norms.items() if spike]
    assert refused
    assert all(norms[step][1] == norms[step - 1][1] for step in refused)


def test_a_step_is_replayed_exactly_and_nothing_is_written(corpus, whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    said = []
    metrics = replay.replay(lm_runs.config(*corpus, **METHOD), str(whole), 13, said.append)
    recorded = lm_runs.records(whole, "train")[12]
    assert {name: metrics[name] for name in ("loss", "gradient_norm", "update_norm", "perturbed_loss")} == {
        name: recorded[name] for name in ("loss", "gradient_norm", "update_norm", "perturbed_loss")
    }
    assert any("from the state after step 10" in line for line in said)
    assert "layers/mlp/down/kernel                 1" in "\n".join(said)
    assert said[-1].endswith("every number of both gradients is finite")
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    with pytest.raises(Unusable, match="--replay_step=21: must be a step of the run, from 1 to 20"):
        replay.replay(lm_runs.config(*corpus, **METHOD), str(whole), 21, said.append)


def test_a_new_run_starts_from_old_weights(corpus, whole, tmp_path):
    new = {**METHOD, "init_from": str(whole), "evaluate__batches": 0, "seed": 5, "curvature__every": 20}
    assert lm_runs.run(lm_runs.config(*corpus, **new), str(tmp_path / "new")) == train.FINISHED
    first, last = lm_runs.records(tmp_path / "new", "evaluate")[0], lm_runs.records(whole, "evaluate")[-1]
    assert (first["step"], first["loss"]) == (0, last["loss"])
    (bends,) = lm_runs.records(tmp_path / "new", "curvature")
    ends = [saved.load(str(place), log=lambda line: None).params for place in (tmp_path / "new", whole)]
    assert bends["displacement"]["norm"] == pytest.approx(float(norm(jax.tree.map(jnp.subtract, *ends))), rel=1e-5)
    wider = lm_runs.config(*corpus, **{**new, "init_from": str(whole), "model__mlp_width": 64})
    with pytest.raises(Unusable, match=r"does not fit this config: params/layers/mlp/"):
        lm_runs.run(wider, str(tmp_path / "wider"))
    assert not (tmp_path / "wider").exists()


@pytest.mark.exhaustive  # two runs that measure curvature
def test_a_run_needs_the_weights_it_began_from_no_more(corpus, whole, tmp_path, capsys):
    gone = shutil.copytree(whole, tmp_path / "gone")
    new = {**METHOD, "init_from": str(gone), "evaluate__batches": 0, "seed": 5, "curvature__every": 20}
    assert lm_runs.run(lm_runs.config(*corpus, **new), str(tmp_path / "later"), until=10) == train.FINISHED
    shutil.rmtree(gone)  # it needs it no more, but for the displacement
    assert lm_runs.run(lm_runs.config(*corpus, **new), str(tmp_path / "later")) == train.FINISHED
    assert "curvature   without the displacement from the initial parameters" in capsys.readouterr().out
    (bends,) = lm_runs.records(tmp_path / "later", "curvature")
    assert "displacement" not in bends


def test_an_allowed_change_is_recorded_and_kept_through_a_fall_back(corpus, whole, tmp_path, capsys):
    """From a damaged step 20 back to step 10, with another order of the data from there on."""
    place = shutil.copytree(whole, tmp_path / "run")
    (place / "checkpoints" / "20" / "state" / "_METADATA").write_text("{}")
    other = lm_runs.config(*corpus, **METHOD, seed=3)
    assert lm_runs.run(other, str(place), ["seed"]) == train.FINISHED
    assert "CHECKPOINT 20 IS NOT USED: state/_METADATA was altered" in capsys.readouterr().out
    (change,) = (r for r in lm_runs.records(place, "change") if "version" not in r["key"])
    assert change == {"kind": "change", "step": 10, "key": "seed", "before": 0, "after": 3}
    assert lm_runs.losses(place)[:10] == lm_runs.losses(whole)[:10]
    assert not set(lm_runs.losses(place)[10:]) & set(lm_runs.losses(whole)[10:])


def test_the_command_stops_on_a_signal_and_continues_without_tensorflow(corpus, tmp_path):
    """The real process: SIGTERM saves and exits 75; again, it finishes; tensorflow is never imported."""
    text, cache = corpus
    command = [
        *(sys.executable, "-X", "importtime", "-P", "-m", "steppe.scripts.train"),
        *("--config=base", f"--workdir={tmp_path}"),
        *(f"--config.data.task=text:{text}/train.txt@all", f"--config.data.held_out=('val=text:{text}/val.txt@all',)"),
        *(f"--config.data.cache={cache}", "--config.data.sequence_length=16", "--config.model.layers=1"),
        *("--config.model.width=16", "--config.model.heads=2", "--config.model.mlp_width=16"),
        *("--config.train.batch_size=8", "--config.train.duration=20000 steps", "--config.evaluate.every=100%"),
        *("--config.evaluate.batches=1", "--config.log.every=1", "--config.checkpoint.every=100%"),
    ]
    env = processes.environment()
    run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = []
    for line in run.stdout:
        seen.append(line)
        if line.startswith("step 3/"):
            run.send_signal(signal.SIGTERM)
            break
    rest = run.stdout.read()
    assert run.wait(timeout=60) == train.STOPPED, rest[-2000:]
    assert "run the same command again to resume" in rest
    imported = {
        line.rsplit("|", 1)[1].strip() for line in [*seen, *rest.splitlines()] if line.startswith("import time")
    }
    assert "jax" in imported
    assert not {name.split(".")[0] for name in imported} & {"tensorflow", "seqio", "wandb"}
    assert (tmp_path / "loss.png").exists()  # matplotlib is met once everything is saved
    assert "matplotlib" not in {line.rsplit("|", 1)[-1].strip() for line in seen}
    (saved,) = lm_runs.records(tmp_path, "checkpoint")
    assert saved["step"] == lm_runs.records(tmp_path, "train")[-1]["step"]
    assert json.loads((tmp_path / "config.json").read_text())["model"]["width"] == 16


def test_one_more_thing_between_steps_is_one_entry(corpus, tmp_path, monkeypatch):
    seen, opened = [], train.Run

    def with_one_more(*arguments, **named):
        run = opened(*arguments, **named)
        run.events.append(Event(each(8, last=20), lambda at: seen.append((at.done, len(at.pending)))))
        return run

    monkeypatch.setattr(train, "Run", with_one_more)
    assert lm_runs.run(lm_runs.config(*corpus), str(tmp_path)) == train.FINISHED
    assert seen == [(8, 0), (16, 0), (20, 0)]  # what came before is recorded by then


def test_a_workdir_from_before_a_key_existed_goes_on(corpus, tmp_path):
    whole, old = tmp_path / "whole", tmp_path / "old"
    config = lm_runs.config(*corpus)
    assert lm_runs.run(config, str(whole)) == train.FINISHED
    assert lm_runs.run(config, str(old), until=10) == train.FINISHED
    written = json.loads((old / "config.json").read_text())
    del written["optim"]["clip_order"], written["model"]["label_smoothing"]
    (old / "config.json").write_text(json.dumps(written))
    assert saved.load(str(old)).config.to_dict() == {**saved.load(str(whole)).config.to_dict()}
    assert lm_runs.run(config, str(old)) == train.FINISHED
    assert lm_runs.losses(old) == lm_runs.losses(whole)


@pytest.mark.parametrize("mesh", [{"mesh__fsdp": 2}, pytest.param(lm_runs.EVERY_AXIS, marks=pytest.mark.exhaustive)])
def test_steps_of_a_mesh_are_those_of_one_device_and_a_run_ends_where_they_are_not(
    corpus, tmp_path, monkeypatch, capsys, mesh
):
    checked = {"mesh__check_every": 2, "train__microbatches": 2, "train__duration": "8 steps"}
    config = lm_runs.config(*corpus, **METHOD, **mesh, **checked)
    assert lm_runs.run(config, str(tmp_path / "sound")) == train.FINISHED
    assert not lm_runs.records(tmp_path / "sound", "anomaly")

    sound = train.compile_step

    def wrong(*given):
        step = sound(*given)

        def run(*arguments):
            after, metrics = step(*arguments)
            return after, {**metrics, "perturbed_loss": metrics["perturbed_loss"] + 0.05 * (after.step == 6)}

        return run

    monkeypatch.setattr(train, "compile_step", wrong)
    assert lm_runs.run(config, str(tmp_path / "wrong")) == train.ANOMALY
    (found,) = lm_runs.records(tmp_path / "wrong", "anomaly")
    assert (found["step"], found["what"], list(found["differing"])) == (6, "mismatch", ["perturbed_loss"])
    assert "perturbed_loss" in capsys.readouterr().out
