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
      segments: int32 [N]; None where each row of the padded view is one prompt. Else rows of it hold several prompts,
        and this is the number of each token's prompt, its place in ``last`` (B for padding); a token sees its own
        prompt alone.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    cells: np.ndarray
    last: np.ndarray
    segments: np.ndarray | None = None


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
    return _laid_out(rows, [(number, 0) for number in range(len(rows))], shape, shape.rows)


def pack_together(rows: Sequence[Sequence[int]], shape: BatchShape, prompts: int) -> TokenBatch:
    """Lays rows of token ids out as ``pack`` does, but several to a row of the padded view, which has few.

    The rows go into it first-fit-decreasing: the longest first, each into the first row that has room.

    Args:
      rows: token ids of each prompt.
      shape: its ``rows`` and ``longest`` are of the padded view.
      prompts: entries of ``last``; those beyond the rows are 0.

    Returns:
      The batch with its ``segments``; tokens, positions and ``last`` are as ``pack`` has them.

    Raises:
      ValueError: the rows do not fit the shape, or one is empty.
    """
    lengths = [len(row) for row in rows]
    room, places = [shape.longest] * shape.rows, [(0, 0)] * len(rows)
    fits = len(rows) <= prompts and sum(lengths) <= shape.tokens
    for number in sorted(range(len(rows)), key=lambda number: -lengths[number]):
        row = next((row for row in range(shape.rows) if room[row] >= lengths[number]), None)
        if row is None or not fits:
            raise ValueError(f"rows: {len(rows)} of lengths {lengths} do not fit {shape} of {prompts} prompts")
        places[number] = row, shape.longest - room[row]
        room[row] -= lengths[number]
    segments = np.full(shape.tokens, prompts, np.int32)
    segments[: sum(lengths)] = np.repeat(np.arange(len(rows)), lengths)
    return _laid_out(rows, places, shape, prompts)._replace(segments=segments)


def _laid_out(rows: Sequence[Sequence[int]], places: Sequence[tuple[int, int]], shape: BatchShape,
              prompts: int) -> TokenBatch:
    """The batch whose rows begin at ``places``, (row, column) of the padded view."""
    if min(map(len, rows), default=1) < 1:
        raise ValueError("rows: one has no token")
    tokens = np.zeros(shape.tokens, np.int32)
    positions = np.zeros(shape.tokens, np.int32)
    slots = np.full((shape.rows, shape.longest), shape.tokens, np.int32)
    cells = np.full(shape.tokens, shape.rows * shape.longest, np.int32)
    last = np.zeros(prompts, np.int32)
    start = 0
    for number, (row, (line, column)) in enumerate(zip(rows, places, strict=True)):
        stop = start + len(row)
        own = np.arange(len(row), dtype=np.int32)
        tokens[start:stop], positions[start:stop] = row, own
        slots[line, column : column + len(row)] = start + own
        cells[start:stop] = line * shape.longest + column + own
        last[number] = stop - 1
        start = stop
    return TokenBatch(tokens, positions, slots, cells, last)


def round_up(n: int, step: int = _LENGTH_STEP) -> int:
    """The smallest multiple of ``step`` that is at least ``n``."""
    return math.ceil(n / step) * step
