"""Which prompts share their first tokens, found from the token ids themselves, and what is worth running once.

Sorted lexicographically, prompts that begin alike stand side by side: the longest common prefixes of neighbours are
a tree (of "LCP intervals", Abouelhoda, Kurtz & Ohlebusch 2004). Prompts are attached to some of its nodes, each after
as many shared tokens as pays. Nodes on one path of the tree are served by one cache, that of the deepest: the header
of a subject, its first shot, its second, ...
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Attached(NamedTuple):
    """Prompts that run after the same tokens.

    Attributes:
      depth: tokens they share and do not run themselves.
      rows: which prompts.
    """

    depth: int
    rows: tuple[int, ...]


class Family(NamedTuple):
    """Prompts served by one cache, or by none.

    Attributes:
      source: a prompt that begins with the cached tokens.
      length: cached tokens; 0 for no cache.
      points: where on the cache they are attached, deepest first.
    """

    source: int
    length: int
    points: tuple[Attached, ...]


class _Node(NamedTuple):
    depth: int
    start: int
    stop: int


def find_families(
    tokens: Sequence[Sequence[int]], limits: Sequence[int], pass_cost: float, sides: Sequence[bool] | None = None
) -> list[Family]:
    """Groups prompts by the prefixes that are worth running once.

    Args:
      tokens: token ids of each prompt.
      limits: tokens of each prompt that may come from a cache, fewer than it has.
      pass_cost: what another pass, and another group of prompts that can't share a batch, costs in tokens.
      sides: prompts on two sides share nothing (None: all are on one).

    Returns:
      Families in lexical order, those without a cache last; every prompt is attached once.
    """
    sides = [False] * len(tokens) if sides is None else sides
    cached, alone = [], []
    for side in sorted(set(sides)):
        members = [row for row in range(len(tokens)) if sides[row] == side]
        found, rest = _families_of(members, tokens, limits, pass_cost)
        cached += found
        alone += [Family(rest[0], 0, (Attached(0, tuple(rest)),))] if rest else []
    return cached + alone


def _families_of(members, tokens, limits, pass_cost) -> tuple[list[Family], list[int]]:
    """Families with a cache, and the prompts that run whole."""
    keys = {row: np.asarray(tokens[row][: limits[row]], ">u4").tobytes() for row in members}
    order = sorted(members, key=lambda row: (keys[row], row))  # bytes in big-endian order sort as their numbers do
    shared = [_common(keys[a], keys[b]) for a, b in zip(order, order[1:], strict=False)]
    cuts, parents = _worthwhile(_intervals(shared, len(order)), pass_cost)
    attached = np.full(len(order), -1)
    for number, cut in enumerate(cuts):
        attached[cut.start : cut.stop] = number  # parents come first, so the deepest stays
    counts = np.bincount(attached[attached >= 0], minlength=len(cuts))
    target = _prune(cuts, parents, counts, pass_cost)
    rows: dict[int, list[int]] = {}
    for place, cut in enumerate(attached):
        rows.setdefault(target[cut] if cut >= 0 else -1, []).append(order[place])
    alone = sorted(rows.pop(-1, []))
    owner = _owners(cuts, parents, rows)
    families: dict[int, list[int]] = {}
    for cut in rows:
        families.setdefault(owner[cut], []).append(cut)
    found = []
    for deepest in sorted(families):
        points = sorted(families[deepest], key=lambda cut: -cuts[cut].depth)
        attachments = tuple(Attached(cuts[cut].depth, tuple(sorted(rows[cut]))) for cut in points)
        found.append(Family(attachments[0].rows[0], cuts[deepest].depth, attachments))
    return found, alone


def _common(first: bytes, second: bytes) -> int:
    """Tokens that two keys share."""
    length = min(len(first), len(second)) // 4
    differs = np.frombuffer(first, np.uint32, length) != np.frombuffer(second, np.uint32, length)
    return int(np.argmax(differs)) if differs.any() else length


def _intervals(shared: Sequence[int], count: int) -> list[_Node]:
    """The nodes of the tree, of two prompts at least, parents before children."""
    nodes, stack = [], [(0, 0)]  # depth, start
    for stop, depth in enumerate([*shared, 0], start=1):
        start = stop - 1
        while stack[-1][0] > depth:
            top, start = stack.pop()
            nodes.append(_Node(top, start, stop))
        if stack[-1][0] < depth:
            stack.append((depth, start))
    return sorted(nodes, key=lambda node: (node.start, -node.stop, node.depth))


def _worthwhile(nodes: Sequence[_Node], pass_cost: float) -> tuple[list[_Node], list[int]]:
    """The nodes whose prompts save more than the cache costs, and the number of each one's parent (-1: none)."""
    cuts, parents, open_cuts = [], [], []
    for node in nodes:
        while open_cuts and cuts[open_cuts[-1]].stop <= node.start:
            open_cuts.pop()
        above = cuts[open_cuts[-1]].depth if open_cuts else 0
        if (node.stop - node.start) * (node.depth - above) > node.depth + pass_cost:
            parents.append(open_cuts[-1] if open_cuts else -1)
            open_cuts.append(len(cuts))
            cuts.append(node)
    return cuts, parents


def _prune(cuts, parents, counts, pass_cost) -> list[int]:
    """Where the prompts of each node go: few that their children left behind move on to the parent (-1: none)."""
    target = list(range(len(cuts)))
    counts, inner = counts.copy(), np.zeros(len(cuts), bool)
    for cut in reversed(range(len(cuts))):
        parent = parents[cut]
        above = cuts[parent].depth if parent >= 0 else 0
        cost = pass_cost + (0 if inner[cut] else cuts[cut].depth)  # a deeper cache is there anyway
        if counts[cut] * (cuts[cut].depth - above) <= cost:
            target[cut] = parent
            if parent >= 0:
                counts[parent] += counts[cut]
                inner[parent] |= inner[cut]
        elif parent >= 0:
            inner[parent] = True
    for cut in range(len(cuts)):
        if target[cut] not in (cut, -1):
            target[cut] = target[target[cut]]
    return target


def _owners(cuts, parents, rows) -> list[int]:
    """The deepest node with prompts below each node, whose cache serves it."""
    owner = [cut if cut in rows else -1 for cut in range(len(cuts))]
    for cut in reversed(range(len(cuts))):
        parent = parents[cut]
        if parent >= 0 and owner[cut] >= 0 and (
            owner[parent] < 0 or cuts[owner[cut]].depth > cuts[owner[parent]].depth
        ):
            owner[parent] = owner[cut]
    return owner
