import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxscape.data.batches import BatchShape, pack, round_up

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
    assert all(array.dtype == np.int32 for array in batch)


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


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_round_up_is_the_smallest_multiple(n, step):
    rounded = round_up(n, step)
    assert rounded % step == 0 and rounded - step < n <= rounded
