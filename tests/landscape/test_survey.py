"""One layer, all of it: the parts fit together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscape import landscape


def blobs(n, seed=0):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(4, 12))[rng.integers(0, 4, n)]
    return (4 * means + rng.normal(size=(n, 12))).astype(np.float32)


def test_is_the_sum_of_its_parts():
    x = blobs(250)
    found = landscape.survey(x, k=8, z=1.0, max_rank=32)
    nb = landscape.nearest_neighbors(x, 32)
    at_k = landscape.gride_at(nb, 8)
    density = landscape.knn_density(nb, at_k.id, 8)
    expected = landscape.LayerLandscape(
        n_points=250,
        n_duplicates=0,
        kept=np.arange(250),
        neighbors=nb,
        gride=landscape.gride(nb, 32),
        intrinsic_dim=at_k.id,
        intrinsic_dim_error=at_k.error,
        density=density,
        peaks=landscape.advanced_density_peaks(nb, density, 1.0, x=x),
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_allclose(found.intrinsic_dim, found.gride.ids[3], rtol=1e-6)


def test_duplicates_are_counted_and_left_out():
    distinct = blobs(200)
    order = np.random.default_rng(1).permutation(np.concatenate([np.arange(200), np.arange(50), [7, 7]]))
    found = landscape.survey(distinct[order], k=8)
    assert (found.n_points, found.n_duplicates) == (252, 52)
    kept = np.asarray(found.kept)
    assert len(set(order[kept].tolist())) == 200 and np.all(np.diff(kept) > 0)
    assert all(order[i] not in order[:i] for i in kept)
    alone = landscape.survey(distinct[order[kept]], k=8)
    np.testing.assert_array_equal(found.peaks.labels, alone.peaks.labels)
    np.testing.assert_array_equal(found.neighbors.indices, alone.neighbors.indices)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x = jnp.asarray(blobs(120)).astype(dtype)
    found = landscape.survey(x, k=4)
    assert found.density.log_density.dtype == jnp.float32
    expected = landscape.survey(np.asarray(x.astype(jnp.float32)), k=4)
    np.testing.assert_array_equal(found.peaks.labels, expected.peaks.labels)


def test_few_points_bound_the_ranks():
    found = landscape.survey(blobs(20), k=5)
    assert found.neighbors.indices.shape == (20, 19)
    assert found.gride.ranks.tolist() == [[1, 2], [2, 4], [4, 8], [8, 16]]


def test_a_stack_is_its_layers_and_compiles_as_one(caplog):
    """Only the number of peaks and saddles changes between layers of a shape, and it's padded."""
    stack = np.stack([blobs(300, seed) * (1 + seed) for seed in range(4)])
    first = landscape.survey(stack[0], k=8)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        together = landscape.survey(stack, k=8)
    assert [record for record in caplog.records if "Compiling" in record.getMessage()] == []
    jax.tree.map(np.testing.assert_array_equal, together[0], first)
    jax.tree.map(np.testing.assert_array_equal, together[3], landscape.survey(stack[3], k=8))
    stack[2, :290] = 1
    with pytest.raises(ValueError, match="layer 2 of x.*distinct points, got 11 of 300"):
        landscape.survey(stack, k=8)


@pytest.mark.parametrize("name", ["kstar", "pak"])
def test_adaptive_densities(name):
    x = blobs(250)
    found = landscape.survey(x, density=name, max_neighbors=100, z=1.0)
    assert found.neighbors.indices.shape == (250, 100)
    nb = landscape.nearest_neighbors(x, 100)
    density = {"kstar": landscape.kstar_density, "pak": landscape.pak_density}[name](nb, landscape.gride_at(nb, 2).id)
    jax.tree.map(np.testing.assert_array_equal, found.density, density)
    peaks = landscape.advanced_density_peaks(nb, density, 1.0, x=x)
    jax.tree.map(np.testing.assert_array_equal, found.peaks, peaks)


def test_points_of_one_direction_count_once():
    x = blobs(200)
    whole = np.rint(8 * x)  # so that three times a point is exactly that
    found = landscape.survey(np.concatenate([whole, 2 * whole[:50], 3 * whole[:50]]), k=8, metric="cosine")
    assert (found.n_points, found.n_duplicates) == (300, 100)
    np.testing.assert_array_equal(found.kept, np.arange(200))


def test_cosine_is_a_landscape_of_directions():
    x = blobs(250)
    lengths = np.exp2(np.random.default_rng(0).integers(-3, 4, (250, 1))).astype(np.float32)
    found = landscape.survey(x * lengths, k=8, metric="cosine")
    expected = landscape.survey(x / np.linalg.norm(x, axis=1, keepdims=True), k=8)
    np.testing.assert_array_equal(found.peaks.labels, expected.peaks.labels)
    np.testing.assert_allclose(found.intrinsic_dim, expected.intrinsic_dim, rtol=1e-4)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (blobs(40), {"k": 0}, "k=0"),
        (blobs(40), {"max_rank": 1}, "max_rank=1"),
        (blobs(40), {"k": 20}, r"2k \+ 1 = 41 distinct points, got 40 of 40 \(k=20\)"),
        (np.ones((100, 3)), {}, "33 distinct points, got 1 of 100"),
        (blobs(40), {"k": 4, "z": -1}, "z=-1"),
        (blobs(40), {"density": "other"}, "density.*other"),
        (blobs(40), {"max_neighbors": 0}, "max_neighbors=0"),
        (blobs(4), {"density": "pak"}, "at least 5 distinct points, got 4"),
        (blobs(40), {"k": 4, "metric": "other"}, "metric.*other"),
        (np.full((40, 3), np.inf), {"k": 4}, r"x\[0, 0\] = inf"),
        (blobs(40)[0], {"k": 4}, "two dimensions"),
    ],
)
def test_refuses(x, options, message):
    with pytest.raises(ValueError, match=message):
        landscape.survey(x, **options)
