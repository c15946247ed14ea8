"""A process that executes runs of a sweep one after another, so that they share imports, programs and token counts.

Each run is `steppe train` with its own arguments, log and signals. Its result is bit for bit that of a
process of its own. The sweep starts one worker per slot of cores and replaces a worker that died.
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

RETIRE = 6 << 30  # bytes of memory at which a worker ends after its run, because leaks cannot be told from caches
KEEP = 4  # programs cached by a worker


class Worker:
    """The sweep's handle of a worker: starts it on a slot of cores, gives it runs, and learns how they ended."""

    def __init__(self, slot: Sequence[int], environment: dict[str, str] | None = None):
        self.slot = list(slot)
        # the child inherits this thread's CPU mask, and XLA starts as many threads as the mask has cores
        mask = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
        try:
            if mask:
                os.sched_setaffinity(0, self.slot)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __spec__.name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=environment, start_new_session=True,
            )  # fmt: skip
        finally:
            if mask:
                os.sched_setaffinity(0, mask)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._heard, self._spent, self._retired = b"", 0.0, False

    def start(self, argv: Sequence[str], log: Path) -> None:
        """Makes it run `steppe train` with these arguments; output is appended to the log."""
        line = json.dumps({"argv": list(argv), "log": os.path.abspath(log)}) + "\n"
        with contextlib.suppress(BrokenPipeError):  # the worker has died: poll reports it
            self._input.write(line.encode())
            self._input.flush()

    def poll(self) -> tuple[int, float] | None:
        """(exit status, CPU seconds) of its run; None while that goes on. If the worker died, its own exit status."""
        self._heard += self._output.read() or b""
        line, end, self._heard = self._heard.partition(b"\n")
        if end:
            said = json.loads(line)
            self._spent += said["cpu"]
            self._retired = said["retires"]
            return said["status"], said["cpu"]
        self._heard = line
        status, spent = ended(self._process)
        return None if status is None else (status, spent - self._spent)

    def signal(self, number: int) -> None:
        """Sends it a signal, which its current run handles."""
        self._process.send_signal(number)

    def alive(self) -> bool:
        """Whether it can execute another run."""
        return not self._retired and ended(self._process)[0] is None

    def close(self) -> None:
        """Ends the worker after its run."""
        self._input.close()
        self._output.close()
        if self._process.returncode is None:
            self._process.wait()


def ended(process: subprocess.Popen) -> tuple[int | None, float]:
    """(exit status or None, CPU seconds) of a child."""
    if process.returncode is not None:
        return process.returncode, 0.0
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid == 0:
        return None, 0.0
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def main() -> int:
    """Reads runs from standard input, one JSON object a line, and answers on the original standard output."""
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    silent = os.open(os.devnull, os.O_RDWR)
    os.dup2(silent, 0)
    _print_to(silent)
    from steppe.lm.parts.memo import Memo
    from steppe.scripts import train

    with Memo(KEEP):
        for line in orders:
            given, before = json.loads(line), _cpu_seconds()
            log = os.open(given["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            _print_to(log)
            try:
                status = train.main(given["argv"])
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            except BaseException:
                traceback.print_exc()
                status = 1
            _print_to(silent)
            os.close(log)
            retires = _memory() > RETIRE
            said = {"status": status, "cpu": _cpu_seconds() - before, "retires": retires}
            print(json.dumps(said), file=answers, flush=True)
            if retires:
                break
    return 0


def _print_to(number: int) -> None:
    """Redirects both outputs, including those of C++ and of children, to a file descriptor."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(number, 1)
    os.dup2(number, 2)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _memory() -> int:
    """Resident memory of this process in bytes; 0 if the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from the terminal: the sweep forwards signals to its runs
    sys.exit(main())
