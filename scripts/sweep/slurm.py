"""Runs of a sweep, or hosts of a preparation, as a SLURM job array, through submitit.

A job executes steppe train and records its outcome. Before its time limit, or on preemption, SLURM signals the job. The
run then saves and stops; the job is requeued and resumes.
"""

import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steppe.configs import packages
from steppe.configs.read import UsageError
from steppe.data import files
from steppe.lm.keep.exits import STOPPED
from steppe.scripts import results
from steppe.scripts.sweep import launch as sweep_launch
from steppe.scripts.sweep.plan import Run
from steppe.scripts.sweep.worker import ended

FOLDER, JOB = ".slurm", "slurm.json"  # logs and pickles of the jobs, in the sweep; the job's id, in a run's workdir
MOST_TIMEOUTS = 1000  # submitit needs a limit on timeouts; each one is progress, so it is high
POLL, MISSED = 2.0, 5  # seconds between looks at a queue; looks that may see no job before its outcome is seen
AFTER_STOP = 300.0  # seconds that a job waits after its run was told to stop, so that SLURM decides what follows


class TrainJob:
    """A job that starts or resumes one run. submitit pickles it and calls it on the job's host."""

    def __init__(self, directory: Path, command: Sequence[str]):
        self.directory, self.command = directory, list(command)
        self._process: subprocess.Popen | None = None

    def __call__(self) -> str:
        """Runs until the run ends; returns its status, "" if it was stopped before."""
        if outcome := sweep_launch.settle(self.directory):
            return outcome["status"]
        sweep_launch.begin_attempt(self.directory, self.command)
        with open(self.directory / sweep_launch.LOG, "ab") as log:
            # SLURM signals every process of a job; only this one may act on it
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
        outcome = self._wait()
        if not outcome and self._process.returncode == STOPPED:
            time.sleep(AFTER_STOP)
        return outcome.get("status", "")

    def checkpoint(self) -> Any:
        """Called by submitit during __call__ when SLURM signals the job: stops the run; returns what to requeue."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            self._wait()
        return DelayedSubmission(TrainJob(self.directory, self.command))

    def _wait(self) -> dict:
        """The outcome once the process has ended, {} if the run is to resume."""
        assert self._process is not None
        while True:
            # not Popen.wait: `checkpoint` interrupts this call and would deadlock on Popen's lock
            status, cpu_seconds = ended(self._process)
            if status is not None:
                return sweep_launch.end_attempt(self.directory, status, cpu_seconds)
            time.sleep(0.5)


class PrepareJob:
    """One host of a preparation: runs the command, which continues an earlier preparation."""

    def __init__(self, command: Sequence[str]):
        self.command = list(command)
        self._process: subprocess.Popen | None = None

    def __call__(self) -> None:
        self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        while self._process.poll() is None:
            time.sleep(0.5)
        if self._process.returncode:
            raise RuntimeError(f"exit status {self._process.returncode}; the lines above say why")

    def checkpoint(self) -> Any:
        """Called when SLURM preempts the job: finished shards stay, the rest is requeued."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.kill()
        return DelayedSubmission(PrepareJob(self.command))


def submit_preparation(line: Sequence[str], out: str, hosts: int, cores: int, parameters: dict[str, Any]) -> str:
    """Submits one job per host, each running `line`; returns a line that says so. Raises UsageError."""
    folder = Path(f"{Path(out).resolve()}{FOLDER}")  # next to `out`, which must hold only the preparation
    settings = {"job_name": Path(out).name, "cpus_per_task": cores, "array_parallelism": hosts}
    submitted = _submitted([PrepareJob(line) for _ in range(hosts)], folder, {**settings, **parameters})
    return f"submitted {hosts} hosts as job {submitted[0].job_id.split('_')[0]}; logs in {folder}"


def parameters_of(texts: Sequence[str]) -> dict[str, Any]:
    """{name: value} of --slurm=NAME=VALUE,NAME=VALUE flags, for submitit. Raises UsageError."""
    found = {}
    for piece in [piece for text in texts for piece in text.split(",")]:
        name, equals, value = piece.partition("=")
        if not (equals and name and value):
            raise UsageError(f"--slurm={piece}: must be NAME=VALUE, such as partition=gpu,time=240,gpus_per_node=1")
        found[name.strip().replace("-", "_")] = int(value) if re.fullmatch(r"\d+", value) else value
    return found


def submit(runs: Sequence[Run], config: str, out: Path, jobs: int, cores: int, parameters: dict[str, Any]) -> list[str]:
    """Submits the runs that have no job yet as one array, `jobs` at a time (0: all); returns lines that say so.

    parameters: of submitit's SlurmExecutor, time in minutes. Raises UsageError if SLURM or submitit refuse them.
    """
    queued = _queued()
    left = [run for run in runs if _job(run) not in queued]
    said = [f"{len(runs) - len(left)} runs have a job in the queue"] if len(left) < len(runs) else []
    if not left:
        return said
    settings = {"job_name": out.resolve().name, "cpus_per_task": cores, "array_parallelism": jobs or len(left)}
    left = [run._replace(directory=run.directory.resolve()) for run in left]
    tasks = [TrainJob(run.directory, sweep_launch.command_line(run, config)) for run in left]
    submitted = _submitted(tasks, out.resolve() / FOLDER, {**settings, **parameters})
    for run, job in zip(left, submitted, strict=True):
        run.directory.mkdir(parents=True, exist_ok=True)
        files.write_json(run.directory / JOB, {"job": job.job_id})
    return [*said, f"submitted {len(left)} runs as job {submitted[0].job_id.split('_')[0]}; logs in {out / FOLDER}"]


def wait(runs: Sequence[Run], view: Any) -> bool:
    """Waits until every run has ended; False at Ctrl-C, or where none that is left has a job. view: sweep.view.View."""
    left, missed = list(runs), 0
    try:
        while True:
            for run in list(left):
                if outcome := sweep_launch.settle(run.directory):
                    left.remove(run)
                    view.ended(run, outcome, outcome["exit"])
            missed = 0 if {_job(run) for run in left} & _queued() else missed + 1
            if not left or missed > MISSED:
                return not left
            view.tick([], left)
            time.sleep(POLL)
    except KeyboardInterrupt:  # the jobs go on
        return False


def _job(run: Run) -> str | int | None:
    return results.read_json(run.directory / JOB, dict[str, str | int]).get("job")


def _submitted(tasks: Sequence, folder: Path, parameters: dict[str, Any]) -> list:
    """Submits an array of tasks; returns submitit's jobs. Raises UsageError."""
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise UsageError(f"--launcher=slurm: {packages.lacking('submitit')}") from None
    try:
        executor = SlurmExecutor(folder=folder, max_num_timeout=MOST_TIMEOUTS)
        executor.update_parameters(**{"additional_parameters": {"requeue": True}, **parameters})
        with executor.batch():
            return [executor.submit(task) for task in tasks]
    except Exception as error:  # submitit raises many classes, all about the cluster or the parameters
        raise UsageError(f"--launcher=slurm: {type(error).__name__}: {error}") from None


def _queued() -> set[str]:
    """The user's queued and running jobs, as 12_3."""
    command = ["squeue", "--noheader", "--array", "--me", "--format=%i"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UsageError("--launcher=slurm: there is no squeue here; submit from a machine of the cluster") from None
    if done.returncode:
        raise UsageError(f"--launcher=slurm: squeue: {' '.join(done.stderr.split())}")
    return set(done.stdout.split())
