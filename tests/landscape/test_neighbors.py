"""Nearest neighbours against plain float64 searches, SciPy and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from sklearn.neighbors import NearestNeighbors

from jaxscape import landscape
from jaxscape.landscape import compiled_search


def plain(x, k):
    """All distances in float64, sorted; ties by index."""
    x = np.asarray(x, np.float64)
    distances = np.stack([np.sqrt(((x - point) ** 2).sum(axis=1)) for point in x])
    np.fill_diagonal(distances, np.inf)
    indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, indices, axis=1), indices


def assert_exact(x, nb, rtol=5e-7):
    """Distances as in float64, and the indices really are at them; the order holds, ties by index."""
    k = nb.distances.shape[1]
    distances, indices = np.asarray(nb.distances, np.float64), np.asarray(nb.indices)
    expected, _ = plain(x, k)
    smallest = expected[expected > 0].min() if np.any(expected > 0) else 0
    np.testing.assert_allclose(distances, expected, rtol=rtol, atol=smallest * 1e-6)
    x = np.asarray(x, np.float64)
    actual = np.sqrt(((x[:, None] - x[indices]) ** 2).sum(axis=-1))
    np.testing.assert_allclose(distances, actual, rtol=rtol, atol=smallest * 1e-6)
    assert np.all(indices != np.arange(len(x))[:, None])
    assert all(len(set(row)) == k for row in indices.tolist())
    rises = np.diff(distances, axis=1)
    assert np.all((rises > 0) | ((rises == 0) & (np.diff(indices, axis=1) > 0)))
    assert indices.dtype == np.int32


def normal(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


@pytest.mark.parametrize("dim", [1, 17, 3000])
def test_random_points(dim):
    x = normal(150, dim)
    assert_exact(x, landscape.nearest_neighbors(x, 12))


def test_agrees_with_scipy_and_scikit_learn():
    x = normal(600, 5)
    nb = landscape.nearest_neighbors(x, 20)
    distances, indices = cKDTree(x.astype(np.float64)).query(x.astype(np.float64), 21)
    np.testing.assert_allclose(nb.distances, distances[:, 1:], rtol=5e-7)
    assert np.mean(np.asarray(nb.indices) == indices[:, 1:]) > 0.999
    wide = normal(400, 64)
    distances, _ = NearestNeighbors(n_neighbors=9, algorithm="brute").fit(wide.astype(np.float64)).kneighbors()
    np.testing.assert_allclose(landscape.nearest_neighbors(wide, 9).distances, distances, rtol=5e-7)


@pytest.mark.parametrize("tile_size", [1, 7, 5000])
def test_tiles_change_nothing(tile_size):
    x = np.concatenate([normal(100, 40), normal(100, 40) * 1e-3 + 50])
    expected = landscape.nearest_neighbors(x, 10)
    found = landscape.nearest_neighbors(x, 10, tile_size=tile_size)
    np.testing.assert_array_equal(found.distances, expected.distances)
    np.testing.assert_array_equal(found.indices, expected.indices)


def test_distances_are_symmetric_to_the_bit():
    x = normal(300, 133)
    nb = landscape.nearest_neighbors(x, 299)
    full = np.zeros((300, 300), np.float32)
    np.put_along_axis(full, np.asarray(nb.indices), np.asarray(nb.distances), axis=1)
    np.testing.assert_array_equal(full, full.T)


@pytest.mark.parametrize("dim", [3, 100])
def test_far_origin(dim):
    """Offsets of 1e4, spreads of 1e-2: the float32 points are a coarse grid, full of ties and duplicates."""
    x = (1e4 + 1e-2 * np.random.default_rng(1).normal(size=(300, dim))).astype(np.float32)
    assert_exact(x, landscape.nearest_neighbors(x, 8))
    in_two = np.where(np.arange(300)[:, None] % 2, x, -x).astype(np.float32)
    assert_exact(in_two, landscape.nearest_neighbors(in_two, 8))


def test_tight_clusters_far_apart_need_the_second_search():
    rng = np.random.default_rng(2)
    x = (100 * rng.normal(size=(6, 50)))[rng.integers(0, 6, 600)] + 1e-3 * rng.normal(size=(600, 50))
    x = x.astype(np.float32)
    assert_exact(x, landscape.nearest_neighbors(x, 8))
    with jax.enable_x64(True):
        wide = x.astype(np.float64)
        np.testing.assert_array_equal(landscape.nearest_neighbors(wide, 8).indices, plain(wide, 8)[1])


def test_near_duplicates():
    x = normal(200, 30)
    x = np.concatenate([x, x + np.float32(1e-6) * normal(200, 30, seed=1)])
    nb = landscape.nearest_neighbors(x, 5)
    assert_exact(x, nb)
    assert np.all(np.asarray(nb.indices)[:, 0] == (np.arange(400) + 200) % 400)


def test_duplicates_are_neighbors_at_distance_zero():
    x = np.repeat(normal(6, 3), 40, axis=0)
    nb = landscape.nearest_neighbors(x, 45)
    assert_exact(x, nb)
    assert np.all(np.asarray(nb.distances)[:, :39] == 0)
    np.testing.assert_array_equal(np.asarray(nb.indices)[0, :39], np.arange(1, 40))
    np.testing.assert_array_equal(np.asarray(nb.indices)[239, :39], np.arange(200, 239))
    same = landscape.nearest_neighbors(np.ones((50, 4), np.float32), 3)
    np.testing.assert_array_equal(same.indices[0], [1, 2, 3])
    np.testing.assert_array_equal(same.indices[10], [0, 1, 2])


def test_ties_go_to_the_lower_index():
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), np.arange(3)), axis=-1).reshape(-1, 3)
    for tile_size in (None, 5):
        nb = landscape.nearest_neighbors(grid, 30, tile_size=tile_size)
        np.testing.assert_array_equal(nb.indices, plain(grid, 30)[1])


def test_collinear_points_and_constant_columns():
    line = np.random.default_rng(3).permutation(100)[:, None] * np.array([[1.0, 2.0, -1.0]], np.float32)
    assert_exact(line, landscape.nearest_neighbors(line, 7))
    constant = np.concatenate([normal(100, 3), np.full((100, 2), 1e3, np.float32)], axis=1)
    assert_exact(constant, landscape.nearest_neighbors(constant, 7))


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_scales_beyond_the_square_root_of_the_largest_float(scale):
    x = normal(80, 4)
    expected = landscape.nearest_neighbors(x, 5)
    found = landscape.nearest_neighbors((x.astype(np.float64) * scale).astype(np.float32), 5)
    np.testing.assert_allclose(np.asarray(found.distances, np.float64) / scale, expected.distances, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32])
def test_narrow_types_are_computed_in_float32(dtype):
    x = jnp.asarray(normal(60, 9) * 10).astype(dtype)
    nb = landscape.nearest_neighbors(x, 4)
    assert nb.distances.dtype == jnp.float32
    assert_exact(np.asarray(x.astype(jnp.float32)), nb)


def test_float64_on_request():
    x = np.random.default_rng(4).normal(size=(200, 20))
    assert landscape.nearest_neighbors(x, 4).distances.dtype == jnp.float32
    with jax.enable_x64(True):
        nb = landscape.nearest_neighbors(x, 9)
        assert nb.distances.dtype == jnp.float64
        assert_exact(x, nb, rtol=1e-14)
        np.testing.assert_array_equal(nb.indices, plain(x, 9)[1])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_all_the_others(n):
    x = normal(n, 2)
    assert_exact(x, landscape.nearest_neighbors(x, n - 1))


def test_composes_with_jit_and_vmap():
    x = np.stack([normal(40, 3, seed) for seed in range(3)])
    together = jax.jit(jax.vmap(lambda x: landscape.nearest_neighbors(x, 4)))(x)
    for one, points in zip(together.indices, x, strict=True):
        np.testing.assert_array_equal(one, landscape.nearest_neighbors(points, 4).indices)


@pytest.mark.parametrize("tile_size", [None, 64])
@pytest.mark.parametrize("queries", [False, True])
def test_compiled_and_host_search_agree(queries, tile_size):
    """Under jit the search is one compiled program; wide enough here that it selects in two levels."""
    x = np.concatenate([normal(1200, 6), 1e-3 * normal(300, 6) + 9])
    asking = normal(100, 6, seed=1) if queries else None
    host = landscape.nearest_neighbors(x, 3, queries=asking, tile_size=tile_size)
    compiled = jax.jit(lambda x: landscape.nearest_neighbors(x, 3, queries=asking, tile_size=tile_size))(x)
    assert compiled_search.group_span(1500, 19) > 1
    np.testing.assert_allclose(compiled.distances, host.distances, rtol=3e-7)
    np.testing.assert_array_equal(compiled.indices, host.indices)


@pytest.mark.parametrize("compiled", [False, True])
def test_queries_against_scikit_learn(compiled):
    x, asking = normal(500, 12), np.concatenate([normal(70, 12, seed=1), normal(500, 12)[:5]])
    search = lambda x: landscape.nearest_neighbors(x, 9, queries=asking)  # noqa: E731
    nb = (jax.jit(search) if compiled else search)(x)
    distances, indices = NearestNeighbors(n_neighbors=9, algorithm="kd_tree").fit(x).kneighbors(asking)
    np.testing.assert_allclose(nb.distances, distances, rtol=5e-7)
    np.testing.assert_array_equal(nb.indices, indices)
    np.testing.assert_array_equal(nb.indices[70:, 0], np.arange(5))  # a query isn't left out of its own
    everyone = landscape.nearest_neighbors(x, 500, queries=x[:3])
    assert sorted(everyone.indices[1].tolist()) == list(range(500))


@pytest.mark.parametrize("compiled", [False, True])
def test_cosine_against_scikit_learn(compiled):
    x = normal(400, 30) * np.exp(normal(400, 1, seed=2))  # of many lengths, which mustn't matter
    search = lambda x: landscape.nearest_neighbors(x, 7, metric="cosine")  # noqa: E731
    nb = (jax.jit(search) if compiled else search)(x)
    wide = x.astype(np.float64)
    distances, indices = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(wide).kneighbors()
    np.testing.assert_allclose(nb.distances, distances, rtol=1e-6)
    assert np.mean(np.asarray(nb.indices) == indices) > 0.999
    asking = landscape.nearest_neighbors(x, 7, metric="cosine", queries=3 * x[:50])
    np.testing.assert_array_equal(asking.indices[:, 0], np.arange(50))


def test_cosine_keeps_the_digits_of_small_angles():
    angles = np.asarray([0.0, 1e-4, 3e-4, 1.0])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    with jax.enable_x64(True):
        nb = landscape.nearest_neighbors(x, 1, metric="cosine")
        np.testing.assert_allclose(nb.distances[:, 0], 2 * np.sin([5e-5, 5e-5, 1e-4, (1 - 3e-4) / 2]) ** 2, rtol=1e-11)


def test_arrays_that_a_jitted_function_closes_over():
    x = jnp.asarray(normal(60, 4))
    for metric in ("euclidean", "cosine"):
        found = jax.jit(lambda asking, metric=metric: landscape.nearest_neighbors(x, 3, metric, queries=asking))(x[:9])
        np.testing.assert_array_equal(found.indices[:, 0], np.arange(9))


def test_the_wider_type_counts():
    with jax.enable_x64(True):
        x = np.asarray([[1e4], [2e4]], np.float32)
        nb = landscape.nearest_neighbors(x, 1, queries=np.asarray([[1e4 + 1e-5]]))
        np.testing.assert_allclose(nb.distances, [[1e-5]], rtol=1e-6)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_float64_scales(scale):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(80, 4))
        found, expected = landscape.nearest_neighbors(x * scale, 5), landscape.nearest_neighbors(x, 5)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_allclose(found.distances / scale, expected.distances, rtol=1e-13)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.integers(-3, 3)] * 2), min_size=24, max_size=24),
    offset=st.sampled_from([0, 1000, -65536]),
    tile_size=st.sampled_from([24, 5]),
)
def test_any_grid_points(rows, offset, tile_size):
    """Small integers are exact in float32, so every tie is one; the order must be the plain one."""
    x = np.asarray(rows) + offset
    nb = landscape.nearest_neighbors(x, 6, tile_size=tile_size)
    np.testing.assert_array_equal(nb.indices, plain(x, 6)[1])


def test_a_tile_is_all_that_is_held():
    n = 30_000
    points = jax.ShapeDtypeStruct((n, 8), jnp.float32)
    compiled = compiled_search.search.lower(points, None, 4, compiled_search.tile_rows(n, n, None)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * n  # a quarter of the matrix in float32


@pytest.mark.parametrize(
    ("x", "k", "options", "message"),
    [
        (normal(5, 2), 0, {}, "k=0"),
        (normal(5, 2), 5, {}, "k=5"),
        (normal(5, 2), 2, {"metric": "taxicab"}, "metric.*taxicab"),
        (normal(5, 2), 2, {"tile_size": 0}, "tile_size=0"),
        (normal(5, 2), 6, {"queries": normal(3, 2)}, "at least k = 6 points, got 5"),
        (normal(5, 2), 2, {"queries": np.zeros((0, 2))}, "queries must have at least one point"),
        (normal(5, 2), 2, {"queries": normal(3, 4)}, "the 2 features of x, got 4"),
        (normal(5, 2), 2, {"queries": np.full((3, 2), np.inf)}, r"queries\[0, 0\] = inf"),
        (normal(5, 2) * [[1], [0], [1], [1], [1]], 2, {"metric": "cosine"}, r"length zero.*x\[1\]"),
        (normal(5, 2)[0], 1, {}, r"x must have two dimensions.*\(2,\)"),
        (np.zeros((5, 0)), 1, {}, r"x must have at least one feature.*\(5, 0\)"),
        (np.ones((5, 2), np.complex64), 1, {}, "x must be real.*complex64"),
        (np.where(np.eye(4), np.nan, 1.0), 1, {}, r"x\[0, 0\] = nan"),
        (np.array([[1.0], [2.0], [-np.inf]]), 1, {}, r"x\[2, 0\] = -inf"),
    ],
)
def test_refuses(x, k, options, message):
    with pytest.raises(ValueError, match=message):
        landscape.nearest_neighbors(x, k, **options)


def test_drop_duplicates():
    x = np.array([[1, 2], [0, 3], [1, 2], [-0.0, 3], [1, 2.5], [0, 3]])
    np.testing.assert_array_equal(landscape.drop_duplicates(x), [0, 1, 4])
    np.testing.assert_array_equal(landscape.drop_duplicates(jnp.ones((7, 3), jnp.bfloat16)), [0])
    np.testing.assert_array_equal(landscape.drop_duplicates(normal(500, 20)), np.arange(500))
    wide = np.zeros((4, 3000), np.float64)
    wide[1, 7] = wide[3, 7] = 1e-300  # equal in float32, and in most features
    np.testing.assert_array_equal(landscape.drop_duplicates(wide), [0, 1])
    with pytest.raises(ValueError, match=r"two dimensions.*\(6,\)"):
        landscape.drop_duplicates(x[:, 0])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 2)), min_size=1, max_size=30))
def test_drop_duplicates_keeps_first_occurrences(rows):
    expected = sorted({row: i for i, row in reversed(list(enumerate(rows)))}.values())
    assert landscape.drop_duplicates(np.asarray(rows, np.float32)).tolist() == expected
