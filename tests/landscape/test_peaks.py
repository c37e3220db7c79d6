"""Advanced Density Peaks against the same rules, written as plain loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape import landscape
from jaxscape.landscape.peaks import nearest_among


def plain_peaks(x, log_density, error, k, z):
    """The four steps of the docstring, one point and one saddle at a time; every list of neighbours is complete."""
    x, n = np.asarray(x, np.float64), len(x)
    distances = np.stack([np.sqrt(((x - point) ** 2).sum(axis=1)) for point in x])
    np.fill_diagonal(distances, -1)
    near = np.argsort(distances, axis=1, kind="stable")[:, 1:]
    g = log_density - error
    centers = [i for i in range(n) if all(g[i] >= g[j] for j in near[i, : k[i]])]
    centers = [c for c in centers if not any(g[i] > g[c] and c in near[i, : k[i]] for i in range(n))]
    label = np.full(n, -1)
    label[centers] = range(len(centers))
    for i in np.argsort(-g, kind="stable"):
        if label[i] < 0:
            label[i] = next(label[j] for j in near[i] if label[j] >= 0)
    saddles = plain_saddles(near, label, centers, g, k)
    saddles = {pair: (log_density[point], error[point]) for pair, point in saddles.items()}
    alive = dict(enumerate(centers))
    label = plain_merge(saddles, alive, label, log_density, error, z)
    number = {old: new for new, old in enumerate(sorted(alive))}
    label = np.array([number[old] for old in label])
    log_saddle = np.full((len(alive),) * 2, -np.inf)
    for (i, j), (height, _) in saddles.items():
        log_saddle[number[i], number[j]] = log_saddle[number[j], number[i]] = height
    core = log_density >= log_saddle.max(axis=1)[label]
    return label, [alive[old] for old in sorted(alive)], log_saddle, core


def plain_saddles(near, label, centers, g, k):
    saddles = {}
    for i in sorted(set(range(len(g))) - set(centers), key=lambda i: (-g[i], i)):
        foreign = next((j for j in near[i, : k[i]] if label[j] != label[i]), None)
        if foreign is not None and next(j for j in near[foreign] if label[j] == label[i]) == i:
            saddles.setdefault(tuple(sorted((label[i], label[foreign]))), i)
    return saddles


def plain_merge(saddles, alive, label, log_density, error, z):
    def rise(peak, saddle):
        return log_density[alive[peak]] - saddle[0], error[alive[peak]] + saddle[1]

    while True:
        weak = [p for p, s in saddles.items() if any(rise(c, s)[0] < z * rise(c, s)[1] for c in p)]
        if not weak:
            return label
        pair = min(weak, key=lambda p: (-saddles[p][0], p))
        one, two = (np.divide(*rise(c, saddles[pair])) for c in pair)
        keep, drop = pair if one >= two else pair[::-1]
        del alive[drop], saddles[pair]
        label = np.where(label == drop, keep, label)
        for p in [p for p in saddles if drop in p]:
            moved, joined = saddles.pop(p), tuple(sorted((keep, p[0] if p[1] == drop else p[1])))
            saddles[joined] = max(saddles.get(joined, (-np.inf, 0)), moved, key=lambda s: s[0])


def assert_plain(x, density, peaks, z):
    label, centers, log_saddle, core = plain_peaks(x, *(np.asarray(a) for a in density), z)
    np.testing.assert_array_equal(peaks.centers, centers)
    np.testing.assert_array_equal(peaks.labels, label)
    np.testing.assert_allclose(peaks.log_saddle, log_saddle)
    np.testing.assert_array_equal(peaks.core, core)


def blobs(n, d, count, seed=0, spread=0.7):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, d))[rng.integers(0, count, n)] * 2 + spread * rng.normal(size=(n, d))


def landscape_of(x, k, kept=None):
    nb = landscape.nearest_neighbors(x, kept or 2 * k)
    return nb, landscape.knn_density(nb, landscape.gride_at(nb, k).id if nb.indices.shape[1] >= 2 * k else 2.0, k)


@pytest.mark.parametrize(("d", "kept"), [(1, 6), (2, 20), (40, 6)])
def test_plain_rules(d, kept):
    with jax.enable_x64(True):
        for seed in range(3):
            x = blobs(240, d, 6, seed)
            nb, density = landscape_of(x, 6, kept)
            for z in (0.0, 0.7, 1.6, 4.0):
                assert_plain(x, density, landscape.advanced_density_peaks(nb, density, z, x=x), z)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), z=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]), tied=st.booleans())
def test_plain_rules_on_any_density(seed, z, tied):
    """A neighbourhood and an error of its own for every point, and few or no values in common."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        x = rng.normal(size=(90, 2))
        nb = landscape.nearest_neighbors(x, 12)
        values = rng.integers(0, 12, (2, 90)) / 4 if tied else rng.normal(size=(2, 90))
        density = landscape.Density(
            jnp.asarray(values[0]), jnp.asarray(0.1 + np.abs(values[1]) / 3), jnp.asarray(rng.integers(1, 13, 90))
        )
        peaks = landscape.advanced_density_peaks(nb, density, z, x=x)
        assert_plain(x, density, peaks, z)


def test_a_dropped_center_looks_beyond_the_neighbors_kept():
    """The point at 0 exceeds all four neighbours it keeps, but is in the neighbourhood of the one at 1."""
    with jax.enable_x64(True):
        x = np.array([[-0.7], [-0.46], [-0.33], [-0.21], [-0.1], [0.0], [1.0]])
        nb = landscape.nearest_neighbors(x, 4)
        log_density = jnp.asarray([8.0, 1, 2, 3, 4, 5, 9])
        density = landscape.Density(log_density, jnp.full(7, 0.1), jnp.asarray([1, 1, 1, 1, 1, 1, 4]))
        found = landscape.advanced_density_peaks(nb, density, 0.0, x=x)
        assert_plain(x, density, found, 0.0)
        assert found.centers.tolist() == [0, 6]
        assert int(found.labels[5]) == 0  # the centre at -0.7 is nearer
        assert int(landscape.advanced_density_peaks(nb, density, 0.0).labels[5]) == 1  # the one known to be higher


def test_rising_saddle_after_a_merge():
    """With unequal errors, a merge can make a saddle above it insignificant; it's then the next to go."""
    rng = np.random.default_rng(5)
    with jax.enable_x64(True):
        x = rng.normal(size=(150, 1))
        nb = landscape.nearest_neighbors(x, 10)
        for seed in range(6):
            rng = np.random.default_rng(seed)
            density = landscape.Density(
                jnp.asarray(rng.normal(size=150)), jnp.asarray(rng.choice([0.01, 2.0], 150)), jnp.full(150, 3)
            )
            assert_plain(x, density, landscape.advanced_density_peaks(nb, density, 1.0, x=x), 1.0)


def test_two_far_groups_have_no_saddle():
    x = np.concatenate([blobs(100, 2, 1), blobs(100, 2, 1, seed=1) + 500])
    nb, density = landscape_of(x, 16)
    peaks = landscape.advanced_density_peaks(nb, density, 3.0, x=x)
    assert peaks.centers.shape == (2,)
    assert np.all(np.asarray(peaks.log_saddle) == -np.inf) and np.all(np.asarray(peaks.log_saddle_error) == 0)
    np.testing.assert_array_equal(peaks.labels, np.repeat([0, 1], 100))
    assert np.all(peaks.core)


def test_shapes_types_and_order():
    x = blobs(300, 3, 8)
    nb, density = landscape_of(x, 8)
    peaks = landscape.advanced_density_peaks(nb, density, 0.5, x=x)
    count = peaks.centers.shape[0]
    assert peaks.labels.dtype == np.int32 and peaks.centers.dtype == np.int32 and peaks.core.dtype == bool
    assert peaks.log_saddle.shape == peaks.log_saddle_error.shape == (count, count)
    assert np.all(np.diff(peaks.centers) > 0)
    np.testing.assert_array_equal(np.asarray(peaks.labels)[np.asarray(peaks.centers)], np.arange(count))
    np.testing.assert_array_equal(peaks.log_saddle, np.asarray(peaks.log_saddle).T)
    assert np.all(np.asarray(peaks.core)[np.asarray(peaks.centers)])


def test_order_rotation_and_scale_change_nothing():
    x = blobs(300, 4, 6)
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        nb, density = landscape_of(x, 8)
        expected = np.asarray(landscape.advanced_density_peaks(nb, density, 1.0, x=x).labels)
        order = rng.permutation(300)
        rotated = x @ np.linalg.qr(rng.normal(size=(4, 4)))[0]
        for points, at in ((x[order], order), (rotated, slice(None)), (x * 40 - 7, slice(None))):
            nb, density = landscape_of(points, 8)
            found = np.asarray(landscape.advanced_density_peaks(nb, density, 1.0, x=points).labels)
            pairs = set(zip(found.tolist(), expected[at].tolist(), strict=True))
            assert len(pairs) == len(set(found.tolist())) == len(set(expected.tolist()))


@pytest.mark.parametrize("points", [np.arange(40.0)[:, None], np.ones((12, 3)), np.array([[0.0], [1.0]])])
def test_regular_identical_and_few_points(points):
    nb = landscape.nearest_neighbors(points, 1)
    peaks = landscape.advanced_density_peaks(nb, landscape.knn_density(nb, 1.0, 1), 1.0, x=points)
    labels = np.asarray(peaks.labels)
    assert labels.min() == 0 and labels.max() == len(peaks.centers) - 1


def test_more_neighbors_than_the_neighborhoods_need_change_nothing():
    """With x, the result is the same from any number of neighbours kept, and any width the kernels are compiled for."""
    x = blobs(300, 3, 8)
    nb, density = landscape_of(x, 8)
    density = density._replace(k=jnp.arange(300) % 7 + 2)
    wide = landscape.advanced_density_peaks(nb, density, 0.5, x=x)
    narrow = landscape.advanced_density_peaks(jax.tree.map(lambda a: a[:, :8], nb), density, 0.5, x=x)
    jax.tree.map(np.testing.assert_array_equal, wide, narrow)
    assert len(wide.centers) > 3


@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("offset", [0.0, 60.0])
def test_nearest_among(offset, rows):
    """On a grid there are many ties; far from the origin, products alone couldn't tell which is nearer."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 7, (200, 3)) / 8 + offset
    x[:20] += rng.integers(-1, 2, (20, 3)) * 2.0**-17
    x = x.astype(np.float32)
    value = rng.permutation(200)
    asked = (rng.random(200) < 0.5) & (value > 0)
    nearest, square = nearest_among(
        jnp.asarray(x), jnp.asarray(asked), lambda rows: jnp.asarray(value) < jnp.asarray(value)[rows][:, None], rows
    )
    squares = ((x[:, None] - x[None]) ** 2).sum(axis=-1)
    squares = np.where(value < value[:, None], squares, np.inf)
    np.testing.assert_array_equal(nearest, np.where(asked, squares.argmin(axis=1), np.arange(200)))
    np.testing.assert_allclose(square, np.where(asked, squares.min(axis=1), 0), rtol=1e-6)


def test_refuses():
    x = blobs(60, 2, 2)
    nb, density = landscape_of(x, 8)
    peaks_of = landscape.advanced_density_peaks
    for z in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"z={z}"):
            peaks_of(nb, density, z)
    with pytest.raises(ValueError, match=r"the 60 points of nb, got shape \(59,\)"):
        peaks_of(nb, jax.tree.map(lambda a: a[:59], density), 1.0)
    with pytest.raises(ValueError, match="x must hold the 60 points of nb, got 59"):
        peaks_of(nb, density, 1.0, x=x[:59])
    with pytest.raises(ValueError, match="between 1 and the 16 neighbours kept, got 0 to 8"):
        peaks_of(nb, density._replace(k=density.k.at[3].set(0)), 1.0)
    with pytest.raises(ValueError, match="between 1 and the 16 neighbours kept, got 8 to 17"):
        peaks_of(nb, density._replace(k=density.k.at[3].set(17)), 1.0)
    with pytest.raises(ValueError, match=r"x must be the points whose Euclidean neighbours nb holds: x"):
        peaks_of(nb, density, 1.0, x=x[::-1])
    with pytest.raises(ValueError, match="nb must hold all the points it refers to.*between 0 and 29"):
        peaks_of(jax.tree.map(lambda a: a[:30], nb), jax.tree.map(lambda a: a[:30], density), 1.0)
    with pytest.raises(ValueError, match="nb must be Neighbors.*got ndarray"):
        peaks_of(x, density, 1.0)
    with pytest.raises(ValueError, match="density must be a Density.*got ndarray"):
        peaks_of(nb, x, 1.0)
    with pytest.raises(ValueError, match="intrinsic_dim must be a scalar.*got Gride"):
        landscape.knn_density(nb, landscape.gride(nb), 8)
    with pytest.raises(ValueError, match="density must be finite"):
        peaks_of(nb, density._replace(log_density=density.log_density.at[3].set(jnp.nan)), 1.0)
