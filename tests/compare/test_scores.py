import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

from jaxscape import landscape
from jaxscape.compare.scores import LayerScores, accuracy, degenerate_layer, score_layer

N, KEPT, K = 60, 50, 8


@pytest.fixture(scope="module")
def layer():
    """Points of three subjects, apart from each other; ten of them met twice."""
    draw = np.random.default_rng(0)
    subjects = np.repeat([0, 1, 2], 20)
    x = draw.normal(size=(N, 4)) + 3 * subjects[:, None]
    kept = np.sort(draw.permutation(N)[:KEPT])
    indices = NearestNeighbors(n_neighbors=K + 1).fit(x[kept]).kneighbors(x[kept], return_distance=False)[:, 1:]
    labels = {name: draw.integers(0, 4, N) for name in ("answers", "predictions")}
    return {
        "n_points": N, "kept": kept, "neighbor_indices": indices, "peak_labels": draw.integers(0, 5, KEPT),
        "core": draw.random(KEPT) < 0.7, "intrinsic_dim": np.float32(3.5), "intrinsic_dim_error": np.float32(0.25),
        "subjects": subjects, **labels, "neighbors": 5,
    }  # fmt: skip


def test_scores_are_those_of_scikit_learn_and_numpy(layer):
    found = score_layer(**layer)
    kept, indices = layer["kept"], layer["neighbor_indices"][:, :5]
    for name in ("subject", "answer", "prediction"):
        expected = adjusted_rand_score(layer[f"{name}s"][kept], layer["peak_labels"])
        assert getattr(found, f"ari_{name}") == pytest.approx(expected, abs=1e-6)
    for name in ("subject", "answer"):
        labels = layer[f"{name}s"][kept]
        expected = np.mean([np.mean(labels[near] == label) for near, label in zip(indices, labels, strict=True)])
        assert getattr(found, f"neighbors_same_{name}") == pytest.approx(expected, abs=1e-6)
    assert found.n_points == N and found.n_duplicates == N - KEPT
    assert found.n_peaks == len(np.unique(layer["peak_labels"]))
    assert found.core_fraction == pytest.approx(layer["core"].mean())
    assert (found.intrinsic_dim, found.intrinsic_dim_error) == (3.5, 0.25)
    assert all(type(value) in (int, float) for value in found)


def test_peaks_that_are_the_subjects_score_one(layer):
    found = score_layer(**{**layer, "peak_labels": layer["subjects"][layer["kept"]]})
    assert found.ari_subject == 1.0 and found.neighbors_same_subject > 0.9 > 0.1 > abs(found.ari_answer)


def test_scores_of_a_survey_fit_together():
    draw = np.random.default_rng(1)
    subjects = np.repeat([0, 1], 18)
    x = (draw.normal(size=(36, 32)) + 8 * subjects[:, None]).astype(np.float32)
    found = landscape.survey(x, k=8, z=0.5, max_rank=16)
    scores = score_layer(
        n_points=found.n_points, kept=np.asarray(found.kept), neighbor_indices=np.asarray(found.neighbors.indices),
        peak_labels=np.asarray(found.peaks.labels), core=np.asarray(found.peaks.core),
        intrinsic_dim=found.intrinsic_dim, intrinsic_dim_error=found.intrinsic_dim_error, subjects=subjects,
        answers=subjects, predictions=1 - subjects, neighbors=16,
    )  # fmt: skip
    assert scores.ari_subject == scores.ari_answer == scores.ari_prediction > 0.5
    assert scores.neighbors_same_subject == 1.0 and scores.intrinsic_dim > 1


def test_one_answer_to_everything_matches_no_peak():
    """Two partitions of one part each have an ARI of 1, which says nothing."""
    one, scattered = np.zeros(N, int), np.arange(N) % 3
    found = [score_layer(
        n_points=N, kept=np.arange(N), neighbor_indices=np.tile(np.arange(16), (N, 1)), peak_labels=one,
        core=np.ones(N, bool), intrinsic_dim=2.0, intrinsic_dim_error=0.1, subjects=scattered, answers=scattered,
        predictions=predictions, neighbors=16,
    ).ari_prediction for predictions in (one, scattered)]  # fmt: skip
    assert np.isnan(found[0]) and found[1] == 0


def test_degenerate_layer_has_counts_and_no_scores():
    found = degenerate_layer(36, 1)
    assert found[:2] == (36, 35) and LayerScores._fields[:2] == ("n_points", "n_duplicates")
    assert len(found) == len(LayerScores._fields) and all(np.isnan(value) for value in found[2:])


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(0, 40), st.randoms(use_true_random=False))
def test_accuracy_is_that_of_scikit_learn(count, extra, random):
    subjects = np.array([*range(count), *(random.randrange(count) for _ in range(extra))])
    answers = np.array([random.randrange(4) for _ in subjects])
    predictions = np.array([random.randrange(4) for _ in subjects])
    found = accuracy(predictions, answers, subjects)
    assert found.micro == pytest.approx(accuracy_score(answers, predictions))
    by_subject = [accuracy_score(answers[subjects == s], predictions[subjects == s]) for s in range(count)]
    assert list(found.by_subject) == pytest.approx(by_subject)
    assert found.macro == pytest.approx(np.mean(by_subject))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(([0], [0, 1], [0, 0]), "lengths differ"), (([], [], []), "0, 0, 0"), (([0, 0], [0, 0], [0, 2]), "number 1")],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        accuracy(*(np.array(a, int) for a in arguments))
