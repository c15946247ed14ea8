"""Print every key with its value, meaning and accepted values; or compare two configs.

    steppe config [NAME] [SECTION or KEY ...] [--config.key=value ...]
    steppe config diff A B
    steppe config from-hf HF_DIR [--out=FILE]
    steppe config from-hf FILE.gguf --to=HF_DIR [--out=FILE]

NAME, A and B are configs as --config takes them; A and B may also be workdirs. `from-hf` writes a config that continues
a Hugging Face model with its weights and vocabulary.
"""

import importlib.metadata
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from steppe.configs import base
from steppe.configs.keys import flatten
from steppe.configs.read import read_config, shown
from steppe.data import files
from steppe.lm.keep import workdir
from steppe.scripts import command, process

TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@process.refusing
def main(argv: Sequence[str]) -> int:
    """Prints keys or differences; returns the exit status: 2 for bad input, and for diff 1 if the configs differ."""
    actions = {"diff": diff, "from-hf": from_hf}
    if argv and argv[0] in actions:
        return actions[argv[0]](argv[1:])
    parser = command.parser("config", __doc__)
    said = "a config, by default base; sections or keys to print, by default all"
    chosen = parser.add_argument("names", nargs="*", metavar="NAME", help=said)
    command.complete_by(chosen, command.names("steppe.configs", "get_config", "diff"))
    path, overrides, options = command.parse_unread(argv, parser)
    wanted = [word for word in options.names if any(_within(key, word) for key in list(base.keys()))]
    named = [word for word in options.names if word not in wanted] or [path or "base"]
    if len(named) > 1:
        return process.fail(f"{named[1]}: must be a section or a key; {named[0]} is the config")
    values = flatten(read_config(named[0], overrides))
    process.say(table(values, shutil.get_terminal_size().columns, wanted))
    return 0


def _within(key: str, word: str) -> bool:
    """Whether a word names this key or its section."""
    return key == word.removeprefix("config.") or key.startswith(f"{word.removeprefix('config.')}.")


def table(values: dict[str, Any], columns: int = 100, wanted: Sequence[str] = ()) -> str:
    """Keys as text, section by section, wrapped at `columns` characters. wanted: sections or keys, () for all."""
    lines, section = [], None
    for name, key in base.keys_of(values).items():
        if wanted and not any(_within(name, word) for word in wanted):
            continue
        if name.rpartition(".")[0] != section:
            section = name.rpartition(".")[0]
            lines += ["", f"[{section or 'the run'}]"]
        value, default = values[name], flatten({name: key.default})[name]
        changed = "" if value == default else f"   (base: {default!r})"
        lines.append(f"{name} = {value!r}{changed}")
        freely = "; a resumed run may change it" if key.free else ""
        text = f"{key.meaning}. Accepts {key.accepted.text()}{freely}."
        lines += textwrap.wrap(text, max(40, columns), initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines[1:])


def diff(argv: Sequence[str]) -> int:
    """`config diff A B`: the keys that differ, with both values."""
    parser = command.parser("config diff", "Print the keys in which two configs differ.", config=False)
    both = parser.add_argument("both", nargs=2, metavar="CONFIG", help="as --config takes it, or the workdir of a run")
    command.complete_by(both, command.names("steppe.configs", "get_config"))
    one, other = (flatten(read(text)) for text in command.options_of(argv, parser).both)
    differing = [name for name in one if one[name] != other[name]]
    for name in differing:
        process.say(f"{name}: {one[name]!r} -> {other[name]!r}")
    if not differing:
        process.say("no key differs")
    return 1 if differing else 0


def from_hf(argv: Sequence[str]) -> int:
    """`config from-hf HF_DIR`: writes a config that continues the model."""
    parser = command.parser("config from-hf", "Write a config that continues a Hugging Face model.", config=False)
    parser.add_argument(
        "directory",
        metavar="HF_DIR",
        help="directory with config.json and safetensors, a .gguf file, or an installed package that holds one",
    )
    parser.add_argument("--out", metavar="FILE", help="a new file; default: print the config")
    parser.add_argument("--to", metavar="HF_DIR", help="for a .gguf file: the new directory for the converted model")
    options = command.options_of(argv, parser)
    if options.out and os.path.exists(options.out):
        return process.fail(f"--out={options.out}: exists; choose a new file")

    from steppe.lm.hub import families, gguf, load

    directory = os.path.abspath(os.path.expanduser(_packaged(options.directory)))
    if directory.endswith(".gguf"):
        if not options.to or os.path.exists(options.to):
            return process.fail(f"--to={options.to}: must be a new directory for the model of {options.directory}")
        source, directory = directory, os.path.abspath(os.path.expanduser(options.to))
        gguf.write(source, directory)
    found, family = load.read_config(directory)
    tokenizer = next((name for name in TOKENIZERS if os.path.exists(os.path.join(directory, name))), "")
    named = {"init_from": directory}
    if tokenizer:
        named["data.vocabulary"] = os.path.join(directory, tokenizer)
    text = shown(base.completed({**families.ours(family, found, directory), **named})) + "\n"
    if options.out:
        files.write(options.out, text)
        process.say(f"wrote {options.out}; use it with --config={options.out}")
    else:
        print(text, end="")
    if not tokenizer:
        print(f"{directory} has none of {', '.join(TOKENIZERS)}: set config.data.vocabulary", file=sys.stderr)
    return 0


def _packaged(source: str) -> str:
    """The .gguf file of the installed package `source`; otherwise `source` unchanged."""
    if os.path.exists(source):
        return source
    try:
        listed = importlib.metadata.files(source) or ()
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return source
    return next((str(each.locate()) for each in listed if each.suffix == ".gguf"), source)


def read(text: str):
    """The config of a workdir, or of a name that --config takes."""
    from steppe.lm.keep import mirror

    here = mirror.here(text)
    return workdir.config_of(here) if os.path.isdir(here) else read_config(text)
