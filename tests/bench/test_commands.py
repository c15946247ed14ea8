"""Every script of this folder, run by its path on a small size."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TWO = ("precond_functional_sam, stale", "precond_functional_sam, stale, no floor")
SHAPE = ("--layers=1", "--width=16", "--vocabulary=64", "--batch_size=4", "--sequence_length=16", "--chunks=2")
TINY = ("--sizes", "0.01m", "--batch_size=8", "--sequence_length=16", "--vocabulary_size=64", "--runs=1")


def ran(name: str, *words: str, status: int = 0) -> subprocess.CompletedProcess:
    line = [sys.executable, f"tests/bench/{name}.py", *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done


def rows(done: subprocess.CompletedProcess) -> list[list[str]]:
    """The cells of the lines of a Markdown table."""
    lines = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line] for line in lines]


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "tests" / "bench").glob("[!t_]*.py")])
def test_a_script_explains_itself_and_refuses_in_one_line(name):
    assert ran(name, "--help").stdout.startswith(f"usage: tests/bench/{name}.py ")
    assert ran(name, "--nothing", status=2).stderr.count("\n") == 1


@pytest.mark.exhaustive  # a command of minutes
def test_methods():
    table = rows(ran("methods", "adamw", "sam", *SHAPE))
    assert [row[0] for row in table] == ["`adamw`", "`sam`"]
    assert 1.7 < float(table[1][1]) < 2.1
    assert ran("methods", "samm", status=2).stderr.count("\n") == 1


@pytest.mark.exhaustive  # a command of minutes
def test_curvature():
    table = rows(ran("curvature", *TINY))
    assert [row[0] for row in table] == ["gradient", "hessian", "ggn", "nme", "preconditioned hessian"]


@pytest.mark.exhaustive  # a command of minutes
def test_shares():
    table = rows(ran("shares", "bytes", "--size=0.01m", "--steps", "2", "--directions", *TWO))
    assert [row[1] for row in table] == ["tied", "tied", "untied", "untied"]
    assert all(sum(map(float, row[4:8])) == pytest.approx(1, abs=3e-4) for row in table)  # of four roundings
    assert float(table[-1][8]) > 5 * float(table[-2][8])  # without a floor one row takes most
    ran("shares", "--size=9t", status=2)


@pytest.mark.exhaustive  # a command of minutes
def test_data():
    said = ran("data", "--size=0.01m", "--steps=1", "--seconds=0.05").stdout
    assert [line.split("|")[0].split()[0] for line in said.splitlines()[-2:]] == ["quickstart", "0.01m,"]
