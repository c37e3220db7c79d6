"""A few shapes that hold many batches: every shape is a program to compile, every token too many is computed."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxscape.data.batches import round_up

PAIR_COST = 1 / 3000  # tokens' worth of time of a query meeting a key, in a small model; large ones have it cheaper
PASS_COST = 40  # tokens' worth of time that a pass costs beside its tokens
_SHAPE_WORTH = 512  # tokens that a further shape must save
_LEAST_GAIN = 0.01  # share of the whole cost that a further shape must save ...
_PADDING = 0.05  # ... unless more than this share of the tokens computed is padding
_STEP = 8


class Need(NamedTuple):
    """What a pass must hold, or what a program holds.

    Attributes:
      tokens: of all rows.
      rows: how many.
      longest: tokens of the longest row.
      prefix: cached tokens before each row; 0 for none, -1 where the pass makes the cache.
    """

    tokens: int
    rows: int
    longest: int
    prefix: int


def cost(need: Need, pair_cost: float) -> float:
    """Time of a pass in tokens: its tokens, and the padded view and the cache that attention sees."""
    pairs = need.rows * need.longest**2 / 2 + need.tokens * max(need.prefix, 0)
    return PASS_COST + need.tokens + pair_cost * pairs


def choose_shapes(needs: Sequence[Need], limit: int, pair_cost: float = PAIR_COST) -> list[Need]:
    """The shape of each pass, of at most ``limit`` kinds (or the three kinds of passes there are).

    Starts with one shape for each kind of pass and adds, one by one, the shape that saves most.

    Args:
      needs: of every pass.
      limit: shapes, at most.
      pair_cost: what a query meeting a key costs in tokens.

    Returns:
      The shape that each pass runs in.
    """
    rounded = np.apply_along_axis(_coarse, 0, np.array(needs))
    distinct, which, counts = np.unique(rounded, axis=0, return_inverse=True, return_counts=True)
    kinds = np.sign(distinct[:, 3])
    hulls = [_hull(distinct[kinds == kind]) for kind in np.unique(kinds)]
    tried = np.concatenate([hulls, *(_candidates(distinct[kinds == kind]) for kind in np.unique(kinds))]).astype(int)
    prices = _prices(tried, distinct, pair_cost)
    chosen = _refined(_greedy(prices, counts, tried, distinct, len(hulls), limit), prices, counts)
    used = _prices(tried[chosen], distinct, pair_cost).argmin(axis=0)[which.reshape(-1)]
    exact = np.array(needs)
    shapes = {number: _hull(exact[used == number]) for number in np.unique(used)}
    return [shapes[number] for number in used]


def _coarse(sizes: np.ndarray) -> np.ndarray:
    """Sizes rounded up by 4 % at most, so that few differ: it is what is chosen from, not what is run."""
    digits = 2.0 ** (np.floor(np.log2(np.maximum(sizes, 32))) - 5)
    return np.where(sizes > 0, np.ceil(sizes / digits) * digits, sizes).astype(int)


def _greedy(prices, counts, tried, needs, start: int, limit: int) -> list[int]:
    """The first ``start`` shapes, and then the one that saves most until none is worth it."""
    chosen = list(range(start))
    while len(chosen) < limit:
        current, used = prices[chosen].min(axis=0), prices[chosen].argmin(axis=0)
        before = current @ counts
        totals = np.minimum(current, prices) @ counts
        best = int(np.argmin(totals))
        padding = 1 - (needs[:, 0] @ counts) / (tried[chosen][used, 0] @ counts)
        least = _LEAST_GAIN * before if padding <= _PADDING else 0
        if before - totals[best] < max(_SHAPE_WORTH, least):
            break
        chosen.append(best)
    return chosen


def _refined(chosen: list[int], prices, counts) -> list[int]:
    """Exchanges one shape at a time for a better one: the first ones were chosen before the last ones were there."""
    for place in range(len(chosen)):
        others = chosen[:place] + chosen[place + 1 :]
        rest = prices[others].min(axis=0) if others else np.full(prices.shape[1], np.inf)
        chosen = [*others[:place], int(np.argmin(np.minimum(rest, prices) @ counts)), *others[place:]]
    return chosen


def _hull(needs: np.ndarray) -> Need:
    """The smallest shape that holds them all."""
    tokens, rows, longest, prefix = (int(n) for n in needs.max(axis=0))
    if prefix < 0:
        return Need(round_up(tokens, _STEP), rows, round_up(tokens, _STEP), prefix)
    return Need(round_up(tokens, _STEP), rows, round_up(longest, _STEP), round_up(prefix, _STEP))


def _holds(shapes: np.ndarray, needs: np.ndarray) -> np.ndarray:
    """bool [shapes, needs]; a pass without a cache is another program than one with it."""
    large_enough = (shapes[:, None, :] >= needs[None, :, :]).all(axis=-1)
    return large_enough & (np.sign(shapes[:, None, 3]) == np.sign(needs[None, :, 3]))


def _prices(shapes: np.ndarray, needs: np.ndarray, pair_cost: float) -> np.ndarray:
    """What each need costs in each shape, infinite where it doesn't fit: float [shapes, needs]."""
    alone = np.array([cost(Need(*map(int, shape)), pair_cost) for shape in shapes])
    return np.where(_holds(shapes, needs), alone[:, None], np.inf)


def _levels(values: np.ndarray, count: int) -> np.ndarray:
    """At most ``count`` of the values, evenly spaced in rank, the largest among them."""
    if not len(values):
        return values
    found = np.unique(np.ceil(values / _STEP).astype(int) * _STEP)
    if len(found) <= count:
        return found
    return found[np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))]


def _candidates(needs: np.ndarray) -> np.ndarray:
    """Shapes worth trying for passes of one kind: int [shapes, 4]."""
    if needs[0, 3] < 0:
        lengths = _levels(needs[:, 0], 16)
        return np.stack([lengths, np.ones_like(lengths), lengths, np.full_like(lengths, -1)], axis=1)
    prefixes, longest, made = _levels(needs[:, 3], 8), [0, *_levels(needs[:, 2], 8)], set()
    bands = list(itertools.product(prefixes, itertools.combinations(longest, 2)))
    for prefix, (low, high) in bands:
        # the rows of a band of lengths: short rows come in greater numbers
        band = needs[(needs[:, 3] <= prefix) & (needs[:, 2] > low) & (needs[:, 2] <= high)]
        for tokens in _levels(band[:, 0], max(5, min(16, 1000 // len(bands)))):
            made.add((int(tokens), int(band[band[:, 0] <= tokens][:, 1].max()), int(high), int(prefix)))
    return np.array(sorted(made))
