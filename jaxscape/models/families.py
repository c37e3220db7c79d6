"""The families: a model's own config.json -> ``Architecture``.

One small reader for each ``model_type``. A reader asks for the fields it understands; whatever it has not asked for
must be known to change no number, or have the one value that is implemented, or the file is refused: nothing is
ignored silently. Fields that are missing have the values transformers gives them, or
are asked for where those would be a guess at the shape. Both of its layouts are read: that
of version 4 (``rope_theta``, ``rope_scaling``) and that of version 5 (``rope_parameters``).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxscape.errors import InputError
from jaxscape.models.architecture import Architecture, LayerKind, Rotary
from jaxscape.models.rotary import frequencies, positive

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip

# Fields that change no state of a forward pass: names and versions, dropout (off here) and initialisation, special
# tokens, generation, heads of other tasks, how PyTorch stores and runs the model.
_HARMLESS = frozenset({
    "model_type", "architectures", "auto_map", "transformers_version", "_name_or_path", "name_or_path",
    "_commit_hash", "tokenizer_class", "transformers.js_config", "is_llama_config", "unsloth_fixed",
    "unsloth_version", "initializer_range", "attention_dropout", "hidden_dropout", "classifier_dropout",
    "attention_probs_dropout_prob", "hidden_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id",
    "decoder_start_token_id", "use_cache", "cache_implementation", "max_length", "min_length", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p",
    "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "return_dict_in_generate", "output_scores", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens", "prefix", "finetuning_task", "task_specific_params", "id2label", "label2id",
    "num_labels", "problem_type", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "torch_dtype", "dtype", "torchscript", "use_bfloat16",
    "gradient_checkpointing", "chunk_size_feed_forward", "pretraining_tp", "output_hidden_states",
    "output_attentions", "return_dict", "tie_last_hidden_states", "attn_implementation", "_attn_implementation",
    "_attn_implementation_autoset", "tf_legacy_loss", "tie_encoder_decoder", "is_decoder", "n_ctx",
    "model_max_length", "max_sequence_length",
})  # fmt: skip

# Fields that change the numbers, with the one value that a reader which does not ask for them implements.
_ONLY = {
    "attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "use_sliding_window": False,
    "use_bidirectional_attention": False, "use_mrope": False, "rope_interleaved": False, "is_encoder_decoder": False,
    "add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
    "full_attn_mod": 1, "interpolate_factor": 1, "pruned_heads": {}, "per_layer_config": {}, "partial_rotary_factor": 1,
    "sliding_window": None, "layer_types": None, "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "quantization_config": None,
}  # fmt: skip

_FULL, _SLIDING = "full_attention", "sliding_attention"


class _Fields:
    """A config.json that remembers which of its fields were asked for."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self._config, self.where = {**defaults, **config}, where
        self._asked: set[str] = set()

    def get(self, name: str) -> Any:
        """The field; None where it is missing or null."""
        self._asked.add(name)
        return self._config.get(name)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer that must be there, unless it has a default."""
        value = self.get(name)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.where}: field {name!r} is missing; is this the configuration of a "
                             f"{self._config.get('model_type')!r} model?")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{self.where}: {name} = {value!r} is not a positive integer")
        return value

    def number(self, name: str) -> float:
        """A positive number that must be there."""
        if self.get(name) is None:
            raise InputError(f"{self.where}: field {name!r} is missing; is this the configuration of a "
                             f"{self._config.get('model_type')!r} model?")
        return float(positive(self.get(name), f"{self.where}: {name}"))

    def cap(self, name: str) -> float | None:
        """A positive number, or None for no cap."""
        return None if self.get(name) is None else self.number(name)

    def flag(self, name: str) -> bool:
        """True or false; null is false."""
        value = self.get(name)
        if value not in (True, False, None):
            raise InputError(f"{self.where}: {name} = {value!r} is neither true nor false")
        return bool(value)

    def choice(self, name: str, choices: Mapping[str, str]) -> str:
        """What ``choices`` has for the field's value."""
        value = self.get(name)
        if not isinstance(value, str) or value not in choices:
            raise InputError(f"{self.where}: {name} = {value!r} is not implemented; implemented: {', '.join(choices)}")
        return choices[value]

    def mapping(self, name: str) -> dict[str, Any]:
        """A copy of an object of fields; empty where it is missing or null."""
        value = self.get(name) or {}
        if not isinstance(value, Mapping):
            raise InputError(f"{self.where}: {name} = {value!r} is not an object")
        return dict(value)

    def agreed(self, *values: tuple[str, Any]) -> Any:
        """The value that those of the (name, value) pairs have that are not None, or None."""
        given = [pair for pair in values if pair[1] is not None]
        for name, value in given[1:]:
            if value != given[0][1]:
                raise InputError(f"{self.where}: {given[0][0]} = {given[0][1]!r} but {name} = {value!r}; "
                                 "keep the right one")
        return given[0][1] if given else None

    def refuse_the_rest(self) -> None:
        """Refuses the fields nobody asked for, unless they are known to change nothing; null is not a value."""
        rest = {name: value for name, value in self._config.items()
                if name not in self._asked | _HARMLESS and value is not None}  # fmt: skip
        for name, value in rest.items():
            if name in _ONLY and value != _ONLY[name]:
                raise InputError(f"{self.where}: {name} = {value!r} is not implemented for model_type "
                                 f"{self._config['model_type']!r}; implemented: {_ONLY[name]!r}")
        unknown = ", ".join(sorted(set(rest) - set(_ONLY)))
        if unknown:
            raise InputError(f"{self.where}: {unknown} is not implemented for model_type "
                             f"{self._config['model_type']!r}; remove it from the file if it changes nothing")


def _head_dim(f: _Fields, width: int, heads: int) -> int:
    given = f.get("head_dim")
    if given is None and width % heads:
        raise InputError(f"{f.where}: hidden size {width} is not a multiple of {heads} heads, and head_dim is missing")
    return width // heads if given is None else f.size("head_dim")


def _decoder(f: _Fields, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The fields of an ``Architecture`` that a Llama and its descendants have in common."""
    width, heads = f.size("hidden_size"), f.size("num_attention_heads")
    if heads % (kv_heads := f.size("num_key_value_heads", heads)):
        raise InputError(f"{f.where}: {heads} heads are not a multiple of num_key_value_heads = {kv_heads}")
    return dict(
        vocab_size=f.size("vocab_size"),
        width=width,
        num_layers=f.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(f, width, heads),
        mlp_width=f.size("intermediate_size"),
        norm_eps=f.number("rms_norm_eps"),
        tie_embeddings=f.flag("tie_word_embeddings"),
        max_positions=f.size("max_position_embeddings"),
        activation=f.choice(activation, ACTIVATIONS),
        family=f.get("model_type"),
    )


def _rope_parameters(f: _Fields) -> tuple[str, dict[str, Any]]:
    """(what they are called, the rotary parameters), in whichever layout they are written."""
    old, new = f.mapping("rope_scaling"), f.mapping("rope_parameters")
    if old and new and old != new:
        raise InputError(f"{f.where}: rope_scaling and rope_parameters differ; keep the right one")
    return ("rope_parameters", new) if new else ("rope_scaling", old)


def _rotary(
    f: _Fields, head_dim: int, *, theta: Sequence[str] = ("rope_theta",), default_theta: float = 10_000.0,
    share: Sequence[str] = (), default_share: float = 1.0, aliases: Mapping[str, str] | None = None,
) -> Rotary:
    """The rotary embedding of a model whose layers all turn alike.

    Args:
      f: the configuration.
      head_dim: features a head.
      theta: version 4's names of the base.
      default_theta: the base where none is given.
      share: version 4's names of the share of a head's features that turn; (): the family turns them all.
      default_share: the share where none is given.
      aliases: other names of types of scaling.
    """  # fmt: skip
    name, parameters = _rope_parameters(f)
    key = f"{name}.partial_rotary_factor"
    part = f.agreed((key, parameters.pop("partial_rotary_factor", None)), *((field, f.get(field)) for field in share))
    if not share and part not in (None, 1):
        raise InputError(f"{f.where}: {key} = {part!r} is not implemented; implemented: 1.0")
    part = default_share if part is None else positive(part, f"{f.where}: {(*share, key)[0]}")
    features = int(head_dim * part)
    if not 2 <= features <= head_dim:
        raise InputError(f"{f.where}: {(*share, key)[0]} = {part!r} turns {features} of {head_dim} features; "
                         "check the checkpoint's configuration")
    base = f.agreed((f"{name}.rope_theta", parameters.pop("rope_theta", None)), *((n, f.get(n)) for n in theta))
    return _scaled(f, name, parameters, default_theta if base is None else base, features, aliases or {})


def _scaled(
    f: _Fields, name: str, parameters: dict[str, Any], theta: float, features: int, aliases: Mapping[str, str]
) -> Rotary:
    """The rotary embedding of parameters that ``theta`` and the share of features were taken from."""
    types = [(f"{name}.{key}", parameters.pop(key, None)) for key in ("rope_type", "type")]
    rope_type = f.agreed(*((key, aliases.get(str(value), value)) for key, value in types))
    key = "original_max_position_embeddings"
    if (original := f.agreed((key, f.get(key)), (f"{name}.{key}", parameters.get(key)))) is not None:
        parameters[key] = original
    where = f"{f.where}: {name}"
    rope_type = "default" if rope_type is None else str(rope_type)
    return frequencies(rope_type, theta, features, parameters, f.size("max_position_embeddings"), where)


def _kinds(f: _Fields, layers: Sequence[LayerKind]) -> dict[str, Any]:
    """The layers' kinds as ``Architecture`` has them.

    A window longer than any sequence the checkpoint was made for (Phi-4-mini's) is none: that attention is faster.
    """
    longest = f.size("max_position_embeddings")
    layers = [LayerKind(None, layer.rotary) if (layer.window or 0) >= longest else layer for layer in layers]
    kinds = tuple(dict.fromkeys(layers))
    return {"kinds": kinds, "layer_kinds": () if len(kinds) == 1 else tuple(kinds.index(layer) for layer in layers)}


def _layer_types(f: _Fields, window: int | None, default: Sequence[str]) -> Sequence[str]:
    """``layer_types``, checked: as many as there are layers, and none that slides where there is no window."""
    types = f.get("layer_types")
    types = default if types is None else types
    if not isinstance(types, list | tuple) or len(types) != len(default):
        raise InputError(f"{f.where}: layer_types does not name {len(default)} layers")
    for name in types:
        if name not in (_FULL, _SLIDING):
            raise InputError(f"{f.where}: layer_types: {name!r} is not implemented; implemented: {_FULL}, {_SLIDING}")
    if window is None and _SLIDING in types:
        raise InputError(f"{f.where}: layer_types names {_SLIDING}, but there is no sliding_window; "
                         "check use_sliding_window and sliding_window")
    return types


def _uniform(f: _Fields, layers: int, rotary: Rotary, window: int | None = None) -> dict[str, Any]:
    """Layers that are all alike; ``layer_types``, which these families have no use for, must say the same."""
    default = [_FULL if window is None else _SLIDING] * layers
    if list(_layer_types(f, window, default)) != default:
        raise InputError(f"{f.where}: layer_types that differ are not implemented for model_type "
                         f"{f.get('model_type')!r}; all its layers are {default[0]}")
    return _kinds(f, [LayerKind(window, rotary)])


def _window(f: _Fields) -> int | None:
    """``sliding_window``; None where it is null."""
    return None if f.get("sliding_window") is None else f.size("sliding_window")


def _switched_window(f: _Fields) -> int | None:
    """``sliding_window``; None where ``use_sliding_window`` doesn't say that it is used."""
    window = _window(f)
    return window if f.flag("use_sliding_window") else None


def _llama(f: _Fields) -> Architecture:
    shape, bias = _decoder(f), f.flag("attention_bias")
    kinds = _uniform(f, shape["num_layers"], _rotary(f, shape["head_dim"]))
    return Architecture(**shape, **kinds, qkv_bias=bias, out_bias=bias, mlp_bias=f.flag("mlp_bias"))


def _mistral(f: _Fields) -> Architecture:
    shape = _decoder(f)
    return Architecture(**shape, **_uniform(f, shape["num_layers"], _rotary(f, shape["head_dim"]), _window(f)))


def _late_windows(f: _Fields, shape: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's layers: those from ``max_window_layers`` on slide, where windows are switched on."""
    window = _switched_window(f)
    first, layers = f.get("max_window_layers"), shape["num_layers"]
    if window is not None and (not isinstance(first, int) or first < 0):
        raise InputError(f"{f.where}: max_window_layers = {first!r} is not a number of layers")
    default = [_FULL if window is None or layer < first else _SLIDING for layer in range(layers)]
    rotary = _rotary(f, shape["head_dim"])
    return _kinds(f, [LayerKind(window if name == _SLIDING else None, rotary)
                   for name in _layer_types(f, window, default)])  # fmt: skip


def _qwen2(f: _Fields) -> Architecture:
    if f.get("attention_bias") is False:
        raise InputError(f"{f.where}: attention_bias = False is not implemented for model_type 'qwen2'; "
                         "its queries, keys and values have biases")
    shape = _decoder(f)
    return Architecture(**shape, **_late_windows(f, shape), qkv_bias=True)


def _qwen3(f: _Fields) -> Architecture:
    shape, bias = _decoder(f), f.flag("attention_bias")
    return Architecture(**shape, **_late_windows(f, shape), qk_norm="head", qkv_bias=bias, out_bias=bias)


def _gemma(f: _Fields, kinds: Sequence[LayerKind], shape: Mapping[str, Any], **fields) -> Architecture:
    """What Gemma 2 and 3 have in common.

    transformers rounds the scale of the embeddings, sqrt(D), to the dtype of the parameters; so does the decoder.
    """
    bias = f.flag("attention_bias")
    return Architecture(
        **shape, **_kinds(f, kinds), **fields, norm_offset=1.0, post_norms=True, qkv_bias=bias, out_bias=bias,
        embedding_scale=shape["width"] ** 0.5, attention_scale=f.number("query_pre_attn_scalar") ** -0.5,
        final_softcap=f.cap("final_logit_softcapping"),
    )  # fmt: skip


def _gemma2(f: _Fields) -> Architecture:
    f.agreed(("hidden_activation", f.get("hidden_activation")), ("hidden_act", f.get("hidden_act")))
    f.agreed(("sliding_window", f.get("sliding_window")), ("sliding_window_size", f.get("sliding_window_size")))
    shape, window = _decoder(f, activation="hidden_activation"), _window(f)
    default = [_FULL if layer % 2 else _SLIDING for layer in range(shape["num_layers"])]
    rotary = _rotary(f, shape["head_dim"])
    kinds = [LayerKind(window if name == _SLIDING else None, rotary) for name in _layer_types(f, window, default)]
    return _gemma(f, kinds, shape, attention_softcap=f.cap("attn_logit_softcapping"))


def _gemma3_rotary(f: _Fields, head_dim: int) -> dict[str, Rotary]:
    """Layer type -> rotary embedding: version 5 nests parameters by it, version 4's scaling is the full layers'."""
    nested, scaling = f.mapping("rope_parameters"), f.mapping("rope_scaling")
    if unknown := sorted(set(nested) - {_FULL, _SLIDING}):
        raise InputError(f"{f.where}: rope_parameters: {', '.join(unknown)} is not implemented; "
                         f"implemented: parameters for each of {_FULL}, {_SLIDING}")
    found = {}
    for name, base, default in ((_FULL, "rope_theta", 1e6), (_SLIDING, "rope_local_base_freq", 1e4)):
        where, parameters = f"rope_parameters.{name}", nested.get(name) or {}
        if not isinstance(parameters, Mapping):
            raise InputError(f"{f.where}: {where} = {parameters!r} is not an object")
        parameters = dict(parameters)
        if name == _FULL and scaling:
            parameters = f.agreed(("rope_scaling", scaling), (where, parameters or None))
        theta = f.agreed((f"{where}.rope_theta", parameters.pop("rope_theta", None)), (base, f.get(base)))
        found[name] = _scaled(f, where, parameters, default if theta is None else theta, head_dim, {})
    return found


def _gemma3_text(f: _Fields) -> Architecture:
    shape, window = _decoder(f, activation="hidden_activation"), _window(f)
    names = ("sliding_window_pattern", "_sliding_window_pattern")
    pattern = f.agreed(*((name, f.size(name)) for name in names if f.get(name) is not None)) or 6
    default = [_SLIDING if (layer + 1) % pattern else _FULL for layer in range(shape["num_layers"])]
    rotary = _gemma3_rotary(f, shape["head_dim"])
    kinds = [LayerKind(window if name == _SLIDING else None, rotary[name])
             for name in _layer_types(f, window, default)]  # fmt: skip
    return _gemma(f, kinds, shape, qk_norm="head")


def _phi3(f: _Fields) -> Architecture:
    shape = _decoder(f)
    aliases = {"su": "longrope", "yarn": "longrope"}  # what the first files called it
    rotary = _rotary(f, shape["head_dim"], share=("partial_rotary_factor",), aliases=aliases)
    return Architecture(**shape, **_uniform(f, shape["num_layers"], rotary, _window(f)))


def _olmo2(f: _Fields) -> Architecture:
    shape, bias = _decoder(f), f.flag("attention_bias")
    kinds = _uniform(f, shape["num_layers"], _rotary(f, shape["head_dim"]))
    return Architecture(
        **shape, **kinds, qk_norm="width", pre_norms=False, post_norms=True, qkv_bias=bias, out_bias=bias
    )


def _smollm3(f: _Fields) -> Architecture:
    shape, bias = _decoder(f), f.flag("attention_bias")
    layers, interval = shape["num_layers"], f.size("no_rope_layer_interval")
    turned = f.get("no_rope_layers")  # 1 for a layer that turns, whatever the name says
    turned = [int((layer + 1) % interval != 0) for layer in range(layers)] if turned is None else turned
    if not isinstance(turned, list | tuple) or len(turned) < layers or any(turns not in (0, 1) for turns in turned):
        raise InputError(f"{f.where}: no_rope_layers is not a list of {layers} zeros and ones")
    turned = turned[:layers]
    window = _switched_window(f)
    f.get("max_window_layers")  # published, and used by nobody
    default = [_FULL if window is None or turns else _SLIDING for turns in turned]
    rotary = _rotary(f, shape["head_dim"], default_theta=2e6)
    kinds = _kinds(f, [LayerKind(window if name == _SLIDING else None, rotary if turns else None)
                    for name, turns in zip(_layer_types(f, window, default), turned, strict=True)])  # fmt: skip
    return Architecture(**shape, **kinds, qkv_bias=bias, out_bias=bias, mlp_bias=f.flag("mlp_bias"))


def _gpt_neox(f: _Fields) -> Architecture:
    width, heads, bias = f.size("hidden_size"), f.size("num_attention_heads"), f.flag("attention_bias")
    head_dim = _head_dim(f, width, heads)
    if head_dim * heads != width:
        raise InputError(f"{f.where}: head_dim = {head_dim} is not implemented; implemented: {width // heads}")
    rotary = _rotary(f, head_dim, theta=("rotary_emb_base", "rope_theta"),
                     share=("rotary_pct", "partial_rotary_factor"), default_share=0.25)  # fmt: skip
    return Architecture(
        vocab_size=f.size("vocab_size"), width=width, num_layers=f.size("num_hidden_layers"), num_heads=heads,
        num_kv_heads=heads, head_dim=head_dim, mlp_width=f.size("intermediate_size"),
        norm_eps=f.number("layer_norm_eps"), tie_embeddings=f.flag("tie_word_embeddings"),
        max_positions=f.size("max_position_embeddings"), kinds=(LayerKind(rotary=rotary),), family="gpt_neox",
        norm="layer", parallel=f.flag("use_parallel_residual"), qkv_bias=bias, out_bias=bias, mlp_bias=True,
        gated=False, activation=f.choice("hidden_act", ACTIVATIONS),
    )  # fmt: skip


def _gpt2(f: _Fields) -> Architecture:
    width, heads, positions = f.size("n_embd"), f.size("n_head"), f.size("n_positions")
    if width % heads:
        raise InputError(f"{f.where}: n_embd {width} is not a multiple of n_head {heads}")
    return Architecture(
        vocab_size=f.size("vocab_size"), width=width, num_layers=f.size("n_layer"), num_heads=heads,
        num_kv_heads=heads, head_dim=width // heads, mlp_width=f.size("n_inner", 4 * width),
        norm_eps=f.number("layer_norm_epsilon"), tie_embeddings=f.flag("tie_word_embeddings"),
        max_positions=positions, kinds=(LayerKind(),), family="gpt2", norm="layer", qkv_bias=True, out_bias=True,
        mlp_bias=True, gated=False, activation=f.choice("activation_function", ACTIVATIONS),
        attention_scale=None if f.flag("scale_attn_weights") else 1.0, learned_positions=positions,
    )  # fmt: skip


class _Family(NamedTuple):
    """A reader, and what transformers takes the fields for that are missing from the file."""

    read: Callable[[_Fields], Architecture]
    defaults: Mapping[str, Any]


_LLAMA = {"hidden_act": "silu", "tie_word_embeddings": False}
_QWEN = _LLAMA | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096,
                  "max_window_layers": 28}  # fmt: skip
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "head_dim": 256,
          "sliding_window": 4096, "query_pre_attn_scalar": 256, "num_key_value_heads": 4}  # fmt: skip
FAMILIES = {
    "llama": _Family(_llama, _LLAMA | {"max_position_embeddings": 2048}),
    "mistral": _Family(_mistral, _LLAMA | {"max_position_embeddings": 131072, "num_key_value_heads": 8,
                                           "sliding_window": 4096}),
    "qwen2": _Family(_qwen2, _QWEN),
    "qwen3": _Family(_qwen3, _QWEN | {"head_dim": 128}),
    "gemma2": _Family(_gemma2, _GEMMA | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0,
                                         "final_logit_softcapping": 30.0}),
    "gemma3_text": _Family(_gemma3_text, _GEMMA | {  # the larger models' files leave out what is not said here
        "max_position_embeddings": 131072, "vocab_size": 262208, "num_attention_heads": 8, "rms_norm_eps": 1e-6}),
    "phi3": _Family(_phi3, _LLAMA | {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}),
    "olmo2": _Family(_olmo2, _LLAMA | {"max_position_embeddings": 2048}),
    "smollm3": _Family(_smollm3, _LLAMA | {"max_position_embeddings": 32768, "num_key_value_heads": 4,
                                           "no_rope_layer_interval": 4, "tie_word_embeddings": True}),
    "gpt_neox": _Family(_gpt_neox, {"hidden_act": "gelu", "tie_word_embeddings": False, "attention_bias": True,
                                    "use_parallel_residual": True, "max_position_embeddings": 2048}),
    "gpt2": _Family(_gpt2, {"activation_function": "gelu_new", "tie_word_embeddings": True, "scale_attn_weights": True,
                            "n_positions": 1024}),
}  # fmt: skip


def from_hf_config(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """Reads a Hugging Face ``config.json``.

    Args:
      config: the parsed file.
      where: how to call the file in errors.

    Raises:
      InputError: the model type or a field's value is not implemented, a field is not known, or one is missing.
    """
    model_type = config.get("model_type")
    if model_type == "gemma3":
        return _gemma3_of_images(config, where)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        implemented = ", ".join(repr(name) for name in (*FAMILIES, "gemma3"))
        raise InputError(f"{where}: model_type {model_type!r} is not implemented; implemented: {implemented}")
    family = FAMILIES[model_type]
    fields = _Fields(config, family.defaults, where)
    arch = family.read(fields)
    fields.refuse_the_rest()
    return arch


def _gemma3_of_images(config: Mapping[str, Any], where: str) -> Architecture:
    """The text model of a Gemma 3 that also reads images (4B and up); how it reads them is left alone."""
    outer = _Fields(config, {}, where)
    text = outer.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type", "gemma3_text") != "gemma3_text":
        raise InputError(f"{where}: text_config is not that of a 'gemma3_text' model")
    for name in ("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"):
        outer.get(name)
    tied = outer.agreed(*((name, held.get("tie_word_embeddings"))
                          for name, held in (("tie_word_embeddings", outer), ("text_config's", text))))  # fmt: skip
    outer.refuse_the_rest()
    text = {**text, "model_type": "gemma3_text"} | ({} if tied is None else {"tie_word_embeddings": tied})
    return from_hf_config(text, f"{where}: text_config")
