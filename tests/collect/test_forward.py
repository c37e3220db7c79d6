import jax
import numpy as np
import pytest

from jaxscape.collect.forward import resize, run_prefix, run_prompts
from jaxscape.data.batches import BatchShape, pack
from jaxscape.models.decoder import SITES

LETTERS = np.array([[5, 15], [6, 6], [7, 17], [8, 8]], np.int32)
SHAPE = BatchShape(64, 4, 24)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0)
    shared = draw.integers(1, 380, 11).tolist()
    return [shared + draw.integers(1, 380, n).tolist() for n in (3, 9, 6)]


def run(model, rows, prefix=None, shape=SHAPE, sites=SITES, **kinds):
    found = run_prompts(model.graphdef, model.params, pack(rows, shape), prefix, letters=LETTERS, sites=sites, **kinds)
    states = {site: np.asarray(x)[:, : len(rows)] for site, x in found.states.items()}
    return states, np.asarray(found.letters)[: len(rows)], np.asarray(found.free)[: len(rows)]


def prefix_of(model, row, length, room):
    batch = pack([row[:length]], BatchShape(room, 1, room))
    return run_prefix(model.graphdef, model.params, batch, np.array([length], np.int32))


def assert_same(left, right):
    for site in left[0]:
        scale = np.abs(left[0][site]).max()
        np.testing.assert_allclose(left[0][site], right[0][site], rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(left[1], right[1], rtol=0, atol=1e-5 * np.abs(left[1]).max())
    np.testing.assert_array_equal(left[2], right[2])


def test_prefix_run_once_gives_the_states_of_whole_prompts(tiny_model, rows):
    whole = run(tiny_model, rows)
    prefix = prefix_of(tiny_model, rows[0], 11, 24)
    assert int(prefix.length) == 11 and prefix.keys.shape == prefix.values.shape == (4, 24, 2, 8)
    assert_same(whole, run(tiny_model, [row[11:] for row in rows], prefix))


def test_beginning_of_a_cache_in_less_room_serves_a_shorter_prefix(tiny_model, rows):
    prefix = resize(prefix_of(tiny_model, rows[0], 14, 24), 8)._replace(length=np.int32(5))
    assert prefix.keys.shape == (4, 8, 2, 8)
    expected = run(tiny_model, rows)
    assert_same(expected, run(tiny_model, [row[5:] for row in rows], resize(prefix, 24)))
    np.testing.assert_array_equal(resize(prefix, 24).keys[:, 8:], 0)


def test_prompts_do_not_see_each_other_or_the_padding(tiny_model, rows):
    states, letters, _ = run(tiny_model, rows)
    for place, row in enumerate(rows):
        alone = run(tiny_model, [row], shape=BatchShape(24, 1, 24))
        np.testing.assert_allclose(states["residual"][:, place], alone[0]["residual"][:, 0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(letters[place], alone[1][0], rtol=0, atol=1e-5)


def test_answers_are_those_of_the_whole_vocabulary(tiny_model, rows):
    found = run_prompts(tiny_model.graphdef, tiny_model.params, pack(rows, SHAPE), None, letters=LETTERS,
                        sites=("final_norm",), vocabulary=True)  # fmt: skip
    hidden, logits = np.asarray(found.states["final_norm"][0]), np.asarray(found.logits)
    table = np.asarray(dict(tiny_model.params.flat_state())[("embedding",)].get_value())
    head = dict(tiny_model.params.flat_state()).get(("head",))
    np.testing.assert_allclose(logits, hidden @ (table if head is None else np.asarray(head.get_value())).T, atol=1e-4)
    np.testing.assert_array_equal(found.letters, logits[:, LETTERS].max(axis=-1))
    np.testing.assert_array_equal(found.free, logits.argmax(axis=-1))
    assert found.letters.dtype == np.float32 and found.free.dtype == np.int32


def test_only_the_layers_asked_for_leave_the_device(tiny_model, rows):
    whole, _, _ = run(tiny_model, rows)
    some, _, _ = run(tiny_model, rows, layers=(1, 3))
    for site in ("residual", "input_norm", "post_attention_norm"):
        np.testing.assert_allclose(some[site], whole[site][[1, 3]], rtol=0, atol=1e-6 * np.abs(whole[site]).max())
    assert some["final_norm"].shape == (1, 3, 32)
