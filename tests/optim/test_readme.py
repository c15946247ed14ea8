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


def methods_table() -> str:
    """The methods as a Markdown table."""

    def cells(name: str, row: methods.Method | None) -> str:
        if row is None:
            return f"`{name}`, or any base | ∇L(θ) | | 1, 1 | 1.00 | |"
        forwards, backwards = row.counted()
        units = (forwards + 2 * backwards) / 3
        passes, times = f"{forwards}, {backwards}", f"{units:.2f}"
        if row.share:
            passes, times = f"1 + {forwards}s, {backwards}s", f"(1 + {3 * units:g}s)/3, s = k/B"
        elif row.period:
            passes = times = "1 + 1/k"
        defaults = ", ".join(f"{option} {each.default}" for option, each in row.declared().items())
        equation = row.equation.replace("|", "\\|")
        return f"`{name}` | {equation} | {row.source} | {passes} | {times} | {row.stored()} | {defaults}"

    head = "name | gradient handed to the base | source | F, B | cost | memory | defaults"
    lines = [head, "|".join(["---"] * 7), *(cells(name, row) for name, row in methods.METHODS.items())]
    aliases = ", ".join(f"`{alias}` for `{name}`" for alias, name in methods.ALIASES.items())
    return "\n".join(f"| {line} |" for line in lines) + f"\n\nAliases: {aliases}.\n"


def switches_table() -> str:
    """The switches as a Markdown table."""
    lines = ["switch | default | accepted | meaning", "|".join(["---"] * 4)]
    for name, (_, default, option) in two_pass.SWITCHES.items():
        meaning = option.meaning.replace("|", "\\|")
        lines.append(f"`{name}` | `{default}` | {option.accepted} | {meaning}")
    return "".join(f"| {line} |\n" for line in lines)


# the tables of the README: (what begins one, what ends it): its writer
TABLES = {
    ("<!-- methods: written by tests/optim/test_readme.py -->\n", "<!-- end -->"): methods_table,
    ("<!-- switches: written by tests/optim/test_readme.py -->\n", "<!-- end of switches -->"): switches_table,
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
