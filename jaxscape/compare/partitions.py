"""Scores of the agreement of two partitions of the same points.

Wherever two partitions play different parts, the known classes come first and the clusters found second, as in
scikit-learn (labels_true, labels_pred). Every score but `cluster_composition` is traceable by jit when the labels are
integers: counts are found by sorting, so no shape depends on the data. Logarithms are natural.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_BLOCK = 256
_AVERAGES = ("arithmetic", "geometric", "min", "max")


class Composition(NamedTuple):
    """What the C clusters are made of, in the sorted order of their labels (as in np.unique).

    majority: [C] the commonest class of each cluster, in the labels given; of classes as common, the first in order.
    purity: [C] float64, the share of the cluster's points in that class.
    size: [C] int64, points of the cluster.
    """

    majority: np.ndarray
    purity: np.ndarray
    size: np.ndarray


def as_labels(labels, name: str) -> jax.Array:
    """Return `labels` [N] as int32 codes. Equal labels get equal codes; the labels can be of any type that sorts.

    Traced integer arrays pass as they are. Raises ValueError unless there is one dimension and a point or more.
    """
    if not isinstance(labels, jax.core.Tracer):
        labels = np.asarray(labels)
    if labels.ndim != 1 or labels.shape[0] == 0:
        raise ValueError(f"{name} must have shape [points] with at least one point, got {labels.shape}")
    if isinstance(labels, jax.core.Tracer):
        return labels
    return jnp.asarray(np.unique(labels, return_inverse=True)[1].astype(np.int32))


def adjusted_rand_index(a, b) -> jax.Array:
    """Return the adjusted Rand index of two partitions: 1 when they are the same, 0 on average at random.

    L. Hubert, P. Arabie, "Comparing partitions", J. Classif. 2, 193 (1985), in the pair-counting form. All counts are
    exact integers (up to eight million points), so the score is exact to the rounding of a few floats.

    Args:
        a: labels [N] of one partition.
        b: labels [N] of the other.

    Returns:
        Scalar of the default float type. Traceable by jit, when the labels are integers.

    Raises:
        ValueError: labels that aren't one-dimensional, or of different lengths.
    """
    return _adjusted_rand_index(*_as_pair(a, b, ("a", "b")))


def normalized_mutual_information(a, b, average: str = "arithmetic") -> jax.Array:
    """Return the mutual information of two partitions over an average of their entropies, between 0 and 1.

    Not corrected for chance: it grows with the number of clusters. N. X. Vinh, J. Epps, J. Bailey, "Information
    theoretic measures for clusterings comparison", JMLR 11, 2837 (2010), table 2.

    Args:
        a: labels [N] of one partition.
        b: labels [N] of the other; the score is symmetric.
        average: of the two entropies: "arithmetic", "geometric", "min" or "max"; static.

    Returns:
        Scalar of the default float type. One when both partitions are one cluster, zero when only one of them is.

    Raises:
        ValueError: labels that aren't one-dimensional, or of different lengths; an unknown average.
    """
    _check_average(average)
    return _normalized_mutual_information(*_as_pair(a, b, ("a", "b")), average)


def adjusted_mutual_information(a, b, average: str = "arithmetic") -> jax.Array:
    """Return the mutual information adjusted for chance: 1 when the partitions are the same, 0 on average at random.

    (I - E[I]) / (average(H_a, H_b) - E[I]), with the expectation over all ways to deal the points into clusters of the
    same sizes: N. X. Vinh, J. Epps, J. Bailey, JMLR 11, 2837 (2010), eqs. 24a and 14 to 17.

    Runs on the device in either precision. float32 loses nothing to log-gammas or to differences of large logarithms:
    every table entry's distribution is summed outwards from its mode, relative to it, until nothing more comes; and
    the differences are taken between whichever are the smaller, information or what it lacks to log N. It agrees with
    float64 to 1e-5. Time grows with the square of the number of distinct cluster sizes, at most sqrt(2 N), and with
    the width of the widest of these distributions, at most some sqrt(N).

    Args:
        a: labels [N] of one partition.
        b: labels [N] of the other; the score is symmetric.
        average: of the two entropies: "arithmetic", "geometric", "min" or "max"; static.

    Returns:
        Scalar of the default float type, at most 1; negative when the partitions agree less than by chance. One
        when both are one cluster, zero when only one of them is. With average="min", one by convention when all
        clusters of either partition are single points: no dealing of the points changes the information then, and the
        score is 0 / 0.

    Raises:
        ValueError: labels that aren't one-dimensional, or of different lengths; an unknown average.
    """
    _check_average(average)
    return _adjusted_mutual_information(*_as_pair(a, b, ("a", "b")), average)


def homogeneity(classes, clusters) -> jax.Array:
    """Return how far each cluster holds one class only: 1 - H(class | cluster) / H(class), between 0 and 1.

    A. Rosenberg, J. Hirschberg, "V-Measure: a conditional entropy-based external cluster evaluation measure",
    EMNLP-CoNLL 2007, eq. 1. Not corrected for chance. See `v_measure` for the arguments and what is raised; one when
    there is one class only.
    """
    return _homogeneity_completeness(*_as_pair(classes, clusters))[0]


def completeness(classes, clusters) -> jax.Array:
    """Return how far each class lies in one cluster only: 1 - H(cluster | class) / H(cluster), between 0 and 1.

    Rosenberg and Hirschberg (2007), eq. 2: the homogeneity with the parts exchanged. Not corrected for chance. See
    `v_measure` for the arguments and what is raised; one when there is one cluster only.
    """
    return _homogeneity_completeness(*_as_pair(classes, clusters))[1]


def v_measure(classes, clusters, beta: float = 1.0) -> jax.Array:
    """Return the weighted harmonic mean of homogeneity h and completeness c: (1 + beta) h c / (beta h + c).

    Rosenberg and Hirschberg (2007), eq. 3. With beta = 1 it is the normalised mutual information (arithmetic).

    Args:
        classes: known labels [N].
        clusters: labels [N] found.
        beta: at least 0 and finite; above 1, completeness weighs more than homogeneity.

    Returns:
        Scalar of the default float type, between 0 and 1.

    Raises:
        ValueError: labels that aren't one-dimensional, or of different lengths; beta < 0 or not finite.
    """
    if not isinstance(beta, jax.core.Tracer) and not 0 <= float(beta) < math.inf:
        raise ValueError(f"beta must be at least 0 and finite, got beta={beta}")
    h, c = _homogeneity_completeness(*_as_pair(classes, clusters))
    below = beta * h + c
    return jnp.where(below == 0, 0, (1 + beta) * h * c / jnp.where(below == 0, 1, below))


def purity(classes, clusters) -> jax.Array:
    """Return the share of points that are in the commonest class of their cluster, above 0 and at most 1.

    Not corrected for chance: it is one when every cluster is a single point. `cluster_composition` has it cluster by
    cluster.

    Args:
        classes: known labels [N].
        clusters: labels [N] found.

    Returns:
        Scalar of the default float type.

    Raises:
        ValueError: labels that aren't one-dimensional, or of different lengths.
    """
    return _purity(*_as_pair(classes, clusters))


def cluster_composition(clusters, classes) -> Composition:
    """Return the commonest class of every cluster, its share and the cluster's size: names for a dendrogram's leaves.

    Runs on the host: the number of clusters depends on the data. For another cut of the tree, give the clusters of
    that cut.

    Args:
        clusters: labels [N] of any type that sorts.
        classes: labels [N] of any type that sorts.

    Returns:
        Composition, one entry per cluster.

    Raises:
        ValueError: labels that aren't one-dimensional, or of different lengths.
    """
    clusters, classes = np.asarray(clusters), np.asarray(classes)
    rows, columns = (np.asarray(codes) for codes in _as_pair(clusters, classes, ("clusters", "classes")))
    names = np.unique(classes)
    # Only cells that hold points: many clusters times many classes could be a large table.
    cells, counts = np.unique(rows * np.int64(len(names)) + columns, return_counts=True)
    cluster, name = np.divmod(cells, len(names))
    order = np.lexsort((name, -counts, cluster))
    first = order[np.unique(cluster[order], return_index=True)[1]]
    size = np.bincount(rows)
    return Composition(names[name[first]], counts[first] / size, size)


def group_sizes(*keys):
    """Return how many points share each point's keys: int32 [N] from integer keys [N]."""
    n = keys[0].shape[0]
    *keys, point = lax.sort((*keys, jnp.arange(n, dtype=jnp.int32)), num_keys=len(keys))
    changes = jnp.zeros(n - 1, bool)
    for key in keys:
        changes |= key[1:] != key[:-1]
    return jnp.zeros(n, jnp.int32).at[point].set(_run_lengths(changes))


def _as_pair(a, b, names=("classes", "clusters")):
    a, b = as_labels(a, names[0]), as_labels(b, names[1])
    if a.shape != b.shape:
        raise ValueError(f"{names[0]} and {names[1]} must have the same length, got {a.shape[0]} and {b.shape[0]}")
    return a, b


def _check_average(average: str):
    if average not in _AVERAGES:
        raise ValueError(f"average must be one of {_AVERAGES}, got {average!r}")


class _Sizes(NamedTuple):
    """Points that share each point's label in a, in b and in both: int32 [N] each. The points are in some order."""

    a: jax.Array
    b: jax.Array
    both: jax.Array


def _sizes(a, b) -> _Sizes:
    in_b = group_sizes(b)
    a, b, in_b = lax.sort((a, b, in_b), num_keys=2)
    changes = a[1:] != a[:-1]
    return _Sizes(_run_lengths(changes), in_b, _run_lengths(changes | (b[1:] != b[:-1])))


def _run_lengths(changes):
    """Return the length of each element's run, int32 [N], from where neighbours differ, bool [N - 1]."""
    group = _run_numbers(changes)
    return jax.ops.segment_sum(jnp.ones_like(group), group, num_segments=len(group), indices_are_sorted=True)[group]


def _run_numbers(changes):
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(changes, dtype=jnp.int32)])


@jax.jit
def _adjusted_rand_index(a, b):
    n, sizes = a.shape[0], _sizes(a, b)
    # Ordered pairs: together in both, apart in both, together in one only; counted without subtracting totals.
    together, apart = _mean(sizes.both - 1) / n, _mean(n - sizes.a - sizes.b + sizes.both) / n
    only_a, only_b = _mean(sizes.a - sizes.both) / n, _mean(sizes.b - sizes.both) / n
    above = 2 * (together * apart - only_a * only_b)
    below = (together + only_b) * (only_b + apart) + (together + only_a) * (only_a + apart)
    same = (only_a == 0) & (only_b == 0)
    return jnp.where(same, 1, above / jnp.where(same, 1, below))


@jax.jit
def _purity(classes, clusters):
    clusters, classes = lax.sort((clusters, classes), num_keys=2)
    changes = clusters[1:] != clusters[:-1]
    cluster = _run_numbers(changes)
    shared = _run_lengths(changes | (classes[1:] != classes[:-1]))
    largest = jax.ops.segment_max(shared, cluster, num_segments=len(cluster), indices_are_sorted=True)
    counts = jnp.where(jnp.arange(len(cluster)) <= cluster[-1], largest, 0)
    return jnp.sum(counts) / len(counts)


def _normalized_mutual_information(a, b, average: str):
    shared, entropy_a, entropy_b = _information(a, b)
    whole = _average(entropy_a, entropy_b, average)
    one_cluster = (entropy_a == 0) & (entropy_b == 0)
    return jnp.where(one_cluster, 1, jnp.where(shared == 0, 0, shared / jnp.where(whole == 0, 1, whole)))


def _homogeneity_completeness(classes, clusters):
    shared, *entropies = _information(classes, clusters)
    return [jnp.where(entropy == 0, 1, shared / jnp.where(entropy == 0, 1, entropy)) for entropy in entropies]


def _adjusted_mutual_information(a, b, average: str):
    shared, entropy_a, entropy_b = _information(a, b)
    # What entropies and information lack to log N is the points' mean log size: s_a, s_b and s_ab. As
    # H_a = log N - s_a and I = log N - s_a - s_b + s_ab, the score's differences can be taken between either.
    (lack_a, lack_b, lack_both), expected, expected_lack, same = _chance(a, b)
    lack = _average(lack_a, lack_b, "arithmetic" if average == "geometric" else average)
    if average == "geometric":
        roots = jnp.sqrt(entropy_a) + jnp.sqrt(entropy_b)
        lack -= ((lack_a - lack_b) / jnp.where(roots == 0, 1, roots)) ** 2 / 2
    whole = _average(entropy_a, entropy_b, average)
    above = jnp.where(lack < whole, lack_both - expected_lack, shared - expected)
    below = jnp.where(lack < whole, lack - expected_lack, whole - expected)
    # Where nothing is left to gain beyond what is expected, scikit-learn's convention is one.
    same = same | (below <= 0)
    one_cluster = (entropy_a == 0) | (entropy_b == 0)
    both_one = (entropy_a == 0) & (entropy_b == 0)
    score = jnp.where(same, 1, above / jnp.where(same, 1, below))
    return jnp.where(both_one, 1, jnp.where(one_cluster, 0, score))


def _average(first, second, average: str):
    if average == "arithmetic":
        return (first + second) / 2
    if average == "geometric":
        return jnp.sqrt(first) * jnp.sqrt(second)
    return jnp.minimum(first, second) if average == "min" else jnp.maximum(first, second)


@jax.jit
def _information(a, b):
    """Return the mutual information and the entropies of a and of b."""
    dtype, sizes = jnp.result_type(float), _sizes(a, b)
    whole = jnp.asarray(a.shape[0], dtype)
    in_a, in_b, in_both = (size.astype(dtype) for size in sizes)
    surplus = _surplus(in_a, in_b, in_both, whole)
    shared = _mean(_log_ratio(whole * in_both, in_a * in_b, surplus))
    entropy_a = -_mean(_log_ratio(in_a, whole, in_a - whole))
    entropy_b = -_mean(_log_ratio(in_b, whole, in_b - whole))
    entropy_a, entropy_b = jnp.maximum(entropy_a, 0), jnp.maximum(entropy_b, 0)  # not -0.0
    return jnp.clip(shared, 0, jnp.minimum(entropy_a, entropy_b)), entropy_a, entropy_b


def _surplus(in_a, in_b, in_both, whole):
    """Return N n_ab - n_a n_b, the surplus over independence times N, without subtracting the two large products."""
    return in_both * (whole - in_a - in_b + in_both) - (in_a - in_both) * (in_b - in_both)


def _log_ratio(above, below, difference):
    """Return log(above / below) given above - below: to full relative precision where the two are close."""
    close = jnp.abs(difference) < below / 2
    return jnp.where(close, jnp.log1p(jnp.where(close, difference / below, 0)), jnp.log(above / below))


@jax.jit
def _chance(a, b):
    """Return the mean log sizes (a, b, both), what `_expected_information` returns, and if the partitions are one."""
    sizes = _sizes(a, b)
    lacks = [_mean(jnp.log(size.astype(jnp.result_type(float)))) for size in sizes]
    same = jnp.all((sizes.a == sizes.both) & (sizes.b == sizes.both))
    return lacks, *_expected_information(sizes, a.shape[0]), same


def _expected_information(sizes: _Sizes, n: int):
    """Return the expectations of the mutual information and of the mean over the points of log n_ab."""
    dtype = jnp.result_type(float)
    size_a, weight_a = _distinct_sizes(sizes.a, dtype)
    size_b, weight_b = _distinct_sizes(sizes.b, dtype)
    divergence, lack = _expected_cell(size_a[:, None], size_b[None, :], n, dtype)
    weights = weight_a[:, None] * weight_b[None, :] / n
    return jnp.sum(weights * divergence), jnp.sum(weights * lack)


def _distinct_sizes(sizes, dtype):
    """Return the distinct cluster sizes and how many clusters have each, padded with zeros."""
    n = sizes.shape[0]
    most = (math.isqrt(8 * n + 1) - 1) // 2  # 1 + 2 + ... + most <= n
    points = jnp.zeros(n + 1, jnp.int32).at[sizes].add(1)
    distinct = jnp.nonzero(points, size=most, fill_value=0)[0]
    return distinct.astype(dtype), (points[distinct] // jnp.maximum(distinct, 1)).astype(dtype)


def _expected_cell(a, b, n: int, dtype):
    """Return E[g(n_ab)] and E[n_ab log n_ab] when clusters of `a` and of `b` points of N are dealt at random.

    n_ab is hypergeometric, of mean m = a b / N. As E[n_ab - m] = 0, the cell's expected information is that of
    g = n_ab log(n_ab / m) - (n_ab - m), which is never negative: nothing cancels. Probabilities are summed from the
    mode up and down by their ratios, relative to the mode's, so they neither underflow nor need log-gammas.
    """
    whole = jnp.asarray(n, dtype)
    mode = jnp.clip(jnp.floor((a + 1) * ((b + 1) / (whole + 2))), jnp.maximum(a + b - whole, 0), jnp.minimum(a, b))

    def add(sums, p, count):
        terms = jnp.ones_like(p), _divergence(a, b, count, whole), count * jnp.log(jnp.maximum(count, 1))
        return [total + jnp.where(p > 0, p * term, 0) for total, term in zip(sums, terms, strict=True)]

    def step(state):
        distance, up, down, sums = state
        high, low = mode + distance, mode - distance
        up = up * ((a - high) / (high + 1)) * ((b - high) / (whole - a - b + high + 1))
        down = down * (low / (a - low + 1)) * ((whole - a - b + low) / (b - low + 1))
        # Beyond a cell's range its probabilities stay zero, whatever the factors.
        up, down = jnp.where(high < jnp.minimum(a, b), up, 0), jnp.where(low > jnp.maximum(a + b - whole, 0), down, 0)
        return distance + 1, up, down, add(add(sums, up, high + 1), down, low - 1)

    one = jnp.ones(jnp.broadcast_shapes(a.shape, b.shape), dtype)
    start = jnp.zeros((), dtype), one, one, add([jnp.zeros_like(one)] * 3, one, mode)
    tail = float(jnp.finfo(dtype).eps) / 64
    *_, (total, divergence, lack) = lax.while_loop(lambda s: jnp.any(jnp.maximum(s[1], s[2]) > tail), step, start)
    return divergence / total, lack / total


def _divergence(a, b, count, whole):
    """Return count log(count / m) - (count - m), m = a b / N, to full relative precision near count = m."""
    mean = a * b / whole
    safe = jnp.where(mean > 0, mean, 1)
    excess = _surplus(a, b, count, whole) / whole
    x = excess / safe
    near = jnp.abs(x) < (0.01 if x.dtype == jnp.float64 else 0.1)
    y = jnp.where(near, x, 0)
    series = y * y * (1 / 2 - y * (1 / 6 - y * (1 / 12 - y * (1 / 20 - y * (1 / 30 - y * (1 / 42 - y / 56))))))
    direct = count * jnp.log(jnp.maximum(count, 1) / safe) - excess
    return jnp.where(mean > 0, jnp.where(near, mean * series, direct), 0)


def _mean(terms):
    """Return the mean over the points of `terms` [N], summed in blocks: exactly for counts, then in floats."""
    n = terms.shape[0]
    blocks = jnp.pad(terms, (0, -n % _BLOCK)).reshape(-1, _BLOCK).sum(axis=1)
    return jnp.sum(blocks / n)
