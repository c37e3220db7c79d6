"""One layer's landscape against what is known of its points: the row that tables and figures are made of."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxscape.compare.neighborhoods import label_overlap
from jaxscape.compare.partitions import adjusted_rand_index


class LayerScores(NamedTuple):
    """Scores of one layer; NaN where the layer has too few distinct points for a landscape.

    Attributes:
      n_points: points that came in.
      n_duplicates: of those, left out because an earlier one is identical.
      intrinsic_dim: Gride's estimate at the density's scale.
      intrinsic_dim_error: its standard error.
      n_peaks: density peaks.
      core_fraction: share of points that are core, not halo.
      ari_subject: adjusted Rand index of the peaks with the subjects.
      ari_answer: with the right answers.
      ari_prediction: with the predicted answers; NaN where they are all the same.
      neighbors_same_subject: mean share of a fixed number of nearest neighbours that have the point's subject; every
        point weighs the same (classes are not balanced).
      neighbors_same_answer: mean share that have its right answer.
    """

    n_points: int
    n_duplicates: int
    intrinsic_dim: float
    intrinsic_dim_error: float
    n_peaks: float
    core_fraction: float
    ari_subject: float
    ari_answer: float
    ari_prediction: float
    neighbors_same_subject: float
    neighbors_same_answer: float


def score_layer(
    *,
    n_points: int,
    kept: np.ndarray,
    neighbor_indices: np.ndarray,
    peak_labels: np.ndarray,
    core: np.ndarray,
    intrinsic_dim: float,
    intrinsic_dim_error: float,
    subjects: np.ndarray,
    answers: np.ndarray,
    predictions: np.ndarray,
    neighbors: int,
) -> LayerScores:
    """Scores one layer's landscape.

    Args:
      n_points: N points that came in.
      kept: int [M], those that are distinct.
      neighbor_indices: int [M, K], K at least ``neighbors``; they count in the M.
      peak_labels: int [M].
      core: bool [M].
      intrinsic_dim: of the layer.
      intrinsic_dim_error: of the layer.
      subjects: int [N].
      answers: int [N].
      predictions: int [N].
      neighbors: how many nearest neighbours' labels are compared.
    """
    return LayerScores(
        n_points=n_points,
        n_duplicates=n_points - len(kept),
        intrinsic_dim=float(intrinsic_dim),
        intrinsic_dim_error=float(intrinsic_dim_error),
        n_peaks=float(peak_labels.max() + 1),
        core_fraction=float(np.mean(core)),
        ari_subject=float(adjusted_rand_index(peak_labels, subjects[kept])),
        ari_answer=float(adjusted_rand_index(peak_labels, answers[kept])),
        ari_prediction=_ari_prediction(peak_labels, predictions[kept]),
        neighbors_same_subject=float(label_overlap(neighbor_indices, subjects[kept], neighbors)),
        neighbors_same_answer=float(label_overlap(neighbor_indices, answers[kept], neighbors)),
    )


def _ari_prediction(peak_labels: np.ndarray, predictions: np.ndarray) -> float:
    """NaN where every question gets the same answer: one peak would match that perfectly, and mean nothing."""
    if (predictions == predictions[0]).all():
        return float("nan")
    return float(adjusted_rand_index(peak_labels, predictions))


def degenerate_layer(n_points: int, n_distinct: int) -> LayerScores:
    """Scores of a layer whose points coincide, such as the input norm of the first block: no landscape, no scores."""
    nothing = dict.fromkeys(LayerScores._fields[2:], float("nan"))
    return LayerScores(n_points=n_points, n_duplicates=n_points - n_distinct, **nothing)


class Accuracy(NamedTuple):
    """How often the predicted answer is right.

    Attributes:
      micro: over questions.
      macro: mean over subjects.
      by_subject: of each subject, in the order of its number.
    """

    micro: float
    macro: float
    by_subject: Sequence[float]


def accuracy(predictions: np.ndarray, answers: np.ndarray, subjects: np.ndarray) -> Accuracy:
    """Accuracy of predictions [N] against answers [N], micro and macro over subjects [N] (0, 1, ...).

    Raises:
      ValueError: the lengths differ or a subject has no question.
    """
    if not len(predictions) == len(answers) == len(subjects) > 0:
        raise ValueError(f"lengths differ or are 0: {len(predictions)}, {len(answers)}, {len(subjects)}")
    counts = np.bincount(subjects)
    if not counts.all():
        raise ValueError(f"subjects: number {int(np.argmin(counts))} has no question")
    hits = np.asarray(predictions) == np.asarray(answers)
    by_subject = np.bincount(subjects, weights=hits) / counts
    return Accuracy(float(hits.mean()), float(by_subject.mean()), [float(a) for a in by_subject])
