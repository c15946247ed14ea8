"""Sweeps: what a spec expands to, what is refused, how a sweep grows, and that a killed one loses nothing."""

import argparse
import json
import os
import re
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import lm_runs, sweep_runs
from steppe.configs import only
from steppe.configs.read import UsageError
from steppe.data.stored import Wrong
from steppe.lm.track.waiting import clock_face
from steppe.scripts import results, train
from steppe.scripts.sweep import __main__ as sweep
from steppe.scripts.sweep import halving as sweep_halving
from steppe.scripts.sweep import plan as sweep_plan
from steppe.scripts.sweep import spec as sweep_spec

BASE = "--config=base"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


# ---------------------------------------------------------------------------------------------------------------- specs
def test_a_block_expands_to_grid_times_zip_times_list():
    block = {
        "set": {"train.batch_size": 8},
        "grid": {"optim.method": ["sam", "adamw"], "optim.rho": [0.1, 0.2]},
        "zip": {"model.size": ["0.1m", "0.4m"], "train.duration": ["10 steps", "20 steps"]},
        "list": [{"seed": 0}, {"seed": 1, "optim.every": 2}],
        "where": [
            {"if": {"optim.method": "adamw"}, "set": {"optim.rho": None}},
            {"if": {"model.size": ["0.4m"], "seed": 1}, "set": {"optim.peak_learning_rate": 1e-3}},
        ],
        "exclude": [{"optim.method": "sam", "seed": 1}],
        "only": {"model.size": ["0.4m"]},
    }
    assert sweep_spec.expand([block]) == [
        _run("sam", "0.1", "0"),
        _run("sam", "0.2", "0"),
        _run("adamw", "None", "0"),
        {**_run("adamw", "None", "1"), "optim.every": "2", "optim.peak_learning_rate": "0.001"},
    ]


def test_an_option_that_a_method_does_not_take_varies_without_it():
    """adamw in a grid over rho is one run; what is set for it by name is refused later, not passed over."""
    grid = {"optim.method": ["adamw", "sam"], "optim.rho": np.array([0.01, 0.03]), "seed": [np.int64(1)]}
    found = [(run["optim.method"], run["optim.rho"]) for run in sweep_spec.expand([{"grid": grid}])]
    assert found == [("adamw", "None"), ("sam", "0.01"), ("sam", "0.03")]
    alias = {"grid": {"optim.method": ["base"], "optim.rho": [0.01]}}
    assert [run["optim.rho"] for run in sweep_spec.expand([alias])] == ["None"]
    named = {"set": {"optim.method": "adamw", "optim.rho": 0.01}}
    assert [run["optim.rho"] for run in sweep_spec.expand([named])] == ["0.01"]


def test_values_of_a_flag_are_cut_outside_brackets_and_quotes():
    assert only.split("('a/', 'b,c'), [1,2],x") == ["('a/', 'b,c')", "[1,2]", "x"]
    assert only.split("a(b,c") == ["a(b", "c"]  # brackets that do not close mean nothing
    block = sweep_spec.from_flags(["optim.perturb=('layers/',),('embed/','mlp/')"], [])
    assert block["grid"] == {"optim.perturb": ["('layers/',)", "('embed/','mlp/')"]}


def _run(method, rho, seed):
    return {
        "train.batch_size": "8", "optim.method": method, "optim.rho": rho, "model.size": "0.4m",
        "train.duration": "20 steps", "seed": seed,
    }  # fmt: skip


def test_flags_are_a_block():
    block = sweep_spec.from_flags(["optim.rho=0.1, 0.2", "config.seed=0,1"], ["model.size=a,b", "train.batch_size=1,2"])
    found = sweep_spec.expand([block])
    assert len(found) == 8
    assert found[1] == {"optim.rho": "0.1", "seed": "0", "model.size": "b", "train.batch_size": "2"}
    assert only.filters(["model.size=a,b,seed=0", "optim.rho=1"]) == {
        "model.size": ["a", "b"], "seed": ["0"], "optim.rho": ["1"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ({"gird": {}}, ["block 1", "gird", "set, grid, zip"]),
        ({"grid": {"seed": 3}}, ["seed = 3", "list of values"]),
        ({"grid": {"optim.method": "sam"}}, ["optim.method = 'sam'", "list of values"]),
        ({"set": {"seed": [1, 2]}}, ["seed = [1, 2]", "grid"]),
        ({"zip": {"seed": [1, 2], "optim.rho": [1.0]}}, ["zip", "seed has 2, optim.rho has 1"]),
        ({"set": {"seed": 1}, "grid": {"seed": [1]}}, ["seed", "in one of"]),
        ({"grid": {"seed": [1]}, "exclude": [{"optim.rho": 1.0}]}, ["optim.rho", "a key that this block sets"]),
        ({"grid": {"seed": [1]}, "where": [{"seed": 1}]}, ["where[0].if: is missing"]),
        ({"grid": ["seed"]}, ["grid", "must be an object"]),
        ({"grid": {"seed": [{"a": 1}]}}, ["seed = {'a': 1}", "a number"]),
    ],
)
def test_malformed_blocks_are_refused(block, parts):
    with pytest.raises((UsageError, Wrong)) as error:
        sweep_spec.expand([block])
    for part in parts:
        assert part in str(error.value)


_KEYS = st.sampled_from(["optim.rho", "config.seed", "nonsense", "", 3, None])
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(object())
_RULES = _SCALARS | st.dictionaries(_KEYS, _SCALARS | st.lists(_SCALARS, max_size=3) | st.tuples(_SCALARS), max_size=2)
_CHANGES = st.dictionaries(st.sampled_from(["if", "set", "x"]), _RULES, max_size=3)
_BLOCKS = st.dictionaries(
    st.sampled_from(sorted(sweep_spec._Block.__annotations__)),
    _RULES | st.lists(_RULES | _CHANGES, max_size=2),
    max_size=4,
)


@given(st.lists(_BLOCKS, min_size=1, max_size=2))
@settings(max_examples=300, deadline=None)
def test_whatever_a_spec_returns_is_runs_or_one_line(blocks):
    runs, said = [], "block 1 of the sweep: "
    try:
        runs = sweep_spec.expand(blocks)
    except (UsageError, Wrong) as error:
        said = str(error)
    assert re.fullmatch(r"block [12] of the sweep: .*", said)
    assert all(isinstance(text, str) for run in runs for text in (*run, *run.values()))


@given(_RULES | st.dictionaries(st.sampled_from(["eta", "rungs", "over"]), _SCALARS | st.lists(_SCALARS, max_size=3)))
@settings(max_examples=300, deadline=None)
def test_whatever_a_spec_gives_as_halving_is_one_or_one_line(given):
    made, said = None, "halving of the sweep: "
    try:
        made = sweep_halving.settings(given)
    except (UsageError, Wrong) as error:
        said = str(error)
    assert re.fullmatch(r"halving of the sweep: .*", said)
    assert made is None or (made.eta > 1 and 0 < made.rungs[0] <= made.rungs[-1] < 1)


def test_names_are_short_safe_and_new():
    config = {"model.size": "0.1m", "optim.method": "sam", "optim.rho": 0.03, "optim.every": 1, "seed": 0}
    config |= {"evaluate.every": "10%", "train.duration": "2 steps", "data.task": "text:/a,b@all", "log.name": ""}
    varying = ["seed", "model.size", "optim.method", "optim.rho"]
    assert sweep_spec.name_run(config, varying, ()) == "size=0.1m,method=sam,rho=0.03,seed=0"
    assert sweep_spec.name_run({**config, "optim.rho": None}, varying, ()) == "size=0.1m,method=sam,seed=0"
    assert sweep_spec.name_run(config, ["optim.every", "train.duration"], ()) == "optim.every=1,duration=2steps"
    assert sweep_spec.name_run(config, ["data.task"], ()) == "task=text_a+ball"
    assert sweep_spec.name_run(config, [], ()) == "run"
    assert sweep_spec.name_run(config, [], ("run", "run~2")) == "run~3"
    assert len(sweep_spec.name_run({**config, "data.task": "x" * 999}, ["data.task"], ())) < 200


# ------------------------------------------------------------------------------------------------ refusals and the plan
@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--grid", "seed=0"], ["--config is missing"]),
        ([BASE], ["--sweep is missing"]),
        ([BASE, "--sweep=nothing.py"], ["--sweep = nothing.py", "rho_by_scale"]),
        ([BASE, "--grid", "optim.rho"], ["--grid optim.rho", "KEY=VALUE"]),
        ([BASE, "--grid", "optim.rhoo=1,2"], ["run optim.rhoo=1", "did you mean config.optim.rho?"]),
        ([BASE, "--grid", "optim.method=sam,samm"], ["run optim.method=samm", "config.optim.method = 'samm'"]),
        ([BASE, "--grid", "optim.rho=0.1"], ["run optim.rho=0.1", "None: rho is not an option of adamw"]),
        (
            ["--config=quickstart", "--config.optim.rho=0.1", "--grid", "optim.method=sam,adamw"],
            ["run optim.method=adamw: config.optim.rho = 0.1", "None: rho is not an option of adamw"],
        ),
        ([BASE, "--grid", "seed=x"], ["run seed=x", "config.seed = x", "an integer"]),
        ([BASE, "--grid", "seed=0", "--config.train.batch_size=0"], ["config.train.batch_size = 0"]),
        ([BASE, "--grid", "seed=0,1", "--only=seed=2"], ["--only=seed=2", "no run matches"]),
        ([BASE, "--grid", "seed=0,1", "--only=sed=2"], ["--only=sed", "no such key"]),
        ([BASE, "--grid", "seed=0", "--jobs=-1"], ["--jobs: -1"]),
        ([BASE, "--grid", "seed=0", "--config.data.task=embeded"], ["config.data.task", "embeded"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(argv, parts, tmp_path, capsys):
    out = tmp_path / "out"
    try:
        status = sweep.main([*argv, f"--out={out}"])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr().err
    assert status == 2
    assert printed.count("\n") == 1
    for part in parts:
        assert part in printed
    assert list(tmp_path.iterdir()) == []


def test_the_plan_counts_and_writes_nothing(tmp_path, capsys):
    spec = tmp_path / "spec.py"
    spec.write_text(
        "def get_spec():\n"
        "    methods = {'optim.method': ['adamw', 'sam'], 'optim.rho': [0.1, 0.3], 'seed': [0, 1]}\n"
        "    alone = [{'if': {'optim.method': 'adamw'}, 'set': {'optim.rho': None}}]\n"
        "    again = {'grid': {'optim.method': ['sam'], 'optim.rho': [0.10, 0.5], 'seed': [0]}}\n"
        "    return [{'grid': methods, 'where': alone}, again]\n"
    )
    began = time.monotonic()
    assert sweep.main([BASE, f"--sweep={spec}", f"--out={tmp_path / 'out'}", "--plan"]) == 0
    assert time.monotonic() - began < 30
    printed = capsys.readouterr().out
    # 2 of adamw, 4 of sam and one more: the runs that two blocks share are one
    assert "7 (7 unfinished)" in printed
    assert re.search(r"sam +0\.1\.\.0\.5 \(3\) +2 +5 +0 +787,584 +1,000", printed)
    assert f"cost    {7 * 1000 * 16 * 256:,} tokens" in printed
    assert not (tmp_path / "out").exists()


def test_the_time_of_a_list_of_runs():
    assert sweep_plan.makespan([], 2) == 0
    assert sweep_plan.makespan([3.0, 1.0, 1.0, 4.0], 2) == 6.0
    assert clock_face(3723) == "1:02:03"


# ----------------------------------------------------------------------------------- real sweeps, growth, kill, restart
FLAGS = ("--jobs=1", "--order=listed", "--grid", "seed=0,1,2")
NAMES = ("seed=0", "seed=1", "seed=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return sweep_runs.write_config(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """An undisturbed sweep of three seeds."""
    out = tmp_path_factory.mktemp("whole")
    status, printed = sweep_runs.run(config, out, *FLAGS)
    assert status == 0, printed
    assert "3 finished" in printed
    return out


def evidence(directory):
    """What must not change once a run has finished: the bytes of its files, and that nobody wrote them again."""
    files = [path for path in sorted(directory.iterdir()) if path.is_file() and path.name != "lock"]
    return {path.name: (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.005)


def attempts(directory):
    return [line for line in (directory / "train.log").read_text().splitlines() if line.startswith("$ ")]


def test_a_killed_sweep_loses_nothing_and_repeats_nothing(config, whole, tmp_path):
    out = tmp_path / "out"
    first, second, third = (out / "runs" / name for name in NAMES)

    # the sweep and the run under way are killed in the middle of the second run
    process = sweep_runs.start(config, out, *FLAGS)
    wait_for(lambda: sweep_runs.saved(second) >= 30, process)
    os.kill(process.pid, signal.SIGKILL)
    os.kill(int((second / "lock").read_text().split()[1]), signal.SIGKILL)
    process.wait()
    assert (first / "outcome.json").exists()
    assert not (second / "outcome.json").exists()
    assert not third.exists()
    before = evidence(first)

    # then only the sweep, in the middle of the third: that run goes on by itself
    process = sweep_runs.start(config, out, *FLAGS)
    wait_for(lambda: sweep_runs.saved(third) >= 10, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = sweep_runs.start(config, out, *FLAGS)
    printed, _ = again.communicate(timeout=120)
    assert again.returncode == 0, printed
    assert "3 finished" in printed

    assert evidence(first) == before
    assert [len(attempts(place)) for place in (first, second, third)] == [1, 2, 1]
    assert "resuming    after step" in (second / "train.log").read_text()
    for name in NAMES:
        mine, undisturbed = out / "runs" / name, whole / "runs" / name
        assert lm_runs.losses(mine) == lm_runs.losses(undisturbed)
        assert lm_runs.records(mine, "evaluate") == lm_runs.records(undisturbed, "evaluate")
    assert [result.loss for result in results.read(out)] == [result.loss for result in results.read(whole)]


def test_a_sweep_grows_and_keeps_what_it_has(config, whole, capsys):
    before = {name: evidence(whole / "runs" / name) for name in NAMES}
    grown = ("--jobs=1", "--grid", "seed=2,0,3", "--grid", "optim.weight_decay=0.1,0.2", "--only=seed=0,3")
    status, printed = sweep_runs.run(config, whole, *grown, "--config.checkpoint.every=45 steps")
    assert status == 0, printed
    assert "4 (1 finished, 3 unfinished)" in printed
    assert "finished runs here" in printed  # the estimate comes from what is measured
    assert {name: evidence(whole / "runs" / name) for name in NAMES} == before
    record = json.loads((whole / "sweep.json").read_text())
    assert list(record["runs"]) == [
        *NAMES, "weight_decay=0.2,seed=0", "weight_decay=0.1,seed=3", "weight_decay=0.2,seed=3",
    ]  # fmt: skip
    found = {result.name: result for result in results.read(whole)}
    assert {result.status for result in found.values()} == {"finished"}
    assert found["seed=1"].varied == {"seed": 1, "optim.weight_decay": 0.1}
    assert found["seed=0"].loss != found["weight_decay=0.2,seed=0"].loss
    assert record["runs"]["weight_decay=0.1,seed=3"]["log.group"] == whole.name


def test_failed_and_diverged_runs_are_results_and_the_sweep_goes_on(config, tmp_path):
    out = tmp_path / "out"
    nothing = tmp_path / "nothing"
    flags = ("--jobs=1", "--order=listed", "--zip", "seed=0,1", "--zip", f"init_from={nothing},")
    flags += ("--zip", "optim.peak_learning_rate=0.01,1e38")
    status, printed = sweep_runs.run(config, out, *flags)
    assert status == 1, printed
    found = results.read(out)
    assert [result.status for result in found] == ["failed", "diverged"], printed
    assert "holds no checkpoint" in found[0].why
    assert "nonfinite at step" in found[1].why
    outcome = json.loads((found[0].directory / "outcome.json").read_text())
    assert outcome["exit"] == 2
    # nothing is tried again unless asked to, and then only the failed one
    assert sweep_runs.run(config, out, *flags)[0] == 1
    assert [len(attempts(result.directory)) for result in found] == [1, 1]
    assert sweep_runs.run(config, out, *flags, "--retry")[0] == 1
    assert [len(attempts(result.directory)) for result in found] == [2, 1]


def test_a_signal_stops_runs_with_a_checkpoint_and_a_second_sweep_is_refused(config, tmp_path):
    out = tmp_path / "out"
    process = sweep_runs.start(config, out, "--jobs=1", "--grid", "seed=7", "--config.train.duration=100000 steps")
    place = out / "runs" / "run"
    wait_for(lambda: sweep_runs.saved(place) >= 10, process)
    status, printed = sweep_runs.run(config, out, "--grid", "seed=7", "--config.train.duration=100000 steps")
    assert status == 2
    assert f"is in use by process {process.pid}" in printed
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "run the same command again" in printed
    assert sweep_runs.saved(place) == lm_runs.records(place, "train")[-1]["step"]
    assert not (place / "outcome.json").exists()
    (result,) = results.read(out)
    assert result.status == "unfinished"


# ------------------------------------------------------------------------------------------------------------- halving
def test_halving_is_read_and_refused():
    assert sweep_halving.parse("") == sweep_halving.Halving(2.0, (0.25, 0.5))
    assert sweep_halving.parse("3") == sweep_halving.Halving(3.0, (0.25, 0.5))
    assert sweep_halving.parse("4:0.1,0.3") == sweep_halving.Halving(4.0, (0.1, 0.3))
    assert sweep_halving.settings({"rungs": [0.5]}) == sweep_halving.Halving(2.0, (0.5,))
    assert sweep_halving.settings({"over": ["seed"]}).over == ("seed",)
    for text in ("1", "x", "2:0.5,0.25", "2:0", "2:1", "2:a"):
        with pytest.raises(UsageError, match="halving"):
            sweep_halving.parse(text)
    with pytest.raises(UsageError, match="rung: must be eta, rungs or over"):
        sweep_halving.settings({"rung": 3})


def test_a_rung_ends_the_runs_of_highest_loss_and_a_second_call_changes_nothing(tmp_path):
    """Of three with one half to go on, two do; a loss that is absent or not finite ranks last."""
    losses = {"a": 3.0, "b": float("nan"), "c": 2.0}
    group = [sweep_plan.Run(name, tmp_path / name, [], None, {}) for name in losses]
    for run in group:
        run.directory.mkdir()
        record = {"kind": "evaluate", "step": 30, "name": "val", "loss": losses[run.name], "bits_per_byte": 1.0}
        (run.directory / "metrics.jsonl").write_text(json.dumps(record).replace("NaN", "null") + "\n")
    assert [run.name for run in sweep_halving.prune(group, 30, 1 / 2)] == ["b"]
    assert json.loads((tmp_path / "b" / "outcome.json").read_text())["status"] == "pruned"
    assert sweep_halving.prune(group, 30, 1 / 2) == []
    assert [run.name for run in sweep_halving.prune(group, 30, 1 / 3)] == ["a"]


def test_groups_differ_in_the_given_keys_alone():
    flats = [{"optim.rho": rho, "optim.peak_learning_rate": rate, "seed": seed}
             for rho in (0.1, 0.2) for rate in (1, 2) for seed in (0, 1)]  # fmt: skip
    runs = [argparse.Namespace(flat=flat) for flat in flats]
    by_rho = sweep_halving.groups(runs, ("optim.rho",))
    assert [[run.flat["optim.rho"] for run in group] for group in by_rho] == [[0.1, 0.2]] * 4
    by_both = sweep_halving.groups(runs, ("optim.rho", "optim.peak_learning_rate"))
    assert [{run.flat["seed"] for run in group} for group in by_both] == [{0}, {1}]
    assert sweep_halving.groups(runs[:1], ("seed",)) == []


@pytest.mark.exhaustive  # seven runs; the choice at a rung above
@pytest.mark.parametrize("jobs", [1, 2])
def test_halving_stops_losing_rho_and_leaves_the_winner_as_it_would_have_been(config, whole, tmp_path, jobs):
    """Of three rho, two too large, one ends at each rung; the best is unharmed, and adamw untouched."""
    out = tmp_path / "out"
    spec = tmp_path / "spec.py"
    spec.write_text(
        "def get_spec():\n"
        "    rho = {'optim.method': ['sam'], 'optim.rho': [0.001, 100.0, 1.0], 'seed': [0]}\n"
        "    plain = {'set': {'optim.method': 'adamw', 'seed': 0}}\n"
        "    return {'blocks': [{'grid': rho}, plain], 'halving': {'eta': 2, 'rungs': [0.3, 0.7]}}\n"
    )
    status, printed = sweep_runs.run(config, out, f"--sweep={spec}", f"--jobs={jobs}")
    assert status == 0, printed
    found = {result.name: result for result in results.read(out)}
    names = ["method=sam,rho=0.001", "method=sam,rho=100.0", "method=sam,rho=1.0", "method=adamw"]
    assert list(found) == names
    assert [found[name].status for name in names] == ["finished", "pruned", "pruned", "finished"]
    assert [found[name].train_curve.step[-1] for name in names] == [90, 30, 60, 90]
    assert "rank 3 of 3" in found[names[1]].why
    assert "stopped 2 of 4 runs early" in printed
    # 60 and 30 of 90 steps of runs that cost twice what adamw's does
    assert f"{(60 + 30) / 90 * 2 / 7:.0%} of the whole" in printed
    assert found["method=adamw"].loss == results.read(whole)[0].loss
    alone = tmp_path / "alone"
    flags = ["--config.optim.method=sam", "--config.optim.rho=0.001", "--config.seed=0"]
    with lm_runs.devices(1):
        assert train.main([f"--config={config}", f"--workdir={alone}", *flags]) == 0
    (undisturbed,) = results.read(alone)
    assert undisturbed.train_curve.loss.tolist() == found[names[0]].train_curve.loss.tolist()
    assert undisturbed.loss == found[names[0]].loss
    # done is done: neither a pruned run nor a finished one begins again
    before = {name: attempts(found[name].directory) for name in names}
    assert sweep_runs.run(config, out, f"--sweep={spec}")[0] == 0
    assert {name: attempts(found[name].directory) for name in names} == before
