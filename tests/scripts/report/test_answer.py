"""The first screen of a report, and runs kept as one file."""

import csv
import importlib.util
import io
import json
import pathlib
import statistics
import warnings

import pytest

from helpers.report_runs import plan, write_sweep
from steppe.scripts import results, style
from steppe.scripts.report import __main__ as command
from steppe.scripts.report import answer, measured, tables
from steppe.scripts.report.numbers import analysis, entries, groups
from steppe.scripts.report.numbers import statistics as st

STUDY = pathlib.Path(__file__).parents[3] / "optim" / "study" / "english"
LEVELS = {0: 0.0, 1: 0.03, 2: -0.02, 3: 0.01}  # what a seed adds to every loss
WOBBLE = {0: 0.0, 1: 0.002, 2: -0.002, 3: 0.001}  # what it adds to a method's
TWO_PASS, LONGER = -0.05, -0.2  # sam at its best, and AdamW on twice the steps, less AdamW


def fine_tune(kept):
    """One path: gains 0.3 of 4.0 while it loses 0.1 less what is kept."""
    points = [{"step": s, "gained": 0.3 * s / 4, "lost": (0.1 - kept) * s / 4} for s in (1, 2, 4)]
    return {"loss": 4.0, "paths": [{"rate": 0.001, "points": points, "along": {"curvature": 0.2 - kept}}]}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """adamw on 1000 and 2000 steps and sam, whose best rho of three has four seeds, its others one."""
    directory, runs, kept = tmp_path_factory.mktemp("answer") / "sweep", {}, {}
    for seed, level in LEVELS.items():
        for steps in (1000, 2000):
            name, overrides = plan("adamw", seed=seed, duration=f"{steps} steps")
            runs[name], kept[name] = (overrides, 2.0 + level + LONGER * (steps == 2000)), 0.0
        for rho in (0.01, 0.03, 0.1) if seed == 0 else (0.1,):
            name, overrides = plan("sam", rho, seed=seed)
            loss = 2.0 + level + TWO_PASS + WOBBLE[seed] + 0.02 * (rho != 0.1)
            runs[name], kept[name] = (overrides, loss), 0.04 + WOBBLE[seed]
    write_sweep(directory, runs)
    for name in runs:
        record = {
            "step": 1000,
            "summary": {"int4_channel": 0.3 - kept[name]},
            "details": {"fine_tune": fine_tune(kept[name])},
        }
        (directory / "runs" / name / "retention.json").write_text(json.dumps(record))
    return directory


def study_of(given):
    return groups.analyse(results.with_averages(results.read(given))).runs


def entries_of(given):
    return entries.entries(study_of(given))


def test_the_answer_is_what_was_put_in(sweep):
    found = answer.answer(entries_of(sweep))
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["adamw, 2000 steps", "sam"]
    assert [aspect.key for aspect in found.aspects] == ["loss", "forgetting", "int4"]
    of = {key: way.interval.value for key, way in rows["sam"].ways.items()}
    wobble = sum(WOBBLE[seed] for seed in (1, 2, 3)) / 3  # seed 0 chose rho
    kept = -0.04 - wobble
    assert of["loss", "tokens"] == pytest.approx(TWO_PASS + wobble)
    assert of["loss", "flops"] == pytest.approx(TWO_PASS - LONGER + wobble)
    assert of["int4", "tokens"] == pytest.approx(TWO_PASS + wobble + kept)
    assert of["int4", "flops"] == pytest.approx(TWO_PASS - LONGER + wobble + kept)
    assert of["forgetting", "tokens"] == of["forgetting", "flops"] == pytest.approx(kept * 0.8)  # 0.8 of what all gain
    assert set(rows["adamw, 2000 steps"].ways) == {(key, "tokens") for key in ("loss", "forgetting", "int4")}
    assert all(way.interval.n == 3 and way.fresh for way in rows["sam"].ways.values())


def test_what_is_forgotten_depends_on_no_third_entry(sweep):
    found = entries_of(sweep)
    (sam,) = (entry for entry in found if entry.name == "sam")
    weak = {"loss": 4.0, "paths": [{"rate": 0.001, "points": [{"step": 1, "gained": 0.01, "lost": 0.05}]}]}
    runs = {
        setting: {seed: result._replace(fine_tune=weak) for seed, result in by_seed.items()}
        for setting, by_seed in sam.runs.items()
    }
    with_it = answer.answer([*found, sam._replace(name="weak", runs=runs)])
    ways = [{row.name: row for row in made.rows}["sam"].ways for made in (answer.answer(found), with_it)]
    assert ways[0]["forgetting", "tokens"] == ways[1]["forgetting", "tokens"]


def test_the_power_of_pairs_comes_from_their_own_noise(sweep):
    rows = {(row["aspect"], row["basis"]): row for row in answer.power(answer.answer(entries_of(sweep))).rows}
    loss = rows["held-out loss", "at equal FLOPs"]  # of sam alone: its pairs differ by the wobble of their seeds
    assert loss["sigma"] == pytest.approx(statistics.stdev(WOBBLE[seed] for seed in (1, 2, 3)))
    assert loss["df"] == 2
    assert loss["pairs_3"] > loss["pairs_5"] > loss["pairs_10"] > 0


def test_what_is_kept_is_a_table_of_every_measure(sweep):
    made = answer.answer(entries_of(sweep))
    rows = {(row["entry"], row["basis"]): row for row in answer.beside(made).rows}
    assert set(rows) == {
        ("adamw", answer.ITSELF),
        ("adamw, 2000 steps", "at equal tokens"),
        *(("sam", words) for words in answer.BASES.values()),
    }
    for basis, words in answer.BASES.items():
        (sam,) = (row for row in made.rows if row.name == "sam")
        assert rows["sam", words]["int4_channel"] == sam.ways["int4", basis].interval
        assert rows["sam", words]["loss"] == sam.ways["loss", basis].interval
    assert rows["sam", "at equal tokens"]["int4_channel"].n == 3
    assert [rows["sam", words]["adamw"] for words in answer.BASES.values()] == ["adamw", "adamw, 2000 steps"]


def test_fine_tuning_is_compared_at_each_rate_too(sweep):
    table = answer.fine_tuning(answer.answer(entries_of(sweep)))
    rows = {(row["entry"], row["basis"]): row for row in table.rows}
    kept = 0.04 + sum(WOBBLE[seed] for seed in (1, 2, 3)) / 3
    for what, value, own in (("gained", 0.0, 0.3), ("lost", -kept, 0.1), ("curvature", -kept, 0.2)):
        key = f"fine_tune_lr=0.001: {what}"
        assert [rows["sam", words][key].value for words in answer.BASES.values()] == pytest.approx([value] * 2)
        assert rows["adamw", answer.ITSELF][key].value == pytest.approx(own)
    assert "loss" not in next(iter(rows.values()))
    assert table.columns[4].header == "gained on the second text, fine-tuned at 0.001"


def test_a_figure_parts_what_perturbs_nothing_from_the_rest_and_leaves_out_averages_of_one_pair(sweep):
    made = answer.answer(entries_of(sweep))
    assert [row.rank for row in made.rows] == [0, 2]
    (sam,) = (row for row in made.rows if row.name == "sam")
    (alone,) = (row for row in answer.answer(entries.entries([r for r in study_of(sweep) if r.seed == 0])).rows
                if row.name == "sam")  # fmt: skip
    average = alone._replace(entry=alone.entry._replace(weights="ema"))
    assert [list(map(id, part)) for part in answer.parted([sam, alone, average])] == [[id(sam), id(alone)], []]
    assert [len(part) for part in answer.parted([average])] == [1, 0]


def test_of_a_long_group_what_is_known_in_less_is_drawn_by_itself(sweep, monkeypatch):
    made = answer.answer(entries_of(sweep))
    longer, sam = made.rows
    less = sam._replace(name="less", ways={key: way for key, way in sam.ways.items() if key[0] == "loss"})
    many = made._replace(rows=[longer, sam, less])
    assert [drawing.name for drawing in answer.figures(many)] == ["answer"]
    assert "less" in {row["entry"] for row in measured.forgetting(many).rows}
    monkeypatch.setattr(answer, "LONG", 2)
    shown = {drawing.name: [row["entry"] for row in drawing.rows] for drawing in answer.figures(many)}
    assert shown == {"answer": [longer.name, "sam"], "answer_rest": ["less"]}
    assert {row["entry"] for row in measured.forgetting(many).rows} == {"adamw", longer.name, "sam"}


def test_a_row_says_its_rho_once_and_an_end_of_the_grid_only_of_the_best(sweep):
    (sam,) = (row.entry for row in answer.answer(entries_of(sweep)).rows if row.name == "sam")
    assert answer.label_of("sam", sam) == "sam   2.00 ×   ρ 0.1 ↑"
    other = sam._replace(choice=sam.choice._replace(rho=(sam.chosen("rate"), 0.01)))
    assert answer.label_of("sam, rho 0.01", other) == "sam   2.00 ×   ρ 0.01"
    assert answer.label_of("adamw", sam._replace(choice=sam.choice._replace(rho=(0.001, None)))) == "adamw   2.00 ×"


def test_the_frame_shows_all_pairs_but_not_the_interval_of_two(sweep):
    made = answer.answer(entries_of(sweep))
    bounds = st.Interval(0.0, -9.0, 9.0, 2)
    two = made.rows[1]._replace(ways={("loss", "tokens"): entries.Difference(bounds, True, {1: -0.2, 2: 0.3})})
    assert answer._frame("loss", [[two]]) == pytest.approx((-0.24, 0.34))
    three = two._replace(ways={("loss", "tokens"): entries.Difference(bounds._replace(n=3), True, {1: -0.2, 2: 0.3})})
    assert answer._frame("loss", [[two], [three]]) == pytest.approx((-9 - 0.08 * 18, 9 + 0.08 * 18))


def test_scales_that_are_too_many_for_one_figure_are_in_several_the_surest_first(sweep, monkeypatch):
    made = answer.answer(entries_of(sweep))
    alone = answer.answer(entries.entries([run for run in study_of(sweep) if run.seed == 0]))
    rows = [row._replace(group="small", entry=row.entry._replace(scale="small")) for row in alone.rows] + made.rows
    assert [drawing.name for drawing in answer.figures(made._replace(rows=rows))] == ["answer"]
    monkeypatch.setattr(answer, "TALL", 3)
    first, second = answer.figures(made._replace(rows=rows))
    assert (first.name, second.name) == ("answer", "answer_2")
    assert ({row["group"] for row in first.rows}, {row["group"] for row in second.rows}) == (
        {made.rows[0].group}, {"small"},
    )  # fmt: skip


def test_every_rho_that_was_measured_is_in_the_table_of_measures(sweep):
    study = groups.analyse(results.with_averages(results.read(sweep)))
    found = tables.sharpness(study, "retention", analysis.measures(study)["retention"]).rows
    rows = {(row["variant"], row["rho"]): row for row in found if "1000 steps" in row["cell"]}
    seeds = {("adamw", 0.0): 4, ("sam", 0.01): 1, ("sam", 0.03): 1, ("sam", 0.1): 4}
    assert {key: row["seeds"] for key, row in rows.items()} == seeds
    assert rows["sam", 0.1]["int4_channel"] == pytest.approx(0.26 - statistics.fmean(WOBBLE.values()))
    assert rows["sam", 0.01]["int4_channel"] == pytest.approx(0.26)


def test_its_sentences_say_what_helps_and_what_does_not_and_how_sure(sweep):
    loss, kept, sure = answer.sentences(answer.answer(entries_of(sweep)))
    assert loss.startswith(
        "In held-out loss, at equal tokens 1 of 1 are better than AdamW by an interval without zero "
    )
    assert "at equal FLOPs none of 1 is better than AdamW by an interval without zero, 1 are worse" in loss
    assert "In what fine-tuning costs, at equal tokens 1 of 1 are better" in kept
    assert "In the loss in 4 bits, at equal tokens 1 of 1 are better" in kept
    assert "at equal FLOPs none of 1 is better than AdamW by an interval without zero, 1 are worse" in kept
    assert "3–4 pairs of seeds" in sure
    assert "of 9 intervals 0.5 would exclude zero by chance alone" in sure


def test_a_panel_of_what_no_entry_of_its_drawing_has_is_empty(sweep):
    made = answer.answer(entries_of(sweep))
    rows = [row._replace(ways={key: row.ways[key] for key in row.ways if key[0] == "loss"}) for row in made.rows]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer.figures(made._replace(rows=rows))


def test_a_line_says_where_to_look_next(sweep):
    lines = answer.lines(answer.answer(entries_of(sweep)))
    assert lines[1].startswith("sam, 2.00 × a token: rho 0.1 of 3 at the grid's upper edge: extend upwards; ")
    assert lines[1].endswith("3 fresh pairs.")


def test_one_pair_has_no_interval_and_nothing_is_claimed_of_it(sweep, tmp_path):
    alone = [run for run in study_of(sweep) if run.seed == 0]
    loss, _, sure = answer.sentences(answer.answer(entries.entries(alone)))
    assert "at equal tokens there is one pair of seeds of each, and no interval: the lowest is sam" in loss
    assert sure.startswith("Each difference is of one pair of seeds, none of which")


def test_what_is_kept_is_drawn_over_rho(sweep, tmp_path):
    assert command.main([str(sweep), f"--out={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "kept_against_rho.csv").open()))
    found = {(row["aspect"], float(row["rho"])): float(row["less_adamw"]) for row in rows}
    assert {rho for _, rho in found} == {0.01, 0.03, 0.1}
    assert found["held-out loss", 0.03] == pytest.approx(TWO_PASS + 0.02)
    assert found["held-out loss in 4 bits", 0.03] == pytest.approx(TWO_PASS + 0.02 - 0.04)
    assert [row["pairs"] for row in rows if row["aspect"] == "held-out loss"] == ["1", "1", "4"]


def test_what_is_kept_is_drawn_where_it_was_measured(tmp_path):
    runs = {}
    for steps in (500, 1000):
        for method, rho in (("adamw", None), ("sam", 0.01), ("sam", 0.1)):
            name, overrides = plan(method, rho, duration=f"{steps} steps")
            runs[name] = overrides, 2.0 + (rho or 0.0)
    write_sweep(tmp_path / "sweep", runs)
    for name, (overrides, _) in runs.items():
        if "500 steps" in overrides.values():
            record = {"step": 500, "summary": {"int4_channel": 0.1}}
            (tmp_path / "sweep" / "runs" / name / "retention.json").write_text(json.dumps(record))
    drawing = measured.kept_against_rho(entries_of(tmp_path / "sweep"))
    assert {row["cell"].split(", ")[1] for row in drawing.rows} == {"500 steps"}


def test_what_is_kept_at_one_rho_alone_is_not_drawn_over_rho(sweep):
    study = study_of(sweep)
    (sam,) = (entry for entry in entries.entries(study) if entry.name == "sam")
    best = sam.chosen("rho")
    alone = [run if run.rho in (0.0, best) else run._replace(result=run.result._replace(retention={})) for run in study]
    aspects = {row["aspect"] for row in measured.kept_against_rho(entries.entries(study)).rows}
    left = {row["aspect"] for row in measured.kept_against_rho(entries.entries(alone)).rows}
    assert aspects - left == {"held-out loss in 4 bits"}
    bare = [run._replace(result=run.result._replace(retention={}, fine_tune={})) for run in study]
    assert measured.kept_against_rho(entries.entries(bare)) is None  # the loss alone is drawn elsewhere


def test_of_several_kinds_of_adamw_the_best_is_that_on_the_seeds_that_all_have(tmp_path):
    runs = {}
    for schedule, seeds, worse in (("cosine", LEVELS, 0.0), ("constant", (2,), 0.005)):  # by itself seed 2 looks better
        for seed in seeds:
            name, overrides = plan("adamw", seed=seed, optim__schedule=schedule)
            runs[name] = overrides, 2.0 + LEVELS[seed] + worse
    name, overrides = plan("sam", 0.1, seed=2, optim__schedule="cosine")
    runs[name] = overrides, 1.9
    write_sweep(tmp_path, runs)
    found = entries_of(tmp_path)
    (sam,) = (entry for entry in found if entry.perturbs)
    assert {entry.name for entry in found if entry.adamw} == {"adamw", "adamw, schedule=constant"}
    assert entries.at_equal_tokens(found, sam).name == "adamw"


def test_another_rate_of_adamw_with_seeds_of_its_own_is_no_method_and_no_reference(tmp_path):
    runs = {}
    for rate, seeds, worse in ((0.01, LEVELS, 0.0), (0.02, (0, 1, 2), 0.03), (0.04, (0,), 0.1)):
        for seed in seeds:
            name, overrides = plan("adamw", seed=seed, optim__peak_learning_rate=rate)
            runs[name] = overrides, 2.0 + LEVELS[seed] + worse + WOBBLE[seed] * (worse > 0)
    for seed in LEVELS:
        name, overrides = plan("sam", 0.1, seed=seed, optim__peak_learning_rate=0.01)
        runs[name] = overrides, 2.1 + LEVELS[seed] + WOBBLE[seed]
    write_sweep(tmp_path, runs)
    found = {entry.name: entry for entry in entries_of(tmp_path)}
    assert {name: (entry.adamw, entry.plain) for name, entry in found.items()} == {
        "adamw": (True, True), "adamw, rate 0.02": (True, False), "sam": (False, False),
    }  # fmt: skip
    for entry in (found["sam"], found["adamw, rate 0.02"]):
        assert entries.at_equal_tokens([*found.values()], entry).name == "adamw"
    loss = answer.sentences(answer.answer([*found.values()]))[0]
    assert loss.startswith("In held-out loss, at equal tokens none of 1 is better than AdamW")


def test_where_the_best_rate_has_no_seed_of_a_method_it_stands_beside_another_rate(tmp_path):
    runs = {}
    for rate, seeds, worse in ((0.01, LEVELS, 0.01), (0.02, (0,), 0.0)):
        for seed in seeds:
            name, overrides = plan("adamw", seed=seed, optim__peak_learning_rate=rate)
            runs[name] = overrides, 2.0 + LEVELS[seed] + worse
    for seed in (1, 2, 3):
        name, overrides = plan("sam", 0.1, seed=seed, optim__peak_learning_rate=0.01)
        runs[name] = overrides, 2.1 + LEVELS[seed]
    write_sweep(tmp_path, runs)
    found = {entry.name: entry for entry in entries_of(tmp_path)}
    assert found["adamw"].chosen("rate") == 0.02
    other = entries.at_equal_tokens([*found.values()], found["sam"])
    assert other.name == "adamw, rate 0.01"
    assert entries.difference(found["sam"], other).interval.value == pytest.approx(0.09)


def test_of_several_budgets_the_sentences_name_what_has_most_pairs_and_count_the_rest(tmp_path):
    runs = {}
    for steps, seeds, gain in ((500, (0, 1, 2), -0.1), (1000, LEVELS, 0.1), (2000, (0, 1, 2), 0.1)):
        for seed in seeds:
            for method, rho in (("adamw", None), ("msam", 0.1)):
                name, overrides = plan(method, rho, seed=seed, duration=f"{steps} steps")
                runs[name] = overrides, 2.0 + LEVELS[seed] + (gain + WOBBLE[seed]) * (method == "msam")
    write_sweep(tmp_path, runs)
    loss = answer.sentences(answer.answer(entries_of(tmp_path)))[0]
    group = next(entry for entry in entries_of(tmp_path) if entry.budget == "1000 steps").scale + ", 1000 steps"
    assert loss.startswith(f"In held-out loss ({group}), at equal tokens none of 1 is better than AdamW")
    assert loss.endswith("Elsewhere at equal tokens 1 of 2 better, 1 worse; at equal FLOPs 1 of 2 better, 1 worse.")


def test_what_was_fine_tuned_on_another_text_is_not_compared(sweep):
    found = results.with_averages(results.read(sweep))
    given = []
    for result in found:
        text = "other" if result.config["seed"] == 2 else "most"
        paths = [{"rate": 0.001, "points": [{"step": 1, "gained": 0.01, "lost": 9.0}]}] if text == "other" else None
        tuned = {**result.fine_tune, "text": text} | ({"loss": 7.0, "paths": paths} if paths else {})
        given.append(result._replace(fine_tune=tuned, retention={**result.retention, "forgetting_at_equal_loss": 9.0}))
    study = groups.analyse(given)
    assert study.notes[-1] == "3 models were fine-tuned on another text than most: what they forget is left out."
    (way,) = (
        row.ways["forgetting", "tokens"] for row in answer.answer(entries.entries(study.runs)).rows if row.name == "sam"
    )
    wobble = (WOBBLE[1] + WOBBLE[3]) / 2
    assert way.interval.n == 2
    assert way.interval.value == pytest.approx((-0.04 - wobble) * 0.8)
    aside = [run.result for run in study.runs if run.seed == 2]
    assert all("int4_channel" in result.retention for result in aside)
    assert not any("forgetting_at_equal_loss" in result.retention for result in aside)


def test_what_is_forgotten_on_the_way_is_drawn_beside_adamw(sweep, tmp_path):
    assert command.main([str(sweep), f"--out={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "forgetting.csv").open()))
    assert {(row["group"].split(", ")[1], row["entry"]) for row in rows} == {
        ("1000 steps", name) for name in ("adamw", "adamw, 2000 steps", "sam")
    }
    kept = 0.04 + sum(WOBBLE[seed] for seed in (1, 2, 3)) / 3
    for row in rows:
        gained = 4.0 - float(row["second_loss"])
        if row["entry"] == "sam":  # both lose in proportion to what they gain, 0.3 at the end
            assert float(row["less_adamw"]) == pytest.approx(-kept * gained / 0.3)
        else:
            assert float(row["forgotten"]) == pytest.approx(0.1 * gained / 0.3)


def test_a_curve_over_rho_is_of_one_rate(tmp_path):
    runs = {}
    for method, rho, rate, loss in (
        ("adamw", None, 0.01, 2.0), ("sam", 0.01, 0.01, 1.9), ("sam", 0.1, 0.01, 2.1),
        ("sam", 0.01, 0.02, 2.3), ("sam", 0.1, 0.02, 2.4),
    ):  # fmt: skip
        name, overrides = plan(method, rho, optim__peak_learning_rate=rate)
        runs[name] = overrides, loss
    write_sweep(tmp_path / "sweep", runs)
    for name, (_, loss) in runs.items():
        summary = {"int4_channel": 0.1 * loss}
        (tmp_path / "sweep" / "runs" / name / "retention.json").write_text(json.dumps({"step": 1, "summary": summary}))
    assert command.main([str(tmp_path / "sweep")]) == 0
    rows = csv.DictReader((tmp_path / "sweep" / "report" / "kept_against_rho.csv").open())
    found = {float(row["rho"]): float(row["less_adamw"]) for row in rows if row["aspect"] == "held-out loss"}
    assert found == {0.01: pytest.approx(-0.1), 0.1: pytest.approx(0.1)}


def test_runs_packed_into_a_file_make_the_same_page(sweep, tmp_path, capsys):
    pack = tmp_path / "runs.jsonl"
    assert command.main(["pack", str(sweep), f"--out={pack}"]) == 0
    assert "14 runs, 14 of them now" in capsys.readouterr().out
    assert command.main([str(sweep), f"--out={tmp_path / 'a'}"]) == 0
    assert command.main([str(pack), f"--out={tmp_path / 'b'}"]) == 0
    for path in sorted((tmp_path / "a").glob("*.csv")):
        assert path.read_text() == (tmp_path / "b" / path.name).read_text(), path.name
    rows = list(csv.DictReader((tmp_path / "b" / "answer.csv").open()))
    assert {row["entry"] for row in rows} == {"adamw, 2000 steps", "sam"}
    assert command.main(["pack", str(sweep), f"--out={pack}"]) == 0  # those it has are replaced, not doubled
    assert len(results.read(pack)) == 14
    assert command.main(["pack", str(sweep), f"--out={tmp_path / 'some.jsonl'}", "--only=optim.method=sam,seed=0"]) == 0
    assert "3 runs, 3 of them now" in capsys.readouterr().out


def test_folders_get_names_and_the_same_run_from_elsewhere_is_the_same(tmp_path, capsys):
    pack = tmp_path / "runs.jsonl"
    for place in ("here", "there"):
        _, overrides = plan("adamw", data__task=f"text:/{place}/train.txt@all")
        write_sweep(tmp_path / place, {"run": (overrides, 2.0)})
        assert command.main(["pack", str(tmp_path / place), f"--out={pack}", f"--call=TEXT=/{place}/"]) == 0
    (run,) = results.read(pack)
    assert run.config["data.task"] == "text:TEXT/train.txt@all"
    with pytest.raises(SystemExit, match="2"):
        command.main(["pack", str(tmp_path / "here"), f"--out={pack}", "--call=TEXT"])
    assert "--call: TEXT: must be NAME=FOLDER" in capsys.readouterr().err


def test_reports_of_one_directory_or_run_say_so_of_anything_else(sweep, tmp_path, capsys):
    pack = tmp_path / "runs.jsonl"
    assert command.main(["pack", str(sweep), f"--out={pack}"]) == 0
    for kind in ([], ["rivals"], ["transfer"]):
        assert command.main([*kind, str(pack)]) == 2
        assert "--out is missing" in capsys.readouterr().err
    assert command.main(["compare", str(sweep), str(sweep)]) == 2
    assert "must be the workdir of one run; it holds 14" in capsys.readouterr().err


def test_bad_packs_are_one_line(sweep, tmp_path, capsys):
    assert command.main(["pack", str(sweep), f"--out={tmp_path / 'runs.csv'}"]) == 2
    assert "must be a file that ends in .jsonl" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a document"}\n')
    assert command.main([str(bad), f"--out={tmp_path}"]) == 2
    assert (
        "bad.jsonl: line 1: config: is missing: must be a file that `steppe report pack` wrote"
        in capsys.readouterr().err
    )
    assert command.main([str(bad)]) == 2
    assert "--out is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        ("nme_lambda_max", "largest eigenvalue of the functional part"),
        ("int3_group64_embedding", "int3, a scale per 64 inputs, all tables too"),
        ("fine_tune_lr=0.001: lost", "forgotten, fine-tuned at 0.001"),
        ("something_new", "something new"),
    ],
)
def test_measures_have_words(measure, words):
    assert style.in_words(measure) == words


def test_variants_of_a_method_share_its_colour_and_nothing_else():
    variants = ["sam", "sam ema", "sam, rho_schedule=late", "sam, rho 0.1", "sam, rho 0.3", "sam ema, rho 0.1"]
    found = style.of_variants(["adamw", *variants, "other"])
    assert {found[name][0] for name in variants} == {found["sam"][0]} != {found["other"][0]}
    for part in (1, 2):  # lines have no marker, marks no dash
        assert len({str(found[name][part]) for name in ("adamw", *variants)}) >= len(variants)


def test_the_tables_of_the_study_are_of_its_numbers_and_these_of_its_runs():
    spec = importlib.util.spec_from_file_location("page", STUDY / "page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = (STUDY / "README.md").read_text()
    for name, made in page.tables().items():
        assert f"<!-- {name} -->\n{made}<!-- end of {name} -->" in text
    runs = results.read(str(STUDY / "runs.jsonl"))
    study = groups.analyse(results.with_averages(runs))
    assert len(study.runs) > len(study.trained) == len(runs)
    made = answer.answer(entries.entries(study.runs))
    bends = tables.sharpness(study, "curvature", analysis.measures(study)["curvature"])
    ways = {"beside": answer.beside(made), "fine_tuning": answer.fine_tuning(made), "power": answer.power(made)}
    for name, table in {**ways, "curvature": bends}.items():
        rows = list(csv.DictReader(io.StringIO(tables.to_csv(table.rows))))
        assert [list(map(near, row.items())) for row in page.read(name)] == [
            list(map(near, row.items())) for row in rows
        ]


def near(item):
    """A number to seven digits, as other libraries' sums agree to; any other text as it is."""
    try:
        return item[0], f"{float(item[1]):.7g}"
    except ValueError:
        return item
