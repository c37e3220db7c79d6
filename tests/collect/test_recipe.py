import numpy as np
import pytest

from jaxscape.collect.recipe import layer_numbers, question_starts
from jaxscape.models.answers import free_answers, letter_logits, letter_table


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(None, (1, 2, 3, 4, 5, 6, 7)), ("all", (1, 2, 3, 4, 5, 6, 7)), ("every 3", (1, 4, 7)), ("every 4", (3, 7)),
     ("every 9", (7,)), ("1,5,7", (1, 5, 7)), ("7", (7,)), ([4, 2, 4], (2, 4)), (np.array([3]), (3,))],
)  # fmt: skip
def test_layers_are_numbered_from_one_and_a_stride_keeps_the_last(layers, expected):
    assert layer_numbers(layers, 7) == expected


@pytest.mark.parametrize("layers", ["", "every", "every 0", "0,1", "a", "1;2", [0], [], ["x"], 3, "1-4"])
def test_other_spellings_of_layers_are_refused(layers, raises_input_error):
    with raises_input_error("config.collect.layers", "'every 4'", "numbers from 1"):
        layer_numbers(layers, 7, "config.collect.layers")


def test_a_layer_that_is_not_there_is_refused(raises_input_error):
    with raises_input_error("config.collect.layers '2,8'", "7 layers"):
        layer_numbers("2,8", 7, "config.collect.layers")


def test_question_begins_where_its_tokens_part_from_those_before_it():
    whole = [[1, 2, 3, 4, 5], [1, 2, 9, 4], [7, 8], [5, 6], [3]]
    before = [[1, 2, 3], [1, 2, 3], [], [5, 6, 7], [3]]  # the second: a token spans the border
    assert question_starts(whole, before) == [3, 2, 0, 1, 0]


def test_a_letter_counts_by_its_likelier_spelling():
    logits = np.array([[0.0, 5.0, 1.0, 2.0, 9.0], [3.0, 0.0, 1.0, 0.0, -1.0]], np.float32)
    table = letter_table([[1, 2], [3], [2, 0]])
    assert table.tolist() == [[1, 2], [3, 3], [2, 0]]
    np.testing.assert_array_equal(letter_logits(logits, table), [[5, 2, 1], [1, 0, 3]])


def test_free_answers_are_decoded_and_stripped():
    texts = {4: " A", 5: "B", 6: "\nC ", 7: "the", 8: "", 9: "AB", 10: "a"}
    assert free_answers(np.array([4, 5, 6, 7, 8, 9, 10, 4]), texts).tolist() == [0, 1, 2, -1, -1, -1, -1, 0]
