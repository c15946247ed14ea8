"""How equal exported models are to their runs, over families and vocabularies; prints the tables of lm/README.md.

    cd tests && python -m parity.exported

They are called as users call them. Oracles: transformers, tokenizers, lm-eval.
"""

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from parity import test_tokenizers
from parity.test_tokenizers import LLAMA, pieces, ranks

from helpers import lm_runs
from steppe.data import cache
from steppe.data.loader import Corpus, open_corpus
from steppe.lm.hub import export
from steppe.lm.keep.saved import Unread
from steppe.lm.measure import choices
from steppe.lm.model import parameters
from steppe.lm.model.objective import readout_kernel
from steppe.lm.parts.assembly import assemble
from steppe.lm.parts.state import create
from steppe.lm.run.generate import generate, make_decoder

FAMILIES = {
    "gpt2": {"style": "nanodo"},
    "llama": {"style": "modern", "tie_embeddings": False, "heads": 4, "kv_heads": 2},
    "qwen3": {"style": "modern", "qk_norm": True},
}
VOCABULARIES = {
    "bytes": lambda folder: "bytes",
    "SentencePiece BPE": lambda folder: pieces(folder, **LLAMA),  # with a beginning and a dummy prefix
    "SentencePiece unigram": lambda folder: pieces(folder, model_type="unigram"),
    "tokenizer.json": test_tokenizers.VOCABULARIES["byte-level bpe"],
    "tiktoken": lambda folder: ranks(folder, [b"he", b"ll", b"or", b"as", b"ass", b"lass", b"cl", b"th"]),
}
T, MADE = 24, 6  # positions, tokens of a continuation
PROMPTS = ["import os", "a", "def f(x):"]
ITEMS = [
    {"query": "import", "choices": [" os", " re"], "gold": 0},
    {"query": "def f(x):\n    ", "choices": ["return x", "pass"], "gold": 0},
    {"query": "", "choices": ["for", "while"], "gold": 1},
    {"query": "for x in the cl", "choices": ["ass", "oud", "ean"], "gold": 1},  # may merge with the query
    {"query": "    self.ret", "choices": ["urn x", "ry x"], "gold": 1},
]
TEXTS = ["import os", "return x  # y", "a</s>b"]


class Figures(NamedTuple):
    """Where an export and its run differ.

    logits: as a share of the largest. greedy: tokens, of `tokens`, without a mask, through a pipeline and by our own
    sampling. ids: difficult texts, of `texts`, whose ids differ for a known reason; export refuses others. merged:
    choices whose first token begins in the query. choices, rolling: log-likelihoods, relative.
    """

    logits: float
    greedy: int
    tokens: int
    ids: int
    texts: int
    merged: int
    choices: float
    rolling: float


def corpus_of(vocabulary: str, place: Path) -> tuple:
    """(config, corpus) of a text under a vocabulary."""
    spec = VOCABULARIES[vocabulary](place)
    config = lm_runs.config(*lm_runs.write_text(place), data__vocabulary=spec, data__sequence_length=T)
    return config, open_corpus(cache.ensure(config.data, log=lambda line: None))


def measure(family: str, base, text: Corpus, place: Path) -> Figures:
    """Exports a model, every parameter far from its initial value, to `place`, and compares."""
    tokenizer, config = text.tokenizer, base.copy_and_resolve_references().unlock()
    config.model.update(FAMILIES[family])
    parts = assemble(config, tokenizer.vocab_size, text.epoch_tokens, devices=jax.devices()[:1])
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * noise.standard_normal(leaf.shape, np.float32),
        create(parts.mesh, parts.initialise).params,
    )
    arrays = {parameters.name_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shapes = {path: array.shape for path, array in arrays.items()}
    lines = []
    run = Unread(base.data.cache, config, text, 20, shapes, lambda paths: {path: arrays[path] for path in paths})
    export.export(run, str(place), log=lines.append)
    same, texts = re.search(r"run's on ([\d,]+) of ([\d,]+) difficult texts", "\n".join(lines)).groups()
    texts, same = (int(number.replace(",", "")) for number in (texts, same))
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    theirs = transformers.AutoTokenizer.from_pretrained(place)

    @jax.jit
    def logits(params, ids):
        hidden = parts.objective.trunk(params, {"inputs": ids})
        return (hidden @ readout_kernel(params, parts.shape).T)[..., : tokenizer.vocab_size]

    def their_logits(ids):
        with torch.no_grad():
            return model(torch.tensor(ids)).logits.numpy()

    ids = np.random.default_rng(1).integers(0, tokenizer.vocab_size, (4, T))
    ours = np.asarray(logits(params, ids))
    error = np.abs(their_logits(ids) - ours).max() / np.abs(ours).max()

    # alone and without a mask; then together, padded, through a pipeline; then by our own sampling
    said, differing = {}, 0
    for prompt in PROMPTS:
        given = [tokenizer.begin_id, *tokenizer.encode(prompt)]
        said[prompt] = model.generate(torch.tensor([given]), max_new_tokens=MADE, do_sample=False)[0].tolist()
        assert said[prompt][: len(given)] == given
        window = np.zeros((4, T), np.int32)
        window[0, : len(said[prompt])] = said[prompt]
        wanted = np.asarray(logits(params, window))[0].argmax(-1)[len(given) - 1 : len(said[prompt]) - 1]
        differing += int((wanted != said[prompt][len(given) :]).sum())
    if theirs.pad_token is None:  # one control token, which begins and ends
        theirs.pad_token = theirs.eos_token
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=theirs, batch_size=len(PROMPTS))
    rows = pipe(PROMPTS, max_new_tokens=MADE, do_sample=False, return_tensors=True)
    decoder = make_decoder(parts.shape, tokenizer.vocab_size, parts.mesh)
    sampled = generate(decoder, params, tokenizer, PROMPTS, tokens=MADE, temperature=0.0, seed=0)
    for prompt, (row,), found in zip(PROMPTS, rows, sampled, strict=True):
        made = row["generated_token_ids"]
        padding = len(made) - MADE - len(tokenizer.encode(prompt)) - 1
        assert set(made[:padding]) <= {theirs.pad_token_id}
        differing += sum(a != b for a, b in zip(made[padding:], said[prompt], strict=False))
        differing += MADE * (found != tokenizer.decode(said[prompt]))

    # choices: transformers' probabilities of the tokens that reach into them, and lm-eval's where none begins before
    made = choices.rows([choices._item(item) for item in ITEMS], tokenizer, T)
    batch = {name: jnp.asarray(getattr(made, name)) for name in ("inputs", "targets", "weights")}
    scores = np.asarray(choices.make_scores(parts)(params, batch))
    lm = HFLM(pretrained=str(place), device="cpu", dtype="float32", batch_size=4)
    pairs = [(item["query"], choice) for item in ITEMS for choice in item["choices"]]
    merged, worst = 0, 0.0
    for number, (query, choice) in enumerate(pairs):
        encoded = theirs.backend_tokenizer.encode(query + choice, add_special_tokens=False)
        ends = [end for _, end in encoded.offsets]
        first = sum(end <= len(query.rstrip()) for end in ends)
        wanted = float(_log_p(their_logits, [tokenizer.begin_id, *encoded.ids])[first:].sum())
        worst = max(worst, abs(scores[number] / wanted - 1))
        if first and encoded.offsets[first][0] < len(query.rstrip()):
            merged += 1  # lm-eval leaves that token out
        else:
            ((found, _),) = lm.loglikelihood([_request("loglikelihood", query, choice)], disable_tqdm=True)
            worst = max(worst, abs(scores[number] / found - 1))
    plain = HFLM(pretrained=str(place), device="cpu", dtype="float32", batch_size=4, add_bos_token=False)
    rolled = np.array(plain.loglikelihood_rolling([_request("loglikelihood_rolling", t) for t in TEXTS]))
    encoded = [[tokenizer.begin_id, *tokenizer.encode(text)] for text in TEXTS]
    wanted = [float(_log_p(lambda ids: np.asarray(logits(params, ids)), ids, T).sum()) for ids in encoded]
    rolling = np.abs(rolled / wanted - 1).max()
    doubled = np.array(lm.loglikelihood_rolling([_request("loglikelihood_rolling", t) for t in TEXTS]))
    assert (np.abs(doubled / wanted - 1) > 1e-3).all(), "lm-eval no longer puts a beginning before the tokenizer's"
    for name in ("config.json", "generation_config.json"):
        written = json.loads((place / name).read_text())
        assert [written["bos_token_id"], written["eos_token_id"]] == [theirs.bos_token_id, theirs.eos_token_id]
        assert written["pad_token_id"] not in (tokenizer.begin_id, tokenizer.eos_id)
    return Figures(
        float(error), differing, 3 * MADE * len(PROMPTS), texts - same, texts, merged, float(worst), float(rolling)
    )


def _request(kind: str, *arguments: str) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def _log_p(logits, ids: list[int], length: int = 0) -> np.ndarray:
    """Log-probabilities of ids[1:], each after those before it. length: of the window, 0 for as long as needed."""
    window = np.zeros((4 if length else 1, length or len(ids) - 1), np.int64)
    window[0, : len(ids) - 1] = ids[:-1]
    found = np.asarray(jax.nn.log_softmax(jnp.asarray(logits(window)[0, : len(ids) - 1])))
    return found[np.arange(len(ids) - 1), ids[1:]]


def main() -> int:
    """Prints a row a family and vocabulary, then a row a vocabulary."""
    shown = ("logits", "greedy tokens", "ids", "choices", "rolling")
    print("| family | vocabulary |", " | ".join(shown), "|")
    print("|---" * (2 + len(shown)) + "|")
    for vocabulary in VOCABULARIES:
        with tempfile.TemporaryDirectory() as folder:
            config, text = corpus_of(vocabulary, Path(folder))
            for family in FAMILIES:
                found = measure(family, config, text, Path(folder) / family)
                row = [family, vocabulary, f"{found.logits:.1e}", f"{found.greedy} of {found.tokens}"]
                row += [f"{found.ids:,} of {found.texts:,}", f"{found.choices:.1e}", f"{found.rolling:.1e}"]
                print("|", " | ".join(row), "|", flush=True)
    print("\n| vocabulary | texts | other ids: as likely | normalised otherwise | a control string | unknown |")
    print("|---" * 6 + "|")
    for vocabulary, made in test_tokenizers.VOCABULARIES.items():
        with tempfile.TemporaryDirectory() as folder:
            found, _ = test_tokenizers.compared(Path(folder), *test_tokenizers.export(Path(folder), made(Path(folder))))
            counts = (found.texts, found.ties, found.normal, found.control, len(found.other))
            print(f"| {vocabulary} |", " | ".join(f"{count:,}" for count in counts), "|", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
