"""Collection from Python: the array it is, and the same states as PyTorch computed for the golden prompts."""


import jax
import numpy as np
import pytest

from jaxscape.collect import collect, planning
from jaxscape.collect.planning import plan_facts
from jaxscape.models import load_model
from jaxscape.models.pretrained import Pretrained, with_values
from jaxscape.models.sharding import make_mesh, place
from tests.models.on_meshes import architecture, random_values


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_model(str(tiny_llama))


@pytest.fixture(scope="module")
def texts(golden):
    return [prompt.text for prompt in golden]


@pytest.fixture(scope="module")
def collected(model, texts):
    return collect(model, texts, ("residual", "input_norm"), logits="vocabulary", progress=False)


def test_states_and_logits_are_those_of_pytorch(collected, golden):
    for site in ("residual", "input_norm"):
        for number, prompt in enumerate(golden):
            scale = np.abs(prompt.states[site]).max()
            np.testing.assert_allclose(collected[site][:, number], prompt.states[site], rtol=0, atol=1e-4 * scale)
    expected = np.stack([prompt.logits for prompt in golden])
    np.testing.assert_allclose(collected.logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_several_sites_are_asked_for_by_name(collected, texts):
    assert collected.prompts == tuple(texts) and collected.layers == (1, 2, 3, 4)
    assert collected["residual"].shape == (4, len(texts), 32) and collected["residual"].dtype == np.float32
    np.testing.assert_array_equal(collected.layer(2, "input_norm"), collected["input_norm"][1])
    with pytest.raises(ValueError, match="several sites"):
        np.asarray(collected)


def test_one_site_is_the_array_itself(model, texts, collected):
    found = collect(model, texts, layers=[2, 4], progress=False)
    assert found.shape == np.asarray(found).shape == (2, len(texts), 32) and len(found) == 2
    np.testing.assert_allclose(found, collected["residual"][[1, 3]], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found.layer(4), found[1])
    np.testing.assert_array_equal(found[:, 0], np.asarray(found)[:, 0])
    assert [x.shape for x in found] == [(len(texts), 32)] * 2 and np.mean(found, axis=1).shape == (2, 32)
    assert "residual [2, " in repr(found) and "layers 2, 4" in repr(found) and found.logits is None
    with pytest.raises(KeyError, match="layer 3 of residual was not collected; these were: 2, 4"):
        found.layer(3)


def test_token_ids_and_texts_give_the_same(model, texts, golden):
    found = collect(model, [prompt.tokens for prompt in golden], progress=False)
    np.testing.assert_array_equal(found, collect(model, texts, progress=False))
    assert found.prompts[1] == "prompt 1"


def test_a_prefix_that_many_share_runs_once(model):
    draw = np.random.default_rng(0)
    shared = draw.integers(1, 380, 150).tolist()
    rows = [shared + draw.integers(1, 380, draw.integers(3, 20)).tolist() for _ in range(40)]
    found = collect(model, rows, ("residual", "final_norm"), token_budget=256, progress=False)
    facts, (job,) = plan_facts(found.plan), found.plan.jobs
    assert job.lengths == (150,) and facts["tokens_run"] == facts["prompt_tokens"] - 39 * 150
    assert found["final_norm"].shape == (1, 40, 32) and found.layer(4, "final_norm").shape == (40, 32)
    for row in (0, 17):
        alone = collect(model, rows[row : row + 1], progress=False)
        np.testing.assert_allclose(alone[:, 0], found["residual"][:, row], rtol=0, atol=1e-4)


def test_mean_of_a_prompt_and_answers(model, collected, texts):
    mean = collect(model, texts, pool="mean", logits="answers", progress=False)
    assert mean.logits.shape == (len(texts), 4)
    ids = model.tokenizer.letter_ids()
    expected = np.stack([collected.logits[:, spellings].max(axis=1) for spellings in ids], axis=1)
    np.testing.assert_allclose(mean.logits, expected, rtol=0, atol=1e-4)
    rows = model.tokenizer.encode(texts[:1])
    each = collect(model, [rows[0][: n + 1] for n in range(len(rows[0]))], progress=False)
    np.testing.assert_allclose(mean[:, 0], np.mean(each, axis=1), rtol=0, atol=1e-4)


def random_model(family):
    arch = architecture(family)
    graphdef, abstract, values = random_values(arch)
    placed = {path: place(path, value, make_mesh()) for path, value in values.items()}
    return Pretrained(arch, graphdef, with_values(abstract, placed), None)


@pytest.mark.parametrize("family", ["phi3", "gemma2"])  # LongRoPE from 20 tokens on; windows shorter than the prefix
def test_shared_prefixes_change_nothing_in_families_that_look_at_the_length(family, monkeypatch):
    model, draw = random_model(family), np.random.default_rng(0)
    shared = draw.integers(1, 64, 14).tolist()
    rows = [shared + draw.integers(1, 64, 2 + n % 11).tolist() for n in range(60)]
    found = collect(model, rows, token_budget=64, progress=False)
    sides = [{len(rows[row]) > 20 for piece in job.pieces for wave in piece for row in wave.rows[0]}
             for job in found.plan.jobs]  # fmt: skip
    assert sides == ([{False}, {True}] if family == "phi3" else [{False, True}])
    assert all(job.lengths[0] >= 14 for job in found.plan.jobs)
    monkeypatch.setattr(planning, "_FEWEST_TOKENS", 10**6)  # nothing is worth sharing any more
    whole = collect(model, rows, token_budget=64, progress=False)
    assert not any(job.room for job in whole.plan.jobs)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("prompts", "kinds", "words"),
    [
        ([], {}, ("prompts", "one at least")),
        ("text", {}, ("prompts", "list of texts")),
        ([[1], []], {}, ("prompts[1]", "0 tokens")),
        ([[1] * 5000], {}, ("prompts[0]", "5000 tokens")),
        ([[1, 999]], {}, ("prompts[0]", "from 0 to 383")),
        ([[1]], {"sites": "embedding"}, ("'embedding'", "residual")),
        ([[1]], {"layers": [5]}, ("layers", "4 layers")),
        ([[1]], {"logits": "all"}, ("logits 'all'", "'answers'")),
        ([[1]], {"pool": "first"}, ("pool 'first'", "'last'")),
        ([[1]], {"pool": [1]}, ("pool", "from 0")),
        ([[1], [2]], {"pool": [0]}, ("pool", "each prompt")),
    ],
)
def test_mistakes_are_named(prompts, kinds, words, model, raises_input_error):
    with raises_input_error(*words):
        collect(model, prompts, progress=False, **kinds)


ON_LANES = """
import json, sys
import jax, numpy as np
from jaxscape.collect import collect
from jaxscape.collect.planning import plan_facts
from jaxscape.models import load_model
from jaxscape.models.sharding import make_mesh

assert len(jax.devices()) == 8
draw = np.random.default_rng(0)
shared = [draw.integers(1, 380, n).tolist() for n in (90, 70, 110)]
rows = [shared[n % 3] + draw.integers(1, 380, draw.integers(3, 30)).tolist() for n in range(120)]
rows += [draw.integers(1, 380, draw.integers(3, 30)).tolist() for n in range(10)]
starts = [len(row) - 1 - n % 3 for n, row in enumerate(rows)]
report, found = {}, {}
for mesh in ((1, 1, 1), (8, 1, 1), (2, 2, 2)):
    model = load_model(sys.argv[1], mesh=make_mesh(*mesh))
    out = collect(model, rows, ("residual", "final_norm"), pool=starts, logits="answers", token_budget=128,
                  layers=[1, 3, 4], progress=False)
    found[mesh] = [out["residual"], out["final_norm"], out.logits]
    error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found[mesh], found[1, 1, 1]))
    report["%d,%d,%d" % mesh] = {"error": error, "lanes": out.plan.lanes, **plan_facts(out.plan)}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def on_lanes(tiny_llama, on_eight_devices):
    """What a process of eight host devices reports, by mesh."""
    return on_eight_devices("-c", ON_LANES, str(tiny_llama))


@pytest.mark.parametrize(("mesh", "lanes"), [("8,1,1", 8), ("2,2,2", 4)])
def test_lanes_give_the_states_of_one_device(mesh, lanes, on_lanes):
    found, alone = on_lanes[mesh], on_lanes["1,1,1"]
    assert found["lanes"] == lanes and alone["lanes"] == 1
    assert found["error"] < 1e-5
    assert found["passes"] < alone["passes"] / 2 and found["programs"] <= 12
    assert alone["tokens_run"] < 0.6 * alone["prompt_tokens"]  # so that caches were shared


def test_array_is_no_jax_array(collected):
    assert not isinstance(collected["residual"], jax.Array)  # the device's memory is free


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": ["a", None]}, ("prompts[0]", "token ids")),
        ({"prompts": ["a", [1, 2]]}, ("prompts[0]", "texts", "token ids")),
        ({"prompts": [1, 2, 3]}, ("prompts[0]", "lists of token ids")),
        ({"prompts": [[1.5, 2.0]]}, ("prompts[0]", "integers")),
        ({"prompts": None}, ("prompts", "one at least")),
        ({"prompts": b"abc"}, ("prompts", "one at least")),
        ({"prompts": ["ab\ud800c"]}, ("prompts[0]", "surrogate")),
        ({"sites": ()}, ("sites", "one at least")),
        ({"token_budget": -5}, ("token_budget -5", "at least 1")),
        ({"token_budget": "big"}, ("token_budget 'big'", "integer")),
        ({"pool": 3}, ("pool 3", "'last'")),
        ({"model": "smollm2"}, ("model 'smollm2'", "load_model")),
    ],
)
def test_arguments_that_make_no_sense_are_one_line(changes, words, tiny_model, raises_input_error):
    arguments = {"model": tiny_model, "prompts": [[1, 2, 3]], "progress": False} | changes
    with raises_input_error(*words):
        collect(**arguments)


def test_final_norm_stands_after_the_last_layer_only(tiny_model):
    found = collect(tiny_model, [[1, 2, 3]], ("residual", "final_norm"), layers=[1], progress=False)
    np.testing.assert_array_equal(found.layer(4, "final_norm"), found["final_norm"][0])
    for number, site in ((1, "final_norm"), (4, "residual"), (1, "input_norm")):
        with pytest.raises(KeyError, match="was not collected"):
            found.layer(number, site)
    alone = collect(tiny_model, iter([[1, 2, 3]]), "final_norm", progress=False)
    assert alone.layers == (4,) and "layers 4;" in repr(alone)
