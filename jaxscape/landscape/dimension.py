"""Intrinsic dimension, from ratios of distances to neighbours."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxscape.landscape.neighbors import Neighbors, as_neighbors, as_points, nearest_neighbors

_MIN_DIMENSION, _MAX_DIMENSION = 1e-3, 1e3
_NEWTON_STEPS = 12
_METHODS = ("linear_fit", "maximum_likelihood")


class Gride(NamedTuple):
    """Intrinsic dimension at growing scales; one entry per rank pair (n, 2n), P pairs in all.

    ids: [P] maximum-likelihood intrinsic dimensions.
    errors: [P] their standard errors.
    scales: [P] mean distance to the n-th and 2n-th neighbours, in the units of the points.
    ranks: [P, 2] int32, the pairs themselves: (1, 2), (2, 4), (4, 8), ...
    """

    ids: jax.Array
    errors: jax.Array
    scales: jax.Array
    ranks: jax.Array


class DimensionAtScale(NamedTuple):
    """Intrinsic dimension at one rank pair: `id`, its standard `error` and its `scale`, all scalars."""

    id: jax.Array
    error: jax.Array
    scale: jax.Array


class TwoNN(NamedTuple):
    """Intrinsic dimension from the two nearest neighbours: `id` and its standard `error`, both scalars."""

    id: jax.Array
    error: jax.Array


class Decimation(NamedTuple):
    """Intrinsic dimension of ever fewer points; one entry per step, S in all.

    ids: [S] mean TwoNN dimension of the parts.
    errors: [S] their standard errors.
    scales: [S] mean distance to the first and the second neighbour, in the units of the points.
    sizes: [S] int32, points in each of the 2^s parts of step s.
    """

    ids: jax.Array
    errors: jax.Array
    scales: jax.Array
    sizes: jax.Array


def gride(nb: Neighbors, max_rank: int = 64) -> Gride:
    """Estimate the intrinsic dimension at rank pairs (1, 2), (2, 4), (4, 8), ... up to `max_rank`.

    Maximum likelihood of the ratios mu = r_2n / r_n, whose density is, in dimension d,
    f(mu) = d (mu^d - 1)^(n-1) / (B(n, n) mu^(d (2n-1) + 1)): F. Denti, D. Doimo, A. Laio, A. Mira, "The generalized
    ratios intrinsic dimension estimator", Sci. Rep. 12, 20005 (2022), eqs. 5 to 8.

    As in DADApy, ratios above the median by more than 20 times the distance from it to the 95th percentile are left
    out (they come from near-duplicates), one point less is counted to take out the bias, and the dimension is
    looked for between 0.001 and 1000.

    Args:
        nb: neighbours of N points, at least two each.
        max_rank: largest rank used, static; pairs for which `nb` keeps too few neighbours are left out.

    Returns:
        Gride, with an entry for each pair.

    Raises:
        ValueError: max_rank < 2, or fewer than two neighbours kept.
    """
    if max_rank < 2:
        raise ValueError(f"max_rank must be at least 2, got max_rank={max_rank}")
    kept = as_neighbors(nb).distances.shape[1]
    if kept < 2:
        raise ValueError(f"nb must keep at least 2 neighbours of each point, got {kept}")
    ranks = [1]
    while 4 * ranks[-1] <= min(max_rank, kept):
        ranks.append(2 * ranks[-1])
    return _gride(nb.distances, np.asarray(ranks, np.int32))


def gride_at(nb: Neighbors, rank: int) -> DimensionAtScale:
    """Estimate the intrinsic dimension at the one rank pair (`rank`, 2 `rank`); see `gride`.

    Raises:
        ValueError: rank < 1, or fewer than 2 `rank` neighbours kept.
    """
    kept = as_neighbors(nb).distances.shape[1]
    if rank < 1 or 2 * rank > kept:
        raise ValueError(f"rank must lie between 1 and half of the {kept} neighbours kept, got rank={rank}")
    estimate = _gride(nb.distances, np.asarray([rank], np.int32))
    return DimensionAtScale(estimate.ids[0], estimate.errors[0], estimate.scales[0])


def two_nn(nb: Neighbors, method: str = "linear_fit", fraction: float = 0.9) -> TwoNN:
    """Estimate the intrinsic dimension from the ratios mu = r_2 / r_1 of the two nearest neighbours.

    In dimension d, P(mu > m) = m^-d: E. Facco, M. d'Errico, A. Rodriguez, A. Laio, "Estimating the intrinsic
    dimension of datasets by a minimal neighborhood information", Sci. Rep. 7, 12140 (2017), eqs. 4 to 6.

    "linear_fit", their choice and DADApy's default: the slope of the least-squares line through the origin of
    -log(1 - i / N) on the i-th smallest log mu, i = 1 to floor(fraction N); the largest ratios, which tell most of
    borders and outliers, are left out. The error is the fit's own, sqrt(residuals^2 / (points - 1) / sum log^2 mu);
    DADApy gives none. Sorted ratios aren't independent, so it understates the scatter from sample to sample, tens of
    times for thousands of points; that is about id / sqrt(N), as of the other method.

    "maximum_likelihood": (N - 1) / sum log mu, of all ratios; the 1 makes it unbiased. The error is id / sqrt(N).

    Points with a duplicate (r_1 = 0) have no ratio: they're left out, and N is the number of the others. Ratios of
    one (r_1 = r_2) count as 10 units of rounding above one. The dimension is bounded to 0.001 and 1000, so it is
    always finite: the line fitted to a regular grid gives 1000; points that all have a duplicate, 0.001. Where the
    ratios don't tell it (the bounds of the line, fewer than two ratios) the error is infinite.

    Args:
        nb: neighbours of N points, at least two each.
        method: "linear_fit" or "maximum_likelihood"; static.
        fraction: share of the ratios that the line is fitted to; static, unused by "maximum_likelihood".

    Returns:
        TwoNN: id and error, scalars of the dtype of the distances.

    Raises:
        ValueError: unknown method, a fraction that isn't between 0 and 1 (both excluded) or leaves fewer than two
            ratios, or fewer than two neighbours kept.
    """
    n, kept = as_neighbors(nb).distances.shape
    if kept < 2:
        raise ValueError(f"nb must keep at least 2 neighbours of each point, got {kept}")
    _check_method(method, fraction, n)
    return _two_nn(nb.distances, method, float(fraction))


def two_nn_decimation(
    x, min_points: int = 20, seed: int = 0, method: str = "linear_fit", fraction: float = 0.9
) -> Decimation:
    """Estimate the intrinsic dimension at growing scales, by thinning the points out.

    At step s the points are split at random into 2^s disjoint parts of floor(N / 2^s) (the fewer than 2^s points
    left over sit the step out), and `two_nn` estimates the dimension of each part, with neighbours found within it:
    the block analysis of Facco et al. 2017, where the dimensions that noise adds fade as the distances grow. The
    error of step 0 is the estimator's own; after that, the standard error of the mean over the parts.

    DADApy's `return_id_scaling_2NN` has the same scales, (mean r_1 + mean r_2) / 2, and thins to the same sizes, but
    rounded, of subsets drawn independently of each other, so with points in common, and divides by 2^s where the
    standard error is unbiased with 2^s - 1.

    Args:
        x: points [N, D], as in `nearest_neighbors`; memory grows with N and a tile.
        min_points: fewest points of a part; static.
        seed: of the one permutation that all steps split; the same on every machine.
        method, fraction: see `two_nn`.

    Returns:
        Decimation, with an entry for each of the floor(log2(N / min_points)) + 1 steps.

    Raises:
        ValueError: min_points < 3, fewer points than that, a bad `x` (see `as_points`), or a bad method or fraction
            (see `two_nn`).
    """
    if min_points < 3:
        raise ValueError(f"min_points must be at least 3, got min_points={min_points}")
    points = as_points(x)
    n = points.shape[0]
    if n < min_points:
        raise ValueError(f"x must have at least min_points = {min_points} points, got {n}")
    _check_method(method, fraction, min_points)
    shuffled = points[jax.random.permutation(jax.random.key(seed), n)]
    sizes = [n >> step for step in range((n // min_points).bit_length())]
    steps = [_decimate(shuffled, 2**step, method, float(fraction)) for step in range(len(sizes))]
    ids, errors, scales = (jnp.stack(values) for values in zip(*steps, strict=True))
    return Decimation(ids, errors, scales, jnp.asarray(sizes, jnp.int32))


def _check_method(method: str, fraction: float, n: int) -> None:
    if method not in _METHODS:
        raise ValueError(f"method must be one of {_METHODS}, got {method!r}")
    if method == "linear_fit" and not (0 < fraction < 1 and int(n * fraction) >= 2):
        raise ValueError(
            f"fraction must lie between 0 and 1, and leave at least 2 of {n} ratios, got fraction={fraction}"
        )


@partial(jax.jit, static_argnames=("method", "fraction"))
def _two_nn(distances, method: str, fraction: float) -> TwoNN:
    n, dtype = distances.shape[0], distances.dtype
    inner, outer = distances[:, 0], distances[:, 1]
    there = inner > 0
    info = jnp.finfo(dtype)
    # log1p of the difference keeps the digits of ratios close to one, which a ratio in float32 would lose.
    excess = jnp.clip((outer - inner) / jnp.where(there, inner, 1), 10 * info.eps, info.max**0.5)
    log_mu = jnp.log1p(excess)
    count = jnp.sum(there)
    if method == "maximum_likelihood":
        used, total = count.astype(dtype), jnp.sum(jnp.where(there, log_mu, 0))
        dimension = jnp.clip((used - 1) / jnp.maximum(total, info.tiny), _MIN_DIMENSION, _MAX_DIMENSION)
        return TwoNN(dimension, jnp.where(used > 1, dimension / jnp.sqrt(jnp.maximum(used, 1)), jnp.inf))

    # floor(fraction N) of whatever N turns out to be, in float64 on the host: float32 would miss by one.
    fitted = jnp.asarray(np.floor(np.arange(n + 1) * fraction).astype(np.int32))[count]
    rank = jnp.arange(1, n + 1)
    used = rank <= fitted
    across = jnp.where(used, jnp.sort(jnp.where(there, log_mu, jnp.inf)), 0)
    up = jnp.where(used, -jnp.log1p(-jnp.where(used, rank, 0) / jnp.maximum(count, 1).astype(dtype)), 0)
    squares = jnp.maximum(jnp.sum(across * across), info.tiny)
    slope = jnp.sum(across * up) / squares
    residual = jnp.where(used, up - slope * across, 0)
    variance = jnp.sum(residual * residual) / jnp.maximum(fitted - 1, 1) / squares
    known = (fitted > 1) & (slope > _MIN_DIMENSION) & (slope < _MAX_DIMENSION)
    return TwoNN(jnp.clip(slope, _MIN_DIMENSION, _MAX_DIMENSION), jnp.where(known, jnp.sqrt(variance), jnp.inf))


@partial(jax.jit, static_argnames=("count", "method", "fraction"))
def _decimate(shuffled, count: int, method: str, fraction: float):
    """Return the dimension, its error and its scale, from `count` parts of the shuffled points [N, D]."""
    size = shuffled.shape[0] // count

    def one_part(part):
        distances = nearest_neighbors(part, 2).distances
        return *_two_nn(distances, method, fraction), jnp.mean(distances)

    parts = shuffled[: count * size].reshape(count, size, -1)
    ids, errors, scales = jax.lax.map(one_part, parts)  # one part at a time bounds the memory
    error = errors[0] if count == 1 else jnp.std(ids, ddof=1) / count**0.5
    return jnp.mean(ids), error, jnp.mean(scales)


@jax.jit
def _gride(distances, near) -> Gride:
    inner = distances[:, near - 1].T  # [P, N]
    outer = distances[:, 2 * near - 1].T
    ids, errors = jax.vmap(_maximum_likelihood)(inner, outer, near.astype(distances.dtype))
    scales = (jnp.mean(inner, axis=1) + jnp.mean(outer, axis=1)) / 2
    return Gride(ids, errors, scales, jnp.stack([near, 2 * near], axis=1))


def _maximum_likelihood(inner, outer, n):
    """Return the dimension and its standard error from distances r_n and r_2n, both [N]."""
    info = jnp.finfo(inner.dtype)
    inner = jnp.maximum(inner, info.tiny)
    # mu - 1, kept away from zero, which has no likelihood, and from the overflow that duplicates can cause.
    excess = jnp.clip((outer - inner) / inner, 10 * info.eps, info.max**0.5)
    log_mu = jnp.log1p(excess)
    median, high = jnp.percentile(excess, jnp.asarray([50.0, 95.0], inner.dtype))
    used = excess <= median + 20 * (high - median)
    count = jnp.sum(used)
    dimension = _solve(jnp.where(used, log_mu, 0), count.astype(inner.dtype), n)
    return dimension, 1 / jnp.sqrt(_information(dimension, log_mu, n))


def _solve(log_mu, count, n):
    """Find the zero of F(d) = sum[(2n-1) t - (n-1) t / (1 - exp(-t))] - (count - 1), t = d log_mu.

    F is the likelihood's derivative times -d. It rises with a slope in t between n and (3n-1)/2, which brackets
    the root, and is concave, so that Newton's steps from the bracket's lower end never pass the root.
    """
    total = jnp.sum(log_mu)
    goal = (n - 1) * count + count - 1
    lower = goal / ((3 * n - 1) / 2 * total)
    upper = goal / (n * total)

    def step(_, d):
        t = d * log_mu
        decay = -jnp.expm1(-t)
        small = t < 1e-4
        safe = jnp.where(small, 1, decay)
        ratio = jnp.where(small, 1 + t / 2, t / safe)
        slope = jnp.where(small, 0.5 + t / 6, (1 - ratio * (1 - decay)) / safe)
        # Points left out have log_mu = 0, hence ratio = 1: they are subtracted with the constant.
        value = jnp.sum((2 * n - 1) * t - (n - 1) * (ratio - 1)) - goal
        rise = jnp.sum(((2 * n - 1) - (n - 1) * slope) * log_mu)
        return jnp.clip(d - value / rise, lower, upper)

    dimension = jax.lax.fori_loop(0, _NEWTON_STEPS, step, lower)
    return jnp.clip(dimension, _MIN_DIMENSION, _MAX_DIMENSION)


def _information(dimension, log_mu, n):
    """Fisher information of the dimension: [N + (n-1) sum (s / sinh s)^2] / d^2, s = d log_mu / 2."""
    s = jnp.minimum(dimension * log_mu / 2, 80)
    weight = jnp.where(s < 1e-3, 1 - s * s / 3, (s / jnp.sinh(s)) ** 2)
    return (log_mu.shape[0] + (n - 1) * jnp.sum(weight)) / dimension**2
