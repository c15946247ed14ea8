"""Families of Hugging Face models that equal ours exactly, with names for parameters and config keys.

modern is Llama, modern with qk_norm is Qwen3, nanodo is GPT-2 with biases of zero. Nothing is permuted, because both
sides' RoPE pairs the halves of a head. The parameter table (lm/model/parameters.py) has the axes a kernel sums over.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, TypedDict

import numpy as np
from ml_collections import ConfigDict

from steppe.configs.keys import ConfigError
from steppe.data import files, stored
from steppe.lm.keep.exits import Unusable
from steppe.lm.model import parameters

LAST_NORM = "final_norm/scale"  # before the readout


class Family(NamedTuple):
    """names: {theirs: our paths}, with {} for the layer; several paths if theirs joins kernels along their outputs.

    linear: whether kernels are [out, in], as in torch's Linear, instead of [in, out]. keys: {our key: theirs}. fixed:
    {their key: the value it must have}; written, and absent keys count as having it. zeros: biases, which we lack.
    """

    kind: str
    architecture: str
    style: str
    qk_norm: bool
    linear: bool
    names: Mapping[str, tuple[str, ...]]
    keys: Mapping[str, str]
    fixed: Mapping[str, Any]
    zeros: Collection[str] = ()


def bias_of(name: str) -> str:
    """Their name of the bias next to their weight `name`."""
    return name.removesuffix("weight") + "bias"


_LLAMA = {
    "model.embed_tokens.weight": ("embed/embedding",),
    "model.norm.weight": (LAST_NORM,),
    "lm_head.weight": ("readout/kernel",),
    "model.layers.{}.input_layernorm.weight": ("layers/attention_norm/scale",),
    "model.layers.{}.post_attention_layernorm.weight": ("layers/mlp_norm/scale",),
    **{
        f"model.layers.{{}}.self_attn.{name[0]}_proj.weight": (f"layers/attention/{name}/kernel",)
        for name in ("query", "key", "value", "out")
    },
    **{f"model.layers.{{}}.mlp.{name}_proj.weight": (f"layers/mlp/{name}/kernel",) for name in ("gate", "up", "down")},
}
_LLAMA_KEYS = {
    "model.layers": "num_hidden_layers",
    "model.width": "hidden_size",
    "model.heads": "num_attention_heads",
    "model.kv_heads": "num_key_value_heads",
    "model.head_width": "head_dim",
    "model.mlp_width": "intermediate_size",
    "model.norm_epsilon": "rms_norm_eps",
    "model.rope_base": "rope_theta",
    "model.tie_embeddings": "tie_word_embeddings",
    "data.sequence_length": "max_position_embeddings",
}
_LLAMA_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}

_GPT2 = {
    "transformer.wte.weight": ("embed/embedding",),
    "transformer.wpe.weight": ("position/embedding",),
    "transformer.ln_f.weight": (LAST_NORM,),
    "lm_head.weight": ("readout/kernel",),
    "transformer.h.{}.ln_1.weight": ("layers/attention_norm/scale",),
    "transformer.h.{}.ln_2.weight": ("layers/mlp_norm/scale",),
    "transformer.h.{}.attn.c_attn.weight": tuple(
        f"layers/attention/{name}/kernel" for name in ("query", "key", "value")
    ),
    "transformer.h.{}.attn.c_proj.weight": ("layers/attention/out/kernel",),
    "transformer.h.{}.mlp.c_fc.weight": ("layers/mlp/up/kernel",),
    "transformer.h.{}.mlp.c_proj.weight": ("layers/mlp/down/kernel",),
}
FAMILIES = (
    Family("llama", "LlamaForCausalLM", "modern", False, True, _LLAMA, _LLAMA_KEYS, _LLAMA_FIXED),
    Family(
        "qwen3", "Qwen3ForCausalLM", "modern", True, True,
        {
            **_LLAMA,
            "model.layers.{}.self_attn.q_norm.weight": ("layers/attention/query_norm/scale",),
            "model.layers.{}.self_attn.k_norm.weight": ("layers/attention/key_norm/scale",),
        },
        _LLAMA_KEYS,
        {**_LLAMA_FIXED, "use_sliding_window": False},
    ),
    Family(
        "gpt2", "GPT2LMHeadModel", "nanodo", False, False, _GPT2,
        {
            "model.layers": "n_layer",
            "model.width": "n_embd",
            "model.heads": "n_head",
            "model.mlp_width": "n_inner",
            "model.norm_epsilon": "layer_norm_epsilon",
            "model.tie_embeddings": "tie_word_embeddings",
            "data.sequence_length": "n_positions",
        },
        {
            "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        },
        [bias_of(name) for name in _GPT2 if "wte" not in name and "wpe" not in name and name != "lm_head.weight"],
    ),
)  # fmt: skip
_KINDS: dict[str, Any] = {
    "tie_word_embeddings": bool, "rms_norm_eps": float, "layer_norm_epsilon": float, "rope_theta": float,
}  # fmt: skip
_MADE: Any = TypedDict  # type checkers accept only literal fields
Rope = _MADE("Rope", {"rope_type": str | None, "type": str | None, "rope_theta": float | None}, total=False)
# The fields of a Hugging Face config.json that are read: of its names, its positions, and a family's keys
Theirs = _MADE(
    "Theirs",
    {"architectures": list[str] | None, "rope_parameters": Rope | None, "rope_scaling": Rope | None}
    | {name: _KINDS.get(name, stored.Positive) | None for family in FAMILIES for name in family.keys.values()},
    total=False,
)
_DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")  # for their training; any value is valid
VOCABULARY = "steppe_vocabulary"  # our key in their config.json: the vocabulary's fingerprints, the run's, the export's
# Keys of a config.json that do not affect what a model computes: names, ids, initial values, output and sampling
_HARMLESS = frozenset((
    "architectures", "model_type", "vocab_size", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "use_cache", "initializer_range", "pretraining_tp", "tokenizer_class", "task_specific_params", "finetuning_task",
    "id2label", "label2id", "num_labels", "problem_type", "output_attentions", "output_hidden_states",
    "output_scores", "return_dict", "return_dict_in_generate", "torchscript", "chunk_size_feed_forward",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "max_window_layers",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "do_sample", "temperature", "top_k", "top_p", "typical_p",
    "max_length", "min_length", "max_new_tokens", "num_beams", "num_beam_groups", "num_return_sequences",
    "early_stopping", "repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "remove_invalid_values", "exponential_decay_length_penalty", "prefix", "n_ctx", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "is_llama_config",
    "transformers.js_config", "rope_parameters", "rope_scaling", "rope_theta", VOCABULARY,
))  # fmt: skip
# Keys that have no effect at these values
_NEUTRAL = {
    "is_encoder_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None, "is_decoder": False,
    "use_sliding_window": False, "rope_interleaved": False, "tie_encoder_decoder": False, "pruned_heads": {},
    "use_bfloat16": False, "partial_rotary_factor": 1.0,
}  # fmt: skip


def of_config(config: ConfigDict) -> Family:
    """The family of a run's model. Raises ConfigError, by key, if there is none."""
    model = config.model
    if model.logit_soft_cap:
        raise ConfigError("model.logit_soft_cap", model.logit_soft_cap, "0 to be exported: no family caps its logits")
    kind = model.style, model.qk_norm
    family = next((each for each in FAMILIES if (each.style, each.qk_norm) == kind), None)
    if family is None:
        raise ConfigError("model.qk_norm", model.qk_norm, f"false to be exported in style {model.style}")
    if "model.head_width" not in family.keys and model.head_width not in (0, model.width // model.heads):
        raise ConfigError("model.head_width", model.head_width, f"0 to be exported as {family.architecture}")
    return family


def theirs(family: Family, config: ConfigDict, vocabulary: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model. vocabulary: number of ids in use; more: bos_token_id and similar keys."""
    model = config.model
    ours = {
        **{f"model.{name}": value for name, value in model.items()},
        "model.kv_heads": model.kv_heads or model.heads,
        "model.head_width": model.head_width or model.width // model.heads,
        "data.sequence_length": config.data.sequence_length,
    }
    found = {name: ours[key] for key, name in family.keys.items()}
    if "rope_theta" in found:
        found["rope_parameters"] = {"rope_type": "default", "rope_theta": found["rope_theta"]}
    return {
        "architectures": [family.architecture], "model_type": family.kind, "vocab_size": vocabulary, **found,
        **family.fixed, **more, "dtype": "float32", "torch_dtype": "float32", "use_cache": True,
    }  # fmt: skip


def of_theirs(found: Mapping[str, Any], place: str) -> Family:
    """The family of a config.json. Raises Unusable, by key, if none computes the same model."""
    names = found.get("architectures") or []
    family = next((each for each in FAMILIES if names == [each.architecture]), None)
    if family is None:
        known = ", ".join(each.architecture for each in FAMILIES)
        raise Unusable(f"{place}: architectures = {names}: must be one of {known}")
    for key, value in family.fixed.items():
        if key not in _DROPOUTS and found.get(key, value) != value:
            given, style = files.shown(found[key]), family.style
            raise Unusable(f"{place}: {key} = {given}: must be {value!r}, as Steppe's {style} model has it")
    rope = {**(found.get("rope_parameters") or {}), **(found.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise Unusable(f"{place}: rope_type = {files.shown(kind)}: must be 'default'; Steppe scales no positions")
    for key, value in {**{name: v for name, v in rope.items() if name not in ("type", "rope_type")}, **found}.items():
        if value is not None and not _accounted(family, key, value, found):
            raise Unusable(
                f"{place}: {key} = {files.shown(value)}: {_REASONS.get(key, 'is not a key that Steppe knows')}"
            )
    return family


_REASONS = {
    "quantization_config": "quantised weights are refused; save the model in float32 or bfloat16",
    "partial_rotary_factor": "must be 1; Steppe rotates whole heads",
    "layer_types": "must be full_attention in every layer",
}


def _accounted(family: Family, key: str, value: Any, found: Mapping[str, Any]) -> bool:
    """Whether a key of a config.json is used here or has no effect."""
    if key == "sliding_window":  # any value, if it is not used
        return found.get("use_sliding_window") is False
    if key == "layer_types":
        return set(value) == {"full_attention"}
    if key in _NEUTRAL:
        return value == _NEUTRAL[key]
    return key in _HARMLESS or key in family.fixed or key in family.keys.values()


def ours(family: Family, found: Mapping[str, Any], place: str) -> dict[str, Any]:
    """{our key: value} of a config.json, complete except for text and training."""
    given = {**(found.get("rope_parameters") or {}), **{k: v for k, v in found.items() if v is not None}}
    known = {"tie_word_embeddings": family.kind == "gpt2", "head_dim": 0, "rope_theta": 10000.0}
    known |= {"n_inner": 4 * given.get("n_embd", 0), "num_key_value_heads": given.get("num_attention_heads"), **given}
    missing = [name for name in family.keys.values() if name not in known]
    if missing:
        raise Unusable(f"{place}: {missing[0]}: is missing")
    values = {key: known[name] for key, name in family.keys.items()}
    if values.get("model.head_width", 0) * values["model.heads"] == values["model.width"]:
        values["model.head_width"] = 0
    return {"model.size": "", "model.style": family.style, "model.qk_norm": family.qk_norm, **values}


def to_theirs(family: Family, path: str, array: np.ndarray) -> np.ndarray:
    """One of our parameters, of one layer, in the form that theirs has."""
    if parameters.of(path).kind != "matrix":
        return array
    kernel = array.reshape(sizes(path, array.shape))
    return kernel.T if family.linear else kernel


def to_ours(family: Family, path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of to_theirs; shape: of our parameter, of one layer."""
    transposed = family.linear and parameters.of(path).kind == "matrix"
    return (array.T if transposed else array).reshape(shape)


def sizes(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """(inputs, outputs) of one layer's kernel; the table's axes count the layer axis, which `shape` lacks."""
    line = parameters.of(path)
    inputs = math.prod(shape[axis - len(line.spec) + len(shape)] for axis in line.reads)
    return inputs, math.prod(shape) // inputs
