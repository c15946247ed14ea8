"""Pretrain a language model; run the command again on the same workdir to resume.

steppe train --config=quickstart --workdir=runs/quickstart [--config.optim.rho=0.1 ...]
"""

import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import PurePath

from steppe.configs import base
from steppe.configs.keys import ConfigError, flatten
from steppe.scripts import command, process

NEXT = (
    "steppe generate --workdir={0}",
    "steppe curvature --workdir={0}",
    "steppe export --workdir={0} --out=models/{1}",
)


def main(argv: Sequence[str]) -> int:
    """Starts or resumes a training run; returns the exit status, 2 for bad input."""
    parser = command.parser("train", command.headline(__doc__))
    add = parser.add_argument
    add(
        "--workdir",
        required=True,
        type=command.workdir,
        help="directory or URL (s3://bucket/run) for metrics and checkpoints",
    )
    add("--branch_from", metavar="RUN[@STEP]", help="start a new run from another run's state: config.branch_from")
    add(
        "--allow_change", default="", metavar="KEY,KEY", help="config keys that may differ from those of the stored run"
    )
    add(
        "--replay_step",
        type=command.integer(1),
        metavar="K",
        help="repeat step K of the run in --workdir and print its details; writes nothing",
    )
    add(
        "--until",
        type=command.integer(1),
        metavar="K",
        help="save a checkpoint after step K and exit with status 0; run again without it to resume",
    )
    command.add_trust(parser)
    hosts = parser.add_argument_group("several processes, one per host or GPU, each started with the same command")
    hosts.add_argument(
        "--distributed", action="store_true", help="join the processes that SLURM or the TPU pod started"
    )
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="join the processes at this address of process 0")
    hosts.add_argument("--num_processes", type=command.integer(1), help="with --coordinator: the number of processes")
    hosts.add_argument(
        "--process_id", type=command.integer(), metavar="I", help="with --coordinator: index of this process, from 0"
    )
    hosts.add_argument(
        "--heartbeat",
        type=command.integer(1),
        default=60,
        metavar="S",
        help="seconds without an answer after which a process counts as lost",
    )
    config, options = command.parse(argv, parser)
    if options.branch_from is not None:
        if config.branch_from:
            return process.fail(f"--branch_from={options.branch_from}: must be left out with --config.branch_from")
        config.branch_from = options.branch_from

    placed = (options.coordinator, options.num_processes, options.process_id)
    if placed != (None, None, None) and (None in placed or not 0 <= options.process_id < options.num_processes):
        return process.fail(
            f"--coordinator={options.coordinator} --num_processes={options.num_processes} "
            f"--process_id={options.process_id}: must be given together, with 0 <= process_id < num_processes"
        )
    if options.coordinator and (problem := _unreachable(options.coordinator)):
        return process.fail(f"--coordinator={options.coordinator}: must be HOST:PORT of process 0; {problem}")
    flat = flatten(config)
    try:  # what can be refused before jax starts, before anything is said
        for name, key in base.keys_of(flat).items():
            key.check(name, flat[name])
    except ConfigError as error:
        return process.fail(error)
    if not (options.coordinator or options.distributed):  # the first of several processes is not known yet
        process.say(f"starting    {options.workdir}")
    process.ready_to_compute()
    import jax

    if options.coordinator or options.distributed:
        try:
            # When a process stops answering, JAX ends the others. Started again, the run resumes from its checkpoint.
            jax.distributed.initialize(*placed, heartbeat_timeout_seconds=options.heartbeat)
        except (ValueError, RuntimeError) as error:
            flag = f"--coordinator={options.coordinator}" if options.coordinator else "--distributed"
            return process.fail(f"{flag}: the processes could not connect to each other: {error}")

    from steppe.lm.keep import exits
    from steppe.lm.parts.check import check
    from steppe.lm.run import replay, train

    try:
        check(config, device_count=jax.device_count(), process_count=jax.process_count(), backend=jax.default_backend())
        if options.replay_step is not None:
            replay.replay(config, options.workdir, options.replay_step)
            return 0
        allowed = [key.removeprefix("config.") for key in options.allow_change.split(",") if key]
        status = train.run(config, options.workdir, allowed, options.until, options.trust)
        if status == exits.FINISHED and options.until is None and jax.process_index() == 0:
            names = map(shlex.quote, (options.workdir, PurePath(options.workdir).name))
            process.say("next        " + "\n            ".join(NEXT).format(*names))
        return status
    except exits.REFUSALS as error:
        return process.fail(error) if jax.process_index() == 0 else exits.REFUSED
    except OSError as error:
        if error.errno in process.NO_NAME:
            return process.fail(f"{error.filename or 'a path of the config'}: {error.strerror or error}")
        process.fail(f"stopped: {error}; the stored files are intact: mend this and run the same command again")
        return exits.STORAGE


def _unreachable(coordinator: str) -> str:
    """Why HOST:PORT cannot be reached, or "". Checked here because JAX may end the process over it."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        return "PORT is a number from 1 to 65535"
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, UnicodeError) as error:
        return f"{host} cannot be resolved ({' '.join(str(error).split())})"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
