"""Exact nearest neighbours, without ever holding the N x N matrix of distances.

What is found is the same wherever it runs; how, is the business of three rooms: `host_search` (CPUs), `compiled_search`
(accelerators, and points being traced) and `ring_search` (points spread over several devices).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxscape.landscape import compiled_search, host_search, ring_search
from jaxscape.landscape.distances import as_points, unit_vectors
from jaxscape.landscape.ring_search import Spread

METRICS = ("euclidean", "cosine")
_HASHED = 256  # features by which duplicates are suspected


class Neighbors(NamedTuple):
    """The k nearest neighbours of every point, the point itself excluded.

    distances: [N, K], ascending, in the units of the points.
    indices: [N, K] int32; of two neighbours at the same distance, the lower index comes first.
    """

    distances: jax.Array
    indices: jax.Array


def as_neighbors(nb, *, of_all_points: bool = False) -> Neighbors:
    """Return `nb`; ValueError unless it's Neighbors and, if asked for and not traced, holds all it refers to."""
    if not isinstance(nb, Neighbors):
        raise ValueError(f"nb must be Neighbors, as nearest_neighbors returns them, got {type(nb).__name__}")
    if of_all_points:
        n, first, last = nb.indices.shape[0], jnp.min(nb.indices), jnp.max(nb.indices)
        if not isinstance(last, jax.core.Tracer) and (first < 0 or last >= n):
            raise ValueError(
                f"nb must hold all the points it refers to (not those of queries, or a part): its indices must lie "
                f"between 0 and {n - 1}, got {first} to {last}"
            )
    return nb


def drop_duplicates(x) -> np.ndarray:
    """Return the ascending int64 indices [M] of the distinct rows of `x` [N, D]: first occurrences.

    Rows are duplicates when all their values are equal (0.0 equals -0.0). Runs on the host: the number of rows
    that stay depends on the data.
    """
    rows = np.asarray(x)
    if rows.ndim != 2:
        raise ValueError(f"x must have two dimensions [points, features], got shape {rows.shape}")
    if rows.shape[0] == 0 or rows.shape[1] == 0:
        return np.arange(min(1, rows.shape[0]))
    # Rows that are equal have equal hashes of some of their features; only the few that share one are compared whole.
    some = rows[:, :: math.ceil(rows.shape[1] / _HASHED)]
    _, group, sizes = np.unique(_hashes(some), return_inverse=True, return_counts=True)
    suspects = np.flatnonzero(sizes[group] > 1)
    kept = np.ones(len(rows), bool)
    if len(suspects):
        kept[suspects] = False
        kept[suspects[np.unique(row_bytes(rows[suspects]), return_index=True)[1]]] = True
    return np.flatnonzero(kept)


def row_bytes(rows: np.ndarray) -> np.ndarray:
    """Return the rows [N, D] as [N] strings of bytes; equal rows have equal ones (0.0 equals -0.0)."""
    rows = np.ascontiguousarray(rows + rows.dtype.type(0))  # -0.0 + 0.0 is 0.0
    return rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel()


def _hashes(rows: np.ndarray) -> np.ndarray:
    """Return a uint64 [N] of each row: integer sums, whose order can't matter, of its bits as float32."""
    weights = np.random.default_rng(0).integers(0, 1 << 32, (2, rows.shape[1]), dtype=np.uint32) | np.uint32(1)
    high, low = np.asarray(_weighted_bits(jnp.asarray(rows).astype(jnp.float32), weights)).astype(np.uint64)
    return high << np.uint64(32) | low


@jax.jit
def _weighted_bits(x, weights):
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    bits = jnp.where(x == 0, 0, bits)
    return jnp.stack([jnp.sum(bits * w, axis=1, dtype=jnp.uint32) for w in weights])


def nearest_neighbors(
    x, k: int, metric: str = "euclidean", *, queries=None, tile_size: int | None = None, mesh: Mesh | None = None
) -> Neighbors:
    """Find the `k` nearest neighbours of every point, or, among the points, of every query.

    Tiled matrix products propose candidates; their distances are recomputed from the differences of the points, so
    near-duplicates and far-off origins cost no digits. A bound on the products' rounding error tells which rows might
    have lost a neighbour; these few are searched again. The result is exact to the rounding of one distance, with
    all but certainty, and doesn't depend on the tiles. On CPUs, where differences would cost more than the products,
    distances come from float64 products, which is as exact; in the larger of these searches (N * N * D above 2e9)
    from float32 products, unless a sample shows that they are off by more than 5e-7 of a distance, or
    that distances are equal: their last digit may depend on the tiles. Memory grows with N * k and a tile.

    All coordinates share one scale: next to a point 1e19 times as far off as the others are apart, the squares of
    these distances underflow in float32.

    Args:
        x: points [N, D]. float64 stays float64 (with x64 on); anything else is computed in float32.
        k: neighbours to keep, 1 <= k <= N - 1 (with `queries`, N); static.
        metric: "euclidean", or "cosine": 1 - cos of the angle, found as half the squared distance of the points
            divided by their lengths, so that small angles keep their digits. As that is a square, dimensions come out
            halved: for dimensions, densities and peaks find the Euclidean neighbours of x divided by its lengths, as
            `survey(x, metric="cosine")` does.
        queries: optional points [M, D] whose neighbours among `x` are asked for; none is left out of its own. The
            result is no input for peaks, which need all points' neighbours.
        tile_size: rows whose candidates are sought at once; by default as many as keep a tile at 64 MiB, or, on
            CPUs, at 24 MiB.
        mesh: optional, devices to spread the points over: each holds a slice, and the slices travel in a ring.

    Returns:
        Neighbors: distances [N, k] and indices [N, k] ([M, k] with `queries`). A duplicated point is a neighbour at
        distance zero: a point is left out of its own neighbours by its index.

    Raises:
        ValueError: unknown metric, k < 1, fewer than k + 1 points (with `queries`, k), tile_size < 1, a point of length
            zero where its direction is needed, no query, different numbers of features, or a bad `x` (see `as_points`).
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got k={k}")
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, got tile_size={tile_size}")
    points, asking = _spread(x, queries, mesh) if mesh is not None else _gather(x, queries)
    _check_sizes(points, asking, k)
    if metric == "cosine":
        points, asking = (None if a is None else a._replace(rows=directions(a.rows, name, a.count))
                          for a, name in ((points, "x"), (asking, "queries")))  # fmt: skip
    distances, indices = _search(points, asking, k, tile_size, mesh)
    return Neighbors(distances**2 / 2 if metric == "cosine" else distances, indices)


def _gather(x, queries) -> tuple[Spread, Spread | None]:
    points = as_points(x)
    asking = None if queries is None else as_points(queries, "queries")
    if asking is not None:
        dtype = jnp.promote_types(points.dtype, asking.dtype)
        points, asking = points.astype(dtype), asking.astype(dtype)
    return Spread(points, len(points)), None if asking is None else Spread(asking, len(asking))


def _spread(x, queries, mesh: Mesh) -> tuple[Spread, Spread | None]:
    return ring_search.spread(x, mesh), None if queries is None else ring_search.spread(queries, mesh, "queries")


def _check_sizes(points: Spread, asking: Spread | None, k: int) -> None:
    dim = points.rows.shape[1]
    if asking is not None and asking.count == 0:
        raise ValueError("queries must have at least one point, got 0")
    if asking is not None and asking.rows.shape[1] != dim:
        raise ValueError(f"queries must have the {dim} features of x, got {asking.rows.shape[1]}")
    least = k + (asking is None)
    if points.count < least:
        need = f"k + 1 = {least}" if asking is None else f"k = {least}"
        raise ValueError(f"x must have at least {need} points, got {points.count} (k={k})")


def _search(points: Spread, asking: Spread | None, k: int, tile_size: int | None, mesh: Mesh | None):
    if mesh is not None:
        return ring_search.search(points, asking, k, mesh, tile_size)
    x, queries = points.rows, None if asking is None else asking.rows
    if not _on_host(x, queries):
        m, n = (points if asking is None else asking).count, points.count
        return compiled_search.search(x, queries, k, compiled_search.tile_rows(m, n, tile_size))
    distances, indices = host_search.search(x, queries, k, tile_size)
    return jnp.asarray(distances), jnp.asarray(indices)


def _on_host(*arrays) -> bool:
    """Whether all arrays are there, and what is computed of them, not traced, on one CPU."""
    there = [a for a in arrays if a is not None]
    if any(isinstance(computed, jax.core.Tracer) for computed in (*there, jnp.negative(jnp.zeros(())))):
        return False
    devices = set().union(*(a.devices() for a in there))
    return len(devices) == 1 and devices.pop().platform == "cpu"


def directions(points, name: str, count: int | None = None) -> jax.Array:
    """Return the points divided by their lengths; ValueError where one has none (not checked on traced values).

    Rows past the first `count` are padding, and may be zeros.
    """
    anything = jnp.any(points != 0, axis=1)
    if not isinstance(anything, jax.core.Tracer):
        zero = ~np.asarray(anything)[:count]
        if zero.any():
            raise ValueError(f"{name} must have no point of length zero for the cosine, got {name}[{zero.argmax()}]")
        with jax.enable_x64(True):  # so that points of one direction end in the same floats
            return _unit_vectors(points)
    return unit_vectors(points)


@jax.jit
def _unit_vectors(points):
    return unit_vectors(points.astype(jnp.float64)).astype(points.dtype)
