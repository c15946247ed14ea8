"""Converts a Llama model in a .gguf file (llama.cpp's format) to a Hugging Face directory in float32.

llama.cpp's RoPE pairs neighbours and Hugging Face's pairs the halves of a head, so rows of queries and keys are
reordered. Quantised tensors are dequantised.
"""

import re
from typing import Any

import numpy as np

from steppe.configs import packages
from steppe.data import files
from steppe.lm.hub import families, tokenizers
from steppe.lm.hub.export import building, save
from steppe.lm.keep.exits import Unusable

_HEADS = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_DIGITS = {"type": "Digits", "individual_digits": True}
_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_CUTS = {"smollm": [_DIGITS, _WORDS], "gpt-2": [_WORDS]}  # by llama.cpp's name of the pre-tokenizer
_CONTROL = 3  # llama.cpp's type of control tokens


def write(source: str, out: str) -> None:
    """Writes the model of `source` to directory `out`, which appears only when complete. Raises Unusable."""
    if lacking := packages.lacking("gguf", "safetensors"):
        raise Unusable(f"{source}: {lacking}")
    import gguf

    try:
        reader = gguf.GGUFReader(source)
        said = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise Unusable(f"{source}: cannot be read as gguf ({' '.join(str(error).split())})") from None
    config, made = _config(said, source), _tokenizer(said, source)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    known = {names.get_name(name.format(0), (".weight",)): name for name in families.FAMILIES[0].names}
    arrays = {}
    for tensor in reader.tensors:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        name = known.get(f"blk.0.{tensor.name[layer.end() :]}" if layer else tensor.name)
        if name is None:
            raise Unusable(f"{source}: tensor {tensor.name} is not part of a Llama model")
        array = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        heads = next((config[key] for kernel, key in _HEADS.items() if name.endswith(kernel)), 0)
        if heads:
            array = array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        arrays[name.format(layer and layer[1])] = np.ascontiguousarray(array)
    config["tie_word_embeddings"] = "lm_head.weight" not in arrays
    with building(out) as aside:
        save(aside / "model.safetensors", arrays)
        files.write_json(aside / "config.json", config)
        files.write_json(aside / "tokenizer.json", made)
        tokens = said["tokenizer.ggml.tokens"]
        ends = {f"{name}_token": tokens[said[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
        files.write_json(
            aside / "tokenizer_config.json",
            {"tokenizer_class": "PreTrainedTokenizerFast", **ends, "clean_up_tokenization_spaces": False},
        )


def _config(said: dict[str, Any], source: str) -> dict[str, Any]:
    kind = said.get("general.architecture")
    if kind != "llama":
        raise Unusable(f"{source}: general.architecture = {kind!r}: must be 'llama'")
    missing = [key for key in _KEYS if f"llama.{key}" not in said]
    scaled = [name for name in said if name.startswith("llama.rope.scaling") or name.startswith("llama.expert")]
    if missing or scaled:
        raise Unusable(f"{source}: llama.{missing[0]} is missing" if missing else f"{source}: {scaled[0]} is refused")
    config = {theirs: said[f"llama.{key}"] for key, theirs in _KEYS.items()}
    width = config["hidden_size"] // config["num_attention_heads"]
    if said.get("llama.rope.dimension_count", width) != width:
        raise Unusable(f"{source}: llama.rope.dimension_count: must be {width}; Steppe rotates whole heads")
    # It is stored in float32; rounding restores the decimal number
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    ids = {f"{name}_token_id": said.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "vocab_size": len(said["tokenizer.ggml.tokens"]), "torch_dtype": "float32", **config, **ids,
    }  # fmt: skip


def _tokenizer(said: dict[str, Any], source: str) -> dict[str, Any]:
    kind, cut = said.get("tokenizer.ggml.model"), said.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in _CUTS:
        known = f"'gpt2' and one of {', '.join(_CUTS)}"
        raise Unusable(f"{source}: tokenizer.ggml.model and .pre = {kind!r} and {cut!r}: must be {known}")
    vocabulary = {token: number for number, token in enumerate(said["tokenizer.ggml.tokens"])}
    kinds = said["tokenizer.ggml.token_type"]
    special = {token: number for token, number in vocabulary.items() if kinds[number] == _CONTROL}
    merges = [tuple(pair.split(" ")) for pair in said["tokenizer.ggml.merges"]]
    return tokenizers.of_bytes_and_merges(vocabulary, merges, special, _CUTS[cut])
