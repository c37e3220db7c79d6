"""GGUF files against the hub's folders of the same models, and against transformers' own reader of GGUF."""

import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from jaxscape.models.families import from_hf_config
from jaxscape.models.gguf import GgufFile, from_gguf_metadata
from jaxscape.models.pretrained import load_pretrained, values_of
from jaxscape.models.sharding import make_mesh
from tests import gguf_writer

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
PUBLISHED = json.loads((FAMILIES / "published.json").read_text())


def load(path, dtype="float32"):
    return load_pretrained(path, make_mesh(), dtype)


def assert_same_params(found, expected):
    found, expected = values_of(found.params), values_of(expected.params)
    assert set(found) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value), err_msg=".".join(path))


def assert_same_architecture(found, expected, rtol=0.0):
    """Alike but for the last digits of the frequencies, where a file has them as factors."""
    for mine, theirs in zip(found.kinds, expected.kinds, strict=True):
        assert mine.window == theirs.window and (mine.rotary is None) == (theirs.rotary is None)
        if mine.rotary is not None:
            for field in dataclasses.fields(mine.rotary):
                values = [getattr(kind.rotary, field.name) for kind in (mine, theirs)]
                assert (values[0] is None) == (values[1] is None), field.name
                if values[0] is not None:
                    np.testing.assert_allclose(*values, rtol=rtol, err_msg=field.name)
    assert dataclasses.replace(found, kinds=expected.kinds) == expected


# Every architecture. GGUF does not carry every field: those left out here are what llama.cpp takes for granted.

CASES = {
    "llama2": {}, "llama31": {}, "llama_yarn": {}, "llama_linear": {"hidden_act": "silu"},
    "qwen2": {"use_sliding_window": False, "layer_types": None}, "qwen3": {"attention_bias": False},
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3": {"query_pre_attn_scalar": 12, "sliding_window_pattern": 6, "_sliding_window_pattern": 6,
               "layer_types": None,
               "rope_parameters": {"full_attention": {"rope_theta": 1000.0, "rope_type": "linear", "factor": 4.0},
                                   "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}}},
    "phi3": {}, "phi4mini": {}, "olmo2": {}, "neox": {}, "neox_sequential": {}, "gpt2": {},
    "smollm3": {"no_rope_layer_interval": 4, "no_rope_layers": None, "use_sliding_window": False,
                "layer_types": None, "sliding_window": None},
}  # fmt: skip
# Scaled frequencies are products in one format and quotients in the other; a magnitude is rounded to float32.
APPROXIMATE = {"llama31": 1e-6, "phi3": 1e-6, "phi4mini": 1e-6}


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request, tmp_path_factory):
    """(case, hub-format folder, GGUF file) of one checkpoint with random weights."""
    case = request.param
    folder = tmp_path_factory.mktemp(case) / "hub"
    shutil.copytree(FAMILIES / case, folder)
    config = json.loads((folder / "config.json").read_text()) | CASES[case] | {"dtype": "float32"}
    tensors = load_file(folder / "model.safetensors")
    if case == "qwen3":  # its GGUF has no biases
        tensors = {name: value for name, value in tensors.items() if not name.endswith(".bias")}
        save_file(tensors, folder / "model.safetensors")
    config = {name: value for name, value in config.items() if value is not None or name not in CASES[case]}
    (folder / "config.json").write_text(json.dumps(config))
    return case, folder, gguf_writer.write(folder.parent / f"{case}.gguf", config, tensors, {"general.name": case})


def test_gguf_is_the_hub_folder_exactly(pair):
    case, folder, file = pair
    found, expected = load(file), load(folder)
    assert_same_architecture(found.arch, expected.arch, APPROXIMATE.get(case, 0))
    assert_same_params(found, expected)


READ_BY_TRANSFORMERS = ("llama2", "llama31", "llama_linear", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi4mini",
                        "gpt2")  # fmt: skip


def test_gguf_is_what_transformers_reads_in_it(pair):
    """Its reader gives the tensors back that were written: so the files here are as it expects them."""
    case, folder, file = pair
    if case not in READ_BY_TRANSFORMERS:
        pytest.skip("transformers does not read this architecture from GGUF, or not this variant")
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)  # its own reading of metadata leaves out head sizes and more
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype="float32")
    theirs = theirs.state_dict()
    tensors = load_file(folder / "model.safetensors")
    assert len(tensors) >= 20
    for name, value in tensors.items():
        np.testing.assert_allclose(theirs[name].numpy(), value.astype(np.float32), rtol=0, atol=2e-7, err_msg=name)


LOST = {"mistralai/Mistral-7B-v0.1": {"sliding_window": None}}  # no key of a GGUF's Llama has Mistral's window
OTHER_FAMILY = {"mistral": "llama"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_metadata_of_published_models_is_read_as_their_config(name):
    config = PUBLISHED[name] | LOST.get(name, {})
    expected = from_hf_config(config)
    text = config | config.get("text_config", {})
    if text["model_type"] == "gemma3_text":
        text = {"max_position_embeddings": 131072, "num_attention_heads": 8, "num_key_value_heads": 4,
                "rms_norm_eps": 1e-6, "head_dim": 256, "vocab_size": 262208} | text  # fmt: skip
    shapes = {"token_embd.weight": (expected.vocab_size, expected.width)}
    shapes |= {} if expected.tie_embeddings else {"output.weight": (expected.vocab_size, expected.width)}
    shapes |= {"blk.0.attn_qkv.bias": (3,)} if expected.family == "gpt_neox" else {}
    factors = gguf_writer.factors_of(text)
    shapes |= {tensor: value.shape for tensor, value in factors.items()}
    keys = {key: float(np.float32(value)) if isinstance(value, float) else value
            for key, value in gguf_writer.keys_of(text).items()}  # fmt: skip
    found = from_gguf_metadata({key: _as_read(value) for key, value in keys.items()}, shapes, "x.gguf", factors)
    expected = dataclasses.replace(expected, family=OTHER_FAMILY.get(expected.family, expected.family))
    assert_same_architecture(found, expected, 1e-6)


def _as_read(value):
    return float(str(np.float32(value))) if isinstance(value, float) else value


def test_numbers_read_are_those_of_the_config(write_gguf, tmp_path):
    """Though GGUF has them in float32."""
    metadata = {"llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 123456.7}
    file = GgufFile(write_gguf(tmp_path / "tiny.gguf", metadata=metadata))
    assert {key: file.metadata()[key] for key in metadata} == metadata


# Quantisations

DEQUANTISED = [kind for kind in gguf.GGMLQuantizationType
               if kind in gguf.quants._type_traits or kind.name in ("F32", "F16")]  # fmt: skip


@pytest.mark.parametrize("kind", DEQUANTISED, ids=lambda kind: kind.name)
def test_rows_of_any_quantisation_are_those_of_the_whole(kind, tmp_path):
    """Random bytes: what they mean is gguf's to say, which rows they are is ours."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 100, (9, 512 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    assert file.problem("blk.0.ffn_up.weight") is None
    assert file.shapes() == {"blk.0.ffn_up.weight": (9, 512)}
    expected = dequantize(data, kind)
    assert np.unique(expected).size > 1
    for first, last in ((0, 9), (3, 5), (8, 9)):
        np.testing.assert_array_equal(file.read("blk.0.ffn_up.weight", first, last), expected[first:last])


@pytest.fixture
def hub_folder(tiny_llama, tmp_path):
    """``hub_folder(tensors)`` -> a copy of the tiny model's folder with these weights."""

    def make(tensors, **config):
        folder = tmp_path / "hub"
        shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        fields = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(fields))
        return folder

    return make


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_quantised_gguf_is_the_folder_of_its_dequantised_weights(
    quantization, tiny_tensors, tiny_model, hub_folder, write_gguf, tmp_path
):
    as_type = gguf.GGMLQuantizationType[quantization]
    rounded = {
        name: dequantize(quantize(value, as_type), as_type) if value.ndim == 2 else value
        for name, value in tiny_tensors.items()
    }
    model = load(write_gguf(tmp_path / "tiny.gguf", quantization=quantization))
    assert_same_params(model, load(hub_folder(rounded)))
    kernel = ("blocks", "attention", "q", "kernel")
    assert not np.array_equal(values_of(model.params)[kernel], values_of(tiny_model.params)[kernel])


# What may be left out


def test_untied_gguf_has_its_own_head(tiny_tensors, write_gguf, tmp_path):
    head = np.random.default_rng(0).normal(size=(384, 32)).astype(np.float32)
    model = load(write_gguf(tmp_path / "tiny.gguf", tensors=tiny_tensors | {"lm_head.weight": head}))
    assert not model.arch.tie_embeddings
    np.testing.assert_array_equal(values_of(model.params)["head",], head)


def test_gguf_without_the_count_of_kv_heads_has_one_a_query_head(tiny_tensors, hub_folder, write_gguf, tmp_path):
    rng = np.random.default_rng(0)
    square = {name: rng.normal(size=(32, 32)).astype(np.float32) if "k_proj" in name or "v_proj" in name else value
              for name, value in tiny_tensors.items()}  # fmt: skip
    path = write_gguf(tmp_path / "tiny.gguf", tensors=square, config={"num_key_value_heads": None})
    assert_same_params(load(path), load(hub_folder(square, num_key_value_heads=4)))


def test_gguf_without_the_vocabularys_size_takes_the_embeddings(tiny_model, write_gguf, tmp_path):
    model = load(write_gguf(tmp_path / "tiny.gguf", metadata={"llama.vocab_size": None}))
    assert model.arch == tiny_model.arch


# What is refused


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"general.architecture": "mamba"}, ("general.architecture 'mamba'", "'gemma3'")),
        ({"llama.expert_count": 8}, ("llama.expert_count 8", "implemented: 0")),
        ({"llama.attention.causal": False}, ("llama.attention.causal False", "implemented: True")),
        ({"llama.attention.sliding_window": 64}, ("llama.attention.sliding_window = 64", "not implemented")),
        ({"llama.attention.clamp_kqv": 8.0}, ("llama.attention.clamp_kqv = 8.0", "not implemented")),
        ({"llama.rope.scaling.type": "longrope"}, ("llama.rope.scaling.type 'longrope'", "'yarn'")),
        ({"llama.rope.dimension_count": 4}, ("llama.rope.dimension_count 4", "the head size 8")),
        ({"llama.attention.value_length": 4}, ("llama.attention.value_length 4", "attention.key_length, 8")),
        ({"llama.rope.scaling.type": "linear"}, ("'llama.rope.scaling.factor' is missing",)),
        ({"llama.attention.head_count": None}, ("'llama.attention.head_count' is missing",)),
        ({"llama.embedding_length": None}, ("'llama.embedding_length' is missing",)),
        ({"split.count": 3}, ("one of 3 pieces", "llama-gguf-split --merge")),
    ],
)
def test_metadata_that_is_not_understood_is_refused_by_key(metadata, words, write_gguf, tmp_path, raises_input_error):
    path = write_gguf(tmp_path / "tiny.gguf", metadata=metadata)
    with raises_input_error("tiny.gguf", *words):
        GgufFile(path).architecture()


def test_scaled_frequencies_of_an_architecture_without_are_refused(tiny_tensors, tmp_path, raises_input_error):
    config = json.loads((FAMILIES / "gemma2" / "config.json").read_text())
    tensors = {"rope_freqs.weight": np.ones(6, np.float32)}
    with raises_input_error("rope_freqs.weight", "'gemma2'"):
        GgufFile(gguf_writer.write(tmp_path / "x.gguf", config, tensors, {})).architecture()


def test_one_kind_of_longrope_factors_alone_is_refused(tmp_path, raises_input_error):
    config = json.loads((FAMILIES / "phi3" / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 1000.0, "rope_type": "default"}
    tensors = {"rope_factors_long.weight": np.ones(4, np.float32)}
    with raises_input_error("rope_factors_short.weight", "missing"):
        GgufFile(gguf_writer.write(tmp_path / "x.gguf", config, tensors, {})).architecture()


def test_tensors_that_do_not_fit_are_listed(tiny_tensors, write_gguf, tmp_path, raises_input_error):
    tensors = dict(tiny_tensors)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.self_attn.v_proj.weight"] = np.zeros((8, 32), np.float32)
    tensors |= {"blk.0.attn_output.bias": np.zeros(32, np.float32), "blk.9.attn_norm.weight": np.zeros(32, np.float32)}
    with raises_input_error("tiny.gguf", "blocks.mlp.up.kernel (layer 1): missing", "final_norm.scale: missing",
                            "blk.2.attn_v.weight: shape (8, 32), expected (16, 32)",
                            "blk.0.attn_output.bias: no parameter",
                            "blk.9.attn_norm.weight: no parameter"):  # fmt: skip
        load(write_gguf(tmp_path / "tiny.gguf", tensors=tensors))


def test_quantisation_without_a_decoder_is_refused(write_gguf, tiny_tensors, tmp_path, raises_input_error):
    tensors = tiny_tensors | {"model.norm.weight": np.ones(32, np.int8)}
    with raises_input_error("output_norm.weight", "I8", "not implemented"):
        load(write_gguf(tmp_path / "tiny.gguf", tensors=tensors))


@pytest.mark.parametrize("kept", [0, 3, 100, 5000, -1000])
def test_truncated_gguf_is_refused(kept, write_gguf, tmp_path, raises_input_error):
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with raises_input_error("tiny.gguf", "fetch it again"):
        load(path)


def test_text_named_gguf_is_refused(tmp_path, raises_input_error):
    path = tmp_path / "page.gguf"
    path.write_text("<!DOCTYPE html><html><body>Not found, sorry</body></html>\n" * 20)
    with raises_input_error("page.gguf", "not a readable GGUF"):
        load(path)


def test_absent_gguf_is_refused(tmp_path, raises_input_error):
    with raises_input_error("none.gguf", "no such file"):
        load(tmp_path / "none.gguf")
