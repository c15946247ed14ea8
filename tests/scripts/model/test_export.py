"""What an export needs."""

import sys

import pytest

from steppe.scripts.model import export


@pytest.mark.parametrize(
    ("missing", "extra"), [("safetensors", "hub"), ("tokenizers", "corpus"), ("transformers", "hub")]
)
def test_what_is_not_installed_is_said_before_anything_is_read(tmp_path, monkeypatch, capsys, missing, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'hf'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"export needs {missing}: pip install 'steppe[{extra}]'" in said
    assert not list(tmp_path.iterdir())
