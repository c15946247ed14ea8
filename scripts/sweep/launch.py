"""Runs a sweep on this machine, several runs at a time, and records how each ended.

Every run is a `steppe train`, which resumes from its workdir, in a worker process that executes one run after another.
`outcome.json` appears when a run has ended for good; `attempts.json` records the time of every attempt.
"""

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steppe.configs.read import UsageError
from steppe.data import files
from steppe.lm.keep import exits
from steppe.lm.keep.exits import ANOMALY, FINISHED, STOPPED
from steppe.scripts import results
from steppe.scripts.sweep.plan import Run
from steppe.scripts.sweep.worker import Worker

LOG, ATTEMPTS, LOCK = "train.log", "attempts.json", "lock"
POLL = 0.2  # seconds between polls of the processes


class Job(NamedTuple):
    """A run in progress: its worker and its start, in seconds since 1970."""

    run: Run
    worker: Worker
    began: float


def command_line(run: Run, config: str) -> list[str]:
    """The complete command of a run. Any scheduler may start it, and start it again to resume."""
    return [sys.executable, "-P", "-m", "steppe.scripts.train", *arguments(run, config)]


def arguments(run: Run, config: str) -> list[str]:
    """The arguments of `steppe train` for a run."""
    overrides = [f"--config.{key}={text}" for key, text in run.overrides]
    return [f"--config={config}", *overrides, f"--workdir={run.directory}"]


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Locks a sweep's directory against other sweep commands. Raises UsageError if one holds it."""
    try:
        with files.lock(directory / LOCK):
            yield
    except files.Held as held:
        raise UsageError(f"--out = {directory}: is in use by {held.holder}; wait, or stop it") from None


# ----------------------------------------------------------------------------------------------------- what is recorded
def begin_attempt(directory: Path, command: Sequence[str]) -> None:
    """Records the start of an attempt in attempts.json and the log."""
    directory.mkdir(parents=True, exist_ok=True)
    attempts = _attempts(directory)
    files.write_json(directory / ATTEMPTS, {"attempts": [*attempts, {"began": time.time(), "ended": None, "cpu": 0.0}]})
    with open(directory / LOG, "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")


def end_attempt(directory: Path, status: int, cpu_seconds: float = 0.0) -> dict[str, Any]:
    """Records the end of an attempt with this exit status; returns the outcome, {} if the run is to resume."""
    attempts = _attempts(directory)
    if attempts:
        attempts[-1].update(ended=time.time(), cpu=cpu_seconds)
        files.write_json(directory / ATTEMPTS, {"attempts": attempts})
    said = _last_line(directory / LOG)
    return {} if exits.goes_on(status, said) else _record(directory, status, said)


def settle(directory: Path) -> dict[str, Any]:
    """The outcome of a run, {} if it is to resume; records an end that a killed sweep or another scheduler did not."""
    outcome = results.read_json(directory / results.OUTCOME, results.Outcome)
    if outcome or not (directory / "metrics.jsonl").exists() or files.is_held(directory / LOCK):
        return outcome
    (result,) = results.read([directory])
    last = directory / "checkpoints" / str(result.steps)
    if result.curve and result.curve[-1].step == result.steps and last.is_dir():
        return _record(directory, FINISHED)
    stopped = result.status == "diverged" and result.curve[-1].step < result.steps
    return _record(directory, ANOMALY) if stopped else {}


def _record(directory: Path, status: int, said: str = "") -> dict[str, Any]:
    result = None
    with contextlib.suppress(results.ResultsError):
        (result,) = results.read([directory])
    named, why = exits.after(status, said, (result.status, result.why) if result else None)
    return record(directory, named, status, why, result)


def record(directory: Path, named: str, status: int, why: str, result: results.Result | None = None) -> dict[str, Any]:
    """Writes outcome.json: the run has ended for good, as `named`, with its last exit status; returns it."""
    attempts = _attempts(directory)
    outcome = {
        "status": named,
        "exit": status,
        "why": why,
        "seconds": sum(attempt["ended"] - attempt["began"] for attempt in attempts),
        "cpu_seconds": sum(attempt["cpu"] for attempt in attempts),
        "train_seconds": result.seconds if result else 0.0,
        "flops": result.flops if result else 0.0,
        "code": result.code if result else "",
        "loss": result.loss if result and result.loss == result.loss else None,
    }
    files.write_json(directory / results.OUTCOME, outcome)
    return outcome


def _attempts(directory: Path) -> list[dict]:
    """The attempts so far. An attempt with no recorded end ended when its log was last written."""
    found = results.read_json(directory / ATTEMPTS, results.Attempts).get("attempts", [])
    for attempt in found[:-1]:
        attempt["ended"] = attempt["ended"] or attempt["began"]
    if found and found[-1]["ended"] is None:
        marks = [directory / name for name in (LOG, "metrics.jsonl") if (directory / name).exists()]
        found[-1]["ended"] = max([found[-1]["began"], *(mark.stat().st_mtime for mark in marks)])
    return found


def _last_line(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4000))
        lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""
    return ""


# --------------------------------------------------------------------------------------------------------- the launcher
def run_local(runs: Sequence[Run], config: str, slots: Sequence[list[int]], view, until: Mapping[str, int]) -> bool:
    """Executes the runs in order, one at a time on each slot of cores; False if a signal stopped it, else True.

    Each slot has a worker that executes one run after another; a worker that died is replaced. A signal (SIGINT,
    SIGTERM, SIGHUP) reaches the runs as SIGTERM: they save and stop. A second signal ends them at once.

    view: its methods started(job), ended(run, outcome, status) and tick(jobs, waiting) are called. until: {name: step}
    at which a run stops.
    """
    waiting, jobs, signals = list(runs), [], []
    free: list[Worker | list[int]] = [*slots]  # slots without a worker, or idle workers

    def stop(number, frame) -> None:
        signals.append(number)
        for job in jobs:
            job.worker.signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        while jobs or (waiting and not signals):
            while waiting and free and not signals:
                ready = next((run for run in waiting if not files.is_held(run.directory / LOCK)), None)
                if ready is None:
                    break
                waiting.remove(ready)
                if outcome := settle(ready.directory):
                    view.ended(ready, outcome, outcome["exit"])
                    continue
                idle = free.pop(0)
                worker = idle if isinstance(idle, Worker) else Worker(idle)
                more = [f"--until={until[ready.name]}"] if until.get(ready.name) else []
                begin_attempt(ready.directory, [*command_line(ready, config), *more])
                worker.start([*arguments(ready, config), *more], ready.directory / LOG)
                jobs.append(Job(ready, worker, time.time()))
                view.started(jobs[-1])
                if signals:  # a signal that arrived while the worker was starting
                    worker.signal(signal.SIGTERM)
            for job in list(jobs):
                if found := job.worker.poll():
                    status, cpu_seconds = found
                    if status == FINISHED and until.get(job.run.name, job.run.steps) < job.run.steps:
                        status = STOPPED  # at its `until`, not at its end
                    jobs.remove(job)
                    if waiting and job.worker.alive():
                        free.append(job.worker)
                    else:
                        job.worker.close()
                        free.append(job.worker.slot)
                    outcome = end_attempt(job.run.directory, status, cpu_seconds)
                    view.ended(job.run, outcome, status)
            view.tick(jobs, waiting)
            time.sleep(POLL)
    finally:
        for job in jobs:  # empty unless an error occurred above
            job.worker.signal(signal.SIGTERM)
        for worker in [job.worker for job in jobs] + [each for each in free if isinstance(each, Worker)]:
            worker.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return not signals


def slots_of(jobs: int, cores: int, usable: Sequence[int]) -> list[list[int]]:
    """The cores of each job, out of the usable ones; jobs share cores if there are too few."""
    count = len(usable)
    return [sorted({usable[(job * cores + core) % count] for core in range(cores)}) for job in range(jobs)]
