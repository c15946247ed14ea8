"""The train command refuses what cannot run: one line, status 2, nothing compiled, nothing written."""

import subprocess
import sys

import pytest

from steppe.scripts import train

CONFIG = "--config=base"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([CONFIG, "--config.optim.rhoo=1"], ["config.optim.rhoo", "did you mean config.optim.rho?"]),
        ([CONFIG, "--config.optim.method=samm"], ["config.optim.method = 'samm'", "precond_functional_sam"]),
        ([CONFIG, "--config.optim.method=sam", "--config.optim.rho=-1"], ["config.optim.rho = -1.0", ">= 0"]),
        ([CONFIG, "--config.mesh.fsdp=7777"], ["config.mesh.fsdp = 7777", "divides"]),
        ([CONFIG, "--config.model.heads=5"], ["config.model.heads = 5", "128"]),
        ([CONFIG, "--config.data.task=embeded"], ["config.data.task", "embeded", "embedded"]),
        ([CONFIG, "--config.data.vocabulary=missing.model"], ["config.data.vocabulary", "missing.model"]),
        ([CONFIG, "--config.data.directory=missing"], ["config.data.directory", "missing"]),
        ([CONFIG, "--process_id=1"], ["--process_id=1", "--coordinator"]),
        ([CONFIG, "--coordinator=h:1", "--num_processes=2", "--process_id=2"], ["--process_id=2", "process_id < num"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(argv, parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STEPPE_CACHE", str(tmp_path / "cache"))
    workdir = tmp_path / "run"
    try:
        status = train.main([*argv, f"--workdir={workdir}"])
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr().err
    assert status == 2
    assert printed.count("\n") == 1
    for part in parts:
        assert part in printed
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot_be_one(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "below"):
        with pytest.raises(SystemExit) as stop:
            train.main([CONFIG, f"--workdir={place}"])
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"--workdir: {place}: must be a writable directory, or one to be created\n"
    assert file.read_text() == "mine"


def test_the_exit_status_reaches_the_shell(tmp_path):
    command = [
        sys.executable,
        "-P",
        "-m",
        "steppe.scripts.train",
        CONFIG,
        f"--workdir={tmp_path / 'run'}",
        "--config.train.batch_size=0",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "config.train.batch_size = 0: must be an integer >= 1\n"
    assert done.stdout == ""
