"""The first screen of a report, and runs kept as one file."""

import csv
import dataclasses
import importlib.util
import io
import json
import pathlib
import statistics
import warnings

import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.report_runs import plan, write_sweep
from steppe.scripts import results, style
from steppe.scripts.report import __main__ as command
from steppe.scripts.report import answer, figures, tables
from steppe.scripts.report.numbers import analysis, differences, entries

STUDY = pathlib.Path(__file__).parents[3] / "configs" / "studies" / "english"
LEVELS = {0: 0.0, 1: 0.03, 2: -0.02, 3: 0.01}  # what a seed adds to every loss
WOBBLE = {0: 0.0, 1: 0.002, 2: -0.002, 3: 0.001}  # the seed's addition to a method's
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


def study_of(given, changed=lambda result: result):
    """changed: makes another Result of one, or None to leave it out."""
    found = map(changed, results.with_averages(results.read(given)))
    return entries.analyse([result for result in found if result is not None])


def entries_of(given, changed=lambda result: result):
    return study_of(given, changed).entries


def of_seed_0(result):
    return result if result.config["seed"] == 0 else None


def ways_of(made, name):
    """{(aspect, basis): difference} of a row."""
    (row,) = made.rows.index[made.rows["name"] == name]
    own = made.ways[made.ways["row"] == row]
    return {(way.measure, way.basis): way for way in own.itertuples()}


def test_the_answer_is_what_was_put_in(sweep):
    found = differences.answer(entries_of(sweep))
    assert list(found.rows["name"]) == ["adamw, 2000 steps", "sam"]
    assert found.aspects == ["loss", "forgetting", "int4"]
    ways = ways_of(found, "sam")
    of = {key: way.value for key, way in ways.items()}
    wobble = sum(WOBBLE[seed] for seed in (1, 2, 3)) / 3  # seed 0 chose rho
    kept = -0.04 - wobble
    assert of["loss", "tokens"] == pytest.approx(TWO_PASS + wobble)
    assert of["loss", "flops"] == pytest.approx(TWO_PASS - LONGER + wobble)
    assert of["int4", "tokens"] == pytest.approx(TWO_PASS + wobble + kept)
    assert of["int4", "flops"] == pytest.approx(TWO_PASS - LONGER + wobble + kept)
    assert of["forgetting", "tokens"] == of["forgetting", "flops"] == pytest.approx(kept * 0.8)  # 0.8 of what all gain
    assert set(ways_of(found, "adamw, 2000 steps")) == {(key, "tokens") for key in ("loss", "forgetting", "int4")}
    assert all(way.n == 3 and way.fresh for way in ways.values())


def test_what_is_forgotten_depends_on_no_third_entry(sweep):
    weak = {"loss": 4.0, "paths": [{"rate": 0.001, "points": [{"step": 1, "gained": 0.01, "lost": 0.05}]}]}
    found = results.read(sweep)
    others = [
        result._replace(fine_tune=weak, config=result.config | {"optim.method": "msam"})
        for result in found if result.config["optim.method"] == "sam"
    ]  # fmt: skip
    made = [differences.answer(entries.analyse(given).entries) for given in (found, [*found, *others])]
    assert [len(each.rows) for each in made] == [2, 3]
    values = [ways_of(each, "sam")["forgetting", "tokens"].value for each in made]
    assert values[0] == values[1]


def test_the_power_of_pairs_comes_from_their_own_noise(sweep):
    found = differences.power(differences.answer(entries_of(sweep))).set_index(["aspect", "basis"])
    loss = found.loc["held-out loss", "at equal FLOPs"]  # of sam alone: its pairs differ by the wobble of their seeds
    assert loss["sigma"] == pytest.approx(statistics.stdev(WOBBLE[seed] for seed in (1, 2, 3)))
    assert loss["df"] == 2
    assert loss["pairs_3"] > loss["pairs_5"] > loss["pairs_10"] > 0


def test_what_is_kept_is_a_table_of_every_measure(sweep):
    made = differences.answer(entries_of(sweep))
    rows = tables.against_adamw(made).frame.set_index(["entry", "basis"])
    assert set(rows.index) == {
        ("adamw", differences.ITSELF),
        ("adamw, 2000 steps", "at equal tokens"),
        *(("sam", words) for words in entries.BASES.values()),
    }
    for basis, words in entries.BASES.items():
        ways = ways_of(made, "sam")
        for column, aspect in (("int4_channel", "int4"), ("loss", "loss")):
            shown = rows.loc[("sam", words), [column, *(f"{column}_{end}" for end in ("low", "high", "n"))]]
            assert list(shown) == [getattr(ways[aspect, basis], part) for part in ("value", "low", "high", "n")]
    assert rows.loc[("sam", "at equal tokens"), "int4_channel_n"] == 3
    assert [rows.loc[("sam", words), "adamw"] for words in entries.BASES.values()] == ["adamw", "adamw, 2000 steps"]


def test_fine_tuning_is_compared_at_each_rate_too(sweep):
    table = tables.fine_tuning(differences.answer(entries_of(sweep)))
    rows = table.frame.set_index(["entry", "basis"])
    kept = 0.04 + sum(WOBBLE[seed] for seed in (1, 2, 3)) / 3
    for what, value, own in (("gained", 0.0, 0.3), ("lost", -kept, 0.1), ("curvature", -kept, 0.2)):
        key = f"fine_tune_lr=0.001: {what}"
        assert [rows.loc[("sam", words), key] for words in entries.BASES.values()] == pytest.approx([value] * 2)
        assert rows.loc[("adamw", differences.ITSELF), key] == pytest.approx(own)
    assert "loss" not in rows
    assert table.columns[4].header == "gained on the second text, fine-tuned at 0.001"


def test_a_figure_parts_what_perturbs_nothing_from_the_rest_and_leaves_out_averages_of_one_pair(sweep):
    def averaged(result, kept=lambda result: True):
        return result._replace(weights="ema", name=f"{result.name} ema") if kept(result) else None

    made = differences.answer(entries_of(sweep))
    assert list(made.rows["rank"]) == [0, 2]
    found = results.read(sweep)
    alone = [result for result in found if of_seed_0(result)]
    of_sam = [averaged(result) for result in alone if result.config["optim.method"] == "sam"]
    made = differences.answer(entries.analyse([*found, *of_sam]).entries)
    assert "sam ema" in set(made.rows["name"])
    assert [list(made.rows.loc[part, "name"]) for part in made.parted[0]] == [["adamw, 2000 steps", "sam"], []]
    made = differences.answer(entries.analyse([*alone, *of_sam]).entries)  # nothing has more than one pair
    assert "sam ema" in set(made.rows.loc[made.parted[0][0], "name"])


def test_of_a_long_group_what_is_known_in_less_is_drawn_by_itself(sweep, monkeypatch):
    def less(result):  # another method of which the loss alone is known
        config = result.config | {"optim.method": "msam"}
        return result._replace(config=config, retention={}, fine_tune={})

    found = results.read(sweep)
    others = [less(result) for result in found if result.config["optim.method"] == "sam"]
    many = differences.answer(entries.analyse([*found, *others]).entries)
    assert [drawing.name for drawing in answer.figures(many)] == ["answer"]
    monkeypatch.setattr(differences, "LONG", 2)
    shown = {drawing.name: list(drawing.frame["entry"]) for drawing in answer.figures(many)}
    assert shown == {"answer": ["adamw, 2000 steps", "sam"], "answer_rest": ["msam"]}
    assert set(differences.forgetting(many)["entry"]) == {"adamw", "adamw, 2000 steps", "sam"}


def test_a_row_says_its_rho_once_and_an_end_of_the_grid_only_of_the_best(sweep):
    found = {entry.name: entry for entry in entries_of(sweep) if entry.budget == "1000 steps"}
    assert answer.label_of("sam", found["sam"]) == "sam   2.00 ×   ρ 0.1 ↑"
    assert answer.label_of("adamw", found["adamw"]) == "adamw   1.00 ×"
    sam = found["sam"]
    (setting,) = set(sam.runs.loc[sam.runs["rho"] == 0.01, "setting"])
    other = dataclasses.replace(sam, choice=sam.choice._replace(rho=setting))
    assert answer.label_of("sam, rho 0.01", other) == "sam   2.00 ×   ρ 0.01"


def test_the_frame_shows_all_pairs_but_not_the_interval_of_two():
    two = pd.DataFrame([{"n": 2, "low": -9.0, "high": 9.0, "pairs": {1: -0.2, 2: 0.3}}])
    assert answer._frame(two) == pytest.approx((-0.24, 0.34))
    assert answer._frame(pd.concat([two, two.assign(n=3)])) == pytest.approx((-9 - 0.08 * 18, 9 + 0.08 * 18))


def test_scales_that_are_too_many_for_one_figure_are_in_several_the_surest_first(sweep, monkeypatch):
    found = results.read(sweep)
    small = [
        result._replace(config=result.config | {"model.size": "small"}) for result in found if of_seed_0(result)
    ]  # fmt: skip
    made = differences.answer(entries.analyse([*small, *found]).entries)
    assert [drawing.name for drawing in answer.figures(made)] == ["answer"]
    monkeypatch.setattr(answer, "ROWS", 3)
    first, second = answer.figures(made)
    assert (first.name, second.name) == ("answer", "answer_rest")
    assert (set(first.frame["group"]), set(second.frame["group"])) == ({"0.1m, 1000 steps"}, {"small, 1000 steps"})


def test_every_rho_that_was_measured_is_in_the_table_of_measures(sweep):
    found = analysis.measures(study_of(sweep))
    rows = tables.sharpness("retention", found).frame
    rows = rows[rows["cell"] == "0.1m, 1000 steps"].set_index(["variant", "rho"])
    seeds = {("adamw", 0.0): 4, ("sam", 0.01): 1, ("sam", 0.03): 1, ("sam", 0.1): 4}
    assert rows["seeds"].to_dict() == seeds
    assert rows["int4_channel"]["sam", 0.1] == pytest.approx(0.26 - statistics.fmean(WOBBLE.values()))
    assert rows["int4_channel"]["sam", 0.01] == pytest.approx(0.26)


def test_runs_of_one_name_keep_their_own_measures(sweep):
    found = [result._replace(name="run") for result in results.read(sweep)]
    named, alike = (analysis.means(analysis.measures(entries.analyse(given))) for given in (results.read(sweep), found))
    pd.testing.assert_frame_equal(named, alike)


def test_its_sentences_say_what_helps_and_what_does_not_and_how_sure(sweep):
    made = differences.answer(entries_of(sweep))
    loss, kept, sure = answer.sentences(made)
    assert loss.startswith("Loss: 1 of 1 beat AdamW at equal tokens, 0 of 1 at equal FLOPs; best is sam, −0.0497 [")
    assert kept == "Kept at equal tokens: 1 of 1 forget less, 1 of 1 are better in 4 bits."
    counted = differences.counts(made).set_index(["aspect", "basis"])[["known", "better", "worse"]]
    assert counted.loc["loss", "flops"].to_list() == counted.loc["int4", "flops"].to_list() == [1, 0, 1]
    tests = sorted(p for p, row in zip(made.ways["p"], made.ways["row"], strict=True) if not made.rows["adamw"][row])
    kept = next(i for i, p in enumerate([*tests, 1.0]) if not p <= 0.05 / max(1, len(tests) - i))
    assert 0 < kept == differences.counts(made)["survives"].sum() < 9
    assert "3–4 pairs of seeds; 9 of 9 by fresh seeds" in sure
    assert "0.5 of 9 intervals exclude zero by chance" in sure


def test_a_sentence_has_25_words_at_most_and_a_caption_two_lines(sweep):
    """In the study of most entries and aspects, in one of few, and where a name is long."""
    found = results.with_averages(results.read(STUDY / "runs.jsonl"))
    made = differences.answer(entries.analyse(found).entries)
    long = made._replace(rows=made.rows.assign(name=made.rows["name"] + " with a name of many words"))
    for each in (made, long, differences.answer(entries_of(sweep)), differences.answer(entries_of(sweep, of_seed_0))):
        said = answer.sentences(each)
        assert len(said) == 3
        assert max(len(sentence.split()) for sentence in said) <= 25
        drawn = answer.figures(each)
        assert len(drawn[0].frame) <= 12
        shown = tables.of("answer", differences.shown(each))
        assert all(len(part.caption) <= 270 for part in (*drawn, shown, tables.against_adamw(each)))


def test_a_panel_of_what_no_entry_of_its_drawing_has_is_empty(sweep):
    made = differences.answer(entries_of(sweep))
    (sam,) = made.rows.index[made.rows["name"] == "sam"]
    less = made.ways[(made.ways["measure"] == "loss") | (made.ways["row"] != sam)]
    rows = made.rows.assign(group=["a", "b"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer.figures(differences.Answer(rows, less))


def test_a_row_says_where_to_look_next(sweep):
    table = tables.of("answer", differences.shown(differences.answer(entries_of(sweep))))
    (row,) = (row for row in table.frame.to_dict("records") if row["entry"] == "sam")
    shown = {column.header: column.of(row) for column in table.columns}
    assert (shown["FLOPs / AdamW"], shown["best rho"], shown["peak rate"]) == ("2.00", "0.1 ↑", f"{row['rate']:g}")
    assert shown["held-out loss, at equal tokens"].startswith("−0.0497 (n 3)\n[−0.0548, ")


def test_one_pair_has_no_interval_and_nothing_is_claimed_of_it(sweep, tmp_path):
    loss, _, sure = answer.sentences(differences.answer(entries_of(sweep, of_seed_0)))
    assert loss == "Loss: one pair of seeds each has no interval; the lowest at equal tokens is sam, −0.0500 nats."
    assert sure == "Differences are of one pair of seeds; 0 of 9 by fresh seeds."


def test_what_is_kept_is_drawn_over_rho(sweep, tmp_path):
    assert command.main([str(sweep), f"--out={tmp_path}"]) == 0
    rows = list(csv.DictReader((tmp_path / "kept_against_rho.csv").open()))
    found = {(row["aspect"], float(row["rho"])): float(row["less_adamw"]) for row in rows}
    assert {rho for _, rho in found} == {0.01, 0.03, 0.1}
    assert found["held-out loss", 0.03] == pytest.approx(TWO_PASS + 0.02)
    assert found["held-out loss in 4 bits", 0.03] == pytest.approx(TWO_PASS + 0.02 - 0.04)
    assert [row["pairs"] for row in rows if row["aspect"] == "held-out loss"] == [
        "1",
        "1",
        "3",
    ]  # as in tables: seed 0 chose rho


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
    drawing = figures.kept_against_rho(differences.kept_against_rho(entries_of(tmp_path / "sweep")), {})
    assert {cell.split(", ")[1] for cell in drawing.frame["cell"]} == {"500 steps"}


def test_what_is_kept_at_one_rho_alone_is_not_drawn_over_rho(sweep):
    def at_the_best(result):
        return result if result.config["optim.rho"] in (None, 0.1) else result._replace(retention={})

    def bare(result):
        return result._replace(retention={}, fine_tune={})

    aspects, left = (
        set(differences.kept_against_rho(entries_of(sweep, *changed))["aspect"]) for changed in ((), (at_the_best,))
    )
    assert aspects - left == {"held-out loss in 4 bits"}
    nothing = differences.kept_against_rho(entries_of(sweep, bare))
    assert figures.kept_against_rho(nothing, {}) is None  # the loss alone is drawn elsewhere


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
    loss = answer.sentences(differences.answer([*found.values()]))[0]
    assert loss.startswith("Loss: 0 of 1 beat AdamW at equal tokens; best is sam")


def test_where_the_best_rate_has_no_seed_of_a_method_it_is_compared_at_another_rate(tmp_path):
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
    made = differences.answer(entries_of(tmp_path))
    group = next(entry for entry in entries_of(tmp_path) if entry.budget == "1000 steps").scale + ", 1000 steps"
    assert made.first == group
    assert answer.sentences(made)[0].startswith("Loss: 0 of 1 beat AdamW at equal tokens, 0 of 1 at equal FLOPs")
    elsewhere = differences.counts(made).loc[lambda counted: counted["group"] != group].groupby("basis")
    assert elsewhere[["known", "better", "worse"]].sum().to_numpy().tolist() == [[2, 1, 1], [2, 1, 1]]


def test_what_was_fine_tuned_on_another_text_is_not_compared(sweep):
    found = results.with_averages(results.read(sweep))
    given = []
    for result in found:
        text = "other" if result.config["seed"] == 2 else "most"
        paths = [{"rate": 0.001, "points": [{"step": 1, "gained": 0.01, "lost": 9.0}]}] if text == "other" else None
        tuned = {**result.fine_tune, "text": text} | ({"loss": 7.0, "paths": paths} if paths else {})
        given.append(result._replace(fine_tune=tuned, retention={**result.retention, "forgetting_at_equal_loss": 9.0}))
    study = entries.analyse(given)
    assert study.notes[-1] == "3 models were fine-tuned on another text than most: what they forget is left out."
    way = ways_of(differences.answer(study.entries), "sam")["forgetting", "tokens"]
    wobble = (WOBBLE[1] + WOBBLE[3]) / 2
    assert way.n == 2
    assert way.value == pytest.approx((-0.04 - wobble) * 0.8)
    aside = study.runs.loc[study.runs["seed"] == 2, "result"]
    assert all("int4_channel" in result.retention for result in aside)
    assert not any("forgetting_at_equal_loss" in result.retention for result in aside)


def test_what_is_forgotten_on_the_way_is_drawn_with_adamw(sweep, tmp_path):
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
        ("q3_group64_embedding", "3 bits, a scale per 64 inputs, all tables too"),
        ("q4_gptq_channel", "4 bits by GPTQ, a scale per channel"),
        ("fine_tune_lr=0.001: lost", "forgotten, fine-tuned at 0.001"),
        ("something_new", "something new"),
    ],
)
def test_measures_have_words(measure, words):
    assert style.in_words(measure) == words


PREFIXES = ["", "noise_", "q8_", "int8_", "q4_group", "int4_group", "fine_tune_lr="]


@given(st.sampled_from(PREFIXES), st.sampled_from(["scale", "square", "1e-3", "0.01", "", "x", "-", "1e", "channel"]))
@example("noise_", "scale")
def test_every_name_of_a_measure_has_some_words(prefix, rest):
    assert isinstance(style.in_words(prefix + rest), str)


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
    study = entries.analyse(results.with_averages(runs))
    assert len(study.runs) > len(study.trained) == len(runs)
    made, measures = differences.answer(study.entries), analysis.measures(study)
    bends = tables.sharpness("curvature", measures[measures["source"] == "curvature"])
    ways = {
        "against_adamw": tables.against_adamw(made),
        "fine_tuning": tables.fine_tuning(made),
        "power": tables.of("power", differences.power(made)),
    }
    for name, table in {**ways, "curvature": bends}.items():
        rows = list(csv.DictReader(io.StringIO(tables.to_csv(table.frame))))
        assert [list(map(near, row.items())) for row in page.read(name)] == [
            list(map(near, row.items())) for row in rows
        ]


def near(item):
    """A number to seven digits, as other libraries' sums agree to; any other text unchanged."""
    try:
        return item[0], f"{float(item[1]):.7g}"
    except ValueError:
        return item
