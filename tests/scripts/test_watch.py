"""What watch says of runs that others are at: ended, under way, silent, not begun."""

import json
import os
import time

from helpers import report_runs
from steppe.scripts import watch


def sweep(folder):
    """Four runs: finished, diverged, under way after step 500 of 1000, not begun."""
    losses = {"finished": 2.0, "diverged": "diverged", "running": 2.5, "waiting": None}
    plans = {name: report_runs.plan("sam", 0.01, seed=seed)[1] for seed, name in enumerate(losses)}
    report_runs.write_sweep(folder, {name: (plans[name], loss) for name, loss in losses.items()})
    run = folder / "runs" / "running"
    (run / "outcome.json").unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line | {"tokens_per_second": 4096.0, "tokens_per_step": 1024} for line in lines if line["step"] <= 500]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return run / "metrics.jsonl"


def test_runs_are_shown_as_they_are(tmp_path, capsys):
    path = sweep(tmp_path)
    rows = {row.name: row for row in watch.rows(str(tmp_path))}
    assert {name: row.state for name, row in rows.items()} == {name: name for name in rows}
    running = rows["running"]
    assert (running.step, running.rate, running.left) == ("500/1,000", "4,096", "2:05")  # 500 steps of 1,024 tokens
    last = [json.loads(line) for line in path.read_text().splitlines()]
    losses = {kind: next(r["loss"] for r in reversed(last) if r["kind"] == kind) for kind in ("train", "evaluate")}
    assert (running.loss, running.held_out) == (f"{losses['train']:.4f}", f"{losses['evaluate']:.4f}")
    os.utime(path, (time.time() - 600,) * 2)
    assert next(row.state for row in watch.rows(str(tmp_path)) if row.name == "running").startswith("silent for 10:0")
    assert watch.main([str(tmp_path), "--once"]) == 0
    assert "1 silent, 1 waiting, 2 ended" in capsys.readouterr().out


def test_watching_ends_when_all_have_ended(tmp_path, capsys):
    sweep(tmp_path)
    assert watch.main([str(tmp_path / "runs" / "finished"), "--every=0.01"]) == 0
    assert "1 ended" in capsys.readouterr().out


def test_a_damaged_run_is_said_and_does_not_keep_watch_from_ending(tmp_path, capsys):
    sweep(tmp_path)
    for name in ("waiting", "running"):
        (tmp_path / "runs" / name).mkdir(exist_ok=True)
        (tmp_path / "runs" / name / "outcome.json").write_text("{")
    assert watch.main([str(tmp_path), "--every=0.01"]) == 0
    said = capsys.readouterr().out.replace("\n", "")  # long names go on in the next line
    assert said.count("left out") == 2
    assert "outcome.json" in said
