"""At which layer a curve over the layers turns: a single step, how large it is, and how sure its place."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class ChangePoint(NamedTuple):
    """The step that fits a curve [L] best; all scalars but `posterior`, and all NaN if too few values are finite.

    layer: position of the first layer after the turn; of splits that fit equally well, the first.
    low, high: credible interval of that position, both ends included.
    effect: mean after the turn minus mean before it, in the units of the curve.
    effect_error: its standard error, taking the split as given.
    before, after: the two means.
    explained: share of the curve's variance that the step explains, 0 for a constant curve.
    posterior: [L] probability that each layer is the first after the turn, given that there is one.
    p_value: of the largest step, among random orders of the same values.
    """

    layer: jax.Array
    low: jax.Array
    high: jax.Array
    effect: jax.Array
    effect_error: jax.Array
    before: jax.Array
    after: jax.Array
    explained: jax.Array
    posterior: jax.Array
    p_value: jax.Array


class ChangePointSamples(NamedTuple):
    """Steps of S samples of a curve [L].

    layer: scalar, position of the first layer after the turn, of the mean of the samples.
    low, high: scalars, percentile interval of the samples' own.
    effect: scalar, mean after minus mean before the turn, of the mean of the samples.
    effect_low, effect_high: scalars, percentile interval of the samples' own.
    frequency: [L] share of the samples that turn at each layer.
    layers: [S] the samples' own positions.
    effects: [S] their effects.
    """

    layer: jax.Array
    low: jax.Array
    high: jax.Array
    effect: jax.Array
    effect_low: jax.Array
    effect_high: jax.Array
    frequency: jax.Array
    layers: jax.Array
    effects: jax.Array


def change_point(
    curve, layers=None, *, level: float = 0.95, min_size: int = 1, permutations: int = 999, seed: int = 0
) -> ChangePoint:
    """Find the layer at which a curve steps from one level to another.

    The split with the least squared distance to a curve constant on either side. Its place has a closed-form posterior
    (A. F. M. Smith, "A Bayesian approach to inference about a change-point in a sequence of random variables",
    Biometrika 62, 407 (1975)): with independent Gaussian noise of unknown variance, flat priors on the split, on both
    means and on the logarithm of the noise, integrating the means gives a factor sigma / sqrt(m) for each segment of m
    values, and then sigma gives, for m layers before and n - m after the turn,

        p(m | curve) ~ [m (n - m)]^(-1/2) RSS(m)^(-(n - 2) / 2),

    RSS(m) the sum of squared residuals. The interval leaves out less than (1 - level) / 2 on either side.

    Whether there is a turn at all: such priors have no Bayes factor, so the largest share of variance explained by
    any split is compared with that of random orders of the values (J. Antoch, M. Huskova, "Permutation tests in change
    point analysis", Stat. Probab. Lett. 53, 37 (2001)); p = (1 + as large) / (1 + permutations). It tests against
    values in no order: a steady slope, or a curve whose neighbouring layers resemble each other, also has a small p,
    and an interval that is too narrow.

    Args:
        curve: scores [L]. NaN entries, such as those of degenerate layers, are left out.
        layers: positions [L], ascending; by default 0, 1, ...
        level: of the credible interval, between 0 and 1.
        min_size: fewest values on either side of the turn, static.
        permutations: random orders, static.
        seed: of the random orders; the same for each curve under vmap.

    Returns:
        ChangePoint of the curve's float type. Works under jit and vmap.

    Raises:
        ValueError: shapes that differ, layers that don't ascend, level or min_size or permutations out of range, an
            infinite value, or fewer than max(3, 2 min_size) finite ones (NaN is returned for traced curves instead).
    """
    curve = _as_curves(curve, "curve", 1, min_size)
    positions = _positions(layers, curve)
    _check_options(level, min_size)
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got permutations={permutations}")
    return _change_point(curve, positions, level, seed, min_size, permutations)


def change_point_samples(samples, layers=None, *, level: float = 0.95, min_size: int = 1) -> ChangePointSamples:
    """Find the layer at which each of many samples of one curve turns, such as its bootstrap replicates.

    The percentile interval of B. Efron, "Bootstrap methods: another look at the jackknife", Ann. Stat. 7, 1 (1979);
    unlike `change_point`, it needs no independence between layers. Ends are values that occur, not interpolated.

    Args:
        samples: curves [S, L]. NaN entries are left out, of each sample its own.
        layers: positions [L], ascending; by default 0, 1, ...
        level: of the interval, between 0 and 1.
        min_size: fewest values on either side of the turn, static.

    Returns:
        ChangePointSamples; `layer` and `effect` are of the mean of the samples, NaN left out. Traceable by jit. Traced
        samples with too few finite values count in no interval.

    Raises:
        ValueError: as `change_point`.
    """
    samples = _as_curves(samples, "samples", 2, min_size)
    positions = _positions(layers, samples)
    _check_options(level, min_size)
    return _change_point_samples(samples, positions, level, min_size)


def _as_curves(curves, name: str, dimensions: int, min_size: int) -> jax.Array:
    curves = jnp.asarray(curves)
    shape = "[layers]" if dimensions == 1 else "[samples, layers]"
    if curves.ndim != dimensions or 0 in curves.shape:
        raise ValueError(f"{name} must have shape {shape}, got {curves.shape}")
    if curves.dtype not in (jnp.float32, jnp.float64):
        curves = curves.astype(jnp.float32)
    fewest = max(3, 2 * min_size)
    if isinstance(curves, jax.core.Tracer):
        count = curves.shape[-1]
    else:
        values = np.asarray(curves)
        if np.any(np.isinf(values)):
            where = tuple(np.argwhere(np.isinf(values))[0].tolist())
            raise ValueError(f"{name} must not be infinite, got {name}[{', '.join(map(str, where))}] = {values[where]}")
        count = int(np.sum(np.isfinite(values), axis=-1).min())
    if count < fewest:
        raise ValueError(f"{name} must have at least {fewest} finite values over the layers, got {count}")
    return curves


def _positions(layers, curves) -> jax.Array:
    count = curves.shape[-1]
    positions = jnp.asarray(np.arange(count) if layers is None else layers, curves.dtype)
    if positions.shape != (count,):
        raise ValueError(f"layers must have one position for each of the {count} layers, got shape {positions.shape}")
    if not isinstance(positions, jax.core.Tracer) and not np.all(np.diff(np.asarray(positions)) > 0):
        raise ValueError(f"layers must ascend, got layers={np.asarray(positions)}")
    return positions


def _check_options(level, min_size) -> None:
    if not isinstance(level, jax.core.Tracer) and not 0 < float(level) < 1:
        raise ValueError(f"level must lie between 0 and 1, got level={level}")
    if min_size < 1:
        raise ValueError(f"min_size must be at least 1, got min_size={min_size}")


class _Fits(NamedTuple):
    """Every step of a curve, of which only the n finite values count, moved to the front by `order` [L].

    unit: the power of two that values and all below are in, so that squares neither overflow nor vanish.
    mean: of the values. values: [L], less their mean, and 0 past n. total: sum of their squares. Of m = 1 ... L - 1
    values before the turn: sizes, allowed, before, after, residual: [L - 1] m, whether n values leave min_size on
    either side, the means of `values`, and the sum of squared residuals, infinite where not allowed. best: the index
    of the least.
    """

    order: jax.Array
    count: jax.Array
    unit: jax.Array
    mean: jax.Array
    values: jax.Array
    total: jax.Array
    sizes: jax.Array
    allowed: jax.Array
    before: jax.Array
    after: jax.Array
    residual: jax.Array
    best: jax.Array


def _fit(curve, min_size: int) -> _Fits:
    finite = jnp.isfinite(curve)
    order = jnp.argsort(~finite, stable=True)
    count = jnp.sum(finite)
    filled = jnp.arange(curve.shape[0]) < count
    n = jnp.maximum(count, 1).astype(curve.dtype)
    unit = _unit(curve)
    values = jnp.where(filled, curve[order] / unit, 0)
    mean = jnp.sum(values) / n
    # Differences that are all rounding are none: a constant curve must not turn.
    noise = 4 * jnp.finfo(curve.dtype).eps * jnp.max(jnp.abs(values))
    values = jnp.where(filled, values - mean, 0)
    values = jnp.where(jnp.max(jnp.abs(values)) > noise, values, 0)
    sizes = jnp.arange(1, curve.shape[0])
    allowed = (sizes >= min_size) & (count - sizes >= min_size) & (count >= 3)
    first = (jnp.arange(curve.shape[0]) < sizes[:, None]) & filled  # [L - 1, L]
    second = ~first & filled
    before = jnp.sum(first * values, axis=1) / sizes.astype(curve.dtype)
    after = jnp.sum(second * values, axis=1) / jnp.maximum(count - sizes, 1).astype(curve.dtype)
    # From the residuals themselves: the total less what is explained would lose a clean step's digits.
    squares = first * (values - before[:, None]) ** 2 + second * (values - after[:, None]) ** 2
    residual = jnp.where(allowed, jnp.sum(squares, axis=1), jnp.inf)
    total = jnp.sum(values**2)
    # The first of those equal to within rounding.
    best = jnp.argmax(residual <= jnp.min(residual) + 16 * jnp.finfo(curve.dtype).eps * total)
    return _Fits(order, count, unit, mean, values, total, sizes, allowed, before, after, residual, best)


def _unit(curves):
    """Return the power of two near the largest finite value: dividing by it changes no digit."""
    exponent = jnp.frexp(jnp.max(jnp.where(jnp.isfinite(curves), jnp.abs(curves), 0)))[1]
    most = jnp.finfo(curves.dtype).maxexp - 28
    return jnp.ldexp(jnp.ones((), curves.dtype), jnp.clip(exponent, -most, most))


@partial(jax.jit, static_argnames=("min_size", "permutations"))
def _change_point(curve, positions, level, seed, min_size: int, permutations: int) -> ChangePoint:
    fits = _fit(curve, min_size)
    n = fits.count.astype(curve.dtype)
    at = fits.order[1:]  # the layer that comes first after each split
    chances = _posterior(fits)
    tail = (1 - jnp.asarray(level, curve.dtype)) / 2
    low, high = _quantile_index(chances, tail), _quantile_index(chances, 1 - tail)
    residual, size = fits.residual[fits.best], fits.sizes[fits.best].astype(curve.dtype)
    before, after = fits.before[fits.best], fits.after[fits.best]
    error = jnp.sqrt(residual / (n - 2) * (1 / size + 1 / (n - size)))
    explained = jnp.where(fits.total > 0, 1 - residual / jnp.where(fits.total > 0, fits.total, 1), 0)
    found = ChangePoint(
        layer=positions[at[fits.best]],
        low=positions[at[low]],
        high=positions[at[high]],
        effect=(after - before) * fits.unit,
        effect_error=error * fits.unit,
        before=(before + fits.mean) * fits.unit,
        after=(after + fits.mean) * fits.unit,
        explained=explained,
        posterior=jnp.zeros_like(curve).at[at].set(chances),
        p_value=_permutation_p_value(fits, seed, permutations),
    )
    return jax.tree.map(lambda a: jnp.where(jnp.any(fits.allowed), a, jnp.nan), found)


def _posterior(fits: _Fits):
    """Return the probability [L - 1] of each split; see `change_point`."""
    n = fits.count.astype(fits.values.dtype)
    sizes = fits.sizes.astype(fits.values.dtype)
    # A perfect step would be infinitely sure: residuals count as no smaller than the rounding of the values.
    info = jnp.finfo(fits.values.dtype)
    total = jnp.where(fits.total > 0, fits.total, 1)
    share = jnp.maximum(jnp.where(fits.total > 0, fits.residual / total, 1), info.eps**2)
    rest = jnp.maximum(n - sizes, 1)
    log_chance = -(jnp.log(sizes) + jnp.log(rest)) / 2 - (n - 2) / 2 * jnp.log(share)
    return jax.nn.softmax(jnp.where(fits.allowed, log_chance, info.min))


def _quantile_index(chances, share):
    """Return the first index at which the chances [K] add up to `share`, or the last that has any."""
    reached = jnp.cumsum(chances) >= share
    return jnp.where(jnp.any(reached), jnp.argmax(reached), chances.shape[0] - 1 - jnp.argmax(chances[::-1] > 0))


def _permutation_p_value(fits: _Fits, seed, permutations: int):
    length = fits.values.shape[0]
    draws = jax.random.uniform(jax.random.key(seed), (permutations, length))
    # Values past the finite ones stay where they are.
    draws = jnp.where(jnp.arange(length) < fits.count, draws, 2)
    shuffled = fits.values[jnp.argsort(draws, axis=1)]

    def largest_step(values):
        # The values have no mean, so the sum before the turn says all: what m of n explain is S^2 n / (m (n - m)).
        sums = jnp.cumsum(values, axis=-1)[..., :-1]
        explained = sums**2 / (fits.sizes * jnp.maximum(fits.count - fits.sizes, 1)).astype(values.dtype)
        return jnp.max(jnp.where(fits.allowed, explained, 0), axis=-1)

    # The same step in another order of summation is as large.
    limit = largest_step(fits.values) * (1 - 16 * length * jnp.finfo(fits.values.dtype).eps)
    return (1 + jnp.sum(largest_step(shuffled) >= limit)) / jnp.asarray(1 + permutations, fits.values.dtype)


@partial(jax.jit, static_argnames=("min_size",))
def _change_point_samples(samples, positions, level, min_size: int) -> ChangePointSamples:
    def turn(curve):
        fits = _fit(curve, min_size)
        where = fits.order[1:][fits.best]
        valid = jnp.any(fits.allowed)
        return where, jnp.where(valid, (fits.after[fits.best] - fits.before[fits.best]) * fits.unit, jnp.nan)

    where, effects = jax.vmap(turn)(samples)
    unit = _unit(samples)  # their sum could overflow
    valid = jnp.isfinite(effects)
    layers = jnp.where(valid, positions[where], jnp.nan)
    tail = (1 - jnp.asarray(level, samples.dtype)) / 2
    counts = jnp.zeros(samples.shape[1], samples.dtype).at[where].add(valid)
    mean_at, mean_effect = turn(jnp.nanmean(samples / unit, axis=0) * unit)

    def ends(values):
        low = jnp.nanquantile(values, tail, method="lower")
        return low, jnp.nanquantile(values, 1 - tail, method="higher")

    return ChangePointSamples(
        jnp.where(jnp.isfinite(mean_effect), positions[mean_at], jnp.nan), *ends(layers), mean_effect, *ends(effects),
        counts / jnp.sum(valid), layers, effects,
    )  # fmt: skip
