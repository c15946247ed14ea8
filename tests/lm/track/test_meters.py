"""TensorBoard and wandb hold what metrics.jsonl does, through kills at any moment and rollbacks."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import meters

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
