"""Signals, sent to a real process."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from helpers import processes

CODE = """
import time
from steppe.lm.run.signals import StopSignals
with StopSignals() as stop:
    print("ready", stop.requested(), flush=True)
    while not stop.requested():
        time.sleep(0.01)
    print("asked", stop.requested(), flush=True)
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


TWO = """
import sys, time
import jax
index = int(sys.argv[1])
jax.distributed.initialize(sys.argv[2], 2, index, heartbeat_timeout_seconds=10)
from jax.experimental import multihost_utils
from steppe.lm.run.signals import StopSignals
multihost_utils.sync_global_devices("both")
with StopSignals() as stop:
    print("ready", stop.requested(), flush=True)
    if index == 0:
        multihost_utils.sync_global_devices("which the other never joins")
    time.sleep(600)
"""


def test_two_signals_end_a_process_that_hangs_in_an_exchange_and_then_its_peer():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = f"localhost:{free.getsockname()[1]}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(index), meet], env=processes.environment(1), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        for process in both:
            assert "ready False\n" in iter(process.stdout.readline, "")  # after lines of gloo's
        time.sleep(1)  # process 0 hangs by now
        both[0].send_signal(signal.SIGTERM)
        both[0].send_signal(signal.SIGTERM)  # so close together they are one
        time.sleep(2)
        assert both[0].poll() is None
        both[0].send_signal(signal.SIGTERM)
        assert both[0].wait(timeout=5) == 128 + signal.SIGTERM
        assert "a second signal stops at once" in both[0].stderr.read()
        assert both[1].wait(timeout=60) != 0
    finally:
        for process in both:
            process.kill()
