"""Signals that ask a run to stop: the first lets it finish its step and save; the second ends it at once."""

import ctypes
import os
import signal
import threading
import time

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TOGETHER = 1.0  # seconds within which several signals count as one, because launchers repeat theirs


class StopSignals:
    """Catches SIGTERM and SIGINT while in use.

    With several processes, jax's preemption service passes a signal to all, and all stop after the same step. A second
    signal ends a process at once, even one that hangs in an exchange; the others end when they miss its heartbeat.
    """

    def __init__(self):
        self._asked = self._agreed = False
        self._calls = 0
        self._before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            if jax.process_count() > 1:
                self._pass_on()
            else:
                self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def _pass_on(self) -> None:
        """Starts a thread that receives this process's signals and passes the first to jax; for several processes."""
        libc = ctypes.CDLL(None)
        libc.signal.restype = ctypes.c_void_p
        jaxs = libc.signal(signal.SIGTERM, signal.SIG_IGN)  # the handler that jax installed without Python
        tell = ctypes.CFUNCTYPE(None, ctypes.c_int)(jaxs)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # so that Python's C handler writes the number to the wakeup fd
        heard, end = os.pipe()
        os.set_blocking(end, False)
        signal.set_wakeup_fd(end, warn_on_full_buffer=False)

        def listen():
            first = None
            while True:
                number = os.read(heard, 1)[0]
                if number not in SIGNALS:
                    continue
                if first is None:
                    first = time.monotonic()
                    os.write(2, b"stopping after this step; a second signal stops at once\n")
                    tell(signal.SIGTERM)
                elif time.monotonic() > first + TOGETHER:
                    os._exit(128 + number)

        threading.Thread(target=listen, daemon=True).start()

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        self._asked = True
        for known in self._before:
            signal.signal(known, signal.SIG_DFL)
        os.write(2, b"stopping after this step; a second signal stops at once\n")

    def requested(self) -> bool:
        """Whether to stop. All processes get the same answer and must ask at the same places, after every step."""
        if jax.process_count() == 1:
            return self._asked
        # a counter, because the service needs numbers that only grow and a rollback decreases the step
        self._calls += 1
        if not self._agreed and multihost_utils.reached_preemption_sync_point(self._calls):
            self._agreed = True
        return self._agreed
