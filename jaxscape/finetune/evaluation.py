"""Asks the validation questions of a model that is being trained."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxscape.data.batches import BatchShape, TokenBatch, pack, pack_together, round_up
from jaxscape.finetune.batching import PAIR_COST, group_steps, rows_needed
from jaxscape.finetune.dataset import ValidationSet
from jaxscape.models.answers import letter_logits
from jaxscape.models.sharding import lanes_sharding

TOKEN_BUDGET = 2048  # tokens of a batch, at most, or those of the longest question


class Evaluation(NamedTuple):
    """How a model answers: by the letter of the highest logit, of each letter's likelier spelling.

    Attributes:
      micro: share of the questions that are answered rightly.
      macro: mean over the subjects of each one's share.
      by_subject: name of a subject -> its share, in the order of ``ValidationSet.names``.
      loss: mean over the questions of -log p(right letter) in nats, where p is the softmax over the four letters'
        logits alone (ln 4 for one who can't tell); the loss of training is over the whole vocabulary.
    """

    micro: float
    macro: float
    by_subject: Mapping[str, float]
    loss: float


class Evaluator:
    """Asks the same questions again and again, in batches that are planned once: ``evaluator(params)``."""

    def __init__(
        self,
        graphdef,
        data: ValidationSet,
        letter_table: np.ndarray,
        lanes: int = 1,
        dtype=None,
        *,
        token_budget: int = TOKEN_BUDGET,
        packing: bool = False,
    ):
        """Plans the batches.

        Args:
          graphdef: of a ``Decoder``.
          data: one question at least.
          letter_table: int32 [4, W] tokens of each letter's spellings, see ``answers.letter_table``.
          lanes: batches that the model's mesh runs side by side.
          dtype: of the computation, see ``Decoder.__call__``.
          token_budget: tokens of a batch, at most, or those of the longest question.
          packing: put several questions in one row of the padded view.

        Raises:
          ValueError: there is no question, or one has no token.
        """
        lengths = np.array([len(row) for row in data.tokens], np.int64)
        if not len(lengths) or lengths.min() < 1:
            raise ValueError("data: needs one question at least, and each needs one token at least")
        self._graphdef, self._data, self._dtype, self._lanes = graphdef, data, dtype, lanes
        self._table = np.asarray(letter_table, np.int32)
        self.passes = plan_passes(lengths, token_budget, lanes, packing)
        self._most = max(len(own) for crew, _ in self.passes for own in crew) if packing else None

    def __call__(self, *states) -> Evaluation:
        """Asks all questions.

        Args:
          *states: the model's parameters, in one state or in several, such as the trainable and the frozen ones.
        """
        running = [(rows, _letters(self._graphdef, states, self._batch(rows, shape, states), self._table, self._dtype))
                   for rows, shape in self.passes]  # fmt: skip
        logits = np.zeros((len(self._data.tokens), len(self._table)))
        for rows, found in running:
            found = np.asarray(found).reshape(self._lanes, -1, len(self._table))
            for lane, own in enumerate(rows):
                logits[own] = found[lane, : len(own)]
        return judge(logits, self._data)

    def _batch(self, rows: Sequence[np.ndarray], shape: BatchShape, states) -> TokenBatch:
        """One lane's arrays as they are; of several, stacked and each put on its devices."""
        prompts = [[self._data.tokens[row] for row in own] for own in rows]
        lanes = [pack(own, shape) if self._most is None else pack_together(own, shape, self._most) for own in prompts]
        if len(lanes) == 1:
            return lanes[0]
        mesh = jax.tree.leaves(states)[0].sharding.mesh
        return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *lanes), lanes_sharding(mesh))


def judge(logits: np.ndarray, data: ValidationSet) -> Evaluation:
    """What the letters' logits [n, 4] of all questions come to; a question without numbers is answered wrongly."""
    answers, subjects = np.asarray(data.answers), np.asarray(data.subjects)
    hits = (logits.argmax(axis=1) == answers) & np.isfinite(logits).all(axis=1)
    shares = {name: float(hits[subjects == number].mean()) for number, name in enumerate(data.names)
              if (subjects == number).any()}  # fmt: skip
    top = logits.max(axis=1)
    with np.errstate(invalid="ignore"):  # a model that has diverged has a loss that says so
        losses = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - logits[np.arange(len(logits)), answers]
    return Evaluation(float(hits.mean()), float(np.mean(list(shares.values()))), shares, float(losses.mean()))


def plan_passes(
    lengths: np.ndarray, token_budget: int, lanes: int, packing: bool = False
) -> list[tuple[tuple[np.ndarray, ...], BatchShape]]:
    """The questions of each lane, and the shape, of every pass; questions of about the same length run together.

    Args:
      lengths: int [n] tokens of each question.
      token_budget: tokens of a batch, at most, or those of the longest question.
      lanes: batches of a pass.
      packing: a row of the padded view may hold several questions.
    """
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    edges = _edges(ends, max(token_budget, int(lengths.max())), lanes)
    batches = [order[first:last] for first, last in zip(edges, edges[1:], strict=False)]
    batches += [order[:0]] * (-len(batches) % lanes)
    crews = [tuple(batches[first : first + lanes]) for first in range(0, len(batches), lanes)]
    needs = np.array([[round_up(max(int(lengths[own].sum()) for own in crew)), round_up(int(lengths[crew[0][0]])),
                       max(map(len, crew))] for crew in crews])  # fmt: skip

    def cost(tokens, longest, rows):
        return tokens + PAIR_COST * longest * (tokens if packing else rows * longest)

    which, shapes = group_steps(needs, cost), []
    for number in range(which.max() + 1):
        tokens, longest, rows = needs[which == number].max(axis=0).tolist()
        if packing:
            mine = [own for crew, group in zip(crews, which, strict=True) if group == number for own in crew]
            rows = max(rows_needed(lengths[own][None], longest) for own in mine)
        shapes.append(BatchShape(tokens, rows, longest))
    return [(crew, shapes[number]) for crew, number in zip(crews, which, strict=True)]


def _edges(ends: np.ndarray, budget: int, lanes: int) -> list[int]:
    """Where batches begin and end, so that there are as few passes as can be and batches are about even.

    Args:
      ends: int [n] tokens of all questions up to each and with it.
      budget: tokens of a batch, at most those of the longest question or more.
      lanes: batches of a pass.
    """

    def filled(room: int) -> list[int]:
        edges = [0]
        while edges[-1] < len(ends):
            before = ends[edges[-1] - 1] if edges[-1] else 0
            edges.append(int(np.searchsorted(ends, before + room, side="right")))
        return edges

    def passes(room: int) -> int:
        return -(-(len(filled(room)) - 1) // lanes)

    fewest, low, high = passes(budget), int(ends[0]), budget
    while low < high:  # the least room that needs no more passes
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) <= fewest else (middle + 1, high)
    return filled(low)


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _letters(graphdef, states, batch: TokenBatch, table, dtype) -> jax.Array:
    """Logits of the letters, float32 [B, 4], with a leading axis of lanes where the batch has one."""

    def one(batch):
        model = nnx.merge(graphdef, *states)
        hidden = model(batch, dtype=dtype).hidden
        logits = model.logits(hidden, table.reshape(-1)).astype(jnp.float32)
        return letter_logits(logits, jnp.arange(table.size).reshape(table.shape))

    return (one if batch.tokens.ndim == 1 else jax.vmap(one))(batch)
