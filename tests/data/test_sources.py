"""The grammar of tasks."""

import pytest

from steppe.data.errors import DataError
from steppe.data.sources import held_out_sources, hub_split, parse


def test_grammar():
    a, b = parse("0.7 c4=tfds:c4/en:3.1.0@train[:1%] + 0.3 jsonl:/d/year=2020/*.jsonl.gz")
    assert a == ("c4", "tfds", "c4/en:3.1.0", "train[:1%]", 0.7)
    assert b == ("jsonl", "jsonl", "/d/year=2020/*.jsonl.gz", "train", 0.3)
    assert parse("tfds:lm1b")[0].name == "lm1b"
    assert parse("embedded") == (("embedded", "embedded", "", "train", 1.0),)
    assert held_out_sources("0.5 embedded + 0.5 text:x", ())[1] == ("text", "text", "x", "held_out", 1.0)
    assert held_out_sources("embedded", ("val=lines:v@all", "embedded"))[0] == ("val", "lines", "v", "all", 1.0)


def test_grammar_of_the_hub():
    a, b = parse("0.5 hf:a/b/c-d:v1@train[:1.5GB] + 0.5 hf:tinystories")
    assert a == ("a_b_c-d_v1", "hf", "a/b/c-d:v1", "train[:1.5GB]", 0.5)
    assert b == ("tinystories", "hf", "tinystories", "train", 0.5)
    assert [source.split for source in held_out_sources("0.5 a=hf:a/b@x[:7] + 0.5 tfds:c4/en@train[:1%]", ())] == [
        "held_out[:7]",
        "held_out",
    ]
    inf = float("inf")
    assert hub_split("x[:7]") == ("x", (7, inf, True))
    assert hub_split("x[:1.5kB]") == ("x", (inf, 1500, True))
    assert hub_split("x[:3B]") == ("x", (inf, 3, True))
    assert hub_split("x[:all]") == ("x", (inf, inf, True))
    assert hub_split("x") == ("x", (inf, inf, False))


@pytest.mark.parametrize(
    "task",
    [
        *(
            "",
            "embeded",
            "embedded:x",
            "topics:x",
            "jsonl",
            "jsonl:",
            "0 embedded + 1 text:x",
            "-1 text:x",
            "embedded + 0.5 text:x",
        ),
        *("0.5 text:a + 0.5 text:b", "embedded@validation", "web:x", "nan text:x"),
        *("hf:unknown", "hf:a/b@train[:x]", "hf:a/b@train[5:]", "hf:a/b@train[:5XB]", "hf:a/b:", "hf"),
    ],
)
def test_bad_tasks_name_the_key(task):
    with pytest.raises(DataError, match=r"^config\.data\.task = [^\n]*$"):
        parse(task)


def test_bad_held_out_sets_name_the_key():
    for held_out in (("nothing",), ("text:a", "text:b")):
        with pytest.raises(DataError, match=r"^config\.data\.held_out = [^\n]*$"):
            held_out_sources("embedded", held_out)
