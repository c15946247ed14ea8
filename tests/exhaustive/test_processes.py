"""Every layout of processes and CPU devices gives one device's steps and evaluations, over every axis, every time.

Other work on the machine makes it harder.
"""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from helpers import lm_runs, processes

RUNS, STEPS = 30, 12
HERE = pathlib.Path(__file__).parent
LAYOUTS = [
    (1, 4, (1, 2, 2)),
    (2, 2, (1, 2, 2)),
    (4, 1, (1, 2, 2)),
    (2, 4, (2, 2, 2)),
    (4, 1, (2, 2, 1)),
    (4, 1, (4, 1, 1)),
]


def run(folder, processes_count: int, devices: int, mesh: tuple[int, int, int], runs: int) -> list[int]:
    """The exit statuses of the processes of several runs."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = f"localhost:{free.getsockname()[1]}"
    keys = {
        "model.size": "0.01m", "train.duration": f"{STEPS} steps", "optim.method": "functional_sam",
        "optim.rho": "0.02",
        "data.cache": os.environ.get("STEPPE_CACHE", str(folder.parent / "cache")), "evaluate.every": "100%",
        "evaluate.batches": "0", "evaluate.batch_size": "64", "sample.tokens": "0", "checkpoint.every": "100%",
        **{f"mesh.{axis}": str(size) for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)},
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, HERE / "many_runs.py", str(index), str(processes_count), meet, str(runs), str(folder)]
            + [f"{key}={value}" for key, value in keys.items()],
            env=processes.environment(devices), stdout=subprocess.DEVNULL,
        )
        for index in range(processes_count)
    ]  # fmt: skip
    try:
        return [each.wait(timeout=3600) for each in started]
    finally:
        for each in started:
            each.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of one run on one device."""
    folder = tmp_path_factory.mktemp("alone") / "runs"
    assert run(folder, 1, 1, (1, 1, 1), 1) == [0]
    return folder / "0"


@pytest.mark.exhaustive
@pytest.mark.parametrize(("count", "devices", "mesh"), LAYOUTS)
def test_every_run_is_that_of_one_device(alone, tmp_path, count, devices, mesh):
    assert run(tmp_path / "runs", count, devices, mesh, RUNS) == [0] * count
    for number in range(RUNS):
        for name in ("loss", "perturbed_loss", "cosine", "gradient_norm"):
            for kind in ("train", "evaluate"):
                one, other = (
                    [record[name] for record in lm_runs.records(place, kind) if name in record]
                    for place in (alone, tmp_path / "runs" / str(number))
                )
                np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-3, err_msg=f"run {number}, {kind} {name}")
