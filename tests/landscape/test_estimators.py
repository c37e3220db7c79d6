"""The scikit-learn estimators: scikit-learn's own checks, and the same results as the functions they cover."""

import importlib
import inspect
import pickle
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sklearn", "1.7")

from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import make_swiss_roll
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from jaxscape import landscape
from jaxscape.landscape import estimators
from jaxscape.landscape.density import kstar_density, pak_density
from jaxscape.landscape.dimension import two_nn
from jaxscape.landscape.estimators import AdvancedDensityPeaks, IntrinsicDimension
from jaxscape.landscape.survey import _ADAPTIVE_NEIGHBORS

few_samples = pytest.mark.filterwarnings("ignore:.*distinct samples allow:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    """The checks fit clouds of a dozen shapes, a few times each: nearly all their time is XLA's optimiser's."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def mixture(n=600, seed=2):
    """Five Gaussians in five dimensions, close enough for a halo; return points and whose they are."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 5, n)
    x = rng.normal(size=(5, 5))[y] * 3 + 0.8 * rng.normal(size=(n, 5))
    return x.astype(np.float32), y


@pytest.fixture(scope="module")
def surveyed():
    x, _ = mixture()
    return x, landscape.survey(x, k=16, z=1.6)


@few_samples
@parametrize_with_checks([AdvancedDensityPeaks(), IntrinsicDimension()])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_agrees_with_the_survey(surveyed):
    x, expected = surveyed
    found = AdvancedDensityPeaks().fit(x)
    assert found.n_clusters_ == len(expected.peaks.centers) >= 3
    np.testing.assert_array_equal(found.labels_, expected.peaks.labels)
    np.testing.assert_array_equal(found.cluster_centers_indices_, expected.peaks.centers)
    np.testing.assert_array_equal(found.core_, expected.peaks.core)
    np.testing.assert_allclose(found.log_density_, expected.density.log_density, rtol=1e-5)
    np.testing.assert_allclose(found.log_density_error_, 0.25)
    np.testing.assert_array_equal(found.neighborhood_sizes_, np.full(600, 16))
    np.testing.assert_allclose(found.log_saddle_, expected.peaks.log_saddle, rtol=1e-5)
    np.testing.assert_allclose(found.log_saddle_error_, expected.peaks.log_saddle_error)
    np.testing.assert_allclose(found.intrinsic_dim_, expected.intrinsic_dim, rtol=1e-5)
    np.testing.assert_allclose(found.intrinsic_dim_error_, expected.intrinsic_dim_error, rtol=1e-5)
    tree = landscape.peak_hierarchy(expected.peaks, expected.density, "average")
    np.testing.assert_allclose(found.hierarchy("average"), tree, rtol=1e-4)


def test_finds_the_gaussians(surveyed):
    x, y = mixture()
    assert adjusted_rand_score(y, AdvancedDensityPeaks().fit_predict(x)) > 0.8


def test_the_halo_is_noise_where_it_is_left_out(surveyed):
    x, expected = surveyed
    found = AdvancedDensityPeaks(include_halo=False).fit(x)
    core = np.asarray(expected.peaks.core)
    assert 0 < core.sum() < len(x)
    np.testing.assert_array_equal(found.labels_ == -1, ~core)
    np.testing.assert_array_equal(found.labels_[core], np.asarray(expected.peaks.labels)[core])
    np.testing.assert_array_equal(found.labels_[found.cluster_centers_indices_], np.arange(found.n_clusters_))
    np.testing.assert_array_equal(found.hierarchy(), AdvancedDensityPeaks().fit(x).hierarchy())


def test_duplicates_take_after_the_first(surveyed):
    x, expected = surveyed
    order = np.random.default_rng(1).permutation(np.concatenate([np.arange(600), np.arange(0, 600, 3), [7, 7, 7]]))
    x = x[order]
    found, expected = AdvancedDensityPeaks().fit(x), landscape.survey(x, k=16, z=1.6)
    kept = np.asarray(expected.kept)
    assert len(kept) == 600 and found.labels_.shape == found.core_.shape == found.log_density_.shape == (803,)
    np.testing.assert_array_equal(found.labels_[kept], expected.peaks.labels)
    np.testing.assert_array_equal(found.cluster_centers_indices_, kept[np.asarray(expected.peaks.centers)])
    for values in (found.labels_, found.core_, found.log_density_, found.neighborhood_sizes_):
        of_row = dict(zip(order[kept], values[kept], strict=True))
        assert values.tolist() == [of_row[row] for row in order]
    tree = landscape.peak_hierarchy(expected.peaks, expected.density)
    np.testing.assert_allclose(found.hierarchy(), tree, rtol=1e-4)
    assert IntrinsicDimension().fit(x).dimension_ == pytest.approx(float(expected.intrinsic_dim), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([0.0, -0.0, 1.0, 2.5])] * 2), min_size=24, max_size=24))
def test_every_sample_has_the_first_equal_one_as_owner(rows):
    rows = np.asarray(rows, np.float32)
    distinct = estimators._distinct_samples(IntrinsicDimension(), rows, 1)
    first_equal = [int(np.flatnonzero((rows == row).all(axis=1))[0]) for row in rows]
    assert distinct.first[distinct.owner].tolist() == first_equal
    np.testing.assert_array_equal(distinct.points, rows[distinct.first])


@pytest.mark.parametrize(("name", "function"), [("kstar", kstar_density), ("pak", pak_density)])
def test_adaptive_densities(surveyed, name, function):
    x, knn = surveyed
    found = AdvancedDensityPeaks(density=name, max_neighbors=64).fit(x)
    expected = landscape.survey(x, density=name, max_neighbors=64)
    np.testing.assert_array_equal(found.labels_, expected.peaks.labels)
    np.testing.assert_array_equal(found.neighborhood_sizes_, expected.density.k)
    np.testing.assert_allclose(found.log_density_error_, expected.density.log_density_error, rtol=1e-6)
    assert found.intrinsic_dim_ == pytest.approx(float(expected.intrinsic_dim)) and found.rank_ == 2

    found = AdvancedDensityPeaks(density=name, max_neighbors=64, alpha=0.01).fit(x)
    density = function(knn.neighbors, expected.intrinsic_dim, 0.01)
    np.testing.assert_array_equal(found.neighborhood_sizes_, density.k)
    assert len(set(found.neighborhood_sizes_.tolist())) > 10
    np.testing.assert_allclose(found.log_density_, density.log_density, rtol=1e-5)


def test_defaults_are_the_surveys():
    defaults, theirs = AdvancedDensityPeaks().get_params(), inspect.signature(landscape.survey).parameters
    for name, other in {"n_neighbors": "k", "z": "z", "density": "density", "metric": "metric"}.items():
        assert defaults[name] == theirs[other].default
    assert defaults["max_neighbors"] == _ADAPTIVE_NEIGHBORS
    assert defaults["alpha"] == inspect.signature(kstar_density).parameters["alpha"].default


def test_a_dimension_given_is_used(surveyed):
    x, _ = surveyed
    found = AdvancedDensityPeaks(intrinsic_dim=3).fit(x)
    expected = landscape.knn_density(landscape.nearest_neighbors(x, 32), 3.0, 16)
    assert (found.intrinsic_dim_, found.intrinsic_dim_error_) == (3.0, 0.0)
    np.testing.assert_allclose(found.log_density_, expected.log_density, rtol=1e-6)


def test_cosine(surveyed):
    """Lengths don't matter, and the labels are those of the directions."""
    x, _ = surveyed
    lengths = 2.0 ** np.random.default_rng(0).integers(-3, 4, (600, 1)).astype(np.float32)
    expected = landscape.survey(x, metric="cosine")
    np.testing.assert_array_equal(AdvancedDensityPeaks(metric="cosine").fit_predict(x * lengths), expected.peaks.labels)
    found = IntrinsicDimension(metric="cosine").fit(x * lengths)
    assert found.dimension_ == pytest.approx(float(expected.intrinsic_dim), rel=1e-5)


def test_in_a_pipeline_and_a_grid_search():
    x, y = mixture()
    x = x * np.float32([1, 1, 1, 1, 300])  # one feature drowns the others until they are scaled
    alone = AdvancedDensityPeaks().fit_predict(x)
    pipeline = make_pipeline(StandardScaler(), AdvancedDensityPeaks())
    scaled = pipeline.fit_predict(x)
    np.testing.assert_array_equal(scaled, AdvancedDensityPeaks().fit_predict(StandardScaler().fit_transform(x)))
    assert adjusted_rand_score(y, scaled) > adjusted_rand_score(y, alone) + 0.2

    everything = [(np.arange(600), np.arange(600))]  # a clusterer labels what it's fitted to
    search = GridSearchCV(
        pipeline,
        {"advanceddensitypeaks__z": [0.0, 1.6, 50.0], "standardscaler": [StandardScaler(), "passthrough"]},
        scoring=lambda fitted, x, y: adjusted_rand_score(y, fitted[-1].labels_),
        cv=everything,
    ).fit(x, y)
    assert search.best_params_["advanceddensitypeaks__z"] == 1.6
    assert search.best_params_["standardscaler"] != "passthrough"
    np.testing.assert_array_equal(search.best_estimator_[-1].labels_, scaled)


def test_dimension_of_a_known_manifold():
    x, _ = make_swiss_roll(2000, random_state=0)
    at_16 = IntrinsicDimension().fit(x)
    assert at_16.rank_ == 16 and at_16.ranks_.tolist() == [[1, 2], [2, 4], [4, 8], [8, 16], [16, 32], [32, 64]]
    assert at_16.dimension_ == pytest.approx(2, abs=0.1) and 0 < at_16.dimension_error_ < 0.05
    np.testing.assert_allclose(at_16.dimensions_[:5], 2, atol=0.15)
    assert at_16.dimension_ == pytest.approx(at_16.dimensions_[4], rel=1e-5)
    assert at_16.dimension_error_ == pytest.approx(at_16.errors_[4], rel=1e-5)
    assert np.all(np.diff(at_16.scales_) > 0)

    nb = landscape.nearest_neighbors(x, 64)
    line, expected = IntrinsicDimension("two_nn").fit(x), two_nn(nb)
    assert line.rank_ == 1
    assert (line.dimension_, line.dimension_error_) == pytest.approx((float(expected.id), float(expected.error)))
    assert line.dimension_ == pytest.approx(2, abs=0.15)
    np.testing.assert_array_equal(line.dimensions_, at_16.dimensions_)
    half = IntrinsicDimension("two_nn", fraction=0.5).fit(x)
    assert half.dimension_ == pytest.approx(float(two_nn(nb, fraction=0.5).id)) and half.dimension_ != line.dimension_


@pytest.mark.parametrize(
    ("estimator", "n", "used"),
    [(AdvancedDensityPeaks(), 3, 1), (AdvancedDensityPeaks(1), 3, 1), (AdvancedDensityPeaks(density="pak"), 5, 2),
     (IntrinsicDimension(), 3, 1), (IntrinsicDimension("two_nn"), 3, 1)],
)  # fmt: skip
def test_few_samples(estimator, n, used):
    x, _ = mixture(n)
    name = "n_neighbors" if isinstance(estimator, AdvancedDensityPeaks) else "rank"
    expected = [
        f"{name} (16) is more than {n} distinct samples allow: they have {n - 1} neighbours each, and 2 {name} are "
        f"needed. {name} will be set to {used}."
    ] * (str(estimator) in ("AdvancedDensityPeaks()", "IntrinsicDimension()"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = estimator.fit(np.repeat(x, 2, axis=0))
    assert [str(w.message) for w in caught if w.category is UserWarning] == expected
    assert [w.filename for w in caught if w.category is UserWarning] == [__file__] * len(expected)
    assert found.rank_ == used
    if name == "n_neighbors":
        assert found.labels_.shape == (2 * n,) and np.all(np.isfinite(found.log_density_))
        np.testing.assert_array_equal(found.labels_[::2], found.labels_[1::2])
    else:
        assert np.isfinite(found.dimension_)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize(
    ("estimator", "x", "message"),
    [
        (AdvancedDensityPeaks(), np.ones((1, 4)), "1 sample.*minimum of 3 is required by AdvancedDensityPeaks"),
        (AdvancedDensityPeaks(), np.ones((10, 4)), "3 distinct .*AdvancedDensityPeaks, got 1 of n_samples=10"),
        (AdvancedDensityPeaks(density="kstar"), np.repeat(np.eye(4), 9, 0), "5 distinct .* got 4 of n_samples=36"),
        (IntrinsicDimension(), np.ones((10, 4)), "3 distinct samples for IntrinsicDimension, got 1 of n_samples=10"),
        (AdvancedDensityPeaks(), np.full((40, 3), np.nan), "AdvancedDensityPeaks does not accept missing values"),
        (IntrinsicDimension(), np.full((40, 3), 1e300), r"too large for dtype\('float32'\)"),
        (AdvancedDensityPeaks(0), None, "n_neighbors == 0"),
        (AdvancedDensityPeaks(z=-1.0), None, "z == -1.0"),
        (AdvancedDensityPeaks(z=np.nan), None, "z must be finite and at least 0, got z=nan"),
        (AdvancedDensityPeaks(density="other"), None, r"density must be one of \('knn', 'kstar', 'pak'\), got 'other'"),
        (AdvancedDensityPeaks(intrinsic_dim=0), None, "intrinsic_dim == 0"),
        (AdvancedDensityPeaks(intrinsic_dim=np.inf), None, "intrinsic_dim must be positive and finite"),
        (AdvancedDensityPeaks(metric="other"), None, "metric.*other"),
        (AdvancedDensityPeaks(max_neighbors=3), None, "max_neighbors == 3"),
        (AdvancedDensityPeaks(alpha=1.0), None, "alpha == 1.0"),
        (IntrinsicDimension("other"), None, r"method must be one of \('gride', 'two_nn'\), got 'other'"),
        (IntrinsicDimension(rank=0), None, "rank == 0"),
        (IntrinsicDimension(max_rank=1), None, "max_rank == 1"),
        (IntrinsicDimension(fraction=1.0), None, "fraction == 1.0"),
    ],
)
def test_refuses(estimator, x, message):
    with pytest.raises(ValueError, match=message):
        estimator.fit(mixture()[0] if x is None else x)


def test_refuses_the_wrong_types():
    x, _ = mixture()
    for estimator, message in (
        (AdvancedDensityPeaks(2.5), "n_neighbors must be an instance of int"),
        (AdvancedDensityPeaks(include_halo="no"), "include_halo must be an instance of"),
        (IntrinsicDimension(rank="1"), "rank must be an instance of int"),
    ):
        with pytest.raises(TypeError, match=message):
            estimator.fit(x)
    with pytest.raises(TypeError, match="Sparse data was passed"):
        AdvancedDensityPeaks().fit(csr_array(x))


def test_precision_is_jaxs(surveyed):
    x, _ = surveyed
    assert AdvancedDensityPeaks().fit(x.astype(np.float64)).log_density_.dtype == np.float32
    half = jnp.asarray(x, jnp.bfloat16)
    expected = IntrinsicDimension().fit(np.asarray(half.astype(jnp.float32)))
    for same in (half, np.asarray(half)):
        assert IntrinsicDimension().fit(same).dimension_ == expected.dimension_
    with jax.enable_x64(True):
        assert IntrinsicDimension("two_nn", max_rank=2).fit(x.astype(np.float64)).dimensions_.dtype == np.float64


def test_what_is_fitted_is_numpys_and_travels(surveyed):
    x, _ = surveyed
    for estimator in (AdvancedDensityPeaks(z=0.5), IntrinsicDimension()):
        fitted = clone(estimator).fit(x)
        assert not [name for name, value in vars(fitted).items() if isinstance(value, jax.Array)]
        assert all(value.flags.writeable for value in vars(fitted).values() if isinstance(value, np.ndarray))
        back = pickle.loads(pickle.dumps(fitted))
        for name, value in vars(fitted).items():
            np.testing.assert_array_equal(getattr(back, name), value)
        with pytest.raises(AttributeError):
            clone(fitted).n_features_in_  # noqa: B018


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "jaxscape.landscape.estimators")
    with pytest.raises(ImportError, match=r"pip install 'jaxscape\[sklearn\]'"):
        importlib.import_module("jaxscape.landscape.estimators")
