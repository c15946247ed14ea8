"""Stored JSON is read with types: what will not do is one line that says where."""

import json
import os
from typing import Annotated, Literal, Required, TypedDict

import pytest
from msgspec import Meta

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


class Leaf(TypedDict):
    n: int


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (int, "x", "a.b = 'x': must be an integer"),
        (int, 1.5, "a.b = 1.5: must be an integer"),
        (float, None, "a.b = None: must be a number"),
        (str, 1, "a.b = 1: must be a text"),
        (bool, 1, "a.b = 1: must be true or false"),
        (dict, [], "a.b = []: must be an object"),
        (list, {}, "a.b = {}: must be a list"),
        (int | str, None, "a.b = None: must be an integer or a text"),
        (int | None, "x", "a.b = 'x': must be an integer or null"),
        (Literal["up", "down"], "x", "a.b = 'x': must be a value that Steppe writes there"),
        (Literal["up"], 3, "a.b = 3: must be a text"),
        (dict[Literal["up"], int], {"x": 1}, "a.b = {'x': 1}: must be a value that Steppe writes there"),
        (Annotated[int, Meta(ge=0)], -1, "a.b = -1: must be an integer >= 0"),
        (Annotated[int, Meta(le=5)], 9, "a.b = 9: must be an integer <= 5"),
        (Annotated[float, Meta(ge=0)], -1.5, "a.b = -1.5: must be a number >= 0.0"),
        (Annotated[str, Meta(max_length=0)], "x", "a.b = 'x': must be a text of length <= 0"),
        (Annotated[str, Meta(pattern="^a$")], "x", "a.b = 'x': must be a text matching regex '^a$'"),
        (Annotated[list, Meta(max_length=1)], [1, 2], "a.b = [1, 2]: must be a list of length <= 1"),
        (tuple[int, int], [1], "a.b = [1]: must be a list of length 2"),
        (tuple[int, int], [1, "x"], "a.b[1] = 'x': must be an integer"),
        (list[Leaf], [{"n": 1}, {"n": None}], "a.b[1].n = None: must be an integer"),
        (dict[str, Leaf], {"one.two": {"n": 1}, "x [y]": {"n": None}}, "a.b.x [y].n = None: must be an integer"),
        (dict[str, dict[str, Leaf]], {"p": {"q": {"n": 1}, "r": {}}}, "a.b.p.r.n: is missing"),
        (Leaf, {}, "a.b.n: is missing"),
    ],
    ids=str,
)
def test_the_librarys_wording_of_every_kind_of_fault_is_understood(kind, value, said):
    """msgspec tells of a fault in words alone, which `_fault` takes apart: an upgrade may word it differently."""

    class Inside(TypedDict):
        b: kind

    class Outside(TypedDict):
        a: Inside

    with pytest.raises(stored.Wrong) as refusal:
        stored.typed({"a": {"b": value}}, Outside, "file")
    assert str(refusal.value) == f"file: {said}"


KINDS = [int, float, str, bool, dict, list, Literal["up"], tuple[int, int], Leaf, list[Leaf], dict[str, int]]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_no_fault_is_worded_in_a_way_that_is_not_known(kind):
    for value in (None, True, 3, 1.5, "x", [], [1], ["x"], {}, {"n": "x"}, {"x": []}, 2**70, [{"n": 1}, 3]):
        said = ""
        try:
            stored.typed([value], list[kind], "file")
        except stored.Wrong as wrong:
            said = str(wrong)
        assert not said or ": must be " in said or said.endswith(": is missing")
        assert not said or said.startswith("file: [0]")
        assert "`" not in said
