"""Every disturbance once: each run ends bit for bit as the undisturbed one."""

import os

import pytest

from exhaustive import chaos


@pytest.mark.exhaustive
@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system is mounted, to be filled")
def test_disturbed_runs_end_as_undisturbed_ones():
    assert chaos.disturb(runs=len(chaos.ALL), minutes=20, seed=0, flipped=100) == []
