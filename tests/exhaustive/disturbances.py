"""Disturbances of runs: small runs started, killed, starved of disk, harmed on disk, and continued."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STEPS, EVERY = 40, 8  # steps of a run; steps between checkpoints, and between evaluations
FINISHED, REFUSED, STORAGE, STOPPED = 0, 2, 74, 75  # exit statuses of a run


class Bench(NamedTuple):
    """Where runs happen, and the command of a run without its workdir."""

    folder: Path
    command: tuple[str, ...]
    environment: dict[str, str]


@contextlib.contextmanager
def small_bench(**other: Any) -> Iterator[Bench]:
    """A folder with a small text and a compilation cache, and the command of a small run; other: keys of its config, as
    model__layers=1."""
    with tempfile.TemporaryDirectory(prefix="steppe-chaos-") as made:
        folder = Path(made)
        text = Path(os.__file__).read_text(encoding="utf-8")
        (folder / "train.txt").write_text(text[:30_000])
        (folder / "val.txt").write_text(text[30_000:36_000])
        root = Path(__file__).parents[2]
        small = {
            "data.task": f"text:{folder}/train.txt@all",
            "data.held_out": f"('val=text:{folder}/val.txt@all',)",
            "data.sequence_length": 32,
            "model.layers": 2,
            "model.width": 32,
            "model.heads": 4,
            "model.mlp_width": 64,
            "train.batch_size": 8,
            "train.microbatches": 1,
            "train.duration": f"{STEPS} steps",
            "evaluate.every": f"{EVERY} steps",
            "evaluate.batches": 8,
            "checkpoint.every": f"{EVERY} steps",
            "sample.tokens": 4,
            **{key.replace("__", "."): value for key, value in other.items()},
        }
        words = (sys.executable, "-P", "-m", "steppe.scripts.train", f"--config={root / 'configs' / 'quickstart.py'}")
        yield Bench(
            folder=folder,
            command=(*words, *(f"--config.{key}={value}" for key, value in small.items())),
            environment={
                **os.environ,
                "STEPPE_CACHE": str(folder / "cache"),
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                "XLA_FLAGS": "",
            },
        )


@contextlib.contextmanager
def bench() -> Iterator[tuple[Bench, Path]]:
    """A small_bench, and in its folder the workdir of an undisturbed run."""
    with small_bench() as setting:
        whole = setting.folder / "whole"
        status = start(setting, whole).wait()
        if status != FINISHED:
            raise RuntimeError(f"the undisturbed run ended with {status}: {log_of(whole)}")
        yield setting, whole


@contextlib.contextmanager
def scenario_folder(made: Bench, name: str, workdir: Path) -> Iterator[None]:
    """A tmpfs as workdir for the scenarios that fill the disk."""
    workdir.mkdir()
    if not name.startswith("disk full"):
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(workdir)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(workdir)], check=True)


# --------------------------------------------------------------------------------------------------- runs and waiting
def start(made: Bench, workdir: Path, *more: str, devices: int = 1) -> subprocess.Popen:
    """Starts, or continues, a run; its output goes to a file next to the workdir."""
    environment = {**made.environment}
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    with open(f"{workdir}.log", "ab") as log:
        words = [*made.command, f"--workdir={workdir}", *more]
        return subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)


def log_of(workdir: Path) -> str:
    """The last lines of what a run said."""
    return Path(f"{workdir}.log").read_text(errors="replace")[-1500:]


def wait_until(run: subprocess.Popen, true: Callable[[], bool], seconds: float = 120.0, pause: float = 0.002) -> bool:
    """Waits until something is true; False if the run ended, or the time did, before it was."""
    until = time.monotonic() + seconds
    while run.poll() is None and time.monotonic() < until:
        if true():
            return True
        time.sleep(pause)
    return False


def records(workdir: Path) -> list[dict]:
    """The whole records in a run's metrics.jsonl now."""
    path, found = workdir / "metrics.jsonl", []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def seen(workdir: Path, kind: str, step: int) -> Callable[[], bool]:
    """Whether the newest lines show a record of this kind at or after a step."""

    def true() -> bool:
        path = workdir / "metrics.jsonl"
        if not path.exists():
            return False
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 3000))
            lines = file.read().split(b"\n")[:-1]
        for line in lines:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if record["kind"] == kind and record["step"] >= step:
                    return True
        return False

    return true


def saving(workdir: Path) -> bool:
    """Whether a save is under way: orbax's unfinished directory is there, or a step without its seal."""
    with contextlib.suppress(OSError):
        for path in (workdir / "checkpoints").iterdir():
            if "orbax-checkpoint-tmp" in path.name or (path.name.isdecimal() and not (path / "SEAL").exists()):
                return True
    return False


def sealed(workdir: Path) -> list[int]:
    """The steps that are checkpoints now."""
    seals = (workdir / "checkpoints").glob("*/SEAL")
    return sorted(int(path.parent.name) for path in seals if path.parent.name.isdecimal())


def evaluating(workdir: Path) -> bool:
    """Whether the last record is that of a step after which an evaluation is due."""
    found = records(workdir)
    return bool(found) and found[-1]["kind"] == "train" and found[-1]["step"] % EVERY == 0


def finish(made: Bench, workdir: Path, statuses: list) -> list:
    """Continues until the run is finished, at most 4 times; returns how it ended each time."""
    for _ in range(4):
        statuses.append(start(made, workdir).wait(timeout=300))
        if statuses[-1] == FINISHED:
            return statuses
    raise RuntimeError(f"never finished, statuses {statuses}: {log_of(workdir)}")


# ------------------------------------------------------------------------------------------------------- disturbances
def kill(where: str) -> Callable:
    """SIGKILL, two or three times in a run, at random moments of one sort."""

    def scenario(made: Bench, workdir: Path, chance: random.Random):
        statuses, hits = [], 0
        for low, high in ((1, 12), (14, 24), (26, 39))[: chance.choice((2, 3))]:
            run, step = start(made, workdir), chance.randint(low, high)
            if where == "save":
                due = -(-step // EVERY) * EVERY
                wait_until(run, lambda due=due: seen(workdir, "train", due)() and saving(workdir))
                time.sleep(chance.random() * 0.06)
                hits += saving(workdir)
            elif where == "evaluation":
                due = -(-step // EVERY) * EVERY
                wait_until(run, lambda due=due: seen(workdir, "train", due)() and evaluating(workdir))
                time.sleep(chance.random() * 0.01)
                hits += evaluating(workdir)
            else:
                wait_until(run, seen(workdir, "train", step))
                time.sleep(chance.random() * 0.02)
                hits += 1
            run.kill()
            statuses.append(run.wait())
        return finish(made, workdir, statuses), hits > 0

    return scenario


def kill_at_start(made: Bench, workdir: Path, chance: random.Random):
    """SIGKILL after a random time, mostly while Python starts, restores or compiles."""
    statuses = []
    for _ in range(2):
        run = start(made, workdir)
        time.sleep(chance.random() * 6)
        run.kill()
        statuses.append(run.wait())
    return finish(made, workdir, statuses), True


def terminate(made: Bench, workdir: Path, chance: random.Random):
    """SIGTERM or SIGINT, with or without a second one."""
    run, number = start(made, workdir), chance.choice((signal.SIGTERM, signal.SIGINT))
    wait_until(run, seen(workdir, "train", chance.randint(1, 35)))
    time.sleep(chance.random() * 0.05)
    run.send_signal(number)
    twice = chance.random() < 0.4
    if twice:
        time.sleep(chance.random() * 0.03)
        run.send_signal(signal.SIGTERM)
    status = run.wait(timeout=120)
    if status not in ((STOPPED, -signal.SIGTERM, FINISHED) if twice else (STOPPED,)):
        raise RuntimeError(f"{number.name} ended the run with {status}: {log_of(workdir)}")
    return finish(made, workdir, [status]), True


def fill(during_save: bool) -> Callable:
    """The disk full at a random step, or in the middle of a save."""

    def scenario(made: Bench, workdir: Path, chance: random.Random):
        run, step = start(made, workdir), chance.randint(2, 30)
        due = -(-step // EVERY) * EVERY
        ready = (
            (lambda: seen(workdir, "train", due)() and saving(workdir)) if during_save else seen(workdir, "train", step)
        )
        wait_until(run, ready)
        with contextlib.suppress(OSError), open(workdir / "filler", "wb") as filler:
            while True:
                filler.write(bytes(1 << 16))
                filler.flush()
        status = run.wait(timeout=120)
        if status != STORAGE:
            raise RuntimeError(f"a full disk ended the run with {status}: {log_of(workdir)}")
        if "Traceback" in log_of(workdir).rpartition("stopped:")[2] or "stopped:" not in log_of(workdir):
            raise RuntimeError(f"a full disk was not said in one line: {log_of(workdir)}")
        (workdir / "filler").unlink()
        return finish(made, workdir, [status]), True

    return scenario


def damage(harm: Callable) -> Callable:
    """Kills a run that has two checkpoints, harms the newest, and continues: it must fall back, loudly."""

    def scenario(made: Bench, workdir: Path, chance: random.Random):
        run, step = start(made, workdir), chance.randint(2 * EVERY + 4, STEPS - 2)
        wait_until(run, lambda: seen(workdir, "train", step)() and len(sealed(workdir)) > 1)
        run.kill()
        statuses, steps = [run.wait()], sealed(workdir)
        expected = harm(workdir / "checkpoints", steps, chance)
        finish(made, workdir, statuses)
        said = Path(f"{workdir}.log").read_text(errors="replace")
        if f"CHECKPOINT {expected} IS NOT USED" not in said or "falling back to the checkpoint of step" not in said:
            raise RuntimeError(f"the harm to checkpoint {expected} went unseen: {log_of(workdir)}")
        return statuses, True

    return scenario


def harm_the_only_one(made: Bench, workdir: Path, chance: random.Random):
    """The only checkpoint there is, harmed: refused, nothing touched, until the user removes it and starts over."""
    run = start(made, workdir)
    wait_until(run, lambda: len(sealed(workdir)) > 0)
    run.kill()
    statuses = [run.wait()]
    if len(sealed(workdir)) > 1:
        raise RuntimeError("the second checkpoint came too soon")
    truncate(workdir / "checkpoints", sealed(workdir), chance)
    before = (workdir / "metrics.jsonl").read_bytes()
    statuses.append(start(made, workdir).wait(timeout=300))
    if statuses[-1] != REFUSED or (workdir / "metrics.jsonl").read_bytes() != before:
        raise RuntimeError(f"a harmed only checkpoint: status {statuses[-1]}: {log_of(workdir)}")
    shutil.rmtree(workdir / "checkpoints")
    return finish(made, workdir, statuses), True


def flip_bit(checkpoints: Path, steps: list[int], chance: random.Random) -> int:
    path = chance.choice(
        [p for p in sorted((checkpoints / str(steps[-1])).rglob("*")) if p.is_file() and p.stat().st_size]
    )
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return steps[-1]


def truncate(checkpoints: Path, steps: list[int], chance: random.Random) -> int:
    path = chance.choice(
        [p for p in sorted((checkpoints / str(steps[-1])).rglob("*")) if p.is_file() and p.stat().st_size]
    )
    os.truncate(path, chance.randrange(path.stat().st_size))
    return steps[-1]


def lose_file(checkpoints: Path, steps: list[int], chance: random.Random) -> int:
    chance.choice([p for p in sorted((checkpoints / str(steps[-1])).rglob("*")) if p.is_file()]).unlink()
    return steps[-1]


def empty_step(checkpoints: Path, steps: list[int], chance: random.Random) -> int:
    (checkpoints / str(STEPS - 1)).mkdir()
    return STEPS - 1


def renamed_step(checkpoints: Path, steps: list[int], chance: random.Random) -> int:
    shutil.copytree(checkpoints / str(steps[0]), checkpoints / str(STEPS - 1))
    return STEPS - 1


def foreign_step(checkpoints: Path, steps: list[int], chance: random.Random) -> int:
    shutil.copytree(checkpoints.parents[1] / "whole" / "checkpoints" / str(STEPS), checkpoints / str(STEPS))
    return STEPS


def tear_metrics(made: Bench, workdir: Path, chance: random.Random):
    """SIGKILL, then the last line of metrics.jsonl cut short or followed by zeros."""
    run = start(made, workdir)
    wait_until(run, seen(workdir, "train", chance.randint(EVERY + 2, STEPS - 2)))
    run.kill()
    statuses, path = [run.wait()], workdir / "metrics.jsonl"
    if chance.random() < 0.5:
        os.truncate(path, path.stat().st_size - chance.randint(1, 200))
    else:
        with open(path, "ab") as file:
            file.write(bytes(chance.randint(1, 4096)))
    return finish(made, workdir, statuses), True


SCENARIOS = {
    "SIGKILL in a step": kill("step"),
    "SIGKILL in a save": kill("save"),
    "SIGKILL in an evaluation": kill("evaluation"),
    "SIGKILL at the start": kill_at_start,
    "SIGTERM or SIGINT, some twice": terminate,
    "disk full at a step": fill(False),
    "disk full in a save": fill(True),
    "checkpoint: a bit flipped": damage(flip_bit),
    "checkpoint: a file cut short": damage(truncate),
    "checkpoint: a file lost": damage(lose_file),
    "checkpoint: an empty step": damage(empty_step),
    "checkpoint: a renamed step": damage(renamed_step),
    "checkpoint: of another run": damage(foreign_step),
    "checkpoint: the only one harmed": harm_the_only_one,
    "metrics.jsonl: last line torn": tear_metrics,
}
