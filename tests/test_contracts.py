"""Contracts across modules: who imports whom, how configs are read, how fast commands answer."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from steppe.configs import base
from steppe.scripts import cli

ROOT = pathlib.Path(__file__).parents[1]
MAY_IMPORT = {
    "configs": {"configs"},
    "data": {"data", "configs"},
    "optim": {"optim"},
    "lm": {"lm", "data", "optim", "configs"},
    "scripts": {"scripts", "lm", "data", "optim", "configs"},
}
HEAVY = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax", "grain", "tensorflow", "seqio", "wandb", "matplotlib")
LAZY = ("tensorflow", "seqio", "tensorflow_datasets", "wandb", "matplotlib", "sentencepiece", "submitit", "matfree")
MODULES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))
CONFIG = base.get_config()
SECTIONS = {key for key, value in CONFIG.items() if hasattr(value, "items")}
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def _tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node, node.module


def _chain(node):
    """["config", "optim", "rho"] of config.optim.rho or config["optim"].rho; [] of any other expression."""
    names = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Subscript):
            if not (isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)):
                return []
            names.append(node.slice.value)
        else:
            names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


@each_module
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(ROOT).parts[0]
    for node, name in _imports(_tree(path)):
        top, _, inside = name.partition(".")
        assert top not in (*MAY_IMPORT, "tests", "helpers"), f"line {node.lineno}: {name} is steppe.{name}"
        if top == "steppe":
            rooms = [inside.split(".")[0]] if inside else [alias.name for alias in node.names]
            assert set(rooms) <= MAY_IMPORT[room], f"line {node.lineno}: {room} imports {name}"
        elif room == "configs":
            assert top == "ml_collections", f"line {node.lineno}: a config imports {name}"


@each_module
def test_heavy_packages_are_imported_inside_functions(path):
    for node in _tree(path).body:
        for _, name in _imports(ast.Module([node], [])) if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            assert name.split(".")[0] not in LAZY, f"line {node.lineno}: {name} at module level"


@each_module
def test_config_keys_are_read_by_name_without_a_fallback(path):
    for node in ast.walk(_tree(path)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("get", "setdefault")
        ):
            chain = _chain(node.func.value)
            assert "config" not in chain, f"line {node.lineno}: {'.'.join(chain)}.get"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            chain = _chain(node.args[0])
            fallback = node.func.id == "hasattr" or len(node.args) == 3
            assert "config" not in chain or not fallback, f"line {node.lineno}: {node.func.id} of a config"
        chain = _chain(node)
        if len(chain) == 3 and chain[0] == "config" and chain[1] in SECTIONS:
            known = chain[2] in CONFIG[chain[1]] or hasattr(type(CONFIG), chain[2])
            assert known, f"line {node.lineno}: {'.'.join(chain)} is not in configs/base.py"


def test_every_key_is_read_somewhere():
    """A key that nothing reads is a setting that silently does nothing."""
    readers = [path for path in MODULES if path.parent.name != "configs" and path != ROOT / "lm" / "run" / "check.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in readers)
    keys = [f"{section}.{key}" for section in SECTIONS for key in CONFIG[section]] + ["config.seed"]
    unread = [key for key in keys if not re.search(rf"\.{key.split('.')[1]}\b|[\"']{key.split('.')[1]}[\"']", text)]
    assert not unread


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_help_comes_at_once(name):
    code = (
        "import sys, time; begin = time.monotonic()\n"
        "from steppe.scripts import cli\n"
        "try: status = cli.main([*sys.argv[1:], '--help'])\n"
        "except SystemExit as stop: status = stop.code\n"
        f"heavy = [m for m in {HEAVY} if m in sys.modules]\n"
        "print(status or 0, time.monotonic() - begin, *heavy, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *([name] if name else [])], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    status, seconds, *heavy = done.stderr.split()
    assert status == "0"
    assert float(seconds) < 3
    assert not heavy
    assert (f"usage: steppe {name}" if name else "usage: steppe COMMAND") in done.stdout
    for summary in [cli.summary(n) for n in ([name] if name else cli.COMMANDS)]:
        assert summary
        assert summary in done.stdout


def test_an_unknown_command_is_one_line_and_status_2(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_commands_run_as_modules_too():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "steppe.scripts.train", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--workdir" in done.stdout


def _text_files():
    own = [ROOT / name for name in ("README.md", "pyproject.toml", ".gitignore", ".ci/run", ".ci/pins.txt")]
    rooms = [path for room in (*MAY_IMPORT, "tests") for path in (ROOT / room).rglob("*")]
    return [path for path in (*own, *rooms) if path.suffix in (".py", ".md", ".toml", ".txt", "") and path.is_file()]


def test_nothing_names_a_machine_or_a_registry():
    places = "|".join(("work", "root", "home", "farm"))
    settings = "|".join(("index" + "-url", "find" + "-links", "trusted" + "-host"))
    pattern = re.compile(rf"(^|[\s\"'=(])/({places})/|{settings}", re.MULTILINE)
    for path in _text_files():
        found = pattern.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found[0]!r}"
