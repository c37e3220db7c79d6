"""Agreement with DADApy 0.3.4 (float64) on TwoNN and the densities of adaptive k, cloud by cloud."""

from functools import cache

import jax
import numpy as np
import pytest
from scipy.special import gammaln

from jaxscape import landscape
from jaxscape.landscape.density import kstar_density, pak_density
from jaxscape.landscape.dimension import two_nn
from tests.landscape.golden import CLOUDS, GOLDEN, KEPT, load

# In float32: the widest and the narrowest neighbourhoods, low and high dimensions, and the flattest likelihoods.
NARROW = (
    "ring_bridge_2d",
    "two_gaussians_2d",
    "smollm2_mmlu10_0shot_layer5",
    "smollm2_mmlu10_0shot_layer21",
    "smollm2_mmlu10_5shot_layer21",
)
SIGNIFICANCES = ("1.0", "1.6", "3.0")

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the reference clouds in ../shared/golden")
CASES = [(cloud, True) for cloud in CLOUDS] + [(cloud, False) for cloud in NARROW]
every_cloud = pytest.mark.parametrize(
    ("cloud", "wide"), CASES, ids=[f"{cloud}-{'float64' if wide else 'float32'}" for cloud, wide in CASES]
)


@cache
def mapped(cloud, wide):
    """Points, neighbours and the two densities; to be called with x64 on when `wide`."""
    golden = load(cloud)
    x = golden["X"].astype(np.float64 if wide else np.float32)
    width = {1000: 576, 1500: 200}.get(x.shape[0], x.shape[1])
    x = np.pad(x, ((0, 0), (0, width - x.shape[1])))  # zeros change no distance, and fewer shapes compile sooner
    nb = landscape.nearest_neighbors(x, KEPT)
    d = float(golden["gride_ids"][1])
    return x, nb, {"kstarNN": kstar_density(nb, d), "PAk": pak_density(nb, d)}


@every_cloud
def test_two_nn(cloud, wide):
    with jax.enable_x64(wide):
        found = two_nn(mapped(cloud, wide)[1])
        np.testing.assert_allclose(found.id, load(cloud)["id_2nn"], rtol=1e-9 if wide else 1e-6)


@pytest.mark.parametrize("estimator", ["kstarNN", "PAk"])
@every_cloud
def test_density(cloud, wide, estimator):
    """In float32, PAk differs most where the likelihood is flat: a last digit of a radius moves its maximum."""
    golden = load(cloud)
    with jax.enable_x64(wide):
        density = mapped(cloud, wide)[2][estimator]
    np.testing.assert_array_equal(density.k, golden[f"{estimator}_kstar"])
    np.testing.assert_allclose(density.log_density_error, golden[f"{estimator}_log_density_error"], rtol=1e-6)
    off = np.abs(np.asarray(density.log_density) - golden[f"{estimator}_log_density"])
    if wide:
        assert off.max() < (1e-8 if estimator == "kstarNN" else 1e-7)
    else:
        assert off.max() < (2e-5 if estimator == "kstarNN" else 3e-4) and np.quantile(off, 0.95) < 2e-5


@pytest.mark.parametrize("estimator", ["kstarNN", "PAk"])
@every_cloud
def test_peaks_are_identical(cloud, wide, estimator):
    golden = load(cloud)
    with jax.enable_x64(wide):
        x, nb, densities = mapped(cloud, wide)
        for z in SIGNIFICANCES:
            peaks = landscape.advanced_density_peaks(nb, densities[estimator], float(z), x=x)
            np.testing.assert_array_equal(peaks.labels, golden[f"{estimator}_z{z}_labels"])


def test_the_maximum_is_where_the_reference_would_end_up():
    """Its own iteration, undamped from where it stops, ends at what `converged` gives; there the flattest are far."""
    golden = load("smollm2_mmlu10_0shot_layer5")
    with jax.enable_x64(True):
        nb = mapped("smollm2_mmlu10_0shot_layer5", True)[1]
        density = jax.device_get(pak_density(nb, float(golden["gride_ids"][1]), converged=True))
        radii = np.pad(nb.distances, ((0, 0), (1, 0)))
    stopped, plain = golden["PAk_log_density"], golden["kstarNN_log_density"]
    moved = np.abs(density.log_density - stopped)
    assert np.mean(moved < 1e-4) > 0.85 and moved.max() > 1
    for point in {*np.argsort(moved)[-20:].tolist(), *range(0, len(moved), 40)}:
        start = plain[point] + np.log(len(moved))
        there, top = iterated(radii[point, : density.k[point] + 1], golden["gride_ids"][1], start)
        assert abs(there - np.log(len(moved)) - stopped[point]) < 1e-9
        assert abs(top - np.log(len(moved)) - density.log_density[point]) < 1e-6


def iterated(radii, d, start):
    """Newton's method in units of volume, at a tenth of its step, from the k-nearest-neighbour log density `start`.

    Returns the log density where the derivatives pass 1e-3 of the parameters, and where it ends up later.
    """
    k = len(radii) - 1
    log_ball = d / 2 * np.log(np.pi) - gammaln(d / 2 + 1)
    ratio = radii[:-1] / radii[1:]
    volumes = np.exp(log_ball + d * np.log(radii[1:]) + np.log(1 - ratio**d))
    powers = np.stack([np.ones(k), np.arange(1.0, k + 1)])
    at, stopped = np.array([start, 0.0]), None
    for step in range(500):
        shells = volumes * np.exp(at @ powers)
        slope = powers.sum(axis=1) - powers @ shells
        if stopped is None and step and np.max(np.abs(slope / at)) <= 1e-3:
            stopped = at[0]
        move = np.linalg.solve((powers * shells) @ powers.T, slope)
        rate = 0.1 if stopped is None else 1.0 if np.max(np.abs(move)) < 0.1 else 0.3
        at = at + min(rate, 0.1 * abs(start) / max(abs(move[0]), 1e-300)) * move
        if stopped is not None and np.max(np.abs(move)) < 1e-10:
            break
    return stopped, at[0]
