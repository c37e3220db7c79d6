"""Exact nearest neighbours on CPUs: XLA multiplies, NumPy selects.

NumPy's partition uses the vector units, and is many times faster than any selection XLA's CPU compiler can express;
the products are tiles, so the N x M matrix is never whole. Two strategies, chosen by what they cost (`choose`):

- "refine": candidates from the product in the points' own precision, their distances from differences; a bound on the
  product's error tells which rows may have lost a neighbour.
- "product", for many neighbours, whose differences would cost more than all products: distances from the product
  itself. In float64 this is as exact; what cancels beyond a millionth is recomputed from differences. In float32, for
  large searches, it is as good as sums of float32 differences as long as the square isn't small against the norms; rows
  where it is, or all rows where a sample shows errors, take float64 after all.

Letters in shapes: N points, M points that ask, D features, K neighbours, T rows of a tile, W candidates, R rows.
"""

import itertools
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

_FEW_DIFFERENCES = 1 << 24  # coordinates to subtract that cost next to nothing, in all
_DIFFERENCE = 50  # about what a coordinate costs in a difference, over what it costs in a product
_FEW_PRODUCTS = 1 << 31  # coordinates to multiply that cost little even in float64
_SYMMETRIC_DIM, _SYMMETRIC_POINTS, _BLOCK = 768, 4096, 1536
_TILE_ELEMENTS = 6 << 20  # 24 MiB: small enough for the allocator to hand the same pages out again
_CHUNK = 1 << 18  # elements a thread works on at a time: its cache
_MARGIN = 16  # candidates beyond k where products give the distances
_PILOT_ROWS, _PILOT_PAIRS, _PILOT_ERROR = 32, 16, 5e-7
_CANCELLED = {np.dtype(np.float32): 0.25, np.dtype(np.float64): 1e-6}  # square over norms, below which to recompute
_TIED = 0.2  # share of neighbours at the distance of the one before, from which ties are no accident
_WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
_NOBODY = np.uint64(0x7F800000 << 32)  # the key of an infinite distance
_FEW = 16  # recomputed pairs of a row, beyond which the row takes float64 products


class Plan(NamedTuple):
    """How to search.

    strategy: "refine" or "product".
    symmetric: whether products are shared by both of their points.
    precise: whether products are in float64 from the start.
    """

    strategy: str
    symmetric: bool = False
    precise: bool = False


class _Problem(NamedTuple):
    """Points [N, D] and those that ask [M, D] as given (but for a power of two), and what their products need.

    The `blocks` [S, D] are the points less their `center`, cut into parts of one shape, the last filled up, in the
    type of the products. `low_norms` [S] of each are the squared norms at the lower end of their error interval, by
    which the products rank; infinite where a block is filled up.
    """

    points: np.ndarray
    asking: np.ndarray
    itself: bool
    k: int
    width: int
    error: float  # of the products, relative to the norms; 0 where a sample stands for the bound
    center: jax.Array
    blocks: tuple[jax.Array, ...]
    low_norms: tuple[jax.Array, ...]
    norms: np.ndarray
    norms_asking: np.ndarray
    span: int

    @property
    def dtype(self) -> np.dtype:
        """The type of the products."""
        return np.dtype(self.center.dtype)


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
    if wide or m * width * dim <= _FEW_DIFFERENCES:
        return Plan("refine")
    if itself and dim >= _SYMMETRIC_DIM and n >= _SYMMETRIC_POINTS:
        return Plan("product", symmetric=True)
    if _DIFFERENCE * width <= n:
        return Plan("refine")
    return Plan("product", precise=m * n * dim <= _FEW_PRODUCTS)


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
    double = jnp.dtype(np.float64)
    problem = _problem(x, asking, itself, k, plan, tile_size, double if plan.precise else x.dtype)
    if plan.strategy == "product" and problem.dtype == np.float32 and not _trustworthy(problem):
        problem = _problem(x, asking, itself, k, plan, tile_size, double)
    with ThreadPoolExecutor(_WORKERS) as pool:
        find = _search_symmetric if plan.symmetric else _search_rows
        distances, indices, unsafe = find(problem, plan, np.arange(m), tile_size, pool)
        if len(unsafe) and problem.dtype == np.float32:
            rows, plan = unsafe, Plan("product", precise=True)
            problem = _problem(x, asking, itself, k, plan, tile_size, double)
            distances[rows], indices[rows], unsafe = _search_rows(problem, plan, rows, tile_size, pool)
        for row, found in zip(unsafe, pool.map(partial(_search_directly, problem), unsafe), strict=True):
            distances[row], indices[row] = found
    return distances if unit == 1 else distances * x.dtype.type(unit), indices


@jax.jit
def _largest_value(x):
    return jnp.max(jnp.abs(x))


def _problem(x, asking, itself: bool, k: int, plan: Plan, tile_size: int | None, dtype) -> _Problem:
    n, dim = x.shape
    product = plan.strategy == "product"
    width = (min(n - itself, k + _MARGIN) if product else candidate_count(k, n - itself)) + itself
    span = 1 if plan.symmetric else group_span(n, width)
    size = math.ceil(n / math.ceil(n / min(n, tile_size or _BLOCK))) if plan.symmetric else n + -n % span
    error = 0.0 if product and dtype == jnp.float32 else product_error(dim, dtype)
    points, asking = np.asarray(x), np.asarray(asking)
    with jax.enable_x64(True):  # for the norms: those of a thousand neighbours mustn't share a rounding error
        center = _center(x, dtype=dtype)
        parts = [_centre(points[a : a + size], center, size=size) for a in range(0, n, size)]
        norms = np.concatenate([np.asarray(norms) for _, norms in parts])
        low_norms = (1 - error) * np.where(np.arange(len(norms)) < n, norms, np.inf)
        low_norms = tuple(jnp.asarray(part.astype(dtype)) for part in np.split(low_norms, len(parts)))
        norms = norms[:n].astype(dtype)
        norms_asking = norms if itself else np.asarray(_centre(asking, center, size=len(asking))[1]).astype(dtype)
    blocks = tuple(block for block, _ in parts)
    return _Problem(points, asking, itself, k, width, error, center, blocks, low_norms, norms, norms_asking, span)


@partial(jax.jit, static_argnames=("dtype",))
def _center(x, dtype):
    return jnp.mean(x.astype(dtype), axis=0)


@partial(jax.jit, static_argnames=("size",))
def _centre(points, center, size: int):
    """Return points [R, D] less the center, with rows of zeros added up to [S, D], and the squared norms [S]."""
    points = jnp.pad(points.astype(center.dtype) - center, ((0, size - len(points)), (0, 0)))
    return points, jnp.sum(jnp.square(points.astype(jnp.float64)), axis=1)


@partial(jax.jit, static_argnames=("span",))
def _closeness(rows, center, block, low_norms, span: int):
    """Return the closeness [T, S] of rows [T, D] to a block, and the maxima [T, G] of groups `span` apart."""
    closeness = closeness_of(rows.astype(center.dtype) - center, block, low_norms)
    return closeness, jnp.max(closeness.reshape(len(closeness), span, -1), axis=1) if span > 1 else None


def _search_rows(problem: _Problem, plan: Plan, rows: np.ndarray, tile_size, pool):
    """Search for the neighbours of `rows` [R], tile by tile; return distances, indices [R, K] and unsafe rows."""
    n = len(problem.points)
    tile = tile_rows(len(rows), n, tile_size or min(len(rows), max(1, _TILE_ELEMENTS // n)))
    found = _Found.empty(len(rows), problem)
    finish = _finish_refined if plan.strategy == "refine" else _finish_product
    starts = [min(a, len(rows) - tile) for a in range(0, len(rows), tile)]  # the last reaches back: one height compiles
    for start in starts:
        at = rows[start : start + tile]
        closeness, maxima = _closeness_tile(problem, at)

        def work(part, start=start, at=at, closeness=closeness, maxima=maxima):
            kept, candidates = _largest(closeness[part], None if maxima is None else maxima[part], problem.width)
            low = _low_norms_asking(problem, at[part])[:, None] - kept
            found.put(slice(start + part.start, start + part.stop), finish(problem, at[part], low, candidates))

        _in_parallel(pool, work, tile, n // problem.span)
        del closeness, maxima, work  # the next tile gets the same pages, still in the cache
    return found.distances, found.indices, rows[~found.safe]


def _closeness_tile(problem: _Problem, rows) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the closeness [T, N] of `rows` [T] to all points, and, of a single block, the maxima of its groups."""
    asking = problem.asking[rows]
    with jax.enable_x64(problem.dtype == np.float64):
        parts = [
            _closeness(asking, problem.center, block, low_norms, problem.span)
            for block, low_norms in zip(problem.blocks, problem.low_norms, strict=True)
        ]
        if len(parts) > 1:
            return np.concatenate([np.asarray(closeness) for closeness, _ in parts], axis=1), None
        closeness, maxima = parts[0]
        return np.asarray(closeness), None if maxima is None else np.asarray(maxima)


def _low_norms_asking(problem: _Problem, rows) -> np.ndarray:
    return problem.norms_asking.dtype.type(1 - problem.error) * problem.norms_asking[rows]


def _search_symmetric(problem: _Problem, plan: Plan, rows: np.ndarray, tile_size, pool):
    """Search for the neighbours of all points, each block of products serving the rows of both its sides.

    Of every row only the best keys so far are held: a key is the square of a distance and, below it, whose it is, in
    one integer, which partitions in a third of the time of a float and its index.
    """
    n, width, size = len(problem.points), problem.width, problem.blocks[0].shape[0]
    found = _Found.empty(n, problem)
    best = np.full((n, width), _NOBODY)

    def merge(keys, first):
        def work(part):
            whole = slice(first + part.start, first + part.stop)
            both = np.concatenate([best[whole], keys[part]], axis=1)
            both.partition(width - 1, axis=1)
            best[whole] = both[:, :width]

        _in_parallel(pool, work, min(size, n - first), width + size)

    def finish(part, first):
        whole = slice(first + part.start, first + part.stop)
        low, candidates = _split(best[whole])
        found.put(whole, _finish_product(problem, rows[whole], low, candidates))

    for top, left, keys, transposed in _blocks_of_keys(problem):
        merge(keys, top)
        if left > top:
            merge(transposed, left)
        if left + size >= n:
            _in_parallel(pool, partial(finish, first=top), min(size, n - top), width)
        del keys, transposed
    return found.distances, found.indices, rows[~found.safe]


def _blocks_of_keys(problem: _Problem):
    """Yield the blocks on and above the diagonal: their first row and column, their keys, and those transposed."""
    blocks, norms, size = problem.blocks, problem.low_norms, problem.blocks[0].shape[0]
    for i, j in itertools.combinations_with_replacement(range(len(blocks)), 2):
        with jax.enable_x64(True):
            keys, transposed = _keys(blocks[i], blocks[j], norms[i], norms[j], i * size, j * size)
        yield i * size, j * size, np.asarray(keys), np.asarray(transposed)
        del keys, transposed  # the next block gets the same pages


@jax.jit
def _keys(rows, columns, norms_rows, norms_columns, top, left):
    """Return the keys [T, T] of the lower ends of the squared distances of rows to columns, and of columns to rows."""
    size = rows.shape[0]
    squares = jnp.maximum(norms_rows[:, None] - closeness_of(rows, columns, norms_columns), 0).astype(jnp.float32)
    itself = top + jnp.arange(size)[:, None] == left + jnp.arange(size)
    squares = jnp.where(itself, jnp.inf, squares)

    def keys(squares, first):
        bits = lax.bitcast_convert_type(squares, jnp.uint32).astype(jnp.uint64)
        return bits << 32 | (first + jnp.arange(size)).astype(jnp.uint64)

    return keys(squares, left), keys(squares.T, top)


def _join(values: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return uint64 keys that sort by value, float32 and not negative, and then by index."""
    return values.view(np.uint32).astype(np.uint64) << np.uint64(32) | indices.astype(np.uint64)


def _split(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the float32 values and the int32 indices of keys."""
    return (keys >> np.uint64(32)).astype(np.uint32).view(np.float32), keys.astype(np.uint32).view(np.int32)


def _in_parallel(pool, work: Callable[[slice], None], count: int, elements: int) -> None:
    """Run `work` on slices of `count` rows of `elements` each, of a size that a cache holds."""
    step = max(1, min(_CHUNK // elements, math.ceil(count / _WORKERS)))
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
    keys = _join(distances, indices)
    keys.sort(axis=1)
    return _split(keys[:, :k])


def _trustworthy(problem: _Problem) -> bool:
    """Whether float32 products of a sample of rows and neighbours give the distances that float64 would.

    Nor may many distances be as good as equal: products would round the same distance to different floats.
    """
    rows = np.unique(np.linspace(0, len(problem.asking) - 1, _PILOT_ROWS).astype(int))
    kept, candidates = _largest(*_closeness_tile(problem, rows), problem.width)
    order = np.argsort(-kept, axis=1)[:, problem.itself :]  # without the point itself
    squares = _low_norms_asking(problem, rows)[:, None] - np.take_along_axis(kept, order, axis=1)
    tied = np.count_nonzero(np.diff(squares, axis=1) <= 2 * _PILOT_ERROR * squares[:, 1:])
    if tied > _TIED * squares.size:
        return False
    some = np.unique(np.geomspace(1, order.shape[1], _PILOT_PAIRS).astype(int)) - 1
    squares, candidates = squares[:, some], np.take_along_axis(candidates, order[:, some], axis=1)
    exact = [
        ((problem.points[at] - problem.asking[row].astype(np.float64)) ** 2).sum(axis=1)
        for row, at in zip(rows, candidates, strict=True)
    ]
    exact = np.stack(exact)
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
    # Only what is as near as the k-th is sorted; in the order of the indices, so that ties keep it.
    near = np.flatnonzero(squares[0] <= np.partition(squares[0], problem.k - 1)[problem.k - 1])
    distances, indices = _sort(np.sqrt(squares[:, near]), near[None], problem.k)
    return distances[0], indices[0]
