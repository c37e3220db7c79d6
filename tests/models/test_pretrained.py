"""From files to states, against PyTorch's: with fresh models, and with the packaged one where it is cached."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxscape.collect import collect
from jaxscape.collect.planning import plan_facts
from jaxscape.data.bank import load_bank
from jaxscape.data.batches import BatchShape, pack
from jaxscape.data.prompts import build_prompts
from jaxscape.models.pretrained import load_pretrained, read_architecture, values_of, with_values
from jaxscape.models.sharding import make_mesh
from jaxscape.models.sources import PACKAGED, cache_folder

BOUND = 1e-4  # relative norm of the difference of two states, at every layer
TIE = 1e-4  # logits nearer than this are a tie


def relative(found, expected) -> np.ndarray:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


def in_pytorch(model, tokens):
    """Last token's states [L, D] after each block, and its logits [V]: one prompt, nothing shared, no padding."""
    import torch

    after = []

    def keep(_module, _inputs, out):
        after.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False, logits_to_keep=1).logits[0, -1].numpy()
    for hook in hooks:
        hook.remove()
    return np.stack([state[0, -1].numpy() for state in after]), logits


def saved_tokens(collected):
    """Tokens of the prompts that didn't run, as a prefix that did has them."""
    facts = plan_facts(collected.plan)
    return facts["prompt_tokens"] - facts["tokens_run"]


def assert_same_predictions(found, expected):
    """The same best answer, or one that the expected logits hold for a tie with it."""
    rows = np.arange(len(expected))
    short = expected.max(axis=1) - expected[rows, found.argmax(axis=1)]
    assert short.max() <= TIE, f"rows {np.flatnonzero(short > TIE).tolist()} predict otherwise"


# Fresh models

FRESH = {
    "tied, grouped heads": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "untied, one kv head a head": {"num_key_value_heads": 6, "tie_word_embeddings": False, "rope_theta": 5e5},
    "head_dim of its own, one kv head": {"num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module", params=FRESH, ids=str)
def fresh(request, tiny_llama, tmp_path_factory):
    """(PyTorch's model, ours) of one random checkpoint, saved by transformers in shards."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=384, hidden_size=48, intermediate_size=112, num_hidden_layers=5, num_attention_heads=6,
        max_position_embeddings=512, rms_norm_eps=1e-6, initializer_range=0.2, **FRESH[request.param],
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("fresh")
    theirs.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").is_file()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama / name).read_bytes())
    return theirs, load_pretrained(folder, make_mesh())


def random_prompts(groups=3, each=8):
    """Prompts [128, 210) tokens long; those of a group share 120 or more at the start."""
    rng, prompts = np.random.default_rng(3), []
    for group in range(groups):
        shared = rng.integers(0, 384, 120 + 20 * group).tolist()
        prompts += [shared + rng.integers(0, 384, rng.integers(8, 50)).tolist() for _ in range(each)]
    return prompts


@pytest.mark.parametrize("shared", [True, False], ids=["shared prefixes", "whole prompts"])
def test_fresh_checkpoint_runs_as_in_pytorch(fresh, shared):
    theirs, ours = fresh
    prompts = random_prompts() if shared else random_prompts(8, 1)
    found = collect(ours, prompts, token_budget=512, logits="vocabulary", progress=False)
    assert (saved_tokens(found) > 0) == shared
    expected = [in_pytorch(theirs, prompt) for prompt in prompts]
    states = np.asarray(found)
    worst = max(relative(states[:, i], e[0]).max() for i, e in enumerate(expected))
    assert worst < BOUND
    assert relative(found.logits, [e[1] for e in expected]).max() < BOUND
    assert_same_predictions(found.logits, np.stack([e[1] for e in expected]))


def test_gradient_of_a_loss_is_pytorchs(fresh):
    """Cross entropy of the last tokens of packed rows, with respect to every parameter."""
    import torch

    theirs, ours = fresh
    rows, targets = [prompt[:20] for prompt in random_prompts(2, 1)], [5, 300]
    theirs.zero_grad()
    for row, target in zip(rows, targets, strict=True):
        torch.nn.functional.cross_entropy(theirs(torch.tensor([row])).logits[0, -1:], torch.tensor([target])).backward()
    batch = pack(rows, BatchShape(48, 3, 24))

    @jax.jit
    @jax.grad
    def gradient(values):
        model = nnx.merge(ours.graphdef, with_values(ours.params, values))
        log_probability = jax.nn.log_softmax(model.logits(model(batch).hidden[:2]))
        return -jnp.sum(log_probability[jnp.arange(2), jnp.array(targets)])

    found = gradient(values_of(ours.params))
    layer = theirs.model.layers[3]
    attention, mlp = layer.self_attn, layer.mlp
    pairs = {
        ("embedding",): theirs.model.embed_tokens.weight.grad,
        ("final_norm", "scale"): theirs.model.norm.weight.grad,
        ("blocks", "input_norm", "scale"): layer.input_layernorm.weight.grad,
        ("blocks", "mlp_norm", "scale"): layer.post_attention_layernorm.weight.grad,
        **{("blocks", "attention", p, "kernel"): getattr(attention, f"{p}_proj").weight.grad.T for p in "qkvo"},
        **{("blocks", "mlp", p, "kernel"): getattr(mlp, f"{p}_proj").weight.grad.T for p in ("gate", "up", "down")},
    }
    if not ours.arch.tie_embeddings:
        pairs["head",] = theirs.lm_head.weight.grad
    assert set(pairs) == set(found)
    for path, expected in pairs.items():
        value = found[path][3] if path[0] == "blocks" else found[path]
        assert relative(np.ravel(value), expected.numpy().ravel()) < BOUND, path


# The files of the tiny model


def test_folder_and_its_config_give_the_architecture(tiny_model, tiny_llama):
    config = json.loads((tiny_llama / "config.json").read_text())
    assert tiny_model.arch.head_dim == config["head_dim"]
    assert tiny_model.arch.max_positions == config["max_position_embeddings"]


def test_parameters_have_one_leading_axis_of_layers(tiny_model):
    for path, value in values_of(tiny_model.params).items():
        assert (path[0] == "blocks") == (value.shape[0] == tiny_model.arch.num_layers), path


def test_folder_without_config_is_refused(tmp_path, tiny_llama, raises_input_error):
    (tmp_path / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes())
    with raises_input_error("config.json", "no such file"):
        load_pretrained(tmp_path, make_mesh())


def test_collected_golden_prompts_are_pytorchs(tiny_model, golden):
    found = collect(tiny_model, [g.tokens for g in golden], logits="vocabulary", progress=False)
    states = np.asarray(found)
    assert max(relative(states[:, i], g.states["residual"]).max() for i, g in enumerate(golden)) < BOUND
    np.testing.assert_allclose(found.logits, [g.logits for g in golden], atol=1e-4)


# Tokenizers that cannot be read


@pytest.fixture
def without_tokenizer(tiny_llama, tmp_path):
    """A hub-format folder of weights and a configuration alone."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    return tmp_path


def test_weights_without_a_tokenizer_run_token_ids(without_tokenizer, golden):
    model = load_pretrained(without_tokenizer, make_mesh())
    states = np.asarray(collect(model, [g.tokens for g in golden], progress=False))
    assert relative(states[:, 0], golden[0].states["residual"]).max() < BOUND


def test_weights_without_a_tokenizer_refuse_texts(without_tokenizer, raises_input_error):
    model = load_pretrained(without_tokenizer, make_mesh())
    with raises_input_error(str(without_tokenizer), "it needs tokenizer.json"):
        collect(model, ["a text"], progress=False)


def test_gguf_whose_tokenizer_is_not_implemented_runs_token_ids(write_gguf, tmp_path, golden, raises_input_error):
    model = load_pretrained(write_gguf(tmp_path / "x.gguf", metadata={"tokenizer.ggml.pre": "viking"}), make_mesh())
    states = np.asarray(collect(model, [g.tokens for g in golden], progress=False))
    assert max(relative(states[:, i], g.states["residual"]).max() for i, g in enumerate(golden)) < BOUND
    with raises_input_error("tokenizer.ggml.pre 'viking'"):
        model.tokenizer.encode(["a text"])


def test_architecture_is_read_without_weights(tiny_model, tiny_llama, write_gguf, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    assert read_architecture(tmp_path) == read_architecture(write_gguf(tmp_path / "x.gguf")) == tiny_model.arch


# The packaged model


@pytest.fixture(scope="module")
def packaged():
    """(PyTorch's model by transformers' own GGUF reader, ours) of the packaged file, where it is cached."""
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")  # transformers' GGUF reader wants it
    path = cache_folder() / "models" / Path(PACKAGED["smollm2-135m-instruct"].member).name
    if not path.is_file():
        pytest.skip("the packaged model is not in the cache")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").eval()
    return theirs, load_pretrained(path, make_mesh())


@pytest.mark.parametrize(("shots", "each"), [(0, 12), (5, 5)])
def test_packaged_model_answers_the_bank_as_in_pytorch(packaged, shots, each, record_property):
    """204 prompts in all, collected with shared prefixes; PyTorch runs each alone and whole."""
    theirs, ours = packaged
    questions = load_bank()
    dev, tests = ([q for q in questions if q.split == s] for s in ("dev", "test"))
    subjects = sorted({q.subject for q in tests})
    asked = [q for s in subjects for q in [q for q in tests if q.subject == s][:each]]
    assert len(asked) == 12 * each
    tokens = ours.tokenizer.encode([p.text for p in build_prompts(asked, dev, shots)])
    answers = np.array(ours.tokenizer.answer_ids(), np.int32)
    collected = collect(ours, tokens, logits="vocabulary", progress=False)
    assert saved_tokens(collected) > (10_000 if shots else 500)
    states, logits = np.asarray(collected), collected.logits[:, answers]
    expected = [in_pytorch(theirs, row) for row in tokens]
    errors = np.stack([relative(states[:, i], e[0]) for i, e in enumerate(expected)])
    letters = np.stack([e[1][answers] for e in expected])
    same = int((logits.argmax(axis=1) == letters.argmax(axis=1)).sum())
    record_property("largest relative error by layer", errors.max(axis=0).tolist())
    print(f"{shots}-shot: {same} of {len(asked)} same letter, states within {errors.max():.1e}, "
          f"logits within {np.abs(logits - letters).max():.1e}")  # fmt: skip
    assert states.shape[0] == 30
    assert errors.max() < BOUND
    assert_same_predictions(logits, letters)
