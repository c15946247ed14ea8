"""Signals that ask a run to stop: the first lets it finish its step and save, the second ends it at once."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Catches SIGTERM and SIGINT while in use.

    Several processes: jax's preemption service catches SIGTERM, of whichever process, and lets all of them stop after
    the same step; SIGINT is passed on as SIGTERM. A second signal then ends a process once all have agreed to stop.
    """

    def __init__(self):
        self._asked = self._agreed = False
        self._calls = 0
        self._before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # with several processes a handler of ours for SIGTERM would replace jax's
            for number in SIGNALS if jax.process_count() == 1 else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        self._asked = True
        for known in self._before:
            signal.signal(known, signal.SIG_DFL)
        os.write(2, b"stopping after this step; a second signal stops at once\n")
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self) -> bool:
        """Whether the only process was asked to stop; with several, which must agree after a step, False."""
        return self._asked and jax.process_count() == 1

    def requested(self) -> bool:
        """Whether to stop after this step; every process gives the same answer and must ask after every step."""
        if jax.process_count() == 1:
            return self._asked
        # a number that only grows, which the step does not: a rollback takes it back
        self._calls += 1
        if not self._agreed and multihost_utils.reached_preemption_sync_point(self._calls):
            self._agreed = True
            if threading.current_thread() is threading.main_thread():
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
        return self._agreed
