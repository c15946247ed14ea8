"""Launchers: pinned cores, printed commands, and a real SLURM that puts a signalled run back into its queue."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

from helpers import lm_runs, processes, sweep_runs
from steppe.configs.read import UsageError
from steppe.scripts import prepare_data, results
from steppe.scripts.sweep import launch as sweep_launch
from steppe.scripts.sweep import slurm as sweep_slurm


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return sweep_runs.write_config(tmp_path_factory.mktemp("text"))


def test_every_job_has_its_own_cores():
    assert sweep_launch.slots_of(2, 1, [0, 1]) == [[0], [1]]
    assert sweep_launch.slots_of(2, 2, [0, 2, 4, 6]) == [[0, 2], [4, 6]]
    assert sweep_launch.slots_of(3, 1, [5, 7]) == [[5], [7], [5]]  # more jobs than cores share them


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no processes")
def test_xla_takes_as_many_threads_as_the_mask_has_cores():
    """The threads of a pool that XLA makes follow the mask of the process, which its parent set before it began."""
    code = (
        "import os, jax, jax.numpy as jnp\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "(jnp.ones((1500, 1500)) @ jnp.ones((1500, 1500))).block_until_ready()\n"
        "print(len(os.listdir('/proc/self/task')), *sorted(os.sched_getaffinity(0)))\n"
    )
    mask, threads = os.sched_getaffinity(0), []
    for cores in [sorted(mask)[:count] for count in (1, 2) if count <= len(mask)]:
        try:
            os.sched_setaffinity(0, cores)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENV)
        finally:
            os.sched_setaffinity(0, mask)
        count, *seen = map(int, done.stdout.split())
        assert seen == cores
        threads.append(count)
    assert threads == sorted(set(threads))  # more of them with every core


ENV = {**processes.environment(), "JAX_COMPILATION_CACHE_DIR": ""}


@pytest.mark.exhaustive  # two processes
def test_printed_commands_run_by_themselves(config, tmp_path):
    out = tmp_path / "a sweep"  # with a space, which must be quoted
    flags = ("--grid", "seed=0,1", "--config.train.duration=20 steps", "--config.optim.peak_learning_rate=0.1")
    process = sweep_runs.start(config, out, *flags, "--launcher=print", stderr=subprocess.PIPE)
    printed, planned = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "2 (2 unfinished)" in planned
    lines = printed.splitlines()
    assert len(lines) == 2
    assert subprocess.run(lines[1], shell=True, env=processes.environment(), capture_output=True).returncode == 0
    # the sweep sees what another scheduler has done
    process = sweep_runs.start(config, out, *flags, "--launcher=print", stderr=subprocess.PIPE)
    again, planned = process.communicate(timeout=60)
    assert again.splitlines() == lines[:1]
    first, second = results.read(out)
    assert first.status == "unfinished"
    assert second.status in ("finished", "diverged")
    assert json.loads((second.directory / "outcome.json").read_text())["exit"] == 0


def test_parameters_for_slurm():
    assert sweep_slurm.parameters_of(["partition=gpu,time=60", "gpus-per-node=1"]) == {
        "partition": "gpu", "time": 60, "gpus_per_node": 1,
    }  # fmt: skip
    with pytest.raises(UsageError, match="NAME=VALUE"):
        sweep_slurm.parameters_of(["gpu"])


# --------------------------------------------------------------------------------------------------------- a real SLURM
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket,cred_expire=5
CryptoType=crypto/munge
SlurmctldPort={port}
SlurmdPort={node_port}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """SLURM's own daemons, for one node, on ports and in a directory of their own."""
    if not all(map(shutil.which, PROGRAMS)) or os.getuid() != 0:
        pytest.skip("needs slurmctld, slurmd and munged, and root to start them")
    # munged refuses a place that others may write to, as the directory of pytest is not
    place = pathlib.Path(tmp_path_factory.mktemp("slurm"))
    for folder in ("munge", "state", "spool"):
        (place / folder).mkdir(mode=0o755)
    key = place / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    conf = place / "slurm.conf"
    conf.write_text(CONF.format(host=host, place=place, port=free_port(), node_port=free_port()))
    before, os.environ["SLURM_CONF"] = os.environ.get("SLURM_CONF"), str(conf)
    munge = ["munged", "--foreground", "--force", f"--socket={place}/munge/socket", f"--key-file={key}"]
    munge += [f"--{name}-file={place}/munge/{name}" for name in ("pid", "log", "seed")]
    daemons = []
    try:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D"]):
            log = open(place / f"{command[0]}.out", "wb")  # noqa: SIM115 - the daemon's
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(0.5)
        end = time.monotonic() + 30
        while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout:
            states = [daemon.poll() for daemon in daemons]
            if any(state is not None for state in states) or time.monotonic() > end:
                logs = "\n".join(path.read_text(errors="replace")[-800:] for path in place.glob("*.out"))
                pytest.fail(f"SLURM is installed but does not start: {states} {logs}")
            time.sleep(0.3)
        yield place
    finally:
        if daemons[1:]:
            subprocess.run(["scancel", "--me"], capture_output=True, timeout=20)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def test_slurm_runs_an_array_and_continues_a_requeued_run(slurm, config, tmp_path):
    pytest.importorskip("submitit")
    out = tmp_path / "out"
    long = "--config.train.duration=2000 steps"
    flags = ("--grid", "seed=0,1", long, "--launcher=slurm", "--slurm=partition=main,time=20", "--jobs=2")
    status, printed = sweep_runs.run(config, out, *flags)
    assert status == 0, printed
    assert "submitted 2 runs as job" in printed
    first, second = (out / "runs" / f"seed={seed}" for seed in (0, 1))
    job = json.loads((first / "slurm.json").read_text())["job"]

    def wait_for(condition, seconds=300):
        end = time.monotonic() + seconds
        while not condition():
            logs = [path.read_text(errors="replace")[-1500:] for path in (out / ".slurm").glob("*.err")]
            assert time.monotonic() < end, "\n".join(logs)
            time.sleep(0.5)

    wait_for(lambda: sweep_runs.saved(first) >= 30)
    assert "2 runs have a job in the queue" in sweep_runs.run(config, out, *flags)[1]  # none is submitted twice
    # the signal that SLURM itself sends before a job's time is up, or when it is preempted
    subprocess.run(["scancel", "--signal=USR2", job], check=True)

    # SLURM holds a requeued job back for as long as its credentials live (cred_expire, of which 5 s is the least)
    wait_for(lambda: all((place / "outcome.json").exists() for place in (first, second)))
    found = results.read(out)
    assert [result.status for result in found] == ["finished", "finished"]
    assert "stopping after this step" in (first / "train.log").read_text()
    assert "resuming    after step" in (first / "train.log").read_text()
    assert [len(json.loads((place / "attempts.json").read_text())["attempts"]) for place in (first, second)] == [2, 1]
    assert [record["step"] for record in lm_runs.records(first, "train")] == list(range(1, 2001))


def test_a_sweep_waits_for_its_jobs_and_says_when_none_is_left(slurm, config, tmp_path):
    pytest.importorskip("submitit")
    flags = ("--launcher=slurm", "--slurm=partition=main,time=20", "--wait", "--jobs=2")
    status, printed = sweep_runs.run(config, tmp_path / "whole", "--grid", "seed=0,1", *flags)
    assert status == 0, printed
    assert "[2/2] finished" in printed
    assert [result.status for result in results.read(tmp_path / "whole")] == ["finished", "finished"]

    long = ("--config.train.duration=20000 steps", "--grid", "seed=0")
    waiting = sweep_runs.start(config, tmp_path / "gone", *long, *flags)
    begun = tmp_path / "gone" / "runs" / "run" / "slurm.json"  # one run needs no name
    end = time.monotonic() + 120
    while not begun.exists():
        assert time.monotonic() < end
        time.sleep(0.2)
    subprocess.run(["scancel", json.loads(begun.read_text())["job"]], check=True)
    printed, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 75, printed
    assert "run the same command again to continue" in printed
    status, printed = sweep_runs.run(config, tmp_path / "local", "--grid", "seed=0", "--wait")
    assert (status, printed.strip()) == (2, "--wait: must be left out with --launcher=local")


@pytest.mark.exhaustive  # two judgements
def test_a_judgement_by_slurm_is_the_one_made_here(slurm, config, tmp_path):
    pytest.importorskip("submitit")
    cluster = ["--launcher=slurm", "--slurm=partition=main,time=20", "--jobs=2"]
    found = []
    for name, where in (("slurm", cluster), ("local", ["--jobs=2"])):
        out = tmp_path / name
        line = ["judge", "msam", f"--config={config}", f"--out={out}", "--trials=3", "--pairs=3", *where]
        command = [sys.executable, "-P", "-m", "steppe.scripts.cli", *line]
        done = subprocess.run(command, capture_output=True, text=True, env=processes.environment(), timeout=1500)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(json.loads((out / "verdicts" / "msam.json").read_text()))
        for each in (found[-1]["cost"], *found[-1]["comparisons"].values()):
            each.pop("hours", None), each.pop("hours_needed", None)
    assert found[0] == found[1]


def test_slurm_prepares_a_corpus_on_several_hosts(slurm, tmp_path, capsys):
    pytest.importorskip("submitit")
    arguments = ["--config=base", "--config.data.task=embedded", "--shards=4", "--workers=1"]
    out = tmp_path / "corpus"
    flags = ["--hosts=2", "--launcher=slurm", "--slurm=partition=main,time=20"]
    assert prepare_data.main([*arguments, f"--out={out}", *flags]) == 0
    assert "submitted 2 hosts as job" in capsys.readouterr().out
    end = time.monotonic() + 120
    while not (out / "manifest.json").exists():
        assert time.monotonic() < end, "\n".join(path.read_text() for path in tmp_path.glob("corpus.slurm/*.err"))
        time.sleep(0.2)
    assert prepare_data.main([*arguments, f"--out={tmp_path / 'alone'}"]) == 0
    shards = [sorted(place.rglob("*.array_record")) for place in (out, tmp_path / "alone")]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]
