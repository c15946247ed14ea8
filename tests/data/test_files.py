"""Writing leaves the old file or the new one, wherever it is interrupted; locks hold across processes."""

import json
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steppe.data import errors, files


def leftovers(directory):
    """Unfinished files, left by processes that died."""
    return sorted(directory.rglob(f"*{files.ASIDE}"))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("before", [None, "old"])
def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch, broken, before):
    path = tmp_path / "file.txt"
    if before is not None:
        files.write(path, before)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, broken, fail)
        with pytest.raises(OSError, match="No space"):
            files.write(path, "new")
    assert (path.read_text() if path.exists() else None) == before
    assert leftovers(tmp_path) == []
    files.write(path, b"new")
    assert path.read_text() == "new"


def test_a_block_that_fails_replaces_nothing(tmp_path):
    path = tmp_path / "file.txt"

    def half():
        with files.replacing(path) as aside:
            with open(aside, "w") as handle:
                handle.write("half")
            assert [str(found) for found in leftovers(tmp_path)] == [aside]
            raise KeyError

    with pytest.raises(KeyError):
        half()
    assert list(tmp_path.iterdir()) == []


def test_json_has_null_for_what_is_not_finite_and_as_many_digits_as_wanted(tmp_path):
    value = {"a": (1.23456789, math.nan), "b": [math.inf, 3, "nan", True, None]}
    files.write_json(tmp_path / "x.json", value, digits=3)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.23, None], "b": [None, 3, "nan", True, None]}
    assert files.plain(value)["a"][0] == 1.23456789


def test_a_lock_is_refused_to_another_process_and_free_once_its_holder_is_gone(tmp_path):
    path = tmp_path / "lock"
    assert not files.is_held(path)
    code = f"import sys, time\nfrom steppe.data import files\nwith files.lock({str(path)!r}):\n  print(1, flush=True)\n"
    with subprocess.Popen([sys.executable, "-c", code + "  time.sleep(60)"], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert files.is_held(path)
        with pytest.raises(files.Held, match=f"held by process {holder.pid} on "), files.lock(path):
            pass
        holder.kill()
    with files.lock(path):
        assert files.is_held(path)


def test_files_of_a_memory_address_are_found_and_read_through_fsspec():
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("a.txt", "b.txt", "c.md"):
        memory.pipe(f"/texts/{name}", name.encode())
    found = files.matching("memory://texts/*.txt")
    assert [files.opened(path).read() for path in found] == [b"a.txt", b"b.txt"]


def test_an_error_keeps_its_kind_and_fields_from_one_process_to_another():
    error = errors.BadRecords("config.data.shards = 0: must be 1", key="data.shards", value=0, accepted="1")
    again = errors.from_json(json.loads(json.dumps(errors.to_json(error))))
    assert type(again) is errors.BadRecords
    assert (str(again), vars(again)) == (str(error), vars(error))


PARTS = st.sampled_from(
    ["a", "b.bin", "..", ".", "", "out", "in", "C:", "a\\b", "n\0", "e\x1b[2J", "\ud800", "x" * 300]
)


@given(parts=st.lists(PARTS, min_size=1, max_size=4))
def test_a_stored_name_is_a_path_below_its_root_or_refused(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("tree")
    root = folder / "root"
    (root / "a").mkdir(parents=True)
    (root / "out").symlink_to(folder)
    (root / "in").symlink_to("a")
    (folder / "link").symlink_to(root)
    name = "/".join(parts)
    allowed = set(parts) <= {"a", "b.bin", "in", "out", "C:"} and parts[0] not in ("out", "C:")
    for top in (root, folder / "link"):
        if allowed:
            assert files.below(top, name) == top / name
            assert root in files.below(top, name).resolve().parents
        else:
            with pytest.raises(errors.DataError) as refusal:
                files.below(top, name)
            assert str(refusal.value).isprintable()
            assert str(top) in str(refusal.value)


@pytest.mark.parametrize("name", [None, 1, [], {}, True, b"a", "/", "/etc/passwd", "~/../x", "a" * 255 + "/" * 2000])
def test_what_is_no_relative_name_is_refused(tmp_path, name):
    with pytest.raises(errors.DataError):
        files.below(tmp_path, name)
