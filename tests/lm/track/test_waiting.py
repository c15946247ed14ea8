"""What somebody who waits is told, where there is no terminal: what is done, and the time left."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steppe.lm.track import waiting


@pytest.fixture
def clock():
    """clock() -> the time, which clock.sleep(seconds) moves."""

    class Clock:
        now = 0.0

        def __call__(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    return Clock()


def test_each_thing_is_named_before_it_is_done_and_timed_after(capsys, clock):
    said = lambda: capsys.readouterr().out  # noqa: E731
    with waiting.Progress("looking", clock=clock) as progress:
        assert said() == "looking\n"
        progress.expect([1.0, 1.0])
        progress.begin("a\x1b[2J", {"noise": 1.0, "bits": 3.0})
        assert said() == "[1/2] a\\x1b[2J\n"
        clock.sleep(4)
        progress.tick("noise")
        assert said() == "", "a line was just printed"
        clock.sleep(8)
        progress.tick("bits")
        assert said() == "[1/2] a\\x1b[2J  bits  left 1:24\n", "12 s for a quarter of one, and as long for the next"
        clock.sleep(8)
        progress.end("file")
        assert said() == "[1/2] file  20.0 s\n"
        progress.begin("b")
        assert said() == "[2/2] b  left 0:20\n"


def test_the_time_left_follows_from_what_is_expected_until_more_is_known(clock):
    with waiting.Progress("looking", clock=clock) as progress:
        assert progress.left != progress.left
        progress.expect([10.0, 20.0, 30.0], pace=1.0)
        assert progress.left == 60
        progress.begin("a")
        clock.sleep(4)
        assert progress.left == 56
        clock.sleep(16)
        progress.end("a")  # it took twice as long
        assert progress.next == 40
        assert progress.left == 100
        progress.begin("b", {"one": 1.0, "two": 1.0})
        progress.tick("one")
        clock.sleep(30)
        progress.tick("two")
        assert progress.left == 30 + 60


def test_a_command_that_is_silent_for_long_says_that_it_starts(capfd, monkeypatch):
    monkeypatch.setattr(waiting, "FIRST", 0.05)
    waiting.soon("train: starting")
    time.sleep(0.3)
    assert capfd.readouterr().out == "train: starting\n"
    waiting.soon("train: starting")
    waiting.Progress("looking").line("something else")
    time.sleep(0.3)
    assert capfd.readouterr().out == "something else\n"


def test_what_is_compiled_is_said_before_it_is_compiled():
    said = []
    with waiting.compiling("the step", said.append, before=3.2):
        assert said == ["compiling   the step, 3.2 s before"]
    assert said[1].startswith("compiled    in 0.")


CELLS = st.text("abc=,.", max_size=30)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1), st.integers(1, 90))
def test_no_name_is_cut_and_cells_of_a_column_end_at_one_place(rows, width):
    lines = waiting.columns(rows, width).split("\n")
    if len(lines) == len(rows):
        assert max(map(len, lines)) <= width
        names, rest = [line[: max(len(row[0]) for row in rows)].rstrip() for line in lines], lines
    else:
        names, rest = lines[::2], lines[1::2]
    assert names == [name for name, *_ in rows]
    assert len(set(map(len, rest))) == 1
    assert all(line.endswith(row[-1]) for line, row in zip(rest, rows, strict=True))
