"""The turn of a curve over the layers, against plain loops in float64 and steps whose place is known."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from jaxscape.compare.transition import change_point, change_point_samples

L = 24


def brute_force(curve, min_size=1):
    """Split, posterior [L], effect, and its error; from every split in turn."""
    curve = np.asarray(curve, np.float64)
    at = np.flatnonzero(np.isfinite(curve))
    values, n = curve[at], len(at)
    rss, weights, effects = np.full(n, np.inf), np.zeros(n), np.zeros(n)
    for m in range(min_size, n - min_size + 1):
        a, b = values[:m], values[m:]
        rss[m] = np.sum((a - a.mean()) ** 2) + np.sum((b - b.mean()) ** 2)
        weights[m] = (m * (n - m)) ** -0.5 * rss[m] ** (-(n - 2) / 2)
        effects[m] = b.mean() - a.mean()
    best = int(np.argmin(rss))
    posterior = np.zeros(len(curve))
    posterior[at] = weights / weights.sum()
    error = np.sqrt(rss[best] / (n - 2) * (1 / best + 1 / (n - best)))
    return at[best], posterior, effects[best], error, 1 - rss[best] / np.sum((values - values.mean()) ** 2)


def noisy_step(turn, effect, noise, seed, length=L):
    draw = np.random.default_rng(seed)
    return (np.arange(length) >= turn) * effect + 0.3 + noise * draw.normal(size=length)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, L - 1), st.floats(-2, 2), st.integers(0, 2**31), st.sets(st.integers(0, L - 1), max_size=8))
def test_is_the_brute_force(turn, effect, seed, left_out):
    curve = noisy_step(turn, effect, 0.3, seed).astype(np.float32)
    curve[list(left_out)] = np.nan
    for min_size in (1, 3):
        found = change_point(curve, min_size=min_size)
        layer, posterior, step, error, explained = brute_force(curve, min_size)
        assert found.layer == layer and found.layer.dtype == np.float32
        np.testing.assert_allclose(found.posterior, posterior, atol=1e-4)
        np.testing.assert_allclose(
            [found.effect, found.effect_error, found.after - found.before, found.explained],
            [step, error, step, explained], rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        assert np.sum(posterior[int(found.low) : int(found.high) + 1]) >= 0.95 - 1e-4
        assert np.sum(posterior[: int(found.low)]) <= 0.025 + 1e-4
        assert np.sum(posterior[int(found.high) + 1 :]) <= 0.025 + 1e-4


def test_posterior_is_the_integral_it_claims_to_be():
    """Means integrated by hand, the noise numerically."""
    curve = noisy_step(2, 1.0, 0.5, 0, length=5)
    chances = []
    for m in range(1, 5):
        rss = np.sum((curve[:m] - curve[:m].mean()) ** 2) + np.sum((curve[m:] - curve[m:].mean()) ** 2)

        def density(sigma, m=m, rss=rss):
            likelihood = (2 * np.pi * sigma**2) ** -2.5 * np.exp(-rss / (2 * sigma**2))
            return likelihood * np.sqrt(2 * np.pi * sigma**2 / m) * np.sqrt(2 * np.pi * sigma**2 / (5 - m)) / sigma

        chances.append(quad(density, 0, np.inf)[0])
    np.testing.assert_allclose(change_point(curve).posterior[1:], np.array(chances) / sum(chances), rtol=1e-4)


def test_intervals_cover_as_often_as_they_say():
    """The posterior's prior, simulated: a split drawn evenly. The interval is discrete, so it covers a bit more."""
    draw = np.random.default_rng(1)
    turns = draw.integers(1, L, size=2000)
    curves = (np.arange(L) >= turns[:, None]) * 1.0 + draw.normal(size=(2000, L)) * 0.8
    found = jax.vmap(lambda c: change_point(c, level=0.8, permutations=1))(curves.astype(np.float32))
    covered = np.mean((found.low <= turns) & (turns <= found.high))
    assert 0.77 < covered < 0.92
    assert np.mean(np.asarray(found.high) - np.asarray(found.low)) < 0.7 * L


def test_p_values_are_uniform_without_a_turn_and_small_with_one():
    noise = np.random.default_rng(2).normal(size=(600, L)).astype(np.float32)
    p_values = np.asarray(jax.vmap(lambda c: change_point(c, permutations=199).p_value)(noise))
    for level in (0.05, 0.25, 0.5):
        assert np.mean(p_values <= level) == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 600))
    assert change_point(noisy_step(12, 1.0, 0.1, 3)).p_value == pytest.approx(1e-3)
    flipped = change_point(-noisy_step(12, 1.0, 0.1, 3))
    assert flipped.effect < -0.8 and flipped.layer == 12


def test_p_value_of_few_values_counts_their_orders():
    """0 0 0 1 1: of the ten orders of three and two, two have so large a step."""
    assert change_point([0, 0, 0, 1, 1], permutations=20_000).p_value == pytest.approx(0.2, abs=0.015)


def test_perfect_step_constant_and_ties():
    step = change_point((np.arange(L) >= 7) * 0.25)
    assert (step.layer, step.low, step.high, step.effect) == (7, 7, 7, 0.25)
    assert step.effect_error == pytest.approx(0, abs=1e-7)
    assert step.posterior[7] == pytest.approx(1) and step.explained == 1
    for value in (0.0, 0.1, 1e6):  # no step to be found: any place is possible, the first is named
        flat = change_point(np.full(L, value, np.float32))
        assert flat.layer == 1 and flat.effect == 0 and flat.p_value == 1 and flat.explained == 0
        assert flat.low <= 2 and flat.high >= L - 2 and np.sum(flat.posterior) == pytest.approx(1, rel=1e-5)
    even = change_point([0.1, 0.2, 0.1])  # either split leaves the same residual
    assert even.layer == 1 and (even.low, even.high) == (1, 2)
    np.testing.assert_allclose(even.posterior, [0, 0.5, 0.5], atol=1e-5)


def test_far_from_zero_and_scaled():
    curve = noisy_step(9, 1.0, 0.4, 5)
    expected = change_point(curve)
    for moved, scale in ((curve + 1000, 1), (curve * 1e-15, 1e-15), (curve * 1e12, 1e12)):
        found = change_point(moved)
        assert found.layer == expected.layer and found.p_value == pytest.approx(float(expected.p_value), abs=0.002)
        np.testing.assert_allclose(found.posterior, expected.posterior, atol=2e-3)
        assert float(found.effect) == pytest.approx(float(expected.effect) * scale, rel=1e-3)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e38])
def test_scales_whose_squares_floats_do_not_hold(scale):
    curve = np.array([1.0] * 3 + [2.0] * 2 + [2.25], np.float32)
    expected, found = change_point(curve), change_point(curve * np.float32(scale))
    for name in ("effect", "effect_error", "before", "after"):
        assert float(getattr(found, name)) == pytest.approx(float(getattr(expected, name)) * scale, rel=1e-5)
    for name in ("layer", "low", "high", "explained", "p_value"):
        assert float(getattr(found, name)) == pytest.approx(float(getattr(expected, name)), rel=1e-5)
    np.testing.assert_allclose(found.posterior, expected.posterior, rtol=1e-4, atol=1e-6)
    samples = change_point_samples(np.stack([curve * np.float32(scale)] * 4))
    assert samples.layer == 3 and np.all(samples.layers == 3)
    means = np.array([samples.effect, *samples.effects, samples.effect_low, samples.effect_high], float)
    assert means == pytest.approx(float(expected.effect) * scale, rel=1e-5)


def test_left_out_layers_are_as_if_never_there():
    curve = noisy_step(12, 1.0, 0.5, 6)
    holes = np.isin(np.arange(L), [0, 11, 12, 20])
    found = change_point(np.where(holes, np.nan, curve), level=0.9)
    alone = change_point(curve[~holes], np.arange(L)[~holes], level=0.9)
    np.testing.assert_allclose(found.posterior[~holes], alone.posterior, atol=1e-5)
    assert np.all(found.posterior[holes] == 0)
    for name in ("layer", "low", "high", "effect", "effect_error", "before", "after", "explained"):
        assert float(getattr(found, name)) == pytest.approx(float(getattr(alone, name)), rel=1e-4)
    assert found.p_value == pytest.approx(float(alone.p_value), abs=0.05)


def test_jit_vmap_and_positions():
    curves = np.stack([noisy_step(turn, 1.0, 0.5, turn) for turn in (3, 12, 20)]).astype(np.float32)
    curves[1, 4] = np.nan
    depth = np.linspace(0, 1, L)
    found = jax.jit(jax.vmap(lambda c: change_point(c, depth)))(curves)
    for i, curve in enumerate(curves):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-5), found, change_point(curve, depth)
        )
        assert found.layer[i] == pytest.approx(depth[brute_force(curve)[0]], rel=1e-6)
    empty = jax.jit(change_point)(np.full(L, np.nan))
    assert all(np.all(np.isnan(a)) for a in empty)
    with jax.enable_x64(True):
        assert {a.dtype for a in change_point(curves[0].astype(float))} == {np.dtype(np.float64)}


def test_samples():
    draw = np.random.default_rng(8)
    samples = np.stack([noisy_step(turn, 1.0, 0.2, turn + i) for i, turn in enumerate(draw.integers(9, 14, size=200))])
    samples[:, 2] = np.nan
    samples = samples.astype(np.float32)
    depth = np.linspace(0, 1, L)
    found = change_point_samples(samples, depth, level=0.9)
    ones = [brute_force(curve) for curve in samples]
    turns, effects = np.array([one[0] for one in ones]), np.array([one[2] for one in ones])
    np.testing.assert_allclose(found.layers, depth[turns], rtol=1e-5)
    np.testing.assert_allclose(found.effects, effects, rtol=1e-4)
    np.testing.assert_allclose(found.frequency, np.bincount(turns, minlength=L) / 200, rtol=1e-5)
    low, high = np.quantile(turns, 0.05, method="lower"), np.quantile(turns, 0.95, method="higher")
    np.testing.assert_allclose([found.low, found.high], depth[[low, high]], rtol=1e-5)
    np.testing.assert_allclose(found.effect_low, np.quantile(effects, 0.05, method="lower"), rtol=1e-4)
    np.testing.assert_allclose(found.effect_high, np.quantile(effects, 0.95, method="higher"), rtol=1e-4)
    mean = change_point(samples.mean(axis=0), depth)
    assert found.layer == mean.layer and found.effect == pytest.approx(float(mean.effect), rel=1e-4)
    samples[0] = np.nan  # when traced, a sample without values counts in nothing
    rest = jax.jit(lambda s: change_point_samples(s, depth, level=0.9))(samples)
    assert np.isnan(rest.layers[0]) and np.sum(rest.frequency) == pytest.approx(1) and np.isfinite(rest.low)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0, 1.0],), "at least 3 finite values over the layers, got 2"),
        (([0.0, np.nan, 1.0],), "at least 3 finite values over the layers, got 2"),
        (([[0.0, 1.0, 2.0]],), r"curve must have shape \[layers\], got \(1, 3\)"),
        (([0.0, np.inf, 1.0, 2.0],), r"curve\[1\] = inf"),
        (([0.0, 1.0, 2.0], [0, 1]), r"3 layers, got shape \(2,\)"),
        (([0.0, 1.0, 2.0], [0, 2, 2]), r"layers must ascend, got layers=\[0. 2. 2.\]"),
        (([0.0, 1.0, 2.0], None, {"level": 1.0}), "level=1.0"),
        (([0.0, 1.0, 2.0], None, {"min_size": 0}), "min_size=0"),
        (([0.0, 1.0, 2.0], None, {"min_size": 2}), "at least 4 finite values"),
        (([0.0, 1.0, 2.0], None, {"permutations": 0}), "permutations=0"),
    ],
)
def test_refuses(arguments, message):
    curve, layers, options = (*arguments, *(None, {})[len(arguments) - 1 :])
    with pytest.raises(ValueError, match=message):
        change_point(curve, layers, **options)


def test_samples_refuse():
    with pytest.raises(ValueError, match=r"samples must have shape \[samples, layers\], got \(3,\)"):
        change_point_samples(np.ones(3))
    with pytest.raises(ValueError, match=r"samples\[1, 2\] = inf"):
        change_point_samples([[0.0, 1.0, 2.0], [0.0, 1.0, np.inf]])
