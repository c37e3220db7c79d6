"""Log density at every point, with its standard error."""

import math
from functools import partial
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import gammaln

from jaxscape.landscape.neighbors import Neighbors, as_neighbors

_RANKS = 32  # shells handled at once
_NEWTON_STEPS = 100
_DAMPING, _STOP, _DAMPED_STEPS = 0.1, 1e-3, 10_000  # of the reference's iteration
_MOMENTS = 16  # of the shells, beyond the second: enough for tilts up to
_REACH = 4.0  # around the one they were taken at
_STRAGGLERS = 256  # points that go on by themselves


class Density(NamedTuple):
    """Log density of N points.

    log_density: [N], natural logarithm, per unit of volume in the intrinsic dimension; the points integrate to one.
    log_density_error: [N], its standard error.
    k: [N] int32, the number of neighbours each estimate rests on: the point's neighbourhood.
    """

    log_density: jax.Array
    log_density_error: jax.Array
    k: jax.Array


def knn_density(nb: Neighbors, intrinsic_dim, k: int) -> Density:
    """Estimate the density as k / (N V), V the volume of the ball that reaches the k-th neighbour.

    The k-nearest-neighbour estimator (D. O. Loftsgaarden, C. P. Quesenberry, Ann. Math. Stat. 36, 1965) on the
    manifold the points lie on; the error of its logarithm is 1 / sqrt(k). Computed in logarithms throughout, so no
    dimension overflows.

    Args:
        nb: neighbours of N points.
        intrinsic_dim: dimension of the ball, a positive scalar.
        k: neighbours used, static, at most as many as `nb` keeps.

    Returns:
        Density of N points; a point with k duplicates gets a very high density, but a finite one.

    Raises:
        ValueError: k < 1, k larger than the neighbours kept, or a dimension that isn't positive and finite.
    """
    kept = as_neighbors(nb).distances.shape[1]
    if not 1 <= k <= kept:
        raise ValueError(f"k must lie between 1 and the {kept} neighbours kept, got k={k}")
    _check_dimension(intrinsic_dim)
    return _knn_density(nb.distances, intrinsic_dim, k)


def kstar_density(nb: Neighbors, intrinsic_dim, alpha: float = 1e-6) -> Density:
    """Estimate the density as in `knn_density`, from as many neighbours of each point as see a constant density.

    k grows from 3 while a likelihood-ratio test can't tell the density at the point from that at its (k+1)-th
    neighbour, both estimated from their k nearest neighbours: A. Rodriguez, M. d'Errico, E. Facco, A. Laio,
    "Computing the free energy without collective variables", J. Chem. Theory Comput. 14 (2018) 1206-1215, eqs. 8
    and 9. The k at which the test first rejects is kept, or one less than the neighbours kept if it never does (as
    in DADApy); a point at this limit would use more.

    Args:
        nb: neighbours of N points, at least 4 each; a few hundred leave most points of a smooth density room.
        intrinsic_dim: dimension of the balls, a positive scalar.
        alpha: level of the test; the smaller, the larger the neighbourhoods. At 1e-6 the statistic, chi-squared
            with one degree of freedom, may reach 23.93.

    Returns:
        Density of N points, with the k of each; the error of the logarithm is 1 / sqrt(k).

    Raises:
        ValueError: fewer than 4 neighbours kept, a dimension that isn't positive and finite, or an alpha that
            doesn't lie between 0 and 1.
    """
    return _kstar_density(nb, intrinsic_dim, _test_bounds(nb, intrinsic_dim, alpha))


def pak_density(nb: Neighbors, intrinsic_dim, alpha: float = 1e-6, converged: bool = False) -> Density:
    """Estimate the density at each point, allowing its logarithm a constant slope across the neighbourhood.

    The point-adaptive k-nearest-neighbour estimator, PAk: in the neighbourhood that `kstar_density` chooses, the
    volumes v_l of the shells between neighbours l-1 and l are exponential with rate exp(F + a l); the log density F
    is where the likelihood sum[F + a l - v_l exp(F + a l)] over l = 1 to k has its maximum in F and a (Rodriguez et
    al. 2018, eqs. 10 to 13). Its error is sqrt((4k + 2) / (k (k - 1))). Only ratios of volumes are computed, in
    logarithms, so no dimension over- or underflows.

    By default the way to the maximum is that of DADApy, so that results agree with published ones: from the log
    density of `kstar_density` and a = 0, a tenth of Newton's step at a time and F by no more than a tenth of its
    first value, until the derivatives of the likelihood in F and a are at most a thousandth of F and a, or for
    10,000 steps. That stops short of the maximum, by an amount that depends on the unit of length, as F does: most
    log densities are off by less than 1e-4, but those of neighbourhoods of three or four points at times by 0.01,
    and by whole units where the likelihood is flat. Where rounding leaves no step to take, as for dimensions far above
    that of the points, the maximum is returned. `converged` goes to the maximum, to rounding: a change of the
    unit of length then shifts all log densities alike.

    A point with a duplicate, or without a shell of any volume in the outer half of its neighbourhood, has no such
    maximum, and keeps the log density of `kstar_density`.

    Args:
        nb, intrinsic_dim, alpha: see `kstar_density`.
        converged: whether to find the maximum itself, static.

    Returns:
        Density of N points, with the k of each.

    Raises:
        ValueError: see `kstar_density`.
    """
    return _pak_density(nb, intrinsic_dim, _test_bounds(nb, intrinsic_dim, alpha), converged)


ADAPTIVE = {"kstar": kstar_density, "pak": pak_density}  # by the names that `survey` and the estimators take


def log_unit_ball_volume(dimension):
    """Return the log volume of the unit ball: (d/2) log pi - log Gamma(d/2 + 1)."""
    return dimension / 2 * math.log(math.pi) - gammaln(dimension / 2 + 1)


def _check_dimension(intrinsic_dim) -> None:
    if isinstance(intrinsic_dim, tuple) or np.ndim(intrinsic_dim) != 0:
        raise ValueError(f"intrinsic_dim must be a scalar, such as two_nn(nb).id, got {type(intrinsic_dim).__name__}")
    if not isinstance(intrinsic_dim, jax.core.Tracer) and not 0 < float(intrinsic_dim) < math.inf:
        raise ValueError(f"intrinsic_dim must be positive and finite, got intrinsic_dim={intrinsic_dim}")


def _test_bounds(nb: Neighbors, intrinsic_dim, alpha: float) -> np.ndarray:
    """Check the arguments; return [K - 1] how far apart two log volumes of k = 1 to K - 1 neighbours may be.

    The statistic -2k log(4 V_i V_j / (V_i + V_j)^2) is 4k log cosh(x / 2), x = log(V_i / V_j); it passes its
    threshold where |x| passes 2 arccosh(exp(threshold / 4k)), here written so that it can't overflow.
    """
    kept = as_neighbors(nb).distances.shape[1]
    if kept < 4:
        raise ValueError(f"nb must keep at least 4 neighbours of each point, got {kept}")
    _check_dimension(intrinsic_dim)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got alpha={alpha}")
    threshold = NormalDist().inv_cdf(alpha / 2) ** 2  # a chi-squared with one degree of freedom is a squared normal
    u = threshold / (4 * np.arange(1, kept))
    return (2 * (u + np.log1p(np.sqrt(-np.expm1(-2 * u))))).astype(nb.distances.dtype)


@jax.jit
def _knn_density(distances, intrinsic_dim, k) -> Density:
    """Return the density from the first `k` neighbours, k a scalar or [N]."""
    n, dtype = distances.shape[0], distances.dtype
    k = jnp.broadcast_to(jnp.asarray(k, jnp.int32), n)
    dimension = jnp.asarray(intrinsic_dim, dtype)
    radius = _column(_positive(distances), k - 1)
    count = k.astype(dtype)
    log_density = jnp.log(count / n) - log_unit_ball_volume(dimension) - dimension * jnp.log(radius)
    return Density(log_density, 1 / jnp.sqrt(count), k)


@jax.jit
def _kstar_density(nb: Neighbors, intrinsic_dim, bounds) -> Density:
    return _knn_density(nb.distances, intrinsic_dim, _kstar(nb, intrinsic_dim, bounds))


@partial(jax.jit, static_argnames="converged")
def _pak_density(nb: Neighbors, intrinsic_dim, bounds, converged: bool) -> Density:
    plain = _kstar_density(nb, intrinsic_dim, bounds)
    radii, k = _positive(nb.distances), plain.k.astype(nb.distances.dtype)
    edge, middle = _column(radii, plain.k - 1), _column(radii, (plain.k + 1) // 2 - 1)
    log_volumes = _log_shell_volumes(radii, jnp.asarray(intrinsic_dim, k.dtype), plain.k, edge)
    solvable = (nb.distances[:, 0] > 0) & (middle < edge)
    tilt = _balanced_tilt(log_volumes, k, solvable)
    correction = -_log_sum(log_volumes, k, tilt) - tilt * (k + 1) / (2 * k)
    if not converged:
        stopped = _stopped_correction(log_volumes, k, solvable, plain.log_density + math.log(len(k)), tilt)
        correction = jnp.where(jnp.isfinite(stopped), stopped, correction)
    correction = jnp.where(solvable, correction, 0)
    return Density(plain.log_density + correction, jnp.sqrt((4 * k + 2) / (k * (k - 1))), plain.k)


def _positive(distances):
    return jnp.maximum(distances, jnp.finfo(distances.dtype).tiny)


def _column(values, columns):
    """Return one value [N] of each row of `values` [N, K]."""
    return jnp.take_along_axis(values, columns[:, None], axis=1)[:, 0]


def _kstar(nb: Neighbors, intrinsic_dim, bounds):
    """Return k [N] int32: the first from 3 up whose ball is unlike the (k+1)-th neighbour's, at most K - 1.

    One k at a time, as the distances of one rank to all points fit the cache, and until no point is left.
    """
    n, last = nb.distances.shape[0], nb.distances.shape[1] - 1
    dimension = jnp.asarray(intrinsic_dim, nb.distances.dtype)

    def step(state):
        k, growing, kstar = state
        own = _positive(nb.distances[:, k - 1])
        gap = dimension * jnp.abs(jnp.log(own / own[nb.indices[:, k]]))
        growing = growing & (gap <= bounds[k - 1])
        return k + 1, growing, jnp.where(growing, k + 1, kstar)

    def unfinished(state):
        return (state[0] < last) & jnp.any(state[1])

    start = jnp.asarray(3, jnp.int32), jnp.ones(n, bool), jnp.full(n, 3, jnp.int32)
    return lax.while_loop(unfinished, step, start)[2]


def _log_shell_volumes(radii, dimension, k, edge):
    """Return the log volumes [L, R, N] of the shells up to each of the first `k` [N] of K neighbours, over V.

    V is the volume of the ball that reaches the k-th neighbour, at the distance `edge` [N]. L blocks of R ranks make
    at least K; beyond k, the log volumes are -inf.
    """
    n, kept = radii.shape
    blocks = jnp.full((math.ceil(kept / _RANKS), _RANKS, n), -jnp.inf, radii.dtype)

    def fill(i, blocks):
        rank = i * _RANKS + jnp.arange(1, _RANKS + 1)
        outer = radii[:, jnp.minimum(rank, kept) - 1].T
        inner = radii[:, jnp.clip(rank - 1, 1, kept) - 1].T
        # log1p of the difference: a ratio of two close distances has lost the digits of the shell between them.
        share = -jnp.expm1(-dimension * jnp.log1p((outer - inner) / inner))
        share = jnp.where(rank[:, None] == 1, 1, share)  # the first shell is a ball
        log_volume = dimension * jnp.log(outer / edge) + jnp.log(share)
        return blocks.at[i].set(jnp.where(rank[:, None] <= k, log_volume, -jnp.inf))

    return lax.fori_loop(0, _blocks_used(k), fill, blocks)


def _blocks_used(k):
    return (jnp.max(k).astype(jnp.int32) + _RANKS - 1) // _RANKS


def _balanced_tilt(log_volumes, k, solvable):
    """Return the tilt [N] of the likelihood's maximum, from the log shell volumes [L, R, N] over V and k [N].

    There, exp(F) = k / sum v_l exp(a l), and the tilt t = a k gives the places of the shells mean zero under the
    weights v_l exp(t place): see `_balance`, which rises with t at a rate between 1 / k and 1. Each step narrows the
    bracket of its root; where Newton's step would leave the bracket, it is halved. Zero where not `solvable`.
    """
    tolerance = float(jnp.finfo(k.dtype).eps) ** (2 / 3)  # Newton's next step is of the order of its square

    def step(state):
        i, tilt, low, high, _ = state
        balance, slope = _balance(log_volumes, k, tilt)
        low, high = jnp.where(balance <= 0, tilt, low), jnp.where(balance >= 0, tilt, high)
        there, middle = tilt - balance / slope, (low + high) / 2
        moving = solvable & (jnp.abs(there - tilt) > tolerance * (1 + jnp.abs(tilt)))
        leaves = moving & ((there <= low) | (there >= high)) & jnp.isfinite(middle)
        return i + 1, jnp.where(solvable, jnp.where(leaves, middle, there), 0), low, high, moving

    def unfinished(state):
        return (state[0] < _NEWTON_STEPS) & jnp.any(state[-1])

    zero = jnp.zeros_like(k)
    return lax.while_loop(unfinished, step, (0, zero, zero - jnp.inf, zero + jnp.inf, solvable))[1]


def _tilted(i, log_volumes, k, tilt):
    """Return block `i` of the places (l - (k + 1) / 2) / k of the shells, and of log v + tilt place; each [R, N]."""
    rank = (i * _RANKS + jnp.arange(1, _RANKS + 1)).astype(k.dtype)
    place = (rank[:, None] - (k + 1) / 2) / k
    return place, log_volumes[i] + tilt * place


def _lowest(k):
    return jnp.full_like(k, jnp.finfo(k.dtype).min / 2)  # finite: -inf less itself is no number


def _balance(log_volumes, k, tilt):
    """Return log sum v c exp(tilt c) over the outer half of the shells, less that of the inner half, and its slope.

    c is how far a shell lies from the middle of the neighbourhood. In logarithms the halves balance even where all
    the weight is in the middle, and the difference of their sums would underflow. Block by block, so that what is
    between stays in the cache, and no further than the largest neighbourhood.
    """

    def add(i, state):
        place, exponent = _tilted(i, log_volumes, k, tilt)
        halves = (place > 0, place < 0)
        raised = [
            jnp.maximum(top, jnp.max(jnp.where(half, exponent, top), axis=0))
            for half, (top, _, _) in zip(halves, state, strict=True)
        ]
        exponent = jnp.where(place == 0, -jnp.inf, exponent)
        first = jnp.exp(exponent - jnp.where(halves[0], *raised)) * jnp.abs(place)
        second = first * jnp.abs(place)
        sums = []
        for half, above, (top, one, two) in zip(halves, raised, state, strict=True):
            shrink = jnp.exp(top - above)
            ones, twos = (jnp.sum(jnp.where(half, values, 0), axis=0) for values in (first, second))
            sums.append((above, one * shrink + ones, two * shrink + twos))
        return tuple(sums)

    start = (_lowest(k), jnp.zeros_like(k), jnp.zeros_like(k))
    outer, inner = lax.fori_loop(0, _blocks_used(k), add, (start, start))
    balance = outer[0] - inner[0] + jnp.log(outer[1]) - jnp.log(inner[1])
    return balance, outer[2] / outer[1] + inner[2] / inner[1]


def _log_sum(log_volumes, k, tilt):
    """Return log sum v exp(tilt place) [N] over all shells."""

    def add(i, log_sum):
        _, exponent = _tilted(i, log_volumes, k, tilt)
        return jnp.logaddexp(log_sum, jax.nn.logsumexp(exponent, axis=0))

    return lax.fori_loop(0, _blocks_used(k), add, _lowest(k))


class _Centre(NamedTuple):
    """Where the shells are expanded, [N]: a tilt, the log of their sum there, and their moments [P, N] of place."""

    tilt: jax.Array
    log_sum: jax.Array
    moments: jax.Array


class _Walk(NamedTuple):
    """The damped iteration at N points; their heights, F + a (k + 1) / 2, and tilts are less those of the centre."""

    height: jax.Array
    tilt: jax.Array
    steps: jax.Array
    walking: jax.Array


def _stopped_correction(log_volumes, k, solvable, level, best):
    """Return what the slope adds to the log density `level` of k / V where the reference stops; all [N].

    What decides where it stops are differences of almost equal sums. Expanded around the `best` tilt, where they
    vanish, they keep their digits; and as polynomials, hundreds of steps cost no further pass over the shells. A
    point out of reach of its best tilt is expanded around where it is. NaN where a step is lost to rounding.
    """

    def recentre(state):
        walk, old = state
        there = old.tilt + walk.tilt
        arrives = jnp.abs(there - best) <= _REACH
        new = _centre(log_volumes, k, jnp.where(arrives, best, there), arrives)
        height = walk.height + new.log_sum - old.log_sum
        return _walk(walk._replace(height=height, tilt=there - new.tilt), new, k, level), new

    zero = jnp.zeros_like(k)
    start = _Walk(zero, zero, zero, solvable), _Centre(zero, zero, jnp.zeros((_MOMENTS + 3, *k.shape), k.dtype))
    walk, centre = lax.while_loop(lambda state: jnp.any(state[0].walking), recentre, start)
    return _correction(walk, centre, k)


def _centre(log_volumes, k, tilt, at_best) -> _Centre:
    log_sum = _log_sum(log_volumes, k, tilt)

    def add(i, moments):
        place, exponent = _tilted(i, log_volumes, k, tilt)

        def next_moment(weight, _):
            return weight * place, jnp.sum(weight, axis=0)

        return moments + lax.scan(next_moment, jnp.exp(exponent - log_sum), length=len(moments))[1]

    moments = lax.fori_loop(0, _blocks_used(k), add, jnp.zeros((_MOMENTS + 3, *k.shape), k.dtype))
    mean = jnp.where(at_best, 0, moments[1])  # at the best tilt it is zero but for rounding
    return _Centre(tilt, log_sum, moments.at[1].set(mean))


def _walk(walk: _Walk, centre: _Centre, k, level) -> _Walk:
    """Take steps until every point has stopped or left the reach of its centre.

    A few points, whose F passes zero or hardly moves, may take all 10,000 steps; they take them by themselves.
    """
    walk = _steps(walk, centre, k, level, _STRAGGLERS)
    rest = jnp.nonzero(_inside(walk), size=_STRAGGLERS, fill_value=len(k))[0]
    few = jax.tree.map(lambda a: jnp.take(a, rest, axis=-1, mode="fill", fill_value=0), (walk, centre, k, level))
    return jax.tree.map(lambda a, b: a.at[rest].set(b, mode="drop"), walk, _steps(*few, 0))


def _inside(walk):
    return walk.walking & (jnp.abs(walk.tilt) <= _REACH)


def _steps(walk: _Walk, centre: _Centre, k, level, enough: int) -> _Walk:
    """Take steps until no more than `enough` points go on."""
    largest = _DAMPING * jnp.abs(level)

    def step(walk):
        height_move, tilt_move, of_height, of_tilt = _newton(walk, centre)
        move = height_move - tilt_move * (k + 1) / (2 * k)
        damping = jnp.where(_DAMPING * jnp.abs(move) > largest, largest / jnp.abs(move), _DAMPING)
        of_slope = k * (k * of_tilt + (k + 1) / 2 * of_height)
        density, slope = level + _correction(walk, centre, k), (centre.tilt + walk.tilt) / k
        stops = (walk.steps > 0) & _is_flat(k * of_height, of_slope, density, slope) | (walk.steps >= _DAMPED_STEPS)
        lost = ~jnp.isfinite(height_move + tilt_move)
        ends, moves = _inside(walk) & (stops | lost), _inside(walk) & ~stops
        return _Walk(
            walk.height + jnp.where(moves, damping * height_move, 0),
            walk.tilt + jnp.where(moves, damping * tilt_move, 0),
            walk.steps + moves,
            walk.walking & ~ends,
        )

    return lax.while_loop(lambda walk: jnp.count_nonzero(_inside(walk)) > enough, step, walk)


def _newton(walk: _Walk, centre: _Centre):
    """Return Newton's step in height and tilt, and the derivatives there: what the likelihood loses per point."""
    terms = [_polynomial(centre.moments[p:], walk.tilt) for p in range(3)]
    total, mean, square = (term + moment for term, moment in zip(terms, (1, *centre.moments[1:3]), strict=True))
    excess = terms[0] - jnp.expm1(-walk.height)
    spread = total * square - mean**2
    known = spread > 8 * jnp.finfo(spread.dtype).eps * total * square  # else all the weight is in one shell
    spread = jnp.where(known, spread, jnp.nan)
    raised = jnp.exp(walk.height)
    return (mean**2 - square * excess) / spread, -mean / (raised * spread), raised * excess, raised * mean


def _polynomial(moments, tilt):
    """Return the sum of moments[q] tilt^q / q! from q = 1 on."""
    value = jnp.zeros_like(tilt)
    for q in range(_MOMENTS, 0, -1):
        value = (value + moments[q]) * (tilt / q)
    return value


def _correction(walk: _Walk, centre: _Centre, k):
    return walk.height - centre.log_sum - (centre.tilt + walk.tilt) * (k + 1) / (2 * k)


def _is_flat(by_density, by_slope, density, slope):
    """Return whether the reference stops: it divides the derivatives by the parameters, unless these vanish."""
    vanishes = jnp.minimum(jnp.abs(density), jnp.abs(slope)) <= np.finfo(np.float64).eps
    by_density, by_slope = jnp.abs(by_density), jnp.abs(by_slope)
    relative = (by_density <= _STOP * jnp.abs(density)) & (by_slope <= _STOP * jnp.abs(slope))
    return jnp.where(vanishes, jnp.maximum(by_density, by_slope) <= _STOP, relative)
