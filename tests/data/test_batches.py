import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscape.data.batches import BatchShape, pack, pack_together, round_up

rows_of_tokens = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=12), min_size=1, max_size=8)


def shape_for(rows, spare=(0, 0, 0)) -> BatchShape:
    least = (sum(map(len, rows)), len(rows), max(map(len, rows)))
    return BatchShape(*(a + b for a, b in zip(least, spare, strict=True)))


@given(rows_of_tokens, st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 5)))
def test_pack_keeps_every_token_and_its_place(rows, spare):
    shape = shape_for(rows, spare)
    batch = pack(rows, shape)
    n = sum(map(len, rows))
    assert batch.tokens.tolist() == [t for row in rows for t in row] + [0] * (shape.tokens - n)
    assert batch.positions[:n].tolist() == [i for row in rows for i in range(len(row))]
    assert [int(batch.tokens[i]) for i in batch.last[: len(rows)]] == [row[-1] for row in rows]
    for row, slots in zip(rows, batch.slots, strict=False):
        assert batch.tokens[slots[: len(row)]].tolist() == row
        assert (slots[len(row) :] == shape.tokens).all()
    assert (batch.slots[len(rows) :] == shape.tokens).all()
    assert all(array.dtype == np.int32 for array in batch[:5]) and batch.segments is None


@given(rows_of_tokens, st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 5)))
def test_slots_and_cells_undo_each_other(rows, spare):
    shape = shape_for(rows, spare)
    batch = pack(rows, shape)
    n, cells = sum(map(len, rows)), shape.rows * shape.longest
    flat = batch.slots.reshape(-1)
    assert flat[batch.cells[:n]].tolist() == list(range(n))
    assert (batch.cells[n:] == cells).all()  # padding has no cell
    filled = np.flatnonzero(flat < shape.tokens)
    assert batch.cells[flat[filled]].tolist() == filled.tolist()
    assert len(filled) == n


@pytest.mark.parametrize("shape", [BatchShape(4, 2, 3), BatchShape(5, 1, 3), BatchShape(5, 2, 2)])
def test_pack_refuses_rows_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="do not fit"):
        pack([[1, 2, 3], [4, 5]], shape)


def test_pack_refuses_an_empty_row():
    with pytest.raises(ValueError, match="no token"):
        pack([[1], []], BatchShape(8, 2, 4))


def test_pack_lays_out_the_example_by_hand():
    batch = pack([[7, 8], [9]], BatchShape(4, 3, 2))
    assert batch.tokens.tolist() == [7, 8, 9, 0]
    assert batch.positions.tolist() == [0, 1, 0, 0]
    assert batch.slots.tolist() == [[0, 1], [2, 4], [4, 4]]
    assert batch.cells.tolist() == [0, 1, 2, 6]
    assert batch.last.tolist() == [1, 2, 0]


spares = st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 5), st.integers(0, 2))


@given(rows_of_tokens, spares)
def test_rows_packed_together_keep_every_token_apart(rows, spare):
    *spare, more = spare
    shape, prompts = shape_for(rows, spare), len(rows) + more
    batch, apart = pack_together(rows, shape, prompts), pack(rows, shape)
    n, flat = sum(map(len, rows)), batch.slots.reshape(-1)
    for name in ("tokens", "positions"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(apart, name))
    assert batch.last.shape == (prompts,) and (batch.last[len(rows) :] == 0).all()
    np.testing.assert_array_equal(batch.last[: len(rows)], apart.last[: len(rows)])
    # every token in a cell of its own, and nothing else in any
    assert flat[batch.cells[:n]].tolist() == list(range(n)) and len(set(batch.cells[:n].tolist())) == n
    assert np.count_nonzero(flat < shape.tokens) == n
    assert (flat[flat >= shape.tokens] == shape.tokens).all()
    # padding is nobody's
    assert (batch.cells[n:] == shape.rows * shape.longest).all() and (batch.segments[n:] == prompts).all()
    for number, row in enumerate(rows):
        own = np.flatnonzero(batch.segments == number)
        assert batch.tokens[own].tolist() == row and own[-1] == batch.last[number]
        assert batch.positions[own].tolist() == list(range(len(row)))
        cells = batch.cells[own]  # side by side, in one row of the view
        assert np.diff(cells).tolist() == [1] * (len(row) - 1)
        assert len(set((cells // shape.longest).tolist())) == 1
    assert all(array.dtype == np.int32 for array in batch)


def test_rows_packed_together_by_hand():
    batch = pack_together([[7, 8], [9], [4, 5, 6]], BatchShape(8, 2, 3), 4)
    assert batch.tokens.tolist() == [7, 8, 9, 4, 5, 6, 0, 0]
    assert batch.positions.tolist() == [0, 1, 0, 0, 1, 2, 0, 0]
    assert batch.slots.tolist() == [[3, 4, 5], [0, 1, 2]]  # the longest has the first row
    assert batch.cells.tolist() == [3, 4, 5, 0, 1, 2, 6, 6]
    assert batch.last.tolist() == [1, 2, 5, 0]
    assert batch.segments.tolist() == [0, 0, 1, 2, 2, 2, 4, 4]


def test_no_rows_packed_together_are_padding_alone():
    batch = pack_together([], BatchShape(8, 2, 3), 2)
    assert (batch.slots == 8).all() and (batch.cells == 6).all() and (batch.segments == 2).all()
    assert batch.last.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("shape", "prompts"),
    [(BatchShape(4, 2, 3), 2), (BatchShape(5, 1, 4), 2), (BatchShape(5, 2, 2), 2), (BatchShape(5, 2, 3), 1)],
)
def test_pack_together_refuses_rows_that_do_not_fit(shape, prompts):
    with pytest.raises(ValueError, match="do not fit"):
        pack_together([[1, 2, 3], [4, 5]], shape, prompts)


def test_pack_together_refuses_an_empty_row():
    with pytest.raises(ValueError, match="no token"):
        pack_together([[1], []], BatchShape(8, 2, 4), 2)


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_round_up_is_the_smallest_multiple(n, step):
    rounded = round_up(n, step)
    assert rounded % step == 0 and rounded - step < n <= rounded
