"""Every disturbance once: each run ends bit for bit as the undisturbed one."""

import os
import pathlib
import subprocess
import sys

import pytest

from exhaustive import chaos


@pytest.mark.exhaustive
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted, to be filled")
def test_disturbed_runs_end_as_undisturbed_ones():
    assert chaos.disturb(runs=len(chaos.ALL), minutes=20, seed=0, flipped=100) == []


@pytest.mark.exhaustive
def test_one_disturbance_by_hand():
    line = [sys.executable, "-m", "exhaustive.chaos", "--runs=1", "--only=SIGKILL in a step"]
    done = subprocess.run(line, cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert "| 1 | 1 |" in done.stdout
