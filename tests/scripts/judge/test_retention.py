"""Rows of retention are wrong as rarely as declared, also where the looks stopped for a reason like theirs."""

import math

import numpy as np

from steppe.scripts.judge import retention
from steppe.scripts.judge.numbers import looks


def test_all_rows_together_cover_the_truth_as_often_as_declared_where_the_loss_stopped_the_looks():
    random, repeats, covered = np.random.default_rng(3), 500, []
    rule, names = looks.plan(0.008, 0.005, comparisons=4), list(retention.MEASURES)
    for _ in range(repeats):
        loss = random.normal(0.0, 0.008, rule.looks[-1])
        n = looks.verdict(rule, {"adamw": loss.tolist()})["adamw"].interval.n
        plain = random.normal(0.1, 0.02, (rule.looks[-1], len(names)))
        other = plain + 0.01 + loss[:, None] + random.normal(0, 0.004, plain.shape)  # goes with the loss
        mine, theirs = ([dict(zip(names, row, strict=True)) for row in each[:n].tolist()] for each in (other, plain))
        found = retention.rows(rule, mine, theirs)
        covered.append(all(each["low"] <= 0.01 <= each["high"] for each in found.values()))
    assert np.mean(covered) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / repeats)


def test_a_measure_that_a_run_lacks_has_no_row():
    rule = looks.Rule(0.005, 0.05, 0.8, (3, 5), 1)
    mine = [{"q8_channel": 0.1, "noise_0.1": each} for each in (0.30, 0.31, 0.32)]
    found = retention.rows(rule, mine, [{"q8_channel": 0.1, "noise_0.1": 0.2}, *[{"noise_0.1": 0.2}] * 2])
    assert list(found) == ["noise_0.1"]
    said = retention.text({"rows": found, "gain": 0.5})
    assert "noise of 0.1 rms" in said
    assert "more" in said
    assert "0.5 nats a token on the second text" in said
    assert retention.rows(rule, [{}] * 3, [{}] * 3) == {}
