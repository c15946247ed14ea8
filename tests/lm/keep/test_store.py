"""The files behind an address: one request at a time, whatever becomes of it."""

import threading

import fsspec
import pytest

from steppe.data.errors import StorageError
from steppe.lm.keep import store


def test_a_request_without_an_answer_holds_the_next_and_is_taken_up_again(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "PATIENCE", 0.1)
    memory = type(fsspec.filesystem("memory"))
    answers, asked, real = threading.Event(), [], memory.put_file

    def waits(self, source, target, **more):
        asked.append(target)
        answers.wait()
        return real(self, source, target, **more)

    monkeypatch.setattr(memory, "put_file", waits)
    (tmp_path / "a").write_text("a")
    behind = store.Store("memory://requests/run", tmp_path)
    for _ in range(2):
        with pytest.raises(StorageError, match="memory://requests/run: no answer for 0 s"):
            behind.put({"a": tmp_path / "a"})
    with pytest.raises(StorageError, match="no answer for 0 s"):
        behind.write("b", b"b")
    assert not fsspec.filesystem("memory").exists("/requests/run/b"), "it would overtake the one before"
    answers.set()
    behind._pending.answer.result(10)
    assert behind.put({"a": tmp_path / "a"}) == {"a"}
    behind.write("b", b"b")
    assert set(behind.names()) == {"a", "b"}
    assert len(asked) == 1, "asked again it is the same request"
    fsspec.filesystem("memory").rm("/requests", recursive=True)
