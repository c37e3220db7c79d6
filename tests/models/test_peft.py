"""PEFT's format, both ways: against files that PEFT wrote and, where torch is installed, against PEFT itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxscape.data.batches import BatchShape
from jaxscape.models.lora import PROJECTIONS, LoraConfig
from jaxscape.models.peft import CONFIG, WEIGHTS, read_adapter, write_adapter
from jaxscape.models.pretrained import fold_adapters, load_pretrained, read_architecture
from jaxscape.models.sharding import make_mesh

FIXTURES = Path(__file__).parents[1] / "fixtures"
PEFT, FAMILIES = FIXTURES / "peft", FIXTURES / "families"
GOLDEN = {  # as fixtures/make_peft.py has them
    "lora": LoraConfig(4, 12.0, 0.1),
    "rslora": LoraConfig(3, 5.0, targets=("q", "v"), rslora=True),
    "dora": LoraConfig(2, 4.0, targets=("q", "o", "down"), dora=True),
}
PROMPTS = ([3, 17, 250, 99, 41, 8, 3], [120, 9])
SHAPE = BatchShape(16, 3, 8)
DIFFERENCE = 2e-5  # of logits, as a share of their norm


def random_adapters(arch, lora, seed=3):
    """Adapters as training might leave them."""
    rng = np.random.default_rng(seed)
    width, heads, kv = arch.width, arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    sizes = {"q": (width, heads), "k": (width, kv), "v": (width, kv), "o": (heads, width),
             "gate": (width, arch.mlp_width), "up": (width, arch.mlp_width), "down": (arch.mlp_width, width)}
    adapters = {}
    for name in lora.targets:
        if name == "gate" and not arch.gated:
            continue
        inputs, outputs = sizes[name]
        path = ("blocks", "attention" if name in "qkvo" else "mlp", name, "adapter")
        shapes = {"a": (lora.rank, inputs), "b": (lora.rank, outputs)} | ({"m": (outputs,)} if lora.dora else {})
        for half, shape in shapes.items():
            value = rng.normal(scale=0.1, size=(arch.num_layers, *shape)).astype(np.float32)
            adapters[(*path, half)] = 3 + value if half == "m" else value
    return adapters


def assert_close(found, expected):
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() < DIFFERENCE, error


def assert_same(found, expected):
    assert set(found) == set(expected)
    for path, value in expected.items():
        assert found[path].dtype == np.float32
        np.testing.assert_array_equal(found[path], value, err_msg=str(path))


# Against PEFT's own files


@pytest.mark.parametrize("case", GOLDEN)
def test_an_adapter_of_pefts_gives_pytorchs_logits(case, tiny_model, run_rows):
    lora, adapters = read_adapter(PEFT / case, tiny_model.arch)
    assert lora == GOLDEN[case]
    _, logits = run_rows(fold_adapters(tiny_model, lora, adapters), PROMPTS, shape=SHAPE)
    expected = np.load(PEFT / case / "logits.npy")
    assert_close(logits, expected)
    _, plain = run_rows(tiny_model, PROMPTS, shape=SHAPE)
    assert np.linalg.norm(plain - expected) > 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("case", GOLDEN)
def test_what_is_written_is_what_peft_wrote(case, tiny_model, tmp_path):
    lora, adapters = read_adapter(PEFT / case, tiny_model.arch)
    write_adapter(tmp_path / "a", tiny_model.arch, lora, adapters, base="tiny_llama")
    assert {file.name for file in (tmp_path / "a").iterdir()} == {CONFIG, WEIGHTS}
    theirs, ours = (load_file(folder / WEIGHTS) for folder in (PEFT / case, tmp_path / "a"))
    assert_same(ours, theirs)
    theirs, ours = (json.loads((folder / CONFIG).read_text()) for folder in (PEFT / case, tmp_path / "a"))
    every = {f"{name}_proj" for name in lora.targets}
    assert set(ours["target_modules"]) == every and len(ours["target_modules"]) == len(every)
    assert set(ours) <= set(theirs)
    left_out = {name: theirs[name] for name in set(theirs) - set(ours)}
    defaults = {"megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": theirs["peft_version"]}
    assert {name: value for name, value in left_out.items() if value not in (None, False, {})} == defaults
    assert {name for name in ours if ours[name] != theirs[name]} <= {"target_modules"}
    again = read_adapter(tmp_path / "a", tiny_model.arch)
    assert again[0] == lora
    assert_same(again[1], adapters)


# Fused modules


@pytest.mark.parametrize("targets", [PROJECTIONS, ("q", "v", "up"), ("k",)])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "phi3", "neox", "qwen3", "gemma2"])
def test_adapters_survive_writing_and_reading(family, rslora, targets, tmp_path):
    arch = read_architecture(FAMILIES / family)
    lora = LoraConfig(2, 3.0, 0.25, targets, rslora=rslora)
    adapters = random_adapters(arch, lora)
    write_adapter(tmp_path / "a", arch, lora, adapters, base=family)
    found, values = read_adapter(tmp_path / "a", arch)
    there = tuple(name for name in targets if name != "gate" or arch.gated)
    assert found == LoraConfig(2, 3.0, 0.25, there, rslora=rslora)
    assert_same(values, adapters)


def update_of(folder, module, config, rslora):
    """What PEFT adds to a module's weight [outputs, inputs]."""
    tensors, name = load_file(folder / WEIGHTS), module.rpartition(".")[2]
    a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"].astype(np.float64) for half in "AB")
    rank = config["rank_pattern"].get(name, config["r"])
    assert rank == len(a)
    return config["alpha_pattern"].get(name, config["lora_alpha"]) / (rank**0.5 if rslora else rank) * b @ a


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("family", "module"),
    [("gpt2", "transformer.h.1.attn.c_attn"), ("phi3", "model.layers.1.self_attn.qkv_proj"),
     ("neox", "gpt_neox.layers.1.attention.query_key_value")],
)
def test_a_fused_module_is_changed_by_all_its_adapters(family, module, rslora, tmp_path):
    arch = read_architecture(FAMILIES / family)
    lora = LoraConfig(2, 3.0, rslora=rslora)
    adapters = random_adapters(arch, lora)
    write_adapter(tmp_path / "a", arch, lora, adapters, base=family)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["fan_in_fan_out"] == (family == "gpt2")
    paths = [("blocks", "attention", name, "adapter") for name in "qkv"]
    parts = [lora.scale * adapters[(*path, "a")][1].T.astype(np.float64) @ adapters[(*path, "b")][1] for path in paths]
    if family == "neox":  # [heads, 3, F, inputs]
        heads = [part.T.reshape(arch.num_heads, 1, arch.head_dim, arch.width) for part in parts]
        expected = np.concatenate(heads, axis=1).reshape(-1, arch.width)
    else:
        expected = np.concatenate([part.T for part in parts])
    np.testing.assert_allclose(update_of(tmp_path / "a", module, config, rslora), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "targets", "modules"),
    [("gpt2", ("o",), ["attn.c_proj"]), ("gpt2", ("k", "up", "down"), ["c_attn", "c_fc", "mlp.c_proj"]),
     ("neox", ("o", "up"), ["dense", "dense_h_to_4h"]), ("phi3", ("gate",), ["gate_up_proj"])],
)  # fmt: skip
def test_names_of_modules_match_no_other(family, targets, modules, tmp_path):
    """PEFT takes every module that a name is the end of."""
    arch, lora = read_architecture(FAMILIES / family), LoraConfig(2, 3.0, targets=targets)
    write_adapter(tmp_path / "a", arch, lora, random_adapters(arch, lora), base=family)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["target_modules"] == modules


def test_projections_of_a_fused_module_share_its_a(tmp_path):
    arch = read_architecture(FAMILIES / "gpt2")
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(arch.num_layers):
        for half, shape in (("A", (2, 32)), ("B", (96, 2))):
            name = f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{half}.weight"
            tensors[name] = rng.normal(size=shape).astype(np.float32)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6,
                                               "target_modules": ["c_attn"]}))  # fmt: skip
    lora, adapters = read_adapter(tmp_path, arch)
    assert lora == LoraConfig(2, 6.0, targets=("q", "k", "v"))
    for number, name in enumerate("qkv"):
        path = ("blocks", "attention", name, "adapter")
        for layer in range(arch.num_layers):
            a, b = (tensors[f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{half}.weight"] for half in "AB")
            np.testing.assert_array_equal(adapters[(*path, "a")][layer], a)
            np.testing.assert_array_equal(adapters[(*path, "b")][layer], b[32 * number : 32 * (number + 1)].T)


def test_untrained_adapters_of_fused_modules_survive(tmp_path):
    arch, lora = read_architecture(FAMILIES / "phi3"), LoraConfig(2, 3.0)
    adapters = {path: value * (path[-1] != "b") for path, value in random_adapters(arch, lora).items()}
    write_adapter(tmp_path / "a", arch, lora, adapters, base="phi3")
    found, values = read_adapter(tmp_path / "a", arch)
    assert found == lora
    assert_same(values, adapters)


def test_dora_of_fused_modules(tmp_path, raises_input_error):
    arch = read_architecture(FAMILIES / "neox")
    lora = LoraConfig(2, 3.0, targets=("q", "k", "v", "down"), dora=True)
    adapters = random_adapters(arch, lora)
    write_adapter(tmp_path / "a", arch, lora, adapters, base="neox")
    found, values = read_adapter(tmp_path / "a", arch)
    assert found == lora
    assert_same(values, adapters)
    with raises_input_error("DoRA on q", "q, k, v", "gpt_neox"):
        write_adapter(tmp_path / "b", arch, LoraConfig(2, 3.0, targets=("q", "v"), dora=True), adapters, base="neox")


# What is read as it is, and what is refused


@pytest.fixture
def copied(tmp_path):
    """``copied(case, config={...}, tensors=function)``: PEFT's folder with some fields and tensors changed."""

    def make(case="lora", config=None, tensors=None):
        folder = tmp_path / "copied"
        shutil.copytree(PEFT / case, folder)
        fields = json.loads((folder / CONFIG).read_text()) | (config or {})
        (folder / CONFIG).write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))
        if tensors is not None:
            save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)
        return folder

    return make


def test_bfloat16_and_missing_defaults_are_read(copied, tiny_model):
    import ml_dtypes

    folder = copied("rslora", {"lora_dropout": ..., "bias": ..., "use_dora": ..., "alpha_pattern": ...},
                    lambda tensors: {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()})
    lora, adapters = read_adapter(folder, tiny_model.arch)
    _, whole = read_adapter(PEFT / "rslora", tiny_model.arch)
    assert lora == GOLDEN["rslora"]
    assert_same(adapters, {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in whole.items()})


def test_patterns_that_say_one_thing_are_read(copied, tiny_model):
    folder = copied(config={"r": 8, "lora_alpha": 1, "rank_pattern": {".*_proj": 4}, "alpha_pattern": {".*": 12}})
    assert read_adapter(folder, tiny_model.arch)[0] == GOLDEN["lora"]


def without(word):
    return lambda tensors: {name: value for name, value in tensors.items() if word not in name}


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"peft_type": "IA3"}, None, ["peft_type 'IA3'", "'LORA'"]),
        ({"bias": "lora_only"}, None, ["bias = 'lora_only'", "'none'"]),
        ({"modules_to_save": ["lm_head"]}, None, ["modules_to_save = ['lm_head']"]),
        ({"trainable_token_indices": [3]}, None, ["trainable_token_indices"]),
        ({"layer_replication": [[0, 2], [1, 3]]}, None, ["layer_replication"]),
        ({"a_new_switch": True}, None, ["a_new_switch = True"]),
        ({"init_lora_weights": "pissa"}, None, ["init_lora_weights = 'pissa'", "base model"]),
        ({"r": "4"}, None, ["r = '4'"]),
        ({"lora_dropout": 1.5}, None, ["LoRA dropout 1.5"]),
        ({"alpha_pattern": {"q_proj": 3}}, None, ["alpha_pattern", "q: rank 4, alpha 3", "k: rank 4, alpha 12"]),
        ({"alpha_pattern": {"layers.1.*": 3}}, None, ["alpha_pattern", "q_proj", "layers"]),
        ({"alpha_pattern": {"(": 3}}, None, ["alpha_pattern", "not readable"]),
        ({"rank_pattern": {"q_proj": -3}}, None, ["rank_pattern", "-3"]),
        ({"rank_pattern": {"layers.2.*": 3}}, None, ["rank_pattern", "q_proj", "layers"]),
        ({"r": 5}, None, ["layers.0.self_attn.q_proj.lora_A.weight: shape (4, 32), expected (5, 32)", "width 32"]),
        ({"layers_to_transform": [0, 1, 2]}, without("layers.3."),
         ["layers_to_transform = [0, 1, 2]", "layers.3.self_attn.q_proj.lora_A.weight: missing"]),
        ({}, without("layers.2.mlp.up_proj.lora_B"), ["layers.2.mlp.up_proj.lora_B.weight: missing"]),
        ({}, lambda _: {}, ["no adapter of any projection of llama"]),
        ({}, lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros(2)},
         ["embed_tokens.lora_embedding_A: no projection of llama takes it"]),
        ({}, lambda t: t | {"base_model.model.lm_head.lora_A.weight": np.zeros(2)}, ["lm_head.lora_A.weight"]),
        ({}, lambda t: t | {"base_model.model.model.layers.4.mlp.up_proj.lora_A.weight": np.zeros(2)},
         ["layers.4.mlp.up_proj.lora_A.weight: the model has 4 layers"]),
        ({"use_dora": True}, None, ["q_proj.lora_magnitude_vector: missing", "and 8 more"]),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(config, tensors, words, copied, tiny_model, raises_input_error):
    folder = copied(config=config, tensors=tensors)
    with raises_input_error(*words):
        read_adapter(folder, tiny_model.arch)


def test_magnitudes_without_dora_are_refused(copied, tiny_model, raises_input_error):
    with raises_input_error("q_proj.lora_magnitude_vector", "use_dora is not set"):
        read_adapter(copied("dora", {"use_dora": False}), tiny_model.arch)


def test_another_models_adapter_is_refused(raises_input_error):
    with raises_input_error("(qwen3, 3 layers, width 32)", "shape (32, 4), expected (48, 4)", "the model has 3 layers"):
        read_adapter(PEFT / "lora", read_architecture(FAMILIES / "qwen3"))


def test_folders_that_are_no_adapters_are_refused(copied, tiny_model, tmp_path, raises_input_error):
    with raises_input_error(str(tmp_path / "nowhere"), CONFIG, "PEFT adapter"):
        read_adapter(tmp_path / "nowhere", tiny_model.arch)
    folder = copied()
    (folder / WEIGHTS).write_bytes(b"broken")
    with raises_input_error(WEIGHTS, "not a readable safetensors file"):
        read_adapter(folder, tiny_model.arch)
    (folder / WEIGHTS).unlink()
    with raises_input_error(str(folder), f"no {WEIGHTS}"):
        read_adapter(folder, tiny_model.arch)
    (folder / "adapter_model.bin").touch()
    with raises_input_error("adapter_model.bin", "pickle", "safe_serialization=True"):
        read_adapter(folder, tiny_model.arch)
    (folder / CONFIG).write_text("{")
    with raises_input_error(CONFIG, "not readable JSON"):
        read_adapter(folder, tiny_model.arch)


def test_an_adapter_is_replaced_and_nothing_else_is(tiny_model, tmp_path, raises_input_error):
    lora, adapters = read_adapter(PEFT / "rslora", tiny_model.arch)
    for scale in (1, 2):
        changed = {path: np.float32(scale) * value for path, value in adapters.items()}
        write_adapter(tmp_path / "a", tiny_model.arch, lora, changed, base="x")
        assert_same(read_adapter(tmp_path / "a", tiny_model.arch)[1], changed)
    (tmp_path / "a" / "notes.txt").touch()
    with raises_input_error(str(tmp_path / "a"), "not empty"):
        write_adapter(tmp_path / "a", tiny_model.arch, lora, adapters, base="x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # no half-written folder is left
    (tmp_path / "file").touch()
    with raises_input_error("cannot write", "file"):
        write_adapter(tmp_path / "file" / "a", tiny_model.arch, lora, adapters, base="x")


# Against PEFT itself

LIVE = ("tiny", "gpt2", "phi3", "neox", "qwen3", "gemma2")
VARIANTS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


@pytest.fixture(scope="module", params=LIVE)
def base(request):
    """(folder, the decoder, a maker of the model in PyTorch)."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    import transformers

    folder = FIXTURES / "tiny_llama" if request.param == "tiny" else FAMILIES / request.param

    def in_pytorch():
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager").eval()

    return folder, load_pretrained(folder, make_mesh()), in_pytorch


ROWS = ([3, 17, 25, 91, 41, 8, 3], [12, 9])


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_computes_the_same_with_our_adapter(variant, base, tmp_path, run_rows):
    import peft

    from tests.fixtures.make_peft import logits

    folder, model, in_pytorch = base
    lora = LoraConfig(2, 3.0, 0.1, **VARIANTS[variant])
    adapters = random_adapters(model.arch, lora)
    write_adapter(tmp_path / "a", model.arch, lora, adapters, base=str(folder))
    theirs = peft.PeftModel.from_pretrained(in_pytorch(), tmp_path / "a").eval()
    loaded = peft.get_peft_model_state_dict(theirs)
    assert_same({name: value.numpy() for name, value in loaded.items()}, load_file(tmp_path / "a" / WEIGHTS))
    _, ours = run_rows(fold_adapters(model, lora, adapters), ROWS, shape=SHAPE)
    assert_close(ours, logits(theirs, ROWS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_we_compute_the_same_with_pefts_adapter(variant, base, tmp_path, run_rows):
    from tests.fixtures.make_peft import adapted, logits

    _, model, in_pytorch = base
    fields = {f"use_{name}": value for name, value in VARIANTS[variant].items()}
    theirs = adapted(in_pytorch(), 1, r=2, lora_alpha=3, target_modules="all-linear", **fields)
    theirs.save_pretrained(tmp_path / "a")
    lora, adapters = read_adapter(tmp_path / "a", model.arch)
    assert set(lora.targets) == set(PROJECTIONS) - (set() if model.arch.gated else {"gate"})
    _, ours = run_rows(fold_adapters(model, lora, adapters), ROWS, shape=SHAPE)
    assert_close(ours, logits(theirs, ROWS))
