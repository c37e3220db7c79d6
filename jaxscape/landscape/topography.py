"""Saddles between density peaks, and the tree the peaks make.

Letters in shapes: N points, K neighbours, W of them in the widest neighbourhood, C peaks, S saddles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscape.landscape.neighbors import Neighbors

_SCAN_ELEMENTS = 1 << 16  # coordinates looked at in one step of a scan
_NONE, _BORDER, _OPEN = 0, 1, 2  # what is known of a point: no border point; one; to be searched
_LINKAGES = ("single", "complete", "average", "weighted")


class Field(NamedTuple):
    """What the points carry: log_density [N] and its error [N], rank [N] by g (0: highest), within [N, W]: k*."""

    log_density: jax.Array
    error: jax.Array
    rank: jax.Array
    within: jax.Array


class Saddles(NamedTuple):
    """Saddles between clusters low < high: height (log density; -inf: no saddle) and error, [S]; how many: count."""

    low: jax.Array
    high: jax.Array
    height: jax.Array
    error: jax.Array
    count: jax.Array


def first_true(mask):
    """Return the column [N] of the first True in each row of `mask` [N, W] (the last if there is none), and any."""
    width = mask.shape[1]
    # A minimum is one pass, and vectorised; argmax and any would be two, and the first of them isn't.
    first = jnp.min(jnp.where(mask, jnp.arange(width, dtype=jnp.int32), width), axis=1)
    return jnp.minimum(first, width - 1), first < width


def ranked(values):
    """Return the indices [N] of the values, the highest first (ties: the lower index), and the rank [N] of each."""
    n = values.shape[0]
    order = jnp.argsort(-values, stable=True).astype(jnp.int32)
    return order, jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32))


def take(a, column):
    """Return the element in `column` [N] of every row of `a` [N, W]."""
    return jnp.take_along_axis(a, column[:, None], axis=1)[:, 0]


def find_saddles(nb: Neighbors, field: Field, labels, centers, points) -> Saddles:
    """Find the highest border point of every pair of clusters that touch; at most N of them, first in the arrays.

    A point is a border point of its cluster and the cluster of its first foreign neighbour within k* when it is,
    of its own cluster, the nearest to that neighbour.
    """
    own = jnp.arange(labels.shape[0], dtype=jnp.int32)
    near = nb.indices[:, : field.within.shape[1]]
    column, touches = first_true(field.within & (labels[near] != labels[:, None]))
    beyond, reach = take(near, column), take(nb.distances, column)
    # The first of my cluster that my foreign neighbour lists should be me; if none is listed, it has to be searched.
    back = nb.indices[beyond]
    column, returns = first_true(labels[back] == labels[:, None])
    listed = jnp.where(take(back, column) == own, _BORDER, _NONE)
    status = jnp.where(touches & ~centers, jnp.where(returns, listed, _OPEN), _NONE)
    return _highest_borders(nb, field, labels, points, status, beyond, reach)


def _highest_borders(nb, field: Field, labels, points, status, beyond, reach) -> Saddles:
    """Settle the open points that matter, and keep the highest border point of each pair."""
    n = labels.shape[0]
    mine, other = labels, labels[beyond]
    low, high = jnp.minimum(mine, other), jnp.maximum(mine, other)
    pair = _pairs(low, high, status != _NONE)

    def top(status):
        """The rank [N] of the highest border point of each point's pair; n if there is none."""
        return jnp.full(n, n, jnp.int32).at[jnp.where(status == _BORDER, pair, n)].min(field.rank, mode="drop")[pair]

    # Below a border point of its pair, nothing depends on an open point.
    asked = (status == _OPEN) & (field.rank < top(status))
    if points is None:
        nearest = _none_listed_nearer(nb, labels, beyond, reach, asked)
    else:
        nearest = _are_nearest(points, labels, beyond, asked)
    status = jnp.where(asked, jnp.where(nearest, _BORDER, _NONE), status)
    found = (status == _BORDER) & (field.rank == top(status))
    at = jnp.nonzero(found, size=n, fill_value=n)[0]
    there = at < n
    at = jnp.minimum(at, n - 1)
    height = jnp.where(there, field.log_density[at], -jnp.inf)
    return Saddles(low[at], high[at], height, jnp.where(there, field.error[at], 0), jnp.sum(found))


def _pairs(low, high, there):
    """Return a point [N] of the same pair of clusters for all points of a pair; for those that aren't `there`, itself.

    Every pair has a slot of a table, by a hash; the first point in it speaks for its pair. Pairs that found their
    slot taken try again with another hash. This costs a few passes over the points, less than sorting them.
    """
    n = low.shape[0]
    bits = max(1, (2 * n - 1).bit_length())
    own = jnp.arange(n, dtype=jnp.int32)

    def place(state):
        pair, unplaced, trial = state
        weight = 2 * trial + jnp.uint32(0x85EBCA6B)
        mixed = low.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + high.astype(jnp.uint32) * weight
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x2C1B3C6D)
        slot = (mixed >> (32 - bits)).astype(jnp.int32)
        first = jnp.full(1 << bits, n, jnp.int32).at[jnp.where(unplaced, slot, 1 << bits)].min(own, mode="drop")
        speaker = jnp.minimum(first[slot], n - 1)
        same = unplaced & (low[speaker] == low) & (high[speaker] == high)
        return jnp.where(same, speaker, pair), unplaced & ~same, trial + jnp.uint32(1)

    return lax.while_loop(lambda state: jnp.any(state[1]), place, (own, there, jnp.uint32(0)))[0]


def _are_nearest(points, labels, beyond, asked):
    """Mask [N]: the points `asked` [N] about that are the nearest of their cluster to the point `beyond` [N] them.

    One after the other, each against the members of its cluster, some at a time, until one is nearer: the work is
    that of the clusters in question, not of all points.
    """
    n, dim = points.shape
    width = min(n, max(64, _SCAN_ELEMENTS // dim))

    def scan():
        members = jnp.argsort(labels, stable=True).astype(jnp.int32)
        end = jnp.cumsum(jnp.zeros(n, jnp.int32).at[labels].add(1))
        rows = jnp.nonzero(asked, size=n, fill_value=0)[0].astype(jnp.int32)

        def is_nearest(t, nearest):
            who = rows[t]
            stop = end[labels[who]]

            def look(state):
                at, _ = state
                places = at + jnp.arange(width, dtype=jnp.int32)
                # The point itself comes first: its distance is rounded as those it is compared with.
                others = jnp.concatenate([who[None], members[jnp.minimum(places, n - 1)]])
                difference = points[others] - points[beyond[who]]
                squares = jnp.sum(difference * difference, axis=-1)
                nearer = (squares < squares[0]) | ((squares == squares[0]) & (others < who))
                return at + width, jnp.any(nearer[1:] & (places < stop))

            start = jnp.where(labels[who] > 0, end[labels[who] - 1], 0)
            _, beaten = lax.while_loop(lambda state: (state[0] < stop) & ~state[1], look, (start, False))
            return nearest.at[who].set(~beaten)

        return lax.fori_loop(0, jnp.sum(asked), is_nearest, jnp.zeros(n, bool))

    return lax.cond(jnp.any(asked), scan, lambda: jnp.zeros(n, bool))


def _none_listed_nearer(nb, labels, beyond, reach, asked):
    """Mask [N]: the points `asked` [N] about, when no point of their cluster lists `beyond` [N] at less than `reach`.

    A pass over all lists answers for one point of each that is beyond: there are a few passes.
    """
    n = labels.shape[0]
    own = jnp.arange(n, dtype=jnp.int32)

    def answer(state):
        asked, nearest = state
        asker = jnp.full(n, n, jnp.int32).at[jnp.where(asked, beyond, n)].min(own, mode="drop")
        who = asker[nb.indices]
        safe = jnp.minimum(who, n - 1)
        nearer = (who < n) & (labels[safe] == labels[:, None]) & (nb.distances < reach[safe])
        beaten = jnp.zeros(n, bool).at[jnp.where(nearer, who, n)].set(True, mode="drop")
        answered = asked & (asker[beyond] == own)
        return asked & ~answered, nearest | (answered & ~beaten)

    return lax.while_loop(lambda state: jnp.any(state[0]), answer, (asked, jnp.zeros(n, bool)))[1]


def peak_hierarchy(peaks, density, method: str = "weighted") -> np.ndarray:
    """Return the tree of the peaks as a SciPy linkage matrix, for dendrograms.

    Two peaks are as far apart as the highest of all peaks is above their saddle, in log density; a pair without
    a saddle counts as having one at the lowest density of all points. The default, "weighted" (WPGMA), is the study's
    (arXiv 2409.03662, section 3).

    Args:
        peaks: Peaks of N points, C of them.
        density: the Density they were found in.
        method: "single", "complete", "average" or "weighted".

    Returns:
        [C - 1, 4] float64, as `scipy.cluster.hierarchy.linkage` returns it; [0, 4] for a single peak.

    Raises:
        ValueError: unknown method, or a density of another number of points.
    """
    if method not in _LINKAGES:
        raise ValueError(f"method must be one of {_LINKAGES}, got {method!r}")
    log_density = np.asarray(density.log_density, np.float64)
    if log_density.shape != peaks.labels.shape:
        raise ValueError(f"density must be of the {peaks.labels.shape[0]} points of peaks, got {log_density.shape[0]}")
    saddle = np.asarray(peaks.log_saddle, np.float64)
    if saddle.shape[0] < 2:
        return np.zeros((0, 4))
    from scipy.cluster.hierarchy import linkage  # only here: nothing else in this package needs SciPy

    top = log_density[np.asarray(peaks.centers)].max()
    saddle = np.where(np.isfinite(saddle), saddle, log_density.min())
    return linkage(top - saddle[np.triu_indices(saddle.shape[0], 1)], method)


def cut_hierarchy(tree, *, height: float | None = None, n_clusters: int | None = None) -> np.ndarray:
    """Cut the tree of the peaks: return the number of the cluster that each peak is in.

    Args:
        tree: [C - 1, 4], as `peak_hierarchy` returns it.
        height: peaks that join at this distance or less are one cluster; or
        n_clusters: as many clusters as this, or, where peaks join at equal distances, the most there can be of fewer.

    Returns:
        [C] int32, clusters numbered from 0 in the order of their first peaks.

    Raises:
        ValueError: neither or both of `height` and `n_clusters`; a height that is negative or not a number; a number
            of clusters that isn't between 1 and C; a `tree` of another shape.
    """
    tree = np.asarray(tree, np.float64)
    if tree.ndim != 2 or tree.shape[1] != 4:
        raise ValueError(f"tree must have shape [C - 1, 4], got {tree.shape}")
    if (height is None) == (n_clusters is None):
        raise ValueError(f"give one of height and n_clusters, got height={height}, n_clusters={n_clusters}")
    count = tree.shape[0] + 1
    if height is not None and not height >= 0:
        raise ValueError(f"height must be at least 0, got height={height}")
    if n_clusters is not None and not 1 <= n_clusters <= count:
        raise ValueError(f"n_clusters must lie between 1 and the {count} peaks, got n_clusters={n_clusters}")
    if count == 1:
        return np.zeros(1, np.int32)
    from scipy.cluster.hierarchy import fcluster

    cut, by = (n_clusters, "maxclust") if height is None else (height, "distance")
    _, first, cluster = np.unique(fcluster(tree, cut, by), return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first)).astype(np.int32)[cluster]


def cut_labels(labels, clusters) -> jax.Array:
    """Return the cluster [N] int32 of every point, from the peak it belongs to and the `clusters` of the peaks.

    Args:
        labels: [N] int, the peak of every point, 0 to C - 1; -1, as for a point of the halo, stays -1.
        clusters: [C] int, as `cut_hierarchy` returns it.

    Raises:
        ValueError: a label that isn't of one of the C peaks (not checked on values that are being traced).
    """
    labels, clusters = jnp.asarray(labels), jnp.asarray(clusters, jnp.int32)
    if not isinstance(labels, jax.core.Tracer) and labels.size:
        smallest, largest = int(jnp.min(labels)), int(jnp.max(labels))
        if smallest < -1 or largest >= clusters.shape[0]:
            raise ValueError(f"labels must lie below the {clusters.shape[0]} peaks, got {smallest} to {largest}")
    return jnp.where(labels < 0, -1, clusters[labels])
