"""Density peaks picked by eye: how dense every point is, and how far from any denser one.

A. Rodriguez, A. Laio, "Clustering by fast search and find of density peaks", Science 344 (2014) 1492-1496.
Letters in shapes: N points, D features, C peaks.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxscape.landscape.density import Density
from jaxscape.landscape.distances import as_points, squared_distances, unit_scale
from jaxscape.landscape.neighbors import Neighbors, as_neighbors
from jaxscape.landscape.peaks import Peaks, follow, nearest_among
from jaxscape.landscape.topography import first_true, ranked, take

_SEARCH_ELEMENTS = 1 << 22  # distances bounded at once in an exact search


class DecisionGraph(NamedTuple):
    """The decision graph of N points: cluster centres are the few with a high density and a large delta.

    log_density: [N], as in the Density it was made from.
    delta: [N], the distance to the nearest denser point; of the densest point, to the farthest of all.
    leader: [N] int32, the nearest denser point; the densest leads itself.
    """

    log_density: jax.Array
    delta: jax.Array
    leader: jax.Array


def decision_graph(nb: Neighbors, density: Density, *, x=None) -> DecisionGraph:
    """Find the nearest denser point of every point (the paper's equation 2); of equals, the lower index is denser.

    Points that keep a denser neighbour are done; the others (the peaks, mostly) are searched for among all points.

    Args:
        nb: neighbours of N points, by the Euclidean distance.
        density: their density; only its `log_density` counts.
        x: the points [N, D] that `nb` comes from. It can be left out when every point but the densest keeps a denser
            neighbour; the delta of the densest is then the largest of all deltas and of the distances it keeps.

    Returns:
        DecisionGraph; distances in the units of the points.

    Raises:
        ValueError: sizes that differ; a density that isn't finite; points without a denser neighbour, and no `x`.
    """
    n = as_neighbors(nb, of_all_points=True).indices.shape[0]
    if density.log_density.shape != (n,):
        raise ValueError(f"density must be of the {n} points of nb, got shape {density.log_density.shape}")
    points = None if x is None else as_points(x)
    if points is not None and points.shape[0] != n:
        raise ValueError(f"x must hold the {n} points of nb, got {points.shape[0]}")
    graph, lost = _graph(nb, density.log_density, points)
    if not isinstance(lost, jax.core.Tracer):
        if not bool(jnp.all(jnp.isfinite(density.log_density))):
            raise ValueError("density must be finite, got NaN or Inf in log_density")
        if points is None and int(lost):
            kept = nb.indices.shape[1]
            raise ValueError(f"x is needed: {int(lost)} points have no denser one among the {kept} neighbours kept")
    return graph


@jax.jit
def _graph(nb: Neighbors, log_density, points) -> tuple[DecisionGraph, jax.Array]:
    """Return the graph, and how many points other than the densest keep no denser neighbour."""
    n = log_density.shape[0]
    order, rank = ranked(log_density)
    top = order[0]
    column, found = first_true(rank[nb.indices] < rank[:, None])
    leader, delta = take(nb.indices, column).at[top].set(top), take(nb.distances, column)
    lost = ~found & (rank > 0)
    if points is None:
        farthest = nb.distances[top, -1]
    else:
        points, unit = unit_scale(points)
        rows = max(8, min(256, _SEARCH_ELEMENTS // n))
        nearest, square = nearest_among(points, lost, lambda rows: rank < rank[rows][:, None], rows)
        leader, delta = jnp.where(lost, nearest, leader), jnp.where(lost, jnp.sqrt(square) * unit, delta)
        farthest = jnp.sqrt(jnp.max(squared_distances(points, top[None]))) * unit
    # No delta is larger than the densest point's, be it by rounding: where there are centres, it's one.
    farthest = jnp.maximum(farthest, jnp.max(delta.at[top].set(0)))
    return DecisionGraph(log_density, delta.at[top].set(farthest), leader), jnp.sum(lost)


def log_gamma(graph: DecisionGraph) -> jax.Array:
    """Return log(density * delta) [N], by which the paper ranks candidates for centres.

    In logarithms, so that no dimension overflows. Neither the unit of length nor that of density changes the ranking.
    A point at delta zero, having a denser duplicate, gets -inf.
    """
    return graph.log_density + jnp.log(graph.delta)


def density_peaks(
    nb: Neighbors,
    density: Density,
    graph: DecisionGraph,
    *,
    min_log_density: float | None = None,
    min_delta: float | None = None,
    n_peaks: int | None = None,
) -> Peaks:
    """Assign every point to the centres picked from the decision graph.

    Every other point follows its leader. A point is on the border of its cluster with another when a point of that one
    is in its neighbourhood, its first `density.k` neighbours (the paper: closer than a cutoff distance).

    Args:
        nb: neighbours of N points.
        density: their density; `density.k` is the size of each neighbourhood.
        graph: their decision graph.
        min_log_density, min_delta: centres are the points above both; one left out bounds nothing. Or
        n_peaks: centres are the points of largest `log_gamma`; of equals, the denser (then the lower index).

    Returns:
        Peaks. `log_saddle` holds the log density of the densest border point of a pair of clusters, of either side,
        `log_saddle_error` its error. `core` is the paper's: False (halo) for points no denser than the densest
        border point of their own cluster. The densest point is always a centre.

    Raises:
        ValueError: no threshold and no `n_peaks`, or both; `n_peaks` not between 1 and N; no point above the
            thresholds; sizes that differ; a neighbourhood larger than the neighbours kept.
    """
    n, kept = as_neighbors(nb, of_all_points=True).indices.shape
    if graph.leader.shape != (n,) or density.log_density.shape != (n,):
        sizes = f"{graph.leader.shape} and {density.log_density.shape}"
        raise ValueError(f"graph and density must be of the {n} points of nb, got shapes {sizes}")
    smallest, largest = int(jnp.min(density.k)), int(jnp.max(density.k))
    if smallest < 1 or largest > kept:
        raise ValueError(f"density.k must lie between 1 and the {kept} neighbours kept, got {smallest} to {largest}")
    centers = _centers(graph, min_log_density, min_delta, n_peaks)
    padded = 16
    while padded < len(centers):
        padded *= 4
    is_center = np.zeros(n, bool)
    is_center[centers] = True
    labels, core, log_saddle, error = _assign(nb, density, graph, is_center, padded)
    count = len(centers)
    return Peaks(labels, jnp.asarray(centers), log_saddle[:count, :count], error[:count, :count], core)


def _centers(graph: DecisionGraph, min_log_density, min_delta, n_peaks) -> np.ndarray:
    """Return the indices [C] int32 of the centres, ascending."""
    log_density, delta = np.asarray(graph.log_density), np.asarray(graph.delta)
    thresholds = min_log_density is not None or min_delta is not None
    if thresholds == (n_peaks is not None):
        given = f"min_log_density={min_log_density}, min_delta={min_delta}, n_peaks={n_peaks}"
        raise ValueError(f"give thresholds or n_peaks, got {given}")
    if n_peaks is not None:
        if not 1 <= n_peaks <= len(delta):
            raise ValueError(f"n_peaks must lie between 1 and the {len(delta)} points, got n_peaks={n_peaks}")
        by_gamma = np.lexsort((-log_density, -np.asarray(log_gamma(graph))))
        return np.sort(by_gamma[:n_peaks]).astype(np.int32)
    # Each in the precision of what it is compared with: a threshold read off a point excludes that point.
    floor = log_density.dtype.type(-math.inf if min_log_density is None else min_log_density)
    reach = delta.dtype.type(-math.inf if min_delta is None else min_delta)
    centers = np.flatnonzero((log_density > floor) & (delta > reach)).astype(np.int32)
    if not len(centers):
        raise ValueError(f"no point is above min_log_density={min_log_density} and min_delta={min_delta}")
    return centers


@partial(jax.jit, static_argnames=("count",))
def _assign(nb: Neighbors, density: Density, graph: DecisionGraph, is_center, count: int):
    """Return labels [N], core [N], and the highest saddles [C, C] with their errors; `count` is C, padded."""
    n, kept = nb.indices.shape
    own = jnp.arange(n, dtype=jnp.int32)
    root = follow(jnp.where(is_center, own, graph.leader))
    labels = (jnp.cumsum(is_center, dtype=jnp.int32) - 1)[root]
    order, rank = ranked(density.log_density)
    other = labels[nb.indices]
    border = (jnp.arange(kept) < density.k[:, None]) & (other != labels[:, None])
    by_rank = jnp.where(border, rank[:, None], n)
    highest = jnp.full((count, count), n, jnp.int32).at[labels[:, None], other].min(by_rank)
    edge = jnp.min(highest, axis=1)[labels]  # the cluster's own side of its borders
    core = (edge == n) | (density.log_density > density.log_density[order[jnp.minimum(edge, n - 1)]])
    highest = jnp.minimum(highest, highest.T)
    point = order[jnp.minimum(highest, n - 1)]
    log_saddle = jnp.where(highest < n, density.log_density[point], -jnp.inf)
    return labels, core, log_saddle, jnp.where(highest < n, density.log_density_error[point], 0)
