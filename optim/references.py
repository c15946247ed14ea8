"""Optimizers from outside: the reference `FILE.py:NAME` or `a.module:NAME` can replace the name of a method or base.

    def half_sign(mix: Annotated[float, Option("share of the sign", *SHARE)] = 0.5) -> Ascent: ...

A method is a function that returns a direction (optim.ascent.Ascent) or a rule (optim.rule.Rule), or a row
(optim.methods.Method). A base is a function of the learning rate that returns an optax transformation. Parameters
annotated with an Option become options of the run (optim.options).
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from steppe.optim.options import Declared, options
from steppe.optim.rule import OptionError

ACCEPTED = "FILE.py:NAME or a.module:NAME"


class Source(NamedTuple):
    """A loaded reference. made: the named object. text: the text of its file, without the files that it imports."""

    reference: str
    made: Any
    text: str

    @property
    def digest(self) -> str:
        """sha256 of the text, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def declared(self) -> dict[str, Declared]:
        """{name: Declared} of its options."""
        return self.made.declared() if hasattr(self.made, "declared") else options(self.made)


def is_reference(name: str) -> bool:
    """Whether the name of a method or base is a reference."""
    return ":" in name


def load(key: str, reference: str) -> Source:
    """Runs the file of a reference, once per process. Raises OptionError for `key`, "method" or "base"."""
    path, _, name = reference.rpartition(":")
    try:
        with running(key, reference, "a file that runs", (FileNotFoundError, SyntaxError)):
            module, text = _module(path)
    except FileNotFoundError:
        raise OptionError(key, reference, f"{ACCEPTED}; there is no {path or 'file'} in {os.getcwd()}") from None
    except SyntaxError as error:
        raise OptionError(key, reference, f"a file that runs: line {error.lineno}: {error.msg}") from None
    made = getattr(module, name, None)
    if not callable(made) and not hasattr(made, "declared"):
        known = sorted(each for each, value in vars(module).items() if callable(value) and _own(value, module))
        raise OptionError(key, reference, f"the name of a function in that file: {', '.join(known) or 'it has none'}")
    origin = inspect.getsourcefile(made) if inspect.isroutine(made) else None  # another file if the module imported it
    if origin and not _own(made, module):
        text = Path(origin).read_text(encoding="utf-8")
    return Source(reference, made, text)


@contextlib.contextmanager
def running(key: str, reference: str, accepted: str, passed: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Runs a user's code, also as a decorator: what it raises becomes an OptionError with the line of the user's file.

    key: "method" or "base". passed: kinds of errors that stay as they are.
    """
    try:
        yield
    except (OptionError, *passed):
        raise
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        path = reference.rpartition(":")[0]
        path = os.path.abspath(getattr(sys.modules.get(path), "__file__", path))
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"line {lines[-1]}: " if lines else ""
        said = " ".join(f"{error}".split())[:300]
        raise OptionError(key, reference, f"{accepted}: {where}{type(error).__name__}: {said}") from None


@functools.cache
def _module(path: str) -> tuple[Any, str]:
    """Runs the module at a path or dotted name: (module, text of its file). Raises FileNotFoundError."""
    spec = None
    if not os.path.isfile(path):
        if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", path):
            with contextlib.suppress(ModuleNotFoundError):
                spec = importlib.util.find_spec(path)
        if spec is None or not spec.origin or not os.path.isfile(spec.origin):
            raise FileNotFoundError(path)
        return importlib.import_module(path), Path(spec.origin).read_text(encoding="utf-8")
    text = Path(path).read_text(encoding="utf-8")
    name = f"steppe_outside_{hashlib.sha256(f'{os.path.abspath(path)}:{text}'.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # annotations are looked up there
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name], text


def _own(value: Any, module: Any) -> bool:
    return getattr(value, "__module__", "") == module.__name__


def sources(names: Mapping[str, str]) -> dict[str, Source]:
    """{key: Source} of the references among {"method": name, "base": name}. Runs their files."""
    return {key: load(key, name) for key, name in names.items() if is_reference(name)}


def declared(names: Mapping[str, str]) -> dict[str, Declared]:
    """{option: Declared} of the references among {"method": name, "base": name}. Runs their files."""
    return {name: each for source in sources(names).values() for name, each in source.declared().items()}
