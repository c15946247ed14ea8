"""What it costs to begin a run of a sweep: in a process of its own, and in a worker that has had others, in one call.

    python tests/bench/sweep.py [--runs=N] [--config=study]

Runs of a few steps, which differ in seed and rho, on one core. The first compiles; `alone` and `worker` are seconds of
a run after it, medians, with its programs kept on disk for both.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from steppe.configs.read import read_config
from steppe.scripts import command, process
from steppe.scripts.sweep.worker import Worker


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Prints the seconds of a run; returns the exit status, 2 for bad input."""
    parser = command.parser("tests/bench/sweep.py", __doc__)
    parser.add_argument("--steps", type=command.integer(1), default=2, metavar="N", help="of a run")
    parser.add_argument("--runs", type=command.integer(2), default=5, metavar="N", help="of each sort")
    path, overrides, options = command.parse_unread(argv, parser)
    read_config(path or "study", overrides)
    core = sorted(os.sched_getaffinity(0))[:1] if hasattr(os, "sched_getaffinity") else [0]
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

        def arguments(name: str, number: int) -> list[str]:
            keys = {"seed": number, "optim.method": "functional_sam", "optim.rho": 0.01 * (1 + number)}
            keys |= {"train.duration": f"{options.steps} steps", "evaluate.batches": 1}
            flags = [f"--config.{key}={value}" for key, value in {**keys, **dict(overrides)}.items()]
            return [f"--config={path or 'study'}", *flags, f"--workdir={folder}/{name}{number}"]

        def alone(number: int) -> float:
            line = [sys.executable, "-P", "-m", "steppe.scripts.train", *arguments("alone", number)]
            began = time.monotonic()
            subprocess.run(line, env=environment, check=True, stdout=subprocess.DEVNULL)
            return time.monotonic() - began

        worker = Worker(core, environment)

        def warm(number: int) -> float:
            began = time.monotonic()
            worker.start(arguments("warm", number), Path(folder, "log"))
            while (found := worker.poll()) is None:
                time.sleep(0.005)
            if found[0]:
                raise RuntimeError(Path(folder, "log").read_text())
            return time.monotonic() - began

        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, core)
        first = alone(0)
        warm(0)
        turns = [(alone(number), warm(number)) for number in range(1, options.runs + 1)]
        worker.close()
    each = [statistics.median(seconds) for seconds in zip(*turns, strict=True)]
    print(
        f"seconds of a run of {options.steps} steps: the first {first:.2f}, alone {each[0]:.2f}, worker {each[1]:.2f}"
    )
    print(f"worker / alone {each[1] / each[0]:.2f}; in it, the evaluation of the whole held-out text")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
