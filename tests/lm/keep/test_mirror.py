"""Runs behind addresses: another machine goes on bit for bit, the last to begin has the run, nothing goes backwards."""

import os
import pathlib
import re
import shutil
import signal
import socket
import threading
import time
from contextlib import ExitStack

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFile

from helpers import lm_runs, object_store
from steppe.data.errors import DataError, StorageError
from steppe.lm.keep import branch, checkpoint, mirror, saved, seal, store
from steppe.lm.keep.exits import WorkdirError
from steppe.lm.run import train
from steppe.scripts import cli

pytestmark = pytest.mark.usefixtures("one_device")

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


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(mirror, "SECONDS", 0.05)


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
    assert lm_runs.run(config.copy_and_resolve_references(), address, draws=True) == train.FINISHED
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


@pytest.mark.parametrize("made", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("reading", [False, True], ids=["of the run", "of readers"])
def test_a_seal_in_the_cache_that_is_no_file_is_none(machine, address, reading, made):
    machine("first")
    with mirror.kept(address, True, print) as place:
        step(place, 5, "five")
    if reading:
        shutil.rmtree(mirror._place(address).parent)
    mirror.here(address, checkpoints=True)
    damaged = mirror._place(address, reading) / "checkpoints" / "5" / seal.NAME
    damaged.unlink()
    made(damaged)
    found = mirror.here(address, checkpoints=True)
    assert seal.read(epath.Path(found) / "checkpoints" / "5")["step"] == 5, "fetched again"


@pytest.mark.exhaustive  # three runs; the fetching: the tests around
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
        place = run.enter_context(mirror.kept(address, True, lines.append))
        with pytest.raises(WorkdirError, match="is in use by process"), mirror.kept(address, True, print):
            pass
        fsspec.filesystem("memory").pipe_file(f"{address}/{mirror.HOLDER}", b"another")
        while not told:
            time.sleep(0.01)
        write(place, "late.txt", "not there")
        with pytest.raises(WorkdirError, match=r"was taken over by another; .* later work is only in /"):
            run.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert names(address) == {mirror.HOLDER}
    with mirror.kept(address, True, lines.append):
        pass
    assert "another did not end cleanly; this process takes over" in " ".join(lines)
    assert names(address) == {"late.txt"}, "the files not yet sent are sent once it has the run again"


def test_what_cannot_be_copied_is_said_once_kept_and_sent_by_the_next_start(machine, address, monkeypatch):
    machine("first")
    store, lines = fsspec.filesystem("memory"), []
    run = ExitStack()
    place = run.enter_context(mirror.kept(address, True, lines.append))
    step(place, 5, "five")
    while not any(name.endswith(seal.NAME) for name in names(address)):
        time.sleep(0.01)
    put = type(store).put_file
    monkeypatch.setattr(type(store), "put_file", _refuses)
    step(place, 6, "six")
    while not any("NOT COPIED" in line for line in lines):
        time.sleep(0.01)
    time.sleep(0.3)
    with pytest.raises(StorageError, match=r".*: PermissionError: no; anything newer than step 5 is only in /"):
        run.close()
    (said,) = [line for line in lines if "NOT COPIED" in line]
    assert f"anything newer than step 5 is only in {place}; the run continues" in said
    assert mirror.here(address, checkpoints=True) == place, "what is ahead is what is read"
    monkeypatch.setattr(type(store), "put_file", put)
    assert steps(names(address)) == {5}
    with mirror.kept(address, True, lines.append) as place:
        assert steps_in(place) == {5, 6}, "nothing goes because the address lacks it"
    assert steps(names(address)) == {5, 6}
    assert f"step 6 is newer in {place} than step 5 there; it is sent, and the run resumes from it" in lines[-2]


def test_an_outage_that_ends_is_said_to_have_ended(machine, address, monkeypatch):
    machine("first")
    store, lines = type(fsspec.filesystem("memory")), []
    with mirror.kept(address, True, lines.append) as place:
        for _ in range(2):
            with monkeypatch.context() as patched:
                patched.setattr(store, "cat_file", _refuses)
                wait(lambda: lines[-1].startswith("NOT COPIED"))
            wait(lambda: lines[-1].startswith("COPIED      again"))
        step(place, 5, "five")
    assert [line.split()[0] for line in lines] == ["workdir", "NOT", "COPIED", "NOT", "COPIED"]
    assert steps(names(address)) == {5}


def test_a_store_that_does_not_answer_is_said_and_never_asked_twice_at_once(machine, address, monkeypatch):
    machine("first")
    monkeypatch.setattr(store, "PATIENCE", 0.2)
    memory, lines, asked = type(fsspec.filesystem("memory")), [], []
    mended, real = threading.Event(), memory.cat_file

    def waits(self, *arguments, **more):
        asked.append(arguments)
        mended.wait()
        return real(self, *arguments, **more)

    with mirror.kept(address, True, lines.append) as place:
        with monkeypatch.context() as patched:
            patched.setattr(memory, "cat_file", waits)
            wait(lambda: "no answer for" in lines[-1])
            step(place, 5, "five")
            time.sleep(0.5)
            assert len(asked) == 1
            mended.set()
        wait(lambda: lines[-1].startswith("COPIED      again"))
    assert steps(names(address)) == {5}


def test_a_bucket_that_goes_is_said_and_a_file_that_goes_is_not(machine, address, monkeypatch):
    machine("first")
    with mirror.kept(address, True, print) as place:
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
    place = run.enter_context(mirror.kept(address, True, print))

    def no_bucket(self, source, target, **more):
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(store, "put_file", no_bucket)
    write(place, "c.txt", "c")
    with pytest.raises(StorageError, match="bucket does not exist"):
        run.close()


def test_a_folder_next_to_a_file_called_address_is_its_own(machine, tmp_path):
    machine("first")
    (tmp_path / "address").write_text("memory://bucket/elsewhere")
    (tmp_path / "run").mkdir()
    write(tmp_path / "run", "a.txt", "a")
    mirror.add(tmp_path / "run", "a.txt")
    assert not fsspec.filesystem("memory").exists("/bucket/elsewhere")


def test_a_step_saved_anew_is_none_until_it_is_whole(machine, address, monkeypatch):
    machine("first")
    order = []
    with mirror.kept(address, True, print) as place:
        step(place, 5, "five", old="of the first only")
        os.makedirs(os.path.join(place, "checkpoints", "6"))
        write(os.path.join(place, "checkpoints", "6"), "data", "without a seal, so no checkpoint yet")
    assert names(address) == {"checkpoints/5/data", "checkpoints/5/old", f"checkpoints/5/{seal.NAME}"}
    memory = type(fsspec.filesystem("memory"))
    for name in ("put_file", "rm_file"):
        real = getattr(memory, name)

        def noted(self, *arguments, name=name, real=real, **more):
            order.append((name, arguments[-1].rpartition("/")[2]))
            return real(self, *arguments, **more)

        monkeypatch.setattr(memory, name, noted)
    monkeypatch.setattr(mirror, "SECONDS", 1000)
    with mirror.kept(address, True, print) as place:
        time.sleep(0.3)
        order.clear()
        shutil.rmtree(os.path.join(place, "checkpoints", "5"))
        step(place, 5, "two of another length")
    last = [("put_file", "data"), ("put_file", seal.NAME), ("rm_file", mirror.HOLDER)]
    assert order == [("rm_file", seal.NAME), ("rm_file", "old"), *last]
    assert names(address) == {"checkpoints/5/data", f"checkpoints/5/{seal.NAME}"}


def test_there_go_steps_that_retention_let_go_and_no_others(machine, address):
    machine("first")
    with mirror.kept(address, True, print) as place:
        for number in (5, 6, 7, 8):
            step(place, number, f"step {number}")
    assert steps(names(address)) == {5, 6, 7, 8}
    with mirror.kept(address, True, print) as place:
        with checkpoint.Checkpoints(os.path.join(place, "checkpoints"), log=lambda line: None) as checkpoints:
            checkpoints._delete(5)
            checkpoints.forget(7)  # a run that goes back
        shutil.rmtree(os.path.join(place, "checkpoints", "6"))  # a user's doing
    assert steps(names(address)) == {6, 7}
    step(place, 8, "eight")
    with mirror.kept(address, True, print) as place:
        pass
    folder = pathlib.Path(place, "checkpoints")
    folder.joinpath("8").rename(folder / f"8{checkpoint.DELETED}")  # and there the process was killed
    with mirror.kept(address, True, print) as place:
        assert steps_in(place) == {7}
    assert steps(names(address)) == {6, 7}
    machine("second")
    with mirror.kept(address, True, print) as place:
        assert steps_in(place) == {6, 7}
    machine("first")
    with mirror.kept(address, True, print) as place:
        assert steps_in(place) == {7}


def test_what_is_newer_there_is_taken_and_where_both_went_on_nothing_is_touched(machine, address, monkeypatch):
    lines, memory = [], type(fsspec.filesystem("memory"))
    machine("first")
    with mirror.kept(address, True, print) as place:
        write(place, "run_id", "one")
        step(place, 5, "five")
        step(place, 9, "nine")
    machine("second")
    with mirror.kept(address, True, print) as other:
        with checkpoint.Checkpoints(os.path.join(other, "checkpoints"), log=print) as checkpoints:
            checkpoints.forget(5)  # it goes back, and another way from there
        step(other, 7, "seven")
        write(other, "metrics.jsonl", "of the second")
    machine("first")
    run = ExitStack()
    place = run.enter_context(mirror.kept(address, True, lines.append))
    assert steps_in(place) == {5, 7}
    assert read(place, "metrics.jsonl") == "of the second"
    assert read(place, "checkpoints/superseded/9/data") == "nine", "kept, where no run looks for its newest"
    with monkeypatch.context() as patched:
        patched.setattr(memory, "put_file", _refuses)
        step(place, 11, "eleven")
        with pytest.raises(StorageError):
            run.close()
    assert "step 7 at the URL is newer than step 9 here; it is fetched" in lines[0]
    machine("second")
    with mirror.kept(address, True, print) as other:
        step(other, 8, "eight")
    machine("first")
    before, there = contents(place), names(address)
    expected = (
        f"holds steps that this machine never had: step 8 there, step 11 in {place}; nothing was changed. To resume"
    )
    with pytest.raises(WorkdirError, match=re.escape(expected)), mirror.kept(address, True, print):
        pass
    reading = mirror.here(address, checkpoints=True)
    assert steps_in(reading) == {5, 7, 8}, "what is named is read"
    assert contents(place) == before
    assert names(address) == there
    shutil.move(place, f"{place}-kept")
    with mirror.kept(address, True, print) as place:
        assert steps_in(place) == {5, 7, 8}
    fsspec.filesystem("memory").pipe_file(f"{address}/run_id", b"two")
    expected = f"holds the run two, this machine the run one: step 8 there, step 8 in {place}; nothing was changed"
    with pytest.raises(WorkdirError, match=re.escape(expected)), mirror.kept(address, True, print):
        pass


def test_an_address_that_was_emptied_is_filled_again(machine, address):
    machine("first")
    memory, lines = fsspec.filesystem("memory"), []
    with mirror.kept(address, True, print) as place:
        write(place, "metrics.jsonl", "lines")
        step(place, 5, "five")
        wait(lambda: steps(names(address)) == {5})
        memory.rm(address, recursive=True)
        wait(lambda: steps(names(address)) == {5} and "metrics.jsonl" in names(address))
    memory.rm(address, recursive=True)
    machine("second")
    with pytest.raises(WorkdirError, match="it is empty"):
        mirror.here(address)
    machine("first")
    assert mirror.here(address) == place
    with mirror.kept(address, True, lines.append) as place:
        assert steps_in(place) == {5}
    assert f"step 5 is newer in {place} than anything there" in lines[0]
    assert names(address) == {"metrics.jsonl", "checkpoints/5/data", f"checkpoints/5/{seal.NAME}"}


def test_a_run_whose_cache_an_older_version_wrote_goes_on(machine, address):
    machine("first")
    with mirror.kept(address, True, print) as place:
        step(place, 5, "five")
    step(place, 6, "six")
    os.unlink(os.path.join(os.path.dirname(place), mirror.KNOWN))
    shutil.rmtree(os.path.join(place, "checkpoints", "5"))
    holder = f"process 1 on {socket.gethostname()} (01234567)"
    store = fsspec.filesystem("memory")
    store.pipe_file(f"{address}/{mirror.HOLDER}", b"process 1 on elsewhere (01234567)")
    with pytest.raises(WorkdirError, match="step 5 there, step 6 in"), mirror.kept(address, True, print):
        pass
    store.pipe_file(f"{address}/{mirror.HOLDER}", holder.encode())
    with mirror.kept(address, True, print) as place:
        assert steps_in(place) == {6}
    assert 6 in steps(names(address))


def test_readers_write_and_delete_nothing_but_their_own_copies(machine, address, text, tmp_path, capsys):
    machine("first")
    config = lm_runs.config(*text, **METHOD)
    assert lm_runs.run(config.copy_and_resolve_references(), address, draws=True, until=10) == train.FINISHED
    place = mirror._place(address)
    fsspec.filesystem("memory").rm(f"{address}/checkpoints", recursive=True)
    fsspec.filesystem("memory").rm(f"{address}/corpus.json")
    before, there = contents(place), names(address)
    for words in (["watch", "--once", address], ["plot", address], ["evaluate", f"--workdir={address}"]):
        assert cli.main(words) == 0
    assert {**contents(place), "loss.png": before["loss.png"]} == before, "the picture is what plot writes"
    assert names(address) == there


def test_a_readers_copy_follows_the_address_and_keeps_what_only_it_has(machine, address):
    machine("first")
    with mirror.kept(address, True, print) as place:
        step(place, 5, "five")
        step(place, 6, "six")
        write(place, "old.txt", "old")
    shared = os.stat(os.path.join(place, "checkpoints", "6", "data")).st_ino
    reading = mirror.here(address, checkpoints=True)
    assert reading != place
    assert os.stat(os.path.join(reading, "checkpoints", "6", "data")).st_ino == shared, "nothing is fetched twice"
    machine("second")
    reading = mirror.here(address, checkpoints=True)
    assert steps_in(reading) == {5, 6}
    memory = fsspec.filesystem("memory")
    memory.rm(f"{address}/checkpoints/6", recursive=True)
    memory.rm(f"{address}/old.txt")
    assert mirror.here(address, checkpoints=True) == reading
    assert steps_in(reading) == {5}
    assert read(reading, "checkpoints/superseded/6/data") == "six", "perhaps the last copy there is"
    assert not os.path.exists(os.path.join(reading, "old.txt"))
    memory.rm(f"{address}/checkpoints", recursive=True)
    mirror.here(address, checkpoints=True)
    assert steps_in(reading) == {5}, "an address without any takes none"


@pytest.mark.parametrize(
    "name", ["../../../x", "checkpoints/5/../../../../x", "a/../../x", "/x", "checkpoints/../../x", "a\\..\\x"]
)
def test_no_key_leads_out_of_the_directory_that_stands_for_an_address(machine, address, tmp_path, name):
    machine("first")
    with mirror.kept(address, True, print) as place:
        step(place, 5, "five")
    fsspec.filesystem("memory").store[f"{address.removeprefix('memory:/')}/{name}"] = MemoryFile(None, "/x", b"evil")
    for here in ("first", "second"):
        machine(here)
        before = contents(tmp_path)
        with pytest.raises(DataError, match=r"must be relative|forbidden characters") as refused:
            mirror.here(address, checkpoints=True)
        assert "\n" not in str(refused.value)
        with pytest.raises(DataError), mirror.kept(address, True, print):
            pass
        after = contents(tmp_path)
        assert {name for name in after if after[name] != before.get(name)} <= {
            name for name in after if name.endswith(("/address", ".lock"))
        }
        assert set(before) <= set(after)


def test_no_link_leads_what_is_fetched_out_of_the_directory(machine, address, tmp_path):
    machine("first")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_text("mine")
    with mirror.kept(address, True, print) as place:
        write(place, "x", "theirs")
    machine("second")
    reading = mirror.here(address)
    os.rename(reading, f"{reading}-before")
    os.makedirs(reading)
    os.symlink(outside, os.path.join(reading, "folder"))
    os.symlink(outside / "x", os.path.join(reading, "x"))
    fsspec.filesystem("memory").pipe_file(f"{address}/folder/x", b"theirs")
    with pytest.raises(DataError, match="link that leads out"):
        mirror.here(address)
    assert (outside / "x").read_text() == "mine"


def test_a_damaged_step_at_the_address_is_said_and_left_out(machine, address, capsys):
    machine("first")
    with mirror.kept(address, True, print) as place:
        step(place, 5, "five")
        step(place, 6, "six")
    fsspec.filesystem("memory").pipe_file(f"{address}/checkpoints/6/data", b"siX")
    machine("second")
    lines = []
    with mirror.kept(address, True, lines.append) as place:
        assert steps_in(place) == {5}
    assert "CHECKPOINT 6 AT memory://" in lines[0]
    assert "IS NOT USED: data was altered" in lines[0]
    with mirror.kept(address, True, lines.append) as place:
        assert steps_in(place) == {5}


@pytest.mark.exhaustive  # an address without a server: the next tests
def test_a_run_on_a_server_goes_on_bit_for_bit_after_an_outage(text, machine, tmp_path, monkeypatch):
    """The run ends without reaching its address; the next start goes on from its newest seal."""
    config = lm_runs.config(*text, **METHOD, checkpoint__every="5 steps")
    assert lm_runs.run(config.copy_and_resolve_references(), str(tmp_path / "plain")) == train.FINISHED
    machine("first")
    address = "s3://bucket/runs/run"
    with object_store.server() as port, object_store.Proxy(port) as proxy:
        for key, value in object_store.environment(proxy.port).items():
            monkeypatch.setenv(key, value)
        assert lm_runs.run(config.copy_and_resolve_references(), address, until=5) == train.FINISHED
        sends = mirror._Copier._send

        def cut_off(self, step):
            proxy.turn("skewed" if step > 5 else "open")
            return sends(self, step)

        with monkeypatch.context() as patched:
            patched.setattr(mirror._Copier, "_send", cut_off)
            with pytest.raises(StorageError, match=r"anything newer than step 5 is only in /"):
                lm_runs.run(config.copy_and_resolve_references(), address, until=15)
        proxy.turn("open")
        place = mirror._place(address)
        assert steps_in(place) == {10, 15}
        object_store.plant("bucket", "runs/other", b"not below the run")
        assert lm_runs.run(config.copy_and_resolve_references(), address) == train.FINISHED
        assert [record["step"] for record in lm_runs.records(place, "run")] == [0, 5, 15]
        machine("second")
        assert lm_runs.losses(mirror.here(address)) == lm_runs.losses(tmp_path / "plain")
        assert saved.steps(address) == [15, 20]
        object_store.plant("bucket", "runs/run/../../../x", b"evil")
        with pytest.raises(DataError, match=re.escape("the name '../../../x' must be relative")):
            mirror.here(address)


def test_a_missing_driver_is_one_line(machine):
    machine("first")
    with pytest.raises(DataError, match=r"adl://x/y: cannot be reached \(.*\)$"):
        mirror.here("adl://x/y")


def step(place, number, content, **more):
    """A sealed step with files of these contents."""
    folder = os.path.join(place, "checkpoints", str(number))
    os.makedirs(folder)
    for name, text in {"data": content, **more}.items():
        write(folder, name, text)
    seal.write(epath.Path(folder), number, "run", {})


def steps(found):
    return {int(name.split("/")[1]) for name in found if name.endswith(f"/{seal.NAME}")}


def steps_in(place):
    return steps(contents(place, "checkpoints/[0-9]*/*"))


def contents(place, pattern="**/*"):
    place = pathlib.Path(place)
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.glob(pattern) if path.is_file()}


def read(folder, name):
    return (pathlib.Path(folder) / name).read_text()


def wait(true, seconds=60):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


def write(folder, name, text):
    with open(os.path.join(folder, name), "w") as handle:
        handle.write(text)


def _refuses(*_, **__):
    raise PermissionError("no")
