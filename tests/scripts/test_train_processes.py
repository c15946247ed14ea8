"""Two real processes, over jax.distributed on this machine; every axis of the mesh: pytest -m exhaustive."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from helpers import lm_runs, processes

ROOT = pathlib.Path(__file__).parent.parent
# Devices of each process, and how many the tensor axis takes; fsdp takes two, data the rest.
LAYOUTS = pytest.mark.parametrize(
    ("devices", "tensor"), [(1, 1), pytest.param(4, 2, marks=pytest.mark.exhaustive)], ids=["fsdp", "every axis"]
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with a few hundred lines of real text."""
    place = tmp_path_factory.mktemp("corpus")
    source = pathlib.Path(os.__file__).read_text()
    (place / "train.txt").write_text(source[:20_000])
    (place / "val.txt").write_text(source[20_000:22_000])
    return place


def start(
    corpus,
    workdir,
    steps: int,
    devices: int,
    tensor: int,
    *arguments: str,
    method: str = "precond_functional_sam",
    batches: int = 0,
) -> subprocess.Popen:
    """scripts.train on `devices` simulated devices. batches: of an evaluation, of the whole text by default."""
    command = [
        *(sys.executable, "-P", "-m", "steppe.scripts.train", "--config=base", f"--workdir={workdir}", *arguments),
        *(f"--config.data.task=text:{corpus}/train.txt@all", f"--config.data.cache={corpus}/cache"),
        *(f"--config.data.held_out=('val=text:{corpus}/val.txt@all',)", "--config.data.sequence_length=16"),
        *(
            "--config.model.layers=1",
            "--config.model.width=16",
            "--config.model.heads=2",
            "--config.model.mlp_width=32",
        ),
        *(f"--config.optim.method={method}", "--config.optim.rho=0.05", "--config.mesh.data=-1"),
        *("--config.mesh.fsdp=2", f"--config.mesh.tensor={tensor}", "--config.evaluate.batch_size=16"),
        *(
            f"--config.train.duration={steps} steps",
            "--config.evaluate.every=100%",
            f"--config.evaluate.batches={batches}",
        ),
        *("--config.average.weights=('ema', 'lawa')", "--config.average.horizon=4 steps"),
        *("--config.average.snapshots=2", "--config.log.every=1"),
        *("--config.checkpoint.every=5 steps", "--config.sample.tokens=0"),
    ]
    return subprocess.Popen(
        command, cwd=ROOT, env=processes.environment(devices), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def pair(corpus, workdir, steps: int, devices: int, tensor: int, *more: str, **chosen) -> list[subprocess.Popen]:
    """The same run as two processes of equally many devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = f"--coordinator=localhost:{free.getsockname()[1]}"
    return [
        start(
            corpus,
            workdir,
            steps,
            devices,
            tensor,
            meet,
            "--num_processes=2",
            f"--process_id={index}",
            "--heartbeat=10",
            *more,
            **chosen,
        )
        for index in range(2)
    ]


@LAYOUTS
def test_two_processes_equal_one_of_as_many_devices(corpus, tmp_path, devices, tensor):
    """The same losses within 1e-5 (order of sums); only process 0 writes."""
    one = start(corpus, tmp_path / "one", 5, 2 * devices, tensor)
    printed = one.communicate(timeout=240)[0]
    assert one.returncode == 0, printed[-3000:]
    both = pair(corpus, tmp_path / "two", 5, devices, tensor)
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    np.testing.assert_allclose(lm_runs.losses(tmp_path / "two"), lm_runs.losses(tmp_path / "one"), atol=1e-5)
    for name in ("perturbed_loss", "cosine", "gradient_norm"):  # of both passes
        values = [[record[name] for record in lm_runs.records(tmp_path / run, "train")] for run in ("one", "two")]
        np.testing.assert_allclose(*values, atol=1e-4)
    ends = [[record["loss"] for record in lm_runs.records(tmp_path / run, "average")] for run in ("one", "two")]
    assert len(ends[0]) == 4  # of both averages, at the start and at the end
    np.testing.assert_allclose(*ends, rtol=1e-5)
    assert "step 5/5" in said[0]
    assert "step 5/5" not in said[1]


@pytest.mark.exhaustive  # three pairs of processes
def test_a_method_from_a_file_runs_in_two_processes_and_resumes(corpus, tmp_path):
    """Each process reads the file. Losses are those of one process, also across a resume; changed code is refused."""
    file = tmp_path / "mine.py"
    file.write_text((ROOT.parent / "optim/outside/examples/half_sign.py").read_text())
    method = f"{file}:half_sign"
    one = start(corpus, tmp_path / "one", 10, 2, 1, method=method)
    printed = one.communicate(timeout=240)[0]
    assert one.returncode == 0, printed[-3000:]
    for until in ("--until=5", "--until=10"):
        both = pair(corpus, tmp_path / "two", 10, 1, 1, until, method=method)
        said = [process.communicate(timeout=240)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
    assert "resuming" in said[0]
    np.testing.assert_allclose(lm_runs.losses(tmp_path / "two"), lm_runs.losses(tmp_path / "one"), atol=1e-5)
    file.write_text(file.read_text() + "\n# another file\n")
    both = pair(corpus, tmp_path / "two", 10, 1, 1, method=method)
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [2, 2], said
    assert "half_sign" in said[0]


@pytest.mark.exhaustive  # two pairs of processes; of one process: lm/run/test_train.py
def test_a_signal_to_one_process_in_the_last_evaluation_stops_both_which_then_owe_it(corpus, tmp_path):
    (corpus / "val.txt").write_text(pathlib.Path(os.__file__).read_text()[20_000:])  # some hundred batches
    both = pair(corpus, tmp_path, 5, 1, 1, batches=1)
    for line in both[0].stdout:
        if line.startswith("step 5/5"):
            both[1].send_signal(signal.SIGTERM)
            break
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [75, 75], said
    assert "stopped after step 5; run the same command again" in said[0]
    assert [record["step"] for record in lm_runs.records(tmp_path, "evaluate")] == [0]
    both = pair(corpus, tmp_path, 5, 1, 1, batches=1)
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    first, last = lm_runs.records(tmp_path, "evaluate")
    assert (last["step"], first["tokens"]) == (5, 256)
    assert last["tokens"] > 50 * first["tokens"]


@pytest.mark.exhaustive  # half a minute of waiting; a peer that hangs: lm/run/test_signals.py
@LAYOUTS
def test_a_lost_process_ends_the_other_and_the_run_can_go_on(corpus, tmp_path, devices, tensor):
    both = pair(corpus, tmp_path, 100_000, devices, tensor)
    for line in both[0].stdout:
        if line.startswith("step 12/"):
            both[1].kill()
            break
    rest = both[0].stdout.read()
    assert both[0].wait(timeout=120) != 0
    assert "another task died" in rest
    both[1].communicate()
    assert lm_runs.records(tmp_path, "checkpoint")
    again = start(corpus, tmp_path, 100_000, 2 * devices, tensor)  # the checkpoint is sound: one process continues
    for line in again.stdout:
        if line.startswith("resuming"):
            break
    else:
        pytest.fail("did not continue")
    again.kill()
    again.communicate()
