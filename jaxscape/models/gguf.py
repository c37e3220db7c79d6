"""GGUF files: tensors, dequantised as they are read, and an ``Architecture`` from the metadata.

The metadata is put into the words of a config.json and read by the family's own reader, so that a family is described
in one place. What llama.cpp knows by heart and no key says (Gemma's pattern of windows, SmolLM3's layers that don't
turn) is filled in as there. A key that changes numbers and is not understood is refused by name.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxscape.errors import InputError
from jaxscape.models import tensor_names
from jaxscape.models.architecture import Architecture, LayerKind
from jaxscape.models.families import from_hf_config
from jaxscape.models.gguf_header import read_header
from jaxscape.models.weights import read_bytes

_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Keys that change no number, or that the tensors' shapes say again.
_HARMLESS = frozenset({"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"})
# Keys of what is not implemented, with the value that switches it off.
_OFF = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}

Shapes = Mapping[str, tuple[int, ...]]


class GgufFile:
    """A GGUF file: quantised tensors are dequantised to float32 as they are read."""

    tables = tensor_names.GGUF

    def __init__(self, path: Path):
        self.where, self._path = str(path), path
        try:
            self._fields, self._tensors = read_header(path)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; check config.model.source") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable GGUF file ({error}); fetch it again") from None
        if (pieces := self.field("split.count", 1)) > 1:
            raise InputError(f"{path}: one of {pieces} pieces (split.count); join them with "
                             "`llama-gguf-split --merge` and give the whole file")

    def field(self, name: str, default=None):
        """Value of one metadata key; ``default`` where it is absent."""
        if name not in self._fields:
            return default
        return _decimal(self._fields[name])

    def metadata(self) -> dict[str, Any]:
        """Every scalar key, and the architecture's arrays (not the vocabulary's)."""
        prefix = f"{self.field('general.architecture')}."
        return {key: self.field(key) for key, field in self._fields.items()
                if field.kind != "array" or key.startswith(prefix)}  # fmt: skip

    def architecture(self) -> Architecture:
        """What the decoder looks like; see ``from_gguf_metadata``."""
        return from_gguf_metadata(self.metadata(), self.shapes(), self.where, self._factors())

    def config(self) -> dict[str, Any]:
        """The metadata in the words of a config.json; see ``to_hub_config``."""
        return to_hub_config(self.metadata(), self.shapes(), self.where, self._factors())

    def _factors(self) -> dict[str, np.ndarray]:
        shapes = self.shapes()
        return {name: self.read(name, 0, shapes[name][0]) for name in _FACTORS if name in shapes}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name, in the hub's order of axes."""
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def problem(self, name: str) -> str | None:
        """Why a tensor cannot be read; None where it can."""
        from gguf import GGMLQuantizationType

        kind = GGMLQuantizationType(self._tensors[name].kind)
        if _is_dequantised(kind):
            return None
        return f"stored as {kind.name}, which is not implemented; take another quantisation of the model"

    def read(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of a tensor, float32, in GGUF's order."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        block, size = GGML_QUANT_SIZES[kind]
        if len(tensor.shape) == 1:  # a row of its own
            raw = read_bytes(self._path, tensor.offset, int(tensor.shape[0]) // block * size)
            return dequantize(raw[None], kind)[0, first:last]
        row = int(tensor.shape[0]) // block * size
        raw = read_bytes(self._path, tensor.offset + first * row, (last - first) * row)
        return dequantize(raw.reshape(last - first, row), kind)


@functools.cache
def _is_dequantised(kind) -> bool:
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _decimal(field) -> Any:
    """A key's value; a float32 as the shortest decimal that rounds to it, which is what config.json had."""
    return float(str(np.float32(field.value))) if field.kind == "float32" else field.value


class _Keys:
    """The keys of an architecture, which remember which of them were asked for."""

    def __init__(self, metadata: Mapping[str, Any], arch: str, where: str):
        self._prefix, self.where = f"{arch}.", where
        self._values = {k.removeprefix(self._prefix): v for k, v in metadata.items() if k.startswith(self._prefix)}
        self._asked = set()

    def get(self, name: str, default=None):
        """The key's value; ``default`` where it is absent."""
        self._asked.add(name)
        return self._values.get(name, default)

    def need(self, name: str):
        """The key's value.

        Raises:
          InputError: it is absent.
        """
        if (value := self.get(name)) is None:
            raise InputError(f"{self.where}: key {self._prefix + name!r} is missing; convert the model again")
        return value

    def refuse(self, name: str, value, implemented: str):
        """Raises the error of a value that is not implemented."""
        raise InputError(f"{self.where}: {self._prefix}{name} {value!r} is not implemented; implemented: {implemented}")

    def refuse_the_rest(self) -> None:
        """Refuses the keys nobody asked for, unless they are known to change nothing."""
        for name in sorted(set(self._values) - self._asked - _HARMLESS):
            if name not in _OFF:
                raise InputError(f"{self.where}: {self._prefix}{name} = {self._values[name]!r} is not implemented")
            if self._values[name] != _OFF[name]:
                self.refuse(name, self._values[name], repr(_OFF[name]))


def _shape(k: _Keys, shapes: Shapes) -> dict[str, Any]:
    """The fields of config.json that Llama and its descendants have in common."""
    heads, width = k.need("attention.head_count"), k.need("embedding_length")
    head_dim = k.get("attention.key_length", width // heads)
    if (value_dim := k.get("attention.value_length", head_dim)) != head_dim:
        k.refuse("attention.value_length", value_dim, f"attention.key_length, {head_dim}")
    return {
        "vocab_size": shapes.get("token_embd.weight", (k.get("vocab_size", 1),))[0],
        "hidden_size": width,
        "num_hidden_layers": k.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": k.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": k.need("feed_forward_length"),
        "rms_norm_eps": k.need("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": k.need("context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
    }


def _rotary(k: _Keys, head_dim: int) -> dict[str, Any]:
    """``rope_parameters`` of layers that all turn whole heads alike."""
    if (turned := k.get("rope.dimension_count", head_dim)) != head_dim:
        k.refuse("rope.dimension_count", turned, f"the head size {head_dim}")
    parameters = {"rope_theta": k.get("rope.freq_base", 10_000.0), "rope_type": k.get("rope.scaling.type", "none")}
    if (factor := k.get("rope.scale_linear")) is not None:  # what the first files called it
        return parameters | {"rope_type": "linear", "factor": factor}
    original = k.get("rope.scaling.original_context_length")
    if parameters["rope_type"] == "linear":
        return parameters | {"factor": k.need("rope.scaling.factor")}
    if parameters["rope_type"] == "yarn":
        named = {"factor": k.need("rope.scaling.factor"), "original_max_position_embeddings": original,
                 "beta_fast": k.get("rope.scaling.yarn_beta_fast"),
                 "beta_slow": k.get("rope.scaling.yarn_beta_slow")}  # fmt: skip
        return parameters | {name: value for name, value in named.items() if value is not None}
    if parameters["rope_type"] != "none":
        k.refuse("rope.scaling.type", parameters["rope_type"], "'none', 'linear', 'yarn'")
    return parameters | {"rope_type": "default"}


def _llama(k: _Keys, shapes: Shapes, _factors, model_type: str = "llama") -> dict[str, Any]:
    config = _shape(k, shapes) | {"model_type": model_type}
    config |= {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_up.bias" in shapes}
    return config | {"rope_parameters": _rotary(k, config["head_dim"])}


def _smollm3(k: _Keys, shapes: Shapes, factors) -> dict[str, Any]:
    return _llama(k, shapes, factors, "smollm3") | {"no_rope_layer_interval": 4}


def _plain(model_type: str):
    """The reader of an architecture with nothing beyond the common fields."""

    def read(k: _Keys, shapes: Shapes, _factors) -> dict[str, Any]:
        config = _shape(k, shapes) | {"model_type": model_type}
        return config | {"rope_parameters": _rotary(k, config["head_dim"])}

    return read


def _gemma_scale(config: Mapping[str, Any], layers_of_27b: int) -> dict[str, Any]:
    """No key has ``query_pre_attn_scalar``; it is the head size but for the two models of 27B."""
    by_width = config["hidden_size"] // config["num_attention_heads"]
    whole = config["num_hidden_layers"] == layers_of_27b
    return {"query_pre_attn_scalar": by_width if whole else config["head_dim"]}


def _gemma2(k: _Keys, shapes: Shapes, _factors) -> dict[str, Any]:
    config = _shape(k, shapes) | {"model_type": "gemma2", "sliding_window": k.get("attention.sliding_window", 4096)}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := k.get(name)) is not None:
            config[name] = cap
    return config | {"rope_parameters": _rotary(k, config["head_dim"])} | _gemma_scale(config, 46)


def _gemma3(k: _Keys, shapes: Shapes, _factors) -> dict[str, Any]:
    config = _shape(k, shapes) | {"model_type": "gemma3_text", "sliding_window": k.get("attention.sliding_window")}
    config["final_logit_softcapping"] = k.get("final_logit_softcapping")
    k.need("rope.freq_base")
    config["rope_parameters"] = {
        "full_attention": _rotary(k, config["head_dim"]),
        "sliding_attention": {"rope_type": "default", "rope_theta": k.get("rope.freq_base_swa", 10_000.0)},
    }
    if config["sliding_window"] is None:
        config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    return config | _gemma_scale(config, 62)


def _phi3(k: _Keys, shapes: Shapes, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    config = _shape(k, shapes) | {"model_type": "phi3", "sliding_window": k.get("attention.sliding_window") or None}
    if (scaling := k.get("rope.scaling.type", "none")) not in ("none", "longrope"):
        k.refuse("rope.scaling.type", scaling, "'none', 'longrope'")
    parameters = {"rope_theta": k.get("rope.freq_base", 10_000.0), "rope_type": "default"}
    attention = k.get("rope.scaling.attn_factor")
    if factors:
        if missing := [name for name in _FACTORS[1:] if name not in factors]:
            raise InputError(f"{k.where}: tensor {missing[0]!r} is missing beside {next(iter(factors))!r}")
        parameters |= {"rope_type": "longrope", "attention_factor": attention}
        parameters |= {f"{n}_factor": factors[f"rope_factors_{n}.weight"].tolist() for n in ("long", "short")}
    turned = k.get("rope.dimension_count", config["head_dim"])
    original = k.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    return config | {"rope_parameters": parameters, "partial_rotary_factor": turned / config["head_dim"],
                     "original_max_position_embeddings": original}  # fmt: skip


def _gpt_neox(k: _Keys, shapes: Shapes, _factors) -> dict[str, Any]:
    heads, width = k.need("attention.head_count"), k.need("embedding_length")
    turned = k.need("rope.dimension_count")
    return {
        "model_type": "gpt_neox",
        "vocab_size": shapes.get("token_embd.weight", (k.get("vocab_size", 1),))[0],
        "hidden_size": width,
        "num_hidden_layers": k.need("block_count"),
        "num_attention_heads": heads,
        "intermediate_size": k.need("feed_forward_length"),
        "layer_norm_eps": k.need("attention.layer_norm_epsilon"),
        "max_position_embeddings": k.need("context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "use_parallel_residual": k.get("use_parallel_residual", True),
        "attention_bias": "blk.0.attn_qkv.bias" in shapes,
        "hidden_act": "gelu_fast" if k.need("block_count") == 44 else "gelu",  # no key; the model of 20B has its own
        "rope_parameters": {"rope_type": "default", "rope_theta": k.get("rope.freq_base", 10_000.0),
                            "partial_rotary_factor": turned * heads / width},
    }  # fmt: skip


def _gpt2(k: _Keys, shapes: Shapes, _factors) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": shapes.get("token_embd.weight", (k.get("vocab_size", 1),))[0],
        "n_embd": k.need("embedding_length"),
        "n_layer": k.need("block_count"),
        "n_head": k.need("attention.head_count"),
        "n_inner": k.need("feed_forward_length"),
        "layer_norm_epsilon": k.need("attention.layer_norm_epsilon"),
        "n_positions": shapes.get("position_embd.weight", (k.need("context_length"),))[0],
        "tie_word_embeddings": "output.weight" not in shapes,
    }


# general.architecture -> reader of its keys, and which tensors of rotary factors it understands.
_READERS: Mapping[str, tuple[Callable[..., dict[str, Any]], tuple[str, ...]]] = {
    "llama": (_llama, _FACTORS[:1]),
    "smollm3": (_smollm3, _FACTORS[:1]),
    "qwen2": (_plain("qwen2"), _FACTORS[:1]),
    "qwen3": (_plain("qwen3"), _FACTORS[:1]),
    "gemma2": (_gemma2, ()),
    "gemma3": (_gemma3, ()),
    "olmo2": (_plain("olmo2"), ()),
    "phi3": (_phi3, _FACTORS[1:]),
    "gptneox": (_gpt_neox, ()),
    "gpt2": (_gpt2, ()),
}


def from_gguf_metadata(
    metadata: Mapping[str, Any], shapes: Shapes, where: str = "GGUF", factors: Mapping[str, np.ndarray] | None = None
) -> Architecture:
    """Reads the keys of a GGUF file; arguments and errors are those of ``to_hub_config``."""
    factors = factors or {}
    arch = from_hf_config(to_hub_config(metadata, shapes, where, factors), where)
    return _divided(arch, factors["rope_freqs.weight"], where) if "rope_freqs.weight" in factors else arch


def to_hub_config(
    metadata: Mapping[str, Any], shapes: Shapes, where: str = "GGUF", factors: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """The keys of a GGUF file in the words of a config.json, all but Llama 3.1's scaling of rotary frequencies.

    Args:
      metadata: the file's key-value pairs.
      shapes: the file's tensors by name; without ``output.weight`` the head is tied.
      where: how to call the file in errors.
      factors: its tensors of rotary factors, by name (Llama 3.1's ``rope_freqs``; Phi 3's long and short ones).

    Raises:
      InputError: the architecture or a key is not implemented, or a key is missing.
    """
    name, factors = metadata.get("general.architecture"), factors or {}
    if name not in _READERS:
        raise InputError(f"{where}: general.architecture {name!r} is not implemented; "
                         f"implemented: {', '.join(map(repr, _READERS))}")
    read, understood = _READERS[name]
    if unknown := [tensor for tensor in _FACTORS if tensor in shapes and tensor not in understood]:
        raise InputError(f"{where}: {unknown[0]} (scaled rotary frequencies) is not implemented for {name!r}")
    keys = _Keys(metadata, name, where)
    config = read(keys, shapes, factors)
    keys.refuse_the_rest()
    return config


def _divided(arch: Architecture, factors: np.ndarray, where: str) -> Architecture:
    """Rotary frequencies divided by ``factors`` float32 [R/2]: how GGUF has Llama 3.1's scaling."""

    def divide(kind: LayerKind) -> LayerKind:
        if kind.rotary is None:
            return kind
        found = np.asarray(kind.rotary.frequencies, np.float32)
        if found.shape != factors.shape:
            raise InputError(f"{where}: rope_freqs.weight has {factors.size} factors for {found.size} frequencies")
        return dataclasses.replace(
            kind, rotary=dataclasses.replace(kind.rotary, frequencies=tuple((found / factors).tolist()))
        )

    return dataclasses.replace(arch, kinds=tuple(divide(kind) for kind in arch.kinds))
