"""Linear probes against scikit-learn's logistic regression, fold by fold."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from jaxscape.compare import probes
from jaxscape.compare.probes import linear_probe, stratified_folds

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


def cloud(layers, n, features, classes, apart=0.5, seed=0):
    """Gaussian classes of unequal sizes, features of unequal scales and far from the origin; float64."""
    draw = np.random.default_rng(seed)
    labels = draw.choice(classes, n, p=np.arange(1, classes + 1) / (classes * (classes + 1) / 2))
    centers = draw.normal(size=(layers, classes, features)) * apart
    x = centers[:, labels] + draw.normal(size=(layers, n, features)) @ draw.normal(size=(features, features)) / 4
    return x * np.exp(draw.normal(size=features)) + draw.normal(size=features), labels


def reference(x, labels, fold_of, l2, standardize=True):
    """Held-out probabilities [N, C] of scikit-learn; 0 for classes absent from training."""
    solver = "lbfgs" if x.shape[1] > 500 else "newton-cg" if x.shape[1] > 50 else "newton-cholesky"
    found = np.zeros((len(x), labels.max() + 1))
    for fold in range(fold_of.max() + 1):
        train = fold_of != fold
        scaler = StandardScaler(with_std=standardize).fit(x[train])
        fit = LogisticRegression(C=1 / l2, tol=1e-9, max_iter=5000, solver=solver)
        fit.fit(scaler.transform(x[train]), labels[train])
        found[np.ix_(~train, fit.classes_)] = fit.predict_proba(scaler.transform(x[~train]))
    return found


def assert_is_scikit_learns(x, labels, atol, **options):
    found = linear_probe(x, labels, **options)
    folds = options.get("folds", 5)
    for layer, points in enumerate(np.asarray(x, np.float64)):
        expected = reference(points, labels, found.folds, options.get("l2", 1.0), options.get("standardize", True))
        np.testing.assert_allclose(np.exp(found.log_probabilities[layer]), expected, atol=atol)
        predictions = expected.argmax(axis=1)
        np.testing.assert_array_equal(found.predictions[layer], predictions)
        right = predictions == labels
        by_fold = [right[np.asarray(found.folds) == fold].mean() for fold in range(folds)]
        np.testing.assert_allclose(found.fold_accuracy[layer], by_fold, rtol=1e-6)
        np.testing.assert_allclose(found.accuracy[layer], right.mean(), rtol=1e-6)
        np.testing.assert_allclose(found.accuracy_error[layer], np.std(by_fold, ddof=1) / np.sqrt(folds), atol=1e-6)
    assert np.all(found.converged) and np.all(np.asarray(found.iterations) > 0)


@pytest.mark.parametrize("features", [12, 240])  # 240 features of 120 points: solved in the span of the points
@pytest.mark.parametrize("standardize", [True, False])
def test_is_scikit_learns_optimum_in_float64(features, standardize):
    x, labels = cloud(1, 120, features, 4)
    with jax.enable_x64(True):
        for l2 in (1.0, 30.0):
            assert_is_scikit_learns(x, labels, 1e-6, l2=l2, folds=3, standardize=standardize)


@pytest.mark.parametrize("features", [12, 240])
def test_is_scikit_learns_optimum_in_float32(features):
    x, labels = cloud(1, 120, features, 4)
    assert_is_scikit_learns(np.asarray(x, np.float32), labels, 1e-3, l2=1.0, folds=3)


@pytest.mark.parametrize("classes", [2, 4])
def test_weights_are_scikit_learns(classes):
    x, labels = cloud(1, 120, 12, classes, seed=1)
    with jax.enable_x64(True):
        train = stratified_folds(labels, 3) != np.arange(3)[:, None]
        task = probes._task(jax.numpy.asarray(labels), jax.numpy.asarray(train), 0.5, classes, np.dtype(float))
        design = probes._design(jax.numpy.asarray(x[0]), task.train, True)
        params, _, converged = jax.jit(probes._minimize)(design, task, 1e-10, 2000)
        intercepts = np.asarray(params[:, -1] * design.constant[:, None])
    assert converged.all()
    for fold in range(3):
        scaled = StandardScaler().fit_transform(x[0][train[fold]])
        fit = LogisticRegression(C=2, tol=1e-10, solver="newton-cholesky").fit(scaled, labels[train[fold]])
        weights, own = np.asarray(params)[fold, :-1].T, intercepts[fold]
        if classes == 2:
            weights, own = weights[1:] - weights[:1], own[1:] - own[:1]
        np.testing.assert_allclose(weights, fit.coef_, atol=1e-6)
        np.testing.assert_allclose(own, fit.intercept_, atol=1e-6)


def test_two_classes_have_one_weight_vector():
    x, labels = cloud(2, 120, 12, 2, apart=0.2)
    with jax.enable_x64(True):
        assert_is_scikit_learns(x, labels, 1e-6, l2=3.0)


def test_classes_smaller_than_the_folds():
    """Four folds lack the class of a single point; whichever lacks it in training gives it no probability."""
    x, labels = cloud(2, 120, 12, 4)
    labels[labels == 3] = 2
    labels[:1] = 3
    with jax.enable_x64(True):
        assert_is_scikit_learns(x, labels, 1e-6)
        found = linear_probe(x, labels)
    assert np.all(np.isneginf(found.log_probabilities[:, 0, 3])) and np.all(found.predictions[:, 0] != 3)
    one_left = linear_probe(x, (np.arange(120) == 7).astype(int))  # where it is held out, one class is left
    assert one_left.predictions[0, 7] == 0 and np.all(np.isfinite(one_left.log_probabilities[:, :, 0]))


def test_real_representations():
    """Residual states of a language model: strongly correlated, and the subjects separable."""
    file = GOLDEN / "smollm2_mmlu10_5shot_layer13.npz"
    if not file.exists():
        pytest.skip(f"no golden files in {GOLDEN}")
    data = np.load(file)
    labels = np.unique(data["subject"], return_inverse=True)[1][::2]
    assert_is_scikit_learns(np.asarray(data["X"][None, ::2], np.float32), labels, 1e-3, folds=2, l2=100.0)


def test_constant_features_and_offsets_change_nothing():
    x, labels = cloud(2, 120, 12, 4)
    x = x.astype(np.float32)
    plain = linear_probe(x, labels)
    moved = x * np.float32(64) + np.float32(100)
    moved = np.concatenate([moved, np.full((2, 120, 1), 0.1, np.float32), np.zeros((2, 120, 1), np.float32)], axis=2)
    found = linear_probe(moved, labels)
    np.testing.assert_allclose(np.exp(found.log_probabilities), np.exp(plain.log_probabilities), atol=1e-3)
    nothing = linear_probe(np.ones_like(x), labels)  # intercepts only: the share of each class in training
    for point, fold in ((0, nothing.folds[0]), (50, nothing.folds[50])):
        shares = np.bincount(labels[nothing.folds != fold]) / np.sum(np.asarray(nothing.folds) != fold)
        np.testing.assert_allclose(np.exp(nothing.log_probabilities[0, point]), shares, atol=1e-4)


def pale_cloud():
    """Two classes told apart by differences a millionth of the offset; exact in float32, as the tests see them."""
    draw, labels = np.random.default_rng(0), np.arange(120) % 2
    x = 1e4 + 1e-2 * (draw.normal(size=(120, 12)) + 0.4 * (2 * labels - 1)[:, None])
    return x.astype(np.float32), labels


@pytest.mark.parametrize("standardize", [True, False])
def test_small_differences_far_from_zero(standardize):
    x, labels = pale_cloud()
    l2 = 1.0 if standardize else 1e-4
    found = linear_probe(x, labels, standardize=standardize, l2=l2)
    expected = reference(x.astype(float), labels, found.folds, l2, standardize)
    assert np.mean(expected.argmax(axis=1) == labels) > 0.8
    np.testing.assert_allclose(np.exp(found.log_probabilities), expected, atol=2e-3)


def test_scale_changes_nothing_with_standardize():
    x, labels = cloud(1, 120, 12, 4)
    x = x[0].astype(np.float32)
    plain = linear_probe(x, labels)
    features = np.where(np.arange(12) % 2, 1e30, 1e-30)
    for scale in (1e30, 1e-30, features):
        found = linear_probe((x * scale).astype(np.float32), labels)
        np.testing.assert_allclose(np.exp(found.log_probabilities), np.exp(plain.log_probabilities), atol=1e-3)
    assert plain.accuracy > 0.6


def test_scale_without_standardize_is_that_of_the_penalty():
    """Features 2^20 times as large have weights 2^-20 times as large, whose squares the penalty weighs 2^-40 times."""
    x, labels = cloud(1, 120, 12, 4)
    x = x[0].astype(np.float32)
    plain = linear_probe(x, labels, standardize=False)
    found = linear_probe(x * 2**20, labels, standardize=False, l2=2.0**40)
    np.testing.assert_allclose(np.exp(found.log_probabilities), np.exp(plain.log_probabilities), atol=1e-3)
    tiny = linear_probe(x * np.float32(1e-30), labels, standardize=False)  # intercepts only
    shares = np.bincount(labels[tiny.folds != tiny.folds[0]]) / np.sum(np.asarray(tiny.folds) != tiny.folds[0])
    np.testing.assert_allclose(np.exp(tiny.log_probabilities[0]), shares, atol=1e-3)
    with pytest.raises(ValueError, match=r"less than 2.81e\+14 with standardize=False, got .*e\+31"):
        linear_probe(x * np.float32(1e30), labels, standardize=False)


def test_outlier_held_out_leaves_the_others_their_scale():
    """Folds that don't train on the outlier see the feature as it is; those that do see little else."""
    x, labels = cloud(1, 120, 12, 2)
    x = x[0].astype(np.float32)
    x[0] = 1e10
    found = linear_probe(x, labels)
    expected = reference(x.astype(float), labels, found.folds, 1.0)
    mates = (found.folds == found.folds[0]) & (np.arange(120) > 0)
    np.testing.assert_allclose(np.exp(found.log_probabilities[mates]), expected[mates], atol=2e-3)


@pytest.mark.parametrize("standardize", [True, False])
def test_concrete_points_inside_another_functions_jit(standardize):
    x, labels = pale_cloud()
    x = jnp.asarray(x)
    found = jax.jit(lambda z: linear_probe(x, labels, standardize=standardize).accuracy + z)(1.0)
    assert found == pytest.approx(1 + float(linear_probe(x, labels, standardize=standardize).accuracy), abs=0.02)


def test_jit_one_layer_names_and_layers_at_once():
    x, labels = cloud(2, 120, 12, 4)
    x = x.astype(np.float32)
    found = linear_probe(x, labels)
    names = np.array(["anatomy", "biology", "law", "maths"])[labels]
    both = linear_probe(x, names, layers_at_once=2)
    np.testing.assert_allclose(np.exp(both.log_probabilities), np.exp(found.log_probabilities), atol=1e-4)
    np.testing.assert_array_equal(both.predictions, found.predictions)
    single = linear_probe(x[1], labels)
    assert single.accuracy.shape == () and single.predictions.shape == single.folds.shape == (120,)
    np.testing.assert_allclose(np.exp(single.log_probabilities), np.exp(found.log_probabilities[1]), atol=1e-5)
    traced = jax.jit(lambda x: linear_probe(x, labels))(x)
    np.testing.assert_allclose(np.exp(traced.log_probabilities), np.exp(found.log_probabilities), atol=1e-4)
    assert traced.accuracy.dtype == np.float32
    short = linear_probe(x, labels, max_iter=2)
    assert not np.any(short.converged) and np.all(np.asarray(short.iterations) == 2)


@pytest.mark.parametrize("folds", [2, 5, 7])
def test_folds_are_even_and_repeatable(folds):
    labels = np.random.default_rng(folds).choice(5, 83, p=[0.5, 0.3, 0.1, 0.08, 0.02])
    fold_of = stratified_folds(labels, folds, seed=3)
    np.testing.assert_array_equal(fold_of, stratified_folds(labels, folds, seed=3))
    assert np.any(fold_of != stratified_folds(labels, folds, seed=4))
    counts = np.array([np.bincount(fold_of[labels == label], minlength=folds) for label in range(5)])
    assert np.ptp(counts, axis=1).max() <= 1 and np.ptp(counts.sum(axis=0)) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": np.zeros(30, int)}, "labels must have at least 2 classes, got 1"),
        ({"labels": np.arange(20) % 2}, "each of the 30 points, got 20"),
        ({"folds": 1}, "folds=1"),
        ({"folds": 31}, "folds=31"),
        ({"l2": 0.0}, "l2=0.0"),
        ({"l2": float("nan")}, "l2=nan"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"max_iter": 0}, "max_iter=0"),
        ({"layers_at_once": 0}, "layers_at_once=0"),
        ({"x": np.ones(30)}, r"x must have shape.*\(30,\)"),
        ({"x": np.ones((0, 30, 4))}, r"x must have shape.*\(0, 30, 4\)"),
        ({"x": np.ones((30, 4), complex)}, "x must be real, got dtype complex"),
        ({"x": np.where(np.arange(4) == 2, np.nan, np.ones((2, 30, 4)))}, r"x\[0, 0, 2\] = nan"),
    ],
)
def test_refuses(options, message):
    arguments = {"x": np.ones((30, 4)), "labels": np.arange(30) % 2, **options}
    with pytest.raises(ValueError, match=message):
        linear_probe(**arguments)
