"""Exported folders: the very tensors they were loaded from, and what transformers makes of them."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxscape.data.batches import BatchShape
from jaxscape.models.export import write_merged
from jaxscape.models.peft import read_adapter
from jaxscape.models.pretrained import fold_adapters, load_pretrained, read_architecture, values_of
from jaxscape.models.sharding import make_mesh
from tests import gguf_writer

FIXTURES = Path(__file__).parents[1] / "fixtures"
FAMILIES = FIXTURES / "families"
CASES = sorted(path.parent.name for path in FAMILIES.glob("*/golden.npz"))
PROMPTS = ([3, 17, 25, 91, 41, 8, 3], [12, 9])
SHAPE = BatchShape(16, 3, 8)


def tensors_of(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=str(name))


@pytest.mark.parametrize("case", CASES)
def test_a_family_is_written_tensor_by_tensor_as_it_was_read(case, tmp_path):
    """The names are those transformers gave them, the values the same to the bit."""
    source = FAMILIES / case
    model = load_pretrained(source, make_mesh())
    write_merged(tmp_path / "out", source, model)
    assert_same(tensors_of(tmp_path / "out"), {k: v.astype(np.float32) for k, v in tensors_of(source).items()})
    assert read_architecture(tmp_path / "out") == model.arch
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert ours == theirs | {"dtype": "float32"}
    files = {file.name for file in source.iterdir()} - {"golden.npz"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == files


def test_a_merged_model_is_loaded_as_it_was(tiny_llama, tiny_model, tmp_path):
    lora, adapters = read_adapter(FIXTURES / "peft" / "lora", tiny_model.arch)
    merged = fold_adapters(tiny_model, lora, adapters)
    write_merged(tmp_path / "out", tiny_llama, merged)
    again = load_pretrained(tmp_path / "out", make_mesh())
    assert again.arch == tiny_model.arch
    assert_same({k: np.asarray(v) for k, v in values_of(again.params).items()},
                {k: np.asarray(v) for k, v in values_of(merged.params).items()})
    text = ["The capital of France"]
    assert again.tokenizer.encode(text) == tiny_model.tokenizer.encode(text)


def test_shards_in_bfloat16(tiny_llama, tmp_path):
    """As large as the limit lets them be, an index that names every tensor's, and each tensor once."""
    model, limit = load_pretrained(tiny_llama, make_mesh(), "bfloat16"), 30_000
    write_merged(tmp_path / "out", tiny_llama, model, shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    held = {file: load_file(tmp_path / "out" / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    sizes = [sum(value.nbytes for value in tensors.values()) for tensors in held.values()]
    assert max(sizes) <= limit and index["metadata"]["total_size"] == sum(sizes)
    assert len(files) <= 1 + sum(sizes) // (limit - max(value.nbytes for t in held.values() for value in t.values()))
    expected = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors_of(tiny_llama).items()}
    assert_same(tensors_of(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for file in files:  # values begin at a multiple of eight bytes, as readers that map the file expect
        assert int.from_bytes((tmp_path / "out" / file).read_bytes()[:8], "little") % 8 == 0
    again = load_pretrained(tmp_path / "out", make_mesh(), "bfloat16")
    assert all(jnp.array_equal(value, values_of(model.params)[path]) for path, value in values_of(again.params).items())


def test_what_goes_along_and_what_does_not(tiny_llama, tiny_model, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    config = json.loads((source / "config.json").read_text())
    config |= {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "configuration_x.X"}}))
    kept = ("generation_config.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json", "merges.txt")
    for name in (*kept, "pytorch_model.bin", "README.md", "modeling_x.py"):
        (source / name).write_text(name)
    (tmp_path / "out").mkdir()  # may be there, empty
    (tmp_path / ".out.partial").mkdir()  # what an interrupted run left
    (tmp_path / ".out.partial" / "half").touch()
    write_merged(tmp_path / "out", source, tiny_model)
    copied = {"tokenizer.json", "tokenizer_config.json", *kept}
    assert {file.name for file in (tmp_path / "out").iterdir()} == copied | {"config.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in copied)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == "float32" and "auto_map" not in written


def test_the_decoder_of_a_model_that_reads_images(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(FAMILIES / "gemma3", source)
    text = json.loads((source / "config.json").read_text())
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "dtype": "bfloat16",
              "vision_config": {}, "text_config": text}  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    model = load_pretrained(source, make_mesh())
    write_merged(tmp_path / "out", source, model)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == text | {"dtype": "float32"}


def test_targets_and_sources_that_do_not_fit_are_refused(tiny_llama, tiny_model, tmp_path, raises_input_error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with raises_input_error(str(tmp_path / "out"), "not empty"):
        write_merged(tmp_path / "out", tiny_llama, tiny_model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with raises_input_error(str(FAMILIES / "qwen3"), "not the model to be written"):
        write_merged(tmp_path / "new", FAMILIES / "qwen3", tiny_model)
    with raises_input_error(str(tmp_path), "config.json", "not readable"):
        write_merged(tmp_path / "new", tmp_path, tiny_model)
    with raises_input_error("cannot write", "notes.txt"):
        write_merged(tmp_path / "out" / "notes.txt" / "new", tiny_llama, tiny_model)


def test_a_full_disk_is_reported_and_nothing_is_left(tiny_llama, tiny_model, tmp_path, raises_input_error, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxscape.models.export.write_safetensors", full)
    with raises_input_error(str(tmp_path / "out"), "No space left on device"):
        write_merged(tmp_path / "out", tiny_llama, tiny_model)
    assert os.listdir(tmp_path) == []


# From GGUF

# Case -> fields of its configuration that GGUF doesn't carry, as llama.cpp takes them for granted.
GGUF_CASES = {
    "llama2": {}, "llama31": {}, "llama_yarn": {}, "phi3": {}, "phi4mini": {}, "olmo2": {}, "neox": {}, "gpt2": {},
    "neox_sequential": {}, "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3": {"query_pre_attn_scalar": 12, "sliding_window_pattern": 6, "_sliding_window_pattern": 6,
               "layer_types": ["sliding_attention"] * 4,
               "rope_parameters": {"full_attention": {"rope_theta": 1000.0, "rope_type": "linear", "factor": 4.0},
                                   "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}}},
    "smollm3": {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False,
                "layer_types": ["full_attention"] * 4, "sliding_window": None},
}  # fmt: skip
LETTERS = [chr(number) for number in range(ord("!"), ord("!") + 94)] + ["ab", "<s>"]
TOKENIZER = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": LETTERS,
             "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.token_type": [1] * 95 + [3]}  # fmt: skip


@pytest.fixture(scope="module", params=GGUF_CASES, ids=str)
def converted(request, tmp_path_factory):
    """(case, hub-format folder, what was exported from its GGUF file, the decoder loaded from that)."""
    case, folder = request.param, tmp_path_factory.mktemp(request.param)
    shutil.copytree(FAMILIES / case, folder / "hub")
    config = json.loads((folder / "hub" / "config.json").read_text()) | GGUF_CASES[case]
    (folder / "hub" / "config.json").write_text(json.dumps(config))
    source = gguf_writer.write(folder / "x.gguf", config, tensors_of(folder / "hub"), TOKENIZER)
    model = load_pretrained(source, make_mesh())
    write_merged(folder / "out", source, model)
    return folder / "hub", folder / "out", model


def test_a_family_comes_back_from_gguf(converted):
    """The original's tensors by their names, in a configuration that says the same."""
    hub, out, model = converted
    found, expected = tensors_of(out), tensors_of(hub)
    assert set(found) == set(expected)
    for name, value in expected.items():  # Gemma's norms have their one added in GGUF
        np.testing.assert_allclose(found[name], value.astype(np.float32), rtol=0, atol=2e-7, err_msg=name)
    arch = read_architecture(out)
    assert dataclasses.replace(arch, kinds=()) == dataclasses.replace(model.arch, kinds=())
    for mine, theirs in zip(arch.kinds, read_architecture(hub).kinds, strict=True):
        assert mine.window == theirs.window
        if theirs.rotary is None:
            assert mine.rotary is None
        else:
            for field in ("frequencies", "magnitude", "long_from"):
                np.testing.assert_allclose(getattr(mine.rotary, field), getattr(theirs.rotary, field), rtol=1e-6)


def test_transformers_loads_what_came_from_gguf(converted):
    """And computes with it what it computes with the original."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hub, out, model = converted

    def logits(folder):
        theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                            output_loading_info=True)  # fmt: skip
        assert not any(info.values()), info
        with torch.no_grad():
            return theirs.eval()(torch.arange(50)[None], use_cache=False).logits[0].numpy()

    expected = logits(hub)
    assert np.abs(logits(out) - expected).max() < 2e-5 * np.abs(expected).max()
    texts = ["abba<s>ab", "a!b"]
    assert AutoTokenizer.from_pretrained(out)(texts)["input_ids"] == model.tokenizer.encode(texts)


def test_scaling_that_has_no_words_is_refused(tiny_tensors, write_gguf, tmp_path, raises_input_error):
    factors = {"rope_freqs.weight": np.array([1.0, 1.0, 2.0, 2.0], np.float32)}
    source = write_gguf(tmp_path / "x.gguf", tensors=tiny_tensors | factors)
    with raises_input_error("rope_freqs.weight", "Llama 3.1"):
        write_merged(tmp_path / "out", source, load_pretrained(source, make_mesh()))


def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(write_gguf, tmp_path, raises_input_error):
    source = write_gguf(tmp_path / "x.gguf", metadata={"tokenizer.ggml.pre": "viking"})
    with raises_input_error("tokenizer.ggml.pre", "'viking'"):
        write_merged(tmp_path / "out", source, load_pretrained(source, make_mesh()))
    assert os.listdir(tmp_path) == ["x.gguf"]


@pytest.fixture(scope="module")
def from_gguf(write_gguf, tmp_path_factory):
    """(GGUF file of the tiny model with a start token, the decoder loaded from it, the folder exported)."""
    folder = tmp_path_factory.mktemp("gguf")
    keys = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.chat_template": "{{ messages }}"}  # fmt: skip
    source = write_gguf(folder / "tiny.gguf", metadata=keys)
    model = load_pretrained(source, make_mesh())
    write_merged(folder / "out", source, model)
    return source, model, folder / "out"


def test_a_gguf_file_becomes_the_hubs_folder(from_gguf, tiny_llama, tiny_tensors):
    _, model, folder = from_gguf
    assert_same(tensors_of(folder), tiny_tensors)  # q's and k's rows lie in another order in GGUF
    again = load_pretrained(folder, make_mesh())
    assert again.arch == model.arch
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (tiny_llama, folder))
    assert ours["architectures"] == theirs["architectures"] and ours["torch_dtype"] == "float32"
    assert (ours["bos_token_id"], ours["eos_token_id"], ours["pad_token_id"]) == (0, 0, None)
    texts = ["The capital of France", "  Answer: A\n\n<|end|>7 13é", ""]
    assert model.tokenizer.encode(texts)[2] == [0]  # the start token
    assert again.tokenizer.encode(texts) == model.tokenizer.encode(texts)
    assert again.tokenizer.letter_ids() == model.tokenizer.letter_ids()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["bos_token"] == config["eos_token"] == "<|end|>" and config["chat_template"] == "{{ messages }}"


# In transformers


def test_transformers_computes_the_same_with_a_merged_model(tiny_llama, tiny_model, tmp_path, run_rows):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lora, adapters = read_adapter(FIXTURES / "peft" / "lora", tiny_model.arch)
    merged = fold_adapters(tiny_model, lora, adapters)
    write_merged(tmp_path / "out", tiny_llama, merged, shard_bytes=50_000)
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32  # as config.json says
    with torch.no_grad():
        expected = np.stack([theirs.eval()(torch.tensor([row])).logits[0, -1].numpy() for row in PROMPTS])
    _, found = run_rows(merged, PROMPTS, shape=SHAPE)
    assert np.linalg.norm(found - expected) < 2e-5 * np.linalg.norm(expected)
    # the same logits that PyTorch has with the adapter attached, made by another way
    golden = np.load(FIXTURES / "peft" / "lora" / "logits.npy")[1]
    with torch.no_grad():
        attached = theirs(torch.tensor([[120, 9]])).logits[0, -1].numpy()
    assert np.linalg.norm(attached - golden) < 2e-5 * np.linalg.norm(golden)
    texts = ["The capital of France"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(texts)["input_ids"] == tiny_model.tokenizer.encode(texts)


def test_transformers_reads_the_rebuilt_tokenizer(from_gguf):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    _, model, folder = from_gguf
    texts = ["The capital of France", "  Answer: A\n\n<|end|>7 13é", ""]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs(texts)["input_ids"] == model.tokenizer.encode(texts)
    assert theirs.decode(theirs(texts[0])["input_ids"], skip_special_tokens=True) == texts[0]
