"""What a decoder looks like: the fields that tell one family of causal language models from another.

Readers of config.json (``families``) and of GGUF metadata (``gguf``) fill these fields; the decoder obeys them.
"""

import dataclasses
from typing import Literal

from jaxscape.errors import InputError


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021): feature i of a head turns with feature i + R/2 of its first R.

    Attributes:
      frequencies: R/2 angles a position, in radians; any scaling of the context is in them.
      magnitude: cosines and sines are multiplied by this (YaRN, LongRoPE).
      long_frequencies: used instead for rows longer than ``long_from`` tokens (LongRoPE); None: never.
      long_from: tokens the checkpoint was first trained on; only with ``long_frequencies``.
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0
    long_frequencies: tuple[float, ...] | None = None
    long_from: int = 0


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What the attention of some layers has and that of others hasn't.

    Attributes:
      window: a token sees itself and the ``window - 1`` before it; None: all before it.
      rotary: how queries and keys are turned; None: not at all.
    """

    window: int | None = None
    rotary: Rotary | None = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Shape and constants of a decoder; the defaults of the optional fields are Llama's.

    Attributes:
      vocab_size: rows of the embedding table, V.
      width: features of the residual stream, D.
      num_layers: blocks, L.
      num_heads: query heads, H.
      num_kv_heads: key and value heads, K; divides ``num_heads``.
      head_dim: features a head, F.
      mlp_width: features of the MLP.
      norm_eps: epsilon of every norm.
      tie_embeddings: the output head is the embedding table.
      max_positions: longest sequence the checkpoint was made for, in tokens.
      kinds: the kinds of layers there are.
      layer_kinds: index into ``kinds`` of each layer; () where all are of the first kind.
      family: name of the row of the tables of tensor names (config.json's ``model_type``).
      norm: "rms" (scale alone) or "layer" (mean removed, scale and bias).
      norm_offset: added to the stored scale of every norm (Gemma stores scale - 1).
      pre_norms: attention and MLP read the normed stream (``input_norm``, ``mlp_norm``).
      post_norms: what attention and MLP add to the stream is normed (``attention_out_norm``, ``mlp_out_norm``).
      parallel: attention and MLP read the same stream, and both are added to it (GPT-NeoX).
      qk_norm: RMS norm of queries and keys before they turn: None, "head" (each head's F features) or "width"
        (all heads' features together).
      qkv_bias: q, k and v have biases.
      out_bias: so has o.
      mlp_bias: so have the MLP's projections.
      gated: the MLP is down(act(gate x) * up x); else down(act(up x)).
      activation: "silu", "gelu" (exact) or "gelu_tanh".
      attention_scale: scores are q . k times this; None: head_dim ** -0.5.
      attention_softcap: scores become cap * tanh(scores / cap); None: left as they are.
      final_softcap: likewise for the logits.
      embedding_scale: embeddings are multiplied by this.
      learned_positions: rows of the table of position embeddings added to the stream; 0: none.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    tie_embeddings: bool
    max_positions: int
    kinds: tuple[LayerKind, ...]
    layer_kinds: tuple[int, ...] = ()
    family: str = "llama"
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    qk_norm: Literal["head", "width"] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    learned_positions: int = 0

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
                "check the checkpoint's configuration"
            )
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise InputError(
                f"layer_kinds names {len(self.layer_kinds)} layers, num_layers is {self.num_layers}; "
                "check the checkpoint's configuration"
            )

    @property
    def kind_of_layer(self) -> tuple[int, ...]:
        """Index into ``kinds``, layer by layer."""
        return self.layer_kinds or (0,) * self.num_layers
