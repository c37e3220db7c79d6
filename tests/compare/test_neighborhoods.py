"""Overlaps of neighbourhoods, against plain loops."""

import jax
import numpy as np
import pytest

from jaxscape import compare
from jaxscape.compare import neighborhoods


def neighbors_of(n, k, seed=0):
    rng = np.random.default_rng(seed)
    others = [np.delete(np.arange(n), i) for i in range(n)]
    return np.stack([rng.permutation(rest)[:k] for rest in others]).astype(np.int32)


INDICES = neighbors_of(90, 30)
LABELS = np.random.default_rng(1).choice(3, 90, p=[0.6, 0.3, 0.1])


@pytest.mark.parametrize("k", [1, 7, 30, None])
def test_label_overlap_with_k(k):
    shares = [np.mean(LABELS[row[:k]] == LABELS[i]) for i, row in enumerate(INDICES)]
    assert compare.label_overlap(INDICES, LABELS, k) == pytest.approx(np.mean(shares), rel=1e-6)
    by_class = [np.mean(np.asarray(shares)[label == LABELS]) for label in range(3)]
    assert compare.label_overlap(INDICES, LABELS, k, balanced=True) == pytest.approx(np.mean(by_class), rel=1e-6)


@pytest.mark.parametrize("fraction", [0.01, 0.29, 0.3, 0.5])
def test_label_overlap_with_class_fraction(fraction):
    shares = np.zeros(90)
    for i, row in enumerate(INDICES):
        k = max(1, int(np.sum(LABELS[i] == LABELS) * fraction))
        shares[i] = np.mean(LABELS[row[:k]] == LABELS[i])
    expected = np.mean([shares[label == LABELS].mean() for label in range(3)])
    assert compare.label_overlap(INDICES, LABELS, class_fraction=fraction) == pytest.approx(expected, rel=1e-6)
    names = np.array(["history", "law", "maths"])[LABELS]
    assert compare.label_overlap(INDICES, names, class_fraction=fraction) == pytest.approx(expected, rel=1e-6)
    plain = compare.label_overlap(INDICES, LABELS, class_fraction=fraction, balanced=False)
    assert plain == pytest.approx(shares.mean(), rel=1e-6)


def test_class_fraction_rounds_as_python_does():
    """0.29 of 100 points is 28 neighbours, as 0.29 * 100 is 28.999999999999996."""
    indices = np.tile(np.arange(40), (100, 1))
    labels = np.zeros(100, int)
    assert compare.neighborhoods._class_neighbors(labels, 0.29, 40)[0] == 28
    assert compare.label_overlap(indices, labels, class_fraction=0.29) == 1


def test_label_overlap_limits_and_jit():
    same, different = np.zeros(90, int), np.arange(90)
    assert compare.label_overlap(INDICES, same, 5) == 1
    assert compare.label_overlap(INDICES, different, 5) == 0
    traced = jax.jit(lambda i, labels: compare.label_overlap(i, labels, 5))(INDICES, LABELS)
    assert traced == pytest.approx(float(compare.label_overlap(INDICES, LABELS, 5)), rel=1e-6)


@pytest.mark.parametrize("k", [1, 8, 30])
def test_neighbor_overlap(k):
    other = neighbors_of(90, 40, seed=2)
    shares = [len(set(a[:k]) & set(b[:k])) / k for a, b in zip(INDICES.tolist(), other.tolist(), strict=True)]
    assert compare.neighbor_overlap(INDICES, other, k) == pytest.approx(np.mean(shares), rel=1e-6)
    assert compare.neighbor_overlap(other, INDICES, k) == pytest.approx(np.mean(shares), rel=1e-6)
    assert compare.neighbor_overlap(INDICES, INDICES[:, ::-1], 30) == 1
    assert jax.jit(compare.neighbor_overlap, static_argnums=2)(INDICES, other, k) == pytest.approx(np.mean(shares))


def test_neighbor_overlap_of_more_points_than_a_batch():
    a, b = neighbors_of(1500, 4), neighbors_of(1500, 4, seed=3)
    shares = [len(set(x) & set(y)) / 4 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert compare.neighbor_overlap(a, b, 4) == pytest.approx(np.mean(shares), rel=1e-5)


def test_terms_are_what_the_overlaps_average():
    shares = [np.mean(LABELS[row[:7]] == LABELS[i]) for i, row in enumerate(INDICES)]
    assert np.asarray(neighborhoods.label_agreement(INDICES, LABELS, 7)) == pytest.approx(np.asarray(shares), rel=1e-6)
    by_class = np.mean([np.asarray(shares)[label == LABELS].mean() for label in range(3)])
    assert neighborhoods.mean_over_classes(shares, LABELS) == pytest.approx(by_class, rel=1e-6)
    other = neighbors_of(90, 40, seed=2)
    common = [len(set(a[:8]) & set(b[:8])) / 8 for a, b in zip(INDICES.tolist(), other.tolist(), strict=True)]
    assert np.asarray(neighborhoods.neighbor_agreement(INDICES, other, 8)) == pytest.approx(np.asarray(common))


def test_class_fraction_is_traceable():
    traced = jax.jit(lambda labels: compare.label_overlap(INDICES, labels, class_fraction=0.3))
    expected = compare.label_overlap(INDICES, LABELS, class_fraction=0.3)
    assert traced(LABELS) == pytest.approx(float(expected), rel=1e-6)
    assert np.isnan(jax.jit(lambda labels: compare.label_overlap(INDICES, labels, class_fraction=0.9))(LABELS))


def clouds_compared_by_dadapy():
    rng = np.random.default_rng(7)
    z = rng.normal(size=(120, 4))
    labels = np.arange(120) % 3
    labels[:40] = 0
    a = z + 1.5 * np.eye(4)[labels]
    b = z[:, :2] ** 2 + 0.1 * rng.normal(size=(120, 2))
    return a.astype(np.float32), b.astype(np.float32), labels


def all_ranks(x):
    """Others by distance then index, nearest first, int [N, N - 1], in float64."""
    x = np.asarray(x, np.float64)
    distances = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    np.fill_diagonal(distances, -1)
    return np.argsort(distances, axis=1, kind="stable")[:, 1:]


def test_agrees_with_dadapy():
    """DADApy 0.3.4: MetricComparisons(a, maxk=119).return_information_imbalace(b, k) and .return_label_overlap."""
    a, b, labels = clouds_compared_by_dadapy()
    nearest_a, nearest_b = all_ranks(a), all_ranks(b)
    for k, a_to_b, b_to_a in ((1, 0.63, 0.93), (3, 0.71, 0.96)):
        found = neighborhoods.information_imbalances(nearest_a, a, nearest_b, b, k)
        assert np.round(np.asarray(found), 2) == pytest.approx([a_to_b, b_to_a], abs=1e-6)  # it rounds to two digits
    by_fraction = compare.label_overlap(nearest_a, labels, class_fraction=0.3)
    assert by_fraction == pytest.approx(0.6381578947368423, rel=1e-6)
    assert compare.label_overlap(nearest_a, labels, 10) == pytest.approx(0.6916666666666667, rel=1e-6)
    assert compare.label_overlap(nearest_a, labels, 10, balanced=True) == pytest.approx(0.63658810325477, rel=1e-6)


@pytest.mark.parametrize("points", ["spread", "grid", "far", "repeated"])
def test_conditional_ranks_against_sorting_everything(points):
    """Ties in plenty on the grid, digits lost to an offset far off, many distances to settle where points repeat."""
    rng = np.random.default_rng(3)
    x = {
        "spread": rng.normal(size=(150, 5)),
        "grid": rng.integers(0, 4, (150, 5)),
        "far": rng.integers(0, 40, (150, 5)) / 64 + 1000,
        "repeated": rng.integers(0, 2, (150, 5)) * [1, 1, 0, 0, 0],
    }[points].astype(np.float32)
    order = all_ranks(x)
    indices = neighbors_of(150, 3, seed=4)
    expected = [[1 + order[i].tolist().index(j) for j in row] for i, row in enumerate(indices.tolist())]
    for tile in (None, 37, 1):
        assert np.array_equal(neighborhoods.conditional_ranks(indices, x, 3, tile_size=tile), expected)
    if points == "spread":
        with jax.enable_x64(True):
            assert np.array_equal(neighborhoods.conditional_ranks(indices, x.astype(float), 3), expected)
        for scale in (1e-25, 1e25):
            assert np.array_equal(neighborhoods.conditional_ranks(indices, x * np.float32(scale), 3), expected)
        jitted = jax.jit(neighborhoods.information_imbalance, static_argnums=2)(indices, x, 3)
        assert jitted == pytest.approx(2 / 150 * np.mean(expected), rel=1e-5)
        terms = neighborhoods.imbalance_terms(expected)
        assert np.asarray(terms) == pytest.approx(np.mean(expected, axis=1) / 75, rel=1e-6)


def test_information_imbalance_limits():
    """The same distances: 2 / N. Unrelated points: the mean rank is N / 2, so 1 within 5 / sqrt(3 N)."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(150, 5)).astype(np.float32), rng.normal(size=(150, 5)).astype(np.float32)
    assert neighborhoods.information_imbalance(all_ranks(x), x) == pytest.approx(2 / 150, rel=1e-6)
    assert neighborhoods.information_imbalance(all_ranks(x), y) == pytest.approx(1, abs=5 / np.sqrt(450))


@pytest.mark.parametrize(
    ("indices", "x", "options", "message"),
    [
        (INDICES, np.ones((80, 2)), {}, r"same points, got \(90, 30\) and \(80, 2\)"),
        (INDICES, np.ones(90), {}, r"same points, got \(90, 30\) and \(90,\)"),
        (INDICES, np.ones((90, 2)), {"k": 31}, "k=31"),
        (INDICES, np.ones((90, 2)), {"k": 0}, "k=0"),
        (INDICES, np.ones((90, 2)), {"tile_size": 0}, "tile_size=0"),
        (np.tile(np.arange(90)[:, None], 2), np.ones((90, 2)), {}, r"indices_a\[0, 0\] = 0"),
        (INDICES + 60, np.ones((90, 2)), {}, r"0 to 89, got indices_a\["),
        (INDICES, np.where(np.eye(90, 2, -3), np.nan, 1), {}, r"x_b must be finite, got x_b\[3, 0\] = nan"),
    ],
)
def test_conditional_ranks_refuses(indices, x, options, message):
    with pytest.raises(ValueError, match=message):
        neighborhoods.conditional_ranks(indices, x, **options)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (LABELS, {"k": 0}, "k=0"),
        (LABELS, {"k": 31}, "k=31"),
        (LABELS, {"k": 3, "class_fraction": 0.1}, "k=3, class_fraction=0.1"),
        (LABELS, {"class_fraction": 0.0}, "class_fraction=0.0"),
        (LABELS, {"class_fraction": 1.5}, "class_fraction=1.5"),
        (LABELS, {"class_fraction": 0.9}, "class_fraction=0.9 of the largest class, got 30"),
        (LABELS[:80], {"k": 3}, "90 points, got 80"),
        (LABELS[:, None], {"k": 3}, r"labels must have shape.*\(90, 1\)"),
    ],
)
def test_label_overlap_refuses(labels, options, message):
    with pytest.raises(ValueError, match=message):
        compare.label_overlap(INDICES, labels, **options)


@pytest.mark.parametrize("wrong", [99, 4, -1])
def test_refuses_neighbors_that_are_no_points(wrong):
    indices = np.array([[1, 2], [2, 3], [3, wrong], [0, 1]])
    fine = np.where(indices == wrong, 0, indices)
    labels = np.array([0, 0, 1, 1])
    for score in (compare.label_overlap, neighborhoods.label_agreement):
        for options in ({"k": 1}, {"class_fraction": 0.5}):
            with pytest.raises(ValueError, match=rf"indices must .* 0 and 3, got indices\[2, 1\] = {wrong}"):
                score(indices, labels, **options)
    for score in (compare.neighbor_overlap, neighborhoods.neighbor_agreement):
        with pytest.raises(ValueError, match=rf"got indices_a\[2, 1\] = {wrong}"):
            score(indices, fine, 2)
        with pytest.raises(ValueError, match=rf"got indices_b\[2, 1\] = {wrong}"):
            score(fine, indices, 2)


def test_other_refusals():
    with pytest.raises(ValueError, match=r"indices must have two dimensions.*\(90,\)"):
        compare.label_overlap(INDICES[:, 0], LABELS, 1)
    with pytest.raises(ValueError, match=r"same points, got \(90, 30\) and \(80, 30\)"):
        compare.neighbor_overlap(INDICES, INDICES[:80], 3)
    for k in (0, 31):
        with pytest.raises(ValueError, match=f"k={k}"):
            compare.neighbor_overlap(INDICES, INDICES, k)
    with pytest.raises(ValueError, match=r"each of the 90 labels, got shape \(80,\)"):
        neighborhoods.mean_over_classes(np.ones(80), LABELS)
