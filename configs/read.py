"""Reads a config from --config=FILE[:ARGUMENT] and the overrides of single keys.

Bad input raises a UsageError of one line that names the key or the file, the value and what is accepted.
"""

import functools
import importlib.machinery
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from steppe.configs import base, sizes
from steppe.configs.keys import TEXTS, Key, config_of, named
from steppe.configs.packages import ready

PACKAGE = "steppe.configs"  # its modules are the ready configs
Overrides = Sequence[tuple[str, str | None]]  # ("section.key", text), None for a flag without a value


class UsageError(ValueError):
    """Bad input on the command line. Its message is one line for the user."""


def read_config(path: str, overrides: Overrides = ()) -> ConfigDict:
    """The config of FILE[:ARGUMENT] with overrides applied: locked, its keys those of base.keys_of, its size resolved.

    If the overrides set optim.method, options of the file that this method lacks are reset to None, with a message on
    stderr. Raises UsageError.
    """
    return reader(path)(overrides)


def reader(path: str) -> Callable[[Overrides], ConfigDict]:
    """read(overrides) -> config, like read_config; many calls run FILE[:ARGUMENT] only once."""
    written = _written(path)

    @functools.cache  # prints each line once
    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def read(overrides: Overrides) -> ConfigDict:
        texts: dict[str, list[str | None]] = {}
        for key, text in overrides:
            texts.setdefault(key, []).append(text)
        # unconverted texts suffice: keys_of reads only the names of method and base
        known = base.keys_of(written | {key: given[-1] for key, given in texts.items()})
        values = {key: declared.default for key, declared in known.items()} | written
        values |= {key: _value(key, given, known) for key, given in texts.items()}
        if "optim.method" in texts:
            options = [name for name in named("optim.methods:OPTIONS") if f"optim.{name}" not in texts]
            method = values["optim.method"]
            dropped = named("optim.methods:foreign")(method, {name: values[f"optim.{name}"] for name in options})
            shown = ", ".join(f"config.optim.{name} = {values[f'optim.{name}']!r}" for name in dropped)
            values |= {f"optim.{name}": None for name in dropped}
            if dropped:
                say(
                    f"ignoring {shown} in {path}: config.optim.method = {method} {named('optim.methods:takes')(method)}"
                )
        for field, value in sizes.SIZES.get(values["model.size"], {}).items():
            if values[f"model.{field}"] != value and f"model.{field}" in texts:
                raise UsageError(
                    f"config.model.{field} = {values[f'model.{field}']}: must be left out, because config.model.size = "
                    f"{values['model.size']} sets it to {value}; or set config.model.size to nothing"
                )
        try:
            return sizes.resolve(config_of(known, values).lock())
        except ValueError as error:
            raise UsageError(error) from None

    return read


def shown(config: ConfigDict) -> str:
    """A config as the text of a Python file that --config can read."""
    lines = [f"    config.{key} = {value!r}" for key, value in _values(config).items()]
    head = ["from steppe.configs import base", "", "", "def get_config():", "    config = base.get_config()"]
    return "\n".join([*head, *lines, "    return config"])


def plain(value: Any) -> Any:
    """Converts a numpy scalar to a Python value; returns anything else unchanged."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


def call(flag: str, text: str, function: str, package: str) -> Any:
    """Calls `function` of a module, returns its result. text: NAME, a.dotted.MODULE or FILE, each also with :ARGUMENT.

    A NAME is a module of `package`. Raises UsageError for anything that fails in it.
    """
    name, colon, argument = text.partition(":")
    file = name
    try:
        if os.path.isfile(name):
            loader = importlib.machinery.SourceFileLoader("steppe_config", name)
            spec = importlib.util.spec_from_loader("steppe_config", loader)
        else:
            spec = _module(flag, name, function, package)
            file = spec.origin
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        called = getattr(module, function, None)
        if not callable(called):
            raise UsageError(f"{flag} = {name}: must define {function}(); see {package.removeprefix('steppe.')}")
        try:
            inspect.signature(called).bind(*([argument] if colon else []))
        except TypeError:
            accepted = f"{name} alone, because its {function} takes no argument" if colon else f"{name}:ARGUMENT"
            raise UsageError(f"{flag} = {text}: must be {accepted}; see the head of {file}") from None
        return called(*([argument] if colon else []))
    except UsageError:
        raise
    except SyntaxError as error:
        raise UsageError(f"{flag} = {name}: line {error.lineno}: {error.msg}") from None
    except SystemExit as error:
        raise UsageError(f"{flag} = {text}: it ended the program (SystemExit: {error}); it must return") from None
    except Exception as error:  # a user's file may raise anything: name the line
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f"line {lines[-1]}: " if lines else ""
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise UsageError(f"{flag} = {text}: {where}{kind}{str(error).strip(chr(34))}") from None


def _module(flag: str, name: str, function: str, package: str) -> importlib.machinery.ModuleSpec:
    names = ready(package, function)
    spec = None
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        with suppress(ImportError):
            spec = importlib.util.find_spec(name if "." in name else f"{package}.{name}")
    if spec is None or spec.origin is None:
        stem = Path(name).stem
        hint = named("optim.options:nearest")(stem, {name: f"{flag}={name}" for name in names})
        raise UsageError(f"{flag} = {name or 'nothing'}: must be one of {', '.join(names)}, a module or a file{hint}")
    return spec


def _written(path: str) -> dict[str, Any]:
    """{key: value} of FILE[:ARGUMENT]. Raises UsageError for unknown or missing keys and values of the wrong type."""
    config = call("--config", path, "get_config", PACKAGE)
    if not isinstance(config, ConfigDict):
        file = path.partition(":")[0]
        raise UsageError(f"--config = {file}: get_config must return a ConfigDict, not {type(config).__name__}")
    values = _values(config)
    known = base.keys_of(values)
    for key in values:
        if key not in known:
            raise UsageError(f"config.{key} in {path}: no such key{closest(key, list(known))}")
    for key, declared in known.items():
        if key not in values:
            raise UsageError(f"config.{key} is missing in {path}: start from configs/base.py, which holds every key")
        value = values[key] = plain(values[key])
        if not (declared.is_typed(value) or (value is None and declared.default is None)):
            raise UsageError(f"config.{key} = {value!r} in {path}: must be {_accepted(declared)}")
    return values


def _values(config: ConfigDict) -> dict[str, Any]:
    """{"section.key": value}; a section itself is not an entry."""
    flat = {}
    for key, value in config.items():
        flat |= {f"{key}.{k}": v for k, v in _values(value).items()} if isinstance(value, ConfigDict) else {key: value}
    return flat


def _value(key: str, texts: Sequence[str | None], known: Mapping[str, Key]) -> Any:
    """The value of one key from its texts on the command line. Raises UsageError."""
    if key not in known:
        inside = [name for name in known if name.startswith(f"{key}.")]
        if inside:
            raise UsageError(f"config.{key} is a section: set its keys one by one, such as --config.{inside[0]}=...")
        raise UsageError(f"config.{key}: no such key{closest(key, list(known))}")
    declared, given = known[key], [text for text in texts if text is not None]
    if declared.default is None and texts == ["None"]:
        return None
    kind = declared.accepted.kind
    wrong = f"config.{key} = {', '.join(text or 'nothing' for text in texts)}: must be "
    if kind is not tuple and len(texts) > 1:
        raise UsageError(f"{wrong}given once")
    with suppress(ValueError):
        if given == list(texts) or kind is bool:
            return declared.accepted.read(*given or ["true"])
    raise UsageError(wrong + _accepted(declared))


def _accepted(key: Key) -> str:
    """Describes the accepted values in an error about the type."""
    said = key.accepted.text()
    if key.accepted.kind is tuple and said != TEXTS.text():
        said = f"{TEXTS.text()}: {said}"
    return said + (", or None for its default" if key.default is None else "")


def closest(word: str, among: list[str]) -> str:
    """The end of an error line for an unknown key or option: the closest name, else how to list all names."""
    word, shown = word.split("=")[0], {name: name if name.startswith("-") else f"config.{name}" for name in among}
    last = {name.rpartition(".")[2]: full for name, full in shown.items()}  # a key under the wrong section, or none
    nearest = named("optim.options:nearest")
    said = nearest(word, shown) or nearest(word.rpartition(".")[2], last)
    return said or ("; --help lists the options" if word.startswith("-") else "; `steppe config` lists every key")
