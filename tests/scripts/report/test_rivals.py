"""Entries at their best setting, paired by seed; and what a sweep of widths says of transfer."""

import csv
import json
import math

import pandas as pd
import pytest
from scipy import stats

from helpers import report_runs
from steppe.scripts import results
from steppe.scripts.report import __main__ as command
from steppe.scripts.report import answer, tables, transfer
from steppe.scripts.report.numbers import differences, entries, statistics


def runs():
    """adamw at two rates, nadamw, msam at two rho; the settings that are best on seed 0 also on seeds 1 to 3."""
    found = {}

    def add(loss, method="adamw", rho=None, seed=0, rate=0.01, **others):
        name, overrides = report_runs.plan(method, rho, seed=seed, optim__peak_learning_rate=rate, **others)
        found[name] = overrides, loss

    add(2.5, rate=0.02)
    add("diverged", rate=0.04)
    add(2.4, "msam", 0.1)
    for seed, level in enumerate((0.0, 0.01, -0.02, 0.03)):
        add(2.45 + level, seed=seed)
        add(2.44 + level + (0.004 if seed % 2 else -0.004), seed=seed, optim__base="nadamw")
        add(2.35 + level + (0.001 if seed % 2 else -0.001), "msam", 0.3, seed=seed)
    return found


@pytest.fixture
def sweep(tmp_path):
    report_runs.write_sweep(tmp_path / "sweep", runs())
    for path in (tmp_path / "sweep" / "runs").glob("*method=adamw*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        ends = [line for line in lines if line["kind"] == "evaluate"]
        kept = [{**line, "kind": "average", "weights": "ema", "loss": line["loss"] - 0.05} for line in ends]
        path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *kept]))
    return tmp_path / "sweep"


def entries_of(sweep):
    return {entry.name: entry for entry in entries.analyse(results.with_averages(results.read(sweep))).entries}


def test_each_entry_takes_its_best_setting_and_is_compared_on_seeds_that_did_not_choose_it(sweep):
    found = entries_of(sweep)
    assert list(found) == ["msam", "nadamw ema", "adamw ema", "nadamw", "adamw"]
    assert (found["adamw"].chosen("rate"), found["adamw"].chosen("rho")) == (0.01, None)
    assert (found["msam"].chosen("rate"), found["msam"].chosen("rho")) == (0.01, 0.3)
    assert (found["msam"].edge("rho"), found["msam"].edge("rate")) == ("upper", "")
    assert (found["adamw"].edge("rate"), found["nadamw"].edge("rate")) == ("lower", "")
    assert [entry.plain for entry in found.values()] == [False, False, False, False, True]
    way = entries.difference(found["msam"], found["adamw"])
    assert (way.interval.n, way.fresh, way.sign) == (3, True, -1)  # seed 0 chose both
    assert way.interval.value == pytest.approx(-0.1 + 0.001 / 3)
    assert way.interval.low < way.interval.value < way.interval.high < 0
    assert entries.difference(found["adamw ema"], found["adamw"]).interval.value == pytest.approx(-0.05)
    held = entries.difference(found["nadamw"], found["adamw"])
    assert held.interval.high > 0 > held.interval.value
    assert held.sign == 0


def test_an_average_is_held_against_the_same_average_of_adamw(sweep):
    made = differences.answer([*entries_of(sweep).values()])
    rows = made.known("loss", "tokens").set_index("name")["value"]
    assert rows["nadamw ema"] == pytest.approx(rows["nadamw"])
    assert rows["adamw ema"] == pytest.approx(-0.05)  # against its last weights
    table = tables.of("answer", differences.shown(made))
    (row,) = (row for row in table.frame.to_dict("records") if row["entry"] == "adamw ema")
    assert table.columns[1].of(row).startswith("−0.0500 (n ")
    assert "adamw" not in answer.sentences(made)[0]  # counts are of methods


def test_a_candidate_has_its_differences_on_both_bases_with_p_values(sweep):
    found = entries_of(sweep)
    candidate, plain = found["msam"], found["adamw"]
    others = {"tokens": candidate.tokens, "flops": candidate.flops}
    ways = pd.DataFrame(entries.ways(candidate, others, {"loss": "loss"}))
    assert list(ways["basis"]) == ["tokens", "flops"]  # one pass a step: the same AdamW
    assert all(other is plain for other in ways["against"])
    losses = [
        [each.value("loss")[seed] for seed in (1, 2, 3)] for each in (candidate, plain)
    ]  # seed 0 chose rho and rate
    expected = stats.ttest_rel(*losses)
    assert list(ways["p"]) == pytest.approx([expected.pvalue] * 2)
    assert list(ways["low"]) == pytest.approx([expected.confidence_interval().low] * 2)
    assert list(statistics.holm(ways["p"])) == pytest.approx([2 * expected.pvalue] * 2)


def test_the_table_and_the_picture_are_written(sweep, capsys):
    assert command.main(["rivals", str(sweep)]) == 0
    assert "msam" in capsys.readouterr().out.splitlines()[1]
    rows = list(csv.DictReader((sweep / "report" / "rivals.csv").open()))
    assert rows[0]["entry"] == "msam"
    assert rows[0]["less adamw"] == "-0.0997"
    assert rows[0]["pairs"] == "3 fresh"
    assert (sweep / "report" / "rivals.png").read_bytes().startswith(b"\x89PNG")
    assert command.main(["rivals", str(sweep), "--against=sam"]) == 2
    assert "--against=sam: must be one of msam, nadamw ema" in capsys.readouterr().err
    assert command.main(["rivals", str(sweep), "--only=optim.method=msam"]) == 2
    assert "--against=adamw: must be one of msam" in capsys.readouterr().err.splitlines()


def test_an_average_is_a_row_of_its_own_in_the_report(sweep):
    assert command.main([str(sweep)]) == 0
    rows = list(csv.DictReader((sweep / "report" / "runs_table.csv").open()))
    assert {"adamw ema", "adamw", "msam"} <= {row["variant"].split(",")[0] for row in rows}
    assert (sweep / "report" / "index.html").exists()


def test_transfer_says_what_the_settings_of_a_narrow_model_cost_a_wide_one(tmp_path, capsys):
    """Losses by hand: standard wants half the rate at twice the width, mup the same."""
    found = {}
    for kind in ("standard", "mup"):
        for width in (16, 32):
            for rate in (0.01, 0.02):
                best = 0.02 if width == 16 or kind == "mup" else 0.01
                loss = 2.0 + 0.3 * (rate != best) - width / 100
                name, overrides = report_runs.plan(
                    "sam", 0.01, size="0.1m", optim__peak_learning_rate=rate, model__width=width,
                    model__parametrisation=kind,
                )  # fmt: skip
                found[name] = overrides, loss
    report_runs.write_sweep(tmp_path / "sweep", found)
    assert command.main(["transfer", str(tmp_path / "sweep")]) == 0
    said = capsys.readouterr().out
    assert "standard  width   32: best rate 0.01, rho 0.01, loss 1.6800; with those of width 16 +0.3000" in said
    assert "mup       width   32: best rate 0.02, rho 0.01, loss 1.6800; with those of width 16 +0.0000" in said
    rows = list(csv.DictReader((tmp_path / "sweep" / "report" / "transfer.csv").open()))
    assert len(rows) == 8
    assert (tmp_path / "sweep" / "report" / "transfer.png").read_bytes().startswith(b"\x89PNG")
    runs = transfer.read(tmp_path / "sweep")
    runs.loc[runs["rate"] == 0.01, "loss"] = math.inf  # diverged
    assert set(transfer.best(runs)["rate"]) == {0.02}
    assert set(transfer.regret(runs)) == {0.0}


def test_a_setting_with_seeds_of_its_own_is_an_entry_and_the_seed_that_chose_is_not_fresh(tmp_path):
    found = {}
    for rho, losses in ((0.1, {0: 2.40, 1: 2.41, 2: 2.42}), (0.3, {0: 2.35}), (1.0, {0: 2.5, 1: 2.5})):
        for seed, loss in losses.items():
            name, overrides = report_runs.plan("msam", rho, seed=seed)
            found[name] = overrides, loss
    for seed in range(3):
        name, overrides = report_runs.plan("adamw", seed=seed)
        found[name] = overrides, 2.45
    report_runs.write_sweep(tmp_path / "sweep", found)
    made = entries_of(tmp_path / "sweep")
    assert list(made) == ["msam", "msam, rho 0.1", "adamw"]  # one seed of its own does not make 1.0 one
    assert (made["msam"].chosen("rho"), made["msam, rho 0.1"].chosen("rho")) == (0.3, 0.1)
    way = entries.difference(made["msam, rho 0.1"], made["adamw"])
    assert (way.fresh, way.interval.n) == (True, 2)
    assert way.interval.value == pytest.approx(2.415 - 2.45)
