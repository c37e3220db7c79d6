"""Names of the tensors in checkpoints: a table for each family as the hub has it, and one for GGUF's architecture.

A row says which parameters a tensor holds and how it is stored there; ``weights`` reads by it. Adding a family is a
table here, made of the helpers below: ``rows`` for a name with nothing special, ``linear`` for a projection.
"""

import re
from typing import Literal, NamedTuple

import numpy as np

ParamPath = tuple[str, ...]
Order = Literal["concatenated", "by_head", "paired"]


class Row(NamedTuple):
    """How tensors of one name are stored.

    Attributes:
      pattern: of the whole name; its group, if any, is the number of the layer.
      paths: the parameters it holds; of several, each has its share of the outputs, in this order.
      transposed: stored [outputs, inputs]; kernels are [inputs, outputs].
      order: of the outputs: "concatenated", parameter by parameter; "by_head", head by head and each head's
        parameters one after the other (GPT-NeoX: [heads, 3, F]); "paired", feature i of a head's first half beside
        feature i of its second (GGUF's Llama).
      offset: the checkpoint stores the parameter plus this.
    """

    pattern: re.Pattern
    paths: tuple[ParamPath, ...]
    transposed: bool = False
    order: Order = "concatenated"
    offset: float = 0.0


class Names(NamedTuple):
    """The tensors of a family.

    Attributes:
      rows: see ``Row``.
      ignored: names of buffers that hold nothing config.json doesn't, and of parts of the model that are not its
        decoder; they are let be.
    """

    rows: tuple[Row, ...]
    ignored: re.Pattern = re.compile(r".*rotary_emb\.inv_freq")


class Target(NamedTuple):
    """Where a tensor's values go: its row and the number of its layer (None: not in a block)."""

    row: Row
    layer: int | None


def find_target(name: str, names: Names) -> Target | None:
    """Where the tensor ``name`` goes; None for one that no parameter takes."""
    for row in names.rows:
        if match := row.pattern.fullmatch(name):
            return Target(row, int(match[1]) if match.groups() else None)
    return None


def stored_places(outputs: np.ndarray, row: Row, part: int, start: int, head_dim: int) -> np.ndarray:
    """Where outputs of a parameter lie along the outputs of the tensor that holds it.

    Args:
      outputs: int [n], numbers of outputs of the parameter.
      row: the tensor's row; ``part`` is the parameter's number in it.
      part: see ``row``.
      start: outputs of the parameters before it in the tensor.
      head_dim: features of a head, F.

    Returns:
      int [n].
    """
    if row.order == "by_head":
        head, feature = np.divmod(outputs, head_dim)
        return (head * len(row.paths) + part) * head_dim + feature
    if row.order == "paired":
        head, feature = np.divmod(outputs, head_dim)
        half, pair = np.divmod(feature, head_dim // 2)
        return head * head_dim + 2 * pair + half
    return start + outputs


def _path(text: str) -> ParamPath:
    return tuple(text.split("."))


def rows(prefix: str, names: dict[str, str], **stored) -> tuple[Row, ...]:
    """Rows of the tensors ``prefix`` + name (a plain name, no pattern) -> dotted parameter path."""
    return tuple(Row(re.compile(prefix + re.escape(n)), (_path(p),), **stored) for n, p in names.items())


def linear(prefix: str, names: dict[str, str], *, transposed=True, order: Order = "concatenated") -> tuple[Row, ...]:
    """Weight and bias of projections: name -> dotted path of a layer of a block, or several split by blanks."""
    made = []
    for name, text in names.items():
        layers = [("blocks", *_path(layer)) for layer in text.split()]
        weight, bias = (re.compile(prefix + re.escape(f"{name}.{leaf}")) for leaf in ("weight", "bias"))
        made += [Row(weight, tuple((*layer, "kernel") for layer in layers), transposed, order),
                 Row(bias, tuple((*layer, "bias") for layer in layers), False, order)]
    return tuple(made)


def norms(prefix: str, names: dict[str, str], offset: float = 0.0) -> tuple[Row, ...]:
    """Scale and bias of norms: name -> dotted parameter path."""
    return (rows(prefix, {f"{n}.weight": f"{p}.scale" for n, p in names.items()}, offset=offset)
            + rows(prefix, {f"{n}.bias": f"{p}.bias" for n, p in names.items()}))  # fmt: skip


# As the hub has them. Exporters of a headless model, or of one inside a larger model, vary the prefix.

_MODEL = r"(?:model\.|language_model\.model\.|model\.language_model\.)?"
_LAYER = _MODEL + r"layers\.(\d+)\."
_HEAD = r"(?:language_model\.)?"
_TOP = (
    rows(_MODEL, {"embed_tokens.weight": "embedding"})
    + norms(_MODEL, {"norm": "final_norm"})
    + rows(_HEAD, {"lm_head.weight": "head"})
)
_ATTENTION = {f"self_attn.{p}_proj": f"attention.{p}" for p in "qkvo"}
_MLP = {f"mlp.{p}_proj": f"mlp.{p}" for p in ("gate", "up", "down")}
_QK_NORMS = norms(_LAYER, {f"self_attn.{p}_norm": f"blocks.attention.{p}_norm" for p in "qk"})
_PRE_NORMS = norms(_LAYER, {"input_layernorm": "blocks.input_norm", "post_attention_layernorm": "blocks.mlp_norm"})
_POST_NORMS = norms(_LAYER, {"post_attention_layernorm": "blocks.attention_out_norm",
                             "post_feedforward_layernorm": "blocks.mlp_out_norm"})  # fmt: skip
_SANDWICH_NORMS = _POST_NORMS + norms(
    _LAYER, {"input_layernorm": "blocks.input_norm", "pre_feedforward_layernorm": "blocks.mlp_norm"}
)

_LLAMA = Names(_TOP + _PRE_NORMS + linear(_LAYER, _ATTENTION | _MLP))
_GEMMA2 = Names(_TOP + _SANDWICH_NORMS + linear(_LAYER, _ATTENTION | _MLP))
_GEMMA3 = Names(
    _GEMMA2.rows + _QK_NORMS,
    re.compile(r".*rotary_emb\.inv_freq|(?:model\.)?(?:vision_tower|multi_modal_projector)\..*"),
)
_PHI3 = Names(
    _TOP + _PRE_NORMS
    + linear(_LAYER, {"self_attn.qkv_proj": "attention.q attention.k attention.v", "self_attn.o_proj": "attention.o",
                      "mlp.gate_up_proj": "mlp.gate mlp.up", "mlp.down_proj": "mlp.down"})
)  # fmt: skip

_NEOX = r"(?:gpt_neox\.)?"
_NEOX_LAYER = _NEOX + r"layers\.(\d+)\."
_GPT_NEOX = Names(
    rows(_NEOX, {"embed_in.weight": "embedding"})
    + norms(_NEOX, {"final_layer_norm": "final_norm"})
    + rows("", {"embed_out.weight": "head", "lm_head.weight": "head"})
    + norms(_NEOX_LAYER, {"input_layernorm": "blocks.input_norm", "post_attention_layernorm": "blocks.mlp_norm"})
    + linear(_NEOX_LAYER, {"attention.query_key_value": "attention.q attention.k attention.v"}, order="by_head")
    + linear(_NEOX_LAYER, {"attention.dense": "attention.o", "mlp.dense_h_to_4h": "mlp.up",
                           "mlp.dense_4h_to_h": "mlp.down"}),
    re.compile(r".*rotary_emb\.inv_freq|.*\.attention\.(?:bias|masked_bias)"),  # causal masks
)  # fmt: skip

_GPT = r"(?:transformer\.)?"
_GPT_LAYER = _GPT + r"h\.(\d+)\."
_GPT2 = Names(
    rows(_GPT, {"wte.weight": "embedding", "wpe.weight": "positions"})
    + norms(_GPT, {"ln_f": "final_norm"})
    + rows("", {"lm_head.weight": "head"})
    + norms(_GPT_LAYER, {"ln_1": "blocks.input_norm", "ln_2": "blocks.mlp_norm"})
    + linear(_GPT_LAYER, {"attn.c_attn": "attention.q attention.k attention.v", "attn.c_proj": "attention.o",
                          "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}, transposed=False),  # Conv1D
    re.compile(r".*\.attn\.(?:bias|masked_bias)"),  # causal masks
)  # fmt: skip

HUB: dict[str, Names] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "smollm3": _LLAMA,
    "qwen3": Names(_LLAMA.rows + _QK_NORMS),
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "olmo2": Names(_TOP + _POST_NORMS + _QK_NORMS + linear(_LAYER, _ATTENTION | _MLP)),
    "phi3": _PHI3,
    "gpt_neox": _GPT_NEOX,
    "gpt2": _GPT2,
}

# As GGUF has them (llama.cpp's converters; gguf.constants.MODEL_TENSORS). Everything linear is [outputs, inputs],
# GPT-NeoX's heads are sorted out, Gemma's norms have their one added, and Llama's rotary features lie in pairs.

_BLOCK = r"blk\.(\d+)\."
_QKV = {"attn_qkv": "attention.q attention.k attention.v"}
_QK = {"attn_q": "attention.q", "attn_k": "attention.k"}
_VO = {"attn_v": "attention.v", "attn_output": "attention.o"}
_FFN = {f"ffn_{p}": f"mlp.{p}" for p in ("gate", "up", "down")}
_GGUF_PRE_NORMS = {"attn_norm": "blocks.input_norm", "ffn_norm": "blocks.mlp_norm"}
_GGUF_POST_NORMS = {"post_attention_norm": "blocks.attention_out_norm", "post_ffw_norm": "blocks.mlp_out_norm"}
_GGUF_QK_NORMS = {f"attn_{p}_norm": f"blocks.attention.{p}_norm" for p in "qk"}


def _gguf(block_norms: dict[str, str], *block: tuple[Row, ...], offset: float = 0.0) -> Names:
    top = rows("", {"token_embd.weight": "embedding", "position_embd.weight": "positions", "output.weight": "head"})
    top += norms("", {"output_norm": "final_norm"}, offset)
    # The factors of rotary frequencies are read with the metadata.
    ignored = re.compile(r"rope_(?:freqs|factors_long|factors_short)\.weight")
    return Names(top + norms(_BLOCK, block_norms, offset) + sum(block, ()), ignored)


_GGUF_LLAMA = _gguf(_GGUF_PRE_NORMS, linear(_BLOCK, _QK, order="paired"), linear(_BLOCK, _VO | _FFN))
_GGUF_GPT = _gguf(_GGUF_PRE_NORMS, linear(_BLOCK, _QKV | _VO | {"ffn_up": "mlp.up", "ffn_down": "mlp.down"}))

GGUF: dict[str, Names] = {
    "llama": _GGUF_LLAMA,
    "smollm3": _GGUF_LLAMA,
    "qwen2": _gguf(_GGUF_PRE_NORMS, linear(_BLOCK, _QK | _VO | _FFN)),
    "qwen3": _gguf(_GGUF_PRE_NORMS | _GGUF_QK_NORMS, linear(_BLOCK, _QK | _VO | _FFN)),
    "gemma2": _gguf(_GGUF_PRE_NORMS | _GGUF_POST_NORMS, linear(_BLOCK, _QK | _VO | _FFN), offset=1.0),
    "gemma3_text": _gguf(
        _GGUF_PRE_NORMS | _GGUF_POST_NORMS | _GGUF_QK_NORMS, linear(_BLOCK, _QK | _VO | _FFN), offset=1.0
    ),
    "olmo2": _gguf(_GGUF_POST_NORMS | _GGUF_QK_NORMS, linear(_BLOCK, _QK | _VO | _FFN)),
    "phi3": _gguf(_GGUF_PRE_NORMS, linear(_BLOCK, _QKV | _VO | {"ffn_up": "mlp.gate mlp.up", "ffn_down": "mlp.down"})),
    "gpt_neox": _GGUF_GPT,
    "gpt2": _GGUF_GPT,
}

# The way back: from parameters to the hub's names.

_CHOSEN = {_MODEL: "model.", _HEAD: "", _NEOX: "gpt_neox.", _GPT: "transformer."}  # the prefixes transformers saves


def hub_name(row: Row, layer: int | None) -> str:
    """The name that transformers gives a tensor of a row of ``HUB``; ``layer`` is None for one outside the blocks."""
    name = row.pattern.pattern
    for prefix, chosen in _CHOSEN.items():
        name = name.replace(prefix, re.escape(chosen))
    return re.sub(r"\\(.)", r"\1", name.replace(r"(\d+)", str(layer)))


def is_stacked(row: Row) -> bool:
    """Whether there is a tensor of this row in every layer."""
    return row.paths[0][0] == "blocks"
