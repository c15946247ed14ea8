"""Planted candidates are judged right on real runs: AdamW by another name, and one whose steps are a hundredth."""

import json
import textwrap

import pytest

from helpers.lm_runs import write_text
from steppe.scripts import cli

pytestmark = pytest.mark.exhaustive

FILE = """
    import optax

    def same(learning_rate, b1, b2, eps, weight_decay, decay_mask):
        "AdamW"
        decay = optax.add_decayed_weights(weight_decay, decay_mask)
        return optax.chain(optax.scale_by_adam(b1, b2, eps), decay, optax.scale_by_learning_rate(learning_rate))

    def slow(learning_rate, b1, b2, eps):
        "a hundredth of Adam's steps"
        rate = optax.scale_by_learning_rate(learning_rate)
        return optax.chain(optax.scale_by_adam(b1, b2, eps), rate, optax.scale(0.01))
"""


def test_planted_candidates_are_judged_right_and_share_their_rivals_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(textwrap.dedent(FILE))
    text, cache = write_text(tmp_path)
    keys = {
        "model.size": "0.01m",
        "data.task": f"text:{text}/train.txt@all",
        "data.held_out": f"('val=text:{text}/val.txt@all',)",
        "data.cache": cache,
        "data.sequence_length": 32,
        "train.batch_size": 8,
        "train.duration": "120 steps",
        "evaluate.every": "50%",
        "sample.tokens": 0,
    }
    line = ["--config=quickstart", *(f"--config.{key}={value}" for key, value in keys.items()), "--out=judged"]
    few = ["--trials=3", "--pairs=4"]
    runs = {}
    for name in ("same", "slow"):
        assert cli.main(["judge", f"mine.py:{name}", *line, *few]) == 0
        runs[name] = len(list((tmp_path / "judged" / "runs").iterdir()))
    found = {
        name: json.loads((tmp_path / "judged" / "verdicts" / f"mine.py_{name}.json").read_text())["comparisons"]
        for name in runs
    }
    # the same steps, but for the order of a chain: the same losses to rounding
    assert found["same"]["adamw"]["state"] == "within the effect"
    assert found["same"]["adamw"]["tokens"]["value"] == pytest.approx(1.0, abs=1e-3)  # where 1 is measured itself
    assert found["same"]["adamw, both by ema"]["state"] == "within the effect"
    assert found["slow"]["adamw"]["tokens"]["high"] < 1
    assert abs(found["same"]["adamw"]["difference"]) < 1e-4
    assert found["slow"]["adamw"]["state"] == "worse"
    assert "adamw, as many FLOPs" not in found["slow"]  # it costs what AdamW costs
    # trials and seeds of its own, its rivals' are there; told worse it needs no longer AdamW
    assert runs["slow"] - runs["same"] <= 3 + 4
    capsys.readouterr()
    assert cli.main(["judge", "--out=judged"]) == 0
    board = capsys.readouterr().out.splitlines()[1:-1]
    assert [row.split()[0] for row in board] == ["mine.py:same", "mine.py:slow"]

    # the same command again makes no run and says the same
    before = (tmp_path / "judged" / "verdicts" / "mine.py_slow.json").read_bytes()
    assert cli.main(["judge", "mine.py:slow", *line, *few]) == 0
    assert len(list((tmp_path / "judged" / "runs").iterdir())) == runs["slow"]
    assert (tmp_path / "judged" / "verdicts" / "mine.py_slow.json").read_bytes() == before

    # from its packed runs the verdict and its page are made again, byte for byte, without a run
    packed = tmp_path / "packed" / "judged"
    assert cli.main(["report", "pack", "judged", f"--out={packed}/runs.jsonl"]) == 0
    (packed / "judge.json").write_bytes((tmp_path / "judged" / "judge.json").read_bytes())
    (packed / "verdicts").mkdir()
    for name in ("same", "slow"):
        verdict = json.loads((tmp_path / "judged" / "verdicts" / f"mine.py_{name}.json").read_text())
        (packed / "verdicts" / f"mine.py_{name}.json").write_text(json.dumps(verdict | {"comparisons": {}}))
    assert cli.main(["judge", f"--out={packed}", "--again"]) == 2  # it would run mine.py, which a stored verdict names
    assert cli.main(["judge", f"--out={packed}", "--again", "--trust"]) == 0
    assert not (packed / "runs").exists()
    for name in ("index.html", "verdicts/mine.py_same.json", "verdicts/mine.py_slow.json"):
        assert (packed / name).read_bytes() == (tmp_path / "judged" / name).read_bytes()

    # a budget that ends before the first look: nothing is told, and the needed cost is
    capsys.readouterr()
    assert cli.main(["judge", "mine.py:slow", *line, *few, "--budget=1e6"]) == 0
    assert "cannot be told: would take 4 pairs" in capsys.readouterr().out
    assert cli.main(["judge", "mine.py:slow", *line, *few, "--plan"]) == 0
    stages = {row.split("  ")[0]: row.split() for row in capsys.readouterr().out.splitlines()}
    assert stages["tuning mine.py:slow"][2:4] == ["3", "3"]  # runs, and those that are there
    assert stages["look at 4 pairs"][4] == "3"  # the candidate's, AdamW's and its short decay's
    assert cli.main(["judge", "mine.py:slow", *line[:-1], "--config.seed=3", *few, "--out=judged"]) == 2
    assert cli.main(["judge", "adamw", *line, *few]) == 2
