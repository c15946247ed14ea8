"""Workers: run after run in one process, each bit for bit as in one of its own; one that dies is replaced."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import lm_runs, processes, sweep_runs
from steppe.lm.keep import exits
from steppe.scripts.sweep.worker import Worker

ENVIRONMENT = {**processes.environment(), "JAX_COMPILATION_CACHE_DIR": "", "JAX_LOG_COMPILES": "1"}
SHORT = ["--config.train.duration=30 steps"]
RUNS = {
    "sam": [*SHORT, "--config.optim.method=functional_sam", "--config.optim.rho=0.05"],
    "seed": [*SHORT, "--config.optim.method=functional_sam", "--config.optim.rho=0.02", "--config.seed=3"],
    "rate": [*SHORT, "--config.optim.peak_learning_rate=0.02"],
    "same": [*SHORT, "--config.optim.method=functional_sam", "--config.optim.rho=0.05"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return sweep_runs.write_config(tmp_path_factory.mktemp("text"))


@pytest.fixture
def worker():
    made = Worker(sorted(os.sched_getaffinity(0)), ENVIRONMENT)
    yield made
    if made.alive():
        made.signal(signal.SIGKILL)
    made.close()


def wait(worker, seconds=120):
    until = time.monotonic() + seconds
    while (found := worker.poll()) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


def numbers(workdir):
    """Everything that the steps and evaluations recorded, but for what time it took."""
    timed = {"tokens_per_second", "seconds", "data_wait", "stall", "mfu", "flops_per_second"}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] in ("train", "evaluate")]
    return [{key: value for key, value in line.items() if key not in timed} for line in kept]


def test_runs_of_a_worker_are_those_of_a_process_each(config, worker, tmp_path):
    for name, flags in RUNS.items():
        argv = [f"--config={config}", *flags]
        worker.start([*argv, f"--workdir={tmp_path / name}"], tmp_path / f"{name}.log")
        status, cpu_seconds = wait(worker)
        assert status == exits.FINISHED, (tmp_path / f"{name}.log").read_text()
        assert cpu_seconds > 0
    line = [sys.executable, "-P", "-m", "steppe.scripts.train", f"--config={config}", *RUNS["seed"]]
    subprocess.run([*line, f"--workdir={tmp_path / 'alone'}"], env=ENVIRONMENT, check=True)
    assert numbers(tmp_path / "seed") == numbers(tmp_path / "alone")
    assert numbers(tmp_path / "same") == numbers(tmp_path / "sam")
    compiled = {name for name in RUNS if "XLA compilation of jit(step)" in (tmp_path / f"{name}.log").read_text()}
    assert compiled == {"sam", "rate"}, "another's programs served"
    assert "step 30/30" in (tmp_path / "seed.log").read_text()


def test_what_is_refused_stopped_or_fails_leaves_the_worker_to_the_next(config, worker, tmp_path):
    log = tmp_path / "log"
    argv = [f"--config={config}", *SHORT]
    worker.start([*argv, "--config.optim.rho=-1", f"--workdir={tmp_path / 'a'}"], log)
    assert wait(worker)[0] == 2
    assert "config.optim.rho" in log.read_text()
    worker.start([f"--config={config}", "--config.train.duration=100000 steps", f"--workdir={tmp_path / 'b'}"], log)
    while not (tmp_path / "b" / "checkpoints" / "10").exists():
        time.sleep(0.02)
    worker.signal(signal.SIGTERM)
    assert wait(worker)[0] == exits.STOPPED
    (tmp_path / "broken.py").write_text("def get_config(): raise ZeroDivisionError('broken')")
    worker.start([f"--config={tmp_path / 'broken.py'}", f"--workdir={tmp_path / 'c'}"], log)
    assert wait(worker)[0] in (1, 2)
    assert "broken" in log.read_text()
    worker.start([*argv, f"--workdir={tmp_path / 'd'}"], log)
    assert wait(worker)[0] == exits.FINISHED
    assert len(lm_runs.losses(tmp_path / "d")) == 30


@pytest.mark.exhaustive  # a killed sweep and run: test_sweep.py
def test_a_worker_that_dies_is_replaced_and_its_run_goes_on(config, tmp_path):
    """The second run's worker is killed; the sweep says so, and the same command goes on with it and the rest."""
    flags = ("--jobs=1", "--order=listed", "--grid", "seed=0,1,2")
    sweep = sweep_runs.start(config, tmp_path / "out", *flags)
    second = tmp_path / "out" / "runs" / "seed=1"
    while not (second / "checkpoints" / "20").exists():
        assert sweep.poll() is None
        time.sleep(0.02)
    holder = int((second / "lock").read_text().split()[1])
    os.kill(holder, signal.SIGKILL)
    printed, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == exits.STOPPED
    assert "exit status -9" in printed
    assert "2 finished, 1 unfinished" in printed
    status, printed = sweep_runs.run(config, tmp_path / "out", *flags)
    assert (status, "3 finished" in printed) == (0, True)
    assert len(lm_runs.losses(second)) == 90
