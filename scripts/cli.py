"""The console entry: `steppe COMMAND ...` is `python -m steppe.scripts.COMMAND ...`. PYTHON_ARGCOMPLETE_OK"""

import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence

from steppe.configs import packages

# what a measurement defines: an example of its use
MEASURE = {"measure_run": "--workdir=runs/quickstart", "measure_config": "--config=quickstart --out=measured"}
# name: (module, an example of its use), in the order in which a user needs them
COMMANDS = {
    "docs": ("steppe.scripts.docs", "optim"),
    "config": ("steppe.scripts.config", "quickstart"),
    "prepare_data": ("steppe.scripts.prepare_data", "--config=quickstart --out=corpora/mine"),
    "plan": (
        "steppe.scripts.plan.__main__",
        "--config=paper:1.2b,sam,chinchilla --topology=v5e:16x16 --vocabulary_size=32100",
    ),
    "train": ("steppe.scripts.train", "--config=quickstart --workdir=runs/quickstart"),
    "evaluate": ("steppe.scripts.model.evaluate", "--workdir=runs/quickstart"),
    "watch": ("steppe.scripts.watch", "sweeps/rho"),
    "plot": ("steppe.scripts.plot", "runs/quickstart"),
    "generate": ("steppe.scripts.model.generate", "--workdir=runs/quickstart --prompt='def '"),
    "export": ("steppe.scripts.model.export", "--workdir=runs/quickstart --out=models/quickstart"),
    "sweep": ("steppe.scripts.sweep.__main__", "--config=quickstart --sweep=rho_by_scale:0.1m --out=sweeps/rho"),
    "report": ("steppe.scripts.report.__main__", "sweeps/rho"),
    **{
        name: (f"steppe.lm.measure.{name}", example)
        for function, example in MEASURE.items()
        for name in packages.ready("steppe.lm.measure", function)
    },
    "judge": ("steppe.scripts.judge.__main__", "msam --config=quickstart --out=judged"),
    "check": ("steppe.scripts.judge.check", "mine.py:half_sign"),
    "doctor": ("steppe.scripts.doctor", ""),
    "bench": ("steppe.scripts.bench.__main__", "step --against"),
}

QUICK = ("docs", "config", "doctor", "watch")
LOGGING = ("train", "report", "coordinates", "judge", "check", "bench")  # their standard output is for readers alone
# subcommands
KINDS = {
    "config": ("diff", "from-hf"),
    "prepare_data": ("show", "vocabulary"),
    "report": ("compare", "pack", "rivals", "transfer"),
    "bench": ("step", "collectives", "gpu"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs main(argv) of the command's module and imports no other command; returns its exit status."""
    try:
        return dispatch(argv)
    except ImportError as error:
        if not (said := packages.explain(error)):
            raise
        print(said, file=sys.stderr)
        return 2
    except BrokenPipeError:  # a pager or `head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def dispatch(argv: Sequence[str] | None) -> int:
    """As main, but a closed pipe raises. Imports little, because `doctor` must run where packages are missing."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        arguments = completed_command()
    if arguments[:1] == ["--version"]:
        print(f"steppe {importlib.metadata.version('steppe')}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if len(arguments) > 1:
            return main([*arguments[1:], "--help"])
        print("usage: steppe COMMAND [--help] ...\n")
        from steppe.scripts import command

        for name, (_, example) in COMMANDS.items():
            print(f"  {name:<13} {command.summary(COMMANDS[name][0])}\n{'':16}steppe {name} {example}")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        from steppe.configs import keys
        from steppe.scripts import process

        hint = keys.named("optim.options:nearest")(name, list(COMMANDS))
        return process.fail(f"steppe {name}: no such command, must be one of {', '.join(COMMANDS)}{hint}")
    module = COMMANDS[name][0]
    if module.startswith("steppe.lm.measure."):
        module, rest = "steppe.scripts.measure.__main__", [name, *rest]
    if name in QUICK:  # doctor must run where packages are missing
        return importlib.import_module(module).main(rest)
    from steppe.lm.track import waiting

    # bad input is one line on standard error, and standard output is some commands' result
    if name in LOGGING or sys.stderr.isatty():
        waiting.soon(f"{name}: starting", None if name in LOGGING else sys.stderr)
    try:
        return importlib.import_module(module).main(rest)
    finally:
        waiting.heard()


def completed_command() -> list[str]:
    """The command that answers the shell's completion request; [] if this function has answered it."""
    *words, last = re.split(r"\s+", os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].lstrip())
    name, kinds = "".join(words[1:2]), KINDS.get("".join(words[1:2]), ())
    within = words[2] in kinds if len(words) > 2 else False
    os.environ["_ARGCOMPLETE"] = str(min(len(words), 3 if within else 2))  # the words before the command's own
    choices = list(COMMANDS) if name in ("", "help") else [kind for kind in kinds if kind.startswith(last)]
    if name in COMMANDS and (len(words) > 2 or not choices or (not last and name != "bench")):
        return words[1 : 3 if within else 2]
    import argparse

    import argcomplete

    parser = argparse.ArgumentParser(prog="steppe")
    parser.add_argument("command", choices=choices)
    argcomplete.autocomplete(parser, always_complete_options=False)
    return []


if __name__ == "__main__":
    sys.exit(main())
