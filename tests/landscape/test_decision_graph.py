"""The decision graph and its density peaks against plain float64 loops over all distances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscape.landscape.decision_graph import DecisionGraph, decision_graph, density_peaks, log_gamma
from jaxscape.landscape.density import Density
from jaxscape.landscape.neighbors import nearest_neighbors

N, K = 150, 12


def all_distances(x):
    return np.linalg.norm(np.asarray(x, np.float64)[:, None] - np.asarray(x, np.float64)[None], axis=-1)


def plain_graph(x, log_density):
    distances, n = all_distances(x), len(x)
    delta, leader = np.zeros(n), np.arange(n)
    for i in range(n):
        denser = [j for j in range(n) if (-log_density[j], j) < (-log_density[i], i)]
        if denser:
            leader[i] = min(denser, key=lambda j: (distances[i, j], j))
            delta[i] = distances[i, leader[i]]
        else:
            delta[i] = distances[i].max()
    return delta, leader


def plain_peaks(near, log_density, error, k, leader, centers):
    label = np.full(len(leader), -1)
    label[centers] = range(len(centers))
    for i in np.argsort(-log_density, kind="stable"):
        if label[i] < 0:
            label[i] = label[leader[i]]
    saddle, saddle_error = np.full((len(centers),) * 2, -np.inf), np.zeros((len(centers),) * 2)
    border = np.full(len(centers), -np.inf)
    for i in np.argsort(-log_density, kind="stable"):
        for other in {label[j] for j in near[i, : k[i]]} - {label[i]}:
            border[label[i]] = max(border[label[i]], log_density[i])
            for pair in ((label[i], other), (other, label[i])):
                if saddle[pair] == -np.inf:
                    saddle[pair], saddle_error[pair] = log_density[i], error[i]
    return label, saddle, saddle_error, log_density > border[label]


def cloud(seed, d=3, tied=False):
    """Points, neighbours (x64) and a density that knows nothing of them, k and errors of every point its own."""
    rng = np.random.default_rng(seed)
    x = 3 * rng.normal(size=(5, d))[rng.integers(0, 5, N)] + rng.normal(size=(N, d))
    log_density = rng.integers(0, 9, N) / 2 if tied else rng.normal(size=N)
    density = Density(jnp.asarray(log_density), jnp.asarray(rng.random(N)), jnp.asarray(rng.integers(1, K + 1, N)))
    return x, nearest_neighbors(x, K), density


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), tied=st.booleans(), n_peaks=st.integers(1, 16))
def test_plain(seed, tied, n_peaks):
    with jax.enable_x64(True):
        x, nb, density = cloud(seed, tied=tied)
        graph = decision_graph(nb, density, x=x)
        delta, leader = plain_graph(x, np.asarray(density.log_density))
        np.testing.assert_array_equal(graph.leader, leader)
        np.testing.assert_allclose(graph.delta, delta, rtol=1e-12)
        np.testing.assert_array_equal(graph.log_density, density.log_density)
        peaks = density_peaks(nb, density, graph, n_peaks=n_peaks)
        ranked = sorted(range(N), key=lambda i: (-float(log_gamma(graph)[i]), -float(density.log_density[i]), i))
        np.testing.assert_array_equal(peaks.centers, np.sort(ranked[:n_peaks]))
        assert int(np.argmax(density.log_density)) in ranked[:n_peaks]
        near, k = np.asarray(nb.indices), np.asarray(density.k)
        values = (np.asarray(a) for a in density[:2])
        label, saddle, error, core = plain_peaks(near, *values, k, leader, np.asarray(peaks.centers))
        np.testing.assert_array_equal(peaks.labels, label)
        np.testing.assert_array_equal(peaks.log_saddle, saddle)
        np.testing.assert_array_equal(peaks.core, core)
        np.testing.assert_array_equal(peaks.log_saddle_error, error)


def test_thresholds():
    with jax.enable_x64(True):
        x, nb, density = cloud(1)
        graph = decision_graph(nb, density, x=x)
        by_delta = np.sort(np.asarray(graph.delta))
        floor, reach = float(jnp.median(density.log_density)), by_delta[-7]
        peaks = density_peaks(nb, density, graph, min_log_density=floor, min_delta=reach)
        above = (np.asarray(density.log_density) > floor) & (np.asarray(graph.delta) > reach)
        np.testing.assert_array_equal(peaks.centers, np.flatnonzero(above))
        assert 1 < len(peaks.centers) <= 6
        only = density_peaks(nb, density, graph, min_delta=reach)
        assert len(only.centers) == 6


def test_float32_finds_three_blobs():
    rng = np.random.default_rng(0)
    which = rng.integers(0, 3, N)
    x = (np.array([[0.0, 0], [20, 0], [0, 20]])[which] + rng.normal(size=(N, 2))).astype(np.float32)
    nb = nearest_neighbors(x, K)
    log_density = -2 * jnp.log(nb.distances[:, -1])
    density = Density(log_density, jnp.full(N, 0.3), jnp.full(N, K))
    graph = decision_graph(nb, density, x=x)
    assert graph.delta.dtype == jnp.float32 and graph.leader.dtype == jnp.int32
    peaks = density_peaks(nb, density, graph, n_peaks=3)
    assert len(set(zip(which.tolist(), np.asarray(peaks.labels).tolist(), strict=True))) == 3
    assert np.all(peaks.core) and np.all(np.asarray(peaks.log_saddle) == -np.inf)
    assert peaks.log_saddle.shape == (3, 3) and peaks.labels.dtype == peaks.centers.dtype == np.int32
    by_delta = density_peaks(nb, density, graph, min_delta=10.0)
    np.testing.assert_array_equal(by_delta.labels, peaks.labels)


def test_without_the_points():
    """All neighbours kept: the same graph; too few: an error that says how many points need the search."""
    x, few, density = cloud(2)
    with pytest.raises(ValueError, match=r"x is needed: \d+ points have no denser one among the 12 neighbours kept"):
        decision_graph(few, density)
    complete = nearest_neighbors(x, N - 1)
    one, two = decision_graph(complete, density), decision_graph(few, density, x=x)
    np.testing.assert_array_equal(one.leader, two.leader)
    np.testing.assert_allclose(one.delta, two.delta, rtol=1e-6)


@pytest.mark.parametrize("x", [np.ones((N, 2)), np.repeat(np.arange(N / 2), 2)[:, None]])
def test_duplicates(x):
    density = Density(jnp.zeros(N), jnp.ones(N), jnp.full(N, 2))
    nb = nearest_neighbors(x, K)
    graph = decision_graph(nb, density, x=x)
    delta, leader = plain_graph(x, np.zeros(N))
    np.testing.assert_array_equal(graph.leader, leader)
    np.testing.assert_array_equal(graph.delta, delta.astype(np.float32))
    assert np.all(np.asarray(density_peaks(nb, density, graph, n_peaks=1).labels) == 0)


def test_under_jit():
    x, nb, density = cloud(3)
    jitted = jax.jit(decision_graph)(nb, density, x=jnp.asarray(x))
    eager = decision_graph(nb, density, x=x)
    np.testing.assert_array_equal(jitted.leader, eager.leader)


def test_refuses():
    x, nb, density = cloud(4)
    graph = decision_graph(nb, density, x=x)
    with pytest.raises(ValueError, match=r"the 150 points of nb, got shape \(149,\)"):
        decision_graph(nb, density._replace(log_density=density.log_density[1:]), x=x)
    with pytest.raises(ValueError, match="x must hold the 150 points of nb, got 149"):
        decision_graph(nb, density, x=x[1:])
    with pytest.raises(ValueError, match="density must be finite"):
        decision_graph(nb, density._replace(log_density=density.log_density.at[0].set(jnp.nan)), x=x)
    for options in ({}, {"n_peaks": 2, "min_delta": 1.0}):
        with pytest.raises(ValueError, match="give thresholds or n_peaks, got min_log_density=None"):
            density_peaks(nb, density, graph, **options)
    for n_peaks in (0, 151):
        with pytest.raises(ValueError, match=f"the 150 points, got n_peaks={n_peaks}"):
            density_peaks(nb, density, graph, n_peaks=n_peaks)
    with pytest.raises(ValueError, match="above min_log_density=99.0 and min_delta=None"):
        density_peaks(nb, density, graph, min_log_density=99.0)
    with pytest.raises(ValueError, match="between 1 and the 12 neighbours kept, got 13 to 13"):
        density_peaks(nb, density._replace(k=jnp.full(N, 13)), graph, n_peaks=2)
    with pytest.raises(ValueError, match="graph and density must be of the 150 points"):
        density_peaks(nb, density, DecisionGraph(*(a[1:] for a in graph)), n_peaks=2)
