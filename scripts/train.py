"""Pretrain a language model; run again on the same workdir to continue.

python -m scripts.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.optim.rho=0.1 ...]
"""

import sys
from collections.abc import Sequence

from scripts import command


def main(argv: Sequence[str]) -> int:
    """Runs or continues a training run; returns the exit status, 2 for bad input."""
    parser = command.parser("train", __doc__.splitlines()[0])
    parser.add_argument(
        "--workdir", required=True, type=command.writable_directory, help="where the run lives: metrics, checkpoints"
    )
    hosts = parser.add_argument_group("several processes, one per host or GPU, each started with the same command")
    hosts.add_argument(
        "--distributed", action="store_true", help="join the processes that SLURM or the TPU pod started"
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="join the processes that meet at process 0, there")
    hosts.add_argument("--num_processes", type=int, metavar="N", help="with --coordinator: how many there are")
    hosts.add_argument("--process_id", type=int, metavar="I", help="with --coordinator: which one this is, from 0")
    config, options = command.parse(argv, parser)

    placed = (options.coordinator, options.num_processes, options.process_id)
    if placed != (None, None, None) and (None in placed or not 0 <= options.process_id < options.num_processes):
        return command.fail(
            f"--coordinator={options.coordinator} --num_processes={options.num_processes} "
            f"--process_id={options.process_id}: must be given together, with 0 <= process_id < num_processes"
        )
    import jax

    if options.coordinator:
        jax.distributed.initialize(*placed)
    elif options.distributed:
        jax.distributed.initialize()

    from data.errors import DataError
    from lm.check import ConfigError, check

    try:
        check(
            config,
            device_count=jax.device_count(),
            process_count=jax.process_count(),
            backend=jax.default_backend(),
        )
        from lm import train

        return train.run(config, options.workdir)
    except (ConfigError, DataError) as error:
        return command.fail(error) if jax.process_index() == 0 else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
