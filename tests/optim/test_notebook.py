"""The notebook of optim: its outputs are there, and running it again gives the same but for numbers."""

import re
from pathlib import Path

import nbformat
import pytest

from steppe import optim

NOTEBOOK = Path(optim.__file__).parent / "first_steps.ipynb"
NUMBER = r"[-+]?\d[\d:.,]*(e[-+]?\d+)?"  # other machines are of another speed and round differently


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def executed(folder: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, run in a folder."""
    from nbclient import NotebookClient

    notebook = read()
    NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
    return notebook


def said(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """The output of each cell of code, without numbers and "starting", which only slow starts say; a figure's kind."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    texts = [[each.get("text", " ".join(sorted(each.get("data", {})))) for each in of] for of in outputs]
    return [
        [
            " ".join(re.sub(NUMBER, "N", re.sub(r"^\w+: starting\n", "", text, flags=re.MULTILINE)).split())
            for text in of
        ]
        for of in texts
    ]


def test_every_cell_was_executed_in_order_and_none_failed():
    code = [cell for cell in read().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    text = "".join(output.get("text", "") for output in outputs)
    assert "all checks hold" in text
    assert "tuning mine.py:half_sign" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


@pytest.mark.exhaustive  # a minute or three: fits, a check of a direction, a plan of a judgement
def test_running_it_again_says_the_same_but_for_numbers(tmp_path):
    assert said(executed(tmp_path)) == said(read())


if __name__ == "__main__":  # writes the outputs anew
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(Path(folder)), NOTEBOOK)
