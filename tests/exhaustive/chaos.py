"""Runs and preparations disturbed in every way, continued, and compared with undisturbed ones.

    cd tests && python -m exhaustive.chaos --runs=60 --minutes=40 [--seed=0] [--only=NAME]

Takes 10 s a run on two cores; prints a table in Markdown. Filling a disk needs root (a small tmpfs is mounted).
"""

import collections
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from exhaustive.disturbances import (
    FINISHED,
    SCENARIOS,
    STEPS,
    STOPPED,
    Bench,
    bench,
    log_of,
    records,
    scenario_folder,
    seen,
    start,
    wait_until,
)
from exhaustive.preparations import PREPARATIONS
from exhaustive.preparations import difference as corpus_difference
from steppe.configs import keys
from steppe.scripts import command

ALL = {**SCENARIOS, **PREPARATIONS}
CLOCKS = ("seconds", "tokens_per_second", "data_wait", "stall")  # of a record, what two equal runs need not share


def disturb(runs: int, minutes: float, seed: int, flipped: int, only: str = "") -> list[str]:
    """Takes the scenarios whose name contains `only` in turn, and prints what became of each run; what is wrong.

    minutes: no run is begun later. flipped: single bits flipped in a checkpoint, one after the other.
    """
    began, chance = time.monotonic(), random.Random(seed)
    rows, failures = collections.defaultdict(list), []
    with bench() as (made, whole):
        chosen = [item for item in ALL.items() if only in item[0]]
        for number in range(runs if chosen else 0):
            if time.monotonic() - began > minutes * 60:
                failures.append(f"{runs - number} runs were not made: the time was up")
                break
            name, scenario = chosen[number % len(chosen)]
            workdir = made.folder / f"run{number}"
            try:
                with scenario_folder(made, name, workdir):
                    statuses, hit = scenario(made, workdir, chance)
                    prepared = name in PREPARATIONS
                    problem = corpus_difference(made, workdir) if prepared else difference(whole, workdir)
            except Exception as error:
                statuses, hit, problem = [], False, f"{type(error).__name__}: {error}"
            rows[name].append((statuses, hit, problem))
            print(
                f"{number + 1:3} {name:<34} statuses {statuses} {'hit' if hit else ''} {problem or 'equal'}", flush=True
            )
            failures += [f"run {number} ({name}): {problem}"] if problem else []
            shutil.rmtree(workdir, ignore_errors=True)
        print("\n" + table(rows))
        if not only or only in "bit flips":
            caught, tried = flips(whole / "checkpoints" / str(STEPS), flipped, chance)
            print(f"\nsingle bits flipped over all files of a checkpoint: {tried}, detected: {caught}")
            failures += [f"{tried - caught} flipped bits were not detected"] if caught < tried else []
        for name, chain in (("meshes", meshes), ("processes", processes)):
            if not only or only in name:
                said, problem = chain(made, whole)
                print(f"\n{name}: {said}")
                failures += [problem] if problem else []
    print(f"\n{sum(map(len, rows.values()))} disturbed runs in {(time.monotonic() - began) / 60:.0f} minutes")
    return failures


# --------------------------------------------------------------------------------------------------------- comparison
def difference(whole: Path, workdir: Path) -> str:
    """The first difference from the undisturbed run, "" if there is none: every record, every bit of the last state."""
    for kind in ("train", "evaluate"):
        ours, theirs = (
            [{k: v for k, v in r.items() if k not in CLOCKS} for r in records(directory) if r["kind"] == kind]
            for directory in (workdir, whole)
        )
        if [r["step"] for r in ours] != [r["step"] for r in theirs]:
            return f"{kind} lines of steps {[r['step'] for r in ours]}"
        for one, other in zip(ours, theirs, strict=True):
            if one != other:
                return f"{kind} line of step {one['step']}: {one} {other}"
    ours, theirs = last_state(workdir), last_state(whole)
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs or ours[name].tobytes() != theirs[name].tobytes():
            return f"the last state differs at {name}"
    return ""


def last_state(workdir: Path) -> dict:
    """{path: array} of the last checkpoint."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(workdir / "checkpoints" / str(STEPS) / "state")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def flips(checkpoint: Path, count: int, chance: random.Random) -> tuple[int, int]:
    """(detected, tried) flips of one bit each, spread over all files of a checkpoint, each undone again."""
    from etils import epath

    from steppe.lm.keep import seal

    seal.verify(epath.Path(checkpoint), STEPS)
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.stat().st_size]
    caught = 0
    for number in range(count):
        path = files[number % len(files)]
        content = path.read_bytes()
        harmed = bytearray(content)
        harmed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(harmed)
        try:
            seal.verify(epath.Path(checkpoint), STEPS)
        except seal.Broken:
            caught += 1
        path.write_bytes(content)
    return caught, count


def meshes(made: Bench, whole: Path) -> tuple[str, str]:
    """One run continued on data x fsdp = 1 x 8, 2 x 4, 8 x 1 (eight simulated devices)."""
    workdir = made.folder / "meshes"
    for step, (data, fsdp) in ((12, (1, 8)), (26, (2, 4)), (None, (8, 1))):
        run = start(made, workdir, f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", devices=8)
        stop_after(run, workdir, step)
    return spread(whole, workdir, "1 x 8, 2 x 4, 8 x 1")


def processes(made: Bench, whole: Path) -> tuple[str, str]:
    """One run continued by 1, 2 and 4 processes; the first of them alone is told to stop."""
    workdir = made.folder / "processes"
    for step, count in ((12, 1), (26, 2), (None, 4)):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        joined = (f"--coordinator=localhost:{port}", f"--num_processes={count}")
        more = [(*joined, f"--process_id={number}") if count > 1 else () for number in range(count)]
        runs = [start(made, workdir, *words) for words in more]
        stop_after(runs[-1], workdir, step)
        for run in runs:
            if run.wait(timeout=300) != (FINISHED if step is None else STOPPED):
                raise RuntimeError(f"{count} processes: status {run.returncode}: {log_of(workdir)}")
    return spread(whole, workdir, "1, 2 and 4 processes")


def stop_after(run: subprocess.Popen, workdir: Path, step: int | None) -> None:
    if step is not None:
        wait_until(run, seen(workdir, "train", step))
        run.send_signal(signal.SIGTERM)
    status = run.wait(timeout=300)
    if status != (FINISHED if step is None else STOPPED):
        raise RuntimeError(f"status {status}: {log_of(workdir)}")


def spread(whole: Path, workdir: Path, name: str) -> tuple[str, str]:
    """(how far the losses of a run are from those of the undisturbed one, what is wrong)."""
    ours, theirs = ([(r["step"], r["loss"]) for r in records(p) if r["kind"] == "train"] for p in (workdir, whole))
    if [step for step, _ in ours] != [step for step, _ in theirs]:
        return name, f"{name}: steps {[step for step, _ in ours]}"
    starts = [r["step"] for r in records(workdir) if r["kind"] == "run"]
    worst = max(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True))
    said = f"{name}, begun after steps {starts}: {len(ours)} losses within {worst:.1e} of the undisturbed run's"
    return said, f"{name}: losses differ by {worst}" if worst > 1e-4 else ""


def table(rows: dict) -> str:
    """The table in markdown."""
    lines = [
        "| disturbance | runs | starts | exit statuses | hit as planned | ended bitwise equal, no line lost or twice |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, entries in rows.items():
        statuses = collections.Counter(status for found, _, _ in entries for status in found)
        shown = ", ".join(f"{status} × {count}" for status, count in sorted(statuses.items()))
        equal, hits = sum(not problem for _, _, problem in entries), sum(hit for _, hit, _ in entries)
        lines.append(f"| {name} | {len(entries)} | {sum(statuses.values())} | {shown} | {hits} | {equal} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs every scenario in turn until --runs or --minutes are used up; returns 1 if any run was not as it must be."""
    parser = command.parser("exhaustive/chaos.py", __doc__, config=False)
    parser.add_argument("--runs", type=command.integer(1), default=60, metavar="N", help="disturbed runs")
    parser.add_argument(
        "--minutes", type=keys.number(least=0), default=40.0, metavar="M", help="begin no run after this many minutes"
    )
    parser.add_argument(
        "--seed", type=command.integer(), default=0, metavar="N", help="of the moments and files that are hit"
    )
    parser.add_argument(
        "--flips", type=command.integer(), default=400, metavar="N", help="single bits flipped in a checkpoint"
    )
    parser.add_argument("--only", default="", metavar="NAME", help="the scenarios whose name contains this")
    options = command.options_of(argv, parser)
    failures = disturb(options.runs, options.minutes, options.seed, options.flips, options.only)
    for failure in failures:
        print(f"NOT AS IT MUST BE: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
