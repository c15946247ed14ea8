"""Prompts of a file."""

import json

import pytest

from steppe.scripts import command
from steppe.scripts.model import generate


def test_lines_end_at_newlines_alone_and_hold_no_byte_order_mark(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffThe value of the\r\n\nIf the\n\ufeffA class\u2028b\x0cc\x85d\x1ce\n".encode())
    assert generate._prompts(str(file)) == ["The value of the", "", "If the", "A class\u2028b\x0cc\x85d\x1ce"]
    rows = [{"prompt": text} for text in ("a\u2028b", "x\x85y", "\ufeff", "tab\t")]
    lines = tmp_path / "p.jsonl"
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert generate._prompts(str(lines)) == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    "line", ['{"prompt": "a", "n": NaN}', '{"prompt": 3}', '["a"]', '{"prompt": "\\ud800"}', '{"prompt": "a"} x', ""]
)
def test_lines_of_jsonl_are_strictly_json(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "b"}\n' + line + "\n")
    with pytest.raises(command.UsageError, match=r"line 2 must be an object with a text as prompt"):
        generate._prompts(str(file))
