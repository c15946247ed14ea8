"""The report of a sweep: what was put into the runs comes out of the page, which needs nothing but itself."""

import argparse
import base64
import csv
import gzip
import html
import io
import json
import math
import re
import shlex
from html.parser import HTMLParser

import pandas as pd
import pytest

from helpers.report_runs import PARAMETERS, plan, write_run, write_sweep
from steppe.configs import base
from steppe.scripts import cli, results, style
from steppe.scripts.report import __main__ as report
from steppe.scripts.report import compare as report_compare
from steppe.scripts.report import drawing
from steppe.scripts.report import figures as report_figures
from steppe.scripts.report.numbers import analysis as report_analysis
from steppe.scripts.report.numbers import entries as report_entries
from steppe.scripts.results import flatten

GRID = (0.003, 0.01, 0.03, 0.1)
METHODS = {"functional_sam": -0.01, "sam": 0.02}  # each one's addition to AdamW's loss at its best rho
SEEDS = {0: 0.0, 1: 0.03, 2: -0.02}  # each seed's addition to every loss
WOBBLE = {0: 0.0, 1: 0.001, 2: -0.001}  # its addition to those of the methods alone


def true_rho(size):
    return 0.02 * (PARAMETERS[size] / 442_368) ** -0.2


def adamw_loss(size, steps, seed):
    return 1.0 + 30 / PARAMETERS[size] ** 0.4 + 60 / (1024 * steps) ** 0.35 + SEEDS[seed]


def method_loss(method, size, rho, seed):
    bowl = 0.01 * math.log(rho / true_rho(size)) ** 2
    return adamw_loss(size, 1000, seed) + METHODS[method] + bowl + WOBBLE[seed]


def study(sizes=("0.1m", "0.4m", "1.8m")):
    """AdamW at 1000 and 2000 steps; each method over the grid at seed 0, at its best of the grid also at 1 and 2."""
    runs = {}
    for size in sizes:
        for seed in SEEDS:
            for steps in (1000, 2000):
                name, overrides = plan("adamw", size=size, seed=seed, duration=f"{steps} steps")
                runs[name] = overrides, adamw_loss(size, steps, seed)
        for method in METHODS:
            best = min(GRID, key=lambda rho: method_loss(method, size, rho, 0))
            for seed, rho in [*((0, rho) for rho in GRID), (1, best), (2, best)]:
                name, overrides = plan(method, rho, size=size, seed=seed)
                runs[name] = overrides, method_loss(method, size, rho, seed)
    return runs


def name_of(*args, **kwargs):
    return plan(*args, **kwargs)[0]


DIVERGED, FAILED = name_of("sam", 0.1, size="0.1m"), name_of("sam", 0.003, size="1.8m")
MISSING = name_of("functional_sam", 0.1, size="1.8m")


@pytest.fixture(scope="module")
def pools():
    """The second processes in which reports of this module drew, that of `made` first."""
    started, real = [], drawing.ProcessPoolExecutor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "ProcessPoolExecutor", lambda *given: started.append(real(*given)) or started[-1])
        yield started


@pytest.fixture(scope="module")
def made(tmp_path_factory, pools):
    """(directory of a sweep, its page, {name: rows of a CSV next to it})."""
    directory = tmp_path_factory.mktemp("report") / "sweep"
    runs = study()
    for name, loss in ((DIVERGED, "diverged"), (FAILED, "failed"), (MISSING, None)):
        runs[name] = runs[name][0], loss
    write_sweep(directory, runs)
    for name, (_, loss) in runs.items():
        if isinstance(loss, float) and "1.8m" in name:
            workdir = directory / "runs" / name
            (workdir / "curvature").mkdir()
            for step, value in ((500, 9.0), (1000, -loss)):  # the newest counts: it falls as the loss rises
                text = json.dumps(
                    {"step": step, "summary": {"lambda_max": value, "unknown": None, "trace_error": 1.0, "loss": loss}}
                )
                (workdir / "curvature" / f"{step}.json").write_text(text)
            (workdir / "retention.json").write_text(json.dumps({"step": 1000, "summary": {"int4": loss**2}}))
    assert report.main([str(directory)]) == 0
    assert len(pools) == 1
    tables = {path.stem: list(csv.DictReader(path.open())) for path in (directory / "report").glob("*.csv")}
    return directory, (directory / "report" / "index.html").read_text(), tables


class Page(HTMLParser):
    """Every start tag with its attributes, and the text outside of figures."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def having(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def only(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def test_the_page_asks_for_nothing_outside_itself(made):
    _, page, _ = made
    assert not re.search(r"https?:|@import|url\(\s*[\"']?(?!#)|<script[^>]|<iframe|<object|<base", page)
    for tag, attributes in Page(page).tags:
        for name, value in attributes.items():
            if name in ("href", "xlink:href", "src", "srcset", "action", "poster"):
                assert value.startswith(("#", "data:")), (tag, name, value[:60])


def test_figures_have_words_and_tables_have_heads(made):
    directory, page, _ = made
    found = Page(page)
    pictures = [attributes for attributes in found.having("svg") if "role" in attributes]
    assert len(pictures) == len(found.having("figure")) == len(list((directory / "report").glob("*.png"))) >= 6
    assert all(attributes["role"] == "img" and len(attributes["aria-label"]) > 40 for attributes in pictures)
    assert all("scope" in attributes for attributes in found.having("th"))
    assert found.having("html") == [{"lang": "en"}]
    names = [
        attributes["id"] for _, attributes in found.tags if re.match("figure-|title-|about-", attributes.get("id", ""))
    ]
    assert len(names) == len(set(names))


def test_the_page_is_named_and_none_of_its_titles_twice(made):
    _, page, _ = made
    assert "<title>sweep: report</title>" in page
    titles = re.findall(r"<(?:h2|h3|summary)[^>]*>(.*?)</", page)
    assert len(titles) == len(set(titles)) > 12
    captions = re.findall(r'<(?:figcaption|p class="?caption[^>]*)>(.*?)</', page)
    assert len(captions) > 12
    assert all(len(html.unescape(caption)) <= 270 for caption in captions)  # two lines of the page
    assert len(page) < 2e6
    assert page.count("<details") > 6  # one figure and one table are open
    answer = page[page.index('<section id="answer">') : page.index('<section id="basis">')]
    assert answer.partition("<details")[0].count("<figure") == answer.partition("<details")[0].count("<table") == 1


def test_a_legend_has_ten_names_and_what_is_one_point_is_not_drawn():
    frame = pd.DataFrame(
        [{"cell": "c", "variant": f"v{n}", "x": x, "y": n + x} for n in range(14) for x in (1, 2)]
        + [{"cell": "c", "variant": "once", "x": 1, "y": 0.0}, *({"cell": "d", "variant": "v1", "x": 1, "y": 3.0},) * 2]
    )
    styles = style.of_variants([*frame["variant"].unique()][::-1])
    figure = drawing.panels(frame, styles, x="x", y="y", labels=("x", "y"))
    (axes,) = (axes for axes in figure.axes if axes.get_visible())
    assert axes.get_title() == "c"
    grey, *lines = axes.get_lines()
    assert {tuple(line.get_ydata()) for line in lines} == {(n + 1, n + 2) for n in range(5, 14)}
    assert grey.get_color() == drawing.REST[0] not in {line.get_color() for line in lines}
    parts = [value for n in range(5) for value in (n + 1, n + 2, math.nan)]  # lines with gaps between them
    assert list(grey.get_ydata()) == pytest.approx(parts, nan_ok=True)  # "once" is of the ten, though it is not drawn
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == [*(f"v{n}" for n in range(5, 14)), "others"]
    assert drawing.panels(frame[frame["cell"] == "d"], styles, x="x", y="y", labels=("x", "y")) is None


def test_without_adamw_the_page_has_the_command_that_adds_it(tmp_path, capsys):
    runs = {}
    for size, steps in (("0.1m", 1000), ("0.4m", 2000)):
        for rho, seed in ((0.01, 0), (0.1, 0), (0.1, 1)):
            name, overrides = plan("sam", rho, size=size, seed=seed, duration=f"{steps} steps")
            runs[name] = overrides, 2.0
    write_sweep(tmp_path / "sweep", runs)
    record = tmp_path / "sweep" / "sweep.json"
    record.write_text(record.read_text().replace("configs/x.py", "configs/base.py"))
    assert report.main([str(tmp_path / "sweep")]) == 0
    (shown,) = re.findall("<pre>(.*)</pre>", (tmp_path / "sweep" / "report" / "index.html").read_text())
    steppe, *words = shlex.split(html.unescape(shown))
    assert steppe == "steppe"
    assert cli.main([*words, "--plan"]) == 0
    assert re.search(r"runs +4 \(4 unfinished\)", capsys.readouterr().out)  # two seeds of each size and its length


def test_the_data_in_the_page_are_those_of_its_files(made):
    _, page, tables = made
    links = {a["download"]: a["href"] for a in Page(page).having("a") if "download" in a}
    for figure in ("loss_against_rho", "frontier", "curves"):
        text = gzip.decompress(base64.b64decode(links[f"{figure}.csv.gz"].partition("base64,")[2])).decode()
        assert list(csv.DictReader(io.StringIO(text))) == tables[figure]


def test_best_rho_and_the_difference_to_adamw(made):
    _, _, tables = made
    row = only(tables["comparison_table"], scale="0.4m", budget="1000 steps", variant="functional_sam")
    assert (row["rho"], row["where"], row["seeds"], row["finished"]) == ("0.03", "", "3", "6")
    bowl = 0.01 * math.log(0.03 / true_rho("0.4m")) ** 2
    assert float(row["difference"]) == pytest.approx(-0.01 + bowl, abs=1e-9)  # the wobble's mean is zero
    assert (row["difference_n"], row["fresh"], row["against"]) == ("2", "True", "adamw")  # seed 0 chose rho
    half = 12.7062 * 0.001 * math.sqrt(2) / math.sqrt(2)  # Student's t at one degree of freedom, sd of +-0.001
    assert float(row["difference_high"]) - float(row["difference"]) == pytest.approx(half, rel=1e-4)
    assert float(row["difference_pooled"]) == float(row["difference"])
    assert float(row["flops_ratio"]) == 2.0
    assert float(row["seconds_ratio"]) == pytest.approx(2.0, rel=0.01)
    base_row = only(tables["comparison_table"], scale="0.4m", budget="1000 steps", variant="adamw")
    assert base_row["difference_n"] == "0"


def test_best_rho_against_size_is_the_power_law_put_in(made):
    _, _, tables = made
    for size in ("0.1m", "0.4m"):
        row = only(tables["best_rho_table"], variant="functional_sam", scale=size)
        assert row["status"] == "inside the grid"
        assert float(row["optimum"]) == pytest.approx(true_rho(size), rel=1e-6)
        assert float(row["optimum_low"]) < true_rho(size) < float(row["optimum_high"])
    assert only(tables["best_rho_table"], variant="sam", scale="0.1m")["status"] == "next to a diverged rho"
    law = only(tables["power_law_table"], variant="functional_sam")
    assert float(law["exponent"]) == pytest.approx(-0.2, rel=1e-6)
    assert float(law["exponent_low"]) < -0.2 < float(law["exponent_high"])
    assert (law["checked_at"], float(law["best_there"])) == ("1.8m", 0.01)
    assert float(law["foretold"]) == pytest.approx(true_rho("1.8m"), rel=1e-6)  # from the two smaller ones alone
    assert law["check"].endswith("within a step of the grid")


def test_equal_compute_sets_two_passes_against_twice_the_steps(made):
    _, _, tables = made
    row = only(tables["against_adamw_table"], group="1.8m, 1000 steps", entry="functional_sam", basis="at equal FLOPs")
    assert row["adamw"] == "adamw, 2000 steps"
    rho = float(row["rho"])
    expected = method_loss("functional_sam", "1.8m", rho, 0) - adamw_loss("1.8m", 2000, 0)
    assert float(row["loss"]) == pytest.approx(expected)


def test_what_did_not_finish_is_told(made):
    _, page, tables = made
    assert "1 diverged, 1 failed, 1 missing or unfinished" in page
    statuses = {row["run"]: row["status"] for row in tables["runs_table"]}
    assert (statuses[DIVERGED], statuses[FAILED], statuses[MISSING]) == ("diverged", "failed", "unfinished")
    row = only(tables["loss_against_rho"], variant="sam", scale="0.1m", rho="0.1")
    assert (row["loss"], row["status"]) == ("inf", "diverged")
    assert "no scaling law; it takes at least 3 model sizes and 3 token counts; there are 3 and 2" in page


def test_other_measures_and_their_rank_correlation(made):
    _, page, tables = made
    falling = only(tables["rank_correlation_table"], measure="lambda_max", cell="1.8m, 1000 steps")
    rising = only(tables["rank_correlation_table"], measure="int4", cell="1.8m, 1000 steps")
    assert (float(falling["correlation"]), float(rising["correlation"])) == pytest.approx((-1.0, 1.0))
    assert int(rising["correlation_n"]) == 13  # 3 of AdamW and 2 methods of 6, without the failed and the missing one
    row = only(tables["retention_table"], cell="1.8m, 1000 steps", variant="adamw")
    assert float(row["int4"]) == pytest.approx(sum(adamw_loss("1.8m", 1000, seed) ** 2 for seed in SEEDS) / 3)
    assert 'id="curvature"' in page
    run = [row for row in tables["curvature_over_training"] if row["run"] == name_of("adamw", None, size="1.8m")]
    assert [(float(row["tokens"]), float(row["value"])) for row in run] == [
        (1024 * 500, 9.0), (1024 * 1000, -adamw_loss("1.8m", 1000, 0)),
    ]  # fmt: skip
    assert not any(row["measure"] in ("unknown", "trace_error", "loss") for row in tables["rank_correlation_table"])


def test_a_scaling_law_where_there_is_enough(tmp_path):
    runs = {}
    for size in PARAMETERS:
        for steps in (500, 1000, 4000):
            name, overrides = plan("adamw", size=size, duration=f"{steps} steps")
            runs[name] = overrides, adamw_loss(size, steps, 0)
    write_sweep(tmp_path, runs)
    found, refused = report_analysis.scaling_laws(report_entries.analyse(results.read(tmp_path)))
    assert not refused
    law = found["adamw"].intervals
    assert (law["E"].value, law["a"].value, law["b"].value) == pytest.approx((1.0, 0.4, 0.35), rel=0.02)


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (lambda name: "adamw" not in name and "seed=0" in name, "There is no AdamW run"),
        (lambda name: "seed=0" in name, "One seed a method: no difference has an interval"),
        (lambda name: "adamw" in name, "no scaling law"),
        (lambda name: False, "2 missing or unfinished"),
    ],
)
def test_part_of_a_study_makes_a_report_too(tmp_path, chosen, said):
    runs = {name: found for name, found in study(["0.1m"]).items() if chosen(name)}
    runs = runs or {name: (overrides, None) for name, (overrides, _) in list(study(["0.1m"]).items())[:2]}
    write_sweep(tmp_path, runs)
    assert report.main([str(tmp_path), f"--out={tmp_path / 'out'}"]) == 0
    assert said in (tmp_path / "out" / "index.html").read_text()


def test_a_report_in_the_place_of_another_leaves_none_of_its_files(tmp_path):
    write_sweep(tmp_path, study(["0.1m"]))
    out = tmp_path / "out"
    assert report.main([str(tmp_path), f"--out={out}"]) == 0
    (out / "own.png").touch()
    whole = {path.name for path in out.iterdir()}
    assert report.main([str(tmp_path), "--only=optim.method=adamw", f"--out={out}"]) == 0
    part = {path.name for path in out.iterdir()}
    assert {"loss_against_rho.png", "best_rho_table.csv"} <= whole - part
    assert not part - whole
    assert {"own.png", "curves.png", "index.html"} <= part
    assert {row["variant"] for row in csv.DictReader((out / "runs_table.csv").open())} == {"adamw"}
    assert report.main([str(tmp_path), "--only=seed=77", f"--out={out}"]) == 2


def test_a_second_process_draws_the_same(made, pools, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MANY", 10**9)
    before = len(pools)
    assert report.main([str(made[0]), f"--out={tmp_path}"]) == 0
    assert len(pools) == before > 0
    alone = sorted(tmp_path.iterdir())
    assert len(alone) > 10
    for path in alone:
        assert (made[0] / "report" / path.name).read_bytes() == path.read_bytes()


def test_of_many_measures_the_best_known_are_drawn():
    many = [f"m{i}" for i in range(20)]
    assert report_analysis.shown(many) == many[:8]
    assert report_analysis.shown([*many, "trace", "lambda_max"]) == ["lambda_max", "trace"]


def test_a_busy_machine_is_told(tmp_path):
    runs = {name: (overrides, 2.0) for name, overrides in (plan("adamw", seed=seed) for seed in SEEDS)}
    write_sweep(tmp_path, runs)
    first, *others = results.read(tmp_path)
    assert report_analysis.unsteadiness(report_entries.analyse([first, *others])) == pytest.approx(1.0)
    study = report_entries.analyse([first._replace(seconds=3 * first.seconds), *others])
    assert "factor of 3" in report.summary(study, report_analysis.comparison(study))[-1]


def test_runs_of_one_ratio_of_tokens_to_parameters_are_one_budget(tmp_path):
    runs = {}
    for size, steps in (("0.1m", 2160), ("0.4m", 8640), ("1.8m", 34560)):
        for duration in (1000, steps):
            name, overrides = plan("adamw", size=size, duration=f"{duration} steps")
            runs[name] = overrides, 2.0
    write_sweep(tmp_path, runs)
    found = report_entries.analyse(results.read(tmp_path))
    assert {cell.budget for cell in found.cells} == {"1000 steps", "20 tokens a parameter"}


def test_an_entry_is_at_its_best_rate_and_runs_at_another_are_named_so(tmp_path):
    runs = {}
    for size, rates in {"0.1m": (0.002, 0.001), "0.4m": (0.002,), "1.8m": (0.001,)}.items():
        for rate in rates:
            for method, rho in (("adamw", None), ("sam", 0.1)):
                name, overrides = plan(method, rho, size=size, optim__peak_learning_rate=rate)
                runs[name] = (overrides, 2.0 + rate)
    write_sweep(tmp_path, runs)
    study = report_entries.analyse(results.read(tmp_path))
    assert {cell.scale: list(cell.entries) for cell in study.cells} == {
        size: ["adamw", "sam"] for size in ("0.1m", "0.4m", "1.8m")
    }
    assert {entry.scale: entry.chosen("rate") for entry in study.entries if entry.perturbs} == {
        "0.1m": 0.001, "0.4m": 0.002, "1.8m": 0.001,
    }  # fmt: skip
    assert set(study.runs["variant"]) == {"adamw", "sam", "adamw, rate 0.002", "sam, rate 0.002"}
    assert study.notes == []


def test_a_method_with_several_values_of_another_key_is_several_entries(tmp_path):
    runs = {}
    for method, schedules in (("adamw", ("constant", "cosine")), ("sam", ("cosine",))):
        for schedule in schedules:
            name, overrides = plan(method, None if method == "adamw" else 0.1, optim__schedule=schedule)
            runs[name] = overrides, 2.0 - 0.1 * (schedule == "cosine")
    write_sweep(tmp_path, runs)
    found = report_entries.analyse(results.read(tmp_path))
    assert found.names == ["adamw, schedule=constant", "adamw", "sam"]
    assert [entry.tokens.name for entry in found.entries] == ["adamw"] * 3  # AdamW at its best
    assert found.notes == ["Names leave out what most runs have: schedule=cosine."]


def test_one_rho_alone_is_no_best_rho(tmp_path):
    runs = {}
    for method, rhos in (("adamw", (None,)), ("sam", (0.1,)), ("functional_sam", (0.1, 0.2))):
        for rho in rhos:
            name, overrides = plan(method, rho)
            runs[name] = overrides, 2.0 - (rho or 0.0)
    write_sweep(tmp_path, runs)
    found = report_analysis.best_rho(report_entries.analyse(results.read(tmp_path)))
    assert dict(zip(found["variant"], found["tried"], strict=True)) == {"sam": 1, "functional_sam": 2}
    drawing = report_figures.best_rho(found, {}, ["sam", "functional_sam"])
    assert set(drawing.frame["variant"]) == {"functional_sam"}


def test_best_rho_is_drawn_over_sizes_where_there_are_several(tmp_path):
    runs = {}
    for method, sizes in (("sam", ("0.1m",)), ("functional_sam", ("0.1m", "0.4m"))):
        for size in sizes:
            for rho in (0.01, 0.1):
                name, overrides = plan(method, rho, size=size)
                runs[name] = overrides, 2.0 - rho
    write_sweep(tmp_path, runs)
    study = report_entries.analyse(results.read(tmp_path))
    drawing = report_figures.best_rho(report_analysis.best_rho(study), {}, study.names)
    assert set(drawing.frame[["variant", "scale"]].itertuples(index=False, name=None)) == {
        ("functional_sam", "0.1m"), ("functional_sam", "0.4m"),
    }  # fmt: skip


def test_a_law_over_sizes_is_of_one_kind_of_model(tmp_path):
    runs, best = {}, {"0.1m": 0.1, "0.4m": 0.1, "1.8m": 0.03}
    for size, dtype, seed in (*((size, "float32", 0) for size in best), ("0.4m", "bfloat16", 0)):
        for rho in (0.01, 0.03, 0.1, 0.3):
            name, overrides = plan("sam", rho, size=size, seed=seed, model__compute_dtype=dtype)
            best_rho = 0.03 if dtype == "bfloat16" else best[size]
            runs[name] = overrides, 2.0 + 0.1 * math.log(rho / best_rho) ** 2
    write_sweep(tmp_path, runs)
    study = report_entries.analyse(results.read(tmp_path))
    found = report_analysis.best_rho(study)
    assert found["family"].value_counts().to_dict() == {"1000 steps": 3, "1000 steps, compute_dtype bfloat16": 1}
    laws = report_analysis.power_laws(found)
    assert set(laws) == {("1000 steps", "sam")}
    (row,) = report_analysis.laws_table(found, laws).itertuples()
    assert (row.checked_at, row.foretold) == ("1.8m", pytest.approx(0.1, rel=1e-3))
    assert len(report_analysis.scaling_points(study, "sam")) == 3


def test_a_model_is_named_by_what_most_have_not(tmp_path):
    runs = {}
    for dtype, seeds in (("float32", (0, 1, 2)), ("bfloat16", (0,))):
        for seed in seeds:
            name, overrides = plan("adamw", None, seed=seed, model__compute_dtype=dtype)
            runs[name] = overrides, 2.0
    write_sweep(tmp_path, runs)
    found = report_entries.analyse(results.read(tmp_path))
    size = min(cell.scale for cell in found.cells)
    assert {cell.scale for cell in found.cells} == {size, f"{size}, compute_dtype bfloat16"}
    assert found.notes == ["Names leave out what most runs have: compute_dtype=float32."]


def test_a_radius_that_falls_late_is_another_variant_than_a_constant_one(tmp_path):
    runs = {}
    for schedule in ("constant", "late"):
        name, overrides = plan("sam", 0.1, optim__rho_schedule=schedule)
        runs[name] = overrides, 2.0
    write_sweep(tmp_path, runs)
    assert report_entries.analyse(results.read(tmp_path)).names == ["sam", "sam, rho_schedule=late"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: must be the directory of a sweep"),
        (["a", "b"], "--out is missing"),
        ([], "DIR is missing"),
        (["compare", "a"], "RUN is missing"),
        (["compare", "a", "b"], "a: must be the directory of a sweep, or the workdir of a run"),
        (["compare", "a", "b", "--out=x.txt"], "--out: x.txt: must be a file that ends in .html"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = report.main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- two runs
def _pair(tmp_path, second):
    config = flatten(base.get_config().to_dict())
    first = {**config, "optim.method": "sam", "optim.rho": 0.1, "model.size": "0.1m"}
    write_run(tmp_path / "a", first, 2.0)
    write_run(tmp_path / "b", {**first, **second}, 2.0)
    return tmp_path / "a", tmp_path / "b"


def _change(workdir, step, loss):
    path = workdir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["kind"] == "train" and record["step"] >= step:
            record["loss"] = loss(record["loss"])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_two_runs_that_are_one(tmp_path, capsys):
    a, b = _pair(tmp_path, {})
    for workdir in (a, b):
        _change(workdir, 900, lambda loss: "nan")
    assert report.main(["compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "nowhere in 20 common steps" in shown
    assert re.search(r"configs +the same", shown)
    assert report.main(["compare", str(a), str(b), f"--out={tmp_path / 'both.html'}"]) == 0  # drawn for all that


def test_two_runs_that_part(tmp_path, capsys):
    a, b = _pair(tmp_path, {"optim.rho": 0.2, "optim.perturb": ["mlp"]})
    _change(b, 500, lambda loss: math.nextafter(loss, 9))  # the last bit
    out = tmp_path / "page" / "both.html"
    assert report.main(["compare", str(a), str(b), f"--out={out}"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"training losses differ from +step 500\n", shown)
    assert re.search(r"optim.rho +0.1 +0.2\n", shown)
    assert re.search(r"optim.perturb +\['\.\*'\] +\['mlp'\]\n", shown)
    assert re.search(r"last held-out loss.* \+0.0000\n", shown)
    page = out.read_text()
    assert "http" not in page
    assert page.count("<svg") == 1
    assert out.with_suffix(".png").exists()


def test_what_runs_have_not_in_common_is_left_out(tmp_path):
    a, b = _pair(tmp_path, {"train.duration": "500 steps"})
    one, other = (results.read([place])[0] for place in (a, b))
    assert report_compare.first_difference(one, other)[1] == 10  # steps of both that were recorded
    assert any(row[0].startswith("held-out loss at step 500") for row in report_compare.numbers(one, other))


def test_the_difference_of_two_runs_is_by_step(tmp_path):
    a, b = _pair(tmp_path, {"optim.rho": 0.2})
    _change(b, 500, lambda loss: loss + 0.25)
    one, other = (results.read([place])[0] for place in (a, b))
    apart = dict(report_compare.apart_by_step(one, other, "training"))
    assert {step: round(value, 6) for step, value in apart.items()} == {
        step: 0.25 * (step >= 500) for base in range(100, 1001, 100) for step in (base - 1, base)
    }
    assert dict(report_compare.apart_by_step(one, other, "held-out")) == dict.fromkeys(range(100, 1001, 100), 0.0)


def test_long_names_give_way_to_what_differs(tmp_path, capsys):
    a, b = (path.rename(path.with_name(f"{path.name}-{'x' * 60}")) for path in _pair(tmp_path, {"optim.rho": 0.2}))
    assert report.main(["compare", str(a), str(b)]) == 0
    assert re.search(r"^ +rho=0.1 +rho=0.2 +B against A$", capsys.readouterr().out.splitlines()[0])


def test_each_batch_is_compared_with_the_noise_scale_where_that_was_measured():
    def run(tokens, *scales):
        return argparse.Namespace(
            curvature=[{"batch_tokens": tokens, **({"noise_scale": x} if x else {})} for x in scales]
        )

    found = [run(1024, 90.0, 4096.0), run(1024, 2048.0), run(1024, 1e5), run(1024, 1e5, None), run(8192, 4096.0)]
    few, many = report.regimes([*found, argparse.Namespace(curvature=())])
    assert few == (
        "Noise of the gradient: a batch of 1,024 tokens is 0.25 of the gradient noise scale, 4,096 tokens: its "
        "gradient is mostly noise (newest checkpoints of 3 runs)."
    )
    assert "8,192 tokens is 2 of the gradient noise scale, 4,096 tokens: its gradient is mostly signal" in many
