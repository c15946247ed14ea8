"""Disturbances of preparations: killed, starved of disk, and run again, against one that was left alone."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from exhaustive.disturbances import Bench, log_of, wait_until

SHARDS, WORKERS = 6, 2
COMMAND = (sys.executable, "-P", "-m", "steppe.scripts.prepare_data", "--config=base", "--config.data.task=embedded")


def prepare(made: Bench, workdir: Path, *more: str) -> subprocess.Popen:
    """Starts, or continues, a preparation in `workdir`/corpus, in a group of processes of its own."""
    words = [*COMMAND, f"--shards={SHARDS}", f"--workers={WORKERS}", f"--out={workdir}/corpus", *more]
    with open(f"{workdir}.log", "ab") as log:
        return subprocess.Popen(words, env=made.environment, stdout=log, stderr=log, start_new_session=True)


def shards(workdir: Path, *, finished: bool = True) -> list[Path]:
    """The training shards that are there, or those being written."""
    return list(workdir.glob("corpus/train/*/*.array_record" + (".json" if finished else ".*.tmp")))


def moment(run: subprocess.Popen, workdir: Path, chance: random.Random) -> bool:
    """Waits for a random moment of a preparation; whether it was still going on then."""
    count = chance.randint(0, SHARDS - WORKERS)
    reached = wait_until(run, lambda: len(shards(workdir)) >= count and bool(shards(workdir, finished=False)))
    time.sleep(chance.random() * 0.2)
    return reached and run.poll() is None


def finish(made: Bench, workdir: Path, statuses: list, *more: str) -> list:
    """Runs the same command until it ends well, at most 3 times."""
    for _ in range(3):
        statuses.append(prepare(made, workdir, *more).wait(timeout=300))
        if statuses[-1] == 0:
            return statuses
    raise RuntimeError(f"never prepared, statuses {statuses}: {log_of(workdir)}")


def kill(whole_group: bool) -> Callable:
    """SIGKILL of the process that was started, alone or with its workers."""

    def scenario(made: Bench, workdir: Path, chance: random.Random):
        run = prepare(made, workdir)
        hit = moment(run, workdir, chance)
        (os.killpg if whole_group else os.kill)(run.pid, signal.SIGKILL)
        return finish(made, workdir, [run.wait()]), hit

    return scenario


def interrupt(made: Bench, workdir: Path, chance: random.Random):
    """Ctrl-C."""
    run = prepare(made, workdir)
    hit = moment(run, workdir, chance)
    os.killpg(run.pid, signal.SIGINT)
    status = run.wait(timeout=60)
    if status not in (0, 2, -signal.SIGINT) or "Traceback" in log_of(workdir):
        raise RuntimeError(f"an interrupt ended it with {status}: {log_of(workdir)}")
    return finish(made, workdir, [status]), hit


def lose_a_host(made: Bench, workdir: Path, chance: random.Random):
    """Two that prepare together, as on two hosts; one is killed, the other ends the work."""
    first, second = (prepare(made, workdir, "--together") for _ in range(2))
    hit = moment(first, workdir, chance)
    os.killpg(first.pid, signal.SIGKILL)
    statuses = [first.wait(), second.wait(timeout=300)]
    if statuses[1]:
        raise RuntimeError(f"the host that was left ended with {statuses[1]}: {log_of(workdir)}")
    return statuses, hit


def fill(made: Bench, workdir: Path, chance: random.Random):
    """The disk full at a random moment, then room again."""
    run = prepare(made, workdir)
    hit = moment(run, workdir, chance)
    with contextlib.suppress(OSError), open(workdir / "filler", "wb") as filler:
        while True:
            filler.write(bytes(1 << 16))
            filler.flush()
    status = run.wait(timeout=120)
    if status and ("cannot write" not in log_of(workdir) or "Traceback" in log_of(workdir)):
        raise RuntimeError(f"a full disk was not said in one line: {log_of(workdir)}")
    (workdir / "filler").unlink()
    return finish(made, workdir, [status]), hit and status != 0


PREPARATIONS = {
    "preparation: SIGKILL of the parent": kill(whole_group=False),
    "preparation: SIGKILL of all": kill(whole_group=True),
    "preparation: Ctrl-C": interrupt,
    "preparation: one of two hosts lost": lose_a_host,
    "disk full in a preparation": fill,
}


def difference(made: Bench, workdir: Path) -> str:
    """The first file that is not as in an undisturbed preparation, "" if there is none; nothing else may be there."""
    whole = made.folder / "prepared"
    if not whole.exists():
        whole.mkdir()
        finish(made, whole, [])
    ours, theirs = (
        {str(path.relative_to(place)): path for path in (place / "corpus").rglob("*") if path.is_file()}
        for place in (workdir, whole)
    )
    if ours.keys() != theirs.keys():
        return f"other files: {sorted(ours.keys() ^ theirs.keys())}"
    for name, path in ours.items():
        if not name.endswith("manifest.json") and path.read_bytes() != theirs[name].read_bytes():
            return f"{name} differs"
    return ""
