import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.collect.forward import run_prompts
from jaxscape.data.batches import BatchShape, pack
from jaxscape.finetune.dataset import ValidationSet
from jaxscape.finetune.evaluation import Evaluator, judge, plan_passes
from jaxscape.models.answers import letter_table

SPELLINGS = [[33, 64], [34, 65], [35], [36, 67]]  # C has one
NAMES = ("law", "art", "sea", "nobody asks this")


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("float32"):
        yield


@pytest.fixture(scope="module")
def data() -> ValidationSet:
    """Thirteen questions of 1 to 19 tokens of three subjects."""
    draw = np.random.default_rng(0)
    tokens = [draw.integers(1, 380, 1 + n * 3 % 19).tolist() for n in range(13)]
    return ValidationSet(tokens, draw.integers(0, 4, 13), np.array([0, 1, 2, 0] * 3 + [0]), NAMES)


@pytest.fixture(scope="module")
def letters(tiny_model, data) -> np.ndarray:
    """Logits [13, 4] of each question alone, as collection finds them."""
    with jax.default_matmul_precision("float32"):
        alone = [run_prompts(tiny_model.graphdef, tiny_model.params, pack([row], BatchShape(24, 1, 24)), None, None,
                             letter_table(SPELLINGS), sites=()) for row in data.tokens]  # fmt: skip
    return np.concatenate([np.asarray(one.letters) for one in alone])


def evaluator(model, data, lanes=1, **changes) -> Evaluator:
    return Evaluator(model.graphdef, data, letter_table(SPELLINGS), lanes, **changes)


def expected(letters, data):
    """micro, macro, by subject and loss, question by question."""
    hits, losses = [], []
    for logits, answer in zip(letters.astype(np.float64), data.answers, strict=True):
        hits.append(int(np.argmax(logits)) == answer)
        losses.append(-np.log(np.exp(logits[answer]) / np.exp(logits).sum()))
    shares = {}
    for number, name in enumerate(NAMES[:3]):
        own = [hit for hit, subject in zip(hits, data.subjects, strict=True) if subject == number]
        shares[name] = sum(own) / len(own)
    return sum(hits) / len(hits), sum(shares.values()) / 3, shares, sum(losses) / len(losses)


@pytest.mark.parametrize("changes", [
    {}, {"token_budget": 30, "lanes": 2}, {"token_budget": 40, "packing": True}
], ids=str)  # fmt: skip
def test_questions_are_answered_as_they_are_alone(changes, tiny_model, data, letters):
    asked = evaluator(tiny_model, data, **changes)
    found = asked(tiny_model.params)
    micro, macro, shares, loss = expected(letters, data)
    assert 0 < micro < 1  # or this would show nothing
    assert found.micro == pytest.approx(micro) and found.macro == pytest.approx(macro)
    assert found.by_subject == pytest.approx(shares) and list(found.by_subject) == list(NAMES[:3])
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert asked(tiny_model.params) == found


def test_answers_are_those_of_transformers(tiny_model, tiny_llama, data):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = np.stack([theirs(torch.tensor([row])).logits[0, -1].numpy() for row in data.tokens])
    likelier = np.stack([logits[:, spellings].max(axis=1) for spellings in SPELLINGS], axis=1)
    found = evaluator(tiny_model, data)(tiny_model.params)
    micro, macro, shares, loss = expected(likelier, data)
    assert (found.micro, found.macro) == pytest.approx((micro, macro)) and found.by_subject == pytest.approx(shares)
    assert found.loss == pytest.approx(loss, rel=1e-4)


def test_parameters_may_come_in_several_states(tiny_model, data):
    graphdef, trained, frozen = nnx.split(
        nnx.merge(tiny_model.graphdef, tiny_model.params), lambda path, _: "mlp" in path, ...)
    asked = Evaluator(graphdef, data, letter_table(SPELLINGS))
    before = asked(trained, frozen)
    assert before == evaluator(tiny_model, data)(tiny_model.params)
    assert asked(jax.tree.map(lambda x: 3 * x, trained), frozen).loss != pytest.approx(before.loss, rel=1e-3)


def test_judgement_by_hand():
    data = ValidationSet([[1]] * 4, np.array([0, 1, 2, 3]), np.array([1, 1, 1, 0]), ("art", "law"))
    found = judge(np.array([[9, 0, 0, 0], [0, 9, 0, 0], [9, 0, 0, 0], [0, 0, 0, 0.0]]), data)
    assert found.micro == 0.5 and found.macro == pytest.approx(1 / 3)
    assert found.by_subject == {"art": 0, "law": pytest.approx(2 / 3)}
    right = np.log(1 + 3 * np.exp(-9))
    assert found.loss == pytest.approx((2 * right + (9 + right) + np.log(4)) / 4)


def test_numbers_lost_are_wrong_answers_and_no_loss():
    data = ValidationSet([[1]] * 2, np.array([0, 1]), np.array([0, 0]), ("art",))
    found = judge(np.array([[np.nan] * 4, [0, 1, 0, 0]]), data)
    assert found.micro == 0.5 and np.isnan(found.loss)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 80), st.integers(1, 4), st.booleans())
@settings(max_examples=60)
def test_every_question_has_one_place(lengths, budget, lanes, packing):
    lengths = np.array(lengths)
    passes = plan_passes(lengths, budget, lanes, packing)
    asked = [row for rows, _ in passes for own in rows for row in own]
    assert sorted(asked) == list(range(len(lengths)))
    room = max(budget, lengths.max())
    for rows, shape in passes:
        assert len(rows) == lanes and shape.tokens < room + 8
        for own in rows:
            assert lengths[own].sum() <= min(shape.tokens, room) and lengths[own].max(initial=0) <= shape.longest
            assert packing or len(own) <= shape.rows
    # greedy filling of the sorted questions is the least that contiguous batches can do
    batches, left = 0, 0
    for length in -np.sort(-lengths):
        batches, left = (batches, left - length) if length <= left else (batches + 1, room - length)
    assert len(passes) == -(-batches // lanes)


def test_shapes_of_many_passes_are_few():
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 0.6, 2000), 40, 1000).astype(int)
    passes = plan_passes(lengths, 2048, 1)
    shapes = {shape for _, shape in passes}
    assert 1 < len(shapes) <= 3
    assert lengths.sum() > 0.9 * sum(shape.tokens for _, shape in passes)


@pytest.mark.parametrize("tokens", [[], [[1], []]])
def test_nothing_to_ask_is_refused(tokens, tiny_model):
    empty = ValidationSet(tokens, np.zeros(len(tokens), int), np.zeros(len(tokens), int), ("art",))
    with pytest.raises(ValueError, match="data: needs one question"):
        evaluator(tiny_model, empty)
