"""The search on CPUs: every plan gives what plain float64 searches give, on points that are hard for products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.landscape import host_search
from jaxscape.landscape.host_search import Plan

PLANS = [Plan("refine"), Plan("product"), Plan("product", precise=True), Plan("product", symmetric=True)]
NAMES = ["refine", "product", "precise", "symmetric"]


def plain(x, asking, k):
    """All distances in float64, sorted; ties by index; a point that asks about itself is left out by its index."""
    x, itself = np.asarray(x, np.float64), asking is None
    asking = x if itself else np.asarray(asking, np.float64)
    distances = np.stack([np.sqrt(((x - point) ** 2).sum(axis=1)) for point in asking])
    if itself:
        np.fill_diagonal(distances, np.inf)
    indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, indices, axis=1), indices


def assert_plain(x, k, plan, *, asking=None, tile_size=None, rtol=1e-6):
    """Distances agree, and where indices differ their true distances are a tie in float32."""
    points = jnp.asarray(x)
    found, indices = host_search.search(points, None if asking is None else jnp.asarray(asking), k, tile_size, plan)
    expected, order = plain(points, asking, k)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12 * np.abs(x).max())
    rows, columns = np.nonzero(indices != order)
    wide = np.asarray(points, np.float64)
    own = wide if asking is None else np.asarray(asking, np.float64)
    actual = np.linalg.norm(own[rows] - wide[indices[rows, columns]], axis=1)
    np.testing.assert_allclose(actual, expected[rows, columns], rtol=rtol, atol=1e-12 * np.abs(x).max())
    assert all(len(set(row)) == k for row in indices.tolist())


def normal(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def clustered(n, d, spread, seed=0):
    rng = np.random.default_rng(seed)
    centers = 10 * rng.normal(size=(5, d))
    return (centers[rng.integers(5, size=n)] + spread * rng.normal(size=(n, d))).astype(np.float32)


CLOUDS = {
    "normal": normal(257, 40),
    "one feature": normal(257, 1),
    "wide": normal(130, 2000),
    "clusters": clustered(257, 40, 1.0),
    "tight clusters": clustered(257, 40, 1e-3),
    "a few of them tight": np.concatenate([normal(200, 40), clustered(57, 40, 1e-4)]),
    "near duplicates": np.concatenate([normal(128, 40), normal(128, 40) + 1e-6 * normal(128, 40, 1)]),
    "far origin": (1e4 + 1e-2 * normal(257, 40)).astype(np.float32),
    "one huge feature": normal(257, 40) * np.where(np.arange(40) == 7, np.float32(1e4), np.float32(1)),
    "huge": normal(257, 40) * np.float32(1e25),
    "tiny": normal(257, 40) * np.float32(1e-25),
}


@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_plan_is_exact(cloud, plan):
    assert_plain(CLOUDS[cloud], 30, plan, tile_size=64)


@pytest.mark.parametrize("plan", PLANS[:3], ids=NAMES[:3])
@pytest.mark.parametrize("cloud", ["normal", "tight clusters", "near duplicates"])
def test_queries(cloud, plan):
    x = CLOUDS[cloud]
    assert_plain(x[:200], 30, plan, asking=x[150:])


@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
def test_two_levels_of_selection(plan):
    """Two neighbours of 1,999: the columns are looked at in groups."""
    assert_plain(clustered(1999, 5, 1.0), 2, plan)


@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
@pytest.mark.parametrize("n", [2, 3, 20])
def test_all_the_others(n, plan):
    assert_plain(normal(n, 7), n - 1, plan)


@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
def test_ties_go_to_the_lower_index(plan):
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), np.arange(3)), axis=-1).reshape(-1, 3).astype(np.float32)
    for points in (grid, np.repeat(normal(6, 3), 40, axis=0), np.ones((60, 2), np.float32)):
        distances, indices = host_search.search(jnp.asarray(points), None, 30, 50, plan)
        expected, order = plain(points, None, 30)
        np.testing.assert_array_equal(distances, expected.astype(np.float32))
        np.testing.assert_array_equal(indices, order)


def test_discrete_points_are_not_left_to_float32_products():
    """Where many distances are equal, their ties must be kept."""
    x = np.random.default_rng(0).integers(0, 2, (900, 300)).astype(np.float32) * 2 - 1
    for plan in PLANS:
        distances, indices = host_search.search(jnp.asarray(x), None, 60, None, plan)
        expected, order = plain(x, None, 60)
        np.testing.assert_array_equal(distances, expected.astype(np.float32))
        np.testing.assert_array_equal(indices, order)


def test_products_and_differences_agree_to_the_last_digits():
    """Where the sample trusts float32 products, they are as good as differences; elsewhere float64 takes over."""
    for cloud in (normal(1500, 300), clustered(1500, 300, 3.0)):
        exact = plain(cloud, None, 200)[0]
        for plan in PLANS:
            distances, _ = host_search.search(jnp.asarray(cloud), None, 200, None, plan)
            assert np.abs(distances / exact - 1).max() < 6e-7


@pytest.mark.parametrize("plan", PLANS[:1], ids=NAMES[:1])
def test_float64(plan):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(200, 20))
        assert_plain(np.concatenate([x, x + 1e-9, 1e3 + 1e-6 * x]), 50, plan, rtol=1e-13)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.floats(-4, 4, width=16)] * 3), min_size=40, max_size=40),
    offset=st.sampled_from([0.0, 3e3]),
    plan=st.sampled_from(PLANS),
    tile_size=st.sampled_from([40, 17]),
)
def test_any_points(rows, offset, plan, tile_size):
    x = (np.asarray(rows) + offset).astype(np.float32)
    distances, indices = host_search.search(jnp.asarray(x), None, 8, tile_size, plan)
    expected, _ = plain(x, None, 8)
    np.testing.assert_allclose(distances, expected, rtol=1e-6, atol=1e-30)
    actual = np.linalg.norm(x[:, None].astype(np.float64) - x[indices].astype(np.float64), axis=-1)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-30)


def test_the_plan_follows_the_cost():
    assert host_search.choose(1000, 1000, 8, 64, False, True) == Plan("refine")
    assert host_search.choose(1000, 1000, 576, 64, False, True) == Plan("product", precise=True)
    assert host_search.choose(60_000, 60_000, 32, 100, False, True) == Plan("refine")
    assert host_search.choose(20_000, 20_000, 512, 1000, False, True) == Plan("product")
    assert host_search.choose(9183, 9183, 4096, 1000, False, True) == Plan("product", symmetric=True)
    assert host_search.choose(9183, 9183, 4096, 1000, False, False) == Plan("product")
    assert host_search.choose(9183, 9183, 4096, 1000, True, True) == Plan("refine")
