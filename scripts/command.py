"""What every command line shares: a config file with overrides, options, and one line for bad input.

    config, options = command.parse(argv, parser)

reads `--config=NAME[:ARGUMENT] --config.section.key=value ...` through ml_collections' config flags and everything else
through the argparse `parser`. Bad input of any kind ends the process with status 2 and one line on standard error that
names the key, the value and what is accepted; only a bug shows a traceback. Importing this imports no jax.
"""

import argparse
import ast
import contextlib
import copy
import ctypes
import difflib
import errno
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import math
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from steppe.configs import base, packages, sizes
from steppe.configs.keys import named, slot
from steppe.data import files
from steppe.lm.keep.exits import REFUSALS, REFUSED, STORAGE

_HELP = """
config:
  --config=NAME[:ARGUMENT]      a ready config ({ready}), a dotted module, or a Python file, with
                                get_config([ARGUMENT])
  --config.section.key=value    changes one key; `steppe config` explains every key; None gives a key its default
  --print_config                prints the config that results, if it can run, and stops
"""


def refusing(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """A command's main that answers bad input of any kind, of the line or of what it names, with one line and 2, and
    storage that fails with one line and 74."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        except (UsageError, *REFUSALS) as error:
            return fail(error)
        except ImportError as error:
            if not (said := packages.explain(error)):
                raise
            return fail(said)
        except BrokenPipeError:  # whoever reads the output has seen enough: cli.main knows
            raise
        except OSError as error:
            fail(error if error.errno is None else f"{error.filename or 'storage'}: {error.strerror or error}")
            return REFUSED if error.errno in NO_NAME else STORAGE

    return guarded


NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)  # of names that are no such file


class UsageError(ValueError):
    """Bad input on the command line; its message is the one line shown."""


class Parser(argparse.ArgumentParser):
    """One whose errors are a UsageError, in place of the usage. takes_config: whether the command takes --config."""

    takes_config = True

    def error(self, message: str) -> NoReturn:
        _raise_usage(message)


def parser(name: str, summary: str | None, *, config: bool = True) -> Parser:
    """The Parser of `steppe NAME`; summary: its description, a module's docstring.

    config: whether the command takes --config.
    """
    made = Parser(
        prog=f"steppe {name}",
        description=summary,
        epilog=_HELP.format(ready=", ".join(ready("steppe.configs", "get_config"))) if config else "",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.takes_config = config
    return made


def run_parser(name: str, summary: str | None) -> Parser:
    """A parser of a command that asks something of one run's model: --workdir and --step."""
    made = parser(name, summary, config=False)
    made.add_argument("--workdir", required=True, help="the run")
    made.add_argument("--step", type=integer(), metavar="K", help="its checkpoint after K steps; default: the newest")
    add_weights(made)
    add_trust(made)
    return made


def add_weights(made: argparse.ArgumentParser) -> None:
    """The option that says which of a run's weights are meant."""
    help = "last, an average it keeps (ema, lawa), or the average of its base; default: those it is judged by"
    made.add_argument("--weights", metavar="NAME", help=help)


def add_trust(made: argparse.ArgumentParser) -> None:
    """The option by which a user stands up for what a stored config names outside of its workdir."""
    help = "follow the addresses and modules that the run's stored config names: only of runs that are your own"
    made.add_argument("--trust", action="store_true", help=help)


def add_only(made: argparse.ArgumentParser) -> None:
    """The option that chooses among runs by their configs; sweep.spec.matching reads it."""
    made.add_argument("--only", action="append", default=[], metavar="KEY=V,V", help="now just the runs that match")


MOST = 2**31 - 1  # of a number on the command line, unless it says otherwise: what an index of an array can be


def integer(low: int = 0, high: int = MOST) -> Callable[[str], int]:
    """What reads a whole number from low to high, for add_argument(type=...)."""

    def read(text: str) -> int:
        if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not low <= int(text) <= high:
            bound = f">= {low}" if high == MOST else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text or 'nothing'}: must be an integer {bound}")
        return int(text)

    return read


def number(low: float = 0.0, *, above: bool = False) -> Callable[[str], float]:
    """What reads a finite number of at least `low`, or above it."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf or (above and value == low):
            bound = f"{'>' if above else '>='} {low:g}"
            raise argparse.ArgumentTypeError(f"{text or 'nothing'}: must be a finite number {bound}")
        return value

    return read


def pattern(text: str) -> str:
    """A regular expression, for add_argument(type=...)."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text or 'nothing'}: must be a regular expression ({error})") from None
    return text


def of_key(key: str) -> Callable[[str], str]:
    """What reads a text that a config key accepts."""

    def read(text: str) -> str:
        accepted = base.keys()[key].accepted
        if not accepted.allows(text):
            raise argparse.ArgumentTypeError(f"{text or 'nothing'}: must be {accepted.wanted(text)}")
        return text

    return read


def parse(argv: Sequence[str], parser: Parser) -> tuple[ConfigDict, argparse.Namespace]:
    """Reads a command line (without the program's name) into (config, options); exits with status 2 on bad input.

    The config is locked, holds exactly the keys of configs/base.py and its `model.size` is resolved.
    """
    path, overrides, options = parse_unread(argv, parser)
    try:
        return read_config(required(path), overrides), options
    except UsageError as error:
        sys.exit(fail(error))


def options_of(argv: Sequence[str], parser: Parser) -> argparse.Namespace:
    """The options of a command that takes no config; exits with status 2 on bad input."""
    return parse_unread(argv, parser)[2]


def required(path: str | None) -> str:
    """--config as given. UsageError where it is missing."""
    if path is None:
        raise UsageError("--config is missing: name a config, such as --config=quickstart")
    return path


def parse_unread(
    argv: Sequence[str], parser: Parser
) -> tuple[str | None, list[tuple[str, str | None]], argparse.Namespace]:
    """(--config or None, its overrides as read_config takes them, options); exits with status 2 on bad options.

    A command may take its config as an argument `config` as well. --print_config is answered here, with status 0.
    """
    if "_ARGCOMPLETE" in os.environ:
        complete(parser)
    try:
        plain, path, overrides, printing = _split(argv)
        if not parser.takes_config and (path is not None or overrides or printing):
            raise UsageError(f"--config: must be left out; {parser.prog} takes none (a run's own config counts)")
        if printing:  # needs nothing else
            for each in (*parser._actions, *parser._mutually_exclusive_groups):
                each.required = False
        options, unknown = _parsed(parser, plain)
        if path is not None and getattr(options, "config", None):
            raise UsageError("--config: must be given once")
        path = path or getattr(options, "config", None)
        if unknown and not unknown[0].startswith("-"):
            raise UsageError(f"{unknown[0]}: must be left out; arguments are --options and --config.key=value")
        if unknown:
            known = [string for action in parser._actions for string in action.option_strings]
            known += ["--config", "--print_config"] if parser.takes_config else []
            raise UsageError(f"{unknown[0].split('=')[0]}: no such option{_closest(unknown[0], known)}")
        if printing:
            config = read_config(required(path), overrides)
            named("lm.parts.check:check")(config, device_count=None)
            print(shown(config))
            sys.exit(0)
        return path, overrides, options
    except (UsageError, *REFUSALS) as error:
        sys.exit(fail(error))


def _parsed(parser: Parser, given: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What argparse makes of arguments. It takes "--" for the end of the options also where it is an option's value,
    and then reads the option with none."""
    for argument in given:
        if argument.endswith("=--") and argument.startswith("-"):
            raise UsageError(f"{argument.removesuffix('=--')}=--: must have another value")
    return parser.parse_known_args(given)


def shown(config: ConfigDict) -> str:
    """A config as a Python file that --config reads again."""
    flat = _flat(config)
    lines = [f"    config.{key} = {flat[key]!r}" for key in list(base.keys())]
    head = ["from steppe.configs import base", "", "", "def get_config():", "    config = base.get_config()"]
    return "\n".join([*head, *lines, "    return config"])


def names(package: str, function: str, *more: str) -> Callable[..., list[str]]:
    """An argcomplete completer of the modules of a package that define a function, other words, and Python files."""

    def offered(prefix: str = "", **_) -> list[str]:
        from argcomplete.completers import FilesCompleter

        return [*more, *ready(package, function), *FilesCompleter(["py"])(prefix)]

    return offered


def complete_by(argument: Any, completer: Callable[..., list[str]]) -> None:
    """Names what argcomplete asks for the values of an argument of a parser."""
    argument.completer = completer


def complete(parser: Parser) -> None:
    """Answers a shell that asks to complete a command line, through argcomplete, and ends the process."""
    import argcomplete

    if parser.takes_config:
        complete_by(parser.add_argument("--config"), names("steppe.configs", "get_config"))
        parser.add_argument("--print_config", action="store_true")
        if "--config." in os.environ["COMP_LINE"]:
            for key, declared in base.keys().items():
                offered = parser.add_argument(f"--config.{key}", help=declared.meaning.replace("%", "%%"))
                complete_by(offered, lambda declared=declared, **_: declared.accepted.names())
    argcomplete.autocomplete(parser, always_complete_options="long")


def writable_directory(text: str) -> Path:
    """An argparse type: the path of a local directory that can be written to, or made; ~ is the user's own."""
    refused = argparse.ArgumentTypeError(f"{text or 'nothing'}: must be a writable directory, or one that can be made")
    if files.is_remote(text):
        address = "the --workdir of a run may be an address"
        raise argparse.ArgumentTypeError(f"{text}: must be a directory of this machine's file system; {address}")
    try:
        path = Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)
        place = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        usable = bool(text) and place.is_dir() and os.access(place, os.W_OK)
    except (OSError, RuntimeError, ValueError):  # a name too long, an unknown user, a null byte
        raise refused from None
    if not usable:
        raise refused
    return path


def workdir(text: str) -> str:
    """An argparse type: a writable directory, or an address that fsspec knows the driver of."""
    if not files.is_remote(text):
        return str(writable_directory(text))
    import fsspec  # here: no other command line needs it

    scheme = text.partition("://")[0]
    if scheme not in fsspec.available_protocols() or not text.partition("://")[2].strip("/"):
        raise argparse.ArgumentTypeError(f"{text}: must be a directory, or an address such as s3://bucket/run")
    return text


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h
COMPILED = 2 << 30  # bytes of compiled programs that are kept, those that were used last


def ready_to_compute() -> None:
    """What a process does before jax starts: memory and compiled programs are kept from one use to the next."""
    keep_memory()
    keep_programs()


def keep_programs() -> None:
    """Has jax keep what it compiles in the user's cache, by kind of processor, unless JAX_COMPILATION_CACHE_DIR is set:
    to another place, or to nothing."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    try:  # a program is only sure to run on the kind of processor that it was compiled on
        said = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        kind = "\n".join(line for line in said if line.startswith(("model name", "flags", "Features", "CPU part")))
    except OSError:
        kind = socket.gethostname()
    place = Path(files.user_cache()) / "compiled" / hashlib.sha256(kind.encode()).hexdigest()[:12]
    _drop_unfinished(place)
    jax.config.update("jax_compilation_cache_dir", str(place))
    jax.config.update("jax_compilation_cache_max_size", COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _drop_unfinished(place: Path) -> None:
    """Removes programs of which a kill or a full disk left a part.

    jax writes a program, then the time of its use. It never replaces one that it cannot read, and writes no more where
    a time is missing.
    """
    if not place.is_dir():
        return
    import filelock

    with contextlib.suppress(OSError, filelock.Timeout), filelock.FileLock(place / ".lockfile", timeout=0):
        for program in place.glob("*-cache"):
            time_of_use = program.with_name(program.name.removesuffix("-cache") + "-atime")
            if not time_of_use.is_file() or time_of_use.stat().st_size != 8:
                program.unlink()


def keep_memory() -> None:
    """Has glibc's malloc keep what a step frees for the next step, unless MALLOC_* or GLIBC_TUNABLES say otherwise.

    XLA's CPU client takes the temporaries of every execution from malloc, which hands back to the kernel whatever is
    larger than 32 MiB, and all of an arena that is not the first: each step would pay for new, zeroed pages.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another libc, or none that can be opened
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_ARENA_MAX, 1)


def summary(module: str) -> str:
    """The first line of a module's docstring, read without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    return headline(ast.get_docstring(ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))))


def headline(docstring: str | None) -> str:
    """The first line of a docstring."""
    return (docstring or "").partition("\n")[0]


def folder_of(package: str) -> Path:
    """Where the modules of a package of ours lie, which is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ())))


def dispatch(argv: Sequence[str], name: str, package: str, kinds: Sequence[str]) -> int:
    """Hands `KIND ...` to main of the module KIND of a package; returns its exit status. name: of the command."""
    kind, *rest = argv or [""]
    if kind in ("-h", "--help"):
        print(f"usage: {name} {{{','.join(kinds)}}} [--help] ...\n\n{summary(f'{package}.__main__')}\n")
        for each in kinds:
            print(f"  {each:<13} {summary(f'{package}.{each}')}")
        return 0
    if kind not in kinds:
        return fail(f"{name} {kind or 'nothing'}: must be one of {', '.join(kinds)}")
    return importlib.import_module(f"{package}.{kind}").main(rest)


def fail(message: object) -> int:
    """Prints one line on standard error and returns the exit status for bad input, 2."""
    print(files.visible(" ".join(str(message).split()), sys.stderr), file=sys.stderr, flush=True)
    return 2


def read_config(path: str, overrides: Sequence[tuple[str, str | None]] = ()) -> ConfigDict:
    """The config of FILE[:ARGUMENT] with ("section.key", text) overrides applied; text None means a bare flag.

    Options of the file that the overrides' optim.method does not take give way, which is said. Raises UsageError.
    """
    return reader(path)(overrides)


def reader(path: str) -> Callable[[Sequence[tuple[str, str | None]]], ConfigDict]:
    """read(overrides) -> config, as read_config, for many readings of one FILE[:ARGUMENT]: it is run once."""
    known = base.get_config()
    template = _with_types_of_base(_load(path), path)
    parsed = {}  # (key, texts): value; reading a text takes milliseconds, and the runs of a sweep share most of them
    said = set()

    def read(overrides: Sequence[tuple[str, str | None]]) -> ConfigDict:
        for key, _ in overrides:
            _check_key(key, known)
        config = copy.deepcopy(template)
        for key in dict.fromkeys(key for key, _ in overrides):
            texts = tuple(text for name, text in overrides if name == key)
            section, name = slot(config, key)
            if (key, texts) not in parsed:
                _override(config, known, key, list(texts))
                parsed[key, texts] = section[name]
            section[name] = parsed[key, texts]
        line = _give_way(config, path, {key for key, _ in overrides})
        if line and line not in said:
            print(line, file=sys.stderr, flush=True)
            said.add(line)
        size = config.model.size
        if size in sizes.SIZES:
            for field, value in sizes.SIZES[size].items():
                if f"model.{field}" in dict(overrides) and config.model[field] != value:
                    raise UsageError(
                        f"config.model.{field} = {config.model[field]}: must be left out with config.model.size = "
                        f"{size}, which makes it {value}; or set config.model.size to nothing"
                    )
        try:
            return sizes.resolve(config)
        except ValueError as error:
            raise UsageError(error) from None

    return read


def _give_way(config: ConfigDict, path: str, chosen: set[str]) -> str:
    """Clears the options that FILE sets and a method chosen by the command line does not take. Returns a line on them.

    chosen: the keys that the command line sets; they stay, and lm.parts.check refuses what does not go together.
    """
    if "optim.method" not in chosen:
        return ""
    options = {name: config.optim[name] for name in named("optim.methods:OPTIONS") if f"optim.{name}" not in chosen}
    method = config.optim.method
    gone = named("optim.methods:foreign")(method, options)
    for name in gone:
        config.optim[name] = None
    shown = ", ".join(f"config.optim.{name} = {options[name]!r}" for name in gone)
    gives = f"{shown} in {path} {'gives' if len(gone) == 1 else 'give'} way to config.optim.method = {method}"
    return f"{gives}, which {named('optim.methods:takes')(method)}" if gone else ""


def _raise_usage(message: str) -> NoReturn:
    missing = re.fullmatch(r"the following arguments are required: (.*)", message)
    message = message.removeprefix("argument ")
    raise UsageError(f"{missing[1]} is missing; --help shows the usage" if missing else message)


def _split(argv: Sequence[str]):
    """Separates (arguments for argparse, --config, [(key, text)] in the order given, whether to print the config)."""
    plain, path, overrides, printing = [], None, [], False
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.partition("=")
        if re.fullmatch(r"--?config", name):
            if path is not None:
                raise UsageError("--config: must be given once")
            if not equals and (not rest or rest[0].startswith("-")):
                raise UsageError("--config: must be followed by a config, such as --config=quickstart")
            path = text if equals else rest.pop(0)
        elif re.fullmatch(r"--?noconfig\..*", name):
            overrides.append((name.split(".", 1)[1], "false"))
        elif re.fullmatch(r"--?config\..*", name):
            spaced = not equals and rest and not rest[0].startswith("--")
            overrides.append((name.split(".", 1)[1], text if equals else rest.pop(0) if spaced else None))
        elif argument == "--print_config":
            printing = True
        else:
            plain.append(argument)
    return plain, path, overrides, printing


def ready(package: str, function: str) -> list[str]:
    """The modules of a package that define a function, read without importing them."""
    return sorted(
        file.stem
        for file in folder_of(package).glob("*.py")
        if re.search(rf"^def {function}\(", file.read_text(encoding="utf-8"), re.MULTILINE)
    )


def call(flag: str, text: str, function: str, package: str) -> Any:
    """What `function` of a module returns. text: NAME, a.dotted.MODULE or FILE, each also with :ARGUMENT.

    A NAME is a module of `package`. UsageError for whatever fails in it.
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
    except Exception as error:  # whatever a user's file raises is about that file, so say where in it
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f"line {lines[-1]}: " if lines else ""
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise UsageError(f"{flag} = {text}: {where}{kind}{str(error).strip(chr(34))}") from None


def _module(flag: str, name: str, function: str, package: str) -> importlib.machinery.ModuleSpec:
    names = ready(package, function)
    spec = None
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        with contextlib.suppress(ImportError):
            spec = importlib.util.find_spec(name if "." in name else f"{package}.{name}")
    if spec is None or spec.origin is None:
        stem = Path(name).stem
        close = [stem] if stem in names else difflib.get_close_matches(stem, names, n=1)
        hint = f"; did you mean {flag}={close[0]}?" if close else ""
        raise UsageError(f"{flag} = {name or 'nothing'}: must be one of {', '.join(names)}, a module or a file{hint}")
    return spec


def _load(path: str) -> ConfigDict:
    config = call("--config", path, "get_config", "steppe.configs")
    if not isinstance(config, ConfigDict):
        file = path.partition(":")[0]
        raise UsageError(f"--config = {file}: get_config must return a ConfigDict, not {type(config).__name__}")
    return config


def _flat(config: ConfigDict) -> dict:
    """{"section.key": value}; a section itself is not an entry."""
    found = {}
    for key, value in config.items():
        found.update(
            {f"{key}.{k}": v for k, v in _flat(value).items()} if isinstance(value, ConfigDict) else {key: value}
        )
    return found


def _with_types_of_base(config: ConfigDict, path: str) -> ConfigDict:
    """A locked copy of the config with the types of configs/base.py, whose keys it must have, no more and no fewer."""
    typed = base.get_config()
    have, want = _flat(config), _flat(typed)
    for key in have:
        if key not in want:
            raise UsageError(f"config.{key} in {path}: no such key{_closest(key, list(want))}")
    for key in want:
        if key not in have:
            raise UsageError(f"config.{key} is missing in {path}: start from configs/base.py, which holds every key")
        section, name = slot(typed, key)
        value = plain(have[key])
        try:
            if isinstance(value, bool) and section.get_type(name) is not bool:
                raise TypeError
            if value is None and want[key] is not None:
                raise TypeError
            section[name] = value
        except TypeError:
            accepted = _accepted(section.get_type(name), want[key] is None)
            raise UsageError(f"config.{key} = {value!r} in {path}: must be {accepted}") from None
    return typed.lock()


def plain(value: Any) -> Any:
    """A numpy scalar as the Python value it stands for; anything else as it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


def _check_key(key: str, known: ConfigDict):
    flat = _flat(known)
    if key in flat:
        return
    inside = [name for name in flat if name.startswith(f"{key}.")]
    if inside:
        raise UsageError(f"config.{key} is a section: set its keys one by one, such as --config.{inside[0]}=...")
    raise UsageError(f"config.{key}: no such key{_closest(key, list(flat))}")


def _closest(word: str, among: list[str]) -> str:
    word = word.split("=")[0]
    match = difflib.get_close_matches(word, among, n=1, cutoff=0.6)
    if not match:  # a key under the wrong section, or without one
        last = {name.rsplit(".", 1)[-1]: name for name in among}
        match = [last[name] for name in difflib.get_close_matches(word.rsplit(".", 1)[-1], last, n=1, cutoff=0.7)]
    if match:
        prefix = "" if match[0].startswith("-") else "config."
        return f"; did you mean {prefix}{match[0]}?"
    return "; --help lists the options" if word.startswith("-") else "; `steppe config` lists every key"


def _accepted(kind: type, optional: bool) -> str:
    kinds = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    accepted = kinds.get(kind, 'a tuple of texts, such as ("a", "b"), or one text per flag')
    return accepted + (", or None for its default" if optional else "")


def _override(config: ConfigDict, known: ConfigDict, key: str, texts: list[str | None]):
    """Sets one key from its texts on the command line (a tuple may take several) through config_flags."""
    section, name = slot(config, key)
    kind, optional = section.get_type(name), _flat(known)[key] is None
    wrong = UsageError(
        f"config.{key} = {', '.join(text or 'nothing' for text in texts)}: must be {_accepted(kind, optional)}"
    )
    if optional and texts == ["None"]:
        section[name] = None
        return
    if kind is not tuple and len(texts) > 1:
        raise UsageError(f"config.{key} = {', '.join(text or 'nothing' for text in texts)}: must be given once")
    if kind is not bool and None in texts:
        raise wrong
    values = flags.FlagValues()
    argv = ["steppe", *(f"--config.{name}" + ("" if text is None else f"={text}") for text in texts)]
    alone = ConfigDict({name: FieldReference(section[name], field_type=kind)})  # of a whole config it prints all keys
    config_flags.DEFINE_config_dict("config", alone, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, ValueError, TypeError):
        raise wrong from None
    if kind is tuple and not all(isinstance(item, str) for item in alone[name]):
        raise wrong
    allowed = base.keys()[key].accepted.names() if kind is tuple else []
    cut = [item.strip() for text in alone[name] for item in text.split(",")] if allowed else []
    section[name] = tuple(cut) if cut and set(cut) <= set(allowed) else alone[name]
