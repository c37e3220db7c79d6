"""Writes GGUF files from the hub's configuration and tensors as llama.cpp's converters do.

Written after llama.cpp's conversion/*.py; names of tensors are those of its own package, gguf.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox"}  # model_type -> GGUF's name
_GPT2_LINEAR = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


def architecture(config: Mapping[str, Any]) -> str:
    """GGUF's name of a configuration's architecture."""
    return ARCHITECTURES.get(config["model_type"], config["model_type"])


def _rope(config) -> dict[str, Any]:
    """The parameters of the rotary embedding (of the full layers), in whichever layout they are written."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found = dict(found.get("full_attention", found))
    found.setdefault("rope_type", found.pop("type", "default"))
    if "rope_theta" in config:
        found.setdefault("rope_theta", config["rope_theta"])
    if "original_max_position_embeddings" in config:
        found.setdefault("original_max_position_embeddings", config["original_max_position_embeddings"])
    return found


def _head_dim(config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _turned(config) -> int:
    share = config.get("partial_rotary_factor") or _rope(config).get("partial_rotary_factor")
    return int(_head_dim(config) * (share or config.get("rotary_pct") or 1))


def _common_keys(config) -> dict[str, Any]:
    """TextModel.set_gguf_parameters."""
    rope = _rope(config)
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads"),
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope.get("rope_theta"),
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        keys |= {f"rope.scaling.yarn_{n}": rope[n] for n in ("beta_fast", "beta_slow") if n in rope}
    return keys


def _keys_by_architecture(config) -> dict[str, Any]:
    arch = architecture(config)
    if arch == "gpt2":
        return {
            "block_count": config["n_layer"], "context_length": config.get("n_ctx", config["n_positions"]),
            "embedding_length": config["n_embd"], "attention.head_count": config["n_head"],
            "feed_forward_length": config.get("n_inner") or 4 * config["n_embd"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }  # fmt: skip
    if arch == "gptneox":
        keys = {
            "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
            "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
            "rope.dimension_count": _turned(config), "attention.head_count": config["num_attention_heads"],
            "use_parallel_residual": config.get("use_parallel_residual", True),
            "attention.layer_norm_epsilon": config["layer_norm_eps"],
        }  # fmt: skip
        theta = _rope(config).get("rope_theta", 10000.0)
        return keys if theta == 10000.0 else keys | {"rope.freq_base": theta}  # the converter takes 10,000 for granted
    keys = _common_keys(config)
    if arch in ("llama", "smollm3"):
        keys |= {"vocab_size": config["vocab_size"], "rope.dimension_count": _head_dim(config)}
    if arch == "gemma2":
        names = ("attn_logit_softcapping", "final_logit_softcapping")
        keys |= {name: config[name] for name in names} | {"attention.sliding_window": config["sliding_window"]}
        if keys["rope.freq_base"] == 10000.0:
            keys["rope.freq_base"] = None
    if arch == "gemma3":
        keys |= {"attention.sliding_window": config["sliding_window"],
                 "final_logit_softcapping": config.get("final_logit_softcapping")}  # fmt: skip
        if keys["rope.freq_base"] is None:
            keys["rope.freq_base"] = 1_000_000.0
    if arch == "phi3":
        rope = _rope(config)
        keys |= {"rope.scaling.original_context_length": config["original_max_position_embeddings"],
                 "rope.dimension_count": _turned(config),
                 "attention.sliding_window": config.get("sliding_window") or 0}  # fmt: skip
        scale = config["max_position_embeddings"] / config["original_max_position_embeddings"]
        if "long_factor" in rope and scale > 1:
            log = math.log(config["original_max_position_embeddings"])
            keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / log)
    return keys


def keys_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of a configuration."""
    arch = architecture(config)
    keys = {f"{arch}.{name}": value for name, value in _keys_by_architecture(config).items() if value is not None}
    return {"general.architecture": arch} | keys


def factors_of(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors that a configuration's rotary scaling makes (generate_extra_tensors), float32."""
    rope = _rope(config)
    if "long_factor" in rope:
        return {f"rope_factors_{n}.weight": np.array(rope[f"{n}_factor"], np.float32) for n in ("long", "short")}
    if rope["rope_type"] != "llama3":
        return {}
    dims, original = _head_dim(config), rope["original_max_position_embeddings"]
    found = []
    for frequency in 1.0 / (rope["rope_theta"] ** (np.arange(0, dims, 2, dtype=np.float32) / dims)):
        turns = original * frequency / (2 * math.pi)
        smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        smooth = min(max(smooth, 0.0), 1.0)
        found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": np.array(found, np.float32)}


def pair_rotary_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k: row 2i of a head is the hub's row i, row 2i + 1 the hub's row i + F/2."""
    features = weight.shape[0] // heads
    paired = np.empty_like(weight)
    for head in range(heads):
        for i in range(features // 2):
            start = head * features
            paired[start + 2 * i] = weight[start + i]
            paired[start + 2 * i + 1] = weight[start + i + features // 2]
    return paired


def _sort_out_heads(value: np.ndarray, heads: int) -> np.ndarray:
    """GPT-NeoX's q, k and v, head by head, into all of q, then all of k, then all of v."""
    per_head = value.reshape(heads, 3, -1, *value.shape[1:])
    return np.concatenate([per_head[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])


def tensors_of(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF's names and values of the hub's tensors; what has no name there keeps its own."""
    arch = architecture(config)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.get("num_hidden_layers") or config["n_layer"])
    for name, value in tensors.items():
        base, _, suffix = name.rpartition(".")
        value = value.astype(np.float32) if value.dtype.itemsize == 2 or value.dtype == np.float64 else value
        if arch in ("llama", "smollm3") and "self_attn.q_proj" in name:
            value = pair_rotary_rows(value, config["num_attention_heads"])
        if arch in ("llama", "smollm3") and "self_attn.k_proj" in name:
            value = pair_rotary_rows(value, config.get("num_key_value_heads") or config["num_attention_heads"])
        if arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            value = value + np.float32(1)
        if arch == "gptneox" and "query_key_value" in name:
            value = _sort_out_heads(value, config["num_attention_heads"])
        if arch == "gpt2" and name.endswith(_GPT2_LINEAR):
            value = value.T
        known = names.get_name(base) if base else None
        yield f"{known}.{suffix}" if known else name, np.ascontiguousarray(value)


def _add(writer: gguf.GGUFWriter, key: str, value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write(path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], keys: Mapping[str, Any],
          quantization: str = "F32") -> Path:
    """Writes the hub's ``tensors``; None in ``keys`` leaves a key out, any other value replaces it."""
    found = keys_of(config) | dict(keys)
    writer = gguf.GGUFWriter(path, found.pop("general.architecture"))
    for key, value in found.items():
        if value is not None:
            _add(writer, key, value)
    as_type = gguf.GGMLQuantizationType[quantization]
    for name, value in [*tensors_of(config, tensors), *factors_of(config).items()]:
        if value.ndim == 1 or quantization == "F32" or not name.endswith(".weight"):  # converters leave norms alone
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, quantize(value, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
