"""optim/README.md: its examples run, its table is the code's."""

import doctest
from pathlib import Path

import pytest

from steppe.optim import methods, schedules
from steppe.optim.passes import two_pass

README = Path(methods.__file__).parent / "README.md"


def test_examples_of_the_readme():
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted > 30
    assert result.failed == 0


def test_examples_of_docstrings():
    assert doctest.testmod(schedules) == doctest.TestResults(failed=0, attempted=2)


# the tables of the README: (what begins one, what ends it): its writer
TABLES = {
    ("<!-- methods: written by optim.methods.table() -->\n", "<!-- end -->"): methods.table,
    ("<!-- switches: written by optim.passes.two_pass.table() -->\n", "<!-- end of switches -->"): two_pass.table,
}


@pytest.mark.parametrize("marks", TABLES, ids=lambda marks: marks[0][5:13])
def test_tables_are_written_from_the_code(marks):
    begin, end = marks
    written = README.read_text().split(begin)[1].split(end)[0]
    assert written == TABLES[marks](), "to write it: python tests/optim/test_readme.py"


def test_tables_name_every_method_and_switch():
    text = README.read_text()
    for name in (*methods.METHODS, *two_pass.SWITCHES):
        assert f"| `{name}`" in text


if __name__ == "__main__":
    for (begin, end), table in TABLES.items():
        before, after = README.read_text().split(begin)
        README.write_text(before + begin + table() + after[after.index(end) :])
