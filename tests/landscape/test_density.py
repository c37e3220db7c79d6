"""The k-nearest-neighbour density against its formula; those of adaptive k against their definitions."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import gammaln
from scipy.stats import chi2, multivariate_normal

from jaxscape import landscape
from jaxscape.landscape.density import kstar_density, pak_density

N, KEPT = 150, 40  # of most clouds, as every shape compiles anew


@cache
def uneven(wide):
    """Points of very uneven density, so that neighbourhoods of all sizes occur; x64 on when `wide`."""
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.normal(size=(N // 2, 3)), 0.2 * rng.normal(size=(N - N // 2, 3)) + 2])
    return landscape.nearest_neighbors(x.astype(np.float64 if wide else np.float32), KEPT)


@cache
def normal_points():
    x = np.random.default_rng(4).normal(size=(5000, 2))
    return x, multivariate_normal(np.zeros(2)).logpdf(x), landscape.nearest_neighbors(x, 300)


def scaled(nb, scale):
    return nb._replace(distances=nb.distances * nb.distances.dtype.type(scale))


@pytest.mark.parametrize("k", [1, 8, 20])
@pytest.mark.parametrize("dimension", [0.5, 3.0, 700.0])
def test_formula(k, dimension):
    """Dimension 700 overflows the volume, and its unit ball's underflows; their logarithms don't."""
    nb = uneven(False)
    density = landscape.knn_density(nb, dimension, k)
    radius = np.asarray(nb.distances, np.float64)[:, k - 1]
    volume = dimension / 2 * math.log(math.pi) - gammaln(dimension / 2 + 1) + dimension * np.log(radius)
    np.testing.assert_allclose(density.log_density, np.log(k / N) - volume, rtol=1e-5, atol=1e-5 * dimension)
    np.testing.assert_allclose(density.log_density_error, np.full(N, k**-0.5), rtol=1e-6)
    np.testing.assert_array_equal(density.k, np.full(N, k))
    assert density.k.dtype == np.int32


def test_estimates_a_normal_density():
    x, expected, nb = normal_points()
    log_density = np.asarray(landscape.knn_density(nb, 2.0, 32).log_density)
    middle = np.linalg.norm(x, axis=1) < 1.5
    assert abs(np.mean((log_density - expected)[middle])) < 0.03
    assert np.std((log_density - expected)[middle]) < 1.15 / math.sqrt(32)


def test_scaling_shifts_it():
    x = np.random.default_rng(0).normal(size=(N, 3))
    one, ten = (landscape.knn_density(landscape.nearest_neighbors(x * scale, KEPT), 3.0, 8) for scale in (1, 10))
    np.testing.assert_allclose(ten.log_density - one.log_density, np.full(N, -3 * math.log(10)), atol=1e-5)


def test_duplicates_stay_finite():
    x = np.random.default_rng(0).normal(size=(N // 25, 3))
    nb = landscape.nearest_neighbors(np.repeat(x, 25, axis=0), KEPT)
    for dimension in (2.0, 100.0):
        log_density = np.asarray(landscape.knn_density(nb, dimension, 10).log_density)
        assert np.all(np.isfinite(log_density))
        assert log_density.min() > np.asarray(landscape.knn_density(nb, dimension, 30).log_density).max()


def test_float64_and_traced_dimension():
    with jax.enable_x64(True):
        assert landscape.knn_density(uneven(True), 3.0, 4).log_density.dtype == np.float64
    nb = uneven(False)
    traced = jax.jit(lambda nb, d: landscape.knn_density(nb, d, 4))(nb, 2.5)
    np.testing.assert_allclose(traced.log_density, landscape.knn_density(nb, 2.5, 4).log_density, rtol=1e-6)


@pytest.mark.parametrize(
    ("dimension", "k", "message"),
    [(2.0, 0, "k=0"), (2.0, 41, "k=41"), (0.0, 4, "intrinsic_dim=0.0"), (np.nan, 4, "=nan"), (np.inf, 4, "=inf")],
)
def test_refuses(dimension, k, message):
    with pytest.raises(ValueError, match=message):
        landscape.knn_density(uneven(False), dimension, k)


def plain_kstar(radii, indices, dimension, alpha):
    """The k at which the likelihood-ratio test of Rodriguez et al. 2018 first rejects; volumes as they come."""
    threshold, found = chi2.isf(alpha, 1), []
    for point in range(len(radii)):
        for k in range(3, radii.shape[1]):
            one, two = radii[point, k - 1] ** dimension, radii[indices[point, k], k - 1] ** dimension
            if -2 * k * (np.log(one) + np.log(two) - 2 * np.log(one + two) + np.log(4)) > threshold:
                break
        found.append(k)
    return found


def plain_pak(radii, dimension, n):
    """The log density F that maximises the likelihood of the shells up to the last of `radii`, in F and a."""
    k = len(radii)
    volumes = np.diff(np.concatenate([[0], radii**dimension]))
    rank = np.arange(1, k + 1) / k
    powers = np.stack([np.ones(k), rank])
    start = np.log(k / volumes.sum())

    def shells(p):
        return volumes * np.exp(start + p @ powers)

    best = minimize(
        lambda p: shells(p).sum() - (p @ powers).sum(),
        np.zeros(2),
        jac=lambda p: powers @ shells(p) - powers.sum(axis=1),
        hess=lambda p: (powers * shells(p)) @ powers.T,
        method="trust-exact",
        options={"gtol": 1e-10},
    )
    log_ball = dimension / 2 * np.log(np.pi) - gammaln(dimension / 2 + 1)
    return start + best.x[0] - log_ball - np.log(n)


@pytest.mark.parametrize("dimension", [0.7, 3.0])
@pytest.mark.parametrize("alpha", [1e-6, 1e-2, 0.3])
def test_adaptive_k_against_its_definition(dimension, alpha):
    with jax.enable_x64(True):
        nb = uneven(True)
        radii, indices = np.asarray(nb.distances), np.asarray(nb.indices)
        plain, sloped = kstar_density(nb, dimension, alpha), pak_density(nb, dimension, alpha, converged=True)
    k = np.asarray(plain_kstar(radii, indices, dimension, alpha))
    assert len(set(k.tolist())) > 5
    for density in (plain, sloped):
        assert density.k.dtype == np.int32 and density.log_density.dtype == np.float64
        np.testing.assert_array_equal(density.k, k)
    volume = dimension / 2 * np.log(np.pi) - gammaln(dimension / 2 + 1) + dimension * np.log(radii[np.arange(N), k - 1])
    np.testing.assert_allclose(plain.log_density, np.log(k / N) - volume, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(plain.log_density_error, k**-0.5, rtol=1e-12)
    expected = [plain_pak(radii[i, : k[i]], dimension, N) for i in range(N)]
    np.testing.assert_allclose(sloped.log_density, expected, atol=1e-7)
    np.testing.assert_allclose(sloped.log_density_error, np.sqrt((4 * k + 2) / (k * (k - 1))), rtol=1e-12)


def stopped_early(radii, dimension, n):
    """The log density where DADApy's iteration stops, in units of volume, and its steps: see `pak_density`."""
    k = len(radii)
    log_ball = dimension / 2 * np.log(np.pi) - gammaln(dimension / 2 + 1)
    with np.errstate(divide="ignore"):
        inside = dimension * np.log(np.concatenate([[0], radii[:-1]]))
    outside = dimension * np.log(radii)
    log_volumes = log_ball + outside + np.log(-np.expm1(inside - outside))
    powers = np.stack([np.ones(k), np.arange(1.0, k + 1)])
    start = np.log(k) - log_ball - outside[-1]
    at = np.array([start, 0.0])
    for step in range(10_001):
        shells = np.exp(log_volumes + at @ powers)
        slope = powers.sum(axis=1) - powers @ shells
        if step == 10_000 or (step and np.max(np.abs(slope / at)) <= 1e-3):
            return at[0] - np.log(n), step
        move = np.linalg.solve((powers * shells) @ powers.T, slope)
        at = at + min(0.1, 0.1 * abs(start / move[0])) * move


@pytest.mark.parametrize("dimension", [0.7, 3.0, 12.0])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_default_stops_where_the_reference_does(dimension, scale):
    """In any unit of length; where F hardly may move, as it starts near zero, only the cap on the steps ends it."""
    with jax.enable_x64(True):
        wide = scaled(uneven(True), scale)
        found = jax.device_get(pak_density(wide, dimension))
        radii = np.asarray(wide.distances)
    points = range(0, N, 5)
    expected, steps = np.transpose([stopped_early(radii[i, : found.k[i]], dimension, N) for i in points])
    np.testing.assert_allclose(found.log_density[::5], expected, rtol=1e-9, atol=1e-9)
    assert 50 < np.median(steps) < 300
    narrow = pak_density(scaled(uneven(False), scale), dimension)
    np.testing.assert_array_equal(narrow.k, found.k)
    off = np.abs(np.asarray(narrow.log_density) - found.log_density)
    assert np.median(off) < 1e-4 and np.mean(off < 2e-3) > 0.97


def test_default_where_the_density_is_about_one():
    """F starts at 0.003 or less, may move by a tenth of that, and takes all the steps there are."""
    with jax.enable_x64(True):
        nb = uneven(True)
        start = np.asarray(kstar_density(nb, 3.0).log_density) + np.log(N)
        for point in (3, 77, 140):
            moved = scaled(nb, np.exp((start[point] + 1e-4) / 3))
            found = pak_density(moved, 3.0)
            expected, steps = stopped_early(np.asarray(moved.distances)[point, : found.k[point]], 3.0, N)
            assert steps > 1000
            np.testing.assert_allclose(found.log_density[point], expected, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), dimension=st.floats(0.3, 300.0), steep=st.floats(0.01, 20.0))
def test_pak_is_where_the_likelihood_is_flat(seed, dimension, steep):
    """Any radii at all: at the F found, with the a that exp(F) sum v exp(a l) = k leaves, both derivatives vanish."""
    rng = np.random.default_rng(seed)
    radii = np.exp(np.sort(rng.normal(size=(N, KEPT)), axis=1) * steep / dimension)
    with jax.enable_x64(True):
        nb = landscape.Neighbors(jnp.asarray(radii), jnp.asarray(rng.integers(0, N, (N, KEPT)), jnp.int32))
        density = pak_density(nb, dimension, converged=True)
        log_ball = float(landscape.density.log_unit_ball_volume(dimension))
    log_radii = np.log(radii) * dimension
    for point in range(0, N, 10):
        k = int(density.k[point])
        outer, inner = log_radii[point, :k], np.concatenate([[-np.inf], log_radii[point, : k - 1]])
        log_volume = outer + np.log1p(-np.exp(inner - outer)) + log_ball
        rank = np.arange(1, k + 1)
        level, low, high = float(density.log_density[point]) + np.log(N), -1e3, 1e3
        for _ in range(200):  # the a that makes the shells' expected counts sum to k; their sum rises with a
            a = (low + high) / 2
            low, high = (a, high) if np.logaddexp.reduce(level + a * rank + log_volume) < np.log(k) else (low, a)
        counts = np.exp(level + a * rank + log_volume)
        np.testing.assert_allclose((rank * counts).sum(), k * (k + 1) / 2, rtol=1e-6)


def test_slope_takes_out_the_bias():
    """On a sharply peaked density of known height the errors are what they should be, and the mean isn't too low."""
    x, expected, nb = normal_points()
    middle = np.linalg.norm(x, axis=1) < 1.5
    sloped, plain = pak_density(nb, 2.0, converged=True), kstar_density(nb, 2.0)
    pull = ((np.asarray(sloped.log_density) - expected) / np.asarray(sloped.log_density_error))[middle]
    assert abs(pull.mean()) < 0.25 and 0.7 < pull.std() < 1.2
    off = [np.asarray(density.log_density) - expected for density in (sloped, plain)]
    outside = np.linalg.norm(x, axis=1) > 2
    assert abs(off[0][outside].mean()) < abs(off[1][outside].mean())


def test_a_constant_density_uses_all_neighbors_but_one():
    angle = 2 * np.pi * (np.arange(N) + 0.1 * np.random.default_rng(5).random(N)) / N
    nb = landscape.nearest_neighbors(np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1), KEPT)
    assert np.all(np.asarray(kstar_density(nb, 1.0).k) == KEPT - 1)


ESTIMATES = [kstar_density, pak_density, pak_converged := partial(pak_density, converged=True)]
every_estimate = pytest.mark.parametrize("estimate", ESTIMATES, ids=["kstar", "pak", "pak converged"])


@every_estimate
def test_high_dimension_in_float32(estimate):
    """The volumes themselves would span thousands of orders of magnitude."""
    for scale in (1e-12, 1.0, 1e12):
        nb = scaled(uneven(False), scale)
        narrow = jax.device_get(estimate(nb, 200.0))
        with jax.enable_x64(True):
            wider = jax.tree.map(jnp.asarray, widened(nb))
            wide, maximum = jax.device_get((estimate(wider, 200.0), pak_converged(wider, 200.0)))
        assert narrow.log_density.dtype == np.float32 and np.all(np.isfinite(narrow.log_density))
        np.testing.assert_array_equal(narrow.k, wide.k)
        agree = np.isclose(narrow.log_density, wide.log_density, rtol=2e-6, atol=2e-3)
        if estimate is pak_density:  # where float32 has lost the step, it returns the maximum
            agree |= np.isclose(narrow.log_density, maximum.log_density, rtol=2e-6, atol=2e-3)
            assert np.mean(agree) > 0.9
        else:
            assert np.all(agree)


def widened(nb):
    return landscape.Neighbors(np.asarray(nb.distances, np.float64), np.asarray(nb.indices))


@pytest.mark.parametrize("estimate", [kstar_density, pak_converged], ids=["kstar", "pak converged"])
def test_scaling_shifts_adaptive_density(estimate):
    nb = uneven(False)
    expected, found = estimate(nb, 3.0), estimate(scaled(nb, 8), 3.0)
    np.testing.assert_array_equal(found.k, expected.k)
    np.testing.assert_allclose(found.log_density - expected.log_density, np.full(N, -3 * math.log(8)), atol=2e-5)


@every_estimate
def test_adaptive_density_of_duplicates_and_ties(estimate):
    rng = np.random.default_rng(6)
    doubled = np.repeat(rng.normal(size=(N // 2, 3)), 2, axis=0)
    grid = np.stack(np.meshgrid(np.arange(5), np.arange(5), np.arange(6)), axis=-1).reshape(N, 3)
    half = np.concatenate([np.zeros((N // 2, 3)), rng.normal(size=(N - N // 2, 3))])
    for x in (doubled, grid, half, np.ones((N, 3))):
        nb = landscape.nearest_neighbors(x, KEPT)
        for dimension in (2.5, 100.0):
            density = estimate(nb, dimension)
            assert all(np.all(np.isfinite(a)) for a in density)
            has_duplicate = np.asarray(nb.distances)[:, 0] == 0
            plain = np.asarray(kstar_density(nb, dimension).log_density)
            np.testing.assert_array_equal(np.asarray(density.log_density)[has_duplicate], plain[has_duplicate])


@pytest.mark.parametrize("estimate", [kstar_density, pak_density])
def test_adaptive_density_composes_with_jit_and_vmap(estimate):
    nb = uneven(False)
    every = jax.jit(jax.vmap(estimate, in_axes=(None, 0)))(nb, jnp.asarray([2.5, 7.0], jnp.float32))
    for i, d in enumerate((2.5, 7.0)):
        one = estimate(nb, d)
        np.testing.assert_array_equal(every.k[i], one.k)
        np.testing.assert_allclose(every.log_density[i], one.log_density, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimate", [kstar_density, pak_density])
def test_adaptive_density_refuses(estimate):
    nb = uneven(False)
    with pytest.raises(ValueError, match="at least 4 neighbours.*got 3"):
        estimate(jax.tree.map(lambda a: a[:, :3], nb), 2.0)
    for dimension in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"intrinsic_dim={dimension}"):
            estimate(nb, dimension)
    for alpha in (0.0, 1.0, -0.1, np.nan):
        with pytest.raises(ValueError, match=f"alpha={alpha}"):
            estimate(nb, 2.0, alpha)
