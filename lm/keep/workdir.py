"""The directory of a run: one process at a time, one config, one id; which keys may change when it continues."""

import errno
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from steppe.lm.run.check import ConfigError

CONFIG, RUN, LOCK = "config.json", "run_id", "lock"
# Keys that do not change what a run computes, beyond the order of sums.
FREE = (
    *("mesh.", "curvature.", "log.", "sample.", "model.attention", "model.remat", "model.readout_chunk"),
    *("checkpoint.every", "checkpoint.minutes", "checkpoint.keep", "checkpoint.keep_every"),
    *("data.directory", "data.cache", "data.verify", "data.prefetch", "data.workers", "data.tfds_dir"),
)


class WorkdirError(RuntimeError):
    """The workdir cannot be used for this run; one line."""


def flatten(config: dict, prefix: str = "") -> dict:
    """{"optim.rho": 0.1, ...} of a nested dict; tuples as lists, as JSON has them."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def changes(before: dict, now: dict) -> dict[str, list]:
    """{key: [value before, value now]} of two configs as nested dicts, FREE keys left out; "absent" where missing."""
    old, new = flatten(before), flatten(now)
    return {
        key: [old.get(key, "absent"), new.get(key, "absent")]
        for key in sorted({*old, *new})
        if not key.startswith(FREE) and old.get(key, "absent") != new.get(key, "absent")
    }


def is_new(workdir: str) -> bool:
    """Whether no run has taken the workdir yet."""
    return not (Path(workdir) / CONFIG).exists()


@contextmanager
def claim(workdir: str, config: ConfigDict, primary: bool, allow: Collection[str] = ()) -> Iterator[str]:
    """Holds a workdir for this config while the `with` block runs; gives the run's id ("" unless primary).

    A new or empty workdir is made and takes the config. One that another process holds is a WorkdirError. One of
    another config is a ConfigError naming the first key that differs, both values, and the other keys; FREE keys and
    those in `allow` may differ. WorkdirError for a key of `allow` that is none. Only process 0 locks and writes.
    """
    directory, path = Path(workdir), Path(workdir) / CONFIG
    unknown = sorted(set(allow) - {*flatten(config.to_dict()), "corpus"})
    if unknown:
        raise WorkdirError(f"--allow_change={unknown[0]}: must name keys of the config, or corpus")
    lock = None
    try:
        if primary:
            directory.mkdir(parents=True, exist_ok=True)
            lock = _lock(directory)
        if path.exists():
            differing = changes(_read(path), config.to_dict())
            refused = [key for key in differing if key not in allow]
            if refused:
                first, others = refused[0], f" (also differing: {', '.join(refused[1:])})" if refused[1:] else ""
                raise ConfigError(
                    first, differing[first][1],
                    f"{differing[first][0]!r} to continue the run in {workdir}{others}; take another for a new run, or "
                    f"--allow_change={','.join(refused)} to change it from here on",
                )  # fmt: skip
        run = ""
        if primary:
            _write(path, json.dumps(config.to_dict(), indent=1))
            if not (directory / RUN).exists():
                _write(directory / RUN, uuid.uuid4().hex)
            run = (directory / RUN).read_text().strip()
        yield run
    finally:
        if lock is not None:
            os.close(lock)  # which gives up the lock, as the end of the process would


def config_of(workdir: str) -> dict:
    """The config of a run, as a nested dict. WorkdirError if there is none."""
    path = Path(workdir) / CONFIG
    if not path.exists():
        raise WorkdirError(f"{workdir}: must be the workdir of a run, with a {CONFIG}")
    return _read(path)


def _lock(directory: Path) -> int:
    number = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(number, 200, 0).decode(errors="replace").strip()
        os.close(number)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise  # a file system without locks: say so rather than run unprotected
        raise WorkdirError(
            f"{directory}: is in use by {holder or 'another process'}; wait for it, or stop it"
        ) from None
    os.ftruncate(number, 0)
    os.pwrite(number, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return number


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise WorkdirError(f"{path}: is damaged ({error}); remove it to take the config given") from None


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
