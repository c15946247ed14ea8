"""One of several processes: many fresh runs of a small model, each with a whole evaluation, compiled once.

python many_runs.py INDEX PROCESSES HOST:PORT RUNS FOLDER KEY=VALUE ...
"""

import sys


def main() -> None:
    """Leaves FOLDER/K/metrics.jsonl of every run."""
    index, count, meet, runs, folder, *keys = sys.argv[1:]
    import jax

    if int(count) > 1:
        jax.distributed.initialize(meet, int(count), int(index), heartbeat_timeout_seconds=60)
    from steppe.configs.read import read_config
    from steppe.lm.parts.check import check
    from steppe.lm.parts.memo import Memo
    from steppe.lm.run import train
    from steppe.scripts import process

    process.ready_to_compute()
    memo, settings = Memo(), [tuple(key.split("=", 1)) for key in keys]
    for run in range(int(runs)):
        config = read_config("quickstart", settings)
        check(config, device_count=jax.device_count(), process_count=jax.process_count(), backend="cpu")
        with memo:
            status = train.run(config, f"{folder}/{run}")
        assert status == 0, status


if __name__ == "__main__":
    main()
