"""Which prompts run together, after which cache, in which shape: everything is decided before anything runs.

A plan is a function of the token ids, the budget and the number of lanes (replicas of the model that run side by side,
each its own batch; one on a single device). It is a list of jobs. A job makes at most one cache a lane, runs every
batch that needs it and frees it, so that one cache a lane is alive (two while the next is being made).
"""

import hashlib
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxscape.collect.prefixes import Attached, Family, find_families
from jaxscape.collect.shapes import PAIR_COST, Need, choose_shapes, cost
from jaxscape.data.batches import BatchShape

MOST_SHAPES = 12  # programs of a plan, those that make caches included
MOST_PADDING = 0.1  # of the tokens computed; of few prompts it may be more: the shapes stay few
_DEAREST = 1.2  # what keeping to that may cost
_PIECE_PROMPTS = 512  # prompts of a lane between two writes to disk, at most,
_PIECE_WAVES = 32  # ... and passes
_FEWEST_TOKENS = 128  # a pass of fewer takes as long: it reads every weight


class Wave(NamedTuple):
    """One pass of all lanes in one shape.

    Attributes:
      rows: prompts of each lane; () for a lane that has none left.
      depths: cached tokens that stand before each lane's rows.
      shape: of every lane's batch.
      room: cached tokens that the program sees, padding included; 0 for no cache.
    """

    rows: tuple[tuple[int, ...], ...]
    depths: tuple[int, ...]
    shape: BatchShape
    room: int


class Job(NamedTuple):
    """The passes between making a cache and freeing it.

    Attributes:
      sources: for each lane, a prompt that begins with the tokens to be cached.
      lengths: cached tokens of each lane; all 0 for no cache.
      serves: tokens of the longest prompt that each lane's cache serves.
      room: tokens that the pass which makes the cache has room for; 0 for none.
      pieces: passes between two writes to disk.
    """

    sources: tuple[int, ...]
    lengths: tuple[int, ...]
    serves: tuple[int, ...]
    room: int
    pieces: tuple[tuple[Wave, ...], ...]


class Plan(NamedTuple):
    """How prompts run.

    Attributes:
      tokens: token ids of every prompt.
      lanes: batches that run side by side.
      jobs: in the order in which they run.
    """

    tokens: Sequence[Sequence[int]]
    lanes: int
    jobs: Sequence[Job]

    def pieces(self) -> Iterator[tuple[int, Job, tuple[Wave, ...]]]:
        """(number, job, passes) of every piece."""
        numbered = ((job, piece) for job in self.jobs for piece in job.pieces)
        return ((number, job, piece) for number, (job, piece) in enumerate(numbered))

    def digest(self) -> str:
        """SHA-256 of what decides the numbers: tokens, and which run together in which shape."""
        found = hashlib.sha256(repr((self.lanes, list(self.jobs))).encode())
        for row in self.tokens:
            found.update(np.asarray(row, "<i4").tobytes() + b";")
        return found.hexdigest()


class _Batch(NamedTuple):
    rows: tuple[int, ...]
    depth: int
    need: Need


def plan_collection(
    tokens: Sequence[Sequence[int]],
    token_budget: int,
    *,
    lanes: int = 1,
    limits: Sequence[int] | None = None,
    long_from: int | None = None,
    pass_cost: float | None = None,
    pair_cost: float = PAIR_COST,
) -> Plan:
    """Plans how prompts run: shared prefixes once, in at most ``MOST_SHAPES`` shapes, with little padding.

    Args:
      tokens: token ids of each prompt, one at least.
      token_budget: tokens of a batch, at most, or those of the longest prompt.
      lanes: batches that run side by side.
      limits: tokens of each prompt that may come from a cache; None: all but the last.
      long_from: prompts longer than this many tokens share nothing with those that aren't (LongRoPE); None: no such
        border.
      pass_cost: see ``prefixes.find_families``; None: a short pass, and a batch that is left a quarter empty.
      pair_cost: what a query meeting a key costs in tokens.
    """
    limits = [len(row) - 1 for row in tokens] if limits is None else limits
    sides = None if long_from is None else [len(row) > long_from for row in tokens]
    pass_cost = _FEWEST_TOKENS + token_budget / 4 if pass_cost is None else pass_cost
    drafts: list[_Draft] = []
    # many small families leave many batches half empty; of several lanes most padding is what one has more than others
    for scale in (1, 4, 16) if lanes == 1 and pass_cost else (1,):
        families = find_families(tokens, limits, scale * pass_cost, sides)
        drafts += [_shaped(crews, tokens, room, even, pair_cost) for room in _rooms(token_budget)
                   for crews in _crews(families, tokens, room, lanes) for even in (False, True)]  # fmt: skip
        least = min(draft.cost for draft in drafts)
        bounded = [d for d in drafts if d.padding <= MOST_PADDING and d.cost <= _DEAREST * least]
        best = min(bounded or drafts, key=lambda draft: draft.cost)
        if bounded:
            break
    return Plan(tokens, lanes, [_job(step, tokens, lanes) for step in best.jobs])


def _rooms(budget: int) -> list[int]:
    """Sizes of a batch worth trying."""
    return sorted({budget, math.ceil(0.75 * budget), math.ceil(0.5 * budget)}, reverse=True)


# -- lanes -------------------------------------------------------------------------------------------------------------


_Crew = list[Family]


def _crews(families: Sequence[Family], tokens, budget: int, lanes: int) -> list[list[_Crew]]:
    """Ways to let families run side by side, one a lane; large ones are split so that lanes finish together."""
    if lanes == 1:
        return [[[family] for family in families]]
    total = sum(_work(family, tokens) for family in families)
    options = []
    for share in (4, 8, 16, 32):
        parts = [part for family in families for part in _split(family, tokens, max(budget, total / lanes / share))]
        for similar in (1, 3, len(parts)):  # crews among which caches may differ in length
            crews = []
            for cached in (True, False):  # passes with and without a cache are different programs
                of_kind = sorted((part for part in parts if bool(part.length) == cached),
                                 key=lambda part: (-part.length, part.source))  # fmt: skip
                for start in range(0, len(of_kind), similar * lanes):
                    by_work = sorted(of_kind[start : start + similar * lanes], key=lambda part: -_work(part, tokens))
                    crews += [by_work[first : first + lanes] for first in range(0, len(by_work), lanes)]
            options.append(crews)
    return options


def _work(family: Family, tokens) -> int:
    """Tokens that run after the cache."""
    return sum(len(tokens[row]) - point.depth for point in family.points for row in point.rows)


def _split(family: Family, tokens, target: float) -> list[Family]:
    """Parts of about ``target`` tokens, and of four times the cache's at least, that each make the cache anew."""
    count = max(1, round(_work(family, tokens) / max(target, 4 * family.length)))
    count = min(count, max(len(point.rows) for point in family.points))
    parts = []
    for start in range(count):
        points = []
        for point in family.points:
            by_length = sorted(point.rows, key=lambda row: (len(tokens[row]), row))
            points += [Attached(point.depth, tuple(by_length[start::count]))] if by_length[start::count] else []
        source = points[0].rows[0] if points[0].depth == family.length else family.source
        parts.append(family._replace(source=source, points=tuple(points)))
    return parts


# -- batches -----------------------------------------------------------------------------------------------------------


def _lane_batches(family: Family, tokens, budget: int, even: bool) -> list[_Batch]:
    """The batches of a lane: deepest first, of one depth those with the longest rows first."""
    batches = []
    for point in family.points:
        lengths = {row: len(tokens[row]) - point.depth for row in point.rows}
        total = sum(lengths.values())
        # an even share, and a little more, so that rows find their places
        room = min(budget, math.ceil(1.02 * total / math.ceil(total / budget))) if even else budget
        for rows in _fill(lengths, max(room, *lengths.values())):
            own = [lengths[row] for row in rows]
            batches.append(_Batch(tuple(rows), point.depth, Need(sum(own), len(own), max(own), point.depth)))
    return batches


def _fill(lengths: dict[int, int], budget: int) -> list[list[int]]:
    """Rows in batches of at most ``budget`` tokens: the longest that is left, then ever the longest that still fits."""
    left = sorted(((length, row) for row, length in lengths.items()), key=lambda pair: (pair[0], -pair[1]))
    sizes = [length for length, _ in left]
    batches = []
    while left:
        batch, room = [], budget
        while place := bisect_right(sizes, room):
            room -= sizes.pop(place - 1)
            batch.append(left.pop(place - 1)[1])
        batches.append(batch)
    return batches


class _Step(NamedTuple):
    """A crew, the room of its cache, and its passes: each lane's batch, and the shape."""

    crew: _Crew
    room: int
    passes: list[tuple[list[_Batch | None], Need]]


class _Draft(NamedTuple):
    cost: float
    padding: float
    jobs: list[_Step]


def _shaped(crews: Sequence[_Crew], tokens, budget: int, even: bool, pair_cost: float) -> _Draft:
    """Deals out the batches of all crews and chooses their shapes."""
    needs, steps = [], []
    for crew in crews:
        length = max(family.length for family in crew)
        batches = [_lane_batches(family, tokens, budget, even) for family in crew]
        aligned = [list(running) for running in itertools.zip_longest(*batches)]
        steps.append((length, aligned))
        needs += [Need(length, 1, length, -1)] if length else []
        needs += [Need(*np.max([batch.need for batch in running if batch], axis=0)) for running in aligned]
    shapes = choose_shapes(needs, MOST_SHAPES, pair_cost)
    computed, spent, shape_of = sum(s.tokens for s in shapes), sum(cost(s, pair_cost) for s in shapes), iter(shapes)
    jobs, run = [], 0
    for crew, (length, aligned) in zip(crews, steps, strict=True):
        room = next(shape_of).tokens if length else 0
        jobs.append(_Step(crew, room, [(running, next(shape_of)) for running in aligned]))
        run += sum(family.length + _work(family, tokens) for family in crew)
    return _Draft(spent, 1 - run / computed / max(map(len, crews)), jobs)


def _job(step: _Step, tokens, lanes: int) -> Job:
    """A crew's passes; lanes without a family repeat the first one's cache and run empty batches."""
    idle = lanes - len(step.crew)
    members, waves = [*step.crew, *[step.crew[0]] * idle], []
    for running, shape in step.passes:
        running = [*running, *[None] * idle]
        rows = tuple(batch.rows if batch else () for batch in running)
        depths = tuple(batch.depth if batch else min(family.length, shape.prefix)
                       for batch, family in zip(running, members, strict=True))  # fmt: skip
        waves.append(Wave(rows, depths, BatchShape(*shape[:3]), shape.prefix))
    serves = [max(len(tokens[row]) for point in family.points for row in point.rows) for family in members]
    return Job(
        tuple(family.source for family in members),
        tuple(family.length for family in members),
        tuple(serves),
        step.room,
        tuple(_pieces(waves, lanes)),
    )


def _pieces(waves: Sequence[Wave], lanes: int) -> Iterator[tuple[Wave, ...]]:
    piece, prompts = [], 0
    for wave in waves:
        size = sum(map(len, wave.rows))
        if piece and (prompts + size > _PIECE_PROMPTS * lanes or len(piece) >= _PIECE_WAVES):
            yield tuple(piece)
            piece, prompts = [], 0
        piece.append(wave)
        prompts += size
    yield tuple(piece)


# -- what a plan costs -------------------------------------------------------------------------------------------------


def plan_facts(plan: Plan) -> dict[str, int | float]:
    """What a plan computes.

    Returns:
      prompt_tokens: of all prompts; tokens_run: prefixes once; tokens_computed: padding included; padding: its share
      of them; cells: of the padded views that attention sees, a token run after a cache; programs: shapes to compile;
      passes: how many run.
    """
    run = computed = cells = suffixes = passes = 0
    programs = set()
    for job in plan.jobs:
        if job.room:
            programs.add((job.room, -1))
            computed += job.room * plan.lanes
            busy = max(sum(1 for rows in wave.rows if rows) for piece in job.pieces for wave in piece)
            run += sum(job.lengths[:busy])
            passes += 1
        for wave in (wave for piece in job.pieces for wave in piece):
            programs.add((wave.shape, wave.room))
            computed += wave.shape.tokens * plan.lanes
            cells += wave.shape.rows * wave.shape.longest * plan.lanes
            suffixes += sum(len(plan.tokens[row]) - depth
                            for rows, depth in zip(wave.rows, wave.depths, strict=True) for row in rows)
            passes += 1
    run += suffixes
    return {
        "prompt_tokens": sum(map(len, plan.tokens)),
        "tokens_run": run,
        "tokens_computed": computed,
        "padding": round(1 - run / computed, 4),
        "cells_per_token": round(cells / suffixes, 2),
        "programs": len(programs),
        "passes": passes,
    }
