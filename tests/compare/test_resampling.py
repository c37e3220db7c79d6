"""Bootstrap, half-samples and permutations against closed forms and SciPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import adjusted_rand_score

from jaxscape.compare.neighborhoods import label_agreement, label_overlap, mean_over_classes
from jaxscape.compare.partitions import (
    adjusted_mutual_information,
    adjusted_rand_index,
    normalized_mutual_information,
)
from jaxscape.compare.resampling import bootstrap, half_sampling, permutation_test

N = 200
RNG = np.random.default_rng(0)
VALUES = RNG.gamma(2.0, size=N).astype(np.float32)
CLASSES = RNG.integers(0, 4, N)
CLUSTERS = np.where(RNG.random(N) < 0.3, CLASSES, RNG.integers(0, 5, N))
INDICES = np.stack([RNG.permutation(np.delete(np.arange(N), i))[:20] for i in range(N)]).astype(np.int32)


def overlap(labels, indices):
    return label_overlap(indices, labels, class_fraction=0.3)


@pytest.mark.parametrize("resample", [bootstrap, half_sampling])
def test_error_of_a_mean_is_its_closed_form(resample):
    """With 4,000 resamples a standard deviation is known to about 1.1 %."""
    found = resample(jnp.mean, VALUES, n_resamples=4000)
    assert found.estimate == pytest.approx(VALUES.mean(), rel=1e-6)
    assert found.error == pytest.approx(VALUES.std(ddof=1) / np.sqrt(N), rel=0.045)
    assert found.samples.shape == (4000,)
    assert np.mean(found.samples) == pytest.approx(VALUES.mean(), abs=4 * float(found.error) / np.sqrt(4000))


@pytest.mark.parametrize("method", ["percentile", "basic"])
def test_bootstrap_agrees_with_scipy(method):
    found = bootstrap(jnp.mean, VALUES, n_resamples=4000, confidence=0.9, method=method)
    expected = scipy.stats.bootstrap(
        (VALUES,), np.mean, n_resamples=20_000, confidence_level=0.9, method=method, rng=np.random.default_rng(1)
    )
    # The error of a 5 % quantile of 4,000 normal samples is some 0.033 of their standard deviation.
    margin = 4 * 0.037 * float(expected.standard_error)
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=margin)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=margin)


def test_intervals_cover_the_truth():
    """Of 400 samples of 200 points, an 80 % interval covers the mean in 320 +- 8."""
    x = jnp.asarray(np.random.default_rng(2).normal(3.0, 2.0, (400, N)), jnp.float32)
    found = jax.vmap(lambda x: bootstrap(jnp.mean, x, n_resamples=400, confidence=0.8))(x)
    covered = np.sum((found.low <= 3) & (found.high >= 3))
    assert 320 - 32 <= covered <= 320 + 24


def test_half_samples_scatter_as_a_partition_score_does():
    """Against the scatter over fresh data; the bootstrap's repeated points would lift the score instead."""
    rng = np.random.default_rng(3)
    a = rng.integers(0, 10, (500, N))
    b = np.where(rng.random((500, N)) < 0.5, a, rng.integers(0, 10, (500, N)))
    scores = np.array([adjusted_rand_score(*pair) for pair in zip(a, b, strict=True)])
    found = jax.vmap(lambda a, b: half_sampling(adjusted_rand_index, a, b, n_resamples=100))(a[:40], b[:40])
    assert found.estimate == pytest.approx(scores[:40], abs=1e-6)
    assert np.mean(found.error) == pytest.approx(scores.std(ddof=1), rel=0.15)
    shift = np.mean(found.samples, axis=1) - found.estimate
    assert abs(np.mean(shift)) < 0.1 * scores.std()
    lifted = bootstrap(adjusted_rand_index, a[0], b[0], n_resamples=100)
    assert np.mean(lifted.samples) - lifted.estimate > 0.5 * scores.std()


def test_permutation_test_agrees_with_scipy():
    found = permutation_test(adjusted_rand_index, CLASSES[:60], CLUSTERS[:60], n_permutations=2000)
    expected = scipy.stats.permutation_test(
        (CLASSES[:60],),
        lambda labels: adjusted_rand_score(labels, CLUSTERS[:60]),
        permutation_type="pairings",
        n_resamples=1000,
        alternative="greater",
        rng=np.random.default_rng(4),
    )
    null = expected.null_distribution
    assert found.estimate == pytest.approx(expected.statistic, abs=1e-6)
    assert found.mean == pytest.approx(null.mean(), abs=5 * null.std() / np.sqrt(1000))
    assert found.std == pytest.approx(null.std(), rel=0.15)
    p = expected.pvalue
    assert found.p_value == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / 1000))
    assert found.z_score == pytest.approx(float((found.estimate - found.mean) / found.std), rel=1e-4)


def test_null_of_the_adjusted_rand_index_has_mean_zero():
    found = permutation_test(adjusted_rand_index, CLASSES, CLUSTERS)
    assert abs(found.mean) < 4 * found.std / np.sqrt(1000)
    assert found.p_value == pytest.approx(1 / 1001)  # three in ten points were dealt alike
    assert found.z_score > 5


def test_mutual_informations_share_the_p_value():
    """The sizes being fixed, adjusting and normalising are affine."""
    labels = np.random.default_rng(5).integers(0, 4, N)
    one = permutation_test(normalized_mutual_information, labels, CLUSTERS)
    other = permutation_test(adjusted_mutual_information, labels, CLUSTERS)
    assert abs(other.mean) < 4 * other.std / np.sqrt(1000)
    assert one.mean > 0.02
    assert one.p_value == other.p_value
    assert one.z_score == pytest.approx(float(other.z_score), abs=2e-3)


def test_p_values_are_uniform_under_the_null():
    rng = np.random.default_rng(6)
    labels = jnp.asarray(rng.integers(0, 2, (300, N)), jnp.int32)
    values = jnp.asarray(rng.normal(size=(300, N)), jnp.float32)

    def difference(labels, values):
        return jnp.sum(values * labels) / jnp.sum(labels) - jnp.sum(values * (1 - labels)) / jnp.sum(1 - labels)

    for alternative in ("greater", "two-sided"):
        test = partial(permutation_test, difference, n_permutations=199, alternative=alternative)
        p_values = np.asarray(jax.vmap(lambda labels, values, test=test: test(labels, values).p_value)(labels, values))
        assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01
        assert p_values.min() >= 1 / 200


def test_alternatives():
    greater, less, both = (
        permutation_test(adjusted_rand_index, CLASSES, CLUSTERS, n_permutations=99, alternative=alternative)
        for alternative in ("greater", "less", "two-sided")
    )
    assert (greater.p_value, less.p_value, both.p_value) == pytest.approx((0.01, 1.0, 0.02))


def test_overlap_with_labels_is_permuted_over_fixed_neighbours():
    """Among random neighbours, a class of n_c points has a share of (n_c - 1) / (N - 1) on average."""
    found = permutation_test(overlap, CLASSES, INDICES, n_permutations=500)
    sizes = np.bincount(CLASSES)
    assert found.mean == pytest.approx(np.mean((sizes - 1) / (N - 1)), abs=5 * float(found.std) / np.sqrt(500))
    assert found.estimate == pytest.approx(float(overlap(CLASSES, INDICES)), rel=1e-6)
    assert 0.01 < found.p_value < 0.99


def test_overlap_with_labels_is_resampled_by_its_terms():
    shares = label_agreement(INDICES, CLASSES, class_fraction=0.3)
    found = bootstrap(mean_over_classes, shares, CLASSES, n_resamples=2000)
    by_class = [np.asarray(shares)[label == CLASSES] for label in range(4)]
    error = np.sqrt(sum(s.var(ddof=1) / len(s) for s in by_class)) / 4
    assert found.estimate == pytest.approx(float(overlap(CLASSES, INDICES)), rel=1e-6)
    assert found.error == pytest.approx(error, rel=0.1)


def test_same_seed_same_resamples_whatever_the_batch():
    a = bootstrap(jnp.mean, VALUES, n_resamples=50, seed=3)
    b = bootstrap(jnp.mean, VALUES, n_resamples=50, seed=3, batch_size=7)
    assert a.samples == pytest.approx(np.asarray(b.samples), rel=1e-6)
    assert len(np.unique(a.samples)) == 50
    assert not np.any(a.samples == bootstrap(jnp.mean, VALUES, n_resamples=50, seed=4).samples)
    c = permutation_test(overlap, CLASSES, INDICES, n_permutations=20)
    d = permutation_test(overlap, CLASSES, INDICES, n_permutations=20, batch_size=3)
    assert c.samples == pytest.approx(np.asarray(d.samples), rel=1e-6)


def test_layers_at_once_are_paired():
    """One score for all layers, or a vmap over them: the same points are drawn for each."""
    layers = np.stack([VALUES, 2 * VALUES + 1])
    mean = partial(jnp.mean, axis=0)
    together = bootstrap(mean, layers.T, n_resamples=50)
    apart = jax.vmap(lambda x: bootstrap(jnp.mean, x, n_resamples=50))(layers)
    assert together.samples.shape == (50, 2) and together.low.shape == (2,)
    assert together.samples[:, 1] == pytest.approx(2 * np.asarray(together.samples[:, 0]) + 1, rel=1e-5)
    assert np.asarray(apart.samples) == pytest.approx(np.asarray(together.samples).T, rel=1e-5)
    assert together.high == pytest.approx(np.asarray(apart.high), rel=1e-5)


def test_jit_float64_and_labels_that_are_names():
    jitted = jax.jit(lambda a, b: permutation_test(adjusted_rand_index, a, b, n_permutations=99).p_value)
    assert jitted(CLASSES, CLUSTERS) == pytest.approx(0.01)
    names = np.array(["law", "maths", "physics", "history"])[CLASSES]
    by_name = permutation_test(adjusted_rand_index, names, CLUSTERS, n_permutations=99)
    assert by_name.estimate == pytest.approx(adjusted_rand_score(CLASSES, CLUSTERS), abs=1e-6)
    with jax.enable_x64(True):
        found = bootstrap(jnp.mean, VALUES.astype(float), n_resamples=50)
        assert found.samples.dtype == found.low.dtype == jnp.float64
        assert found.estimate == pytest.approx(VALUES.astype(float).mean(), rel=1e-14)


def test_a_null_without_spread_has_no_z_score():
    found = permutation_test(adjusted_rand_index, np.zeros(N, int), CLUSTERS, n_permutations=99)
    assert found.p_value == 1 and found.std == 0 and np.isnan(found.z_score)


def unknown_at_times(labels, values):
    """NaN for a third of the permutations in the first entry, always in the second, never in the last."""
    score = jnp.mean(jnp.where(labels == 0, values, 0))
    return jnp.stack([jnp.where(labels[0] == 0, jnp.nan, score), jnp.nan * score, score])


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_no_p_value_of_nan(alternative):
    labels = np.arange(N) % 3
    labels[0] = 1
    found = permutation_test(unknown_at_times, labels, VALUES, n_permutations=99, alternative=alternative)
    assert np.isfinite(found.estimate[0]) and np.any(np.isfinite(found.samples[:, 0]))
    np.testing.assert_array_equal(np.isnan(found.p_value), [True, True, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap(jnp.mean), "arrays: give at least one"),
        (lambda: bootstrap(jnp.mean, VALUES, CLASSES[:9]), r"same first axis.*\(200,\), \(9,\)"),
        (lambda: bootstrap(jnp.mean, 3.0), "same first axis"),
        (lambda: half_sampling(jnp.mean, VALUES[:1]), r"at least two points, got \[\(1,\)\]"),
        (lambda: bootstrap(jnp.mean, VALUES, n_resamples=1), "n_resamples=1"),
        (lambda: bootstrap(jnp.mean, VALUES, confidence=1.0), "confidence=1.0"),
        (lambda: bootstrap(jnp.mean, VALUES, method="bca"), "method must be one of .* got 'bca'"),
        (lambda: bootstrap(jnp.mean, VALUES, batch_size=0), "batch_size=0"),
        (lambda: bootstrap(jnp.mean, [1, 2**40]), "arrays must hold integers that fit int32, got 1 to 1099511627776"),
        (lambda: permutation_test(jnp.mean, VALUES, n_permutations=0), "n_permutations=0"),
        (lambda: permutation_test(jnp.mean, []), "labels must have the same first axis"),
        (lambda: permutation_test(jnp.mean, VALUES, alternative="more"), "alternative must be one of .* got 'more'"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
