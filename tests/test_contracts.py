"""Contracts across modules: who imports whom, and how fast commands answer."""

import ast
import contextlib
import importlib.metadata
import itertools
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from steppe.data import sources
from steppe.data.errors import DataError
from steppe.data.readers import plain
from steppe.lm.measure import choices
from steppe.scripts import cli, command
from steppe.scripts.model import generate

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = ("configs", "data", "optim", "lm", "scripts")
HEAVY = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax", "grain", "tensorflow", "seqio", "wandb", "matplotlib")
LAZY = ("tensorflow", "seqio", "tensorflow_datasets", "wandb", "matplotlib", "sentencepiece", "submitit", "matfree")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
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


@each_module
def test_imports_say_steppe_and_configs_need_no_package_but_one(path):
    """Which room may import which: the contracts of import-linter in pyproject.toml."""
    room = path.relative_to(ROOT).parts[0]
    for node, name in _imports(_tree(path)):
        top = name.partition(".")[0]
        assert top not in (*ROOMS, "tests", "helpers"), f"line {node.lineno}: {name} is steppe.{name}"
        if room == "configs" and "studies" not in path.parts and top not in sys.stdlib_module_names:
            assert top in ("steppe", "ml_collections"), f"line {node.lineno}: a config imports {name}"


def test_no_name_of_a_package_hides_a_module_of_it():
    for path in MODULES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "studies" in parts or parts[-1] in ("__init__", "__main__"):
            continue
        module = importlib.import_module(".".join(("steppe", *parts)))
        package = importlib.import_module(".".join(("steppe", *parts[:-1])))
        assert getattr(package, parts[-1]) is module, f"import {module.__name__} as it gives something else"


def _declared():
    """Distributions that pyproject.toml names, and what they need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    found, waiting = set(), [Requirement(line) for line in named if not line.startswith("steppe[")]
    while waiting:
        needed = waiting.pop()
        name, extras = canonicalize_name(needed.name), ("", *needed.extras)
        if {(name, extra) for extra in extras} <= found:
            continue
        found |= {(name, extra) for extra in extras}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            each = map(Requirement, importlib.metadata.requires(name) or ())
            waiting += [one for one in each if not one.marker or any(one.marker.evaluate({"extra": e}) for e in extras)]
    return {name for name, _ in found}


def test_every_package_that_is_imported_is_declared():
    declared, provided = _declared(), importlib.metadata.packages_distributions()
    for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]:
        tops = {name.partition(".")[0] for _, name in _imports(_tree(path))}
        for top in tops - {"steppe", "helpers", "parity", "exhaustive", "bench"} - sys.stdlib_module_names:
            names = {canonicalize_name(name) for name in provided.get(top, [top])}
            assert names & declared, f"{path.relative_to(ROOT)} imports {top}, which pyproject.toml does not bring"


@each_module
def test_heavy_packages_are_imported_inside_functions(path):
    for node in _tree(path).body:
        for _, name in _imports(ast.Module([node], [])) if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            assert name.split(".")[0] not in LAZY, f"line {node.lineno}: {name} at module level"


EVERY = ["", *cli.COMMANDS]
HELP = f"""
import sys, time
begin = time.process_time()  # of this process, whatever else the machine does
from steppe.scripts import cli
for name in sys.argv[1].split(","):
    try: status = cli.main([*filter(None, [name]), "--help"])
    except SystemExit as stop: status = stop.code
    heavy = [m for m in {HEAVY} if m in sys.modules]
    print(status or 0, time.process_time() - begin, *heavy, file=sys.stderr)
    begin = time.process_time()
"""


@pytest.mark.parametrize("names", [EVERY, *(pytest.param([name], marks=pytest.mark.exhaustive) for name in EVERY)])
def test_help_comes_at_once(names):
    """In one process one after the other, so that the first to import too much is named, and each in its own."""
    done = subprocess.run([sys.executable, "-c", HELP, ",".join(names)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, line in zip(names, done.stderr.splitlines(), strict=True):
        status, seconds, *heavy = line.split()
        assert status == "0", name
        assert float(seconds) < 3, name
        assert not heavy, name
        assert (f"usage: steppe {name}" if name else "usage: steppe COMMAND") in done.stdout
        for summary in [command.summary(cli.COMMANDS[n][0]) for n in ([name] if name else cli.COMMANDS)]:
            assert summary
            assert summary in done.stdout


def _is_record(line, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line)
    (source,) = sources.parse(f"jsonl:{tmp_path}/a.jsonl@all")
    (record,) = plain.records(source, sources.Reading(text_field="prompt"))
    return not record.fault


def _is_item(line, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line)
    return bool(choices.read((f"a=jsonl:{tmp_path}/a.jsonl",)))


def _is_prompt(line, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line)
    return bool(generate._prompts(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("reads", [_is_record, _is_item, _is_prompt])
@pytest.mark.parametrize(
    ("more", "valid"),
    [(b"1.5", True), (b'"\\u2028\x7f"', True), (b"-0e1", True), (b'{"": [null]}', True), (b"NaN", False),
     (b"Infinity", False), (b"-Infinity", False), (b"01", False), (b"1.", False), (b"'a'", False), (b'"\t"', False),
     (b'"\xff"', False), (b'"\xed\xa0\x80"', False), (b"[" * 10**5 + b"]" * 10**5, False), (b"1}}", False),
     (b"[1,]", False), (b"\xef\xbb\xbf1", False), (b"/**/1", False)],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_every_line_of_jsonl_is_strictly_json(tmp_path, reads, more, valid):
    """Whichever it is of: a corpus, questions, prompts."""
    line = b'{"prompt": "a b", "query": "a", "choices": ["b", "c"], "gold": 0, "more": ' + more + b"}\n"
    try:
        found = reads(line, tmp_path)
    except (DataError, command.UsageError):
        found = False
    assert found == valid


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
    rooms = [path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*")]
    return [path for path in (*own, *rooms) if path.suffix in (".py", ".md", ".toml", ".txt", "") and path.is_file()]


def test_nothing_names_a_machine_or_a_registry():
    places = "|".join(("work", "root", "home", "farm"))
    settings = "|".join(("index" + "-url", "find" + "-links", "trusted" + "-host"))
    pattern = re.compile(rf"(^|[\s\"'=(])/({places})/|{settings}", re.MULTILINE)
    for path in _text_files():
        found = pattern.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found[0]!r}"


def test_the_version_is_that_of_the_changelog_and_of_the_citation():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert version == newest == cited


def test_hooks_and_workflows_call_what_ci_calls():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    run = (ROOT / ".ci" / "run").read_text()
    for hook in hooks:
        assert hook["entry"].removeprefix(".venv/bin/").removesuffix(" --check") in run
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for name in re.findall(r"\.ci/[\w.]+", " ".join(commands)):
        assert (ROOT / name).is_file()
    assert "bash .ci/run" in commands


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[fw]*.yml")), ids=lambda form: form.stem
)
def test_forms_ask_for_the_doctor(form):
    fields = yaml.safe_load(form.read_text())["body"]
    assert any("steppe doctor" in field["attributes"]["label"] for field in fields)


def test_every_smoke_test_is_there():
    """Those that run on every other Python: pytest refuses the whole list where one is named that is not there."""
    for line in (ROOT / ".ci" / "smoke").read_text().split():
        path, _, name = line.partition("::")
        functions = {node.name for node in ast.walk(_tree(ROOT / path)) if isinstance(node, ast.FunctionDef)}
        assert name.partition("[")[0] in functions, line


def test_the_map_of_the_readme_is_that_of_the_tree():
    """Lines of Python of each room, within a tenth."""
    printed = re.findall(r"^\| `(\w+)/` \|.*\| ([\d.]+)k \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert [room for room, _ in printed] == ["configs", "data", "optim", "lm", "scripts", "tests"]
    for room, thousands in printed:
        paths = [path for path in (ROOT / room).rglob("*.py") if "studies" not in path.parts]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        assert lines == pytest.approx(1000 * float(thousands), rel=0.1), room
