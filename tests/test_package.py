"""What is built from this tree: a wheel whose modules all import, which nothing in the user's directory can shadow."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("configs", "data", "lm", "optim", "scripts")
TINY = {
    "model.size": "0.01m", "data.sequence_length": "16", "train.batch_size": "8", "train.duration": "'2 steps'",
    "data.task": "lines:corpus.txt", "data.held_out_fraction": "0.2", "evaluate.batches": "1", "sample.tokens": "2",
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the unpacked wheel, the unpacked source distribution), the former made from the latter as pip would."""
    place = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = place.glob("*.whl"), place.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as whole:
        whole.extractall(place / "wheel")
    with tarfile.open(sdist) as whole:
        whole.extractall(place / "sdist", filter="data")
    return place / "wheel", next((place / "sdist").iterdir())


@pytest.fixture
def theirs(tmp_path):
    """A directory of a user, who has modules of the names that our rooms have."""
    for name in (*ROOMS, "steppe_user"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user was imported')\n")
    (tmp_path / "corpus.txt").write_text("\n".join(f"paragraph {n} of a text, with words in it" for n in range(200)))
    return tmp_path


def run(wheel: Path, where: Path, *words: str, isolated: bool = True) -> str:
    environment = {**os.environ, "PYTHONPATH": str(wheel), "STEPPE_CACHE": str(where / "cache")}
    command = [sys.executable, *(["-P"] if isolated else []), *words]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_every_module_of_the_tree_imports_from_the_wheel(built, theirs):
    wheel, _ = built
    files = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    names = [".".join(("steppe", *path.with_suffix("").parts)) for path in files if "studies" not in path.parts]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = f"import importlib\nfor name in {names}: print(importlib.import_module(name).__file__)"
    places = run(wheel, theirs, "-c", code).split()
    assert all(Path(place).is_relative_to(wheel) for place in places)
    assert all((wheel / "steppe" / room / "py.typed").exists() for room in ROOMS)


@pytest.mark.exhaustive  # a sweep of runs; imports and help from the wheel below
def test_a_sweep_of_runs_and_a_report_next_to_files_of_our_names(built, theirs):
    wheel, _ = built
    tiny = [f"--config.{key}={value.strip(chr(39))}" for key, value in TINY.items()]
    grid = ["--grid", "seed=0,1"]
    said = run(wheel, theirs, "-m", "steppe.scripts.sweep", "--config=quickstart", "--out=sweeps/s", *tiny, *grid)
    assert "2 finished" in said
    run(wheel, theirs, "-m", "steppe.scripts.report", "sweeps/s")
    page = (theirs / "sweeps" / "s" / "report" / "index.html").read_text(encoding="utf-8")
    assert "2 runs" in page
    # without -P python itself puts the user's directory first: nothing of ours is named as their files are
    assert "functional_sam" in run(
        wheel, theirs, "-c", "import steppe.optim; print(steppe.optim.METHODS)", isolated=False
    )


@pytest.mark.exhaustive  # the wheel is imported whole above
def test_the_tests_of_the_source_distribution_run(built, tmp_path):
    _, sdist = built
    shutil.copytree(sdist, tmp_path / "sdist")
    command = [sys.executable, "-m", "pytest", "-q", "tests/optim/test_readme.py"]
    done = subprocess.run(command, cwd=tmp_path / "sdist", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
