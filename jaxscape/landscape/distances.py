"""Points, the distances between them, and what rounding does to these."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def as_points(x, name: str = "x") -> jax.Array:
    """Return `x` as a float32 (or float64, when it is and x64 is on) array [N, D] of finite numbers.

    Integers and half-precision floats become float32. Raises ValueError when `x` isn't two-dimensional, has no
    features, isn't real, or holds NaN or Inf (not checked on values that are being traced).
    """
    points = jnp.asarray(x)
    if points.ndim != 2:
        raise ValueError(f"{name} must have two dimensions [points, features], got shape {points.shape}")
    if points.shape[1] == 0:
        raise ValueError(f"{name} must have at least one feature, got shape {points.shape}")
    if jnp.issubdtype(points.dtype, jnp.complexfloating):
        raise ValueError(f"{name} must be real, got dtype {points.dtype}")
    if points.dtype not in (jnp.float32, jnp.float64):
        points = points.astype(jnp.float32)
    finite = _all_finite(points)  # is traced wherever anything is, whatever the points are
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        row, column = np.argwhere(~np.isfinite(np.asarray(points)))[0]
        raise ValueError(f"{name} must be finite, got {name}[{row}, {column}] = {points[row, column]}")
    return points


def unit_scale(x):
    """Return `x` times a power of two that brings its largest value near one, and the factor back.

    A power of two changes no digit, and keeps the squares of very large or small values representable.
    """
    unit = power_of_two(jnp.max(jnp.abs(x)))
    return x * (1 / unit), unit


def power_of_two(largest):
    """Return the power of two next above `largest`, between 2^-100 and 2^100 (float64: 2^-1000 and 2^1000)."""
    _, exponent = jnp.frexp(largest)
    limit = 100 if largest.dtype == jnp.float32 else 1000
    return jnp.ldexp(jnp.ones((), largest.dtype), jnp.clip(exponent, -limit, limit))


def squared_distances(x, rows):
    """Return the squared distances [B, N] from the points `rows` [B] to all points, from their differences."""
    difference = x[None, :, :] - x[rows][:, None, :]
    return jnp.sum(difference * difference, axis=-1)


def unit_vectors(x):
    """Return the rows of `x` [N, D] divided by their lengths; a row of zeros stays one."""
    scaled = x / jnp.maximum(jnp.max(jnp.abs(x), axis=1, keepdims=True), jnp.finfo(x.dtype).tiny)
    length = jnp.sqrt(jnp.sum(scaled * scaled, axis=1, keepdims=True))
    return jnp.where(length > 0, scaled / jnp.where(length > 0, length, 1), 0)


def product_error(dim: int, dtype) -> float:
    """Bound the rounding error of |a|^2 + |b|^2 - 2 a.b over |a|^2 + |b|^2, for centred points a and b.

    A sum of `dim` products errs by less than u * dim; its error is a random walk of less than 8 sqrt(dim) steps
    with all but certainty (Higham and Mary, SIAM J. Sci. Comput. 2019, with lambda = 8). Twice that, for the
    norms and the product, and a few roundings for the centring and the sums.
    """
    unit = float(jnp.finfo(dtype).eps) / 2
    return (2 * min(dim, 8 * math.sqrt(dim) + 32) + 16) * unit


@jax.jit
def _all_finite(x):
    return jnp.all(jnp.isfinite(x))
