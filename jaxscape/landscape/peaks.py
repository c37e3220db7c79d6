"""Density peaks: every point climbs to a peak; peaks that noise alone could have made are merged.

M. d'Errico, E. Facco, A. Laio, A. Rodriguez, "Automatic topography of high-dimensional data sets by non-parametric
density peak clustering", Information Sciences 560 (2021) 476-492. Letters in shapes: N points, K neighbours, C peaks.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscape.landscape.compiled_search import closeness_of, largest
from jaxscape.landscape.density import Density
from jaxscape.landscape.distances import as_points, product_error, squared_distances, unit_scale
from jaxscape.landscape.merging import merge_peaks
from jaxscape.landscape.neighbors import Neighbors, as_neighbors
from jaxscape.landscape.topography import Field, Saddles, find_saddles, first_true, ranked, take

_SEARCH_ROWS = 8  # of a search for few points
_SEARCH_CANDIDATES = 8


class Peaks(NamedTuple):
    """The density peaks of N points; clusters are numbered in the order of their centres' indices.

    labels: [N] int32, the cluster of every point, 0 to C - 1.
    centers: [C] int32, the points at the peaks, ascending.
    log_saddle: [C, C] log density at the saddle between two peaks; -inf where they don't touch, and on the diagonal.
    log_saddle_error: [C, C], its standard error; 0 where there is no saddle.
    core: [N] bool, False in the halo: points less dense than the highest saddle of their cluster.
    """

    labels: jax.Array
    centers: jax.Array
    log_saddle: jax.Array
    log_saddle_error: jax.Array
    core: jax.Array


def advanced_density_peaks(nb: Neighbors, density: Density, z: float = 1.6, *, x=None) -> Peaks:
    """Find the peaks of the density, the saddles between them, and the points that belong to each.

    With g the log density less its error, and the neighbourhood of a point its first `density.k` neighbours:

    1. A centre is a point that no point of its neighbourhood exceeds in g, and that isn't in the neighbourhood of
       a point of higher g.
    2. Every other point joins the cluster of its nearest point that is a centre, or has higher g.
    3. A point is on the border with the cluster of its nearest foreign neighbour (within its neighbourhood) when
       it is, of its own cluster, the nearest to that neighbour. The saddle of two clusters is the border point
       of highest g.
    4. A saddle is insignificant when one of its peaks rises above it by less than `z` times the sum of their
       errors. From the highest insignificant saddle down, the peak that rises less, in units of the errors, joins
       the other; of two saddles that come to join the same pair, the higher stays.

    Steps 2 and 3 ask for the nearest of *all* points. The neighbours kept nearly always contain it; where they
    don't, `x` lets it be found exactly, with the same result from any number of neighbours kept (at least
    max(density.k)). Without `x`, a point of step 2 whose leader isn't among the neighbours kept follows the highest
    point whose neighbourhood contains it, and a point of step 3 counts as a border point unless the lists of
    neighbours, of either of two points, show one nearer; with twice max(density.k) neighbours kept or more,
    this changes little but a few of the lowest saddles.

    Args:
        nb: neighbours of N points.
        density: their density; `density.k` is the size of each neighbourhood.
        z: significance, in standard errors; 0 merges nothing but peaks lower than their saddle.
        x: optional, the points [N, D] that `nb` comes from, whose Euclidean distances it holds (of neighbours by
            cosine: the points divided by their lengths).

    Returns:
        Peaks. Their number depends on the data, so this function can't be traced by jit. Steps 1 to 3 run in kernels
        whose shapes depend on N, K and the widest neighbourhood (to a power of two); step 4 on the host, as its
        order is sequential, over the saddles only. Time grows about as N log N, memory as N K + C^2.

    Raises:
        ValueError: z negative or not finite; sizes that differ; a density that isn't finite; a neighbourhood larger
            than the neighbours kept.
    """
    if not (math.isfinite(float(z)) and float(z) >= 0):
        raise ValueError(f"z must be finite and at least 0, got z={z}")
    points = None if x is None else as_points(x)
    widest = _check(nb, density, points)
    # Of all that is kept, the widest neighbourhood is all that most steps look at; few widths are ever compiled.
    width = min(nb.indices.shape[1], 1 << (widest - 1).bit_length())
    # The shapes of what is left depend on the data, and merging is sequential: both are for the host.
    field, saddles, labels, centers = _climb(nb, density, points, width)
    saddles, labels, centers, log_density, error = jax.device_get(
        (saddles, labels, centers, field.log_density, field.error)
    )
    centers = np.flatnonzero(centers)
    merged = merge_peaks(log_density[centers], error[centers], saddles, float(z))
    return _finish(log_density, labels, centers, *merged)


def _check(nb: Neighbors, density: Density, points) -> int:
    """Check sizes and values; return the size of the widest neighbourhood."""
    n, kept = as_neighbors(nb, of_all_points=True).indices.shape
    if not isinstance(density, Density):
        raise ValueError(f"density must be a Density, as knn_density returns, got {type(density).__name__}")
    if density.log_density.shape != (n,):
        raise ValueError(f"density must be of the {n} points of nb, got shape {density.log_density.shape}")
    if points is not None and points.shape[0] != n:
        raise ValueError(f"x must hold the {n} points of nb, got {points.shape[0]}")
    if points is not None:
        _check_points(nb, points)
    smallest, widest, finite = jax.device_get(_extent(density.log_density, density.log_density_error, density.k))
    if smallest < 1 or widest > kept:
        raise ValueError(f"density.k must lie between 1 and the {kept} neighbours kept, got {smallest} to {widest}")
    if not finite:
        raise ValueError("density must be finite, got NaN or Inf in log_density or log_density_error")
    return int(widest)


def _check_points(nb: Neighbors, points) -> None:
    """Check, on a few, that the neighbours are of these points: of another layer's, nothing below would make sense."""
    rows = np.unique(np.linspace(0, len(points) - 1, 8).astype(int))
    nearest, told = np.asarray(nb.indices[rows, 0]), np.asarray(nb.distances[rows, 0], np.float64)
    found = np.linalg.norm(np.asarray(points[rows], np.float64) - np.asarray(points[nearest], np.float64), axis=1)
    if not np.allclose(found, told, rtol=1e-3, atol=1e-6 * float(jnp.max(jnp.abs(points)))):
        row = int(np.argmax(np.abs(found - told)))
        raise ValueError(
            f"x must be the points whose Euclidean neighbours nb holds: x[{rows[row]}] and x[{nearest[row]}] are "
            f"{found[row]:.6g} apart, nb says {told[row]:.6g}"
        )


@jax.jit
def _extent(log_density, error, k):
    return jnp.min(k), jnp.max(k), jnp.all(jnp.isfinite(log_density) & jnp.isfinite(error))


@partial(jax.jit, static_argnames=("width",))
def _climb(nb: Neighbors, density: Density, points, width: int) -> tuple[Field, Saddles, jax.Array, jax.Array]:
    """Steps 1 to 3: return field, saddles, labels [N] before merging, and the mask of centres [N]."""
    g = density.log_density - density.log_density_error
    order, rank = ranked(g)
    within = jnp.arange(width) < density.k[:, None]
    field = Field(density.log_density, density.log_density_error, rank, within)
    points = None if points is None else unit_scale(points)[0]
    centers, holder = _centers(nb.indices[:, :width], field, g, order)
    leader = _leaders(nb.indices, centers, field, holder, points)
    labels = (jnp.cumsum(centers, dtype=jnp.int32) - 1)[follow(leader)]
    return field, find_saddles(nb, field, labels, centers, points), labels, centers


def follow(leader):
    """Return the point [N] where each one ends that follows its `leader` [N], up to one that leads itself."""
    return lax.fori_loop(0, max(1, math.ceil(math.log2(leader.shape[0]))), lambda _, leader: leader[leader], leader)


def _centers(near, field: Field, g, order):
    """Step 1: return the mask of centres [N], and the highest point whose neighbourhood holds each point [N]."""
    n = g.shape[0]
    exceeded = jnp.any(field.within & (g[near] > g[:, None]), axis=1)
    held_by = jnp.where(field.within, field.rank[:, None], n)
    highest = jnp.full(n, n, jnp.int32).at[near].min(held_by)  # a rank; n: nobody's neighbour
    holder = order[jnp.minimum(highest, n - 1)]
    dropped = (highest < n) & (g[holder] > g)
    return ~exceeded & ~dropped, holder


def _leaders(indices, centers, field: Field, holder, points):
    """Step 2: return the point [N] that each point follows; a centre follows itself."""
    rank, width = field.rank, field.within.shape[1]
    own = jnp.arange(rank.shape[0], dtype=jnp.int32)

    def first_eligible(near):
        column, found = first_true(centers[near] | (rank[near] < rank[:, None]))
        return jnp.where(centers, own, take(near, column)), ~centers & ~found

    # A point that isn't a centre for a higher one in its neighbourhood has a leader. One that was dropped, being
    # in the neighbourhood of a higher one, may have none there, nor among the neighbours kept.
    near = indices[:, :width]
    leader, lost = first_eligible(near)
    if width < indices.shape[1]:
        leader, lost = lax.cond(jnp.any(lost), lambda: first_eligible(indices), lambda: (leader, lost))
    if points is None:
        return jnp.where(lost, holder, leader)

    def eligible(rows):
        return centers | (rank < rank[rows][:, None])

    nearest, _ = nearest_among(points, lost, eligible, _SEARCH_ROWS)
    return jnp.where(lost, nearest, leader)


def nearest_among(points, asked, eligible, rows: int):
    """Find, for each of the points `asked` [N] about, the nearest of the other points that are eligible for it.

    As in a search for neighbours, a matrix product proposes a few candidates, whose distances are then found from
    differences; where the product's rounding could hide a nearer point, the distances to all points are.

    Args:
        points: [N, D], about the size of one (see `unit_scale`).
        asked: [N] bool.
        eligible: from the indices [B] of points asked about to a mask [B, N], at least one other point in each row.
        rows: B, points answered for at once; static.

    Returns:
        the nearest [N] int32, ties: the lower index; and the square of its distance [N]. Where not asked: itself, 0.
    """
    n, dim = points.shape
    own = jnp.arange(n, dtype=jnp.int32)
    rows = min(n, rows)

    def search():
        error = product_error(dim, points.dtype)
        centred = points - jnp.mean(points, axis=0)
        norms = (1 - error) * jnp.sum(centred * centred, axis=-1)
        who = jnp.nonzero(asked, size=n, fill_value=n)[0].astype(jnp.int32)

        def answer(step, state):
            places = step * rows + jnp.arange(rows)
            at = jnp.where(places < n, who[jnp.minimum(places, n - 1)], n)
            asking = jnp.minimum(at, n - 1)
            mask = eligible(asking) & (own != asking[:, None])
            nearest, square = _nearest_eligible(points, centred, norms, error, asking, mask)
            nearest_of, square_of = state
            return nearest_of.at[at].set(nearest, mode="drop"), square_of.at[at].set(square, mode="drop")

        steps = (jnp.sum(asked) + rows - 1) // rows
        return lax.fori_loop(0, steps, answer, (own, jnp.zeros(n, points.dtype)))

    return lax.cond(jnp.any(asked), search, lambda: (own, jnp.zeros(n, points.dtype)))


def _nearest_eligible(points, centred, norms, error: float, rows, mask):
    """Return the nearest point [B] to each of `rows` [B] where the `mask` [B, N] allows, and its squared distance."""
    n = norms.shape[0]
    width = min(n, _SEARCH_CANDIDATES)
    # The lower ends of the error intervals of the squares, negated: the last one kept bounds those that aren't.
    closeness = jnp.where(mask, closeness_of(centred[rows], centred, norms) - norms[rows][:, None], -jnp.inf)
    closeness, candidates = largest(closeness, width)
    difference = points[candidates] - points[rows][:, None, :]
    squares = jnp.where(closeness > -jnp.inf, jnp.sum(difference * difference, axis=-1), jnp.inf)
    square = jnp.min(squares, axis=1)
    nearest = jnp.min(jnp.where(squares == square[:, None], candidates.astype(jnp.int32), n), axis=1)
    safe = (square * (1 + error) < -closeness[:, -1]) | (width == n)

    def directly():
        squares = jnp.where(mask, squared_distances(points, rows), jnp.inf)
        return jnp.argmin(squares, axis=1).astype(jnp.int32), jnp.min(squares, axis=1)

    return lax.cond(jnp.all(safe), lambda: (nearest, square), directly)


def _finish(log_density, labels, centers, absorbed_by, saddles: Saddles) -> Peaks:
    """Number the clusters that are left, and lay out their saddles; on the host, as C varies."""
    survives = absorbed_by == np.arange(len(centers))
    number = np.cumsum(survives) - 1
    labels = number[absorbed_by].astype(np.int32)[labels]
    count = int(survives.sum())
    log_saddle = np.full((count, count), -np.inf, log_density.dtype)
    error = np.zeros((count, count), log_density.dtype)
    low, high = number[saddles.low], number[saddles.high]
    log_saddle[low, high] = log_saddle[high, low] = saddles.height
    error[low, high] = error[high, low] = saddles.error
    core = log_density >= log_saddle.max(axis=1)[labels]
    return Peaks(
        labels=jnp.asarray(labels),
        centers=jnp.asarray(centers[survives].astype(np.int32)),
        log_saddle=jnp.asarray(log_saddle),
        log_saddle_error=jnp.asarray(error),
        core=jnp.asarray(core),
    )
