"""Reading what runs leave behind: status, losses, budgets, time, and which keys vary."""

import json
import math
import subprocess
import sys

import pytest

from helpers import report_runs
from steppe.lm.keep import exits
from steppe.scripts import cli, results


def write_run(directory, *, steps=4, done=None, loss=2.0, rho=0.1, seed=0, outcome=None, extra=()):
    """A workdir as steppe train leaves it after `done` steps; evaluations at 0, the middle and the end."""
    directory.mkdir(parents=True)
    done = steps if done is None else done
    config = {"seed": seed, "model": {"size": "", "width": 8}, "optim": {"rho": rho, "perturb": [".*"]}}
    (directory / "config.json").write_text(json.dumps(config))
    about = {
        "kind": "run", "step": 0, "parameters": {"total": 90, "non_embedding": 50}, "steps": steps,
        "tokens": 16 * steps, "flops_per_step": 200.0, "adamw_flops_per_step": 100.0, "baselines": {"unigram": 3.0},
    }  # fmt: skip
    records = [about]

    def evaluation(step, loss):
        for name in ("val", "other"):
            shown = loss if name == "val" else 9.0
            records.append({"kind": "evaluate", "step": step, "name": name, "loss": shown, "bits_per_byte": 1.5})

    evaluation(0, 5.0)
    clock = 100.0  # compiling
    for step in range(1, done + 1):
        clock += 2.0
        records.append({"kind": "train", "step": step, "tokens": 16 * step, "seconds": clock, "loss": 4.0 - 0.1 * step})
        if step in (steps // 2, steps):
            evaluation(step, loss if step == steps else 4.0)
            clock += 50.0  # evaluating
    lines = [json.dumps(record) for record in [*records, *extra]]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if outcome:
        (directory / "outcome.json").write_text(json.dumps(outcome))


def test_a_finished_run_in_numbers(tmp_path):
    write_run(tmp_path / "a")
    (found,) = results.read(tmp_path / "a")
    assert (found.name, found.status, found.why) == ("a", "finished", "")
    assert (found.parameters, found.total_parameters, found.steps, found.tokens) == (50, 90, 4, 64)
    assert (found.flops, found.adamw_flops) == (800.0, 400.0)
    assert (found.loss, found.bits_per_byte) == (2.0, 1.5)
    assert found.curve == [(0, 0, 0.0, 0.0, 5.0), (2, 32, 400.0, 4.0, 4.0), (4, 64, 800.0, 8.0, 2.0)]
    assert found.train_curve.loss.tolist() == pytest.approx([3.9, 3.8, 3.7, 3.6])
    assert found.seconds == 8.0  # four steps of two seconds: neither compiling nor evaluating
    written = {"seed": 0, "model.size": "", "model.width": 8, "optim.rho": 0.1, "optim.perturb": [".*"]}
    assert {key: found.config[key] for key in written} == written
    assert found.config["optim.base"] == "adamw"  # a key that its config.json lacks, at its default


def test_seconds_go_on_after_a_restart(tmp_path):
    again = [
        {"kind": "run", "step": 4, "parameters": {}, "steps": 6, "tokens": 96, "flops_per_step": 200.0},
        {"kind": "train", "step": 5, "tokens": 80, "seconds": 60.0, "loss": 3.0},
        {"kind": "train", "step": 6, "tokens": 96, "seconds": 62.0, "loss": 3.0},
    ]
    write_run(tmp_path / "a", steps=4, extra=again)
    (found,) = results.read(tmp_path / "a")
    assert found.train_curve.seconds[-1] == found.seconds == 12.0


def test_statuses(tmp_path):
    stop = {"kind": "anomaly", "step": 3, "what": "nonfinite", "decision": "stop"}
    skipped = {"kind": "anomaly", "step": 3, "what": "spike", "decision": "skip"}
    write_run(tmp_path / "1", loss=3.1)
    write_run(tmp_path / "2", loss="nan")
    write_run(tmp_path / "3", done=3, extra=[stop])
    write_run(tmp_path / "4", done=3, extra=[skipped])
    write_run(tmp_path / "5", done=3, outcome={"status": "failed", "exit": 1, "why": "ValueError: no"})
    write_run(tmp_path / "6", done=3, outcome={"status": "pruned", "exit": 0, "why": "not among the best"})
    write_run(tmp_path / "7", done=3, outcome={"status": "finished", "exit": 0, "why": ""})
    write_run(tmp_path / "8", loss=2.9, outcome={"status": "finished", "exit": 0, "why": ""})
    write_run(tmp_path / "10", loss=4.5)
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "config.json").write_text(json.dumps({"seed": 9}))
    found = {result.name: result for result in results.read(tmp_path)}
    assert {name: result.status for name, result in found.items()} == {
        "1": "finished", "10": "diverged", "2": "diverged", "3": "diverged", "4": "unfinished", "5": "failed",
        "6": "pruned", "7": "failed", "8": "finished", "9": "unfinished",
    }  # fmt: skip
    assert found["1"].why == "held-out loss 3.1000 above the unigram model's 3.0000"
    assert found["10"].why == "held-out loss 4.5000 above the unigram model's 3.0000, and it was 4.0000"
    assert found["2"].why == "held-out loss nan"
    assert found["3"].why == "nonfinite at step 3"
    assert found["4"].why == "after step 3"
    assert found["9"].why == "not begun"
    assert math.isnan(found["4"].loss)
    assert {result.status for result in found.values()} == set(exits.STATUSES)


def test_a_key_that_one_run_alone_has_is_none_in_the_others(tmp_path):
    runs = {seed: report_runs.plan("adamw", seed=seed) for seed in (0, 1)}
    report_runs.write_sweep(tmp_path, {name: (overrides, 3.0) for name, overrides in runs.values()})
    of_a_newer_version = tmp_path / "runs" / runs[0][0] / "config.json"
    config = json.loads(of_a_newer_version.read_text())
    of_a_newer_version.write_text(json.dumps(config | {"newer": {"key": 1}}))
    found = results.read(tmp_path)
    assert [result.config["newer.key"] for result in found] == [1, None]
    assert cli.main(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("checkpoint", -1e308, "config.checkpoint = -1e+308: must be an object"), ("seed", {"x": 1}, "config.seed = ")],
)
def test_a_section_that_is_none_or_a_value_that_is_one_leaves_the_run_out(tmp_path, key, value, said):
    runs = {seed: report_runs.plan("adamw", seed=seed) for seed in (0, 1)}
    report_runs.write_sweep(tmp_path, {name: (overrides, 3.0) for name, overrides in runs.values()})
    changed = tmp_path / "runs" / runs[0][0] / "config.json"
    changed.write_text(json.dumps(json.loads(changed.read_text()) | {key: value}))
    lines = []
    assert len(results.read(tmp_path, left_out=lines.append)) == 1
    (line,) = lines
    assert said in line


def test_a_sweep_lists_runs_that_have_not_begun(tmp_path):
    base = {"seed": 0, "model.size": "", "model.width": 8, "optim.rho": 0.1, "optim.perturb": [".*"], "log.name": ""}
    runs = {"rho=0.1": {"optim.rho": "0.1"}, "rho=0.2": {"optim.rho": "0.2"}}
    resolved = {"rho=0.1": {"log.name": "rho=0.1"}, "rho=0.2": {"optim.rho": 0.2, "log.name": "rho=0.2"}}
    sweep = {"config": "x.py", "base": base, "runs": runs, "resolved": resolved}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    write_run(tmp_path / "runs" / "rho=0.1")
    first, second = results.read(tmp_path)
    assert (first.name, first.status, first.varied) == ("rho=0.1", "finished", {"optim.rho": 0.1})
    assert (second.name, second.status, second.varied) == ("rho=0.2", "unfinished", {"optim.rho": 0.2})
    assert second.why == "not begun"


def test_keys_that_vary():
    small, large = {"model.size": "s", "model.width": 1}, {"model.size": "l", "model.width": 2}
    assert results.varying_keys([small, large]) == ["model.size"]
    assert results.varying_keys([{**small, "model.size": ""}, large]) == ["model.size", "model.width"]
    assert results.varying_keys([{"log.name": "a", "x": [1]}, {"log.name": "b", "x": [1]}]) == []
    free = [{"seed": 0, "checkpoint.every": "1%"}, {"seed": 1, "checkpoint.every": "2%"}]
    assert results.varying_keys(free) == ["seed"]
    assert results.varying_keys([*free, {"seed": 1, "checkpoint.every": "3%"}]) == ["seed", "checkpoint.every"]


def test_several_workdirs_and_places_without_runs(tmp_path):
    write_run(tmp_path / "a" / "run", seed=1)
    write_run(tmp_path / "b" / "run", seed=2)
    found = results.read([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [result.varied for result in found] == [{"seed": 1}, {"seed": 2}]
    assert len({result.name for result in found}) == 2
    with pytest.raises(results.ResultsError, match="there is no run in it"):
        results.read(tmp_path)
    folders = results.read([tmp_path / "a", tmp_path / "*" / "run"])  # a folder of workdirs, a pattern
    assert sorted({str(result.directory) for result in folders}) == [f"{tmp_path}/a/run", f"{tmp_path}/b/run"]
    with pytest.raises(results.ResultsError, match=r"absent: must be .*config\.json"):
        results.read([tmp_path / "a", tmp_path / "absent"])


def test_reading_imports_no_jax():
    code = "import sys; from steppe.scripts import results; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("value", [None, True, -1, "x", [], {}, [1], 10**30, [[[]]], [[1, 2]]], ids=repr)
@pytest.mark.parametrize("key", ["steps", "loss", "curve", "seed", "config", "status", "tokens", "averages", "name"])
def test_a_packed_run_of_wrong_types_is_left_out_or_read_and_the_others_stay(tmp_path, key, value):
    for seed in (1, 2):
        write_run(tmp_path / str(seed), seed=seed)
    alike, first, second = map(json.loads, results.pack(results.read(tmp_path)).splitlines())
    (second["config"] if key == "seed" else second)[key] = value
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, (alike, first, second))))
    said = []
    found = results.read(tmp_path / "runs.jsonl", left_out=said.append)
    assert [result.config["seed"] for result in found][:1] == [first["config"]["seed"]]
    assert len(found) + len(said) == 2
    assert all(f"{tmp_path}/runs.jsonl: line 3: " in line and "\n" not in line for line in said)
    assert not said or key in said[0]


def test_a_packed_file_is_read_again_once_it_changes_and_what_is_damaged_is_said_each_time(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / str(seed), seed=seed)
    alike, first, second = results.pack(results.read(tmp_path)).splitlines()
    packed = tmp_path / "runs.jsonl"
    packed.write_text("\n".join((alike, first, "{")))
    for _ in range(2):
        said = []
        (one,) = results.read(packed, left_out=said.append)
        assert len(said) == 1
        one.config.clear()  # what a reader does to its runs is its own
    packed.write_text("\n".join((alike, first, second)))
    assert [result.config["seed"] for result in results.read(packed)] == [
        json.loads(x)["config"]["seed"] for x in (first, second)
    ]


def test_packed_runs_without_a_config_are_left_out_or_those_that_all_share(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / str(seed), seed=seed)
    alike, first, second = map(json.loads, results.pack(results.read(tmp_path)).splitlines())
    del second["config"]
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, (alike, first, second))))
    said = []
    assert len(results.read(tmp_path / "runs.jsonl", left_out=said.append)) + len(said) == 2
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, (first, second))))
    del first["config"]
    (tmp_path / "none.jsonl").write_text(json.dumps(first))
    with pytest.raises(results.ResultsError, match="must be a file that `steppe report pack` wrote"):
        results.read(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("outcome.json", {"status": True}, "outcome.json: status = True: must be "),
        ("outcome.json", {"status": "finished", "exit": "x"}, "outcome.json: exit = 'x': must be an integer"),
        (
            "retention.json",
            {"step": 4, "summary": {}, "details": {"fine_tune": {"paths": -1}}},
            "paths = -1: must be a list",
        ),
        ("curvature/4.json", {"step": -1, "summary": {}}, "step = -1: must be an integer >= 0"),
        ("curvature/4.json", {"step": 4, "summary": {"trace": "x"}}, "summary.trace = 'x': must be a number"),
    ],
)
def test_a_wrong_value_of_a_run_is_one_line_with_its_place(tmp_path, name, content, said):
    write_run(tmp_path / "good", seed=1)
    write_run(tmp_path / "bad", seed=2)
    (tmp_path / "bad" / "curvature").mkdir()
    (tmp_path / "bad" / name).write_text(json.dumps(content))
    lines = []
    assert "good" in [result.name for result in results.read(tmp_path, left_out=lines.append)]
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize(
    "content", ["[]", "3", "null", '{"a":', '"text"', "{}", '{"model": 3}', '{"optim": {"method": []}}', None]
)
@pytest.mark.parametrize("name", ["config.json", "outcome.json", "metrics.jsonl", "retention.json", "curvature/4.json"])
def test_files_of_another_shape_leave_their_run_out_in_one_line(tmp_path, name, content):
    """None: a directory in the file's place. Whatever it is, the other run is read, and at most one line said."""
    write_run(tmp_path / "good", seed=1)
    write_run(tmp_path / "bad", seed=2)
    path = tmp_path / "bad" / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if content is None else path.write_text(content)
    said = []
    found = {result.name: result for result in results.read(tmp_path, left_out=said.append)}
    assert found["good"].status == "finished"
    assert len(said) <= 1
    assert not any("\n" in line for line in said)
    assert all("left out" in line and str(tmp_path / "bad") in line for line in said)
    assert said or content == "{}" or name == "metrics.jsonl" or "bad" in found


@pytest.mark.parametrize(
    "content",
    ["[]", "3", '{"runs": ["a"]}', '{"config": "x", "base": {}, "runs": {"a": {}}, "resolved": {}}',
     '{"config": "x", "base": {}, "runs": {"../a": {}}, "resolved": {"../a": {}}}'],
)  # fmt: skip
def test_a_sweep_of_another_shape_is_one_line(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(results.ResultsError, match=r"^[^\n]*sweep\.json[^\n]*$"):
        results.read(tmp_path)


def test_a_run_given_twice_is_read_once(tmp_path):
    runs = {name: (overrides, 2.0) for name, overrides in (report_runs.plan("sam", rho) for rho in (0.01, 0.02))}
    report_runs.write_sweep(tmp_path, runs)
    other, one = sorted((tmp_path / "runs").iterdir())
    found = results.read([str(one), str(tmp_path / "runs" / "*"), f"{one}/../{one.name}"])
    assert [result.directory.resolve() for result in found] == [one, other]


def test_runs_of_a_prepared_directory_that_have_not_begun_differ_in_nothing_that_it_knows(tmp_path):
    """Those that have write the text that it was prepared from into their config; the sweep's plan does not know it."""
    begun, later = (report_runs.plan("adamw", seed=seed, data__directory="corpora") for seed in (0, 1))
    report_runs.write_sweep(tmp_path, {begun[0]: (begun[1], 2.5), later[0]: (later[1], None)})
    path = tmp_path / "runs" / begun[0] / "config.json"
    config = json.loads(path.read_text())
    config["data"]["task"] = "jsonl:x.jsonl"
    path.write_text(json.dumps(config))
    found = results.read(tmp_path)
    assert [result.varied for result in found] == [{"seed": 0}, {"seed": 1}]
    assert {result.config["data.task"] for result in found} == {"jsonl:x.jsonl"}
