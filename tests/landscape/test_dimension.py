"""Gride against the likelihood itself, TwoNN against its formulas, and clouds whose dimension is known."""

import jax
import numpy as np
import pytest
from scipy.optimize import curve_fit, minimize_scalar
from scipy.special import betaln

from jaxscape import landscape
from jaxscape.landscape.dimension import two_nn, two_nn_decimation
from tests.landscape.manifolds import MANIFOLDS, sample

# What others find on the same points (in float64), and how far from the truth either may be. In high dimensions two
# thousand points are too few: most lie at the border, or see the manifold's curvature, for every such estimator.
# TwoNN: scikit-dimension 0.5.0, skdim.id.TwoNN().fit_transform(x).
# Gride: DADApy 0.3.4, Data(x).return_id_scaling_gride(range_max=4) after compute_distances(maxk=8); second entry.
REFERENCE = {
    "sphere 2": (1.972630300841499, 2.055821129329881, 0.1),
    "sphere 10": (9.241437746321534, 9.035905948288647, 0.1),
    "affine 3 in 5": (2.8464614598529066, 2.9124008929151755, 0.1),
    "nonlinear 4 in 16": (3.8739243245726125, 4.02407041129723, 0.1),
    "nonlinear 12 in 48": (15.567928266762031, 15.749819041594307, 0.35),
    "helix 2 in 3": (1.941075729774298, 2.1847450321477666, 0.1),
    "swiss roll": (1.9527064257946163, 1.9097907687755944, 0.1),
    "moebius band": (1.9175094772670362, 2.0219773082658348, 0.1),
    "torus 1": (1.041418117133451, 0.9623224529073049, 0.1),
    "torus 6": (6.5064903661276015, 6.574470749922534, 0.1),
    "normal 20 in 40": (16.638832417984258, 16.064218210808505, 0.2),
    "cube 10 in 20": (8.600015024036665, 8.585649768698293, 0.15),
    "cube 24 in 25": (17.351964770029227, 17.431932961785733, 0.3),
    "cube 70 in 71": (37.91353171413969, 38.86390726017146, 0.5),
}


def log_likelihood(d, mu, n):
    """Log density of the ratios r_2n / r_n in dimension d, summed; all but one of them, to be unbiased."""
    d_log_mu = d * np.log(mu)
    terms = (n - 1) * np.log(np.expm1(d_log_mu)) - (2 * n - 1) * d_log_mu - np.log(mu) - betaln(n, n)
    return terms.sum() + (len(mu) - 1) * np.log(d)


def neighbors_of(x, k):
    return landscape.nearest_neighbors(x, k)


def widened(x, width):
    """Zeros change no distance, and one shape compiles once."""
    return np.pad(x, ((0, 0), (0, width - x.shape[1])))


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_maximises_the_likelihood(dim):
    with jax.enable_x64(True):
        nb = neighbors_of(widened(np.random.default_rng(dim).normal(size=(400, dim)), 8), 32)
        found = landscape.gride(nb, max_rank=32)
        for i, (n, twice) in enumerate(found.ranks.tolist()):
            mu = np.asarray(nb.distances)[:, twice - 1] / np.asarray(nb.distances)[:, n - 1]
            median, high = np.percentile(mu, [50, 95])
            used = mu[mu < median + 20 * (high - median)]

            def cost(log_d, used=used, n=n):
                return -log_likelihood(np.exp(log_d), used, n)

            best = minimize_scalar(cost, bounds=(np.log(0.1), np.log(100)), method="bounded", options={"xatol": 1e-10})
            np.testing.assert_allclose(found.ids[i], np.exp(best.x), rtol=1e-6)
            # The standard error: the curvature of the likelihood (of all points) at its top.
            step, d = 1e-3, float(found.ids[i])
            around = [log_likelihood(d + s, mu, n) for s in (-step, 0, step)]
            curvature = -(around[0] - 2 * around[1] + around[2]) / step**2 + 1 / d**2
            np.testing.assert_allclose(found.errors[i], curvature**-0.5, rtol=1e-3)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_uniform_torus(dim):
    """Flat and without borders: the dimension is known, and the error says how well."""
    angles = 2 * np.pi * np.random.default_rng(7).random((3000, dim))
    x = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    found = landscape.gride(neighbors_of(widened(x, 10), 8), max_rank=8)
    assert np.all(np.abs(np.asarray(found.ids) - dim) < 4 * np.asarray(found.errors) + 0.02 * dim)
    assert np.all(np.diff(found.errors) < 0) and np.all(np.diff(found.scales) > 0)


def test_scale_rotation_and_translation():
    rng = np.random.default_rng(8)
    x = rng.normal(size=(300, 6))
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    expected = landscape.gride(neighbors_of(x, 16))
    for moved, scale in ((x * 1e3, 1e3), (x @ rotation, 1), (x + 50, 1), (x[::-1], 1)):
        found = landscape.gride(neighbors_of(moved, 16))
        np.testing.assert_allclose(found.ids, expected.ids, rtol=1e-4)
        np.testing.assert_allclose(found.errors, expected.errors, rtol=1e-4)
        np.testing.assert_allclose(found.scales, np.asarray(expected.scales) * scale, rtol=1e-4)


def test_float32_agrees_with_float64_on_many_points():
    rng = np.random.default_rng(9)
    distances = np.cumsum(rng.random((60_000, 64)), axis=1) ** 0.05 + 3
    nb = landscape.Neighbors(distances, np.zeros(distances.shape, np.int32))
    with jax.enable_x64(True):
        expected = jax.device_get(landscape.gride(jax.tree.map(jax.numpy.asarray, nb)))
    narrow = landscape.gride(landscape.Neighbors(jax.numpy.asarray(distances, np.float32), nb.indices))
    np.testing.assert_allclose(narrow.ids, expected.ids, rtol=2e-5)
    np.testing.assert_allclose(narrow.errors, expected.errors, rtol=2e-5)


def test_ranks_stop_at_what_is_kept():
    nb = neighbors_of(np.random.default_rng(1).normal(size=(50, 2)), 20)
    assert landscape.gride(nb).ranks.tolist() == [[1, 2], [2, 4], [4, 8], [8, 16]]
    assert landscape.gride(nb, max_rank=7).ranks.tolist() == [[1, 2], [2, 4]]
    assert landscape.gride(nb, max_rank=2).ids.shape == (1,)


def test_one_rank_pair():
    nb = neighbors_of(np.random.default_rng(1).normal(size=(50, 2)), 20)
    every = landscape.gride(nb)
    one = landscape.gride_at(nb, 8)
    np.testing.assert_allclose([one.id, one.error, one.scale], [every.ids[3], every.errors[3], every.scales[3]], 1e-6)
    assert np.isfinite(landscape.gride_at(nb, 5).id)


def test_duplicates_and_regular_points_stay_finite():
    rng = np.random.default_rng(2)
    doubled = np.repeat(rng.normal(size=(25, 2)), 2, axis=0)
    line = widened(np.arange(50.0)[:, None], 2)
    with_duplicates, line, same = (landscape.gride(neighbors_of(x, 20)) for x in (doubled, line, np.ones((50, 2))))
    for found in (with_duplicates, line, same):
        assert all(np.all(np.isfinite(a)) for a in found)
        assert np.all(np.asarray(found.ids) <= 1000) and np.all(np.asarray(found.ids) > 0)


def test_composes_with_jit_and_vmap():
    x = np.random.default_rng(3).normal(size=(4, 80, 3)).astype(np.float32)
    found = jax.jit(jax.vmap(lambda x: landscape.gride(landscape.nearest_neighbors(x, 8))))(x)
    for i, points in enumerate(x):
        np.testing.assert_allclose(found.ids[i], landscape.gride(neighbors_of(points, 8)).ids, rtol=1e-5)


def test_refuses():
    nb = neighbors_of(np.random.default_rng(1).normal(size=(50, 2)), 20)
    with pytest.raises(ValueError, match="max_rank=1"):
        landscape.gride(nb, max_rank=1)
    with pytest.raises(ValueError, match="at least 2 neighbours.*got 1"):
        landscape.gride(jax.tree.map(lambda a: a[:, :1], nb))
    for rank in (0, 11):
        with pytest.raises(ValueError, match=f"rank={rank}"):
            landscape.gride_at(nb, rank)


NARROW = ("sphere 2", "nonlinear 12 in 48", "swiss roll", "torus 1", "cube 70 in 71")


@pytest.mark.parametrize(("name", "wide"), [*((name, True) for name in MANIFOLDS), *((name, False) for name in NARROW)])
def test_manifolds_of_known_dimension(name, wide):
    dim = MANIFOLDS[name][0]
    x = widened(sample(name), 71)
    reference_two_nn, reference_gride, tolerance = REFERENCE[name]
    with jax.enable_x64(wide):
        nb = neighbors_of(x, 4)
        fitted, likely, at_two = two_nn(nb), two_nn(nb, "maximum_likelihood"), landscape.gride_at(nb, 2)
        np.testing.assert_allclose(fitted.id, reference_two_nn, rtol=1e-9 if wide else 1e-5)
        np.testing.assert_allclose(at_two.id, reference_gride, rtol=1e-7 if wide else 1e-5)
    for found in (fitted.id, likely.id, at_two.id):
        assert abs(float(found) / dim - 1) < tolerance
    assert abs(float(fitted.id) - float(likely.id)) < 3 * float(likely.error)


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.99])
def test_two_nn_is_the_line_through_the_origin(fraction):
    with jax.enable_x64(True):
        nb = neighbors_of(np.random.default_rng(4).normal(size=(403, 3)), 2)
        log_mu = np.sort(np.log(np.asarray(nb.distances)[:, 1] / np.asarray(nb.distances)[:, 0]))
        used = int(403 * fraction)
        survival = 1 - np.arange(1, used + 1) / 403
        slope, variance = curve_fit(lambda x, m: m * x, log_mu[:used], -np.log(survival))
        found = two_nn(nb, fraction=fraction)
        np.testing.assert_allclose([found.id, found.error], [slope[0], variance[0, 0] ** 0.5], rtol=1e-6)
        likely = two_nn(nb, "maximum_likelihood", fraction)
        np.testing.assert_allclose(likely.id, 402 / log_mu.sum(), rtol=1e-10)
        np.testing.assert_allclose(likely.error, 402 / log_mu.sum() / 403**0.5, rtol=1e-10)


def test_two_nn_of_ideal_ratios():
    """Pareto ratios: unbiased, and the likelihood's error is the scatter; the fit's own is far smaller than its."""
    ratios = np.random.default_rng(5).random((300, 403)) ** (-1 / 7)
    distances = np.stack([np.ones_like(ratios), ratios], axis=-1)
    nb = landscape.Neighbors(distances.astype(np.float32), np.zeros(distances.shape, np.int32))
    for method in ("linear_fit", "maximum_likelihood"):
        found = jax.vmap(lambda nb, method=method: two_nn(nb, method))(nb)
        scatter = float(np.std(found.id, ddof=1))
        assert abs(np.mean(found.id) - 7) < (0.1 if method == "linear_fit" else 3 * scatter / 300**0.5)
        assert 0.3 < scatter < 0.5
    np.testing.assert_allclose(np.mean(found.error), scatter, rtol=0.1)


@pytest.mark.parametrize("method", ["linear_fit", "maximum_likelihood"])
def test_two_nn_with_duplicates_and_ties(method):
    rng = np.random.default_rng(6)
    alone = rng.normal(size=(350, 2))
    found = two_nn(neighbors_of(np.concatenate([alone, alone[:1] + 100, np.full((52, 2), 100 + alone[0])]), 2), method)
    expected = two_nn(neighbors_of(alone, 2), method)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    line = two_nn(neighbors_of(np.stack([np.arange(403.0), np.zeros(403)], axis=1), 2), method)
    same = two_nn(neighbors_of(np.ones((403, 2)), 2), method)
    assert np.isclose(same.id, 0.001) and np.isinf(same.error)
    assert np.isinf(line.error) == (method == "linear_fit")
    # Of the line's ratios, the two at its ends are 2, and the others one; the fit leaves the two out.
    likely = 402 / (2 * np.log(2) + 401 * 10 * np.finfo(np.float32).eps)
    np.testing.assert_allclose(line.id, 1000 if method == "linear_fit" else likely, rtol=1e-4)


def pen_stroke():
    """A circle drawn with a pen: a surface from near, a curve from afar."""
    rng = np.random.default_rng(8)
    angle = 2 * np.pi * rng.random(1601)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return (circle * (1 + 0.01 * rng.normal(size=(1601, 1)))).astype(np.float32)


def test_decimation_is_the_mean_over_disjoint_parts():
    x = pen_stroke()
    found = two_nn_decimation(x, min_points=400, seed=3)
    assert found.sizes.tolist() == [1601, 800, 400] and found.sizes.dtype == np.int32
    nb = neighbors_of(x, 2)
    np.testing.assert_allclose([found.ids[0], found.errors[0]], two_nn(nb), rtol=1e-5)
    np.testing.assert_allclose(found.scales[0], np.mean(nb.distances), rtol=1e-5)
    parts = x[np.asarray(jax.random.permutation(jax.random.key(3), 1601))[:1600]].reshape(4, 400, 2)
    each = [neighbors_of(part, 2) for part in parts]
    ids = [float(two_nn(nb).id) for nb in each]
    np.testing.assert_allclose(found.ids[2], np.mean(ids), rtol=1e-5)
    np.testing.assert_allclose(found.errors[2], np.std(ids, ddof=1) / 2, rtol=1e-3)
    np.testing.assert_allclose(found.scales[2], np.mean([nb.distances for nb in each]), rtol=1e-5)
    again = two_nn_decimation(x, min_points=400, seed=3)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    assert not np.array_equal(two_nn_decimation(x, min_points=400, seed=4).ids[1:], found.ids[1:])


def test_decimation_sees_through_noise():
    found = two_nn_decimation(pen_stroke(), min_points=25)
    assert found.sizes.tolist() == [1601, 800, 400, 200, 100, 50, 25]
    assert np.all(np.diff(found.scales) > 0)
    assert found.ids[0] > 1.8 and abs(found.ids[-1] - 1) < 0.15
    assert np.all(np.isfinite(found.errors)) and np.all(np.asarray(found.errors) < 0.1)


def test_two_nn_refuses():
    x = np.random.default_rng(1).normal(size=(50, 2))
    nb = neighbors_of(x, 2)
    with pytest.raises(ValueError, match="at least 2 neighbours.*got 1"):
        two_nn(jax.tree.map(lambda a: a[:, :1], nb))
    with pytest.raises(ValueError, match="method.*'ml'"):
        two_nn(nb, "ml")
    for fraction in (0.0, 1.0, 0.03, np.nan):
        with pytest.raises(ValueError, match=f"2 of 50 ratios, got fraction={fraction}"):
            two_nn(nb, fraction=fraction)
    with pytest.raises(ValueError, match="min_points=2"):
        two_nn_decimation(x, min_points=2)
    with pytest.raises(ValueError, match="min_points = 51 points, got 50"):
        two_nn_decimation(x, min_points=51)
    with pytest.raises(ValueError, match="2 of 3 ratios, got fraction=0.5"):
        two_nn_decimation(x, min_points=3, fraction=0.5)
    with pytest.raises(ValueError, match="two dimensions"):
        two_nn_decimation(x[0])
