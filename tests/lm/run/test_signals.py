"""Signals, sent to a real process."""

import signal
import subprocess
import sys

import pytest

CODE = """
import time
from steppe.lm.run.signals import StopSignals
with StopSignals() as stop:
    print("ready", stop.requested(), flush=True)
    while not stop.requested():
        time.sleep(0.01)
    print("asked", stop.asked(), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGINT)])
def test_the_first_signal_asks_and_the_second_ends(first, second):
    process = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready False\n"
        process.send_signal(first)
        assert process.stdout.readline() == "asked True\n"
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(timeout=5) == -second
        assert process.stderr.read() == "stopping after this step; a second signal stops at once\n"
    finally:
        process.kill()
