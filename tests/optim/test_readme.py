"""optim/README.md: its examples run, its table is the code's."""

import doctest
from pathlib import Path

from steppe.optim import methods, schedules

README = Path(methods.__file__).parent / "README.md"


def test_examples_of_the_readme():
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted > 30
    assert result.failed == 0


def test_examples_of_docstrings():
    assert doctest.testmod(schedules) == doctest.TestResults(failed=0, attempted=2)


MARKER = "<!-- methods: written by optim.methods.table() -->\n"


def test_method_table_is_written_from_the_code():
    written = README.read_text().split(MARKER)[1].split("<!-- end -->")[0]
    assert written == methods.table(), "to write it: python tests/optim/test_readme.py"
    for name in methods.METHODS:
        assert f"`{name}`" in written


if __name__ == "__main__":
    before, after = README.read_text().split(MARKER)
    README.write_text(before + MARKER + methods.table() + after[after.index("<!-- end -->") :])
