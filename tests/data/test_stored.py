"""Stored JSON is read with types: what will not do is one line that says where."""

import json
import os
from typing import Required, TypedDict

import pytest

from steppe.data import files, stored


class Part(TypedDict, total=False):
    steps: Required[stored.Count]
    names: list[str]


class Whole(TypedDict, total=False):
    config: Required[stored.Flat]
    parts: Required[dict[str, Part]]
    loss: float | None


GOOD = {"config": {"a": [1, "x"], "b": None}, "parts": {"one": {"steps": 3, "names": ["x"]}, "two": {"steps": 0}}}


def _read(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return stored.read(path, Whole)


def test_what_is_declared_is_read_with_what_is_not(tmp_path):
    assert _read(tmp_path, {**GOOD, "later": [1]}) == {**GOOD, "later": [1]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["parts"]["two"].update(steps="x"), "parts.two.steps = 'x': must be an integer"),
        (lambda v: v["parts"]["one"].update(steps=-1), "parts.one.steps = -1: must be an integer >= 0"),
        (lambda v: v["parts"]["one"].update(steps=2**60), f"parts.one.steps = {2**60}: must be an integer <= {2**53}"),
        (lambda v: v["parts"]["one"].update(steps=True), "parts.one.steps = True: must be an integer"),
        (lambda v: v["parts"]["one"]["names"].append(None), "parts.one.names[1] = None: must be a text"),
        (lambda v: v["parts"].update(three=[]), "parts.three = []: must be an object"),
        (lambda v: v["parts"]["two"].pop("steps"), "parts.two.steps: is missing"),
        (lambda v: v["config"].update(z={}), "config.z = {}: must be "),
        (lambda v: v.update(loss="inf"), "loss = 'inf': must be a number or null"),
        (lambda v: v.pop("config"), "config: is missing"),
    ],
)
def test_a_wrong_value_is_named_with_its_place_and_what_is_accepted(tmp_path, change, said):
    value = json.loads(json.dumps(GOOD))
    change(value)
    with pytest.raises(stored.Wrong) as refusal:
        _read(tmp_path, value)
    assert str(refusal.value).startswith(f"{tmp_path / 'file.json'}: {said}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[", b"[]", b"nul", b"\xff", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b'{"a": 1, "a": 2}',
        b'{"loss": 1, "x": {"b": 1, "b": 1}}', b"[" * 10**5, b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
        b'{"a": "' + b'\\"' * 10**6, b'"' * 10**6, b"9" * 10**5, b'{"a": "\\ud800"}',
    ],
    ids=lambda content: repr(content[:16]),
)  # fmt: skip
def test_what_is_no_sound_json_is_one_line(tmp_path, content):
    with pytest.raises(stored.Wrong) as refusal:
        _read(tmp_path, content)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_brackets_within_texts_are_no_depth(tmp_path):
    assert _read(tmp_path, {**GOOD, "note": '[{"' * 1000})["note"] == '[{"' * 1000
    deep = json.loads("[" * (stored.DEPTH - 1) + "]" * (stored.DEPTH - 1))
    assert _read(tmp_path, {**GOOD, "deep": deep})["deep"] == deep
    with pytest.raises(stored.Wrong, match="more than 64 deep"):
        _read(tmp_path, {**GOOD, "deep": [deep]})


def test_a_pipe_a_device_and_a_directory_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "link", "folder"):
        with pytest.raises(files.DataError, match="must be an ordinary file"):
            stored.read(tmp_path / name, dict)
    assert not files.is_held(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        stored.read(tmp_path / "nothing", dict)
    (tmp_path / "large").write_bytes(b" " * 100)
    with pytest.raises(stored.Wrong, match="too large"):
        stored.read(tmp_path / "large", dict, most=99)
