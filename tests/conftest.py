"""What several test files share: the tiny model, what PyTorch computed with it, and the same weights as a GGUF file."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from jaxscape.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Every program XLA compiles for the CPU holds a few memory maps, of which a process may have 65,530."""
    yield
    import jax

    jax.clear_caches()


class Golden(NamedTuple):
    """One prompt through PyTorch: last token's states [L, D] at each site, and its logits [V]."""

    text: str
    tokens: list[int]
    states: Mapping[str, np.ndarray]
    logits: np.ndarray


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """Hub-format folder of a Llama of four layers, made by fixtures/make_tiny_llama.py."""
    return Path(__file__).parent / "fixtures" / "tiny_llama"


@pytest.fixture(scope="session")
def tiny_model(tiny_llama):
    from jaxscape.models.pretrained import load_pretrained
    from jaxscape.models.sharding import make_mesh

    return load_pretrained(tiny_llama, make_mesh())


@pytest.fixture(scope="session")
def golden(tiny_llama) -> list[Golden]:
    arrays = np.load(tiny_llama / "golden.npz")
    texts = json.loads((tiny_llama / "prompts.json").read_text())
    return [
        Golden(text, arrays[f"tokens_{i}"].tolist(),
               {site: arrays[f"{site}_{i}"] for site in ("residual", "input_norm")}, arrays[f"logits_{i}"])
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def tiny_tensors(tiny_llama) -> dict[str, np.ndarray]:
    """The tiny model's weights by their names on the hub."""
    from safetensors.numpy import load_file

    return load_file(tiny_llama / "model.safetensors")


@pytest.fixture
def raises_input_error():
    """``with raises_input_error("word", ...):`` wants an InputError of one line that has all the words."""

    @contextlib.contextmanager
    def expect(*words: str):
        with pytest.raises(InputError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message, message
        assert [word for word in words if word not in message] == [], message

    return expect


_GGUF_NAMES = {  # llama.cpp's gguf-py, constants.py, MODEL_ARCH.LLAMA
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(hub_name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    name = hub_name.removesuffix(".weight")
    if not name.startswith("model.layers."):
        return _GGUF_NAMES[name] + ".weight"
    layer, inner = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[inner]}.weight"


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


@pytest.fixture(scope="session")
def write_gguf(tiny_llama, tiny_tensors) -> Callable[..., Path]:
    """Writes the tiny model as llama.cpp's converter would.

    ``write_gguf(path, tensors=..., quantization="F32", metadata={...})``: hub-named tensors; None in ``metadata``
    leaves that key out.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    config = json.loads((tiny_llama / "config.json").read_text())
    tokenizer = json.loads((tiny_llama / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    defaults = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_parameters"]["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in vocabulary],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]],
    }

    def add(writer, key, value):
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

    def write(path, *, tensors=None, quantization="F32", metadata=None, arch="llama"):
        writer = GGUFWriter(path, arch)
        fields = {**defaults, **(metadata or {})}
        for key, value in fields.items():
            if value is not None:
                add(writer, key, value)
        heads = {"q_proj": fields["llama.attention.head_count"],
                 "k_proj": fields["llama.attention.head_count_kv"] or fields["llama.attention.head_count"]}
        for name, value in (tiny_tensors if tensors is None else tensors).items():
            kind = name.split(".")[-2]
            if kind in heads:
                value = pair_rotary_rows(value, heads[kind])
            if value.ndim == 1 or quantization == "F32":  # converters leave the norms alone
                writer.add_tensor(gguf_name(name) if "weight" in name else name, value)
            else:
                as_type = GGMLQuantizationType[quantization]
                writer.add_tensor(gguf_name(name), quantize(value, as_type), raw_dtype=as_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
