"""Which questions are trained on, which are kept to follow the training, and how much each counts.

Every choice goes by a stable hash of the question and the seed, never by where a question stood; what is kept stays in
the order given.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxscape.data.questions import SPLITS, Question, stable_hash
from jaxscape.errors import InputError

HELD_OUT = "held_out"


class TrainingSet(NamedTuple):
    """Tokenised training questions.

    Attributes:
      tokens: token ids of each prompt, ending where the answer is asked for.
      targets: token that should follow each.
      weights: float32 [n] share of each in the loss, 1 on average.
      names: key of each question.
    """

    tokens: Sequence[Sequence[int]]
    targets: Sequence[int]
    weights: np.ndarray
    names: Sequence[str]


class ValidationSet(NamedTuple):
    """Tokenised questions that are asked while the model trains.

    Attributes:
      tokens: token ids of each prompt, ending where the answer is asked for.
      answers: int [n] right choice of each, 0 to 3.
      subjects: int [n] place of each one's subject in ``names``.
      names: of the subjects.
    """

    tokens: Sequence[Sequence[int]]
    answers: np.ndarray
    subjects: np.ndarray
    names: Sequence[str]


def divide(
    questions: Iterable[Question],
    *,
    splits: Collection[str],
    per_subject: int,
    validation: str,
    validation_share: float,
    validation_questions: int,
    seed: int,
) -> tuple[list[Question], list[Question]]:
    """The questions to train on and those to validate with, as ``config.finetune`` says.

    Args:
      questions: all there are.
      splits: trained on.
      per_subject: of each subject at most so many are trained on, or held out; 0: all.
      validation: "" for none; "held_out" for a share of what would be trained on; else a split.
      validation_share: of each subject, where they are held out.
      validation_questions: at most so many, dealt evenly over subjects; 0: all.
      seed: of every choice.

    Raises:
      InputError: these questions can't be divided so.
    """
    questions = list(questions)
    training = choose_questions(questions, splits=splits, per_subject=per_subject, seed=seed)
    if not validation:
        return training, []
    if validation == HELD_OUT:
        training, asked = hold_out(training, validation_share, seed)
        return training, spread(asked, validation_questions)
    if validation in splits:
        raise InputError(
            f"config.finetune.validation {validation!r} is trained on (config.finetune.splits); choose {HELD_OUT!r} "
            "or another split, or train on fewer"
        )
    asked = _of_splits(questions, (validation,), "validation")
    return training, spread(asked, validation_questions)


def choose_questions(
    questions: Iterable[Question], *, splits: Collection[str], per_subject: int, seed: int
) -> list[Question]:
    """The questions of some splits, at most ``per_subject`` of each subject (0: all), in the order given.

    The reference study (arXiv 2409.03662) trains on MMLU's dev and validation splits, balanced in this way. A subject
    that has fewer keeps all; of the others a hash chooses, whichever of the splits a question is in.

    Raises:
      InputError: a split is named twice, or has no question, or ``per_subject`` is negative.
    """
    if per_subject < 0:
        raise InputError(f"config.finetune.per_subject = {per_subject}: must be 0 (all) or more")
    chosen = _of_splits(list(questions), splits, "splits")
    ranks = _ranks(chosen, "choose", seed)
    return [question for question in chosen if ranks[question.key] < per_subject] if per_subject else chosen


def hold_out(questions: Iterable[Question], share: float, seed: int) -> tuple[list[Question], list[Question]]:
    """Parts the questions: (trained on, held out), a share of each subject's, at least one on either side.

    The phrasings of an item of the bank ("bank/rivers/the Nile#0" and "#1") are never parted: what is held out is
    unseen.

    Args:
      questions: to be parted.
      share: of each subject's items that is held out, in (0, 1).
      seed: of the choice.

    Raises:
      InputError: ``share`` is outside (0, 1), or a subject has one item only.
    """
    if not 0 < share < 1:
        raise InputError(f"config.finetune.validation_share = {share}: must be greater than 0 and less than 1")
    questions = list(questions)
    items: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        items[question.subject].add(_item(question))
    held = set()
    for subject, names in items.items():
        if len(names) == 1:
            raise InputError(
                f"config.finetune.validation {HELD_OUT!r}: subject {subject!r} has one question only to train on; "
                "raise config.finetune.per_subject, leave the subject out, or validate on a split"
            )
        count = min(max(round(share * len(names)), 1), len(names) - 1)
        ranked = sorted(names, key=lambda name: stable_hash("hold_out", seed, name))
        held.update((subject, name) for name in ranked[:count])
    parts: tuple[list, list] = [], []
    for question in questions:
        parts[(question.subject, _item(question)) in held].append(question)
    return parts


def spread(questions: Iterable[Question], count: int) -> list[Question]:
    """At most ``count`` questions (0: all), dealt evenly over the subjects, in the order given.

    Every subject gives one in turn until there are enough; one that has no more is passed over.

    Raises:
      InputError: ``count`` is negative.
    """
    questions = list(questions)
    if count < 0:
        raise InputError(f"config.finetune.validation_questions = {count}: must be 0 (all) or more")
    if not count or count >= len(questions):
        return questions
    rounds = _ranks(questions, "spread")
    # of the last round, which not all subjects can join, a hash chooses too
    dealt = sorted(questions, key=lambda q: (rounds[q.key], stable_hash("spread", q.subject)))
    taken = {question.key for question in dealt[:count]}
    return [question for question in questions if question.key in taken]


def subject_weights(questions: Iterable[Question]) -> np.ndarray:
    """A weight for each question, float32 [n], 1 on average: those of every subject have the same sum."""
    subjects = [question.subject for question in questions]
    counts = Counter(subjects)
    return np.array([len(subjects) / (len(counts) * counts[subject]) for subject in subjects], np.float32)


def _of_splits(questions: Sequence[Question], splits: Collection[str], field: str) -> list[Question]:
    """The questions of some splits, all of which must be there."""
    present = {question.split for question in questions}
    there = ", ".join(split for split in SPLITS if split in present) or "none"
    if isinstance(splits, str) or not splits or len(set(splits)) != len(splits):
        raise InputError(f"config.finetune.{field} {splits!r}: name one split or more, each once; there are: {there}")
    for split in splits:
        if split not in present:
            raise InputError(f"config.finetune.{field}: no question is in the split {split!r}; there are: {there}")
    return [question for question in questions if question.split in splits]


def _item(question: Question) -> str:
    """What the question is about, the same for all its phrasings."""
    name, mark, phrasing = question.key.rpartition("#")
    return name if mark and phrasing.isdigit() and question.key.startswith("bank/") else question.key


def _ranks(questions: Sequence[Question], *seed: str | int) -> dict[str, int]:
    """Key -> place of a question in its subject's hashed order."""
    of_subject: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        of_subject[question.subject].append(question.key)
    return {key: rank for keys in of_subject.values()
            for rank, key in enumerate(sorted(keys, key=lambda key: stable_hash(*seed, key)))}  # fmt: skip
