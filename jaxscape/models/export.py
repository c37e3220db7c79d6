"""A decoder -> a folder in the hub's format, as transformers would have saved it."""

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxscape.errors import InputError
from jaxscape.models import gguf, tensor_names, tokenizer
from jaxscape.models.architecture import Architecture, LayerKind
from jaxscape.models.families import from_hf_config
from jaxscape.models.pretrained import Pretrained, values_of
from jaxscape.models.saving import Tensor, new_folder, write_json, write_safetensors
from jaxscape.models.tensor_names import ParamPath, Row

SHARD_BYTES = 5 * 10**9  # of one file, at most
_CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM", "phi3": "Phi3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM", "gpt2": "GPT2LMHeadModel",
}  # fmt: skip
# What is copied from a hub-format folder: the tokenizer's files, and how to generate.
_COPIED = ("tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
           "merges.txt", "tekken.json", "chat_template*", "generation_config.json")  # fmt: skip


def write_merged(folder: Path, source: Path, model: Pretrained, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a decoder so that transformers' ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it.

    The weights are written in the dtype they have, one tensor at a time: beside the model itself the host holds the
    largest of them.

    Args:
      folder: what to make; must not be there, or be empty.
      source: the folder or GGUF file that the model was loaded from: its configuration and tokenizer are kept.
      model: the decoder, with no adapters but those folded in.
      shard_bytes: of a weight file, at most (one tensor, at least).

    Raises:
      InputError: the folder is not empty, the disk is full, or the source isn't this model's or can't be put into
        the words of a config.json.
    """
    config, file = _read_source(source, model.arch)
    dtype = values_of(model.params)[("embedding",)].dtype
    config = config | {"architectures": [_CLASSES[model.arch.family]]} | _dtype_fields(config, dtype.name)
    tensors = list(_tensors(model))
    with new_folder(folder) as partial:
        write_json(partial / "config.json", config)
        if file is None:
            for path in sorted({path for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}):
                shutil.copyfile(path, partial / path.name)  # the hub's cache holds links
        else:
            _write_tokenizer(partial, file)
        _write_shards(partial, tensors, shard_bytes)


# The configuration


def _read_source(source: Path, arch: Architecture) -> tuple[dict[str, Any], gguf.GgufFile | None]:
    """(config.json, the GGUF file if it is one), checked to say what the decoder is."""
    if source.is_dir():
        file, config = None, _text_config(source / "config.json")
    else:
        file = gguf.GgufFile(source)
        config = _config_of_gguf(file, arch)
    if not _alike(from_hf_config(config, str(source)), arch):
        raise InputError(f"{source}: is not the model to be written, or what it is has no words in a config.json; "
                         "give the folder or GGUF file it was loaded from")
    return config, file


def _text_config(path: Path) -> dict[str, Any]:
    """A folder's configuration; of a model that also reads images, that of its decoder, which alone is written."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); give the folder the model was loaded from") from None
    if config.get("model_type") == "gemma3":
        tied = {k: v for k, v in config.items() if k == "tie_word_embeddings" and v is not None}
        config = config["text_config"] | {"model_type": "gemma3_text"} | tied
    return {name: value for name, value in config.items() if name != "auto_map"}  # code that isn't written


def _dtype_fields(config: Mapping[str, Any], dtype: str) -> dict[str, str]:
    """The dtype of the weights by what the source calls it; by the older name, which is always read, if it doesn't."""
    return dict.fromkeys([name for name in ("torch_dtype", "dtype") if name in config] or ["torch_dtype"], dtype)


def _alike(one: Architecture, other: Architecture) -> bool:
    """Whether two architectures are the same, up to float32 roundings of rotary frequencies."""

    def flat(kind: LayerKind):
        rotary = kind.rotary
        return kind.window, rotary and (rotary.frequencies, rotary.magnitude, rotary.long_frequencies, rotary.long_from)

    def close(a, b):
        leaves, tree = jax.tree.flatten(a)
        others, other_tree = jax.tree.flatten(b)
        return tree == other_tree and np.allclose(leaves, others, rtol=1e-5, atol=0)

    bare = [dataclasses.replace(arch, kinds=()) for arch in (one, other)]
    return bare[0] == bare[1] and close([flat(kind) for kind in one.kinds], [flat(kind) for kind in other.kinds])


def _config_of_gguf(file: gguf.GgufFile, arch: Architecture) -> dict[str, Any]:
    """A GGUF file's metadata in the words of config.json, as ``gguf`` reads it."""
    config = file.config()
    if "rope_freqs.weight" in file.shapes():
        config["rope_parameters"] |= _llama3_scaling(config, arch, file.where)
    config = _older_rope(config)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = file.field(f"tokenizer.ggml.{key}_token_id")
    return {name: value for name, value in config.items() if value is not None or name.endswith("_token_id")}


def _llama3_scaling(config: Mapping[str, Any], arch: Architecture, where: str) -> dict[str, Any]:
    """Llama 3.1's scaling of rotary frequencies (``rotary.frequencies``) out of the scaled ones.

    GGUF has its outcome alone. Every Llama has low_freq_factor 1 and high_freq_factor 4; the slowest frequency is
    divided by ``factor``, and any between the two says how long the contexts of the first training were.
    """
    base = config["rope_parameters"]["rope_theta"] ** (-np.arange(0, arch.head_dim, 2) / arch.head_dim)
    share = np.asarray(arch.kinds[0].rotary.frequencies) / base
    between = np.flatnonzero((share < 0.999) & (share > 1.001 * share[-1]))
    if not between.size:
        raise InputError(f"{where}: rope_freqs.weight is not Llama 3.1's scaling; export from the hub's folder instead")
    at, factor = between[0], 1 / share[-1]
    smooth = (share[at] - share[-1]) / (1 - share[-1])
    original = (1 + 3 * smooth) * 2 * math.pi / base[at]
    return {"rope_type": "llama3", "factor": round(float(factor), 4), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": round(float(original))}  # fmt: skip


def _older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters by their names in version 4 of transformers, which version 5 reads as well."""
    config = dict(config)
    parameters = dict(config.pop("rope_parameters", {}))
    if "full_attention" in parameters:
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = dict(parameters["full_attention"])
    if config["model_type"] == "gpt_neox":
        return config | {"rotary_emb_base": parameters["rope_theta"], "rotary_pct": parameters["partial_rotary_factor"]}
    if "rope_theta" in parameters:
        config["rope_theta"] = parameters.pop("rope_theta")
    if parameters.get("rope_type", "default") != "default":
        config["rope_scaling"] = {name: value for name, value in parameters.items() if value is not None}
    return config


# The tokenizer


def _write_tokenizer(folder: Path, file: gguf.GgufFile) -> None:
    """tokenizer.json and tokenizer_config.json of the tokenizer rebuilt from a GGUF file."""
    from tokenizers.processors import TemplateProcessing

    rebuilt, start = tokenizer.rebuild(file)
    tokens = file.field("tokenizer.ggml.tokens")
    if start is not None:
        first = tokens[start]
        rebuilt.post_processor = TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, start)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (number := file.field(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token"] = tokens[number]
    if template := file.field("tokenizer.chat_template"):
        config["chat_template"] = template
    rebuilt.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)


# The weights


def _tensors(model: Pretrained) -> Iterator[Tensor]:
    """Every tensor of the model by its name on the hub; a parameter that two names stand for goes by the first."""
    values, written = values_of(model.params), set()
    for row in tensor_names.HUB[model.arch.family].rows:
        if not written.isdisjoint(row.paths) or any(path not in values for path in row.paths):
            continue
        written.update(row.paths)
        stacked = tensor_names.is_stacked(row)
        first = values[row.paths[0]]
        shape = (*first.shape[stacked:-1], sum(values[path].shape[-1] for path in row.paths))
        shape = shape[::-1] if row.transposed else shape
        for layer in range(first.shape[0]) if stacked else [None]:
            read = functools.partial(_read, values, row, layer, model.arch.head_dim)
            yield Tensor(tensor_names.hub_name(row, layer), shape, first.dtype, read)


def _read(values: Mapping[ParamPath, jax.Array], row: Row, layer: int | None, head_dim: int) -> np.ndarray:
    """A tensor of a row, on the host, laid out as the hub has it: the inverse of ``weights.read_part``."""
    parts = [_on_host(values[path], layer) for path in row.paths]
    whole = parts[0]
    if len(parts) > 1 or row.order != "concatenated":
        whole, start = np.empty((*whole.shape[:-1], sum(part.shape[-1] for part in parts)), whole.dtype), 0
        for number, part in enumerate(parts):
            outputs = np.arange(part.shape[-1])
            whole[..., tensor_names.stored_places(outputs, row, number, start, head_dim)] = part
            start += part.shape[-1]
    if row.offset:
        whole = (whole.astype(np.float32) + np.float32(row.offset)).astype(whole.dtype)
    return whole.T if row.transposed else whole


def _on_host(array: jax.Array, layer: int | None) -> np.ndarray:
    """One layer of a stacked parameter (None: all of another); no copy where the host's memory is the device's."""
    devices = array.sharding.device_set
    if layer is None or (len(devices) == 1 and next(iter(devices)).platform == "cpu"):
        return np.asarray(array) if layer is None else np.asarray(array)[layer]
    return np.asarray(array[layer])


def _write_shards(folder: Path, tensors: Sequence[Tensor], limit: int) -> None:
    """model.safetensors; or, of more bytes than ``limit``, shards of at most so many, and their index."""
    shards, filled = [[]], 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        index = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.nbytes for tensor in tensors)
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    with tqdm(total=len(tensors), desc="export model", unit="tensor", leave=False) as bar:
        for name, shard in zip(names, shards, strict=True):
            write_safetensors(folder / name, shard)
            bar.update(len(shard))
