"""Exact nearest neighbours on CPUs: XLA multiplies, NumPy selects.

NumPy's partition uses the vector units, and is many times faster than any selection XLA's CPU compiler can express;
the products are tiles, so the N x M matrix is never whole. Two strategies, chosen by what they cost (`choose`):

- "refine": candidates from the product in the points' own precision, their distances from differences; a bound on the
  product's error tells which rows may have lost a neighbour.
- "product", for many neighbours of wide points, where differences would cost more than all products: distances from
  the product itself. In float32 they are as good as sums of float32 differences as long as the square isn't small
  against the norms; rows where it is, or all rows where a sample shows errors, take float64 products. In float64
  what cancels beyond a millionth is recomputed from differences.

Letters in shapes: N points, M points that ask, D features, K neighbours, T rows of a tile, W candidates, R rows.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscape.landscape.compiled_search import candidate_count, closeness_of, group_span, tile_rows
from jaxscape.landscape.distances import power_of_two, product_error

_REFINE_TOTAL, _REFINE_ROW = 1 << 28, 1 << 13  # differences that cost little beside the search, in all and per row
_SYMMETRIC_DIM, _SYMMETRIC_POINTS, _BLOCK = 768, 4096, 1536
_TILE_ELEMENTS = 1 << 22  # 16 MiB: small enough for the allocator to hand the same pages out again
_CHUNK = 1 << 18  # elements a thread works on at a time: its cache
_MARGIN = 16  # candidates beyond k where products give the distances
_PILOT_ROWS, _PILOT_PAIRS, _PILOT_ERROR = 64, 32, 5e-7
_CANCELLED = {np.dtype(np.float32): 0.25, np.dtype(np.float64): 1e-6}  # square over norms, below which to recompute
_FEW = 16  # recomputed pairs of a row, beyond which the row takes float64 products


class Plan(NamedTuple):
    """How to search: `strategy` "refine" or "product", and whether products are shared by both of their points."""

    strategy: str
    symmetric: bool


class _Problem(NamedTuple):
    """Points [N, D] and those that ask [M, D] as given (but for a power of two), and centred in `dtype` for products.

    `low_norms` are the centred squared norms at the lower end of their error interval, as the products rank by them.
    """

    points: np.ndarray
    asking: np.ndarray
    itself: bool
    k: int
    width: int
    error: float  # of the products, relative to the norms; 0 where a sample stands for the bound
    centred: jax.Array
    centred_asking: jax.Array
    norms: np.ndarray
    norms_asking: np.ndarray
    low_norms: jax.Array
    span: int


class _Found(NamedTuple):
    """The result as it grows: distances and indices [R, K], and which rows [R] are beyond doubt."""

    distances: np.ndarray
    indices: np.ndarray
    safe: np.ndarray

    @classmethod
    def empty(cls, rows: int, problem: _Problem):
        shape = (rows, problem.k)
        return cls(np.empty(shape, problem.points.dtype), np.empty(shape, np.int32), np.ones(rows, bool))

    def put(self, at: slice, found) -> None:
        for mine, part in zip(self, found, strict=True):
            mine[at] = part


def choose(m: int, n: int, dim: int, k: int, wide: bool, itself: bool) -> Plan:
    """Return the plan for M points [D] that ask for K neighbours among N; `wide`: the points are float64."""
    width = candidate_count(k, n - itself)
    if wide or width * dim <= max(_REFINE_ROW, _REFINE_TOTAL // m):
        return Plan("refine", False)
    return Plan("product", itself and dim >= _SYMMETRIC_DIM and n >= _SYMMETRIC_POINTS)


def search(x, queries, k: int, tile_size: int | None = None, plan: Plan | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and indices [M, K] of the neighbours in `x` [N, D] of `queries` [M, D].

    `queries` None: of the points themselves, each of them left out of its own. See `neighbors.nearest_neighbors`.
    """
    itself = queries is None
    largest = max(float(_largest_value(a)) for a in (x, queries) if a is not None)
    unit = 1.0 if 2.0**-30 < largest < 2.0**30 else float(power_of_two(jnp.asarray(largest, x.dtype)))
    x, queries = (a if a is None or unit == 1 else a * (1 / unit) for a in (x, queries))
    asking = x if itself else queries
    m, (n, dim) = asking.shape[0], x.shape
    wide = x.dtype == jnp.float64
    plan = plan or choose(m, n, dim, k, wide, itself)
    problem = _problem(x, asking, itself, k, plan, x.dtype)
    if plan.strategy == "product" and not wide and not _trustworthy(problem):
        problem = _problem(x, asking, itself, k, plan, jnp.dtype(np.float64))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        find = _search_symmetric if plan.symmetric else _search_rows
        distances, indices, unsafe = find(problem, plan, np.arange(m), tile_size, pool)
        if len(unsafe) and problem.centred.dtype == jnp.float32:
            plan = Plan("product", False)
            problem = _problem(x, asking, itself, k, plan, jnp.dtype(np.float64))
            rows = unsafe
            distances[rows], indices[rows], unsafe = _search_rows(problem, plan, rows, tile_size, pool)
        for row in unsafe:
            distances[row], indices[row] = _search_directly(problem, row)
    return distances * x.dtype.type(unit), indices


@jax.jit
def _largest_value(x):
    return jnp.max(jnp.abs(x))


def _problem(x, asking, itself: bool, k: int, plan: Plan, dtype) -> _Problem:
    n, dim = x.shape
    product = plan.strategy == "product"
    width = (min(n - itself, k + _MARGIN) if product else candidate_count(k, n - itself)) + itself
    span = group_span(n, width)
    error = 0.0 if product and dtype == jnp.float32 else product_error(dim, dtype)
    with jax.enable_x64(True):  # for the norms: those of a thousand neighbours mustn't share a rounding error
        centred, norms = _centre(x, x, dtype=dtype, padding=-n % span)
        centred_asking, norms_asking = (centred, norms) if itself else _centre(asking, x, dtype=dtype, padding=0)
        low_norms = jnp.where(jnp.arange(len(norms)) < n, (1 - error) * norms, jnp.inf).astype(dtype)
        norms, norms_asking = (np.asarray(a).astype(dtype) for a in (norms, norms_asking))
    points, asking = np.asarray(x), np.asarray(asking)
    return _Problem(
        points, asking, itself, k, width, error, centred, centred_asking, norms, norms_asking, low_norms, span
    )


@partial(jax.jit, static_argnames=("dtype", "padding"))
def _centre(a, x, dtype, padding: int):
    """Return `a` [N, D] less the mean of `x`, in `dtype`, with rows of zeros added, and its squared norms [N]."""
    a = (a.astype(dtype) - jnp.mean(x.astype(dtype), axis=0)).astype(dtype)
    a = jnp.pad(a, ((0, padding), (0, 0)))
    return a, jnp.sum(jnp.square(a.astype(jnp.float64)), axis=1)


@partial(jax.jit, static_argnames=("span",))
def _closeness(rows, centred, low_norms, span: int):
    """Return the closeness [T, N] of rows [T, D] to all points, and the maxima [T, G] of groups `span` apart."""
    closeness = closeness_of(rows, centred, low_norms)
    return closeness, jnp.max(closeness.reshape(len(closeness), span, -1), axis=1) if span > 1 else None


def _search_rows(problem: _Problem, plan: Plan, rows: np.ndarray, tile_size, pool):
    """Search for the neighbours of `rows` [R], tile by tile; return distances, indices [R, K] and unsafe rows."""
    n = len(problem.points)
    tile = tile_rows(len(rows), n, tile_size or min(len(rows), max(1, _TILE_ELEMENTS // n)))
    found = _Found.empty(len(rows), problem)
    finish = _finish_refined if plan.strategy == "refine" else _finish_product
    for start in range(0, len(rows), tile):
        start = min(start, len(rows) - tile)  # the last tile overlaps: another height would be compiled anew
        at = rows[start : start + tile]
        closeness, maxima = _closeness_tile(problem, at)

        def work(part, start=start, at=at, closeness=closeness, maxima=maxima):
            kept, candidates = _largest(closeness[part], None if maxima is None else maxima[part], problem.width)
            low = _low_norms_asking(problem, at[part])[:, None] - kept
            found.put(slice(start + part.start, start + part.stop), finish(problem, at[part], low, candidates))

        _in_parallel(pool, work, tile, n // problem.span)
    return found.distances, found.indices, rows[~found.safe]


def _closeness_tile(problem: _Problem, rows) -> tuple[np.ndarray, np.ndarray | None]:
    with jax.enable_x64(problem.centred.dtype == jnp.float64):
        closeness, maxima = _closeness(problem.centred_asking[rows], problem.centred, problem.low_norms, problem.span)
        return np.asarray(closeness), None if maxima is None else np.asarray(maxima)


def _low_norms_asking(problem: _Problem, rows) -> np.ndarray:
    return problem.norms_asking.dtype.type(1 - problem.error) * problem.norms_asking[rows]


def _search_symmetric(problem: _Problem, plan: Plan, rows: np.ndarray, tile_size, pool):
    """Search for the neighbours of all points, each block of products serving the rows of both its sides.

    A row of blocks is selected from once it is whole; what lies left of the diagonal comes transposed, block by block,
    and only its nearest so far are held.
    """
    n, width = len(problem.points), problem.width
    size = math.ceil(n / math.ceil(n / min(n, tile_size or _BLOCK)))
    found = _Found.empty(n, problem)
    low = np.full((n, width), np.inf, problem.centred.dtype)
    near = np.zeros((n, width), np.int32)
    room = np.empty(size * (width + n), low.dtype)
    for top in range(0, n, size):
        own = slice(top, min(top + size, n))
        shape = (own.stop - top, width + n - top)
        strip = room[: shape[0] * shape[1]].reshape(shape)
        strip[:, :width] = low[own]
        for left in range(top, n, size):
            squares, transposed = _block(problem, top, left, size)
            strip[:, width + left - top :][:, : squares.shape[1]] = squares
            if left > top:

                def merge(part, top=top, left=left, transposed=transposed):
                    whole = slice(left + part.start, left + part.stop)
                    both = np.concatenate([low[whole], transposed[part]], axis=1)
                    low[whole], near[whole] = _smallest(both, near[whole], top)

                _in_parallel(pool, merge, len(transposed), width + size)

        def finish(part, top=top, strip=strip):
            whole = slice(top + part.start, top + part.stop)
            lowest, candidates = _smallest(strip[part], near[whole], top)
            found.put(whole, _finish_product(problem, rows[whole], lowest, candidates))

        _in_parallel(pool, finish, len(strip), strip.shape[1])
    return found.distances, found.indices, rows[~found.safe]


def _smallest(squares: np.ndarray, near: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the W smallest `squares` [R, W + T] of each row and whose they are: `near` [R, W], then `first`, ..."""
    width = near.shape[1]
    at = np.argpartition(squares, width - 1, axis=1)[:, :width]
    held = np.take_along_axis(near, np.minimum(at, width - 1), axis=1)
    return np.take_along_axis(squares, at, axis=1), np.where(at < width, held, at - width + first).astype(np.int32)


def _block(problem: _Problem, top: int, left: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower ends of the squared distances of rows from `top` and from `left`, and their transpose."""
    n = len(problem.points)
    # The last block reaches back: another shape would be compiled anew.
    row, column = min(top, n - size), min(left, n - size)
    with jax.enable_x64(problem.centred.dtype == jnp.float64):
        squares, transposed = _squares(problem.centred, problem.low_norms, row, column, size)
        squares, transposed = np.asarray(squares), np.asarray(transposed)
    return squares[top - row :, left - column :], transposed[left - column :, top - row :]


@partial(jax.jit, static_argnames=("size",))
def _squares(centred, low_norms, row, column, size: int):
    rows, columns = (lax.dynamic_slice_in_dim(centred, start, size) for start in (row, column))
    own, norms = (lax.dynamic_slice_in_dim(low_norms, start, size) for start in (row, column))
    squares = own[:, None] - closeness_of(rows, columns, norms)
    itself = (row + jnp.arange(size))[:, None] == column + jnp.arange(size)
    squares = jnp.where(itself, jnp.inf, squares)
    return squares, squares.T


def _in_parallel(pool, work: Callable[[slice], None], count: int, elements: int) -> None:
    """Run `work` on slices of `count` rows of `elements` each, of a size that a cache holds."""
    step = max(1, min(_CHUNK // elements, math.ceil(count / pool._max_workers)))
    list(pool.map(work, (slice(a, min(a + step, count)) for a in range(0, count, step))))


def _largest(closeness: np.ndarray, maxima: np.ndarray | None, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `width` largest of each row [R, W] in no order, and where they are.

    With the `maxima` of groups, only the members of the `width` groups of largest maximum are looked at: all that is
    at least as large as the W-th largest of the row is among them, but for ties.
    """
    if maxima is None:
        at = _where_largest(closeness, width)
        return np.take_along_axis(closeness, at, axis=1), at
    (rows, n), groups = closeness.shape, maxima.shape[1]
    group = _where_largest(maxima, width)
    members = (np.arange(0, n, groups)[:, None] + group[:, None, :]).reshape(rows, -1)
    # take on the flat array: half the time of take_along_axis.
    values = closeness.reshape(-1).take(members + np.arange(0, rows * n, n)[:, None])
    at = _where_largest(values, width)
    return np.take_along_axis(values, at, axis=1), np.take_along_axis(members, at, axis=1)


def _where_largest(values: np.ndarray, width: int) -> np.ndarray:
    n = values.shape[1]
    return np.argpartition(values, n - width, axis=1)[:, n - width :] if width < n else _all_columns(*values.shape)


def _all_columns(rows: int, n: int) -> np.ndarray:
    return np.broadcast_to(np.arange(n), (rows, n))


def _finish_refined(problem: _Problem, rows, low, candidates):
    """Return distances and indices [R, K], from differences, and which rows [R] can't have lost a neighbour."""
    return _finish(problem, rows, _squared_differences(problem, rows, candidates), low, candidates)


def _finish_product(problem: _Problem, rows, low, candidates):
    """Return distances and indices [R, K], from products but where these cancel, and which rows [R] are safe."""
    norms = problem.norms[candidates]
    norms += problem.norms_asking[rows][:, None]
    squares = np.maximum(low, 0) if problem.error == 0 else np.maximum(low + problem.error * norms, 0)
    norms *= _CANCELLED[norms.dtype]
    cancelled = squares < norms
    if problem.itself:
        cancelled &= candidates != rows[:, None]
    trusted = cancelled.sum(axis=1) <= _FEW
    if problem.error == 0:
        cancelled &= trusted[:, None]
    for row in np.flatnonzero(cancelled.any(axis=1)):
        at = cancelled[row]
        squares[row, at] = _squared_differences(problem, rows[row : row + 1], candidates[row][None, at])[0]
    distances, indices, safe = _finish(problem, rows, squares, low, candidates)
    return distances, indices, safe & trusted if problem.error == 0 else safe


def _finish(problem: _Problem, rows, squares, low, candidates):
    if problem.itself:
        squares[candidates == rows[:, None]] = np.inf
    distances, indices = _sort(np.sqrt(squares).astype(problem.points.dtype), candidates, problem.k)
    if problem.width == len(problem.points):
        return distances, indices, np.ones(len(rows), bool)
    # Every point left out is at least as far as the farthest candidate's lower end: below it, none can be missing.
    error = max(problem.error, 4 * np.finfo(distances.dtype).eps)
    return distances, indices, distances[:, -1].astype(np.float64) ** 2 * (1 + error) < low.max(axis=1)


def _squared_differences(problem: _Problem, rows, candidates) -> np.ndarray:
    """Return the squared distances [R, W] of `rows` to `candidates` [R, W], from differences."""
    width, dim = candidates.shape[1], problem.points.shape[1]
    step = max(1, _CHUNK // (width * dim))
    squares = np.empty(candidates.shape, problem.points.dtype)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        difference = problem.points[candidates[part]]
        difference -= problem.asking[rows[part]][:, None, :]
        np.einsum("rwd,rwd->rw", difference, difference, out=squares[part])
    return squares


def _sort(distances: np.ndarray, indices: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first `k` [R, K] of distances and indices [R, W], ascending; of equal distances the lower index."""
    if distances.dtype == np.float64:
        order = np.lexsort((indices, distances), axis=1)[:, :k]
        return np.take_along_axis(distances, order, axis=1), np.take_along_axis(indices, order, axis=1)
    # Non-negative floats sort as their bits do: one integer key holds the distance and, below it, the index.
    keys = distances.view(np.uint32).astype(np.uint64) << np.uint64(32) | indices.astype(np.uint64)
    keys.sort(axis=1)
    keys = keys[:, :k]
    return (keys >> np.uint64(32)).astype(np.uint32).view(np.float32), keys.astype(np.uint32).astype(np.int32)


def _trustworthy(problem: _Problem) -> bool:
    """Whether float32 products of a sample of rows and neighbours give the distances that float64 would."""
    rows = np.unique(np.linspace(0, len(problem.asking) - 1, _PILOT_ROWS).astype(int))
    kept, candidates = _largest(*_closeness_tile(problem, rows), problem.width)
    order = np.argsort(-kept, axis=1)[:, problem.itself :]  # without the point itself
    order = order[:, np.unique(np.geomspace(1, order.shape[1], _PILOT_PAIRS).astype(int)) - 1]
    kept, candidates = (np.take_along_axis(a, order, axis=1) for a in (kept, candidates))
    squares = _low_norms_asking(problem, rows)[:, None] - kept
    centred, asking = np.asarray(problem.centred), np.asarray(problem.centred_asking[rows], np.float64)
    exact = np.stack(
        [((centred[at].astype(np.float64) - row) ** 2).sum(axis=1) for at, row in zip(candidates, asking, strict=True)]
    )
    wrong = np.abs(squares - exact) > 2 * _PILOT_ERROR * exact
    return bool((wrong.mean(axis=1) <= 0.25).mean() > 0.9)


def _search_directly(problem: _Problem, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances and indices [K] of one row, from the differences with all points."""
    n, dim = problem.points.shape
    step = max(1, _CHUNK // dim)
    everyone = np.arange(n)[None]
    squares = np.concatenate(
        [_squared_differences(problem, np.asarray([row]), everyone[:, a : a + step]) for a in range(0, n, step)], axis=1
    )
    if problem.itself:
        squares[0, row] = np.inf
    distances, indices = _sort(np.sqrt(squares), everyone, problem.k)
    return distances[0], indices[0]
