"""Scores of partitions against scikit-learn, and the expected mutual information against a sum in whole numbers."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from sklearn.metrics import adjusted_rand_score

from jaxscape import compare
from jaxscape.compare import partitions

AVERAGES = ("arithmetic", "geometric", "min", "max")


def scores_of(a, b, averages=AVERAGES):
    """Ours and scikit-learn's, by name."""
    pairs = {
        "homogeneity": (partitions.homogeneity(a, b), metrics.homogeneity_score(a, b)),
        "completeness": (partitions.completeness(a, b), metrics.completeness_score(a, b)),
        "v": (partitions.v_measure(a, b), metrics.v_measure_score(a, b)),
        "v, beta 0.3": (partitions.v_measure(a, b, 0.3), metrics.v_measure_score(a, b, beta=0.3)),
        "purity": (partitions.purity(a, b), metrics.cluster.contingency_matrix(a, b).max(axis=0).sum() / len(a)),
    }
    for average in averages:
        nmi = partitions.normalized_mutual_information(a, b, average)
        ami = partitions.adjusted_mutual_information(a, b, average)
        pairs[f"NMI {average}"] = nmi, metrics.normalized_mutual_info_score(a, b, average_method=average)
        pairs[f"AMI {average}"] = ami, metrics.adjusted_mutual_info_score(a, b, average_method=average)
    return {name: float(pair[0]) for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def check_scores(a, b, single=1e-6, double=1e-12, averages=AVERAGES):
    for x64, tolerance in ((False, single), (True, double)):
        with jax.enable_x64(x64):
            ours, expected = scores_of(a, b, averages)
        assert ours == pytest.approx(expected, abs=tolerance)


def adjusted_by_counting(a, b):
    """The adjusted mutual information (arithmetic), with every probability a ratio of whole numbers."""
    n, sizes_a, sizes_b = len(a), np.bincount(a), np.bincount(b)
    sizes_a, sizes_b = sizes_a[sizes_a > 0], sizes_b[sizes_b > 0]
    expected = 0.0
    for p in sizes_a.tolist():
        for q in sizes_b.tolist():
            for both in range(max(1, p + q - n), min(p, q) + 1):
                chance = math.comb(p, both) * math.comb(n - p, q - both) / math.comb(n, q)
                expected += chance * both / n * math.log(n * both / (p * q))
    table = metrics.cluster.contingency_matrix(a, b)
    shared = metrics.mutual_info_score(None, None, contingency=table)
    entropies = [-sum(s / n * math.log(s / n) for s in sizes) for sizes in (sizes_a, sizes_b)]
    return (shared - expected) / (sum(entropies) / 2 - expected)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 3), st.integers(0, 4)), min_size=30, max_size=30))
def test_information_scores_agree_with_scikit_learn(pairs):
    check_scores(*np.asarray(pairs).T)


@pytest.mark.parametrize("n", [1, 30])
def test_degenerate_partitions(n):
    one, singles, halves = np.zeros(n, int), np.arange(n), np.arange(n) // 15
    for a, b in ((one, one), (one, singles), (singles, one), (singles, singles[::-1]), (halves, halves * 3 + 1)):
        check_scores(a, b)
    # Against single points, the smaller entropy is all there is to expect: scikit-learn's AMI "min" is rounding noise.
    check_scores(halves, singles, averages=("arithmetic", "geometric", "max"))
    assert partitions.adjusted_mutual_information(halves, singles, "min") == 1


@pytest.mark.parametrize("sizes", [(2, 3), (50, 57), (9, 1500)])
def test_information_of_ten_thousand_points_in_float32(sizes):
    rng = np.random.default_rng(0)
    a = rng.zipf(1.4, 10_000) % sizes[0]
    b = np.where(rng.random(10_000) < 0.3, a, rng.zipf(1.3, 10_000) % sizes[1])
    ours, expected = scores_of(a, b, ("arithmetic", "max"))
    assert ours == pytest.approx(expected, abs=2e-6)


def test_information_of_extreme_partitions_in_float32():
    """Hardly any entropy, or hardly any to gain: in float32, plain differences would have nothing left."""
    apart = np.zeros(10_000, int)
    apart[0] = 1
    other = apart.copy()
    other[1] = 1
    ours, expected = scores_of(apart, other)
    assert ours == pytest.approx(expected, abs=2e-6)

    a, b = np.arange(10_000), np.arange(10_000)
    a[1], b[1], b[6] = 0, 0, 5
    # In units of 2 log 2 / N: one pair is shared of one and two. By chance, 2 of some 50 million are.
    chance = 1 * 2 / math.comb(10_000, 2)
    score = (1 - chance) / (1.5 - chance)
    assert partitions.adjusted_mutual_information(a, b) == pytest.approx(score, abs=1e-6)


def test_adjusted_mutual_information_against_counting():
    rng = np.random.default_rng(1)
    for many in (3, 20, 90):
        a = rng.integers(0, many, 200)
        b = np.where(rng.random(200) < 0.5, a, rng.integers(0, many // 2 + 2, 200))
        expected = adjusted_by_counting(a, b)
        assert partitions.adjusted_mutual_information(a, b) == pytest.approx(expected, abs=1e-6)
        with jax.enable_x64(True):
            assert partitions.adjusted_mutual_information(a, b) == pytest.approx(expected, abs=1e-12)


def test_order_of_arguments_and_jit():
    """Clusters split a class in two: wholly homogeneous, not complete."""
    classes, clusters = np.array([0, 0, 1, 1]), np.array([0, 1, 2, 2])
    assert partitions.homogeneity(classes, clusters) == 1 == partitions.purity(classes, clusters)
    assert partitions.completeness(classes, clusters) == pytest.approx(2 / 3)
    assert partitions.purity(clusters, classes) == 0.75
    for score in (partitions.adjusted_mutual_information, partitions.v_measure, partitions.purity):
        assert jax.jit(score)(classes, clusters) == pytest.approx(float(score(classes, clusters)), abs=1e-6)
    names = np.array(["law", "law", "maths", "maths"])
    assert partitions.v_measure(names, clusters) == pytest.approx(metrics.v_measure_score(names, clusters))


def test_cluster_composition():
    clusters = np.array([7, 7, 7, -1, -1, 3, 3, 3, 3])
    classes = np.array(["law", "maths", "maths", "law", "art", "art", "art", "art", "law"])
    found = partitions.cluster_composition(clusters, classes)
    assert found.majority.tolist() == ["art", "art", "maths"]  # clusters -1, 3, 7; art and law tie in the first
    assert found.purity == pytest.approx([1 / 2, 3 / 4, 2 / 3])
    assert found.size.tolist() == [2, 4, 3]

    rng = np.random.default_rng(2)
    clusters, classes = rng.integers(0, 40, 500), rng.integers(10, 30, 500) * 2**33
    found = partitions.cluster_composition(clusters, classes)
    for i, cluster in enumerate(np.unique(clusters)):
        names, counts = np.unique(classes[clusters == cluster], return_counts=True)
        assert found.majority[i] == names[np.argmax(counts)]
        assert (found.purity[i], found.size[i]) == (counts.max() / counts.sum(), counts.sum())
    assert np.average(found.purity, weights=found.size) == pytest.approx(float(partitions.purity(classes, clusters)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-2, 3), st.integers(0, 4)), min_size=30, max_size=30))
def test_agrees_with_scikit_learn(pairs):
    a, b = np.asarray(pairs).T
    expected = adjusted_rand_score(a, b)
    assert compare.adjusted_rand_index(a, b) == pytest.approx(expected, abs=1e-6)
    with jax.enable_x64(True):
        assert compare.adjusted_rand_index(a, b) == pytest.approx(expected, abs=1e-13)


def test_many_points_lose_no_digits():
    """One point apart from 60,000: in float32, differences of pair counts would have nothing left."""
    a = np.zeros(60_000, int)
    a[0] = 1
    b = a.copy()
    b[1] = 1
    rng = np.random.default_rng(0)
    c, d = rng.integers(0, 50, 60_000), rng.integers(0, 9, 60_000)
    for one, two in ((a, b), (c, d), (c, np.where(d > 4, c, d))):
        assert compare.adjusted_rand_index(one, two) == pytest.approx(adjusted_rand_score(one, two), abs=2e-6)


def test_limits():
    same = np.array([3, 3, 1, 2])
    assert compare.adjusted_rand_index(same, same * 7) == 1
    assert compare.adjusted_rand_index(np.zeros(5), np.ones(5)) == 1
    assert compare.adjusted_rand_index(np.arange(5), np.arange(5)[::-1]) == 1
    assert compare.adjusted_rand_index(np.zeros(5), np.arange(5)) == 0
    assert compare.adjusted_rand_index([4], [2]) == 1


def test_any_kind_of_label_and_jit():
    a, b = np.array(["x", "y", "x", "z"]), np.array([1, 2**40, 1, 1])
    expected = adjusted_rand_score(a, b)
    assert compare.adjusted_rand_index(a, b) == pytest.approx(expected, abs=1e-6)
    codes = np.array([0, 1, 0, 2]), np.array([0, 1, 0, 0])
    assert jax.jit(compare.adjusted_rand_index)(*codes) == pytest.approx(expected, abs=1e-6)


def test_adjusted_for_chance_by_the_smaller_entropy_is_one_for_single_points():
    single, other = np.arange(12), np.arange(12) % 3
    assert partitions.adjusted_mutual_information(single, other, "min") == 1
    assert partitions.adjusted_mutual_information(other, single, "min") == 1
    assert partitions.adjusted_mutual_information(single, other, "max") == pytest.approx(0, abs=1e-6)


def test_refuses():
    with pytest.raises(ValueError, match="same length, got 2 and 3"):
        compare.adjusted_rand_index([0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match=r"b must have shape \[points\].*\(2, 1\)"):
        compare.adjusted_rand_index([0, 1], [[0], [1]])
    with pytest.raises(ValueError, match=r"a must have.*\(0,\)"):
        compare.adjusted_rand_index([], [])
    with pytest.raises(ValueError, match="classes and clusters must have the same length, got 2 and 3"):
        partitions.v_measure([0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match="clusters and classes must have the same length, got 3 and 2"):
        partitions.cluster_composition([0, 1, 2], [0, 1])
    with pytest.raises(ValueError, match="beta must be at least 0 and finite, got beta=-1"):
        partitions.v_measure([0, 1], [0, 1], beta=-1)
    for beta in (math.inf, math.nan):
        with pytest.raises(ValueError, match=f"got beta={beta}"):
            partitions.v_measure([0, 1], [0, 1], beta=beta)
    for score in (partitions.adjusted_mutual_information, partitions.normalized_mutual_information):
        with pytest.raises(ValueError, match="average must be one of .* got 'mean'"):
            score([0, 1], [0, 1], average="mean")
