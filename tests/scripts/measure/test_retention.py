"""steppe retention: its files and output for real checkpoints, and its comparison of runs."""

import csv
import io
import json
import math
import os
import pathlib

import jax
import pytest

from helpers import lm_runs
from steppe.data import cache, loader
from steppe.lm.keep import saved, workdir
from steppe.lm.keep.checkpoint import Checkpoints
from steppe.lm.measure import retention
from steppe.lm.measure.evaluate import evaluate, held_out, make_evaluation_step
from steppe.lm.parts.assembly import assemble
from steppe.lm.parts.state import create
from steppe.lm.track.tracker import Tracker
from steppe.lm.track.waiting import Progress
from steppe.scripts.measure import __main__ as measure
from steppe.scripts.measure import runs

pytestmark = pytest.mark.usefixtures("one_device")

BRIEF = ["--noise=0,0.5", "--samples=2", "--bits=8,4", "--group=8", "--fine_tune_steps=8", "--batch_size=4"]
BRIEF += ["--fine_tune_rates=0,0.01", "--batches=3", "--gptq=1"]


def keep(directory, config, corpus, finished=True):
    """A workdir with the initial state of a config as its checkpoint, on one device."""
    parts = assemble(config, corpus.tokenizer.vocab_size, corpus.epoch_tokens, devices=jax.devices()[:1])
    with workdir.claim(str(directory), config, True) as run_id:
        with Checkpoints(str(directory / "checkpoints"), run=run_id) as checkpoints:
            checkpoints.save(20, create(parts.mesh, parts.initialise), {})
        tracker = Tracker(str(directory), config, total_steps=20, tokens_per_step=64, stream=io.StringIO())
        tracker.run(0, {"steps": 20, "tokens": 1280})
        if finished:
            tracker.evaluation(20, "val", {"loss": 5.0, "bits_per_byte": 7.2})
        tracker.close("finished")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of runs a and b, which differ in their seed, and c, which has not ended; and a second text."""
    place = tmp_path_factory.mktemp("runs")
    source = pathlib.Path(os.__file__).read_text()
    (place / "train.txt").write_text(source[:4_000])
    (place / "val.txt").write_text(source[9_000:10_000])
    words = "and the people said unto him that day "
    (place / "second.txt").write_text("".join(f"{words[i % 30 :]}{words}{i}\n" for i in range(60)))
    for name in "abc":
        config = lm_runs.config(str(place), str(place / "cache"), seed=ord(name), train__batch_size=4)
        corpus = loader.open_corpus(cache.ensure(config.data))
        keep(place / "sweep" / name, config, corpus, finished=name != "c")
    return place


@pytest.fixture(scope="module")
def measured(place):
    """The exit status of measuring the folder, and the two records."""
    status = measure.main(["retention", f"--workdir={place}/sweep", f"--out={place}/out", second(place), *BRIEF])
    return status, *(json.loads((place / "sweep" / name / "retention.json").read_text()) for name in "ab")


PROGRESS = Progress("")


def second(place):
    return f"--fine_tune=lines:{place}/second.txt"


def test_every_measure_is_a_number_in_the_file(measured):
    status, a, b = measured
    assert status == 0
    names = ["noise_0", "noise_0.5", "q8_channel", "q8_group8", "q4_channel", "q4_group8"]
    names += [name.replace("_", "_gptq_", 1) for name in names if name.startswith("q")]
    names += [f"fine_tune_lr={rate}: {kind}" for rate in ("0", "0.01") for kind in ("lost", "curvature")]
    names += ["forgetting_at_equal_gain", "forgetting_at_equal_loss"]
    for record in (a, b):
        assert sorted(record["summary"]) == sorted(names)
        assert all(math.isfinite(value) for value in record["summary"].values())
        assert record["summary"]["noise_0"] == record["summary"]["fine_tune_lr=0: lost"] == 0.0
        assert record["summary"]["noise_0.5"] > 0
        assert 0 < abs(record["summary"]["q8_channel"]) < 1e-3 * record["loss"]
        assert len(record["details"]["noise_0.5"]["samples"]) == 2
        still, moving = record["details"]["fine_tune"]["paths"]
        assert [point["step"] for point in still["points"]] == [1, 2, 4, 8]
        assert all((point["gained"], point["lost"]) == (0.0, 0.0) for point in still["points"])
        assert moving["points"][-1]["gained"] > 0
        assert still["along"]["norm"] == 0
        assert moving["along"]["norm"] > 0
        assert moving["along"]["rise"] * moving["points"][-1]["lost"] > 0  # of one batch, and of all
        assert (record["step"], record["held_out"]["tokens"]) == (20, 3 * 4 * 16)
    assert a["loss"] != b["loss"]
    assert a["details"]["equal"] == b["details"]["equal"]


def test_the_loss_is_that_of_evaluate_on_the_same_rows(place, measured):
    run = saved.load(str(place / "sweep" / "a"), log=lambda text: None)
    step = make_evaluation_step(run.parts)
    found = evaluate(step, run.params, held_out(run.corpus, "val", run.parts.mesh, 4, 3))
    assert measured[1]["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert measured[1]["held_out"]["tokens"] == found["tokens"]


def test_a_second_time_nothing_is_measured_and_the_table_is_the_same(place, measured, capsys, monkeypatch):
    with open(place / "out" / "retention.csv") as file:
        header, *rows = csv.reader(file)
    assert [row[0] for row in rows] == ["a", "b"]
    shown = {name: float(value) for name, value in zip(header[2:], rows[1][2:], strict=True)}
    assert shown == {"loss": measured[2]["loss"], **measured[2]["summary"]}
    assert (place / "out" / "retention.png").stat().st_size > 10_000
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(retention, "measure_run", None)  # must not be called
        assert measure.main(["retention", f"--workdir={place}/sweep", second(place), *BRIEF]) == 0
    text = capsys.readouterr().out
    assert text.count("already measured") == 2
    assert f"left out  {place}/sweep/c: unfinished" in text
    assert f"over {3 * 4 * 16} tokens" in text
    assert "all (2)" in text
    assert json.loads((place / "sweep" / "a" / "retention.json").read_text()) == measured[1]
    one = f"--workdir={place}/sweep/a"
    assert known([one, second(place), *BRIEF]) == [measured[1]]
    assert known([one, second(place), *BRIEF, "--group=4"]) == []
    (spot,) = measure.find(asked([one]), PROGRESS)
    assert runs.known(asked([one, second(place), *BRIEF]), [spot._replace(step=10)]) == {}
    seeds = f"--only=seed={ord('b')},{ord('c')}"
    assert [target.name for target in measure.find(asked([f"--workdir={place}/sweep", seeds]), PROGRESS)] == ["b"]


def asked(argv):
    return measure.read("retention", retention, argv)


def known(argv):
    """What has been measured already of what a command line asks for."""
    return list(runs.known(asked(argv), measure.find(asked(argv), PROGRESS)).values())


def record(loss, path, **summary):
    points = [{"step": i, "gained": gained, "lost": lost} for i, (gained, lost) in enumerate(path)]
    there = {"loss": loss, "paths": [{"rate": 0.1, "points": points}]}
    return {
        "step": 1, "loss": 2.0, "held_out": {"tokens": 10}, "fine_tune": {"task": "x"}, "summary": summary,
        "details": {"fine_tune": there},
    }  # fmt: skip


def test_all_runs_are_checked_before_one_is_measured(place, measured, capsys, monkeypatch):
    other = place / "of another text"
    (place / "more").mkdir()
    for name in ("train.txt", "val.txt"):
        (place / "more" / name).write_text((place / name).read_text()[::-1])
    config = lm_runs.config(str(place / "more"), str(place / "cache"))
    keep(other, config, loader.open_corpus(cache.ensure(config.data)))
    monkeypatch.setattr(retention, "measure_run", lambda *_: pytest.fail("the first run was measured"))
    first = next(path.parent for path in sorted(place.rglob("config.json")) if path.parent != other)
    assert measure.main(["retention", f"--workdir={first}", f"--workdir={other}", "--again", "--fine_tune=none"]) == 2
    assert "must be of the same text" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["q", "int"])
def test_every_rounding_has_its_bars(prefix):
    kinds = [f"{prefix}{kind}" for kind in ("8_channel", "4_gptq_group64", "3_channel_embedding")]
    found = {name: record(3.0, [(1.0, 0.5)], noise_0=0.0, **dict.fromkeys(kinds, 0.5)) for name in ("one", "other")}
    axes = retention.draw_runs(found, {name: name for name in found}).axes[1]
    assert [label.get_text().replace("\n", "_") for label in axes.get_xticklabels()] == kinds
    assert [bar.get_height() for bar in axes.patches] == [0.5] * 6


def test_runs_are_compared_at_the_gain_and_at_the_loss_that_all_reach():
    found = {
        "strong": record(3.0, [(0.5, 0.1), (1.0, 0.5)]),
        "weak": record(3.5, [(1.0, 1.0), (2.0, 3.0)]),
        "broken": record(3.0, [(None, None)]),
        "useless": record(3.0, [(-1.0, 1.0)]),
    }
    retention.compare(found)
    # gain: 0.8 of 1.0; loss: the higher of 3 - 0.8 and 3.5 - 1.6
    assert found["weak"]["details"]["equal"] == {"gain": 0.8, "loss": pytest.approx(2.2), "runs": 2}
    assert found["strong"]["summary"]["forgetting_at_equal_gain"] == pytest.approx(0.1 + 0.4 * 0.3 / 0.5)
    assert found["strong"]["summary"]["forgetting_at_equal_loss"] == pytest.approx(0.1 + 0.4 * 0.3 / 0.5)
    assert found["weak"]["summary"]["forgetting_at_equal_gain"] == pytest.approx(0.8)
    assert found["weak"]["summary"]["forgetting_at_equal_loss"] == pytest.approx(1 + 2 * 0.3)
    assert found["broken"]["summary"] == found["useless"]["summary"] == {}
    del found["weak"]  # what another set of runs said is forgotten
    retention.compare(found)
    assert found["strong"]["details"]["equal"]["runs"] == 1


def test_runs_that_differ_in_their_seed_are_one_group_with_a_mean_and_an_error():
    found = {name: record(3.0, [(0.5, 0.1)], int4_channel=value) for name, value in zip("xyz", (1, 3, 7), strict=True)}
    configs = {
        name: {"seed": seed, "optim.method": method, "log.name": name}
        for name, seed, method in (("x", 0, "adamw"), ("y", 1, "adamw"), ("z", 0, "sam"))
    }
    labels = runs.labels_of(configs)
    assert labels == {"x": "adamw", "y": "adamw", "z": "sam"}
    found["x"]["summary"] |= {"int3_channel": math.nan}
    _, means = runs.tables(retention.frame(found), list(labels.values())).split("\n\n")
    title, header, adamw, sam = (line.split() for line in means.splitlines())
    assert "standard errors" in " ".join(title)
    assert header == ["loss", "int4_channel", "int3_channel"]
    assert adamw == ["adamw", "(2)", "2.00000", "±0.00000", "2.00000", "±1.00000", "-"]
    assert sam == ["sam", "(1)", "2.00000", "7.00000", "-"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--workdir is missing"),
        (["--workdir=nowhere"], "nowhere"),
        (["--workdir={place}/sweep", "--only=seed=7"], "--only=seed=7: no run matches"),
        (["--workdir=x", "--noise=-1"], "--noise"),
        (["--workdir=x", "--noise=a,b"], "--noise"),
        (["--workdir=x", "--bits=9"], "--bits"),
        (["--workdir=x", "--bits=4.5"], "--bits"),
        (["--workdir=x", "--group=0"], "--group"),
        (["--workdir=x", "--fine_tune_rates=nan"], "--fine_tune_rates"),
        (["--workdir=x", "--samples=0"], "--samples"),
        (["--workdir={place}/sweep/a", "--fine_tune=web:x"], "config.data.task = 'web:x'"),
        (["--workdir={place}/sweep/a", "--step=7"], "--step=7: must be one of its checkpoints, which are 20"),
        (["--workdir={place}/sweep/a", "--step=all"], "--step=all: must be a number of steps"),
        (["--workdir={place}/other", "--workdir={place}/sweep/a", "--fine_tune=none", *BRIEF], "sequence length"),
    ],
)
def test_bad_input_is_one_line(place, measured, arguments, named, capsys):
    other = place / "other"
    if not other.exists():
        config = lm_runs.config(str(place), str(place / "cache"), data__sequence_length=8, train__batch_size=4)
        keep(other, config, loader.open_corpus(cache.ensure(config.data)))
        before = json.dumps({"step": 1, "summary": {}, "settings": {}})
        (other / "retention.json").write_text(before)
    capsys.readouterr()
    try:
        status = measure.main(["retention", *(text.format(place=place) for text in arguments)])
    except SystemExit as stop:
        status = stop.code
    found = capsys.readouterr().err
    assert status == 2
    assert found.count("\n") == 1
    assert named in found


def test_a_whole_held_out_set_is_expected_to_take_as_long_as_it_has_sequences():
    """38 sequences are 5 batches of 8, the last of which is padded; a limit below them holds."""
    for limit, batches in ((0, 5), (3, 3), (9, 5)):
        settings = retention.Settings(batch_size=8, batches=limit, bits=(4,), gptq=2)
        costs = retention.costs({"train.batch_size": 16}, settings, 38)
        assert costs["held-out loss"] == pytest.approx(8 * batches / 3)
        assert costs["4 bits by GPTQ"] == pytest.approx(2 * (8 * batches / 3 + 2 * 16))
