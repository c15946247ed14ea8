"""Runs behind addresses: another machine goes on bit for bit, the last to begin has the run, nothing is half there."""

import os
import shutil
import signal
import time
from contextlib import ExitStack

import fsspec
import pytest

from helpers import lm_runs
from steppe.data.errors import DataError
from steppe.lm.keep import branch, mirror, saved, seal
from steppe.lm.keep.exits import StorageError, WorkdirError
from steppe.lm.run import train
from steppe.scripts import cli

METHOD = {"optim__method": "functional_sam", "optim__rho": 0.05, "checkpoint__keep": 2}


@pytest.fixture
def text(tmp_path):
    return lm_runs.write_text(tmp_path)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Goes to another machine: one with a cache of its own."""
    return lambda name: monkeypatch.setenv("STEPPE_CACHE", str(tmp_path / name))


@pytest.fixture
def address(request):
    store = fsspec.filesystem("memory")
    place = f"memory://bucket/{request.node.name}/run"
    yield place
    if store.exists("/bucket"):
        store.rm("/bucket", recursive=True)


def names(address):
    store, root = fsspec.core.url_to_fs(address)
    return {path.removeprefix(f"{root}/") for path in store.find(root)}


def test_another_machine_goes_on_bit_for_bit_and_reads(text, machine, address, tmp_path, capsys):
    config = lm_runs.config(*text, **METHOD)
    assert lm_runs.run(config.copy_and_resolve_references(), str(tmp_path / "plain")) == train.FINISHED
    machine("first")
    assert lm_runs.run(config.copy_and_resolve_references(), address, until=10) == train.FINISHED
    shutil.rmtree(tmp_path / "first" / "runs")
    machine("second")
    assert lm_runs.run(config.copy_and_resolve_references(), address) == train.FINISHED
    found = names(address)
    assert {"config.json", "run_id", "corpus.json", "metrics.jsonl", "loss.png"} <= found
    assert not [name for name in found if name.endswith((".tmp", "lock")) or name == mirror.HOLDER]
    steps = {name.split("/")[1] for name in found if name.startswith("checkpoints/")}
    assert steps == {path.name for path in (tmp_path / "plain" / "checkpoints").iterdir()}, "as many are kept there"
    machine("third")
    assert cli.main(["plot", address]) == 0
    here = mirror.here(address)
    assert not os.path.exists(f"{here}/checkpoints"), "a picture needs none"
    assert lm_runs.losses(here) == lm_runs.losses(tmp_path / "plain")
    assert saved.steps(address) == sorted(map(int, steps))
    assert cli.main(["evaluate", f"--workdir={address}"]) == 0
    assert "nats/token" in capsys.readouterr().out


def test_a_branch_and_a_start_off_an_address(text, machine, address, tmp_path):
    config = lm_runs.config(*text, **METHOD)
    machine("first")
    assert lm_runs.run(config.copy_and_resolve_references(), address) == train.FINISHED
    machine("second")
    assert branch.named(f"{address}@10") == (address, 10)
    branched = lm_runs.config(*text, **METHOD, branch_from=f"{address}@10")
    assert lm_runs.run(branched, str(tmp_path / "branch")) == train.FINISHED
    assert lm_runs.losses(tmp_path / "branch") == lm_runs.losses(mirror.here(address))
    assert lm_runs.records(tmp_path / "branch", "branch")[0]["parent"] == address
    started = lm_runs.config(*text, **METHOD, init_from=f"{address}/checkpoints/20")
    assert lm_runs.run(started, str(tmp_path / "start"), until=1) == train.FINISHED
    first = lm_runs.losses(tmp_path / "start")[0]
    assert first < lm_runs.losses(tmp_path / "branch")[0]


def test_the_last_to_begin_has_the_run(machine, address, tmp_path):
    machine("first")
    told, lines = [], []
    before = signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    run = ExitStack()
    try:
        place = run.enter_context(mirror.kept(address, True, lines.append, seconds=0.05))
        with pytest.raises(WorkdirError, match="is in use by process"), mirror.kept(address, True, print):
            pass
        fsspec.filesystem("memory").pipe_file(f"{address}/{mirror.HOLDER}", b"another")
        while not told:
            time.sleep(0.01)
        write(place, "late.txt", "not there")
        with pytest.raises(WorkdirError, match="was taken by another; what this process did since is not there"):
            run.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert names(address) == {mirror.HOLDER}
    with mirror.kept(address, True, lines.append):
        pass
    assert "had not been left in order by another; it is taken over" in " ".join(lines)
    assert names(address) == set()


def test_what_cannot_be_copied_is_said_and_tried_again(machine, address, monkeypatch):
    machine("first")
    store, lines = fsspec.filesystem("memory"), []
    run = ExitStack()
    place = run.enter_context(mirror.kept(address, True, lines.append, seconds=0.01))
    put = type(store).put_file
    monkeypatch.setattr(type(store), "put_file", _refuses)
    write(place, "a.txt", "a")
    while not any("NOT COPIED" in line for line in lines):
        time.sleep(0.01)
    with pytest.raises(StorageError, match=r"memory://.*: PermissionError: no"):
        run.close()
    monkeypatch.setattr(type(store), "put_file", put)
    assert len([line for line in lines if "NOT COPIED" in line]) == 1, "said once, however often it fails"
    with mirror.kept(address, True, lines.append) as place:
        assert os.listdir(place) == [], "the address is the run"


def test_a_bucket_that_goes_is_said_and_a_file_that_goes_is_not(machine, address, monkeypatch):
    machine("first")
    with mirror.kept(address, True, print, seconds=1000) as place:
        write(place, "a.txt", "a")
        write(place, "b.txt", "b")
        store = type(fsspec.filesystem("memory"))
        put = store.put_file

        def removed_meanwhile(self, source, target, **more):
            if source.endswith("b.txt"):
                os.unlink(source)
            put(self, source, target, **more)

        monkeypatch.setattr(store, "put_file", removed_meanwhile)
    assert names(address) == {"a.txt"}
    run = ExitStack()
    place = run.enter_context(mirror.kept(address, True, print, seconds=1000))

    def no_bucket(self, source, target, **more):
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(store, "put_file", no_bucket)
    write(place, "c.txt", "c")
    with pytest.raises(StorageError, match="bucket does not exist"):
        run.close()


def test_a_folder_beside_a_file_called_address_is_its_own(machine, tmp_path):
    machine("first")
    (tmp_path / "address").write_text("memory://bucket/elsewhere")
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", "a.txt", "a")
    mirror.add(tmp_path / "run", "a.txt")
    assert not fsspec.filesystem("memory").exists("/bucket/elsewhere")


def test_a_step_saved_anew_is_none_until_it_is_whole(machine, address, monkeypatch):
    machine("first")
    order = []
    with mirror.kept(address, True, print, seconds=1000) as place:
        step = os.path.join(place, "checkpoints", "5")
        os.makedirs(step)
        write(step, "data", "one")
        os.makedirs(os.path.join(place, "checkpoints", "6"))
        write(os.path.join(place, "checkpoints", "6"), "data", "without a seal, so no checkpoint yet")
        write(step, seal.NAME, "one")
    assert names(address) == {"checkpoints/5/data", f"checkpoints/5/{seal.NAME}"}
    store = type(fsspec.filesystem("memory"))
    for name in ("put_file", "rm_file"):
        real = getattr(store, name)

        def noted(self, *arguments, name=name, real=real, **more):
            order.append((name, arguments[-1].rpartition("/")[2]))
            return real(self, *arguments, **more)

        monkeypatch.setattr(store, name, noted)
    with mirror.kept(address, True, print, seconds=1000) as place:
        write(os.path.join(place, "checkpoints", "5"), "data", "two of another length")
        write(os.path.join(place, "checkpoints", "5"), seal.NAME, "two, too")
    assert order[:3] == [("rm_file", seal.NAME), ("put_file", "data"), ("put_file", seal.NAME)]
    with mirror.kept(address, True, print, seconds=1000) as place:
        shutil.rmtree(os.path.join(place, "checkpoints", "5"))
        order.clear()
    assert order[:2] == [("rm_file", seal.NAME), ("rm_file", "data")]
    assert names(address) == set()


def test_a_missing_driver_is_one_line(machine):
    machine("first")
    with pytest.raises(DataError, match=r"adl://x/y: cannot be reached \(.*\)$"):
        mirror.here("adl://x/y")


def write(folder, name, text):
    with open(os.path.join(folder, name), "w") as handle:
        handle.write(text)


def _refuses(*_, **__):
    raise PermissionError("no")
