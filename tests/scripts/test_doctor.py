"""`steppe doctor` and every command where packages are missing: one line with the command that brings them."""

import json
import os
import re
import subprocess
import sys

import pytest

from steppe.configs import packages

# What a machine for training may lack: nothing of these is needed to train from a prepared directory.
SPARE = (
    "seqio", "tensorflow", "tensorflow_datasets", "wandb", "tensorboardX", "submitit", "matfree", "pyarrow",
    "sentencepiece", "tokenizers", "tiktoken", "transformers", "safetensors", "gguf", "torch", "argcomplete",
    "filelock", "zstandard", "matplotlib",
)  # fmt: skip
BARE = ("seqio", "tensorflow", "grain", "array_record", "matfree", "ml_collections", "xxhash", "wandb")
_HIDING = """
import importlib.machinery, os
hidden, real = os.environ["HIDDEN"].split(","), importlib.machinery.PathFinder.find_spec.__func__
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else real(cls, name, path, target)
importlib.machinery.PathFinder.find_spec = classmethod(find_spec)
"""


@pytest.fixture(scope="module")
def steppe(tmp_path_factory):
    """steppe(hidden modules, *arguments): the command in a process that does not find these."""
    folder = tmp_path_factory.mktemp("hiding")
    (folder / "sitecustomize.py").write_text(_HIDING)

    def run(hidden, *arguments):
        environment = os.environ | {"PYTHONPATH": str(folder), "HIDDEN": ",".join(hidden), "COLUMNS": "200"}
        command = [sys.executable, "-m", "steppe.scripts.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)

    return run


def test_doctor_names_what_is_missing_and_the_command_that_brings_it(steppe):
    whole = steppe((), "doctor")
    assert whole.returncode == 0, whole.stderr
    assert re.search(r"^verdict +steppe train runs here$", whole.stdout, re.M)
    assert "missing" not in whole.stdout
    bare = steppe(BARE, "doctor")
    assert bare.returncode == 1
    assert not bare.stderr
    (missing,) = re.findall(r"^missing +(.*)$", bare.stdout, re.M)
    assert missing.endswith("pip install grain array-record ml-collections xxhash matfree")
    for extra, brought in (("seqio", "seqio"), ("wandb", "wandb")):
        assert re.search(rf"^{extra} .*pip install 'steppe\[{extra}\]' brings {brought}", bare.stdout, re.M)
    assert all(len(output.stdout.splitlines()) <= 24 for output in (whole, bare))


@pytest.mark.parametrize("command", [
    ("train", "--config=quickstart"), ("evaluate", "--workdir=nothing"), ("config", "quickstart"),
    ("report", "nothing"), ("nonsense",), ("--help",),
])  # fmt: skip
def test_a_missing_package_is_one_line_in_every_command(steppe, command):
    answer = steppe(("ml_collections",), *command)
    assert answer.returncode == 2
    assert answer.stderr.splitlines() == ["needs ml_collections, which is not installed: pip install ml-collections"]


def test_training_from_a_prepared_directory_needs_few_packages(steppe, tmp_path):
    text, out, run = tmp_path / "text.jsonl", tmp_path / "prepared", tmp_path / "run"
    text.write_text("".join(json.dumps({"text": f"{i} minima, {i * i} of them flat."}) + "\n" for i in range(400)))
    keys = {"data.vocabulary": "bytes", "data.sequence_length": "32"}
    shared = [f"--config.{key}={value}" for key, value in keys.items()]
    made = steppe((), "prepare_data", "--config=base", f"--config.data.task=jsonl:{text}", f"--out={out}", *shared)
    assert made.returncode == 0, made.stderr
    keys = {
        "data.directory": out, "model.layers": 1, "model.width": 16, "model.heads": 2, "model.mlp_width": 16,
        "train.batch_size": 8, "train.duration": "2 steps", "evaluate.batches": 1, "optim.method": "adamw",
    }  # fmt: skip
    overrides = [*shared, *(f"--config.{key}={value}" for key, value in keys.items())]
    trained = steppe(SPARE, "train", "--config=base", f"--workdir={run}", *overrides)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "pip install matplotlib" in trained.stdout
    assert "finished" in trained.stdout.splitlines()
    assert trained.stdout.splitlines()[-1].endswith(f"steppe export --workdir={run} --out=models/run")
    answer = steppe(
        SPARE, "train", "--config=base", f"--workdir={tmp_path / 'other'}", *overrides, "--config.log.wandb=offline"
    )
    assert answer.returncode == 2
    assert re.search(r"config\.log\.wandb = 'offline': .*pip install 'steppe\[wandb\]'", answer.stderr)


def test_every_extra_is_known_by_its_module():
    for each in packages.requirements():
        assert packages.of_module(each.module).distribution == each.distribution
        if each.extra and each.extra not in packages.DEVELOPERS:
            assert "steppe[" in packages.remedy(each.module) or not packages.of_module(each.module).extra


def test_the_remedy_names_the_python_that_a_package_has_a_release_for(monkeypatch):
    monkeypatch.setattr(packages.sys, "version_info", (3, 14, 2))
    assert packages.remedy("seqio") == "with Python below 3.14, pip install 'steppe[seqio]'"
    assert packages.remedy("wandb") == "pip install 'steppe[wandb]'"
    monkeypatch.setattr(packages.sys, "version_info", (3, 13, 9))
    assert packages.remedy("seqio") == "pip install 'steppe[seqio]'"
