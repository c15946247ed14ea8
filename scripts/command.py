"""What every command shares: a config with overrides, options, and one line for bad input.

    config, options = command.parse(argv, parser)

reads `--config=NAME[:ARGUMENT] --config.section.key=value ...` through steppe.configs.read and all other arguments
through the argparse `parser`. The type of an option is an Accepted of steppe.configs.keys, like that of a config key.
Bad input ends the process with status 2 and one line on standard error. The line names the key, the value and what is
accepted. Only a bug shows a traceback. Importing this module does not import jax.
"""

import argparse
import ast
import contextlib
import importlib.util
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ml_collections import ConfigDict

from steppe.configs import base, keys
from steppe.configs.keys import named
from steppe.configs.packages import ready
from steppe.configs.read import PACKAGE, UsageError, closest, read_config, shown
from steppe.data import files
from steppe.lm.keep.exits import REFUSALS
from steppe.scripts.process import fail

_HELP = """
config:
  --config=NAME[:ARGUMENT]      a named config ({ready}), a dotted module, or a Python file that
                                defines get_config([ARGUMENT])
  --config.section.key=value    sets one key; `steppe config` lists all keys; None restores a key's default
  --print_config                prints the resulting config and stops; refuses a config that cannot run
"""

integer = keys.count


def of_key(key: str) -> Callable[[str], Any]:
    """An argparse type that accepts the values of a config key; the key is looked up only when a value is parsed."""
    return lambda text: base.keys()[key].accepted(text)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help in which the type of an option names its value, and numbers have their default behind them."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if not isinstance(accepted := action.type, keys.Accepted):
            return "DIR" if accepted is writable_directory else super()._get_default_metavar_for_optional(action)
        value = {int: "N", float: "X"}.get(accepted.of or accepted.kind, "TEXT")
        return f"{value},{value},..." if accepted.of else value

    def _get_help_string(self, action: argparse.Action) -> str:
        said, default = action.help or "", action.default
        if not isinstance(action.type, keys.Accepted) or default in (None, (), [], "") or "default" in said:
            return said
        return f"{said} (default {','.join(map(str, default)) if isinstance(default, tuple) else default})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError. takes_config: whether the command accepts --config."""

    takes_config = True

    def error(self, message: str) -> NoReturn:
        missing = re.fullmatch(r"the following arguments are required: (.*)", message)
        message = message.removeprefix("argument ")
        raise UsageError(f"{missing[1]} is missing; --help shows the usage" if missing else message)


def parser(name: str, summary: str | None, *, config: bool = True) -> Parser:
    """The Parser of a command.

    name: of the command, or the path of a script. summary: the description, usually the module's docstring. config:
    whether the command accepts --config.
    """
    made = Parser(
        prog=name if name.endswith(".py") else f"steppe {name}",
        description=summary,
        epilog=_HELP.format(ready=", ".join(ready(PACKAGE, "get_config"))) if config else "",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    made.takes_config = config
    return made


def run_parser(name: str, summary: str | None) -> Parser:
    """The parser of a command that uses the model of one run: --workdir, --step, --weights, --trust."""
    made = parser(name, summary, config=False)
    made.add_argument("--workdir", required=True, help="the run's directory or URL")
    made.add_argument("--step", type=integer(), metavar="K", help="the checkpoint of step K; default: the newest")
    add_weights(made)
    add_trust(made)
    return made


def add_weights(made: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds --weights, which selects among the weights that a run stores. several: whether it may be repeated."""
    help = "last, ema, lawa, or the base optimizer's average; default: the weights that the run is judged by"
    made.add_argument(
        "--weights", metavar="NAME", help=help + "; repeatable" * several, action="append" if several else "store"
    )


def add_trust(made: argparse.ArgumentParser) -> None:
    """Adds --trust, by which a user vouches for the URLs and modules in a stored config."""
    help = "use the URLs and modules that the run's stored config names; only for your own runs"
    made.add_argument("--trust", action="store_true", help=help)


def add_texts(made: argparse.ArgumentParser, name: str, metavar: str, help: str) -> None:
    """Adds an option that may be repeated; the list of its texts, [] without any."""
    made.add_argument(name, action="append", default=[], metavar=metavar, help=help)


def add_only(made: argparse.ArgumentParser) -> None:
    """Adds --only, which selects runs by their configs; configs.only.matching reads it."""
    add_texts(made, "--only", "KEY=V,V", "only the runs that match")


Settings = TypeVar("Settings", bound=tuple)


def add_settings(made: argparse.ArgumentParser, settings: type[tuple]) -> None:
    """Adds an option for each field of a NamedTuple: Annotated[KIND, "its meaning", Accepted] with a default.

    A bool becomes a flag. A tuple of texts becomes an option that may be repeated, a tuple of numbers an option that
    takes numbers separated by commas.
    """
    defaults: dict[str, Any] = settings._field_defaults  # pyright: ignore[reportAttributeAccessIssue]
    for name, hint in typing.get_type_hints(settings, include_extras=True).items():
        kind, meaning, accepted = typing.get_args(hint)
        taken: dict[str, Any] = {"action": "store_true"} if kind is bool else {"type": accepted}
        default = defaults[name]
        if typing.get_origin(kind) is tuple and accepted.kind is str:
            taken["action"], default = "append", list(default)
        made.add_argument(f"--{name}", default=default, help=meaning.replace("%", "%%"), **taken)


def settings_of(options: argparse.Namespace, settings: type[Settings]) -> Settings:
    """The settings that the options of add_settings hold."""
    chosen = {name: getattr(options, name) for name in typing.get_type_hints(settings)}
    return settings(**{name: tuple(each) if isinstance(each, list) else each for name, each in chosen.items()})


def parse(argv: Sequence[str], parser: Parser) -> tuple[ConfigDict, argparse.Namespace]:
    """Reads a command line, without the program's name, into (config, options); exits with status 2 on bad input.

    The config is locked, has exactly the keys of configs/base.py, and its `model.size` is resolved.
    """
    path, overrides, options = parse_unread(argv, parser)
    try:
        return read_config(required(path), overrides), options
    except UsageError as error:
        sys.exit(fail(error))


def options_of(argv: Sequence[str], parser: Parser) -> argparse.Namespace:
    """The options of a command without a config; exits with status 2 on bad input."""
    return parse_unread(argv, parser)[2]


def required(path: str | None) -> str:
    """The value of --config. Raises UsageError if it is missing."""
    if path is None:
        raise UsageError("--config is missing: name a config, such as --config=quickstart")
    return path


def parse_unread(
    argv: Sequence[str], parser: Parser
) -> tuple[str | None, list[tuple[str, str | None]], argparse.Namespace]:
    """(--config or None, its overrides as read_config takes them, options); exits with status 2 on bad options.

    A command may also take its config as a positional argument `config`. Answers --print_config, with status 0.
    """
    if "_ARGCOMPLETE" in os.environ:
        complete(parser)
    try:
        plain, path, overrides, printing = _split(argv)
        if not parser.takes_config and (path is not None or overrides or printing):
            raise UsageError(f"--config: must be left out; {parser.prog} takes none (it uses the run's own config)")
        if printing:  # no other argument is required
            for each in (*parser._actions, *parser._mutually_exclusive_groups):
                each.required = False
        if {"-h", "--help"} & set(plain):
            parser.epilog = (parser.epilog or "") + _own_options(overrides)
        options, unknown = _parsed(parser, plain)
        if path is not None and getattr(options, "config", None):
            raise UsageError("--config: must be given once")
        path = path or getattr(options, "config", None)
        if unknown and not unknown[0].startswith("-"):
            raise UsageError(f"{unknown[0]}: must be left out; arguments are --options and --config.key=value")
        if unknown:
            known = [string for action in parser._actions for string in action.option_strings]
            known += ["--config", "--print_config"] if parser.takes_config else []
            raise UsageError(f"{unknown[0].split('=')[0]}: no such option{closest(unknown[0], known)}")
        if printing:
            config = read_config(required(path), overrides)
            named("lm.parts.check:check")(config, device_count=None)
            print(shown(config))
            sys.exit(0)
        return path, overrides, options
    except (UsageError, *REFUSALS) as error:
        sys.exit(fail(error))


def _own_options(overrides: Sequence[tuple[str, str | None]]) -> str:
    """Help on the options that a method and a base from outside declare. Runs their files. Raises UsageError."""
    texts = {
        key.removeprefix("optim."): text for key, text in overrides if text and key in ("optim.method", "optim.base")
    }
    said = []
    for kind, text in texts.items():
        if ":" in text:  # names of Steppe's own have none, and their options are in `steppe config`
            try:
                declared = named("optim.references:declared")({kind: text})
            except named("optim.rule:OptionError") as error:
                raise UsageError(error) from None
            for name, (_, default, option) in declared.items():
                said.append(f"  --config.optim.{name}={default}".ljust(31) + f" {option.meaning}: {option.accepted}")
    return "\noptions of {}:\n{}\n".format(" and ".join(texts.values()), "\n".join(said)) if said else ""


def _parsed(parser: Parser, given: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """parse_known_args, which would read --option=-- as an option without a value; that raises UsageError."""
    for argument in given:
        if argument.endswith("=--") and argument.startswith("-"):
            raise UsageError(f"{argument.removesuffix('=--')}=--: must have another value")
    return parser.parse_known_args(given)


def names(package: str, function: str, *more: str) -> Callable[..., list[str]]:
    """An argcomplete completer: `more`, the modules of a package that define `function`, and Python files."""

    def offered(prefix: str = "", **_) -> list[str]:
        from argcomplete.completers import FilesCompleter

        return [*more, *ready(package, function), *FilesCompleter(["py"])(prefix)]

    return offered


def complete_by(argument: Any, completer: Callable[..., list[str]]) -> None:
    """Sets the argcomplete completer of an argument of a parser."""
    argument.completer = completer


def complete(parser: Parser) -> None:
    """Answers a shell's completion request through argcomplete and ends the process."""
    import argcomplete

    if parser.takes_config:
        complete_by(parser.add_argument("--config"), names(PACKAGE, "get_config"))
        parser.add_argument("--print_config", action="store_true")
        if "--config." in os.environ["COMP_LINE"]:
            for key, declared in base.keys().items():
                offered = parser.add_argument(f"--config.{key}", help=declared.meaning.replace("%", "%%"))
                complete_by(offered, lambda declared=declared, **_: declared.accepted.names())
    argcomplete.autocomplete(parser, always_complete_options="long")


def writable_directory(text: str) -> Path:
    """An argparse type: the path of a writable local directory, or of one that can be created; ~ is expanded."""
    refused = argparse.ArgumentTypeError(f"{text or 'nothing'}: must be a writable directory, or one to be created")
    if files.is_remote(text):
        address = "only the --workdir of a run may be a URL"
        raise argparse.ArgumentTypeError(f"{text}: must be a directory of this machine's file system; {address}")
    try:
        path = Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)
        place = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
        usable = bool(text) and place.is_dir() and os.access(place, os.W_OK)
    except (OSError, RuntimeError, ValueError):  # a name that is too long, an unknown user, a null byte
        raise refused from None
    if not usable:
        raise refused
    return path


def workdir(text: str) -> str:
    """An argparse type: a writable directory, or a URL whose scheme fsspec has a driver for."""
    if not files.is_remote(text):
        return str(writable_directory(text))
    import fsspec  # imported here because it is slow and no other option needs it

    scheme = text.partition("://")[0]
    if scheme not in fsspec.available_protocols() or not text.partition("://")[2].strip("/"):
        raise argparse.ArgumentTypeError(f"{text}: must be a directory, or a URL such as s3://bucket/run")
    return text


def summary(module: str) -> str:
    """The first line of a module's docstring, without importing the module."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    return headline(ast.get_docstring(ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))))


def headline(docstring: str | None) -> str:
    """The first line of a docstring."""
    return (docstring or "").partition("\n")[0]


def _split(argv: Sequence[str]):
    """(arguments for argparse, --config, [(key, text)] in the given order, whether to print the config)."""
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
