"""Prompts of different lengths in one batch of a fixed shape, without padding the tokens.

Letters in shape comments: N tokens of a batch, B rows (prompts), T tokens of the longest row.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_LENGTH_STEP = 8


class TokenBatch(NamedTuple):
    """Rows of tokens laid end to end, with the maps to and from their padded [B, T] view.

    Attributes:
      tokens: int32 [N]; rows end to end, then zeros.
      positions: int32 [N]; place of a token in its row.
      slots: int32 [B, T]; index in [0, N) of the token in each cell; N for an empty cell.
      cells: int32 [N]; flat cell row * T + place of each token; B * T for padding.
      last: int32 [B]; index in [0, N) of each row's last token; 0 for an empty row.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    cells: np.ndarray
    last: np.ndarray


class BatchShape(NamedTuple):
    """Sizes that one compiled program serves: N tokens, B rows, T tokens a row at most."""

    tokens: int
    rows: int
    longest: int


def pack(rows: Sequence[Sequence[int]], shape: BatchShape) -> TokenBatch:
    """Lays rows of token ids out in a batch of a given shape.

    Raises:
      ValueError: the rows do not fit the shape, or one is empty.
    """
    lengths = [len(row) for row in rows]
    if len(rows) > shape.rows or sum(lengths) > shape.tokens or max(lengths, default=0) > shape.longest:
        raise ValueError(f"rows: {len(rows)} of lengths {lengths} do not fit {shape}")
    if min(lengths, default=1) < 1:
        raise ValueError("rows: one has no token")
    tokens = np.zeros(shape.tokens, np.int32)
    positions = np.zeros(shape.tokens, np.int32)
    slots = np.full((shape.rows, shape.longest), shape.tokens, np.int32)
    cells = np.full(shape.tokens, shape.rows * shape.longest, np.int32)
    last = np.zeros(shape.rows, np.int32)
    start = 0
    for i, row in enumerate(rows):
        stop = start + len(row)
        places = np.arange(len(row), dtype=np.int32)
        tokens[start:stop], positions[start:stop] = row, places
        slots[i, : len(row)] = start + places
        cells[start:stop] = i * shape.longest + places
        last[i] = stop - 1
        start = stop
    return TokenBatch(tokens, positions, slots, cells, last)


def round_up(n: int, step: int = _LENGTH_STEP) -> int:
    """The smallest multiple of ``step`` that is at least ``n``."""
    return math.ceil(n / step) * step
