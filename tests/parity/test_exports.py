"""Exported models beside their runs, over families and vocabularies, called as users call them.

Logits, greedy continuations without a mask, batched and padded through a pipeline, lm-eval's likelihoods of choices.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import lm_runs
from steppe.data import cache
from steppe.data.loader import open_corpus
from steppe.lm.hub import export
from steppe.lm.keep.saved import Unread
from steppe.lm.measure import choices
from steppe.lm.model import parameters
from steppe.lm.model.objective import readout_kernel
from steppe.lm.run.assembly import assemble
from steppe.lm.run.generate import generate, make_decoder
from steppe.lm.run.state import create

torch = pytest.importorskip("torch", reason="steppe[hub] is not installed")
transformers = pytest.importorskip("transformers", reason="steppe[hub] is not installed")
from parity.test_tokenizers import LLAMA, pieces, ranks  # noqa: E402

FAMILIES = {
    "gpt2": {"style": "nanodo"},
    "llama": {"style": "modern", "tie_embeddings": False, "heads": 4, "kv_heads": 2},
    "qwen3": {"style": "modern", "qk_norm": True},
}
VOCABULARIES = {
    "bytes": lambda folder: "bytes",
    "bpe": lambda folder: pieces(folder, **LLAMA),  # with a beginning and a dummy prefix
    "unigram": lambda folder: pieces(folder, model_type="unigram"),
    "tiktoken": lambda folder: ranks(folder, [b"he", b"ll", b"or", b"as", b"ass", b"lass", b"cl", b"th"]),
}
T = 24
PROMPTS = ["import os", "a", "def f(x):"]
ITEMS = [
    {"query": "import", "choices": [" os", " re"], "gold": 0},
    {"query": "def f(x):\n    ", "choices": ["return x", "pass"], "gold": 0},
    {"query": "", "choices": ["for", "while"], "gold": 1},
    {"query": "for x in the cl", "choices": ["ass", "oud"], "gold": 1},  # merges into the query's last token
]


@pytest.fixture(scope="module", params=VOCABULARIES)
def corpus(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("text")
    spec = VOCABULARIES[request.param](place)
    config = lm_runs.config(*lm_runs.write_text(place), data__vocabulary=spec, data__sequence_length=T)
    return request.param, config, open_corpus(cache.ensure(config.data, log=lambda line: None))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_the_run_called_as_users_call_it(corpus, tmp_path, family):
    vocabulary, base, text = corpus
    tokenizer = text.tokenizer
    config = base.copy_and_resolve_references().unlock()
    config.model.update(FAMILIES[family])
    parts = assemble(config, tokenizer.vocab_size, text.epoch_tokens, devices=jax.devices()[:1])
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * noise.standard_normal(leaf.shape, np.float32),
        create(parts.mesh, parts.initialise).params,
    )
    arrays = {parameters.name_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shapes = {path: array.shape for path, array in arrays.items()}
    run = Unread(base.data.cache, config, text, 20, shapes, lambda paths: {path: arrays[path] for path in paths})
    lines = []
    export.export(run, str(tmp_path / "hf"), log=lines.append)
    assert any(" hostile texts" in line for line in lines)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")

    @jax.jit
    def logits(params, ids):
        hidden = parts.objective.trunk(params, {"inputs": ids})
        return (hidden @ readout_kernel(params, parts.shape).T)[..., : tokenizer.vocab_size]

    # logits, also where every id occurs
    ids = np.random.default_rng(1).integers(0, tokenizer.vocab_size, (4, T))
    ours = np.asarray(logits(params, ids))
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(ids)).logits.numpy(), ours, atol=1e-5 * np.abs(ours).max())

    def is_argmax(row, prompt):
        start = 1 + len(tokenizer.encode(prompt))
        assert row[:start] == [tokenizer.begin_id, *tokenizer.encode(prompt)]
        window = np.zeros((4, T), np.int32)
        window[0, : len(row)] = row
        assert row[start:] == np.asarray(logits(params, window))[0].argmax(-1)[start - 1 : len(row) - 1].tolist()

    # alone and without a mask; then together, padded, through a pipeline
    said = {}
    for prompt in PROMPTS:
        given = torch.tensor([[tokenizer.begin_id, *tokenizer.encode(prompt)]])
        said[prompt] = model.generate(given, max_new_tokens=6, do_sample=False)[0].tolist()
        is_argmax(said[prompt], prompt)
    if theirs.pad_token is None:
        assert vocabulary == "tiktoken"  # one control token, which begins and ends
        theirs.pad_token = theirs.eos_token
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=theirs, batch_size=len(PROMPTS))
    rows = pipe(PROMPTS, max_new_tokens=6, do_sample=False, return_tensors=True)
    for prompt, (row,) in zip(PROMPTS, rows, strict=True):
        made = row["generated_token_ids"]
        at = len(made) - 6 - len(tokenizer.encode(prompt)) - 1  # of padding
        assert set(made[:at]) <= {theirs.pad_token_id}
        assert made[at:][: len(said[prompt])] == said[prompt]
    decoder = make_decoder(parts.shape, tokenizer.vocab_size, parts.mesh)
    texts = generate(decoder, params, tokenizer, PROMPTS, tokens=6, temperature=0.0, seed=0)
    for prompt, found in zip(PROMPTS, texts, strict=True):
        assert found == tokenizer.decode(said[prompt])
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "hf" / name).read_text())
        assert [written["bos_token_id"], written["eos_token_id"]] == [theirs.bos_token_id, theirs.eos_token_id]
        assert written["pad_token_id"] not in (tokenizer.begin_id, tokenizer.eos_id)

    # likelihoods of choices
    items = [choices._item(item) for item in ITEMS]
    made = choices.rows(items, tokenizer, T)
    batch = {name: jnp.asarray(getattr(made, name)) for name in ("inputs", "targets", "weights")}
    scores = np.asarray(choices.make_scores(parts)(params, batch))
    pairs = [(item.query, choice) for item in items for choice in item.choices]
    lm_eval = pytest.importorskip("lm_eval.models.huggingface", reason="steppe[hub] is not installed")
    from lm_eval.api.instance import Instance

    lm = lm_eval.HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=4)
    merged = 0
    for number, (query, choice) in enumerate(pairs):
        whole = [tokenizer.begin_id, *tokenizer.encode(query + choice)]
        before = tokenizer.encode(query.rstrip())
        log_p = np.asarray(jax.nn.log_softmax(logits(params, _padded(whole))[0]))
        each = [float(log_p[at, whole[at + 1]]) for at in range(len(whole) - 1)]
        counted = int((made.weights[number] > 0).sum())
        assert scores[number] == pytest.approx(sum(each[len(each) - counted :]), rel=1e-4)
        assert np.isfinite(scores[number])
        assert scores[number] < 0
        if whole[1 : len(before) + 1] == before:  # nothing merges: lm-eval's number
            request = Instance(request_type="loglikelihood", doc={}, arguments=(query, choice), idx=0)
            ((found, _),) = lm.loglikelihood([request], disable_tqdm=True)
            assert scores[number] == pytest.approx(found, rel=1e-4)  # sums of float32
        else:  # lm-eval leaves out the token that reaches into the choice, we do not
            merged += 1
            assert len(tokenizer.decode(whole[len(whole) - counted :])) > len(choice)
    assert merged or vocabulary != "tiktoken"


def _padded(ids):
    window = np.zeros((4, T), np.int32)
    window[0, : len(ids) - 1] = ids[:-1]
    return window
