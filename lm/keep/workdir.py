"""A run's directory: one process at a time, one config, one id; which keys may change on resume."""

import os
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from steppe.configs import base
from steppe.configs.keys import ConfigError, flatten
from steppe.data import files, stored
from steppe.data.errors import DataError
from steppe.lm.keep.exits import IN_USE, WorkdirError
from steppe.lm.parts.corpus import CORPUS

CONFIG, RUN, LOCK, CODE = "config.json", "run_id", "lock", "code.json"
WRITTEN = (CONFIG, RUN, LOCK, CORPUS, "metrics.jsonl", "loss.png", "wandb_id", "anomalies", CODE)  # in a workdir


def changes(before: Mapping | ConfigDict, now: Mapping | ConfigDict) -> dict[str, list]:
    """{key: [before, now]} of two nested configs, without free keys; a key that did not exist yet has its default.

    Raises ConfigError for keys that this version no longer has.
    """
    old, new = (flatten(base.completed(config)) for config in (before, now))
    if new["data.directory"]:  # older versions did not record what the directory was prepared from
        initial = flatten(base.get_config())
        old |= {key: new[key] for key in old if key.startswith("data.") and old[key] == initial[key]}
    return {key: [old[key], new[key]] for key in sorted(old) if key not in base.FREE and old[key] != new[key]}


def adopt(workdir: str, config: ConfigDict) -> None:
    """Sets keys that the run's version did not have, if they have their defaults, to the run's implicit values."""
    path = Path(workdir) / CONFIG
    if not path.exists():
        return
    known, flat = flatten(_read(path)), flatten(config.to_dict())
    for name, value in base.former(base.with_defaults(known), known).items():
        if flat[name] == base.keys()[name].default:
            config.update_from_flattened_dict({name: value})


def is_new(workdir: str) -> bool:
    """Whether no run has used the workdir yet."""
    return not os.path.exists(Path(workdir) / CONFIG)


def check(workdir: str, config: ConfigDict, allow: Collection[str] = ()) -> None:
    """Raises WorkdirError or ConfigError where `claim` would refuse this config, reading only."""
    directory, path = Path(workdir), Path(workdir) / CONFIG
    unknown = sorted(set(allow) - {*flatten(config.to_dict()), "corpus", "code"})
    if unknown:
        raise WorkdirError(f"--allow_change={unknown[0]}: must name keys of the config, corpus or code")
    for name in WRITTEN:
        if (directory / name).is_symlink():
            raise WorkdirError(f"{directory / name}: is a link, and a run would write through it; remove it")
    differing = changes(_read(path), config.to_dict()) if path.exists() else {}
    if refused := [key for key in differing if key not in allow]:
        first, others = refused[0], f" (also differing: {', '.join(refused[1:])})" if refused[1:] else ""
        raise ConfigError(
            first,
            differing[first][1],
            f"{differing[first][0]!r} to resume the run in {workdir}{others}; use another workdir for a new "
            f"run, or --allow_change={','.join(refused)} to change it from here on",
        )


@contextmanager
def claim(workdir: str, config: ConfigDict, primary: bool, allow: Collection[str] = ()) -> Iterator[str]:
    """Locks a workdir for this config while the `with` block runs; yields the run's id ("" unless primary).

    Creates a new workdir and stores the config. Raises WorkdirError if another process uses the workdir, or for an
    unknown key in `allow`. Raises ConfigError if the stored config differs: it names the first key, both values, and
    the other keys. Free keys and those in `allow` may differ. Only process 0 locks and writes.
    """
    directory = Path(workdir)
    check(workdir, config, allow)
    if not primary:
        yield ""
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"{directory}: cannot be created ({error.strerror or error})") from None
    with alone(directory / LOCK, str(directory)):
        check(workdir, config, allow)  # again, because the previous holder may have begun it
        files.write_json(directory / CONFIG, config.to_dict())
        if not (directory / RUN).exists():
            files.write(directory / RUN, uuid.uuid4().hex)
        yield id_of(directory)


@contextmanager
def alone(lock: Path, workdir: str) -> Iterator[None]:
    """Holds a lock of a workdir. Raises WorkdirError if another process holds it."""
    try:
        with files.lock(lock):
            yield
    except files.Held as held:
        raise WorkdirError(f"{workdir}: {IN_USE} {held.holder}; wait for it, or stop it") from None


def id_of(directory: str | os.PathLike) -> str:
    """The id of a workdir's run. Raises WorkdirError if it has none."""
    path = Path(directory) / RUN
    try:
        return stored.content_of(path, 1000).decode("ascii").strip()
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path}: must hold the id of the run ({' '.join(str(error).split())[:200]})") from None


def config_of(workdir: str) -> ConfigDict:
    """A run's config; keys that its version did not have are at their defaults. Treat it as data: keep.saved decides
    whether its URLs and modules may be used. Raises WorkdirError if it is absent or invalid.
    """
    path = Path(workdir) / CONFIG
    if not os.path.exists(path):
        raise WorkdirError(f"{workdir}: must be the workdir of a run, with a {CONFIG}")
    found = base.completed(_read(path))
    try:
        for name, key in base.stored_keys(flat := flatten(found)).items():
            key.check(name, flat[name])
    except ConfigError as error:
        raise WorkdirError(f"{path}: {error}") from None
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = stored.read(path, dict[str, Any])
        stored.typed(flatten(found), stored.Flat, str(path))
    except DataError as error:
        raise WorkdirError(f"{error}; remove it to take the config given") from None
    return found
