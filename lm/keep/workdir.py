"""The directory of a run: one process at a time, one config, one id; which keys may change when it continues."""

import os
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from steppe.configs import base
from steppe.configs.keys import ConfigError, flatten, slot
from steppe.data import files, stored
from steppe.data.errors import DataError
from steppe.lm.keep.exits import IN_USE, WorkdirError
from steppe.lm.parts.corpus import CORPUS

CONFIG, RUN, LOCK, CODE = "config.json", "run_id", "lock", "code.json"
WRITTEN = (CONFIG, RUN, LOCK, CORPUS, "metrics.jsonl", "loss.png", "wandb_id", "anomalies", CODE)  # below a workdir


def changes(before: Mapping | ConfigDict, now: Mapping | ConfigDict) -> dict[str, list]:
    """{key: [before, now]} of two nested configs, free keys left out; a key that was not there yet has its default.

    Raises ConfigError for keys that this version has no longer.
    """
    old, new = (flatten(base.completed(config)) for config in (before, now))
    if new["data.directory"]:  # runs did not always record what their directory was prepared from
        initial = flatten(base.get_config())
        old |= {key: new[key] for key in old if key.startswith("data.") and old[key] == initial[key]}
    return {key: [old[key], new[key]] for key in sorted(old) if key not in base.FREE and old[key] != new[key]}


def adopt(workdir: str, config: ConfigDict) -> None:
    """Sets keys that a run's version did not have, and that are at their defaults, to what that run does by them."""
    path = Path(workdir) / CONFIG
    if not path.exists():
        return
    known, flat = flatten(_read(path)), flatten(config.to_dict())
    for name, value in base.former(base.with_defaults(known), known).items():
        if flat[name] == base.keys()[name].default:
            section, key = slot(config, name)
            section[key] = value


def is_new(workdir: str) -> bool:
    """Whether no run has taken the workdir yet."""
    return not os.path.exists(Path(workdir) / CONFIG)


@contextmanager
def claim(workdir: str, config: ConfigDict, primary: bool, allow: Collection[str] = ()) -> Iterator[str]:
    """Holds a workdir for this config while the `with` block runs; gives the run's id ("" unless primary).

    A new or empty workdir is made and takes the config. One that another process holds is a WorkdirError. One of
    another config is a ConfigError naming the first key that differs, both values, and the other keys; free keys and
    those in `allow` may differ. WorkdirError for a key of `allow` that is none. Only process 0 locks and writes.
    """
    directory, path = Path(workdir), Path(workdir) / CONFIG
    unknown = sorted(set(allow) - {*flatten(config.to_dict()), "corpus", "code"})
    if unknown:
        raise WorkdirError(f"--allow_change={unknown[0]}: must name keys of the config, corpus or code")
    with ExitStack() as stack:
        if primary:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise WorkdirError(f"{directory}: cannot be made ({error.strerror or error})") from None
            for name in WRITTEN:
                if (directory / name).is_symlink():
                    raise WorkdirError(f"{directory / name}: is a link, and a run would write through it; remove it")
            try:
                stack.enter_context(files.lock(directory / LOCK))
            except files.Held as held:
                raise WorkdirError(f"{directory}: {IN_USE} {held.holder}; wait for it, or stop it") from None
        if path.exists():
            differing = changes(_read(path), config.to_dict())
            refused = [key for key in differing if key not in allow]
            if refused:
                first, others = refused[0], f" (also differing: {', '.join(refused[1:])})" if refused[1:] else ""
                raise ConfigError(
                    first,
                    differing[first][1],
                    f"{differing[first][0]!r} to continue the run in {workdir}{others}; take another for a new run, or "
                    f"--allow_change={','.join(refused)} to change it from here on",
                )
        run = ""
        if primary:
            files.write_json(path, config.to_dict())
            if not (directory / RUN).exists():
                files.write(directory / RUN, uuid.uuid4().hex)
            run = id_of(directory)
        yield run


def id_of(directory: str | os.PathLike) -> str:
    """The id of the run of a workdir. WorkdirError where it has none."""
    path = Path(directory) / RUN
    try:
        return stored.content_of(path, 1000).decode("ascii").strip()
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path}: must hold the id of the run ({' '.join(str(error).split())[:200]})") from None


def config_of(workdir: str) -> ConfigDict:
    """The config of a run, keys that its version did not have at their defaults. It is data: whoever follows what it
    names outside of the workdir must be told to (keep.saved). WorkdirError if there is none, or one that none can be.
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
