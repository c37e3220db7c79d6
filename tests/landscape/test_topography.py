"""The tree of the peaks, cuts through it, and the searches behind the saddles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, is_valid_linkage, linkage

from jaxscape import landscape
from jaxscape.landscape import topography
from jaxscape.landscape.topography import cut_hierarchy, cut_labels

PEAKS = landscape.Peaks(
    labels=np.array([0, 1, 2, 0, 1, 2]),
    centers=np.array([0, 1, 2]),
    log_saddle=np.array([[-np.inf, 3.0, -np.inf], [3.0, -np.inf, 1.0], [-np.inf, 1.0, -np.inf]]),
    log_saddle_error=np.zeros((3, 3)),
    core=np.ones(6, bool),
)
DENSITY = landscape.Density(np.array([5.0, 4.0, 2.0, 3.0, 1.0, -1.0]), np.ones(6), np.ones(6, int))


def test_by_hand():
    """Distances from the top, 5: 0-1 at 2, 1-2 at 4, and 0-2, without a saddle, at 5 - (-1) = 6."""
    expected = {"weighted": 5.0, "average": 5.0, "single": 4.0, "complete": 6.0}
    for method, second in expected.items():
        tree = landscape.peak_hierarchy(PEAKS, DENSITY, method)
        np.testing.assert_allclose(tree, [[0, 1, 2, 2], [2, 3, second, 3]])


def test_of_a_real_landscape():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3))[rng.integers(0, 5, 400)] * 2 + 0.6 * rng.normal(size=(400, 3))
    found = landscape.survey(x, k=8, z=0.5)
    tree = landscape.peak_hierarchy(found.peaks, found.density)
    assert is_valid_linkage(tree) and tree.shape == (len(found.peaks.centers) - 1, 4)
    assert tree.dtype == np.float64 and np.all(np.diff(tree[:, 2]) >= 0)


def test_single_peak():
    one = PEAKS._replace(centers=np.array([0]), log_saddle=np.full((1, 1), -np.inf))
    assert landscape.peak_hierarchy(one, DENSITY).shape == (0, 4)


def test_refuses():
    with pytest.raises(ValueError, match="method.*'ward'"):
        landscape.peak_hierarchy(PEAKS, DENSITY, "ward")
    with pytest.raises(ValueError, match="6 points of peaks, got 5"):
        landscape.peak_hierarchy(PEAKS, DENSITY._replace(log_density=DENSITY.log_density[:5]))


def random_peaks(seed, count=9):
    """Peaks of a random graph of saddles, two apart from the rest, and the distances between them."""
    rng = np.random.default_rng(seed)
    height = np.triu(rng.normal(size=(count, count)), 1)
    height = np.where(np.triu(rng.random((count, count)) < 0.5, 1), height, -np.inf)
    height[:, -2:] = -np.inf
    height = np.maximum(height, height.T)
    log_density = np.concatenate([3 + rng.random(count), [-4.0]])
    peaks = landscape.Peaks(np.arange(count + 1) % count, np.arange(count), height, np.zeros_like(height), None)
    distances = log_density.max() - np.where(np.isfinite(height), height, -4.0)
    return peaks, landscape.Density(log_density, np.ones(count + 1), np.ones(count + 1, int)), distances


@pytest.mark.parametrize("method", ["single", "complete", "average", "weighted"])
def test_is_scipys_linkage_of_the_distances(method):
    peaks, density, distances = random_peaks(0)
    condensed = [distances[i, j] for i in range(9) for j in range(i + 1, 9)]
    np.testing.assert_array_equal(landscape.peak_hierarchy(peaks, density, method), linkage(condensed, method))


def plain_components(joined):
    """Number the components of the graph `joined` [C, C], in the order of their first members."""
    reach = joined | np.eye(len(joined), dtype=bool)
    for _ in range(len(joined)):
        reach = reach @ reach
    first = reach.argmax(axis=1)
    return np.searchsorted(np.unique(first), first)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_cuts_of_the_single_linkage_are_components(seed):
    """Peaks that saddles no farther than the height connect are one cluster; and the heights are those of a forest."""
    peaks, density, distances = random_peaks(seed)
    tree = landscape.peak_hierarchy(peaks, density, "single")
    heights = np.unique(distances[np.triu_indices(9, 1)])
    for height in [0.0, *heights, *(heights - 1e-9)]:
        found = cut_hierarchy(tree, height=height)
        expected = plain_components(distances <= height)
        np.testing.assert_array_equal(found, expected)
        assert (tree[:, 2] > height).sum() == expected.max()
        assert found.dtype == np.int32


def test_cuts_into_a_number_of_clusters():
    rng = np.random.default_rng(0)
    tree = linkage(rng.random(45), "weighted")
    for count in range(1, 11):
        clusters = cut_hierarchy(tree, n_clusters=count)
        assert clusters.max() + 1 == count and clusters.shape == (10,)
        theirs = fcluster(tree, count, "maxclust")
        assert len(set(zip(clusters.tolist(), theirs.tolist(), strict=True))) == count
        first = [int(np.argmax(clusters == c)) for c in range(count)]
        assert first == sorted(first)
    tied = landscape.peak_hierarchy(PEAKS._replace(log_saddle=np.full((3, 3), -np.inf)), DENSITY, "single")
    assert cut_hierarchy(tied, n_clusters=2).tolist() == [0, 0, 0]  # all three join at once
    assert cut_hierarchy(np.zeros((0, 4)), n_clusters=1).tolist() == [0]
    assert cut_hierarchy(np.zeros((0, 4)), height=3.0).tolist() == [0]


def test_labels_at_a_cut():
    clusters = cut_hierarchy(landscape.peak_hierarchy(PEAKS, DENSITY), n_clusters=2)
    assert clusters.tolist() == [0, 0, 1]
    found = cut_labels(np.array([2, 1, -1, 0, 2]), clusters)
    assert found.tolist() == [1, 0, -1, 0, 1] and found.dtype == jnp.int32
    assert jax.jit(cut_labels)(np.array([2, -1]), clusters).tolist() == [1, -1]
    for labels in ([0, 3], [-2, 0]):
        with pytest.raises(ValueError, match=f"the 3 peaks, got {labels[0]} to {labels[1]}"):
            cut_labels(np.array(labels), clusters)


def test_cuts_refuse():
    tree = landscape.peak_hierarchy(PEAKS, DENSITY)
    for options in ({}, {"height": 1.0, "n_clusters": 2}):
        with pytest.raises(ValueError, match="one of height and n_clusters, got height="):
            cut_hierarchy(tree, **options)
    for height in (-1.0, np.nan):
        with pytest.raises(ValueError, match=f"height={height}"):
            cut_hierarchy(tree, height=height)
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"the 3 peaks, got n_clusters={count}"):
            cut_hierarchy(tree, n_clusters=count)
    with pytest.raises(ValueError, match=r"tree must have shape \[C - 1, 4\], got \(2, 3\)"):
        cut_hierarchy(tree[:, :3], height=1.0)


def integer_points(seed, n=300):
    """Points on a small grid (many ties and duplicates; squares exact in float32), in a few clusters of all sizes."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.4, n) - 1, 5)
    return rng.integers(0, 7, (n, 3)).astype(np.float32), labels.astype(np.int32), rng


@pytest.mark.parametrize("seed", range(3))
def test_nearest_of_their_cluster(seed, monkeypatch):
    """Scanned 64 at a time, through clusters of one point and of more than 64."""
    monkeypatch.setattr(topography, "_SCAN_ELEMENTS", 1)
    x, labels, rng = integer_points(seed)
    squares = ((x[:, None] - x[None]) ** 2).sum(axis=-1)
    beyond = np.array([rng.choice(np.flatnonzero(labels != own)) for own in labels], np.int32)
    asked = rng.random(300) < 0.7
    found = np.asarray(topography._are_nearest(*map(jnp.asarray, (x, labels, beyond, asked))))
    members = np.where(labels[:, None] == labels, squares[:, beyond].T, np.inf)
    np.testing.assert_array_equal(found, asked & (members.argmin(axis=1) == np.arange(300)))
    assert 0 < found.sum() < asked.sum()
    assert (labels == 0).sum() > 64


def test_none_listed_nearer():
    x, labels, rng = integer_points(3)
    nb = landscape.nearest_neighbors(x + rng.normal(size=x.shape) / 9, 10)
    near, distances = (np.asarray(a) for a in (nb.indices, nb.distances))
    foreign = labels[near] != labels[:, None]
    beyond = near[np.arange(300), foreign.argmax(axis=1)]
    reach = distances[np.arange(300), foreign.argmax(axis=1)]
    asked = foreign.any(axis=1)
    assert np.bincount(beyond[asked]).max() > 2  # takes several passes
    found = topography._none_listed_nearer(nb, *map(jnp.asarray, (labels, beyond, reach, asked)))
    for i in range(300):
        listing = (near == beyond[i]) & (labels == labels[i])[:, None] & (distances < reach[i])
        assert bool(found[i]) == (asked[i] and not listing.any())
    assert 0 < np.sum(found) < asked.sum()


@pytest.mark.parametrize("clusters", [3, 60, 1000])
def test_a_point_speaks_for_each_pair(clusters):
    rng = np.random.default_rng(clusters)
    low, high = np.sort(rng.integers(0, clusters, (2, 400)).astype(np.int32), axis=0)
    there = rng.random(400) < 0.8
    pair = np.asarray(topography._pairs(*map(jnp.asarray, (low, high, there))))
    np.testing.assert_array_equal(pair[~there], np.flatnonzero(~there))
    first = {}
    for i in np.flatnonzero(there):
        assert pair[i] == first.setdefault((low[i], high[i]), i)
