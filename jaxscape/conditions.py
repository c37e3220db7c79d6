"""What an experiment asks, and how: its conditions by name, and its questions."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxscape.data import bank
from jaxscape.data.mmlu import load_mmlu
from jaxscape.data.questions import Question, select
from jaxscape.errors import InputError
from jaxscape.finetune import dataset
from jaxscape.workspace import digest

_EVERY_CHECKPOINT = "sft@all"


class Condition(NamedTuple):
    """One way of asking the questions.

    Attributes:
      name: "0shot", "5shot", "5shot_permuted", ..., "sft", "sft@40".
      shots: solved examples before the question.
      finetuned: asked of the fine-tuned model.
      permuted: the shots stand in another order before each question.
      step: of fine-tuning after which the model is asked; None: not fine-tuned, or by an adapter from elsewhere.
    """

    name: str
    shots: int
    finetuned: bool
    permuted: bool = False
    step: int | None = None


def parse_condition(name: str) -> Condition:
    """Reads a condition's name; the step of "sft" and of "sft@all" is not known yet.

    Raises:
      InputError: it is neither "<k>shot", "<k>shot_permuted", "sft", "sft@<step>" nor "sft@all".
    """
    if name in ("sft", _EVERY_CHECKPOINT):
        return Condition(name, 0, True)
    if match := re.fullmatch(r"sft@(\d+)", str(name)):
        return Condition(f"sft@{int(match[1])}", 0, True, False, int(match[1]))
    if match := re.fullmatch(r"(\d+)shot(_permuted)?", str(name)):
        return Condition(name, int(match[1]), False, bool(match[2]))
    raise InputError(f"config.conditions: {name!r} is not a condition; write '<k>shot', '<k>shot_permuted', 'sft', "
                     "'sft@<step>' or 'sft@all'")


def expand_conditions(conditions: Sequence[Condition], kept: Sequence[int]) -> list[Condition]:
    """The conditions with the steps of their checkpoints: "sft" is the last one, "sft@all" all of them, in order.

    Args:
      conditions: as ``parse_condition`` reads them.
      kept: steps whose parameters fine-tuning keeps, ascending; () where 'sft' is an adapter from elsewhere.

    Raises:
      InputError: none is named, one twice, or a step that is not kept.
    """
    found = [each for condition in conditions for each in _checkpoints(condition, kept)]
    names = [condition.name for condition in found]
    if not names or len(set(names)) < len(names):
        raise InputError(f"config.conditions {tuple(names)}: name at least one, each once")
    return found


def _checkpoints(condition: Condition, kept: Sequence[int]) -> list[Condition]:
    if not condition.finetuned:
        return [condition]
    if not kept:
        if condition.name != "sft":
            raise InputError(f"config.conditions: {condition.name!r} names a step of training, but 'sft' is the "
                             "adapter that config.finetune.adapter names, which has none; write 'sft'")
        return [condition]
    of_step = {step: Condition(f"sft@{step}", 0, True, False, step) for step in kept}
    of_step[kept[-1]] = Condition("sft", 0, True, False, kept[-1])
    if condition.name == _EVERY_CHECKPOINT:
        return list(of_step.values())
    step = kept[-1] if condition.step is None else condition.step
    if step not in of_step:
        raise InputError(f"config.conditions: {condition.name!r} is not kept; the steps kept are "
                         f"{', '.join(map(str, kept))} (by steps, epochs, checkpoints and warmup_ratio of "
                         "config.finetune)")
    return [of_step[step]]


class Questions(NamedTuple):
    """The questions of an experiment.

    Attributes:
      test: asked under every condition.
      dev: solved examples.
      train: for fine-tuning; [] where nothing is trained.
      subjects: of ``test``; the number of a subject is its place here.
      validation: asked as fine-tuning goes on.
    """

    test: Sequence[Question]
    dev: Sequence[Question]
    train: Sequence[Question]
    subjects: Sequence[str]
    validation: Sequence[Question] = ()

    def subject_numbers(self) -> np.ndarray:
        """int [N] subject of each test question."""
        number = {name: i for i, name in enumerate(self.subjects)}
        return np.array([number[q.subject] for q in self.test])

    def answers(self) -> np.ndarray:
        """int [N] right answer of each test question."""
        return np.array([q.answer for q in self.test])

    def fingerprint(self) -> str:
        """SHA-256 of every question."""
        parts = (self.test, self.dev, self.train, self.validation)
        return digest([[q.key, q.question, q.choices, q.answer] for part in parts for q in part])


def load_questions(data, finetune=None, seed: int = 0) -> Questions:
    """Loads what ``config.data`` names.

    Args:
      data: the section.
      finetune: ``config.finetune``, where there is something to train.
      seed: of which questions are trained on and which are held out.

    Raises:
      InputError: the source or a subject is unknown, a file is wrong, or there is nothing to train on.
    """
    kind, _, folder = data.source.partition(":")
    if data.mask and kind != "mmlu":
        raise InputError(f"config.data.mask {data.mask!r}: only mmlu:FOLDER takes a mask")
    if kind == "bank":
        everything = bank.load_bank(folder or None)
    elif kind == "mmlu" and folder:
        everything = load_mmlu(folder, splits=_mmlu_splits(finetune), mask=data.mask or None)
    else:
        raise InputError(f"config.data.source {data.source!r}: write 'bank', 'bank:FOLDER' or 'mmlu:FOLDER'")
    chosen = select(everything, subjects=tuple(map(str, data.subjects)) or None)
    test = select(chosen, split="test", per_subject=data.test_per_subject or None)
    subjects = list(dict.fromkeys(q.subject for q in test))
    dev = [q for q in chosen if q.split == "dev"]
    trained, validation = [], []
    if finetune:
        names = ("splits", "per_subject", "validation", "validation_share", "validation_questions")
        fields = {name: finetune[name] for name in names}
        askable = [*(q for q in chosen if q.split != "test"), *test]
        trained, validation = dataset.divide(askable, **fields, seed=seed)
    return Questions(test, dev, trained, subjects, validation)


def _mmlu_splits(finetune) -> tuple[str, ...]:
    """The splits whose files must be there."""
    wanted = {*finetune.splits, finetune.validation} if finetune else set()
    return ("dev", "validation", "test") if "validation" in wanted else ("dev", "test")
