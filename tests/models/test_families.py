"""Reading config.json, and the numbers of every family: against what transformers computes on PyTorch."""

import copy
import functools
import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxscape.data.batches import BatchShape, pack
from jaxscape.models.architecture import Architecture, LayerKind
from jaxscape.models.decoder import SITES, Prefix
from jaxscape.models.families import FAMILIES, from_hf_config
from jaxscape.models.pretrained import load_pretrained
from jaxscape.models.rotary import frequencies
from jaxscape.models.sharding import make_mesh

FOLDER = Path(__file__).parents[1] / "fixtures" / "families"
# config.json as published, of 22 models; Phi-3-mini-128k's rope factors are stand-ins.
PUBLISHED = json.loads((FOLDER / "published.json").read_text())
CASES = sorted(path.parent.name for path in FOLDER.glob("*/golden.npz"))
PYTHIA, GPT2, GEMMA3 = "EleutherAI/pythia-1.4b", "openai-community/gpt2", "google/gemma-3-1b-it"
LLAMA, QWEN, PHI = "meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B", "microsoft/Phi-4-mini-instruct"
SMOLLM3, GEMMA2, MISTRAL = "HuggingFaceTB/SmolLM3-3B", "google/gemma-2-9b", "mistralai/Mistral-7B-v0.1"


def changed(model, **fields):
    """A published configuration with other fields; ``...`` leaves one out."""
    config = PUBLISHED[model] | fields
    return {name: value for name, value in config.items() if value is not ...}


def in_transformers(config):
    """The configuration as transformers understands it."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**copy.deepcopy(config))  # it writes into its arguments


# Reading config.json

# What sets the published models apart, by hand.
FACTS = {
    "meta-llama/Llama-2-7b-hf": dict(num_kv_heads=32, head_dim=128, tie_embeddings=False, max_positions=4096),
    "meta-llama/Llama-2-70b-hf": dict(num_layers=80, num_heads=64, num_kv_heads=8, head_dim=128),
    "meta-llama/Meta-Llama-3-8B": dict(vocab_size=128256, num_kv_heads=8, mlp_width=14336),
    "meta-llama/Llama-3.1-8B": dict(max_positions=131072, qkv_bias=False, norm_eps=1e-5, activation="silu"),
    "meta-llama/Llama-3.2-1B": dict(head_dim=64, width=2048, tie_embeddings=True),
    "HuggingFaceTB/SmolLM2-135M": dict(family="llama", num_heads=9, num_kv_heads=3, tie_embeddings=True),
    "mistralai/Mistral-7B-v0.1": dict(family="mistral", layer_kinds=()),
    "mistralai/Mistral-7B-v0.3": dict(vocab_size=32768, qkv_bias=False),
    "Qwen/Qwen2.5-7B": dict(family="qwen2", qkv_bias=True, out_bias=False, qk_norm=None, norm_eps=1e-6),
    "Qwen/Qwen3-8B": dict(family="qwen3", qkv_bias=False, qk_norm="head", head_dim=128),
    "google/gemma-2-9b": dict(norm_offset=1.0, post_norms=True, pre_norms=True, attention_softcap=50.0,
                              final_softcap=30.0, attention_scale=1 / 16, embedding_scale=3584**0.5,
                              activation="gelu_tanh", tie_embeddings=True, layer_kinds=(0, 1) * 21, head_dim=256),
    "google/gemma-3-1b-it": dict(family="gemma3_text", qk_norm="head", attention_softcap=None, final_softcap=None,
                                 layer_kinds=((0,) * 5 + (1,)) * 4 + (0, 0), num_kv_heads=1),
    "google/gemma-3-4b-it": dict(family="gemma3_text", num_heads=8, num_kv_heads=4, head_dim=256, vocab_size=262208,
                                 layer_kinds=((0,) * 5 + (1,)) * 5 + (0,) * 4, tie_embeddings=True),
    "microsoft/Phi-3-mini-4k-instruct": dict(family="phi3", head_dim=96, max_positions=4096),
    "microsoft/Phi-3-mini-128k-instruct": dict(layer_kinds=(), max_positions=131072),
    "microsoft/phi-4": dict(num_kv_heads=10, head_dim=128, width=5120),
    "microsoft/Phi-4-mini-instruct": dict(num_heads=24, head_dim=128, tie_embeddings=True),
    "allenai/OLMo-2-1124-7B": dict(qk_norm="width", pre_norms=False, post_norms=True, norm_offset=0.0),
    "HuggingFaceTB/SmolLM3-3B": dict(layer_kinds=(0, 0, 0, 1) * 9, tie_embeddings=True, head_dim=128),
    "EleutherAI/pythia-1.4b": dict(norm="layer", parallel=True, gated=False, qkv_bias=True, out_bias=True,
                                   mlp_bias=True, activation="gelu", tie_embeddings=False),
    "EleutherAI/gpt-neox-20b": dict(activation="gelu_tanh", parallel=True, num_heads=64),
    "openai-community/gpt2": dict(norm="layer", parallel=False, learned_positions=1024, mlp_width=3072,
                                  tie_embeddings=True, activation="gelu_tanh", attention_scale=None),
}  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configurations_are_read(model):
    arch = from_hf_config(PUBLISHED[model], model)
    assert {name: getattr(arch, name) for name in FACTS[model]} == FACTS[model]


def test_published_attention_of_each_layer():
    def kinds(model):
        return [(kind.window, kind.rotary and 2 * len(kind.rotary.frequencies))
                for kind in from_hf_config(PUBLISHED[model]).kinds]  # fmt: skip

    assert kinds("mistralai/Mistral-7B-v0.3") == [(None, 128)]
    assert kinds(MISTRAL) == [(4096, 128)]
    assert kinds(QWEN) == [(None, 128)]  # a window, but switched off
    assert kinds("google/gemma-2-9b") == [(4096, 256), (None, 256)]
    assert kinds(GEMMA3) == [(512, 256), (None, 256)]
    assert kinds("microsoft/Phi-3-mini-4k-instruct") == [(2047, 96)]
    assert kinds(PHI) == [(None, 96)]  # its window is longer than its longest sequence
    assert kinds(SMOLLM3) == [(None, 128), (None, None)]
    assert kinds(PYTHIA) == [(None, 32)]
    assert kinds(GPT2) == [(None, None)]


def test_a_llama_field_by_field():
    config = changed(LLAMA, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
                     intermediate_size=64, vocab_size=96, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-4)
    scaling = {name: value for name, value in config["rope_scaling"].items() if name != "rope_type"}
    rotary = frequencies("llama3", 5e5, 8, scaling, 131072)
    assert from_hf_config(config) == Architecture(
        vocab_size=96, width=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64, norm_eps=1e-4,
        tie_embeddings=False, max_positions=131072, kinds=(LayerKind(rotary=rotary),), qkv_bias=True, out_bias=True,
        mlp_bias=True)  # fmt: skip


@pytest.mark.parametrize("model", PUBLISHED)
def test_both_layouts_of_transformers_say_the_same(model):
    """A configuration of version 4 reads like what transformers 5 writes for it, short and in full."""
    theirs = in_transformers(PUBLISHED[model])
    for short in (True, False):
        config = json.loads(theirs.to_json_string(use_diff=short))
        assert from_hf_config(config | {"model_type": theirs.model_type}) == from_hf_config(PUBLISHED[model])


MINIMAL = {
    "hidden_size": 256, "num_attention_heads": 32, "num_hidden_layers": 30, "intermediate_size": 96, "vocab_size": 500,
    "rms_norm_eps": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize("model_type", FAMILIES)
def test_missing_fields_have_the_values_transformers_gives_them(model_type):
    config = MINIMAL
    if model_type == "gpt_neox":
        config = {name: value for name, value in MINIMAL.items() if name != "rms_norm_eps"} | {"layer_norm_eps": 1e-6}
    if model_type == "gpt2":
        config = {"vocab_size": 500, "n_embd": 64, "n_head": 4, "n_layer": 3, "layer_norm_epsilon": 1e-6}
    whole = json.loads(in_transformers(config | {"model_type": model_type}).to_json_string(use_diff=False))
    assert from_hf_config(config | {"model_type": model_type}) == from_hf_config(whole | {"model_type": model_type})


@pytest.mark.parametrize("model", [model for model in PUBLISHED if model != GPT2])
def test_frequencies_are_those_of_transformers_own_model(model):
    """To the last bit but two, by kind of layer."""
    pytest.importorskip("torch")
    config = in_transformers(PUBLISHED[model]).get_text_config()
    module = importlib.import_module(f"transformers.models.{config.model_type.removesuffix('_text')}.modeling_"
                                     f"{config.model_type.removesuffix('_text')}")  # fmt: skip
    name = next(name for name in vars(module) if name.endswith("RotaryEmbedding"))
    theirs, arch = getattr(module, name)(config), from_hf_config(PUBLISHED[model])
    types = getattr(config, "layer_types", None) or ["full_attention"] * arch.num_layers
    seen = 0
    for layer_type, number in set(zip(types, arch.kind_of_layer, strict=True)):
        found = arch.kinds[number].rotary
        if found is not None:
            prefix = f"{layer_type}_" if hasattr(theirs, f"{layer_type}_inv_freq") else ""
            expected = getattr(theirs, f"{prefix}inv_freq").numpy()
            np.testing.assert_array_max_ulp(np.float32(found.frequencies), expected, 2)
            assert found.magnitude == pytest.approx(getattr(theirs, f"{prefix}attention_scaling"), rel=1e-12)
            seen += 1
    assert seen == sum(kind.rotary is not None for kind in arch.kinds)


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        (LLAMA, {"model_type": "mixtral"}, ["model_type 'mixtral'", "implemented: 'llama'", "'gemma3'"]),
        (LLAMA, {"model_type": None}, ["model_type None"]),
        (LLAMA, {"hidden_act": "relu"}, ["hidden_act = 'relu'", "gelu_new"]),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling", "'dynamic'"]),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ["rope_scaling", "'low_freq_factor'"]),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 1}}, ["rope_scaling", "alpha"]),
        (LLAMA, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
        (LLAMA, {"rope_scaling": {"partial_rotary_factor": 0.5}}, ["rope_scaling.partial_rotary_factor = 0.5"]),
        (LLAMA, {"sliding_window": 4096}, ["sliding_window = 4096", "'llama'"]),
        (LLAMA, {"layer_types": ["full_attention"] * 31 + ["sliding_attention"]}, ["layer_types", "sliding_window"]),
        (LLAMA, {"quantization_config": {"bits": 4}}, ["quantization_config"]),
        (LLAMA, {"num_local_experts": 8, "router_jitter": 0.1}, ["num_local_experts, router_jitter", "'llama'"]),
        (LLAMA, {"rope_interleaved": True}, ["rope_interleaved = True"]),
        (LLAMA, {"is_encoder_decoder": True}, ["is_encoder_decoder = True"]),
        (MISTRAL, {"attention_bias": True}, ["attention_bias = True"]),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, ["layer_types", "'mistral'", "sliding_attention"]),
        (QWEN, {"attention_bias": False}, ["attention_bias = False"]),
        (QWEN, {"use_mrope": True}, ["use_mrope = True"]),
        (QWEN, {"layer_types": ["full_attention"] * 27}, ["layer_types", "28 layers"]),
        (QWEN, {"layer_types": ["linear_attention"] * 28}, ["layer_types", "'linear_attention'"]),
        (QWEN, {"layer_types": ["sliding_attention"] * 28}, ["layer_types", "use_sliding_window"]),
        (QWEN, {"use_sliding_window": True, "max_window_layers": None}, ["max_window_layers"]),
        (GEMMA2, {"use_bidirectional_attention": True}, ["use_bidirectional_attention = True"]),
        (GEMMA2, {"hidden_act": "gelu"}, ["hidden_activation", "hidden_act = 'gelu'"]),
        (GEMMA2, {"sliding_window_size": 2048}, ["sliding_window = 4096", "sliding_window_size = 2048"]),
        (GEMMA2, {"final_logit_softcapping": 0.0}, ["final_logit_softcapping = 0.0"]),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping = 50.0"]),
        (GEMMA3, {"rope_parameters": {"rope_type": "default"}}, ["rope_parameters", "rope_type"]),
        (GEMMA3, {"rope_parameters": {"full_attention": 1e4}}, ["rope_parameters.full_attention = 10000.0"]),
        (GEMMA3, {"rope_scaling": {"type": "yarn"}, "rope_parameters": {"full_attention": {"type": "linear"}}},
         ["rope_scaling", "rope_parameters.full_attention"]),
        (GEMMA3, {"sliding_window": None}, ["sliding_window"]),
        ("google/gemma-3-4b-it", {"text_config": None}, ["text_config"]),
        ("google/gemma-3-4b-it", {"audio_config": {}}, ["audio_config"]),
        ("google/gemma-3-4b-it", {"text_config": {"model_type": "gemma3n_text"}}, ["text_config"]),
        (PHI, {"lm_head_bias": True}, ["lm_head_bias = True"]),
        (PHI, {"full_attn_mod": 2}, ["full_attn_mod = 2"]),
        (PHI, {"partial_rotary_factor": 0.5}, ["short_factor", "32 numbers"]),
        (PHI, {"partial_rotary_factor": 1.5}, ["partial_rotary_factor = 1.5"]),
        (PHI, {"rope_scaling": PUBLISHED[PHI]["rope_scaling"] | {"original_max_position_embeddings": 8192}},
         ["original_max_position_embeddings = 4096", "8192"]),
        (SMOLLM3, {"no_rope_layers": [1] * 35}, ["no_rope_layers", "36"]),
        (SMOLLM3, {"no_rope_layers": [2] * 36}, ["no_rope_layers"]),
        (SMOLLM3, {"no_rope_layers": [[1]] * 36}, ["no_rope_layers"]),
        (PYTHIA, {"rotary_pct": 0}, ["rotary_pct = 0"]),
        (PYTHIA, {"partial_rotary_factor": 0.5}, ["rotary_pct = 0.25", "partial_rotary_factor = 0.5"]),
        (PYTHIA, {"head_dim": 64}, ["head_dim = 64", "128"]),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx = True"]),
        (GPT2, {"reorder_and_upcast_attn": True}, ["reorder_and_upcast_attn = True"]),
        (GPT2, {"add_cross_attention": True}, ["add_cross_attention = True"]),
        (GPT2, {"activation_function": "relu"}, ["activation_function = 'relu'"]),
        (GPT2, {"n_head": 7}, ["n_embd 768", "n_head 7"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(model, fields, words, raises_input_error):
    with raises_input_error("some/config.json", *words):
        from_hf_config(changed(model, **fields), "some/config.json")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": "4096"}, ["hidden_size = '4096'", "not a positive integer"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers = 0"]),
        ({"num_attention_heads": True}, ["num_attention_heads = True"]),
        ({"num_attention_heads": 24}, ["4096", "24 heads", "head_dim"]),
        ({"num_key_value_heads": 3}, ["32 heads", "num_key_value_heads = 3"]),
        ({"rms_norm_eps": -1e-5}, ["rms_norm_eps = -1e-05"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings = 'no'"]),
        ({"rope_scaling": "llama3"}, ["rope_scaling = 'llama3'"]),
        ({"rope_theta": 0}, ["rope_theta = 0"]),
        ({"hidden_act": ["silu"]}, ["hidden_act = ['silu']"]),
        ({"model_type": ["llama"]}, ["model_type ['llama']"]),
        ({"rope_scaling": {"rope_type": ["linear"]}}, ["rope_type", "linear", "not implemented"]),
        ({"rope_parameters": {"rope_type": "default"}}, ["rope_scaling and rope_parameters differ"]),
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 1e4}}, ["rope_theta = 10000.0", "500000.0"]),
        ({"rope_scaling": {"rope_type": "default", "type": "linear"}}, ["rope_scaling.type = 'linear'"]),
    ],
)
def test_nonsense_and_contradictions_are_refused(fields, words, raises_input_error):
    with raises_input_error("config.json", *words):
        from_hf_config(changed(LLAMA, **fields))


@pytest.mark.parametrize(
    ("model", "fields"),
    [(LLAMA, ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
              "rms_norm_eps"]),
     (PYTHIA, ["vocab_size", "hidden_size", "layer_norm_eps"]), (GPT2, ["vocab_size", "n_embd", "layer_norm_epsilon"])],
)  # fmt: skip
def test_missing_fields_are_named(model, fields, raises_input_error):
    for field in fields:
        for missing in (..., None):
            with raises_input_error("some/config.json", repr(field), "missing"):
                from_hf_config(changed(model, **{field: missing}), "some/config.json")


def test_windows_of_late_layers():
    arch = from_hf_config(changed(QWEN, use_sliding_window=True, sliding_window=64, max_window_layers=20))
    assert [arch.kinds[number].window for number in arch.kind_of_layer] == [None] * 20 + [64] * 8
    named = ["sliding_attention", "full_attention"] * 14
    arch = from_hf_config(changed(QWEN, use_sliding_window=True, sliding_window=64, layer_types=named))
    assert [arch.kinds[number].window for number in arch.kind_of_layer] == [64, None] * 14


def test_layers_without_positions_slide_where_windows_are_on():
    arch = from_hf_config(changed(SMOLLM3, use_sliding_window=True, sliding_window=64, layer_types=...,
                                  no_rope_layers=..., no_rope_layer_interval=2))
    kinds = [arch.kinds[number] for number in arch.kind_of_layer]
    assert [(kind.window, kind.rotary is None) for kind in kinds] == [(None, False), (64, True)] * 18


def test_fields_that_are_null_or_change_nothing_are_let_be():
    more = {"num_local_experts": None, "attention_dropout": 0.1, "torch_dtype": "float16", "pretraining_tp": 4,
            "unknown": None}  # fmt: skip
    assert from_hf_config(changed(LLAMA, **more)) == from_hf_config(PUBLISHED[LLAMA])


def test_first_phi3_files_called_longrope_otherwise():
    scaling = PUBLISHED[PHI]["rope_scaling"]
    for name in ("su", "yarn"):
        assert from_hf_config(changed(PHI, rope_scaling=scaling | {"type": name})) == from_hf_config(PUBLISHED[PHI])


# The numbers

BOUND = 2e-5  # relative norm of a difference of float32 states; the largest seen is 2e-6
SHAPE = BatchShape(96, 4, 64)  # of whole prompts
BEFORE, AFTER = BatchShape(48, 1, 48), BatchShape(32, 2, 24)  # of a shared prefix, of what follows it
POOLED = 5  # tokens at the end of a row whose states are averaged, as the fixtures have it


def relative(found, expected) -> np.ndarray:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def run_whole(graphdef, params, batch, pool_from):
    """States at every site the family has, means of the residuals from ``pool_from`` on, and logits."""
    model = nnx.merge(graphdef, params)
    out = model(batch, sites=SITES if model.arch.pre_norms else ("residual", "final_norm"))
    pooled = model(batch, sites=("residual",), pool_from=pool_from).states["residual"]
    return out.states | {"pooled": pooled, "logits": model.logits(out.hidden)[None]}


@functools.partial(jax.jit, static_argnums=0)
def run_before(graphdef, params, batch, row_lengths):
    out = nnx.merge(graphdef, params)(batch, keep_keys=True, row_lengths=row_lengths)
    return out.keys, out.values


@functools.partial(jax.jit, static_argnums=0)
def run_after(graphdef, params, batch, prefix):
    model = nnx.merge(graphdef, params)
    out = model(batch, prefix, sites=("residual",))
    return {"residual": out.states["residual"], "logits": model.logits(out.hidden)[None]}


def whole(model, rows):
    """Site -> [layer, row, feature] of prompts packed into one batch."""
    starts = np.array([len(row) - POOLED for row in rows] + [0] * (SHAPE.rows - len(rows)), np.int32)
    found = run_whole(model.graphdef, model.params, pack(rows, SHAPE), starts)
    return {site: np.asarray(states, np.float32)[:, : len(rows)] for site, states in found.items()}


def after_prefix(model, before, rows):
    """Site -> [layer, row, feature] of prompts that share what comes ``before`` them, run once."""
    length = np.array([len(before) + len(rows[0])], np.int32)
    keys, values = run_before(model.graphdef, model.params, pack([before], BEFORE), length)
    prefix = Prefix(keys, values, np.int32(len(before)))
    found = run_after(model.graphdef, model.params, pack(rows, AFTER), prefix)
    return {site: np.asarray(states, np.float32)[:, : len(rows)] for site, states in found.items()}


def assert_near(found, golden, rows):
    """Row r of ``found`` is what PyTorch found for its prompt ``rows[r]``, at every site and layer."""
    for site, states in found.items():
        for row, number in enumerate(rows):
            expected = golden[f"{site}_{number}"].reshape(states[:, row].shape)
            assert relative(states[:, row], expected).max() < BOUND, f"{site}, prompt {number}"


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(folder, what PyTorch computed with it, our model) of a tiny checkpoint."""
    folder = FOLDER / request.param
    return folder, np.load(folder / "golden.npz"), load_pretrained(folder, make_mesh())


def prompts(golden):
    return [golden[f"tokens_{number}"].tolist() for number in range(3)]


def test_states_and_logits_are_pytorchs(case):
    """Packed into one batch, and each alone; at all sites, layers and for means over tokens."""
    _, golden, model = case
    rows = prompts(golden)
    found = whole(model, rows)
    assert set(found) == {"pooled", "logits"} | (set(SITES) if model.arch.pre_norms else {"residual", "final_norm"})
    assert found["residual"].shape == (model.arch.num_layers, 3, model.arch.width)
    assert_near(found, golden, [0, 1, 2])
    for number in (2, 0):
        assert_near(whole(model, [rows[number]]), golden, [number])


def test_states_after_a_shared_prefix_are_pytorchs(case):
    """Prefixes shorter and longer than the windows; for LongRoPE, on one side and the other of the first training."""
    _, golden, model = case
    _, middle, long = prompts(golden)
    assert_near(after_prefix(model, middle[:9], [middle[9:]]), golden, [1])
    for split in (40, 47):
        rows = [long[split:], middle[:8]]  # the second only keeps the first company
        assert_near(after_prefix(model, long[:split], rows), golden, [2])


def test_bfloat16_strays_no_further_than_pytorchs(case):
    """From PyTorch's float32 states: at most 8 % anywhere, and in the root mean square over prompts and layers at most
    1.5 times as far as PyTorch's bfloat16, which rounds at other places."""
    folder, golden, _ = case
    found = whole(load_pretrained(folder, make_mesh(), "bfloat16"), prompts(golden))
    ours, theirs = [], []
    for number in range(3):
        for site in ("residual", "logits"):
            expected = np.atleast_2d(golden[f"{site}_{number}"])
            ours.append(relative(found[site][:, number], expected))
            theirs.append(relative(np.atleast_2d(golden[f"bfloat16_{site}_{number}"]), expected))
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    assert 1e-3 < ours.max() < 0.08
    assert np.mean(ours**2) < 1.5**2 * np.mean(theirs**2)


@pytest.mark.parametrize("name", CASES)
def test_fresh_weights_run_as_in_pytorch(name, tmp_path):
    """Other random weights, saved by transformers in float32 and in shards, read by the loader."""
    pytest.importorskip("torch")
    from tests.fixtures.make_families import build, random_prompts, run

    theirs, rows = build(name, 100), random_prompts(100)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = whole(load_pretrained(tmp_path, make_mesh()), rows)
    expected = {f"{site}_{number}": states
                for number, row in enumerate(rows) for site, states in run(theirs, row).items()}  # fmt: skip
    assert_near(found, expected, [0, 1, 2])


def test_text_part_of_a_gemma_3_that_reads_images(tmp_path):
    """Its configuration is nested, its tensors have a prefix, and others are not the decoder's."""
    torch = pytest.importorskip("torch")
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    from tests.fixtures.make_families import build, random_prompts

    text = build("gemma3", 200)
    images = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                  num_attention_heads=2, image_size=28, patch_size=14)  # fmt: skip
    theirs = Gemma3ForConditionalGeneration._from_config(
        Gemma3Config(text_config=text.config, vision_config=images, mm_tokens_per_image=4, image_token_index=95,
                     boi_token_index=94, eoi_token_index=93), attn_implementation="eager").eval()  # fmt: skip
    theirs.model.language_model.load_state_dict(text.model.state_dict())
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gemma3"
    rows = [[token % 90 for token in row] for row in random_prompts(200)]
    found = whole(load_pretrained(tmp_path, make_mesh()), rows)["logits"][0]
    with torch.no_grad():
        expected = [theirs(torch.tensor([row]), use_cache=False).logits[0, -1].numpy() for row in rows]
    assert relative(found, expected).max() < BOUND
