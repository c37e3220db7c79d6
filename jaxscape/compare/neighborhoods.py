"""How neighbourhoods agree: with labels, and with the neighbourhoods of another representation."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscape.compare.partitions import as_labels, group_sizes

_TILE_ELEMENTS = 1 << 24  # distances held at once: 64 MiB in float32
_TILE_ROWS = 1024
_GATHER_ELEMENTS = 1 << 22  # coordinates gathered at once when distances are recomputed
_DOUBTFUL = 32  # distances of a row recomputed at once


class InformationImbalance(NamedTuple):
    """How well nearness in one representation tells nearness in the other: near 0 wholly, near 1 not at all.

    a_to_b: scalar, what the neighbours in A tell of B.
    b_to_a: scalar, the other way round. A low a_to_b with a high b_to_a: A knows more than B.
    """

    a_to_b: jax.Array
    b_to_a: jax.Array


def label_overlap(
    indices, labels, k: int | None = None, *, class_fraction: float | None = None, balanced: bool | None = None
) -> jax.Array:
    """Return the fraction of neighbours that share their point's label.

    The mean over the points of `label_agreement`. With `class_fraction`, every class weighs the same, so that neither
    the sizes nor the number of neighbours favours the large classes: the study's overlap with subjects and answers
    (arXiv 2409.03662, section 3; DADApy's return_label_overlap).

    Args:
        indices: neighbours [N, K] of N points, nearest first.
        labels: labels [N].
        k: neighbours used, static; by default, without `class_fraction`, all K.
        class_fraction: in (0, 1], static: use that fraction of its class for each point; K must be enough for the
            largest class.
        balanced: whether every class weighs the same, rather than every point; by default, with `class_fraction`.

    Returns:
        Scalar of the default float type, between 0 and 1. Traceable by jit, when the labels are integers.

    Raises:
        ValueError: both k and class_fraction; k or class_fraction out of range; sizes that differ; indices that are
            no points, 0 to N - 1 (not checked while they are traced).
    """
    codes = as_labels(labels, "labels")
    shared = label_agreement(indices, codes, k, class_fraction=class_fraction)
    balanced = class_fraction is not None if balanced is None else balanced
    return mean_over_classes(shared, codes) if balanced else jnp.mean(shared)


def label_agreement(indices, labels, k: int | None = None, *, class_fraction: float | None = None) -> jax.Array:
    """Return the share of each point's neighbours that have its label: the terms that `label_overlap` averages.

    With `k`, of the first k neighbours. With `class_fraction`, each point has as many neighbours as that fraction of
    its class (rounded down in float64, at least one).

    Args:
        indices: neighbours [N, K] of N points, nearest first.
        labels: labels [N].
        k: neighbours used, static; by default, without `class_fraction`, all K.
        class_fraction: in (0, 1], static; K must be enough for the largest class.

    Returns:
        [N] of the default float type, between 0 and 1. Traceable by jit, when the labels are integers; points whose
        class needs more than the K neighbours kept are NaN then, as traced labels can't be checked.

    Raises:
        ValueError: both k and class_fraction; k or class_fraction out of range; sizes that differ; indices that are
            no points, 0 to N - 1 (not checked while they are traced).
    """
    indices = jnp.asarray(indices)
    if indices.ndim != 2:
        raise ValueError(f"indices must have two dimensions [points, neighbours], got shape {indices.shape}")
    codes = as_labels(labels, "labels")
    n, kept = indices.shape
    if codes.shape[0] != n:
        raise ValueError(f"labels must have one label for each of the {n} points, got {codes.shape[0]}")
    _check_points(indices, "indices")
    if k is not None and class_fraction is not None:
        raise ValueError(f"give k or class_fraction, not both: got k={k}, class_fraction={class_fraction}")
    if class_fraction is None:
        k = kept if k is None else k
        if not 1 <= k <= kept:
            raise ValueError(f"k must lie between 1 and the {kept} neighbours kept, got k={k}")
        return _label_agreement(indices[:, :k], codes, jnp.full(n, k, jnp.int32))
    return _label_agreement(indices, codes, _class_neighbors(codes, class_fraction, kept))


def mean_over_classes(values, labels) -> jax.Array:
    """Return the mean over the classes of the mean of `values` in each, so that every class weighs the same.

    Args:
        values: [N], one per point: agreements with neighbours, right answers.
        labels: the points' classes [N].

    Returns:
        Scalar. Traceable by jit, when the labels are integers.

    Raises:
        ValueError: labels that aren't one-dimensional, or not as many as the values.
    """
    values, codes = jnp.asarray(values), as_labels(labels, "labels")
    if values.shape != codes.shape:
        raise ValueError(f"values must be one for each of the {codes.shape[0]} labels, got shape {values.shape}")
    return _mean_over_classes(values, codes)


def neighbor_overlap(indices_a, indices_b, k: int) -> jax.Array:
    """Return the mean share of the first `k` neighbours that two representations of the same points have in common.

    The neighbourhood overlap of D. Doimo, A. Glielmo, A. Ansuini, A. Laio, "Hierarchical nucleation in deep neural
    networks", NeurIPS 2020: the mean over the points of `neighbor_agreement`, which has the arguments and errors.

    Returns:
        Scalar of the default float type, between 0 and 1.
    """
    return jnp.mean(neighbor_agreement(indices_a, indices_b, k))


def neighbor_agreement(indices_a, indices_b, k: int) -> jax.Array:
    """Return the share of each point's first `k` neighbours that two representations of the points have in common.

    Args:
        indices_a: neighbours [N, K] in one representation.
        indices_b: neighbours [N, K'] in the other, of the same points in the same order.
        k: neighbours compared, static.

    Returns:
        [N] of the default float type, between 0 and 1: the terms that `neighbor_overlap` averages.

    Raises:
        ValueError: k < 1 or larger than the neighbours kept; different numbers of points; indices that are no points,
            0 to N - 1 (not checked while they are traced).
    """
    a, b = jnp.asarray(indices_a), jnp.asarray(indices_b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
        raise ValueError(
            f"indices_a and indices_b must be [points, neighbours] of the same points, got {a.shape} and {b.shape}"
        )
    kept = min(a.shape[1], b.shape[1])
    if not 1 <= k <= kept:
        raise ValueError(f"k must lie between 1 and the {kept} neighbours kept, got k={k}")
    _check_points(a, "indices_a")
    _check_points(b, "indices_b")
    return _neighbor_agreement(a[:, :k], b[:, :k])


def information_imbalance(indices_a, x_b, k: int = 1, *, tile_size: int | None = None) -> jax.Array:
    """Return the information imbalance from A to B: 2 / N times the mean rank in B of the nearest neighbours in A.

    A. Glielmo, C. Zeni, B. Cheng, G. Csanyi, A. Laio, "Ranking the information content of distance measures", PNAS
    Nexus 1, pgac039 (2022), eq. 2, over the first k neighbours. 2 / N to about 1: near 0 when who is near in A is
    near in B, near 1 when A tells nothing of B. `conditional_ranks` has the arguments, errors and cost.

    Returns:
        Scalar of the default float type.
    """
    ranks = conditional_ranks(indices_a, x_b, k, tile_size=tile_size)
    return imbalance_terms(ranks).mean()


def information_imbalances(
    indices_a, x_a, indices_b, x_b, k: int = 1, *, tile_size: int | None = None
) -> InformationImbalance:
    """Return the information imbalance both ways, from two representations' neighbours and points.

    Args:
        indices_a: neighbours [N, K] in A, nearest first, the point itself excluded.
        x_a: points [N, D] of A.
        indices_b: neighbours [N, K'] in B of the same points, in the same order.
        x_b: points [N, D'] of B.
        k: neighbours whose ranks are averaged, static.
        tile_size: as in `conditional_ranks`.

    Returns:
        InformationImbalance.

    Raises:
        ValueError: as `conditional_ranks`.
    """
    return InformationImbalance(
        information_imbalance(indices_a, x_b, k, tile_size=tile_size),
        information_imbalance(indices_b, x_a, k, tile_size=tile_size),
    )


def imbalance_terms(ranks) -> jax.Array:
    """Return what each point adds to the imbalance, [N], from its `conditional_ranks` [N, k]: their mean is it."""
    ranks = jnp.asarray(ranks)
    return 2 / ranks.shape[0] * jnp.mean(ranks.astype(jnp.result_type(float)), axis=1)


def conditional_ranks(indices_a, x_b, k: int = 1, *, tile_size: int | None = None) -> jax.Array:
    """Return the ranks in B of every point's first `k` neighbours in A: 1 for the nearest, N - 1 for the farthest.

    The rank is counted, not looked up, so no neighbour is too far: one more than the points of B that are nearer, or
    as near and of a lower index. A tiled matrix product settles all but the few distances that its rounding error
    (bounded as in Higham and Mary, SIAM J. Sci. Comput. 2019) can't tell from the neighbour's; these are
    recomputed from the differences of the points. The ranks are those of an exact search, with all but certainty, and
    don't depend on the tiles. Time grows with N^2 D, memory with a tile.

    Args:
        indices_a: neighbours [N, K] in A, nearest first, the point itself excluded.
        x_b: points [N, D] of B, in the same order; float64 stays float64 (with x64 on), anything else is float32.
        k: neighbours ranked, static.
        tile_size: points handled at once; by default as many as keep a tile at 64 MiB.

    Returns:
        int32 [N, k].

    Raises:
        ValueError: shapes that don't fit; k < 1 or above the neighbours kept; tile_size < 1; neighbours that are no
            other points of B; NaN or Inf in x_b.
    """
    indices, x = jnp.asarray(indices_a), jnp.asarray(x_b)
    if indices.ndim != 2 or x.ndim != 2 or indices.shape[0] != x.shape[0] or 0 in x.shape:
        raise ValueError(
            f"indices_a [points, neighbours] and x_b [points, features] must be of the same points, "
            f"got {indices.shape} and {x.shape}"
        )
    if not 1 <= k <= indices.shape[1]:
        raise ValueError(f"k must lie between 1 and the {indices.shape[1]} neighbours kept, got k={k}")
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, got tile_size={tile_size}")
    indices = indices[:, :k].astype(jnp.int32)
    if x.dtype != jnp.float64:
        x = x.astype(jnp.float32)
    _check_ranked(indices, x)
    n = x.shape[0]
    rows = min(n, _TILE_ROWS, max(1, _TILE_ELEMENTS // n)) if tile_size is None else min(n, tile_size)
    return _conditional_ranks(indices, x, math.ceil(n / math.ceil(n / rows)))


def _check_points(indices, name: str) -> None:
    """Raise ValueError if `indices` [N, K] are not all of the N points: gathering would clip or wrap them."""
    if isinstance(indices, jax.core.Tracer):
        return
    host, n = np.asarray(indices), indices.shape[0]
    wrong = (host < 0) | (host >= n)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"{name} must lie between 0 and {n - 1}, got {name}[{row}, {column}] = {host[row, column]}")


def _check_ranked(indices, x):
    n = x.shape[0]
    if not isinstance(indices, jax.core.Tracer):
        host = np.asarray(indices)
        wrong = (host < 0) | (host >= n) | (host == np.arange(n)[:, None])
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"indices_a must hold other points than the point itself, 0 to {n - 1}, "
                f"got indices_a[{row}, {column}] = {host[row, column]}"
            )
    if not isinstance(x, jax.core.Tracer) and not np.isfinite(np.asarray(x)).all():
        row, column = np.argwhere(~np.isfinite(np.asarray(x)))[0]
        raise ValueError(f"x_b must be finite, got x_b[{row}, {column}] = {x[row, column]}")


def _class_neighbors(codes, fraction: float, kept: int):
    """Return how many neighbours count for each point, int32 [N]: the given fraction of its class."""
    if not 0 < fraction <= 1:
        raise ValueError(f"class_fraction must be above 0 and at most 1, got class_fraction={fraction}")
    # A table from the host, in float64: 0.29 of 100 points mustn't round to another count than it does elsewhere.
    table = np.maximum(1, (np.arange(len(codes) + 1) * float(fraction)).astype(np.int32))
    used = jnp.asarray(table)[group_sizes(codes)]
    if not isinstance(used, jax.core.Tracer) and used.max() > kept:
        raise ValueError(
            f"indices must keep {used.max()} neighbours for class_fraction={fraction} of the largest class, got {kept}"
        )
    return used


@jax.jit
def _label_agreement(indices, codes, used):
    counts = jnp.arange(indices.shape[1]) < used[:, None]
    shared = jnp.sum((codes[indices] == codes[:, None]) & counts, axis=1) / used
    return jnp.where(used <= indices.shape[1], shared, jnp.nan)


@jax.jit
def _mean_over_classes(values, codes):
    weights = 1 / group_sizes(codes)
    return jnp.sum(values * weights) / jnp.sum(weights)


@jax.jit
def _neighbor_agreement(a, b):
    def shared(rows):
        return jnp.sum(rows[0][:, None] == rows[1][None, :])

    # Row by row, in batches, so that memory grows with N * k rather than N * k * k.
    return jax.lax.map(shared, (a, b), batch_size=1024) / a.shape[1]


@partial(jax.jit, static_argnames=("tile",))
def _conditional_ranks(indices, x, tile: int):
    n = x.shape[0]
    # A power of two changes no digit, and keeps the squares of very large or small values representable.
    exponent = jnp.clip(jnp.frexp(jnp.max(jnp.abs(x)))[1], -100, 100)
    x = x * jnp.ldexp(jnp.ones((), x.dtype), -exponent)
    centred = x - jnp.mean(x, axis=0)  # an offset shared by all points would eat the product's digits
    norms = jnp.sum(centred * centred, axis=-1)

    def one_tile(rows):
        product = jnp.matmul(centred[rows], centred.T, precision=lax.Precision.HIGHEST)
        sums = norms[rows][:, None] + norms[None, :]
        squares, errors = sums - 2 * product, sums * _product_error(x.shape[1], x.dtype)
        return lax.map(lambda neighbors: _tile_ranks(x, rows, neighbors, squares, errors), indices[rows].T).T

    rows = jnp.minimum(jnp.arange(math.ceil(n / tile) * tile), n - 1).reshape(-1, tile)
    return lax.map(one_tile, rows).reshape(-1, indices.shape[1])[:n]


def _tile_ranks(x, rows, neighbors, squares, errors):
    """Return the ranks [T] of `neighbors` [T] seen from `rows` [T], given all squared distances [T, N] +- errors."""
    n = x.shape[0]
    width = min(n, _DOUBTFUL)
    reference = jnp.sum((x[neighbors] - x[rows]) ** 2, axis=-1)[:, None]
    others = jnp.arange(n) != rows[:, None]
    # Below zero: whichever way the rounding went, on the one side of the neighbour or on the other.
    doubt = jnp.abs(squares - reference) - errors - reference * _product_error(x.shape[1], x.dtype)
    doubtful = others & (doubt <= 0)
    nearer = jnp.sum(others & ~doubtful & (squares < reference), axis=1, dtype=jnp.int32)

    def settle(state):
        ranks, doubtful = state
        # top_k of a mask: the doubtful ones first, by index; what else it brings is masked out.
        found, who = lax.optimization_barrier(lax.top_k(doubtful.astype(x.dtype), width))
        # The neighbour itself goes through the same sum as what it is compared with, so that ties are ties.
        with_neighbor = jnp.concatenate([neighbors[:, None], who], axis=1)
        distances = _distances(x, rows, with_neighbor)
        own = distances[:, :1]
        before = (distances[:, 1:] < own) | ((distances[:, 1:] == own) & (who < neighbors[:, None]))
        ranks += jnp.sum(before & (found > 0), axis=1, dtype=jnp.int32)
        left = doubtful.at[jnp.arange(len(rows))[:, None], who].set(False)
        return ranks, left

    return lax.while_loop(lambda state: jnp.any(state[1]), settle, (nearer + 1, doubtful))[0]


def _distances(x, rows, columns):
    """Return the distances [T, M] from the points `rows` [T] to `columns` [T, M], from their differences."""
    tile, width = columns.shape
    batch = max(1, min(tile, _GATHER_ELEMENTS // (width * x.shape[1])))
    starts = jnp.minimum(jnp.arange(math.ceil(tile / batch) * batch), tile - 1).reshape(-1, batch)

    def one_batch(at):
        difference = x[columns[at]] - x[rows[at]][:, None, :]
        return jnp.sqrt(jnp.sum(difference * difference, axis=-1))

    return lax.map(one_batch, starts).reshape(-1, width)[:tile]


def _product_error(dim: int, dtype) -> float:
    """Bound the rounding error of |a|^2 + |b|^2 - 2 a.b over |a|^2 + |b|^2, for centred points a and b.

    As in the search for neighbours: a sum of `dim` products errs by less than 8 sqrt(dim) roundings with all but
    certainty, and never by more than `dim`.
    """
    unit = float(jnp.finfo(dtype).eps) / 2
    return (2 * min(dim, 8 * math.sqrt(dim) + 32) + 16) * unit
