"""Runs that go on with another batch or sequence length: what they read, count, schedule and say is what happened."""

import pytest

from helpers import lm_runs
from steppe.data import loader
from steppe.lm.keep.exits import Unusable
from steppe.lm.parts.leg import Leg, leg_of
from steppe.lm.run import replay, train
from steppe.scripts import results

TOKENS = {"train__duration": "2560 tokens", "optim__warmup": "20%"}  # 20 steps of 8 x 16
LARGER = {"train__batch_size": 16}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    place = tmp_path_factory.mktemp("corpus")
    return lm_runs.write_text(place)


@pytest.fixture
def rows(monkeypatch):
    """The rows of the training stream that batches were made of, in order of their making."""
    read, real = [], loader.training_rows

    def recording(corpus, seed, step, batch_size, rows=None, before=0):
        if rows is None or len(rows) == batch_size:
            read.append(range(before + step * batch_size, before + (step + 1) * batch_size))
        return real(corpus, seed, step, batch_size, rows, before)

    monkeypatch.setattr(loader, "training_rows", recording)
    return read


def go(corpus, place, allow=(), until=None, **changes):
    return lm_runs.run(lm_runs.config(*corpus, data__workers=0, **changes), str(place), allow, until)


def rates(place):
    return [record["learning_rate"] for record in lm_runs.records(place, "train")]


def test_a_larger_batch_reads_on_where_the_smaller_one_ended(corpus, tmp_path, rows, capsys):
    place = tmp_path / "run"
    assert go(corpus, place, until=7, **TOKENS) == train.FINISHED
    capsys.readouterr()
    assert go(corpus, place, ["train.batch_size"], **TOKENS, **LARGER) == train.FINISHED
    said = capsys.readouterr().out
    assert [row for batch in rows for row in batch] == list(range(7 * 8 + 7 * 16))
    # 896 tokens were predicted: six and a half steps of 256 are left
    assert [r["tokens"] for r in lm_runs.records(place, "train")] == [
        *range(128, 897, 128), *range(896 + 256, 2689, 256)
    ]  # fmt: skip
    assert "tokens      2,688 in 14 steps" in said
    assert "resuming    after step 7 of 14, 896 tokens" in said
    assert "changed     learning_rate" not in said
    last = lm_runs.records(place, "evaluate")[-1]
    assert (last["step"], last["bytes"]) == (14, 5_000)
    # the rate falls with the tokens: its value after 1,152 of them does not depend on how they came
    assert go(corpus, tmp_path / "whole", **TOKENS) == train.FINISHED
    assert rates(place)[8:] == pytest.approx(rates(tmp_path / "whole")[9::2], rel=1e-5)
    (result,) = results.read(str(place))
    run, later = lm_runs.records(place, "run")
    assert later["flops_per_step"] == pytest.approx(2 * run["flops_per_step"])
    assert result.tokens == 2688
    assert result.flops == pytest.approx(7 * run["flops_per_step"] + 7 * later["flops_per_step"])
    assert [(point.step, point.tokens) for point in result.curve] == [(0, 0), (10, 896 + 3 * 256), (14, 2688)]
    assert result.curve[-1].flops == pytest.approx(result.flops)
    replay.replay(lm_runs.config(*corpus, **TOKENS, **LARGER), str(place), 12, print)
    assert rows[-1] == range(7 * 8 + 4 * 16, 7 * 8 + 5 * 16)
    with pytest.raises(Unusable, match=r"--replay_step=5: .*config\.train\.batch_size is 16 since step 7"):
        replay.replay(lm_runs.config(*corpus, **TOKENS, **LARGER, checkpoint__keep=9), str(place), 5, print)


def test_a_leg_is_resumed_bit_for_bit(corpus, tmp_path, rows):
    for name, stops in (("whole", ()), ("stopped", (9, 12))):
        rows.clear()
        assert go(corpus, tmp_path / name, until=7, **TOKENS) == train.FINISHED
        for until in stops:
            assert go(corpus, tmp_path / name, ["train.batch_size"], until, **TOKENS, **LARGER) == train.FINISHED
        assert go(corpus, tmp_path / name, ["train.batch_size"], **TOKENS, **LARGER) == train.FINISHED
        assert [row for batch in rows for row in batch] == list(range(7 * 8 + 7 * 16))
    assert lm_runs.losses(tmp_path / "whole") == lm_runs.losses(tmp_path / "stopped")
    assert rates(tmp_path / "whole") == rates(tmp_path / "stopped")


def test_a_duration_in_steps_stays_one(corpus, tmp_path, capsys):
    assert go(corpus, tmp_path, until=7) == train.FINISHED
    before = rates(tmp_path)
    assert go(corpus, tmp_path, ["train.batch_size"], **LARGER) == train.FINISHED
    assert lm_runs.records(tmp_path, "train")[-1]["tokens"] == 7 * 128 + 13 * 256
    assert f"tokens      {7 * 128 + 13 * 256:,} in 20 steps" in capsys.readouterr().out
    assert len(rates(tmp_path)) == 20
    assert rates(tmp_path)[:7] == before


def test_another_sequence_length_counts_the_same_tokens_as_read(corpus, tmp_path, rows, capsys):
    longer = {"data__sequence_length": 32, "model__style": "modern"}
    assert go(corpus, tmp_path, until=7, model__style="modern", **TOKENS) == train.FINISHED
    rows.clear()
    allowed = ["data.sequence_length", "corpus"]
    assert go(corpus, tmp_path, allowed, **TOKENS, **longer) == train.FINISHED
    assert [row for batch in rows for row in batch] == list(range(7 * 8 // 2, 7 * 8 // 2 + 7 * 8))
    assert lm_runs.records(tmp_path, "train")[-1]["tokens"] == 2688


def test_a_rate_that_jumps_is_said_with_both_values(corpus, tmp_path, capsys):
    assert go(corpus, tmp_path, until=7) == train.FINISHED
    capsys.readouterr()
    assert go(corpus, tmp_path, ["train.duration"], until=8, train__duration="200 steps") == train.FINISHED
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed     learning_rate")]
    (line,) = said
    before, now = (float(word) for word in line.replace(",", "").split() if word[0].isdigit())
    assert now > before
    assert now == pytest.approx(rates(tmp_path)[-1], rel=1e-2)


def test_what_older_checkpoints_leave_out_is_what_their_config_says(corpus):
    config = lm_runs.config(*corpus)
    meta = {"config": config.to_dict(), "watch": {"windows": [[3, 2]]}}
    assert leg_of(7, meta, config.to_dict()) == Leg()
    larger = lm_runs.config(*corpus, **LARGER).to_dict()
    assert leg_of(7, meta, larger) == Leg(step=7, rows=9 * 8, batches=9, tokens=7 * 128)
