"""Exact nearest neighbours of points spread over several devices: no device ever holds them all.

Each device keeps S rows of the points and the running best candidates of the rows that ask there, while the slices
travel around the ring of devices. Memory per device grows with (N / P) * (D + K) and a tile.

Letters in shapes: N points, M points that ask, P devices, S = ceil(N / P) points and R = ceil(M / P) asking points of
one device, D features, K neighbours, T rows of a tile, W candidates, B rows searched directly.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxscape.landscape import compiled_search
from jaxscape.landscape.distances import as_points, power_of_two, product_error

_AXIS = "ring"


class Spread(NamedTuple):
    """Points spread over the devices of a mesh.

    rows: [P * S, D], S rows to a device; those past the first `count` are zeros, and nobody's neighbours.
    count: how many points there are.
    """

    rows: jax.Array
    count: int


def spread(x, mesh: Mesh, name: str = "x") -> Spread:
    """Spread the points `x` [N, D] by rows over all devices of `mesh`, in its own order, whatever its axes.

    Of a host array each device is sent only its slice (of several processes, each must hold all of `x`). A device
    array is moved, or stays where it is if it lies so already. Raises ValueError as `as_points` does.
    """
    if np.ndim(x) != 2:
        as_points(x, name)  # says what is wrong
    count, dim = np.shape(x)
    devices = mesh.devices.size
    shape = (devices * math.ceil(count / devices), dim)
    sharding = NamedSharding(_ring(mesh), PartitionSpec(_AXIS))
    if not isinstance(x, jax.Array):
        rows = jax.make_array_from_callback(shape, sharding, partial(_host_rows, np.asarray(x), shape[0]))
        return Spread(as_points(rows, name), count)
    rows = x if shape[0] == count else jnp.pad(x, ((0, shape[0] - count), (0, 0)))
    return Spread(as_points(rows if isinstance(x, jax.core.Tracer) else jax.device_put(rows, sharding), name), count)


def search(x, queries, k: int, mesh: Mesh, tile_size: int | None = None):
    """Return distances and indices [M, K] of the neighbours in `x` [N, D] of `queries` [M, D], as one device would.

    Args:
        x: points, on the host, on a device or being traced; or already `spread` over `mesh`.
        queries: the same, of the type of `x`; None: the points themselves, each of them left out of its own.
        k: neighbours to keep, 1 <= k <= N - 1 (with `queries`, N); static.
        mesh: all its devices take part, in its own order, as one ring.
        tile_size: rows whose candidates are sought at once on each device; by default as many as keep a tile of
            T x S scores at 64 MiB.

    Returns:
        What `compiled_search.search` returns. Where P divides M both are spread by rows over `mesh`; else each device
        holds all of both, for no array of JAX can be spread unevenly.

    Raises:
        ValueError: a bad `x` or `queries` (see `as_points`). `k`, `tile_size` and the features are the caller's to
            check: see `neighbors.nearest_neighbors`.
    """
    points = x if isinstance(x, Spread) else spread(x, mesh)
    asking = queries if queries is None or isinstance(queries, Spread) else spread(queries, mesh, "queries")
    dtype = points.rows.dtype if asking is None else jnp.promote_types(points.rows.dtype, asking.rows.dtype)
    rows, m = (None, points.count) if asking is None else (asking.rows.astype(dtype), asking.count)
    return _search(points.rows.astype(dtype), rows, points.count, m, k, _ring(mesh), tile_size)


@partial(jax.jit, static_argnames=("n", "m", "k", "ring", "tile_size"))
def _search(x, asking, n: int, m: int, k: int, ring: Mesh, tile_size: int | None):
    on_each = partial(_search_own, n=n, m=m, k=k, tile_size=tile_size)
    by_rows = PartitionSpec(_AXIS)
    found = jax.shard_map(on_each, mesh=ring, in_specs=(by_rows, by_rows), out_specs=by_rows)(x, asking)
    kept = by_rows if m % ring.size == 0 else PartitionSpec()
    return tuple(lax.with_sharding_constraint(a[:m], NamedSharding(ring, kept)) for a in found)


def _search_own(x, asking, *, n: int, m: int, k: int, tile_size: int | None):
    """Return distances and indices [R, K] of the points that ask on this device; `x` [S, D] is its slice."""
    itself = asking is None
    asking = x if itself else asking
    largest = jnp.maximum(jnp.max(jnp.abs(x)), jnp.max(jnp.abs(asking)))
    unit = power_of_two(lax.pmax(largest, _AXIS))
    x, asking = x * (1 / unit), asking * (1 / unit)
    own = _numbers(len(asking), lax.axis_index(_AXIS))
    others = n - itself
    width = compiled_search.candidate_count(k, others)
    error = product_error(x.shape[1], x.dtype)
    center = lax.psum(jnp.sum(x, axis=0), _AXIS) / n
    excluded = own if itself else None
    kept, candidates = _propose(asking - center, excluded, x, center, n, width, tile_size)
    norms = (1 - error) * jnp.sum((asking - center) ** 2, axis=-1)
    # The batches of `compiled_search.refine`: the same shapes add the squares in the same order.
    batch = max(1, min(m, compiled_search.GATHER_ELEMENTS // (width * x.shape[1])))
    refine = partial(_refine, asking, x, k=k, batch=batch)
    distances, indices = refine(candidates)
    if width < others:
        # Every point left out is at least sqrt(floor) away: below it, nothing can have been missed.
        safe = (distances[:, -1] ** 2 * (1 + error) < norms - kept[:, -1]) | (own >= m)
        distances, indices = lax.cond(
            _count(~safe) == 0,
            lambda: (distances, indices),
            lambda: refine(_direct_candidates(asking, excluded, x, candidates, safe, n)),
        )
    return distances * unit, indices


def _propose(asking, excluded, x, center, n: int, width: int, tile_size: int | None):
    """Return the closeness (see `compiled_search.closeness_of`) and the indices [R, W] of the likely neighbours.

    `asking` is centred; `excluded` [R] is each row's own index, or None. A row's candidates are the best of its
    candidates so far and of those in the slice at hand, so the last one kept bounds all that were left out.
    """
    r, s = len(asking), len(x)
    error = product_error(x.shape[1], x.dtype)
    tile = compiled_search.tile_rows(r, s, tile_size)
    rows = jnp.minimum(jnp.arange(math.ceil(r / tile) * tile), r - 1).reshape(-1, tile)

    def visit(here, at_hand, best):
        columns = _numbers(s, here)
        norms = jnp.where(columns < n, (1 - error) * jnp.sum(at_hand * at_hand, axis=-1), jnp.inf)

        def one_tile(rows):
            closeness = compiled_search.closeness_of(asking[rows], at_hand, norms)
            if excluded is not None:
                closeness = jnp.where(columns == excluded[rows][:, None], -jnp.inf, closeness)
            found, at = compiled_search.top(closeness, min(width, s))
            found = jnp.concatenate([best[0][rows], found], axis=1)
            candidates = jnp.concatenate([best[1][rows], columns[0] + at.astype(jnp.int32)], axis=1)
            return _best(found, candidates, width)

        return tuple(a.reshape(-1, width)[:r] for a in lax.map(one_tile, rows))

    nothing = jnp.full((r, width), -jnp.inf, x.dtype), jnp.zeros((r, width), jnp.int32)
    return _around(x - center, visit, lax.pcast(nothing, _AXIS, to="varying"))


def _refine(asking, x, candidates, *, k: int, batch: int):
    """Recompute the distances to `candidates` [R, W] from differences, each as its slice comes by; sort, keep `k`.

    Pairs of a row and a candidate, in order of the candidates, make each slice's pairs one run. A run is measured
    `batch` x W pairs at a time, the shape of the batches on one device.
    """
    (r, width), s = candidates.shape, len(x)
    size = batch * width
    order = jnp.argsort(candidates.ravel()).astype(jnp.int32)
    ordered = candidates.ravel()[order]

    def visit(here, at_hand, distances):
        numbers = _numbers(s, here)
        first, last = jnp.searchsorted(ordered, jnp.stack([numbers[0], numbers[-1] + 1])).astype(jnp.int32)

        def one_batch(state):
            start, distances = state
            places = start + jnp.arange(size, dtype=jnp.int32)
            pairs = order[jnp.minimum(places, r * width - 1)]
            at = jnp.clip(candidates.ravel()[pairs] - numbers[0], 0, s - 1).reshape(batch, width)
            difference = at_hand[at] - asking[pairs.reshape(batch, width) // width]
            found = jnp.sqrt(jnp.sum(difference * difference, axis=-1))
            pairs = jnp.where(places < last, pairs, r * width)  # past the end: dropped
            return start + size, distances.at[pairs].set(found.ravel(), mode="drop")

        return lax.while_loop(lambda state: state[0] < last, one_batch, (first, distances))[1]

    unknown = lax.pcast(jnp.zeros(r * width, x.dtype), _AXIS, to="varying")
    distances = _around(x, visit, unknown).reshape(r, width)
    distances, indices = lax.sort((distances, candidates), num_keys=2)
    return distances[:, :k], indices[:, :k]


def _direct_candidates(asking, excluded, x, candidates, safe, n: int):
    """Replace the candidates [R, W] of rows that aren't `safe` [R], by direct distances, a few rows at a time.

    Here the rows that ask travel, not the slices: every device measures everyone's few rows against its own slice.
    """
    (r, width), s = candidates.shape, len(x)
    columns = _numbers(s, lax.axis_index(_AXIS))

    def nearest_here(asked):
        points, themselves = asked
        difference = x[None, :, :] - points[:, None, :]
        closeness = -jnp.sum(difference * difference, axis=-1)
        closeness = jnp.where((columns >= n) | (columns == themselves[:, None]), -jnp.inf, closeness)
        # In one level, here and of all: of equal distances, the lower indices must be kept.
        kept, at = compiled_search.largest(closeness, min(width, s))
        return kept, columns[at]

    def redo(state):
        candidates, safe, _ = state
        rows = jnp.nonzero(~safe, size=min(r, compiled_search.SEARCH_ROWS), fill_value=r)[0]
        mine = jnp.minimum(rows, r - 1)
        themselves = jnp.full(len(rows), -1, jnp.int32) if excluded is None else excluded[mine]
        asked = tuple(lax.all_gather(a, _AXIS) for a in (asking[mine], themselves))
        here = lax.map(nearest_here, asked)  # [P, B, W] for each device; then, from each device, in their order:
        found = (jnp.moveaxis(lax.all_to_all(a, _AXIS, 0, 0), 0, 1).reshape(len(rows), -1) for a in here)
        candidates = candidates.at[rows].set(_best(*found, width)[1], mode="drop")
        safe = safe.at[rows].set(True, mode="drop")
        return candidates, safe, _count(~safe)

    # The devices go round together until none has a row left: they'd wait for each other for ever otherwise.
    return lax.while_loop(lambda state: state[2] > 0, redo, (candidates, safe, _count(~safe)))[0]


def _around(x, visit, state):
    """Return `state` after `visit(owner, slice, state)` of every device's slice, the device's own `x` [S, D] first."""
    devices, this = lax.axis_size(_AXIS), lax.axis_index(_AXIS)
    onward = [(i, (i + 1) % devices) for i in range(devices)]

    def one_step(step, carry):
        at_hand, state = carry
        following = lax.ppermute(at_hand, _AXIS, onward)  # on its way while the slice at hand is looked at
        return following, visit((this - step) % devices, at_hand, state)

    return lax.fori_loop(0, devices, one_step, (x, state))[1]


def _best(closeness, candidates, width: int):
    """Return the `width` closest of each row and which they are, descending; of equals, those further left."""
    kept, at = compiled_search.largest(closeness, width)
    return kept, jnp.take_along_axis(candidates, at, axis=1)


def _numbers(size: int, device):
    """Return the int32 indices [size] of the rows of `device`."""
    return device.astype(jnp.int32) * size + jnp.arange(size, dtype=jnp.int32)


def _count(flags):
    """Return how many of the flags are set, on all devices together."""
    return lax.psum(jnp.sum(flags, dtype=jnp.int32), _AXIS)


def _ring(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices.ravel(), (_AXIS,))


def _host_rows(x: np.ndarray, total: int, where: tuple[slice, ...]) -> np.ndarray:
    """Return the rows that `where` asks for of `x`, made up to `total` by zeros, in a type that JAX has."""
    start, stop, _ = where[0].indices(total)
    rows = x[start:stop]
    rows = rows.astype(jax.dtypes.canonicalize_dtype(rows.dtype), copy=False)
    return np.pad(rows, ((0, stop - start - len(rows)), (0, 0)))
