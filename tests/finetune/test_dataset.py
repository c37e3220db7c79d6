import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.data.bank import load_bank
from jaxscape.data.questions import Question
from jaxscape.finetune.dataset import choose_questions, divide, hold_out, spread, subject_weights

STUDY = ("dev", "validation")


def mmlu(counts: dict[str, dict[str, int]]) -> list[Question]:
    """Questions with MMLU's keys: subject -> split -> how many; a split's rows run through its subjects."""
    rows, questions = Counter(), []
    for subject, splits in counts.items():
        for split, count in splits.items():
            for _ in range(count):
                key = f"mmlu/{split}/{rows[split]}"
                questions.append(Question(subject, f"{key}?", tuple("wxyz"), rows[split] % 4, split, key))
                rows[split] += 1
    return questions


@pytest.fixture(scope="module")
def bank() -> list[Question]:
    return load_bank()


SUBJECTS = {"law": {"dev": 5, "validation": 20, "test": 9}, "art": {"dev": 5, "validation": 3, "test": 9}}

counts = st.dictionaries(
    st.sampled_from(["law", "art", "sea", "sky"]),
    st.fixed_dictionaries({"dev": st.integers(1, 5), "validation": st.integers(1, 12), "test": st.integers(1, 4)}),
    min_size=1,
)


@given(counts, st.integers(0, 12), st.integers(0, 3), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_chosen_questions_are_balanced_whatever_their_order(counts, per_subject, seed, random):
    questions = mmlu(counts)
    chosen = choose_questions(questions, splits=STUDY, per_subject=per_subject, seed=seed)
    assert {q.split for q in chosen} <= set(STUDY)
    assert chosen == [q for q in questions if q in set(chosen)]  # each once, in the order given
    there = {subject: splits["dev"] + splits["validation"] for subject, splits in counts.items()}
    assert Counter(q.subject for q in chosen) == {s: min(n, per_subject or n) for s, n in there.items()}
    mixed = random.sample(questions, len(questions))
    assert set(choose_questions(mixed, splits=STUDY, per_subject=per_subject, seed=seed)) == set(chosen)


def test_choice_follows_the_seed_and_grows():
    questions = mmlu({"law": {"dev": 5, "validation": 100}})
    chosen = {seed: choose_questions(questions, splits=STUDY, per_subject=40, seed=seed) for seed in (0, 1)}
    assert chosen[0] != chosen[1]
    assert set(chosen[0]) <= set(choose_questions(questions, splits=STUDY, per_subject=41, seed=0))
    assert len({q.answer for q in chosen[0]}) == 4


@given(counts.filter(lambda c: c), st.floats(0.01, 0.99), st.integers(0, 3))
@settings(max_examples=30)
def test_held_out_questions_are_a_share_of_each_subject(counts, share, seed):
    questions = [q for q in mmlu(counts) if q.split != "test"]
    training, held = hold_out(questions, share, seed)
    assert sorted(training + held, key=questions.index) == questions
    for subject, splits in counts.items():
        count, there = sum(q.subject == subject for q in held), splits["dev"] + splits["validation"]
        assert 1 <= count < there and abs(count - share * there) <= 1


def test_phrasings_of_an_item_stay_together(bank):
    questions = [q for q in bank if q.split == "train"]
    training, held = hold_out(questions, 0.1, 0)
    items = [{q.key.rpartition("#")[0] for q in part} for part in (training, held)]
    assert not items[0] & items[1]
    assert len(held) == 2 * len(items[1]) and len(training) == 2 * len(items[0])
    assert Counter(q.subject for q in held).keys() == {q.subject for q in questions}
    other = hold_out(questions, 0.1, 1)[1]
    assert other != held and len(other) == len(held)


def test_keys_of_other_sources_are_items_whole():
    base = mmlu({"law": {"dev": 4}})
    questions = [dataclasses.replace(q, key=f"mmlu/law#{n}") for n, q in enumerate(base)]
    training, held = hold_out(questions, 0.5, 0)
    assert len(training) == len(held) == 2


@given(counts, st.integers(0, 40))
@settings(max_examples=30)
def test_spread_deals_evenly(counts, count):
    questions = mmlu(counts)
    chosen = spread(questions, count)
    assert chosen == [q for q in questions if q in set(chosen)]
    assert len(chosen) == (min(count, len(questions)) if count else len(questions))
    there, taken = (Counter(q.subject for q in part) for part in (questions, chosen))
    most = max(taken.values(), default=0)
    assert all(taken[subject] >= min(there[subject], most - 1) for subject in there)
    assert set(spread(questions[::-1], count)) == set(chosen)


@given(counts)
@settings(max_examples=20)
def test_weights_of_every_subject_have_the_same_sum(counts):
    questions = mmlu(counts)
    weights = subject_weights(questions)
    assert weights.dtype == np.float32 and weights.mean() == pytest.approx(1, rel=1e-5)
    of_subject = {s: sum(w for q, w in zip(questions, weights, strict=True) if q.subject == s) for s in counts}
    assert list(of_subject.values()) == pytest.approx([len(questions) / len(counts)] * len(counts), rel=1e-5)


def divided(questions, **changes):
    return divide(questions, **{
        "splits": STUDY, "per_subject": 0, "validation": "", "validation_share": 0.25, "validation_questions": 0,
        "seed": 0, **changes})  # fmt: skip


def test_questions_are_divided_as_the_config_says():
    questions = mmlu(SUBJECTS)
    assert divided(questions) == ([q for q in questions if q.split != "test"], [])
    training, asked = divided(questions, validation="held_out", per_subject=8)
    assert len(training) == len(asked) * 3 == 12 and not set(training) & set(asked)
    training, asked = divided(questions, validation="test", validation_questions=5)
    assert {q.split for q in asked} == {"test"} and sorted(Counter(q.subject for q in asked).values()) == [2, 3]
    assert len(training) == 33
    assert len(divided(questions, splits=("dev",), validation="validation")[1]) == 23


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"splits": ("train",)}, ["config.finetune.splits", "'train'", "dev, validation, test"]),
        ({"splits": ("dev", "dev")}, ["config.finetune.splits", "once"]),
        ({"splits": ()}, ["config.finetune.splits", "there are: dev, validation, test"]),
        ({"splits": "dev"}, ["config.finetune.splits", "'dev'"]),
        ({"per_subject": -1}, ["config.finetune.per_subject = -1"]),
        ({"validation": "validation"}, ["config.finetune.validation", "trained on", "held_out"]),
        ({"validation": "train"}, ["config.finetune.validation", "'train'", "dev, validation, test"]),
        ({"validation": "held_out", "validation_share": 0.0}, ["config.finetune.validation_share = 0.0"]),
        ({"validation": "held_out", "validation_share": 1.0}, ["config.finetune.validation_share = 1.0"]),
        ({"validation": "held_out", "per_subject": 1}, ["config.finetune.validation", "'law'", "per_subject"]),
        ({"validation": "test", "validation_questions": -2}, ["config.finetune.validation_questions = -2"]),
    ],
)
def test_what_cannot_be_divided_is_named(changes, words, raises_input_error):
    with raises_input_error(*words):
        divided(mmlu(SUBJECTS), **changes)
