"""Exported models are the same functions in transformers, and come back bit for bit."""

import functools
import json
import os
import re
import subprocess
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from helpers import lm_runs
from steppe.configs.keys import ConfigError
from steppe.data import cache
from steppe.data.loader import open_corpus
from steppe.lm.hub import export, families, load
from steppe.lm.keep.exits import STORAGE, Unusable
from steppe.lm.keep.saved import Unread
from steppe.lm.model import parameters
from steppe.lm.model.objective import readout_kernel
from steppe.lm.parts.assembly import assemble
from steppe.lm.parts.state import create
from steppe.lm.run import train
from steppe.scripts.model import export as export_script

pytest.importorskip("safetensors", reason="steppe[hub] is not installed")

MODELS = {
    "nanodo": {},
    "nanodo, untied": {"tie_embeddings": False},
    "modern": {"style": "modern", "rope_base": 500.0},
    "modern, untied, grouped": {"style": "modern", "tie_embeddings": False, "heads": 4, "kv_heads": 2},
    "modern, mup": {"style": "modern", "parametrisation": "mup", "base_width": 8},
    "modern, wide heads": {"style": "modern", "head_width": 6},
    "qk_norm, grouped, wide heads": {
        "style": "modern", "qk_norm": True, "heads": 4, "kv_heads": 1, "head_width": 10, "norm_epsilon": 1e-5
    },
}  # fmt: skip

SOME = ("nanodo", "modern, untied, grouped", "modern, mup", "qk_norm, grouped, wide heads")  # all: pytest -m exhaustive
EACH = [pytest.param(name, marks=[] if name in SOME else pytest.mark.exhaustive) for name in MODELS]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return lm_runs.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def made(text):
    """made(*model) -> (parts, params, a run read from those params), every parameter far from its initial value."""
    return functools.cache(lambda *model: _made(text, dict(model)))


def _made(text, model):
    config = lm_runs.config(*text, **{f"model__{key}": value for key, value in model.items()})
    corpus = open_corpus(cache.ensure(config.data, log=lambda line: None))
    parts = assemble(config, corpus.tokenizer.vocab_size, corpus.epoch_tokens, devices=jax.devices()[:1])
    params = create(parts.mesh, parts.initialise).params
    noise = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * noise.standard_normal(leaf.shape, np.float32), params)
    arrays = {parameters.name_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shapes = {path: array.shape for path, array in arrays.items()}
    return parts, params, Unread(text[0], config, corpus, 20, shapes, lambda paths: {p: arrays[p] for p in paths})


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """(config, workdir) of a run of four steps."""
    config, place = (
        lm_runs.config(*text, model__style="modern", train__duration="4 steps", optim__warmup="1 steps"),
        tmp_path_factory.mktemp("run"),
    )
    assert lm_runs.run(config, place) == train.FINISHED
    return config, place


@pytest.mark.parametrize("name", EACH)
def test_transformers_computes_the_same_logits_and_the_same_continuation(text, made, tmp_path, name):
    torch = pytest.importorskip("torch", reason="steppe[hub] is not installed")
    transformers = pytest.importorskip("transformers", reason="steppe[hub] is not installed")
    parts, params, run = made(*MODELS[name].items())
    export.export(run, str(tmp_path / "hf"), log=lambda line: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(model).__name__ == families.of_config(run.config).architecture
    vocabulary = run.corpus.tokenizer.vocab_size
    ids = np.random.default_rng(1).integers(0, vocabulary, (3, 16))

    @jax.jit
    def logits(params, ids):
        return parts.objective.trunk(params, {"inputs": ids}) @ readout_kernel(params, parts.shape).T

    ours = np.asarray(logits(params, ids))[..., :vocabulary]
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    assert theirs.shape == ours.shape
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())  # sums of float32 in another order

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer("import é", return_tensors="pt")
    assert prompt.input_ids[0].tolist() == [0, *run.corpus.tokenizer.encode("import é")]
    said = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0]
    said = said.numpy()[None]
    window = np.pad(said, ((0, 2), (0, 16 - said.shape[1])))
    ours = np.asarray(logits(params, window))[0, :, :vocabulary]
    start = prompt.input_ids.shape[1]
    assert said[0, start:].tolist() == ours.argmax(-1)[start - 1 : said.shape[1] - 1].tolist()


@pytest.mark.parametrize("name", EACH)
def test_a_model_comes_back_bit_for_bit(text, made, tmp_path, name, monkeypatch):
    parts, params, run = made(*MODELS[name].items())
    monkeypatch.setattr(export, "MOST", 20_000)  # bytes: several files
    export.export(run, str(tmp_path / "hf"), log=lambda line: None)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    config = run.config.copy_and_resolve_references().unlock()
    config.init_from = str(tmp_path / "hf")
    back = load.initial_params(config, parts, log=lambda line: None)
    used = run.corpus.tokenizer.vocab_size
    for (path, leaf), given in zip(jax.tree_util.tree_leaves_with_path(back), jax.tree.leaves(params), strict=True):
        rows = slice(used) if parameters.name_of(path) in ("embed/embedding", "readout/kernel") else slice(None)
        assert np.asarray(leaf)[rows].tobytes() == np.asarray(given)[rows].tobytes(), path
        assert leaf.sharding == given.sharding


def test_what_no_family_expresses_is_refused_by_key(text, tmp_path):
    for model, key in (({"logit_soft_cap": 5.0}, "logit_soft_cap"), ({"qk_norm": True}, "qk_norm"),
                       ({"head_width": 6}, "head_width")):  # fmt: skip
        config = lm_runs.config(*text, **{f"model__{name}": value for name, value in model.items()})
        with pytest.raises(ConfigError, match=rf"^config\.model\.{key} = "):
            families.of_config(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "must be one of LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': must be 'silu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type = 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn'"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config = .*: quantised weights are"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
        ({"sliding_window": 128}, "sliding_window = 128: is not a key that Steppe knows"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier = 12.0: is not a key that Steppe knows"),
    ],
)
def test_a_model_that_is_not_ours_is_refused_by_key(text, made, tmp_path, change, said):
    _, _, run = made(*MODELS["modern"].items())
    family = families.of_config(run.config)
    found = {**families.theirs(family, run.config, 259, {"bos_token_id": 0}), **change}
    with pytest.raises(Unusable, match=said):
        families.ours(families.of_theirs(found, "HF"), found, "HF")


def test_a_directory_that_does_not_fit_is_refused_by_key(text, made, tmp_path):
    parts, _, run = made(*MODELS["nanodo"].items())
    export.export(run, str(tmp_path / "hf"), log=lambda line: None)
    config = run.config.copy_and_resolve_references().unlock()
    config.init_from = str(tmp_path / "hf")

    def refusal(error):
        return pytest.raises(error, match=r"^[^\n]*$")

    changed = config.copy_and_resolve_references()
    changed.model.mlp_width = 64
    with refusal(ConfigError) as caught:
        load.initial_params(changed, parts)
    assert "config.model.mlp_width = 64: must be 32" in str(caught.value)
    # more positions than it was trained with, biases, a cut file, nothing that can be read
    longer = lm_runs.config(*text, data__sequence_length=32)
    longer_parts = assemble(longer, 259, 10_000, devices=jax.devices()[:1])
    with refusal(ConfigError) as caught:
        load.initial_params(config, longer_parts)
    assert "config.data.sequence_length = 32: must be at most 16" in str(caught.value)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    save_file({**tensors, "transformer.h.1.mlp.c_fc.bias": np.ones(32, np.float32)}, tmp_path / "hf/model.safetensors")
    with refusal(Unusable) as caught:
        load.initial_params(config, parts)
    assert "transformer.h.1.mlp.c_fc.bias: must be zero" in str(caught.value)
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"short")
    with refusal(Unusable) as caught:
        load.initial_params(config, parts)
    assert "its weights cannot be read" in str(caught.value)


def _quantised(tensors):
    halves = {name: array.astype(np.float16) for name, array in tensors.items() if "proj" not in name}
    for name in tensors.keys() - halves.keys():
        scale = np.abs(tensors[name]).max(axis=1)
        halves[name] = np.round(tensors[name] / scale[:, None] * 127).astype(np.int8)
        halves[name.replace("weight", "SCB")] = scale
    return halves


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_quantised, "_proj.weight is I8: must be one of F64"),
        (lambda t: {**t, f"{Q}.bias": np.ones(16, np.float32)}, f"no parameter matches tensor {Q}.bias"),
        (lambda t: {**t, f"{Q}.SCB": np.ones(16, np.float32)}, f"no parameter matches tensor {Q}.SCB"),
        (lambda t: {**t, "model.layers.2.mlp.up_proj.weight": np.ones(3, np.float32)}, "model.layers.2.mlp.up_proj"),
        (
            lambda t: {n.replace("q_proj.w", "q_proj.base_layer.w"): a for n, a in t.items()},
            f"has no tensor {Q}.weight",
        ),
        (
            lambda t: {**t, "model.norm.weight": np.full(16, np.nan, np.float32)},
            "model.norm.weight has values that are",
        ),
        (
            lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1},
            "lm_head.weight differs from model.emb",
        ),
    ],
)
def test_a_tensor_that_has_no_place_is_refused_by_name(text, made, tmp_path, change, said):
    from safetensors.numpy import load_file, save_file

    parts, _, run = made(*MODELS["modern"].items())
    export.export(run, str(tmp_path / "hf"), log=lambda line: None)
    config = run.config.copy_and_resolve_references().unlock()
    config.init_from = str(tmp_path / "hf")
    tensors, file = load_file(tmp_path / "hf" / "model.safetensors"), tmp_path / "hf" / "model.safetensors"
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file({**tensors, **buffers, "lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
    load.initial_params(config, parts, log=lambda line: None)  # what is computed or tied is known
    save_file(change(tensors), file)
    with pytest.raises(Unusable, match=rf"^[^\n]*{re.escape(said)}[^\n]*$"):
        load.initial_params(config, parts)


def test_a_vocabulary_that_is_not_the_models_is_refused(text, made, tmp_path):
    from steppe.data.vocabulary import train_sentencepiece

    parts, _, run = made(*MODELS["modern"].items())
    export.export(run, str(tmp_path / "hf"), log=lambda line: None)
    config = run.config.copy_and_resolve_references().unlock()
    config.init_from = str(tmp_path / "hf")
    config.data.vocabulary = str(tmp_path / "hf" / "tokenizer.json")  # the export's own
    load.initial_params(config, parts, log=lambda line: None)
    place = tmp_path / "hf" / "config.json"
    found = json.loads(place.read_text())
    assert found[families.VOCABULARY][0] == "bytes"
    train_sentencepiece([Path(text[0], "train.txt").read_text()], str(tmp_path / "other.model"), 400)
    (tmp_path / "other.model").rename(tmp_path / "hf" / "other.model")
    for kept in (found[families.VOCABULARY], None):  # as we write it, and as others do
        place.write_text(json.dumps({**found, families.VOCABULARY: kept}))
        config.data.vocabulary = "bytes"
        load.initial_params(config, parts, log=lambda line: None)
        config.data.vocabulary = str(tmp_path / "hf" / "other.model")
        with pytest.raises(ConfigError, match=r"^config\.data\.vocabulary = .*must be the vocabulary of "):
            load.initial_params(config, parts)


def _eight_bits(tensors):
    """As compressed-tensors writes them."""
    made = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    for name in (name for name in tensors if "proj" in name):
        scale = np.abs(tensors[name]).max() / 448
        made[name] = (tensors[name] / scale).astype(ml_dtypes.float8_e4m3fn)
        made[f"{name}_scale"] = np.array([scale], np.float32)
    return made


FLOAT8 = {"quant_method": "compressed-tensors", "format": "float-quantized"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}


@pytest.mark.parametrize(
    ("change", "said", "without"),
    [(_quantised, INT8, "_proj.weight is I8: must be one of F64"),
     (_eight_bits, FLOAT8, "_proj.weight is F8_E4M3: must be one of F64")],
)  # fmt: skip
def test_quantised_directories_are_refused_with_and_without_their_key(text, made, tmp_path, change, said, without):
    from safetensors.numpy import load_file, save_file

    parts, _, run = made(*MODELS["modern"].items())
    export.export(run, str(tmp_path / "hf"), log=lambda line: None)
    config = run.config.copy_and_resolve_references().unlock()
    config.init_from = str(tmp_path / "hf")
    weights, place = tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "config.json"
    save_file(change(load_file(weights)), weights)
    with pytest.raises(Unusable, match=rf"^[^\n]*{re.escape(without)}[^\n]*$"):
        load.initial_params(config, parts)
    place.write_text(json.dumps({**json.loads(place.read_text()), "quantization_config": said}))
    with pytest.raises(Unusable, match=r"^[^\n]*quantization_config = .*: quantised weights are refused[^\n]*$"):
        load.initial_params(config, parts)


def test_half_precision_and_a_snapshot_of_links_are_read_for_what_they_are(text, made, tmp_path):
    """bfloat16 bit for bit, and equal logits in transformers; links as the hub's cache has them."""
    torch = pytest.importorskip("torch", reason="steppe[hub] is not installed")
    transformers = pytest.importorskip("transformers", reason="steppe[hub] is not installed")
    from safetensors.numpy import load_file, save_file

    parts, _, run = made(*MODELS["modern"].items())
    export.export(run, str(tmp_path / "hf"), log=lambda line: None)
    weights, place = tmp_path / "hf" / "model.safetensors", tmp_path / "hf" / "config.json"
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    place.write_text(json.dumps({**json.loads(place.read_text()), "dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(sorted((tmp_path / "hf").iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{number}")
    config = run.config.copy_and_resolve_references().unlock()
    config.init_from = str(tmp_path / "snapshot")
    params = load.initial_params(config, parts, log=lambda line: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "snapshot", dtype=torch.float32)
    embedding = np.asarray(params["embed"]["embedding"])[: run.corpus.tokenizer.vocab_size]
    np.testing.assert_array_equal(embedding, halves["model.embed_tokens.weight"].astype(np.float32))
    ids = np.random.default_rng(1).integers(0, run.corpus.tokenizer.vocab_size, (3, 16))
    hidden = jax.jit(parts.objective.trunk)(params, {"inputs": ids})
    ours = np.asarray(hidden @ readout_kernel(params, parts.shape).T)[..., : run.corpus.tokenizer.vocab_size]
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())


def test_the_card_has_the_numbers_of_the_run_and_its_code_runs(trained, tmp_path, capsys):
    assert export_script.main([f"--workdir={trained[1]}", f"--out={tmp_path / 'hf'}"]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    lines = [json.loads(line) for line in (Path(trained[1]) / "metrics.jsonl").read_text().splitlines()]
    of = {kind: [line for line in lines if line["kind"] == kind][-1] for kind in ("run", "train", "evaluate")}
    about, found = of["run"], of["evaluate"]
    cells = dict(re.findall(r"^\| ([^|]*?) \| (.*?) \|", card, re.MULTILINE))
    assert cells["tokens"] == f"{of['train']['tokens']:,}"
    assert cells["compute"] == f"{about['flops_per_step'] * of['train']['step']:.3g} FLOPs"
    assert cells[f"held-out {found['name']}"] == f"{found['loss']:.4f} nats a token"
    assert f"{found['bits_per_byte']:.4f} bits a byte, unigram " in card
    assert f"language model of {about['parameters']['total']:,} parameters" in card
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("PATH", str(tmp_path / "hf")))
    assert capsys.readouterr().out.strip()


def test_an_interrupted_export_leaves_nothing(text, made, tmp_path):
    _, _, run = made(*MODELS["nanodo"].items())

    def broken(paths):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        export.export(run._replace(read=broken), str(tmp_path / "hf"), log=lambda line: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line_and_leaves_nothing(trained, tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        status = export_script.main([f"--workdir={trained[1]}", f"--out={tmp_path / 'disk' / 'hf'}"])
        said = capsys.readouterr().err
        assert (status, said.count("\n")) == (STORAGE, 1), said
        assert "No space left" in said
        assert not list((tmp_path / "disk").iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_config_from_hf_reads_as_the_run(text, made, tmp_path, capsys):
    from steppe.configs.read import read_config
    from steppe.scripts import config

    _, _, run = made(*MODELS["qk_norm, grouped, wide heads"].items())
    export.export(run, str(tmp_path / "hf"), log=lambda line: None)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["head_dim"] == 10
    assert config.main(["from-hf", str(tmp_path / "hf"), f"--out={tmp_path / 'mine.py'}"]) == 0
    read = read_config(str(tmp_path / "mine.py"))
    same = ("layers", "width", "heads", "kv_heads", "head_width", "mlp_width", "qk_norm", "style", "norm_epsilon")
    assert {name: read.model[name] for name in same} == {name: run.config.model[name] for name in same}
    assert (read.init_from, read.data.vocabulary) == (str(tmp_path / "hf"), str(tmp_path / "hf" / "tokenizer.json"))
    assert config.main(["from-hf", str(tmp_path)]) == 2
    assert "must be the config of a Hugging Face model" in capsys.readouterr().err
