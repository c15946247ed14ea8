"""Texts of a command line as values of keys, with ml_collections' config flags as the oracle."""

import contextlib

import pytest
from absl import flags
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from steppe.configs import base, keys
from steppe.configs.keys import ConfigError
from steppe.configs.read import UsageError, read_config, reader, shown

KINDS = {bool: keys.FLAG, int: keys.integer(), float: keys.number(), str: keys.TEXT, tuple: keys.TEXTS}
TEXTS = st.one_of(
    st.sampled_from(
        [
            "",
            "1",
            "-3",
            "1e-2",
            "1_000",
            " 7 ",
            "nan",
            "True",
            "t",
            "f",
            "0",
            "yes",
            "None",
            "a",
            "a b,",
            "a,b",
            "()",
            "('a',)",
            "['a', 'b']",
            "('a', 1)",
            "(",
            "'a'",
            "layers/.*",
            "^(?!.*(norm)).*$",
            "{[]: 1}",
            "(" * 300,
            "\0",
        ]
    ),
    st.text(max_size=12),
    st.lists(st.text(max_size=4), max_size=3).map(lambda items: repr(tuple(items))),
    st.floats().map(repr),
    st.integers().map(str),
)


def theirs(kind: type, text: str):
    """The value of config flags, None where they read none."""
    values, config = flags.FlagValues(), ConfigDict({"key": placeholder(kind)})
    argv = ["steppe", f"--config.key={text}"]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    with contextlib.suppress(flags.Error, TypeError, ValueError, MemoryError, RecursionError):
        values(argv)
        return config.key
    return None


def ours(kind: type, text: str):
    with contextlib.suppress(ValueError):
        return KINDS[kind].read(text)
    return None


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(KINDS)), TEXTS)
@example(tuple, "1")
@example(bool, "")
def test_a_text_means_what_config_flags_read(kind, text):
    """But for numbers of base 16 and 8, sets and dicts, and what are no texts in a tuple: these are refused."""
    wanted = theirs(kind, text)
    if kind is tuple and not all(isinstance(item, str) for item in wanted or ()):
        wanted = None
    if not text.startswith(("{", "0x", "0o")):
        assert repr(ours(kind, text)) == repr(wanted)


PAINT = """
from typing import Annotated
from steppe.optim import ascent
from steppe.optim.options import SHARE, Option

def paint(colour: Annotated[float, Option("its share", *SHARE)] = 0.5) -> ascent.Ascent:
    "sam"
    return ascent.gradient()
"""


@pytest.fixture
def method(tmp_path):
    """A method whose name brings a key of its own."""
    (tmp_path / "paint.py").write_text(PAINT)
    return f"{tmp_path}/paint.py:paint"


@pytest.mark.parametrize("order", [1, -1])
def test_a_config_s_own_keys_are_read_checked_stored_and_shown(method, order, tmp_path):
    line = [("optim.method", method), ("optim.colour", "0.25"), ("seed", "3")]
    config = read_config("quickstart", line[::order])
    assert (config.optim.method, config.optim.colour) == (method, 0.25)
    (tmp_path / "mine.py").write_text(shown(config))
    read = reader(str(tmp_path / "mine.py"))
    assert read([]).to_dict() == config.to_dict() == base.completed(config.to_dict()).to_dict()
    assert "colour" not in read([("optim.method", "adamw")]).optim
    assert read_config("quickstart", [("optim.method", method)]).optim.colour is None
    for given_line, said in (
        ([("optim.colour", "1")], r"config\.optim\.colour: no such key"),
        ([*line[:1], ("optim.colour", "red")], r"config\.optim\.colour = red: must be a number >= 0 and < 1"),
        ([("optim.method", "adamw"), line[1]], r"config\.optim\.colour: no such key"),
    ):
        with pytest.raises(UsageError, match=said):
            read_config("quickstart", given_line)
    with pytest.raises(ConfigError, match="no such key"):
        base.completed(config.to_dict() | {"optim": config.optim.to_dict() | {"method": "adamw"}})
