"""Which questions each step shows, and how they are laid out: all of it is known before training begins.

Letters in shape comments: S steps, Q questions of a step; a step's questions are dealt to parts x lanes bins, each a
batch of its own.
"""

import itertools
import math
from collections.abc import Callable

import jax
import numpy as np

from jaxscape.data.batches import BatchShape, pack, pack_together, round_up
from jaxscape.finetune.dataset import TrainingSet
from jaxscape.finetune.objective import TrainingBatch

MOST_SHAPES = 3  # programs of a run
COMPILATION = 4  # steps' worth of time of one more program: what it must save
PAIR_COST = 1 / 6000  # tokens' worth of time of a query meeting a key of the padded view, in a small model
_LEVELS = 32  # places among the sorted steps where a further shape may begin


def data_order(count: int, steps: int, batch_size: int, seed: int) -> np.ndarray:
    """Questions of every step: int [S, Q]; each epoch is a new permutation of all of them."""
    epochs = math.ceil(steps * batch_size / count)
    order = np.concatenate([np.random.default_rng((seed, epoch)).permutation(count) for epoch in range(epochs)])
    return order[: steps * batch_size].reshape(steps, batch_size)


class Batches:
    """The batches of a run, a function of the data and these numbers alone.

    Attributes:
      order: int [S, Q] questions of every step.
      shapes: of the programs; ``rows`` is of the padded view, of which a row may hold several questions.
      questions: most questions of a bin; a batch has so many targets.
    """

    def __init__(
        self, data: TrainingSet, *, steps: int, batch_size: int, parts: int, lanes: int, packing: bool, seed: int
    ):
        """Plans all steps.

        Args:
          data: what is trained on, one question at least.
          steps: of the run.
          batch_size: questions a step.
          parts: batches that a step runs one after the other.
          lanes: batches that run side by side.
          packing: put several questions in one row of the padded view.
          seed: of the order.

        Raises:
          ValueError: there is no question, one has no token, or one's weight isn't greater than 0.
        """
        lengths = np.array([len(row) for row in data.tokens], np.int64)
        if not len(lengths) or lengths.min() < 1 or not np.min(data.weights) > 0:
            raise ValueError("data: needs one question at least, each of one token at least and a weight above 0")
        self._data, self._parts, self._lanes, self._packing = data, parts, lanes, packing
        self.order = data_order(len(lengths), steps, batch_size, seed)
        self._lengths = lengths[self.order]
        bins = parts * lanes
        self.questions = math.ceil(batch_size / bins)
        self._bins = deal(self._lengths, bins, self.questions)
        self.shapes, self._shape_of = self._shaped()

    def _shaped(self) -> tuple[tuple[BatchShape, ...], np.ndarray]:
        """The shapes, and which of them each step has, int [S]."""
        bins = self._parts * self._lanes
        totals = np.max([np.where(self._bins == place, self._lengths, 0).sum(axis=1) for place in range(bins)], axis=0)
        needs = -(-np.stack([totals, self._lengths.max(axis=1)], axis=1) // round_up(1)) * round_up(1)

        def cost(tokens, longest):
            # packed rows are about full
            cells = tokens if self._packing else self.questions * longest
            return bins * (tokens + PAIR_COST * cells * longest)

        which = group_steps(needs, cost)
        shapes = []
        for number in range(which.max() + 1):
            tokens, longest = needs[which == number].max(axis=0).tolist()
            rows = self.questions
            if self._packing:
                mine, of_bin = self._lengths[which == number], self._bins[which == number]
                rows = max(rows_needed(np.where(of_bin == place, mine, 0), longest) for place in range(bins))
            shapes.append(BatchShape(tokens, rows, longest))
        return tuple(shapes), which

    def shape(self, step: int) -> BatchShape:
        """The shape of a step, counted from 0."""
        return self.shapes[self._shape_of[step]]

    def names(self, step: int) -> list[str]:
        """Keys of a step's questions."""
        return [self._data.names[question] for question in self.order[step]]

    def tokens(self, step: int) -> int:
        """Tokens of a step's questions, padding left out."""
        return int(self._lengths[step].sum())

    def step(self, step: int) -> TrainingBatch:
        """What a step shows, as NumPy arrays with leading axes [parts, lanes]; the weights' sum is 1."""
        shape, data = self.shape(step), self._data
        weights = np.asarray(data.weights, np.float64)[self.order[step]]
        weights = weights / weights.sum()
        layouts, targets, shares = [], [], []
        for place in range(self._parts * self._lanes):
            chosen = np.flatnonzero(self._bins[step] == place)
            rows = [data.tokens[question] for question in self.order[step, chosen]]
            layouts.append(pack_together(rows, shape, self.questions) if self._packing else pack(rows, shape))
            target, share = np.zeros(self.questions, np.int32), np.zeros(self.questions, np.float32)
            target[: len(chosen)] = [data.targets[question] for question in self.order[step, chosen]]
            share[: len(chosen)] = weights[chosen]
            targets.append(target)
            shares.append(share)

        def stacked(*arrays):
            return np.stack(arrays).reshape(self._parts, self._lanes, *arrays[0].shape)

        return TrainingBatch(jax.tree.map(stacked, *layouts), stacked(*targets), stacked(*shares))


def deal(lengths: np.ndarray, bins: int, most: int) -> np.ndarray:
    """The bin of every question, so that bins have about as many tokens: int [S, Q].

    The longest question that is left goes where the fewest tokens are and there is room (Graham 1969); of equals the
    first.

    Args:
      lengths: int [S, Q] tokens.
      bins: of each step.
      most: questions that a bin holds.
    """
    steps, here = len(lengths), np.arange(len(lengths))
    sums, counts = np.zeros((steps, bins), np.int64), np.zeros((steps, bins), np.int64)
    found = np.zeros(lengths.shape, np.int32)
    for questions in np.argsort(-lengths, axis=1, kind="stable").T:
        emptiest = np.where(counts < most, sums, np.iinfo(np.int64).max).argmin(axis=1)
        found[here, questions] = emptiest
        sums[here, emptiest] += lengths[here, questions]
        counts[here, emptiest] += 1
    return found


def rows_needed(lengths: np.ndarray, longest: int) -> int:
    """Most rows that first-fit-decreasing (see ``batches.pack_together``) fills with any batch's questions.

    Args:
      lengths: int [batches, Q] tokens of each one's questions, 0 for none.
      longest: tokens of a row.
    """
    lengths, here = -np.sort(-lengths, axis=1), np.arange(len(lengths))
    room = np.full(lengths.shape, longest, np.int64)
    for number in range(lengths.shape[1]):
        size = lengths[:, number]
        row = (room >= size[:, None]).argmax(axis=1)
        room[here, row] -= size
    return max(int((room < longest).sum(axis=1).max()), 1)


def group_steps(needs: np.ndarray, cost: Callable, limit: int = MOST_SHAPES, worth: float = COMPILATION) -> np.ndarray:
    """Which shape each step has, int [S], of as few as are worth compiling; shape 0 is the smallest.

    The steps, sorted by what they cost alone, are cut into consecutive groups, whose shapes have the largest of each
    size. Every way to cut at ``_LEVELS`` places is tried.

    Args:
      needs: int [S, sizes], such as tokens, and tokens of the longest question.
      cost: of a shape, a function of as many sizes.
      limit: groups, at most.
      worth: a further group must save what so many average steps cost.
    """
    ranked = np.argsort(cost(*needs.T), kind="stable")
    edges = np.unique(np.linspace(0, len(needs), _LEVELS + 1).round().astype(int))
    largest = np.array([needs[ranked[a:b]].max(axis=0) for a, b in itertools.pairwise(edges)])
    price = {}  # of every run of levels as one group
    for first in range(len(largest)):
        for last, hull in enumerate(np.maximum.accumulate(largest[first:]), first + 1):
            price[first, last] = (edges[last] - edges[first]) * cost(*hull)
    whole = len(largest)
    best, chosen = price[0, whole], (0, whole)
    least = worth * best / len(needs)
    for groups in range(2, min(limit, whole) + 1):
        cuts = ((0, *inner, whole) for inner in itertools.combinations(range(1, whole), groups - 1))
        total, cut = min((sum(price[pair] for pair in itertools.pairwise(cut)), cut) for cut in cuts)
        if total + least * (groups - len(chosen) + 1) < best:
            best, chosen = total, cut
    found = np.zeros(len(needs), np.int32)
    for number, (first, last) in enumerate(itertools.pairwise(chosen)):
        found[ranked[edges[first] : edges[last]]] = number
    return found
