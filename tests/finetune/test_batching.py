import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.data.batches import BatchShape, pack_together, round_up
from jaxscape.finetune import batching
from jaxscape.finetune.batching import Batches, data_order, deal, group_steps, rows_needed
from jaxscape.finetune.dataset import TrainingSet
from jaxscape.finetune.objective import gradients
from jaxscape.models.pretrained import values_of


def training_set(count: int, longest: int = 20, seed: int = 0) -> TrainingSet:
    """Random questions; the first token of each is its number + 1."""
    draw = np.random.default_rng(seed)
    tokens = [[n + 1, *draw.integers(1, 300, draw.integers(0, longest)).tolist()] for n in range(count)]
    weights = draw.uniform(0.5, 2, count).astype(np.float32)
    return TrainingSet(tokens, draw.integers(1, 300, count).tolist(), weights, [f"q{n}" for n in range(count)])


def batches(data: TrainingSet, **changes) -> Batches:
    numbers = {"steps": 5, "batch_size": 6, "parts": 1, "lanes": 1, "packing": False, "seed": 0}
    return Batches(data, **{**numbers, **changes})


def shown(step) -> list[list[tuple[list[int], int, float]]]:
    """(tokens, target, weight) of every question of each bin."""
    found = []
    for place in np.ndindex(step.targets.shape[:2]):
        batch = jax.tree.map(lambda x, place=place: x[place], step.batch)
        rows = []
        for last, target, weight in zip(batch.last, step.targets[place], step.weights[place], strict=True):
            if weight:
                tokens = batch.tokens[last - batch.positions[last] : last + 1]
                rows.append((tokens.tolist(), int(target), float(weight)))
        found.append(rows)
    return found


# -- which questions ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 12), st.integers(0, 3))
@settings(max_examples=40)
def test_every_epoch_shows_every_question_once(count, steps, batch_size, seed):
    order = data_order(count, steps, batch_size, seed)
    assert order.shape == (steps, batch_size)
    for start in range(0, order.size, count):
        epoch = order.reshape(-1)[start : start + count].tolist()
        assert len(set(epoch)) == len(epoch)
    np.testing.assert_array_equal(order, data_order(count, steps + 3, batch_size, seed)[:steps])


def test_order_is_what_it_was_in_earlier_versions():
    assert data_order(5, 3, 4, 7).tolist() == [[2, 0, 4, 1], [3, 3, 0, 2], [1, 4, 0, 2]]


def test_order_follows_the_seed():
    assert (data_order(50, 5, 10, 0) != data_order(50, 5, 10, 1)).any()


# -- how they are dealt ------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 3))
@settings(max_examples=40)
def test_each_step_shows_its_questions_with_their_targets_and_weights(batch_size, parts, lanes, packing, seed):
    data = training_set(9, seed=seed)
    run = batches(data, batch_size=batch_size, parts=parts, lanes=lanes, packing=packing, seed=seed)
    for number in range(5):
        step, order, shape = run.step(number), run.order[number], run.shape(number)
        assert step.targets.shape == step.weights.shape == (parts, lanes, run.questions)
        assert step.batch.tokens.shape == (parts, lanes, shape.tokens)
        assert step.batch.slots.shape == (parts, lanes, shape.rows, shape.longest)
        assert (step.batch.segments is not None) == packing
        weights = data.weights[order] / data.weights[order].sum(dtype=np.float64)
        expected = [(data.tokens[q], data.targets[q], w) for q, w in zip(order, weights, strict=True)]
        found = [row for rows in shown(step) for row in rows]
        assert [row[:2] for row in sorted(found)] == [row[:2] for row in sorted(expected)]
        assert [row[2] for row in sorted(found)] == pytest.approx([row[2] for row in sorted(expected)], rel=1e-6)
        assert step.weights.sum() == pytest.approx(1, rel=1e-6)
        assert run.names(number) == [f"q{q}" for q in order]
        assert run.tokens(number) == sum(len(data.tokens[q]) for q in order)
        assert (step.targets.dtype, step.weights.dtype) == (np.int32, np.float32)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 5))
def test_dealt_questions_are_as_even_as_one_at_a_time(lengths, bins):
    most = -(-len(lengths) // bins)
    found = deal(np.array([lengths, lengths[::-1]]), bins, most)
    for own, dealt in zip((lengths, lengths[::-1]), found, strict=True):
        sums, counts = [0] * bins, [0] * bins
        for question in sorted(range(len(own)), key=lambda q: -own[q]):
            place = min((b for b in range(bins) if counts[b] < most), key=lambda b: sums[b])
            assert dealt[question] == place
            sums[place] += own[question]
            counts[place] += 1


def test_bins_without_questions_are_padding():
    step = batches(training_set(9), batch_size=2, parts=2, lanes=2).step(0)
    assert sorted(map(len, shown(step))) == [0, 0, 1, 1]
    assert (step.weights.sum(axis=-1) == 0).sum() == 2


@pytest.mark.parametrize("data", [
    TrainingSet([], [], np.zeros(0, np.float32), []),
    TrainingSet([[1], []], [1, 1], np.ones(2, np.float32), ["a", "b"]),
    TrainingSet([[1], [2]], [1, 1], np.array([1, 0], np.float32), ["a", "b"]),
])  # fmt: skip
def test_data_that_cannot_be_trained_on_is_refused(data):
    with pytest.raises(ValueError, match="data: needs one question"):
        batches(data)


def test_batches_are_a_function_of_data_and_numbers():
    first, second = (batches(training_set(40), steps=30, parts=2, packing=True) for _ in "ab")
    for number in (29, 3):
        for ours, theirs in zip(*(jax.tree.leaves(run.step(number)) for run in (first, second)), strict=True):
            assert ours.tobytes() == theirs.tobytes()


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_shapes_are_few_and_pay_for_themselves(packing):
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(4.6, 0.6, 400), 40, 900).astype(int)
    data = TrainingSet([[1] * n for n in lengths], [1] * 400, np.ones(400, np.float32), [""] * 400)

    def computed(run, steps):
        return sum(run.shape(step).tokens for step in range(steps))

    few, many = (batches(data, steps=steps, batch_size=8, packing=packing) for steps in (8, 400))
    assert len(few.shapes) == 1 and 1 < len(many.shapes) <= batching.MOST_SHAPES
    assert all(shape.tokens % 8 == 0 and shape.longest % 8 == 0 for shape in many.shapes)
    assert {many.shape(step) for step in range(400)} == set(many.shapes)
    one = max(shape.tokens for shape in many.shapes)
    saved = 400 * one - computed(many, 400)
    assert saved > batching.COMPILATION * (len(many.shapes) - 1) * computed(many, 400) / 400
    if packing:
        assert max(shape.rows for shape in many.shapes) < 8


def test_alike_questions_have_one_shape_without_padding():
    data = TrainingSet([[1] * 16] * 7, [1] * 7, np.ones(7, np.float32), [""] * 7)
    assert batches(data, steps=5000).shapes == (BatchShape(96, 6, 16),)
    assert batches(data, steps=5000, packing=True).shapes == (BatchShape(96, 6, 16),)
    longer = data._replace(tokens=[[1] * 16] * 6 + [[1] * 48])
    assert batches(longer, steps=1, batch_size=7, packing=True).shapes == (BatchShape(144, 3, 48),)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7), st.integers(1, 3),
       st.floats(0, 2))  # fmt: skip
@settings(max_examples=60)
def test_groups_are_the_cheapest_of_all_cuts(needs, limit, worth):
    needs = np.array(needs)

    def cost(tokens, longest):
        return tokens + longest**2 / 7

    def spent(parts):
        return sum(len(part) * cost(*needs[list(part)].max(axis=0)) for part in parts if len(part))

    found = group_steps(needs, cost, limit, worth)
    groups = [np.flatnonzero(found == number) for number in range(found.max() + 1)]
    assert all(map(len, groups)) and len(groups) <= limit
    ranked = np.argsort(cost(*needs.T), kind="stable")
    least = worth * spent([ranked]) / len(needs)
    options = [np.split(ranked, cut) for k in range(limit) for cut in itertools.combinations(range(1, len(needs)), k)]
    prices = [spent(parts) + least * len(parts) for parts in options]
    assert spent(groups) + least * len(groups) == pytest.approx(min(prices))


@given(st.lists(st.lists(st.integers(0, 12), min_size=5, max_size=5), min_size=1, max_size=4))
def test_rows_needed_are_those_that_packing_fills(lengths):
    needed = rows_needed(np.array(lengths), 12)
    filled = 0
    for own in lengths:
        rows = [[1] * n for n in own if n]
        batch = pack_together(rows, BatchShape(60, needed, 12), 5)  # raises where they don't fit
        filled = max(filled, int((batch.slots < 60).any(axis=1).sum()))
    assert needed == max(filled, 1)


def test_a_hundred_thousand_steps_are_planned_at_once():
    data = training_set(300, 400)
    run = batches(data, steps=100_000, batch_size=16, parts=2, packing=True)
    assert run.tokens(99_999) == sum(len(data.tokens[q]) for q in run.order[99_999])
    assert round_up(max(map(len, data.tokens))) == max(shape.longest for shape in run.shapes)


# -- what the model makes of them --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _gradients(graphdef, params, frozen, step):
    return gradients(graphdef, params, frozen, step)


@pytest.fixture(scope="module")
def learnt(tiny_model):
    """(loss, accuracy, gradient) of a step that is laid out so or so."""
    data = training_set(24, 30)

    def of(**changes):
        with jax.default_matmul_precision("float32"):
            step = batches(data, batch_size=24, steps=1, **changes).step(0)
            loss, accuracy, found = _gradients(tiny_model.graphdef, tiny_model.params, nnx.State({}), step)
        return float(loss), float(accuracy), {path: np.asarray(v) for path, v in values_of(found).items()}

    return of


LAYOUT = {"parts": 2, "lanes": 2, "packing": True}


def test_loss_and_gradients_do_not_depend_on_the_layout(learnt):
    loss, accuracy, expected = learnt()
    found = learnt(**LAYOUT)
    assert found[0] == pytest.approx(loss, rel=1e-5) and found[1] == pytest.approx(accuracy, abs=1e-6)
    for path, value in expected.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(found[2][path], value, rtol=1e-4, atol=1e-5 * scale, err_msg=str(path))


def test_questions_that_are_packed_share_rows():
    """What the test above compares: rows of the padded view with several questions."""
    run = batches(training_set(24, 30), batch_size=24, steps=1, **LAYOUT)
    assert run.shapes[0].rows <= run.questions * 2 / 3
