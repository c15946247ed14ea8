"""Tokens are what the loss saw: counted, with padded rows too, whatever a run goes through."""

import json
import random

import numpy as np
import pytest

from helpers import lm_runs
from steppe.configs import base
from steppe.data import loader
from steppe.lm.parts import corpus as corpora
from steppe.lm.parts.budget import length
from steppe.lm.parts.state import parameter_shapes
from steppe.lm.run import train

T, BATCH, BUDGET = 64, 8, 4000
PADDED = {
    "data__packing": "bestfit",
    "data__sequence_length": T,
    "train__batch_size": BATCH,
    "train__duration": f"{BUDGET} tokens",
    "optim__warmup": "10%",
    "checkpoint__every": "3 steps",
    "evaluate__batches": 1,
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Lines of 40 bytes, one document each, and longer ones: a row of 64 holds one of the former."""
    place, draw = tmp_path_factory.mktemp("lines"), random.Random(0)
    words = lambda size: "".join(draw.choice("abcdefghij ") for _ in range(size))  # noqa: E731
    (place / "short.txt").write_text("".join(words(40) + "\n" for _ in range(600)))
    (place / "mixed.txt").write_text("".join(words(draw.randrange(5, 90)) + "\n" for _ in range(400)))
    return place


def config(lines, task="lines:{}/short.txt", **more):
    made = lm_runs.config(str(lines), str(lines / "cache"), **{**PADDED, **more}).copy_and_resolve_references()
    made.unlock()
    made.data.update(task=task.replace("{}", str(lines)), held_out=(), held_out_fraction=0.1)
    return made.lock()


def seen(workdir, steps, batch=BATCH, first=0, before=0):
    """Tokens of each step, from the rows themselves."""
    corpus = corpora.kept(workdir)
    rows = (loader.training_rows(corpus, 0, step, batch, before=before)["weights"] for step in range(first, steps))
    return [int((weights > 0).sum()) for weights in rows]


@pytest.fixture(scope="module")
def whole(lines, tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    assert lm_runs.run(config(lines), place) == train.FINISHED
    return place


def test_a_budget_of_tokens_is_what_the_loss_sees(whole, capsys):
    records = lm_runs.records(whole, "train")
    wanted = np.cumsum(seen(whole, len(records)))
    assert [record["tokens"] for record in records] == wanted.tolist()
    assert abs(records[-1]["tokens"] - BUDGET) < BATCH * 41
    about = lm_runs.records(whole, "run")[-1]
    assert about["positions"] == len(records) * BATCH * T > 1.5 * about["tokens"]
    assert about["tokens_per_step"] == pytest.approx(BATCH * 41, rel=1e-6)
    assert about["tokens"] == round(len(records) * about["tokens_per_step"])
    rates = [record["tokens_per_second"] for record in records[5:9]]
    assert all(rate > 0 for rate in rates)


@pytest.mark.parametrize("mesh", [pytest.param({}, marks=pytest.mark.exhaustive), {"mesh__fsdp": 2, "mesh__tensor": 2}])
def test_the_count_is_exact_on_resume_and_on_any_mesh(lines, whole, tmp_path, mesh):
    made = config(lines, "0.7 short=lines:{}/short.txt + 0.3 mixed=lines:{}/mixed.txt", **mesh)
    assert lm_runs.run(made, tmp_path, until=4) == train.FINISHED
    assert lm_runs.run(made, tmp_path) == train.FINISHED
    records = lm_runs.records(tmp_path, "train")
    counts = seen(tmp_path, len(records))
    assert len(set(counts)) > 3  # a mixture: no two steps alike
    assert [record["tokens"] for record in records] == np.cumsum(counts).tolist()
    mean = lm_runs.records(tmp_path, "run")[-1]["tokens_per_step"]
    assert mean == pytest.approx(np.mean(counts), rel=0.1)


@pytest.mark.exhaustive  # three runs; other sizes: parts/test_leg.py
def test_the_count_goes_on_with_other_sizes_and_in_a_branch(lines, whole, tmp_path):
    steps = len(lm_runs.records(whole, "train"))
    first = seen(whole, 6)
    made = config(lines, branch_from=f"{whole}@{steps}", train__duration=f"{2 * BUDGET} tokens")
    assert lm_runs.run(made, tmp_path / "b") == train.FINISHED
    records = lm_runs.records(tmp_path / "b", "train")
    assert [record["tokens"] for record in records] == np.cumsum(seen(whole, len(records))).tolist()
    assert abs(records[-1]["tokens"] - 2 * BUDGET) < BATCH * 41
    assert lm_runs.run(config(lines), tmp_path / "c", until=6) == train.FINISHED
    other = config(lines, train__batch_size=16)
    assert lm_runs.run(other, tmp_path / "c", allow_change={"train.batch_size"}) == train.FINISHED
    records = lm_runs.records(tmp_path / "c", "train")
    later = seen(whole, len(records) - 6, 16, before=6 * BATCH)
    assert [record["tokens"] for record in records] == np.cumsum([*first, *later]).tolist()
    assert abs(records[-1]["tokens"] - BUDGET) < 16 * 41


def test_a_run_of_before_goes_on_counting_positions_and_says_so(lines, tmp_path, capsys):
    made = config(lines, train__counted="positions", train__duration=f"{8 * BATCH * T} tokens")
    assert lm_runs.run(made, tmp_path, until=4) == train.FINISHED
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["train"]["counted"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    capsys.readouterr()
    assert lm_runs.run(config(lines, train__duration=f"{8 * BATCH * T} tokens"), tmp_path) == train.FINISHED
    assert "tokens      are positions, padding included" in capsys.readouterr().out
    records = lm_runs.records(tmp_path, "train")
    assert [record["tokens"] for record in records] == [BATCH * T * step for step in range(1, 9)]


def test_rows_without_padding_are_counted_as_ever():
    made = base.get_config()
    made.train.update(batch_size=6, duration="1000 tokens")
    made.data.sequence_length = 7
    from steppe.lm.model.transformer import shape

    params = parameter_shapes(shape(made.model, 259, 7, "einsum"))
    for duration, steps in (("1000 tokens", 24), ("3 epochs", 72), ("5 steps", 5)):
        made.train.duration = duration
        assert length(made, params, 1008, tokens_per_row=6.9) == length(made, params, 1008)
        assert length(made, params, 1008).steps == steps
    made.data.packing = "bestfit"
    made.train.duration = "3 epochs"
    assert length(made, params, 1008, tokens_per_row=3.3).steps == 72
    made.train.duration = "chinchilla"
    made.train.tokens_per_parameter = 0.001
    assert length(made, params, 1008, tokens_per_row=3.5).steps > 1.9 * length(made, params, 1008).steps
