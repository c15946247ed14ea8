"""Multiple choice: likelihoods against sums written out and against lm-eval on the exported model."""

import functools
import json
import os
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import lm_runs
from steppe.data.errors import DataError
from steppe.lm.keep import saved
from steppe.lm.measure import choices
from steppe.lm.run import train
from steppe.scripts.model import evaluate, export

pytestmark = pytest.mark.usefixtures("one_device")

ITEMS = [
    {"query": "import o", "choices": ["s\n", "zq\n"], "gold": 0},
    {"query": "", "choices": ["def", "\u00e9\u00e9", "x"], "gold": "2"},
    {"ctx": "for i in " * 5, "endings": ["range(3):", "!!"], "label": 1},  # longer than the window
]


def config_of(place, text):
    return lm_runs.config(*text, data__sequence_length=24, evaluate__choices=(f"mine=jsonl:{place}/items.jsonl",))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    text = lm_runs.write_text(place)
    (place / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    assert lm_runs.run(config_of(place, text), place / "run") == train.FINISHED
    return place


@functools.partial(jax.jit, static_argnums=(0, 1))
def log_probabilities(trunk, vocabulary, params, inputs):
    hidden = trunk(params, {"inputs": inputs})[0]
    return jax.nn.log_softmax(hidden @ params["embed"]["embedding"].T[:, :vocabulary])


def likelihood(found, query, choice):
    """Sum of log-probabilities of a choice, token by token, each from the last 24 tokens before its end.

    Blanks at the end of the query count with the choice.
    """
    tokenizer = found.corpus.tokenizer
    query, choice = query.rstrip(), query[len(query.rstrip()) :] + choice
    ids = [tokenizer.begin_id, *tokenizer.encode(query + choice)][-25:]
    inputs = np.zeros((1, 24), np.int32)
    inputs[0, : len(ids) - 1] = ids[:-1]
    log_p = np.asarray(log_probabilities(found.parts.objective.trunk, tokenizer.vocab_size, found.params, inputs))
    n = len(tokenizer.encode(query[len(query.rstrip()) :] + choice))  # blanks before a choice count with it
    return float(sum(log_p[t, ids[t + 1]] for t in range(len(ids) - 1 - n, len(ids) - 1)))


def test_likelihoods_are_the_sums_and_the_likeliest_is_the_answer(run, capsys):
    found = saved.load(str(run / "run"), log=lambda line: None)
    items = choices.read((f"mine=jsonl:{run}/items.jsonl",))["mine"]
    rows = choices.rows(items, found.corpus.tokenizer, 24)
    batch = {name: jnp.asarray(getattr(rows, name)) for name in ("inputs", "targets", "weights")}
    scores = np.asarray(choices.make_scores(found.parts)(found.params, batch))
    expected = [likelihood(found, item.query, choice) for item in items for choice in item.choices]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)  # order of sums in float32
    right = per_byte = at = 0
    for item in items:
        mine, sizes = expected[at : at + len(item.choices)], [len(choice.encode()) for choice in item.choices]
        right += int(np.argmax(mine)) == item.gold
        per_byte += int(np.argmax(np.divide(mine, sizes))) == item.gold
        at += len(item.choices)
    recorded = lm_runs.records(run / "run", "choices")
    assert [record["step"] for record in recorded] == [0, 10, 20]
    assert (recorded[-1]["accuracy"], recorded[-1]["accuracy_per_byte"]) == (right / 3, per_byte / 3)
    assert evaluate.main([f"--workdir={run / 'run'}"]) == 0
    assert f"choices mine: accuracy {right / 3:.4f}, per byte {per_byte / 3:.4f}, of 3 items" in capsys.readouterr().out


def test_a_signal_among_the_questions_ends_the_run_which_then_owes_them(run, tmp_path, monkeypatch):
    real, calls = choices.batches, []

    def signalled(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # at the end
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    config = functools.partial(config_of, run, lm_runs.write_text(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(choices, "batches", signalled)
        assert lm_runs.run(config(), tmp_path / "run") == train.STOPPED
    assert [record["step"] for record in lm_runs.records(tmp_path / "run", "choices")] == [0, 10]
    assert lm_runs.run(config(), tmp_path / "run") == train.FINISHED
    for kind in ("choices", "evaluate"):
        found, whole = (lm_runs.records(place / "run", kind) for place in (tmp_path, run))
        assert found == whole


@pytest.mark.parametrize(
    ("source", "content", "said"),
    [
        ("items.jsonl", "", "must be like name=jsonl"),
        ("mine=text:items.jsonl", "", "must be like name=jsonl"),
        ("mine=jsonl:absent.jsonl", "", "must be a file"),
        ("mine=jsonl:items.jsonl", "", "must be a file with items"),
        ("mine=jsonl:items.jsonl", '{"query": "a", "choices": ["b", "c"], "gold": 2}', ":1 is not an item"),
        ("mine=jsonl:items.jsonl", '\n{"query": "a", "choices": ["b"], "gold": 0}', ":2 is not an item"),
        ("mine=jsonl:items.jsonl", "[1]", "JSON array"),
        *(
            (
                "mine=jsonl:items.jsonl",
                json.dumps({"query": "a", "choices": ["b", "c"], "gold": 0} | change),
                ":1 is not an item",
            )
            for change in (
                {"choices": "bc"},
                {"query": None},
                {"gold": 1.0},
                {"gold": True},
                {"gold": "-1"},
                {"gold": None},
                {"choices": ["b", 3]},
                {"choices": ["b", " "]},
                {"query": "\ud800"},
            )
        ),
        ("mine=jsonl:items.jsonl", '{"question": "a"}', ":1 is not an item"),
        ("mine=jsonl:items.jsonl", "3", ":1 is not an item"),
    ],
)
def test_what_is_no_question_is_refused_with_its_place(tmp_path, monkeypatch, source, content, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "items.jsonl").write_text(content)
    with pytest.raises(DataError, match=rf"^[^\n]*{re.escape(said)}[^\n]*$"):
        choices.read((source,))


TASK = """
task: mine
dataset_path: json
dataset_kwargs:
  data_files: {folder}/plain.jsonl
test_split: train
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.mark.exhaustive  # its command, a process of its own; its model, in this one: parity/test_exports.py
def test_lm_eval_finds_the_same_likelihoods(run, tmp_path):
    pytest.importorskip("lm_eval", reason="steppe[hub] is not installed")
    pytest.importorskip("accelerate", reason="steppe[hub] is not installed")
    items = [item for item in ITEMS if item.get("query")]
    items.append({"query": "class A(object)", "choices": [":\n", "zzz"], "gold": 0})
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "mine.yaml").write_text(TASK.format(folder=tmp_path))
    assert export.main([f"--workdir={run / 'run'}", f"--out={tmp_path / 'hf'}"]) == 0
    line = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", "mine", "--log_samples"]
    line += ["--model_args", f"pretrained={tmp_path / 'hf'},dtype=float32", "--include_path", str(tmp_path)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(
        [*line, "--output_path", str(tmp_path / "out")],
        check=True, capture_output=True, env={**os.environ, **offline}, cwd=tmp_path,
    )  # fmt: skip
    (path,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = saved.load(str(run / "run"), log=lambda text: None)
    for sample in map(json.loads, path.read_text().splitlines()):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        item = items[sample["doc_id"]]
        ours = [likelihood(found, item["query"], choice) for choice in item["choices"]]
        np.testing.assert_allclose(theirs, ours, rtol=1e-4)  # printed and computed in float32
