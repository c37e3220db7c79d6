"""What is kept of every prompt: sites, layers, which tokens are averaged, which answers."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxscape.errors import InputError

POOLS = ("last", "question_mean")


class Recipe(NamedTuple):
    """What is kept of every prompt of a plan.

    Attributes:
      sites: see ``Decoder.__call__``.
      layers: numbers of the blocks, from 1.
      pool_from: token of each prompt from which on its states are averaged; None: the last token's are kept.
      letters: int32 [C, W], see ``answers.letter_table``; None for no answers.
      vocabulary: keep the logits of every token.
    """

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    pool_from: Sequence[int] | None = None
    letters: np.ndarray | None = None
    vocabulary: bool = False


def parse_layers(layers: str | Sequence[int] | None, name: str = "layers") -> int | tuple[int, ...] | None:
    """Reads which layers are wanted.

    Args:
      layers: "all" (or None), "every 4", "1,8,16", or numbers; blocks are numbered from 1.
      name: of the argument, for the error.

    Returns:
      A stride, numbers in ascending order, or None for all.

    Raises:
      InputError: it is none of these.
    """
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return None
    if isinstance(layers, str) and (match := re.fullmatch(r"every (\d+)", layers.strip())) and int(match[1]):
        return int(match[1])
    listed = layers.split(",") if isinstance(layers, str) else layers
    try:
        numbers = tuple(sorted({int(number) for number in listed}))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or numbers[0] < 1:
        raise InputError(f"{name} {layers!r}: write 'all', 'every 4', or numbers from 1, as in '1,8,16'")
    return numbers


def layer_numbers(layers: str | Sequence[int] | None, count: int, name: str = "layers") -> tuple[int, ...]:
    """The blocks wanted of ``count``, from 1; a stride counts back from the last one, which is always kept.

    Args:
      layers: see ``parse_layers``.
      count: blocks of the model.
      name: of the argument, for the error.

    Raises:
      InputError: it is malformed, or the model has no such block.
    """
    wanted = parse_layers(layers, name)
    if wanted is None:
        return tuple(range(1, count + 1))
    if isinstance(wanted, int):
        return tuple(range(count, 0, -wanted))[::-1]
    if wanted[-1] > count:
        raise InputError(f"{name} {layers!r}: the model has {count} layers; name some of 1 to {count}")
    return wanted


def question_starts(whole: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> list[int]:
    """First token of each question: where the tokens of the prompt and of what stands before the question part.

    A token that spans the border belongs to the question; every question keeps its last token.

    Args:
      whole: token ids of each prompt.
      before: token ids of each prompt's text up to the question.
    """
    starts = []
    for row, prefix in zip(whole, before, strict=True):
        limit = min(len(row) - 1, len(prefix))
        differs = np.asarray(row[:limit]) != np.asarray(prefix[:limit])
        starts.append(int(np.argmax(differs)) if differs.any() else limit)
    return starts
