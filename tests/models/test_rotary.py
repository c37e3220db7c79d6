import math

import numpy as np
import pytest

from jaxscape.models.rotary import frequencies

LLAMA_31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}


def plain(theta, features):
    return theta ** (-np.arange(0, features, 2) / features)


def test_plain_frequencies_are_powers_of_the_base():
    found = frequencies("default", 5e5, 128, {}, 8192)
    np.testing.assert_allclose(found.frequencies, plain(5e5, 128), rtol=5e-7)
    assert (found.magnitude, found.long_frequencies) == (1.0, None)


def test_an_odd_number_of_features_is_rounded_up_to_pairs():
    np.testing.assert_allclose(frequencies("default", 100.0, 5, {}, 64).frequencies, plain(100, 5), rtol=5e-7)


def test_linear_scaling_divides_all_positions():
    found = frequencies("linear", 1e4, 64, {"factor": 8.0}, 8192)
    np.testing.assert_allclose(found.frequencies, plain(1e4, 64) / 8, rtol=5e-7)


def test_llama3_leaves_short_waves_and_divides_long_ones():
    """Wavelengths below 8192 / 4 positions stay, those above 8192 are eight times as long, the rest lie between."""
    found = np.array(frequencies("llama3", 5e5, 128, LLAMA_31, 131072).frequencies)
    expected = plain(5e5, 128)
    waves = 2 * math.pi / expected
    np.testing.assert_allclose(found[waves < 2048], expected[waves < 2048], rtol=5e-7)
    np.testing.assert_allclose(found[waves > 8192], expected[waves > 8192] / 8, rtol=5e-7)
    between = (waves > 2048) & (waves < 8192)
    share = (8192 / waves[between] - 1) / 3
    assert between.sum() > 3
    np.testing.assert_allclose(found[between], expected[between] * (share + (1 - share) / 8), rtol=2e-6)


def test_yarn_leaves_what_turns_often_and_divides_what_turns_seldom():
    found = frequencies("yarn", 1e6, 128, {"factor": 4.0, "original_max_position_embeddings": 32768}, 131072)
    expected, ratio = plain(1e6, 128), np.array(found.frequencies) / plain(1e6, 128)
    turns = 32768 * expected / (2 * math.pi)
    np.testing.assert_allclose(ratio[turns > 40], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.8], 1 / 4, rtol=1e-6)
    assert np.all(np.diff(ratio) < 1e-6)
    assert found.magnitude == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("parameters", "magnitude"),
    [
        ({"attention_factor": 0.7}, 0.7),
        ({"mscale": 0.7, "mscale_all_dim": 0.3}, (0.07 * math.log(4) + 1) / (0.03 * math.log(4) + 1)),
        ({"mscale": 0.7}, 0.1 * math.log(4) + 1),
        ({"factor": None}, 0.1 * math.log(2) + 1),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_magnitude(parameters, magnitude):
    found = frequencies("yarn", 1e4, 64, {"factor": 4.0, "original_max_position_embeddings": 64} | parameters, 128)
    assert found.magnitude == pytest.approx(magnitude)


def test_longrope_has_two_sets_of_frequencies():
    found = frequencies("longrope", 1e4, 8, LONG | {"original_max_position_embeddings": 4096}, 131072)
    np.testing.assert_allclose(found.frequencies, plain(1e4, 8) / LONG["short_factor"], rtol=5e-7)
    np.testing.assert_allclose(found.long_frequencies, plain(1e4, 8) / LONG["long_factor"], rtol=5e-7)
    assert found.long_from == 4096
    assert found.magnitude == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


@pytest.mark.parametrize(("parameters", "magnitude"), [({"attention_factor": 1.3}, 1.3), ({"factor": 1.0}, 1.0)])
def test_longrope_magnitude_may_be_given(parameters, magnitude):
    assert frequencies("longrope", 1e4, 8, LONG | parameters, 4096).magnitude == magnitude


def test_first_training_was_as_long_as_the_longest_sequence_where_nothing_else_is_said():
    without = {name: value for name, value in LLAMA_31.items() if name != "original_max_position_embeddings"}
    assert frequencies("llama3", 5e5, 128, without, 8192) == frequencies("llama3", 5e5, 128, LLAMA_31, 131072)


CASES = {
    "default": ("default", 5e5, 128, {}),
    "linear": ("linear", 1e4, 80, {"factor": 3.0}),
    "llama 3.1": ("llama3", 5e5, 128, LLAMA_31),
    "llama 3.2": ("llama3", 5e5, 64, LLAMA_31 | {"factor": 32.0}),
    "yarn": ("yarn", 1e6, 128, {"factor": 4.0, "original_max_position_embeddings": 32768}),
    "yarn, not truncated": ("yarn", 1e4, 96, {"factor": 4.0, "original_max_position_embeddings": 4096,
                                              "truncate": False, "beta_fast": 20, "beta_slow": 2}),
    "yarn, scales": ("yarn", 1e4, 64, {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707,
                                       "mscale_all_dim": 1.0}),
    "yarn, short": ("yarn", 100.0, 8, {"factor": 4.0, "original_max_position_embeddings": 4}),
    "longrope": ("longrope", 1e4, 8, LONG | {"original_max_position_embeddings": 4096}),
    "longrope, factors": ("longrope", 1e4, 8, LONG | {"original_max_position_embeddings": 4096, "factor": 16.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case):
    """To the last bit but two: PyTorch's powers are not rounded quite correctly."""
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type, theta, features, parameters = CASES[case]
    config = LlamaConfig(
        hidden_size=4 * features, num_attention_heads=4, head_dim=features, max_position_embeddings=131072,
        rope_parameters={"rope_type": rope_type, "rope_theta": theta, **parameters},
    )  # fmt: skip
    found = frequencies(rope_type, theta, features, parameters, 131072)
    if rope_type == "default":
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        expected = LlamaRotaryEmbedding(config).inv_freq, 1.0
    else:
        expected = ROPE_INIT_FUNCTIONS[rope_type](config)
    np.testing.assert_array_max_ulp(np.float32(found.frequencies), expected[0].numpy(), 2)
    assert found.magnitude == pytest.approx(expected[1], rel=1e-12)
    if rope_type == "longrope":
        far, _ = ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=found.long_from + 1)
        np.testing.assert_array_max_ulp(np.float32(found.long_frequencies), far.numpy(), 2)


@pytest.mark.parametrize("rope_type", ["dynamic", "proportional", "axial", "mrope", None])
def test_other_types_are_refused_by_name(rope_type, raises_input_error):
    with raises_input_error("some.json: rope_scaling", repr(rope_type), "not implemented", "longrope"):
        frequencies(rope_type, 1e4, 64, {"factor": 2.0}, 2048, "some.json: rope_scaling")


@pytest.mark.parametrize(
    ("rope_type", "parameters", "words"),
    [
        ("linear", {}, ["'factor'", "missing"]),
        ("linear", {"factor": "2"}, ["factor = '2'", "not a positive number"]),
        ("linear", {"factor": 0.0}, ["factor = 0.0"]),
        ("linear", {"factor": True}, ["factor = True"]),
        ("linear", {"factor": float("nan")}, ["factor = nan"]),
        ("linear", {"factor": 2.0, "beta_fast": 32}, ["beta_fast", "'linear'", "not implemented"]),
        ("default", {"mrope_section": [1, 2]}, ["mrope_section", "not implemented"]),
        ("llama3", {"factor": 8.0, "high_freq_factor": 4.0}, ["'low_freq_factor'", "missing"]),
        ("llama3", LLAMA_31 | {"low_freq_factor": 4.0}, ["high_freq_factor 4.0", "low_freq_factor 4.0"]),
        ("yarn", {"factor": 2.0, "truncate": "yes"}, ["truncate = 'yes'"]),
        ("yarn", {"factor": 2.0, "original_max_position_embeddings": -1}, ["original_max_position_embeddings = -1"]),
        ("yarn", {"factor": 2.0, "original_max_position_embeddings": 1}, ["original_max_position_embeddings = 1"]),
        ("longrope", {"short_factor": [1.0] * 32}, ["long_factor", "32 numbers"]),
        ("longrope", {"short_factor": [1.0] * 31, "long_factor": [1.0] * 32}, ["short_factor", "32 numbers"]),
        ("longrope", {"short_factor": 1.0, "long_factor": [1.0] * 32}, ["short_factor", "not a list"]),
        ("longrope", {"short_factor": [1.0] * 32, "long_factor": [0.0] * 32}, ["long_factor = 0.0"]),
    ],
)
def test_bad_parameters_are_refused_by_name(rope_type, parameters, words, raises_input_error):
    with raises_input_error("rope_parameters", *words):
        frequencies(rope_type, 1e4, 64, parameters, 2048)


@pytest.mark.parametrize("theta", [0, -1.0, "1e4", 1, None])
def test_bad_base_is_refused(theta, raises_input_error):
    with raises_input_error("rope_theta = ", str(theta)):
        frequencies("default", theta, 64, {}, 2048)
