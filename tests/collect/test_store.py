import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.collect import store as module
from jaxscape.collect.store import DTYPES, Answers, Store

L, N, D, C = 3, 7, 5, 4
LAYERS = (2, 4, 7)
TEXTS = {0: " A", 1: "B", 2: "the"}


def values(dtype="float32", seed=0):
    draw = np.random.default_rng(seed)
    answers = Answers(draw.normal(size=(N, C)).astype(np.float32), draw.integers(0, 3, N).astype(np.int32))
    return draw.normal(size=(L, N, D)).astype(dtype), answers


def of(answers, rows):
    return Answers(*(array[rows] for array in answers))


@pytest.fixture
def full(tmp_path):
    store = Store.create(tmp_path, LAYERS, N, D, C, "float32")
    store.write(range(N), *values()).result()
    store.write_texts(lambda ids: TEXTS[ids[0]])
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_to_the_bit(dtype, tmp_path):
    states, answers = values(dtype)
    Store.create(tmp_path, LAYERS, N, D, C, dtype).write(range(N), states, answers).result()
    found = Store.open(tmp_path)
    assert found.states.shape == (L, N, D) and found.logits.shape == (N, C) and found.layers == LAYERS
    for layer in range(L):
        assert found.layer(layer).dtype == dtype
        assert found.layer(layer).tobytes() == states[layer].tobytes()
    assert found.answer_logits().tobytes() == answers.logits.tobytes()
    assert found.free_tokens().tobytes() == answers.free.tobytes()


def test_free_answers_are_read_with_their_texts(full):
    assert Store.open(full).free_answers().tolist() == [{0: 0, 1: 1, 2: -1}[t] for t in values()[1].free]


@pytest.mark.parametrize("damage", [None, "{", "[]", "{}", '{"0": " A"}'])
def test_texts_that_are_missing_or_damaged_are_named(damage, full, raises_input_error):
    (full / "free.json").unlink() if damage is None else (full / "free.json").write_text(damage)
    with raises_input_error(str(full), "free.json", f"delete {full} and run again"):
        Store.open(full).free_answers()


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(N)), cuts=st.sets(st.integers(1, N - 1)), chunk=st.sampled_from([1, 48, 8 << 20]))
def test_pieces_in_any_order_and_any_chunks_give_the_whole(order, cuts, chunk, tmp_path_factory):
    folder, (states, answers) = tmp_path_factory.mktemp("store"), values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", chunk)
        bounds, pending = [0, *sorted(cuts), N], []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            rows = order[start:stop]  # each by a new process, as it were, before the last has finished
            store = Store.create(folder, LAYERS, N, D, C, "float32")
            pending.append(store.write(rows, states[:, rows], of(answers, rows)))
        for write in pending:
            write.result()
    found = Store.open(folder)
    assert np.stack([found.layer(n) for n in range(L)]).tobytes() == states.tobytes()
    assert found.answer_logits().tobytes() == answers.logits.tobytes()
    assert found.free_tokens().tobytes() == answers.free.tobytes()


def test_one_layer_is_read_without_the_others(full):
    for layer in ("0", "2"):
        for path in (full / "states.zarr" / "c" / layer).rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    np.testing.assert_array_equal(Store.open(full).layer(1), values()[0][1])


def test_what_was_not_written_is_not_read_as_zeros(tmp_path, raises_input_error):
    states, answers = values()
    Store.create(tmp_path, LAYERS, N, D, C, "float32").write([0, 1], states[:, :2], of(answers, [0, 1])).result()
    with raises_input_error(str(tmp_path), "states of layer 4", "missing", "run again"):
        Store.open(tmp_path).layer(1)
    with raises_input_error(str(tmp_path), "free answers", "missing"):
        Store.open(tmp_path).free_tokens()
    with raises_input_error(str(tmp_path), "logits", "missing"):
        Store.open(tmp_path).answer_logits()


def chunk_of(folder, layer):
    return next(path for path in (folder / "states.zarr" / "c" / str(layer)).rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["short", "empty", "flipped", "gone"])
def test_damaged_states_are_named(damage, full, raises_input_error):
    chunk = chunk_of(full, 1)
    data = chunk.read_bytes()
    if damage == "gone":
        chunk.unlink()
    else:
        flipped = data[:9] + bytes([data[9] ^ 4]) + data[10:]
        chunk.write_bytes({"short": data[:-8], "empty": b"", "flipped": flipped}[damage])
    with raises_input_error(str(full), f"delete {full} and run again"):
        Store.open(full).layer(1)


def create(folder):
    return Store.create(folder, LAYERS, N, D, C, "float32")


@pytest.mark.parametrize(
    ("opening", "content"), [(Store.open, None), (Store.open, "{}"), (Store.open, "{"), (create, "{}"), (create, "{")]
)
def test_damaged_description_is_named(opening, content, full, raises_input_error):
    file = full / "states.zarr" / "zarr.json"
    file.unlink() if content is None else file.write_text(content)
    with raises_input_error(str(full), "delete", "run again"):
        opening(full)


def test_arrays_of_another_shape_are_not_gone_on_with(full, raises_input_error):
    with raises_input_error(str(full), "delete", "run again"):
        Store.create(full, LAYERS, N + 1, D, C, "float32")
    with raises_input_error(str(full), "delete", "run again"):
        Store.create(full, (1, 2, 3), N, D, C, "float32")
