"""Exact nearest neighbours as one compiled program: for accelerators, and wherever the points are being traced.

Letters in shapes: N points, M points that ask, D features, K neighbours, T rows of a tile, W candidates, B rows
searched directly.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxscape.landscape.distances import power_of_two, product_error

_TILE_ELEMENTS = 1 << 24  # scores held at once: 64 MiB in float32
_TILE_ROWS = 1024
GATHER_ELEMENTS = 1 << 22  # coordinates gathered at once when distances are recomputed
SEARCH_ROWS = 8  # rows of one step of a direct search


def tile_rows(m: int, n: int, tile_size: int | None) -> int:
    """Return the height of a tile of M x N scores: as many rows as asked for, or as fit in 64 MiB."""
    rows = min(m, _TILE_ROWS, max(1, _TILE_ELEMENTS // n)) if tile_size is None else min(m, tile_size)
    return math.ceil(m / math.ceil(m / rows))  # tiles of even height waste the fewest rows


def candidate_count(k: int, others: int) -> int:
    """Return how many candidates are sought for `k` neighbours among `others` points."""
    return min(others, k + max(16, k // 4))


def group_span(n: int, width: int) -> int:
    """Return how many columns share a maximum when `width` of `n` are selected in two levels; 1: in one."""
    span = 1 << max(0, math.floor(math.log2(max(1.0, math.sqrt(n / width)))))
    return span if span >= 4 else 1


@partial(jax.jit, static_argnames=("k", "tile"))
def search(x, queries, k: int, tile: int):
    """Return distances and indices [M, K] of the neighbours in `x` [N, D] of `queries` [M, D].

    `queries` None: of the points themselves, each of them left out of its own. See `neighbors.nearest_neighbors`.
    """
    itself = queries is None
    asking = x if itself else queries
    unit = power_of_two(jnp.maximum(jnp.max(jnp.abs(x)), jnp.max(jnp.abs(asking))))
    x, asking = x * (1 / unit), asking * (1 / unit)
    (n, dim), m = x.shape, asking.shape[0]
    others = n - itself
    width = candidate_count(k, others)
    error = product_error(dim, x.dtype)
    center = jnp.mean(x, axis=0)  # an offset shared by all points would eat the product's digits
    centred, centred_asking = x - center, asking - center
    norms, norms_asking = ((1 - error) * jnp.sum(a * a, axis=-1) for a in (centred, centred_asking))

    def one_tile(rows):
        closeness = closeness_of(centred_asking[rows], centred, norms)
        if itself:
            closeness = jnp.where(jnp.arange(n) == rows[:, None], -jnp.inf, closeness)
        kept, candidates = top(closeness, width)
        return candidates, norms_asking[rows] - kept[:, -1]

    rows = jnp.minimum(jnp.arange(math.ceil(m / tile) * tile), m - 1).reshape(-1, tile)
    candidates, floor = lax.map(one_tile, rows)
    candidates, floor = candidates.reshape(-1, width)[:m], floor.reshape(-1)[:m]
    distances, indices = refine(asking, x, candidates, k)
    if width < others:
        # Every point left out is at least sqrt(floor) away: below it, nothing can have been missed.
        safe = distances[:, -1] ** 2 * (1 + error) < floor
        distances, indices = lax.cond(
            jnp.all(safe),
            lambda: (distances, indices),
            lambda: refine(asking, x, _direct_candidates(asking, x, candidates, safe, itself), k),
        )
    return distances * unit, indices


def closeness_of(rows, centred, norms):
    """Return 2 a.b - |b|^2 [T, N] of centred rows a [T, D] and points b [N, D]: the larger, the nearer.

    With `norms` at the lower end of their error interval it ranks by the lower end of each squared distance's
    interval, so that the last one kept bounds all the others.
    """
    return 2 * jnp.matmul(rows, centred.T, precision=lax.Precision.HIGHEST) - norms


def top(values, width: int):
    """Return the `width` largest values [T, W] of each row, descending, and where they are.

    Wide rows are selected from in two levels: the largest are among the members of the groups of largest maximum.
    Which of several equal values are kept is left open.
    """
    n = values.shape[1]
    span = group_span(n, width)
    if span == 1:
        return largest(values, width)
    groups = math.ceil(n / span)
    values = jnp.pad(values, ((0, 0), (0, span * groups - n)), constant_values=-jnp.inf)
    group = largest(jnp.max(values.reshape(-1, span, groups), axis=1), width)[1]
    members = (jnp.arange(span, dtype=group.dtype)[:, None] * groups + group[:, None, :]).reshape(-1, span * width)
    kept, at = largest(jnp.take_along_axis(values, members, axis=1), width)
    return kept, jnp.take_along_axis(members, at, axis=1)


def largest(values, width: int):
    """Return the `width` largest values of each row, descending, and where they are; of equal values the first.

    The barriers keep what is done with the results from reaching into the selection, which XLA's CPU compiler would
    then no longer recognise as one, and sort the whole row. One for each: results that meet in one barrier make that
    compiler abort when it compiles for several devices (seen with JAX 0.10).
    """
    kept, at = lax.top_k(values, width)
    return lax.optimization_barrier(kept), lax.optimization_barrier(at)


def refine(asking, x, candidates, k: int):
    """Recompute the distances to `candidates` [M, W] from differences; return the first `k`, sorted.

    The batches depend on the shapes alone, and are all alike: another shape could be compiled to add the squares in
    another order, and distances would depend on the tiles, or on which end they start from.
    """
    m, width = candidates.shape
    batch = max(1, min(m, GATHER_ELEMENTS // (width * x.shape[1])))

    def one_batch(rows):
        difference = x[candidates[rows]] - asking[rows][:, None, :]
        return jnp.sqrt(jnp.sum(difference * difference, axis=-1))

    rows = jnp.minimum(jnp.arange(math.ceil(m / batch) * batch), m - 1).reshape(-1, batch)
    distances = lax.map(one_batch, rows).reshape(-1, width)[:m]
    distances, indices = lax.sort((distances, candidates.astype(jnp.int32)), num_keys=2)
    return distances[:, :k], indices[:, :k]


def _direct_candidates(asking, x, candidates, safe, itself: bool):
    """Replace the candidates [M, W] of rows that aren't `safe` [M], by direct distances, a few rows at a time."""
    (m, width), n = candidates.shape, x.shape[0]

    def redo(state):
        candidates, safe = state
        rows = jnp.nonzero(~safe, size=min(m, SEARCH_ROWS), fill_value=m)[0]
        own = jnp.minimum(rows, m - 1)
        difference = x[None, :, :] - asking[own][:, None, :]
        closeness = -jnp.sum(difference * difference, axis=-1)
        if itself:
            closeness = jnp.where(jnp.arange(n) == own[:, None], -jnp.inf, closeness)
        # In one level: of equal distances, the lower indices must be kept.
        found = largest(closeness, width)[1].astype(candidates.dtype)
        return candidates.at[rows].set(found, mode="drop"), safe.at[rows].set(True, mode="drop")

    return lax.while_loop(lambda state: ~jnp.all(state[1]), redo, (candidates, safe))[0]
