"""What a run leaves behind and shows: metrics.jsonl across kills and resumes, the terminal, wandb and its failures."""

import importlib
import io
import json
import math
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from steppe.configs import base
from steppe.lm.track import lines as metrics_file
from steppe.lm.track.lines import METRICS
from steppe.lm.track.tracker import Tracker


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def config():
    made = base.get_config()
    made.log.every = 5
    return made


def _track(workdir, config, **keywords):
    settings = dict(total_steps=20, tokens_per_step=1000, clock=Clock(), stream=io.StringIO())
    return Tracker(workdir, config, **{**settings, **keywords})


def _steps(tracker, first, last):
    for step in range(first, last + 1):
        tracker.step(step, {"loss": np.float32(1 / step), "perturbed_loss": np.float32(2 / step)})


def _lines(workdir):
    return [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]


def test_every_step_is_one_strict_json_line_of_exact_values(tmp_path, config):
    tracker = _track(tmp_path, config)
    tracker.run(0, {"parameters": {"total": 7}, "mesh": (1, 2), "nested": {"flops": np.float64(2.5)}})
    bad = {"nonfinite": 1.0, "gradient_norm": float("nan"), "epsilon_norm": np.float32("inf"), "n": 3}
    tracker.step(1, {"loss": np.float32(0.1), **bad})
    tracker.step(2, {"loss": np.float32(0.2), "nonfinite": 0.0, "perturbed_loss": float("nan")})
    tracker.evaluation(1, "books", {"loss": -math.inf})
    tracker.measurement("checkpoint", 1, {"path": "checkpoints/1"})
    lines = _lines(tmp_path)  # readable while the run is still open
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("run", 0), ("train", 1), ("train", 2), ("evaluate", 1), ("checkpoint", 1),
    ]  # fmt: skip
    assert lines[0]["nested"] == {"flops": 2.5}
    assert lines[0]["mesh"] == [1, 2]
    assert np.float32(lines[1]["loss"]) == np.float32(0.1)
    assert (lines[1]["gradient_norm"], lines[1]["epsilon_norm"], lines[1]["n"]) == (None, "inf", 3)
    assert lines[1]["tokens"] == 1000
    assert "perturbed_loss" not in lines[2]  # which a method without a second pass does not compute
    assert (lines[3]["name"], lines[3]["loss"]) == ("books", "-inf")
    train, others = metrics_file.read(tmp_path)
    assert train.step.tolist() == [1, 2]
    assert train.tokens.tolist() == [1000, 2000]
    assert train.loss.astype(np.float32).tolist() == [np.float32(0.1), np.float32(0.2)]
    assert np.isnan(train.perturbed_loss).all()
    assert train.apart.tolist() == [True, False]
    assert [record["kind"] for record in others] == ["run", "evaluate", "checkpoint"]
    assert others[1]["loss"] == -math.inf


@pytest.mark.parametrize("torn", [b"", b'{"kind": "train", "st', b"\0\0\0\0", b'{"kind": "train", "step": 1\n'])
@pytest.mark.parametrize("start", [6, 9])
def test_resume_leaves_neither_gap_nor_duplicate(tmp_path, config, torn, start):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    _steps(_track(whole, config), 1, 12)

    killed = _track(cut, config)
    _steps(killed, 1, 6)
    killed.evaluation(6, "books", {"loss": 1.0})
    _steps(killed, 7, 9)
    with open(cut / METRICS, "ab") as file:
        file.write(torn)

    stream = io.StringIO()
    resumed = _track(cut, config, start_step=start, stream=stream)
    _steps(resumed, start + 1, 12)
    train = [line for line in _lines(cut) if line["kind"] == "train"]
    assert [(line["step"], line["loss"]) for line in train] == [(l["step"], l["loss"]) for l in _lines(whole)]
    assert [line["step"] for line in _lines(cut) if line["kind"] == "evaluate"] == [6]
    assert ("dropped a torn last line" in stream.getvalue()) == bool(torn)


def test_a_fresh_start_empties_the_file_and_a_gap_is_reported(tmp_path, config):
    _steps(_track(tmp_path, config), 1, 4)
    _steps(_track(tmp_path, config), 1, 2)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2]
    stream = io.StringIO()
    _track(tmp_path, config, start_step=5, stream=stream)
    assert "3 of the 5 steps before this start are missing" in stream.getvalue()


def test_a_long_record_is_cut_from_its_end(tmp_path, config, monkeypatch):
    """Blocks smaller than the file, whatever they cut through; a damaged line before what is cut is not looked at."""
    monkeypatch.setattr(metrics_file, "_BLOCK", 300)
    for start in range(0, 41, 8):
        tracker = _track(tmp_path, config)
        _steps(tracker, 1, 40)
        tracker.evaluation(40, "books", {"loss": 1.0})
        before = (tmp_path / METRICS).read_bytes()
        assert metrics_file.rewind(tmp_path / METRICS, start or -1) == []
        kept = before.splitlines(keepends=True)
        assert (tmp_path / METRICS).read_bytes() == b"".join(kept[:start] if start < 40 else kept)


def test_a_measurement_between_steps_slows_no_step(tmp_path, config):
    clock = Clock()
    tracker = _track(tmp_path, config, clock=clock, total_steps=12)
    for step in range(1, 7):
        clock.now += 0.5
        tracker.step(step, {"loss": 2.0})
        if step == 4:
            clock.now += 100.0
            tracker.measurement("curvature", 4, {"all": {"logit_norm": 1.0}, "seconds": 100.0})
    lines = _lines(tmp_path)
    assert [line["all"] for line in lines if line["kind"] == "curvature"] == [{"logit_norm": 1.0}]
    assert [line["tokens_per_second"] for line in lines if line["kind"] == "train"][1:] == [2000.0] * 5


def test_plain_lines_when_not_a_terminal(tmp_path, config):
    stream, clock = io.StringIO(), Clock()
    tracker = _track(tmp_path, config, stream=stream, clock=clock, total_steps=12, flops_per_step=3e9)
    for step in range(1, 13):
        clock.now += 0.5
        tracker.step(step, {"loss": 2.0})
        if step == 5:
            tracker.evaluation(5, "books", {"loss": 2.5, "bits_per_byte": 3.6067})
            tracker.evaluation(5, "code", {"loss": 9.0})  # progress shows the first set
            clock.now += 1000.0  # time outside steps must not count as slow steps
            tracker.measurement("checkpoint", 5, {})
    tracker.close("finished")
    assert stream.getvalue().splitlines() == [
        "step 5/12  tokens 5.00k  loss 2.0000  2.00k tokens/s  6.00 GFLOP/s  ETA 0:04",
        "step 5  held-out books  loss 2.5000  bits_per_byte 3.6067",
        "step 5  held-out code  loss 9.0000",
        "step 10/12  tokens 10.0k  loss 2.0000  held-out 2.5000  2.00k tokens/s  6.00 GFLOP/s  ETA 3:43",
        "step 12/12  tokens 12.0k  loss 2.0000  held-out 2.5000  2.00k tokens/s  6.00 GFLOP/s  ETA 0:00",
        "finished",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_long_evaluation_says_how_far_it_is_and_the_time_left_counts_the_last(tmp_path, config, terminal):
    stream, clock = (Terminal if terminal else io.StringIO)(), Clock()
    tracker = _track(tmp_path, config, stream=stream, clock=clock, total_steps=10)
    tracker.expect({"held-out books": 98, "held-out code": 7})

    def evaluated(name, total, compiling=0.0):
        for batch in tracker.over(f"held-out {name}", iter(range(total)), total):
            clock.now += 6.0 + compiling * (batch == 0)

    evaluated("books", 2, compiling=100.0)
    evaluated("code", 1, compiling=100.0)  # of one batch nothing is known yet
    for step in range(1, 6):
        clock.now += 1.0
        tracker.step(step, {"loss": 2.0})
    assert terminal or "ETA 9:53" in stream.getvalue()  # 5 s of steps, 98 batches
    evaluated("code", 1)
    for step in range(6, 11):
        tracker.step(step, {"loss": 2.0})
    assert terminal or "ETA 10:30" in stream.getvalue()  # 105 batches
    before = len(stream.getvalue())
    evaluated("books", 100)
    tracker.close("finished")
    said = stream.getvalue()[before:]
    if terminal:  # drawn from time to time, and at the end
        assert "98%" in said
    else:
        assert "evaluating  held-out books, 100 batches  50%  left 5:00" in said
        assert said.count("evaluating") == 49  # one each 10 s at most


def test_mfu_where_the_peak_is_known(tmp_path, config):
    stream, clock = io.StringIO(), Clock()
    tracker = _track(tmp_path, config, stream=stream, clock=clock, flops_per_step=3e9, peak_flops=12e9)
    for step in range(1, 6):
        clock.now += 0.5
        tracker.step(step, {"loss": 2.0})
    assert "MFU 50.0%" in stream.getvalue()
    assert "FLOP/s" not in stream.getvalue()


def test_live_line_on_a_terminal(tmp_path, config):
    stream = Terminal()
    tracker = _track(tmp_path, config, stream=stream, total_steps=3)
    _steps(tracker, 1, 3)
    tracker.note("[a] note")
    tracker.close("finished")
    shown = stream.getvalue()
    assert "3/3" in shown
    assert "loss 0.3333" in shown
    assert "[a] note" in shown
    assert shown.endswith("finished\n")
    assert "\x1b[?25h" in shown  # the cursor is given back


def test_other_processes_write_nothing(tmp_path, config):
    config.log.wandb = "offline"
    stream = io.StringIO()
    tracker = _track(tmp_path / "run", config, primary=False, stream=stream)
    tracker.run(0, {})
    _steps(tracker, 1, 5)
    tracker.evaluation(5, "books", {"loss": 1.0})
    tracker.measurement("checkpoint", 5, {})
    tracker.note("hello")
    tracker.close("finished")
    assert stream.getvalue() == ""
    assert not (tmp_path / "run").exists()


def test_close_twice(tmp_path, config):
    stream = io.StringIO()
    tracker = _track(tmp_path, config, stream=stream)
    tracker.close("stopped")
    tracker.close("failed")
    assert stream.getvalue() == "stopped\n"


def test_a_missing_wandb_costs_one_line(tmp_path, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config.log.wandb = "online"
    stream = io.StringIO()
    tracker = _track(tmp_path, config, stream=stream)
    _steps(tracker, 1, 3)
    tracker.close("finished")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "wandb failed" in lines[0]
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]


def test_an_outage_in_mid_run_costs_one_line(tmp_path, config):
    wandb = importlib.import_module("wandb")
    config.log.wandb, config.log.tags = "offline", ("flat", "small")
    stream = io.StringIO()
    tracker = _track(tmp_path, config, stream=stream)
    _steps(tracker, 1, 2)
    run = wandb.run
    assert run.id == tracker.wandb_id
    assert (run.project, run.tags) == ("steppe", ("flat", "small"))
    assert run.summary["tokens"] == 2000
    assert run.config["optim"]["method"] == "adamw"
    assert (run.summary["train/loss"], run.summary["step"]) == (0.5, 2)
    run.finish()  # from here on every log call raises, as it does when wandb's own process is gone
    _steps(tracker, 3, 8)
    tracker.close("finished")
    assert stream.getvalue().count("wandb failed") == 1
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 9))

    again = _track(tmp_path, config, start_step=8)  # the same workdir continues the same wandb run
    assert again.wandb_id == tracker.wandb_id
    assert wandb.run.id == tracker.wandb_id
    again.close("finished")
    elsewhere = _track(tmp_path / "copy", config, wandb_id="fromckpt")  # and so does the id of a checkpoint
    assert wandb.run.id == "fromckpt"
    elsewhere.close("finished")


def test_tracking_imports_nothing_heavy():
    code = "import sys, steppe.lm.track.tracker; print([m for m in ('jax', 'wandb', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_damaged_line_is_dropped_and_said(tmp_path, config):
    _steps(_track(tmp_path, config), 1, 6)
    lines = (tmp_path / METRICS).read_bytes().split(b"\n")
    lines[2] = lines[2][:20] + b"\0" + lines[2][21:]
    (tmp_path / METRICS).write_bytes(b"\n".join(lines))
    stream = io.StringIO()
    _steps(_track(tmp_path, config, start_step=5, stream=stream), 6, 7)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 4, 5, 6, 7]
    assert "dropped 1 damaged lines" in stream.getvalue()
    assert "1 of the 5 steps before this start are missing" in stream.getvalue()


@pytest.mark.parametrize("harm", ["removed", "replaced"])
def test_a_workdir_that_vanishes_is_an_error_and_not_silence(tmp_path, config, harm):
    tracker = _track(tmp_path / "run", config)
    _steps(tracker, 1, 2)
    shutil.rmtree(tmp_path / "run")
    if harm == "replaced":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / METRICS).write_text("")
    with pytest.raises(OSError, match="was removed or replaced during the run"):
        tracker.step(3, {"loss": 1.0})
    tracker.close("failed")


def test_a_rollback_forgets_and_goes_on(tmp_path, config):
    tracker = _track(tmp_path, config)
    tracker.run(0, {})
    _steps(tracker, 1, 8)
    tracker.roll_back(5)
    tracker.event("rollback", 6, {"to": 5})
    _steps(tracker, 6, 7)
    assert [(line["kind"], line["step"]) for line in _lines(tmp_path)] == [
        ("run", 0), *(("train", step) for step in range(1, 6)), ("rollback", 6), ("train", 6), ("train", 7),
    ]  # fmt: skip
    tracker.roll_back(0)
    assert [line["kind"] for line in _lines(tmp_path)] == ["run"]


def test_a_change_belongs_to_its_restart(tmp_path, config):
    _steps(_track(tmp_path, config), 1, 5)
    for _ in range(2):  # the same restart twice, as after a kill before its first checkpoint
        tracker = _track(tmp_path, config, start_step=5)
        tracker.event("change", 5, {"key": "seed"})
        _steps(tracker, 6, 9)
    _track(tmp_path, config, start_step=8)
    kinds = [(line["kind"], line["step"]) for line in _lines(tmp_path) if line["kind"] == "change"]
    assert kinds == [("change", 5)]


def test_mfu_and_its_axes_go_everywhere(tmp_path, config):
    """3 GFLOP a step at the fake clock's rate; TensorBoard and metrics.jsonl have the same numbers."""
    config.log.tensorboard = True
    now = iter(np.arange(0.0, 1000.0, 0.5))
    tracker = _track(tmp_path, config, clock=lambda: float(next(now)), flops_per_step=3e9, peak_flops=12e9)
    _steps(tracker, 1, 5)
    tracker.evaluation(5, "books", {"loss": 1.5})
    tracker.close("finished")
    train = [line for line in _lines(tmp_path) if line["kind"] == "train"]
    assert train[-1]["mfu"] == pytest.approx(3e9 * 2 / 12e9)
    found = events(tmp_path / "tensorboard")
    assert found["train/loss"] == [(line["step"], pytest.approx(line["loss"])) for line in train]
    assert found["mfu"][-1] == (5, pytest.approx(train[-1]["mfu"]))
    assert found["held_out/books/loss"] == [(5, 1.5)]
    assert [step for step, _ in found["tokens"]] == [1, 2, 3, 4, 5]


def events(folder):
    """{name: [(step, value)]} of TensorBoard's event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.iterdir()):
        content, position = path.read_bytes(), 0
        while position < len(content):
            (size,) = struct.unpack_from("<Q", content, position)
            event = Event.FromString(content[position + 12 : position + 12 + size])
            position += 16 + size
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_latest_reads_from_the_end(tmp_path, config, monkeypatch):
    tracker = _track(tmp_path, config)
    tracker.run(0, {"steps": 40})
    _steps(tracker, 1, 40)
    tracker.evaluation(40, "books", {"loss": 1.5})
    for size in (1 << 20, 100, 7):
        monkeypatch.setattr(metrics_file, "_BLOCK", size)
        found = metrics_file.latest(tmp_path)
        assert (found["run"]["steps"], found["train"]["step"], found["evaluate"]["loss"]) == (40, 40, 1.5)
    assert metrics_file.latest(tmp_path / "nothing") == {}
