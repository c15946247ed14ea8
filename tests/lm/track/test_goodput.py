"""Goodput: every second counts for one thing, over restarts and rollbacks."""

import json

import pytest

from helpers import lm_runs
from steppe.lm.run import train
from steppe.lm.track import goodput, lines
from steppe.scripts import results


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_every_second_counts_once():
    clock = Clock()
    spent = goodput.Goodput(clock)
    clock.now += 3
    with spent.spending("other"):
        clock.now += 1
        with spent.spending("step"):
            spent.mark(0)
            clock.now += 10
            spent.mark(10)
            with spent.spending("evaluate"):
                clock.now += 5
            clock.now += 4
            spent.move(0.5, "step", "data")
            spent.back(12)  # to the mark at 10
            clock.now += 2
    found = spent.seconds()
    assert {kind: seconds for kind, seconds in found.items() if seconds} == {
        "start": 3, "other": 1, "step": 12, "evaluate": 5, "data": 0.5, "lost": 3.5,
    }  # fmt: skip
    assert sum(found.values()) == clock.now - 100
    spent.add({"step": 100, "of another version": 2})
    assert spent.seconds()["step"] == 112
    assert spent.seconds()["other"] == 3
    assert goodput.share(spent.seconds()) == 112 / (clock.now - 100 + 102)


def test_one_line_says_it():
    seconds = {**dict.fromkeys(goodput.KINDS, 0.0), "step": 900.0, "compile": 60.0, "lost": 40.0}
    assert goodput.described(seconds) == "90.0% of 16.7 min in steps; compiling 60.0 s, steps done again 40.0 s"
    said = goodput.described(seconds, 0.5)
    assert said.startswith("90.0% of 16.7 min in steps; MFU 50.0% in them, 45.0% of all; ")


def _record(kind, step, **values):
    return json.dumps({"kind": kind, "step": step, **values}) + "\n"


def test_what_is_thrown_away_at_a_restart_is_lost(tmp_path):
    steps = [_record("train", step, tokens=step, seconds=10.0 + step, loss=1.0) for step in range(1, 8)]
    saved = _record("checkpoint", 5, goodput={"step": 5.0, "start": 10.0, "lost": 1.0})
    path = tmp_path / lines.METRICS
    path.write_text("".join([_record("run", 0, goodput={"start": 9.0}), *steps[:5], saved, *steps[5:]]))
    records = lines.read(tmp_path)
    assert goodput.earlier(records, 5) == {"step": 5.0, "start": 10.0, "lost": 1.0 + 2.0}
    assert goodput.earlier(records, 0) == {"start": 9.0, "lost": 6.0}  # from the first step that is thrown away
    assert goodput.earlier(lines.read(tmp_path / "none"), 0) == {}


def test_a_run_says_what_its_starts_were_spent_on(tmp_path, capsys):
    text = lm_runs.write_text(tmp_path)
    config = lm_runs.config(*text)
    assert train.run(config.copy_and_resolve_references(), str(tmp_path / "run"), until=12) == train.FINISHED
    (first,) = lm_runs.records(tmp_path / "run", "goodput")
    assert train.run(config.copy_and_resolve_references(), str(tmp_path / "run")) == train.FINISHED
    found = lm_runs.records(tmp_path / "run", "goodput")
    assert [record["step"] for record in found] == [12, 20]
    second = found[-1]["goodput"]
    assert all(second[kind] >= first["goodput"][kind] for kind in goodput.KINDS)
    assert second["compile"] > first["goodput"]["compile"] > 0
    assert second["step"] > 0
    assert second["evaluate"] > 0
    assert second["lost"] == 0
    assert f"goodput     {goodput.described(second)}" in capsys.readouterr().out
    (result,) = results.read(tmp_path / "run")
    assert result.goodput == pytest.approx(goodput.share(second))
    # as a kill leaves it: steps after the last checkpoint were recorded, and are done again
    for newer in (tmp_path / "run" / "checkpoints").iterdir():
        if newer.name == "20":
            newer.rename(tmp_path / "gone")
    assert train.run(config.copy_and_resolve_references(), str(tmp_path / "run")) == train.FINISHED
    assert lm_runs.records(tmp_path / "run", "goodput")[-1]["goodput"]["lost"] > 0
