"""A disk that is full: every command that writes says so in one line, leaves no part of a file and no old one changed.

The system itself refuses to write more than a number of bytes into a file (RLIMIT_FSIZE), wherever the writer is.
"""

import contextlib
import io
import os
import resource
import warnings

import pytest

from helpers import lm_runs, report_runs
from steppe.lm.keep import exits
from steppe.scripts import cli, process

RUN, SWEEP, CONFIG = "--workdir=HERE/run", "HERE/sweep", "--config=HERE/own.py"
LINES = {
    "prepare_data": ["prepare_data", CONFIG, "--out=NEW/corpus"],
    "prepare_data vocabulary": ["prepare_data", "vocabulary", CONFIG, "--out=NEW/v.model", "--size=400"],
    "export": ["export", RUN, "--out=NEW/model"],
    "curvature": ["curvature", RUN, "--batches=1", "--lanczos=2", "--probes=1", "--densities=1"],
    "retention": ["retention", RUN, "--fine_tune=none", "--batches=1", "--noise=0.1", "--out=NEW/retention"],
    "plot": ["plot", f"{SWEEP}/runs/adamw"],
    "report": ["report", SWEEP, "--out=NEW/report"],
    "report pack": ["report", "pack", SWEEP, "--out=NEW/runs.jsonl"],
    "report compare": ["report", "compare", f"{SWEEP}/runs/adamw", f"{SWEEP}/runs/sam", "--out=NEW/page.html"],
    "report rivals": ["report", "rivals", SWEEP, "--out=NEW/rivals"],
    "sweep": ["sweep", CONFIG, "--grid=seed=0", "--out=NEW/sweep", "--jobs=1"],
}
LIMITS = (0, 300, 3000, 20_000)  # bytes
SLOW = ("curvature", "retention", "sweep")
LOCKS = ("lock", ".lock", ".lockfile")  # held by what they are, whatever is in them


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A run, a sweep, and the config of the run as a file."""
    place = tmp_path_factory.mktemp("full")
    text, cache = lm_runs.write_text(place)
    assert lm_runs.run(lm_runs.config(text, cache, train__duration="4 steps"), place / "run") == exits.FINISHED
    (place / "own.py").write_text(
        "from helpers import lm_runs\n\n\ndef get_config():\n"
        f"    return lm_runs.config({text!r}, {cache!r}, train__duration='4 steps').unlock()\n"
    )
    runs = {"adamw": report_runs.plan("adamw"), "sam": report_runs.plan("sam", 0.1)}
    losses = {"adamw": 3.0, "sam": 2.9}
    report_runs.write_sweep(place / "sweep", {name: (runs[name][1], loss) for name, loss in losses.items()})
    return place


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPPE_CACHE", str(tmp_path / "steppe"))
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))


@contextlib.contextmanager
def full_at(limit):
    """Within it no file grows beyond this number of bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def answer(line):
    """(status, the last line said)."""
    out = io.StringIO()  # what pytest itself captures into is a file
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            status = cli.main(line)
        except SystemExit as stop:
            status = stop.code
    return status, (out.getvalue().strip().splitlines() or [""])[-1]


def contents(place):
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def harm(before, after):
    """Files that are changed, gone, empty, or parts."""
    parts = (".tmp", ".partial", "-tmp")
    odd = [path for path, content in after.items() if not content and path.name not in LOCKS and path not in before]
    odd += [path for path in after if any(part.endswith(parts) for part in path.parts)]
    return odd + [path for path, content in before.items() if after.get(path) != content]


def limits():
    """(command, limits): a file's beginning and a page's middle here, every limit at night."""
    for name in LINES:
        few = (300,) if name in (*SLOW, "export") else (300, 20_000)
        yield pytest.param(name, few, id=name, marks=[pytest.mark.exhaustive] * (name in SLOW))
        if len(few) > 1:
            yield pytest.param(name, LIMITS, id=f"{name}, every limit", marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(("name", "limits"), [*limits()])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(here, tmp_path, name, limits):
    full = None
    for limit in limits:
        new = tmp_path / f"new{limit}"
        new.mkdir()
        line = [word.replace("NEW", str(new)).replace("HERE", str(here)) for word in LINES[name]]
        before = contents(here)
        with full_at(limit):
            status, said = answer(line)
        assert not harm(before, contents(here) | contents(new)), limit
        assert status in (0, exits.STORAGE), (limit, said)
        if status:
            full = line
            assert "File too large" in said, (limit, said)
            assert str(here) in said or str(new) in said or str(tmp_path) in said, f"{said}: which file?"
        for path in set(contents(here)) - set(before):
            path.unlink()
    assert full, "it wrote nothing that did not go in"
    assert answer(full)[0] == 0, "the same command goes on once there is room"


@pytest.mark.parametrize("limit", [0, 300, 3000, 20_000])
def test_a_run_on_a_full_disk_stops_and_goes_on_once_there_is_room(here, tmp_path, limit):
    config = lm_runs.config(str(here), str(here / "cache"), train__duration="4 steps")
    run = tmp_path / "run"
    guarded = process.refusing(lambda argv: lm_runs.run(config.copy_and_resolve_references(), run))
    out = io.StringIO()
    with full_at(limit), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert guarded([]) == exits.STORAGE, out.getvalue()
    assert "Traceback" not in out.getvalue()
    assert not harm({}, contents(tmp_path))
    assert lm_runs.run(config, run) == exits.FINISHED
    assert lm_runs.losses(run) == lm_runs.losses(here / "run")


def test_a_compiled_program_of_which_a_part_was_written_is_compiled_anew(tmp_path):
    whole, cut, used = (tmp_path / f"{name}-cache" for name in ("whole", "cut", "used"))
    for program in (whole, cut, used):
        program.write_bytes(b"program")
    (tmp_path / "whole-atime").write_bytes(bytes(8))
    (tmp_path / "used-atime").write_bytes(b"")
    process._drop_unfinished(tmp_path)
    assert {path.name for path in tmp_path.glob("*-cache")} == {"whole-cache"}


def test_a_place_that_is_not_there_needs_no_clearing(tmp_path):
    process._drop_unfinished(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
