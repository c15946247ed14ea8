"""The time left of a sweep: from the steps that its runs have made, however many they had before."""

import io
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steppe.scripts.sweep.launch import Job
from steppe.scripts.sweep.plan import Run, Speed, table
from steppe.scripts.sweep.view import View

STEPS, FLOPS = 1000, 1e12


def made(directory, step):
    directory.mkdir(parents=True, exist_ok=True)
    record = {"kind": "train", "step": step, "tokens": 10 * step, "seconds": 1.0, "loss": 2.0}
    (directory / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def seconds_of(text):
    found = re.findall(r"left ([\d:]+|\?)", text)[-1]
    return math.nan if found == "?" else sum(int(part) * 60**at for at, part in enumerate(found.split(":")[::-1]))


@settings(max_examples=25, deadline=None)
@given(
    before=st.integers(0, 900),
    pace=st.floats(0.02, 20),
    expected=st.floats(0.02, 20) | st.just(math.nan),
    startup=st.floats(1, 300),
    waiting=st.integers(0, 5),
)
def test_the_time_left_is_that_of_the_steps_ahead(tmp_path_factory, before, pace, expected, startup, waiting):
    """pace: seconds a step, expected: what was thought of it before; NaN where nothing was known."""
    runs = [
        Run(f"run{n}", tmp_path_factory.mktemp("run"), [], None, {}, 10, STEPS, 10 * STEPS, FLOPS)
        for n in range(1 + waiting)
    ]
    made(runs[0].directory, before)
    speed = Speed(lambda run: FLOPS / STEPS / expected, 0.0 if expected == expected else math.nan, "")
    clock, said = [0.0], io.StringIO()
    with View(runs, speed, 1, stream=said, now=lambda: clock[0]) as view:
        job = Job(runs[0], None, 0.0)
        view.started(job)
        for step in (before, before + 1, before + 50, before + 100):  # the first before it has started
            made(runs[0].directory, step)
            clock[0] = startup * (step > before) + pace * (step - before)
            view.tick([job], runs[1:])
        view._shown = -math.inf  # as if the last line was long ago
        view.tick([job], runs[1:])
        assert seconds_of(said.getvalue()) == pytest.approx(pace * (STEPS * len(runs) - before - 100), rel=0.01, abs=1)
        made(runs[0].directory, STEPS)
        clock[0] = startup + pace * (STEPS - before)
        view.ended(runs[0], {"status": "finished"}, 0)
    assert seconds_of(said.getvalue()) == pytest.approx(pace * STEPS * waiting, rel=0.01, abs=1)


def test_a_plan_counts_the_steps_that_a_run_has_made(tmp_path):
    runs = [Run("run", tmp_path / "run", [], None, {"seed": 0, "optim.rho": None}, 10, STEPS, 10 * STEPS, FLOPS)]
    speed = Speed(lambda run: FLOPS / 1000, 0.0, "")
    assert "time    16:40" in table(runs, {"run": "unfinished"}, speed, 1)
    made(runs[0].directory, 750)
    shown = table(runs, {"run": "unfinished"}, speed, 1)
    assert "to do: 2,500 tokens, 2.5e+11 FLOPs" in shown
    assert "time    4:10" in shown
