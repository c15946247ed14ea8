"""TensorBoard and wandb hold what metrics.jsonl does, through kills at any moment and rollbacks."""

import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from helpers import lm_runs, meters, processes
from steppe.lm.track.lines import records
from steppe.lm.track.sinks import Rows
from steppe.lm.track.tracker import Tracker

TESTS = Path(meters.__file__).parents[1]


def start(workdir, pause, *roll_back):
    command = [sys.executable, meters.__file__, str(workdir), str(pause), *map(str, roll_back)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def kill(child):
    """At once, with the process that wandb runs for it."""
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def lines(workdir):
    path = workdir / meters.METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_and_compare(place, kills, seed=0):
    """Kills runs at random moments, their starts and rollbacks among them; compares after each next start."""
    draw, workdir = random.Random(seed), place / "0"
    for number in range(kills):
        if meters.saved(workdir)["step"] > meters.STEPS - 100:  # near its end: it goes there, and another begins
            meters.train(workdir)
            assert meters.differences(workdir) == []
            workdir = place / str(number)
        workdir.mkdir(exist_ok=True)
        roll_back = () if number % 3 else (meters.saved(workdir)["step"] + draw.randrange(8, 24),)
        child, before = start(workdir, 0.01, *roll_back), lines(workdir)
        if number % 4 == 0:  # while it starts
            time.sleep(draw.uniform(0.5, 5))
        else:
            wanted, deadline = before + draw.randrange(3, 60), time.monotonic() + 60
            while lines(workdir) < wanted and time.monotonic() < deadline:
                time.sleep(0.005)
        assert child.poll() is None, "it was to be killed before its end"
        kill(child)
        meters.track(workdir).close("stopped")
        assert meters.differences(workdir) == [], f"kill {number}"
    meters.train(workdir)
    assert meters.differences(workdir) == []
    assert list(meters.recorded(workdir)[0]) == list(range(1, meters.STEPS + 1))
    return workdir


@pytest.mark.exhaustive  # a run in a process of its own; without one: the tests below
def test_after_a_kill_the_meters_are_the_record(tmp_path):
    (tmp_path / "0").mkdir()
    meters.train(tmp_path / "0", until=40)
    kill_and_compare(tmp_path, 2, seed=1)


@pytest.mark.exhaustive
def test_after_each_of_forty_kills_the_meters_are_the_record(tmp_path):
    from tensorflow.compat.v1.train import summary_iterator  # as TensorBoard itself reads

    workdir = kill_and_compare(tmp_path, 40)
    rows = meters.tensorboard_rows(workdir)
    assert meters.tensorboard_rows(workdir, lambda path: summary_iterator(str(path))) == rows


def test_a_kill_before_the_first_checkpoint_and_rollbacks_leave_each_step_once(tmp_path):
    tracker = meters.track(tmp_path)
    for step in range(1, 258):
        tracker.step(step, {"loss": 1.0 / step})
    tracker.close("failed")  # it starts over
    meters.train(tmp_path, roll_back=(20, 54, 301))
    assert meters.differences(tmp_path) == []
    rows = meters.tensorboard_rows(tmp_path)["train/loss"], meters.wandb_rows(tmp_path)["train/loss"]
    assert [len(each) for each in rows] == [meters.STEPS] * 2
    assert meters.recorded(tmp_path)[0][400] == pytest.approx(3 + 3 / 400)  # rolled back three times
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.exhaustive
def test_a_real_run_killed_before_its_first_checkpoint_has_each_step_once(tmp_path):
    folder, _ = lm_runs.write_text(tmp_path)
    options = {
        "model.size": "0.01m", "data.task": f"text:{folder}/train.txt@all", "data.cache": tmp_path / "cache",
        "data.held_out": f"('books=text:{folder}/val.txt@all',)", "data.sequence_length": 16, "train.batch_size": 8,
        "train.duration": "400 steps", "optim.method": "adamw", "optim.rho": None, "evaluate.every": "50 steps",
        "evaluate.batches": 1, "sample.tokens": 0, "checkpoint.every": "100%", "log.tensorboard": True,
        "log.wandb": "offline",
    }  # fmt: skip
    workdir = tmp_path / "run"
    command = [sys.executable, "-P", "-m", "steppe.scripts.train", "--config=quickstart", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in options.items()]
    first = subprocess.Popen(command, env=processes.environment(), start_new_session=True)
    while lines(workdir) < 250:
        assert first.poll() is None, "it was to be killed before its end"
        time.sleep(0.005)
    kill(first)
    subprocess.run(command, env=processes.environment(), check=True)
    assert meters.differences(workdir) == []
    rows = meters.tensorboard_rows(workdir)["train/loss"], meters.wandb_rows(workdir)["train/loss"]
    assert [list(each) for each in rows] == [list(range(1, 401))] * 2


def test_what_was_synchronised_is_left_alone(tmp_path):
    meters.train(tmp_path, until=3)
    (place,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = place.glob("*.wandb")
    Path(f"{file}.synced").touch()
    mine = tmp_path / "tensorboard" / "notes.txt"
    mine.write_text("of the user")
    time.sleep(1.1)  # wandb names directories by the second
    meters.train(tmp_path, until=5)
    assert file.exists()
    assert mine.read_text() == "of the user"


class Online:
    """In place of wandb's server, which no test reaches: the rows it has of each run. A kill loses those under way."""

    def __init__(self):
        self.rows, self.under_way = {}, []

    def init(self, *, id, **_):
        self.arrive(len(self.under_way))
        kept = self.rows.setdefault(id, [])
        config = types.SimpleNamespace(update=lambda *_, **__: None)
        return types.SimpleNamespace(
            step=len(kept), config=config, define_metric=lambda *_, **__: None,
            log=lambda row: self.under_way.append((id, row)), finish=lambda **_: self.arrive(len(self.under_way)),
        )  # fmt: skip

    def arrive(self, count):
        for id, row in self.under_way[:count]:
            self.rows[id].append(row)
        self.under_way = []


@pytest.mark.parametrize("seed", range(5))
def test_rows_online_are_those_of_the_record(tmp_path, monkeypatch, seed):
    """Whatever of them arrives before a kill, and wherever the run is stopped or goes back."""
    import wandb

    draw, server = random.Random(seed), Online()
    monkeypatch.setattr(wandb, "init", server.init)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    monkeypatch.setattr(meters, "STEPS", 120)
    made = meters.config()
    made.log.wandb = "online"
    monkeypatch.setattr(meters, "config", lambda: made)
    for _ in range(6):
        step = meters.saved(tmp_path)["step"]
        kind, until = draw.choice(("killed", "stopped", "rolled back")), step + draw.randrange(1, 40)
        if kind == "killed":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Tracker, "close", lambda *_: None)
                meters.train(tmp_path, until=until)
            server.arrive(draw.randrange(len(server.under_way) + 1))
        else:
            meters.train(tmp_path, until=until, roll_back=(until - 1,) if kind == "rolled back" else ())
    meters.train(tmp_path)
    rows, names = Rows(), ("train/loss", "held_out/books/loss", "goodput")
    made = [row for record in records(tmp_path / meters.METRICS) if (row := rows.of(record))]
    wanted = [(row.step, *map(row.values.get, names)) for row in made]
    found = server.rows[(tmp_path / "wandb_id").read_text().strip()]
    assert [(row["step"], *map(row.get, names)) for row in found] == wanted
