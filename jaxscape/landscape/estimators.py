"""The landscape as scikit-learn estimators: density peaks as a clusterer, and the intrinsic dimension.

Thin covers of the pure functions beside them, and the only file of the package that needs scikit-learn. All that is
fitted are NumPy arrays and plain numbers.

Letters in shapes: N samples, M distinct ones, D features, C clusters, P rank pairs.
"""

import warnings
from numbers import Integral, Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxscape.landscape.density import ADAPTIVE, Density, knn_density
from jaxscape.landscape.dimension import gride, gride_at, two_nn
from jaxscape.landscape.neighbors import (
    METRICS,
    Neighbors,
    directions,
    drop_duplicates,
    nearest_neighbors,
    row_bytes,
)
from jaxscape.landscape.peaks import Peaks, advanced_density_peaks
from jaxscape.landscape.topography import peak_hierarchy

try:
    from sklearn.base import BaseEstimator, ClusterMixin
    from sklearn.utils import check_scalar
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "the estimators of jaxscape.landscape need scikit-learn 1.7 or later: pip install 'jaxscape[sklearn]'"
    ) from error

_DENSITIES = ("knn", *ADAPTIVE)
_METHODS = ("gride", "two_nn")
_MIN_SAMPLES, _MIN_SAMPLES_ADAPTIVE = 3, 5  # for the rank pair (1, 2); (2, 4), and the adaptive densities
_ADAPTIVE_RANK = 2


class AdvancedDensityPeaks(ClusterMixin, BaseEstimator):
    """Clusters as the significant peaks of the density; how many there are is found, not asked for.

    Gride gives the intrinsic dimension, in which the density at each sample is estimated; Advanced Density Peaks
    finds its peaks, merging those that the errors alone could have made (M. d'Errico, E. Facco, A. Laio,
    A. Rodriguez, Information Sciences 560 (2021) 476-492). The clusters are those of `landscape.survey`, whose
    `k` is `n_neighbors` here. There's no `predict`: like DBSCAN, it labels the samples it is fitted to.

    Samples that are equal count as one, the first; the others take their values from it. Computed in float32, or in
    float64 where X is and JAX's x64 is on. Nothing is random.

    Args:
        n_neighbors: k, the neighbours of the "knn" density, for which the dimension is estimated at the rank pair
            (k, 2k). Where there are fewer than 2k + 1 distinct samples, the largest k that they allow is used, with a
            warning. Unused by the other densities, for which the dimension is that at the rank pair (2, 4).
        z: significance of the peaks, in standard errors; 0 merges nothing but peaks lower than their saddle.
        density: "knn"; "kstar", with as many neighbours of each sample as see a constant density; or "pak", which
            corrects that for the density's slope. See `landscape.knn_density`, `kstar_density` and `pak_density`.
        intrinsic_dim: dimension to compute the density in; None: Gride's.
        metric: "euclidean", or "cosine": samples are divided by their lengths, and their distances are chords.
        max_neighbors: neighbours kept of each sample for "kstar" and "pak", which use fewer than these; at most all
            are kept. Unused by "knn".
        alpha: level of the test of "kstar" and "pak"; the smaller, the larger the neighbourhoods. Unused by "knn".
        include_halo: False labels the halo -1: samples less dense than the highest saddle of their cluster.

    Attributes:
        labels_: [N] int32, the cluster of every sample, 0 to C - 1; -1: halo, if it isn't included.
        n_clusters_: C.
        cluster_centers_indices_: [C] int64, the samples at the peaks, ascending.
        core_: [N] bool, False in the halo, included or not.
        log_density_, log_density_error_: [N] natural logarithm of the density, and its standard error.
        neighborhood_sizes_: [N] int32, the neighbours that each density rests on.
        log_saddle_, log_saddle_error_: [C, C] log density at the saddle between two peaks (-inf where they don't touch,
            and on the diagonal), and its standard error.
        intrinsic_dim_, intrinsic_dim_error_: the dimension used, and its standard error (0 for one that was given).
        rank_: r of the rank pair (r, 2r) of the dimension: the k used by "knn", 2 for the other densities.
        n_features_in_: D.
        feature_names_in_: [D] names of the features, where X has them.
    """

    def __init__(
        self, n_neighbors=16, *, z=1.6, density="knn", intrinsic_dim=None, metric="euclidean", max_neighbors=300,
        alpha=1e-6, include_halo=True,
    ):  # fmt: skip
        self.n_neighbors = n_neighbors
        self.z = z
        self.density = density
        self.intrinsic_dim = intrinsic_dim
        self.metric = metric
        self.max_neighbors = max_neighbors
        self.alpha = alpha
        self.include_halo = include_halo

    def fit(self, X, y=None):
        """Find the density peaks of the samples.

        Args:
            X: samples [N, D], dense and finite.
            y: ignored.

        Returns:
            The estimator.

        Raises:
            ValueError: fewer than 3 distinct samples (5 for "kstar" and "pak"), bad samples, or a bad parameter.
            TypeError: sparse samples, or a parameter of the wrong type.
        """
        self._check_parameters()
        adaptive = self.density != "knn"
        distinct = _distinct_samples(self, X, _MIN_SAMPLES_ADAPTIVE if adaptive else _MIN_SAMPLES)
        others = len(distinct.first) - 1
        k = _ADAPTIVE_RANK if adaptive else _largest_rank(self, "n_neighbors", others)
        nb = nearest_neighbors(distinct.points, min(self.max_neighbors if adaptive else 2 * k, others))
        dimension, dimension_error = self._dimension(nb, k)
        density = ADAPTIVE[self.density](nb, dimension, self.alpha) if adaptive else knn_density(nb, dimension, k)
        peaks = advanced_density_peaks(nb, density, self.z, x=distinct.points)

        self.rank_ = k
        self.intrinsic_dim_, self.intrinsic_dim_error_ = float(dimension), float(dimension_error)
        self._keep(jax.device_get(peaks), jax.device_get(density), distinct)
        return self

    def hierarchy(self, method="weighted"):
        """Return the tree of the peaks, [C - 1, 4], as a SciPy linkage matrix; see `landscape.peak_hierarchy`."""
        check_is_fitted(self)
        peaks = Peaks(
            self.labels_, self.cluster_centers_indices_, self.log_saddle_, self.log_saddle_error_, self.core_
        )
        return peak_hierarchy(
            peaks, Density(self.log_density_, self.log_density_error_, self.neighborhood_sizes_), method
        )

    def _check_parameters(self) -> None:
        check_scalar(self.n_neighbors, "n_neighbors", Integral, min_val=1)
        check_scalar(self.z, "z", Real, min_val=0)
        check_scalar(self.max_neighbors, "max_neighbors", Integral, min_val=4)
        check_scalar(self.alpha, "alpha", Real, min_val=0, max_val=1, include_boundaries="neither")
        check_scalar(self.include_halo, "include_halo", (bool, np.bool_))
        if self.intrinsic_dim is not None:
            check_scalar(self.intrinsic_dim, "intrinsic_dim", Real, min_val=0, include_boundaries="neither")
        _check_choice("density", self.density, _DENSITIES)
        _check_choice("metric", self.metric, METRICS)

    def _dimension(self, nb: Neighbors, rank: int):
        if self.intrinsic_dim is not None:
            return jnp.asarray(self.intrinsic_dim, nb.distances.dtype), 0.0
        at_rank = gride_at(nb, rank)
        return at_rank.id, at_rank.error

    def _keep(self, peaks: Peaks, density: Density, distinct: "_Distinct") -> None:
        """Keep what was found of the distinct samples, for all samples."""
        self.n_clusters_ = len(peaks.centers)
        self.cluster_centers_indices_ = distinct.first[peaks.centers]
        self.core_ = peaks.core[distinct.owner]
        labels = peaks.labels[distinct.owner]
        self.labels_ = labels if self.include_halo else np.where(self.core_, labels, np.int32(-1))
        self.log_density_ = density.log_density[distinct.owner]
        self.log_density_error_ = density.log_density_error[distinct.owner]
        self.neighborhood_sizes_ = density.k[distinct.owner]
        self.log_saddle_, self.log_saddle_error_ = np.array(peaks.log_saddle), np.array(peaks.log_saddle_error)


class IntrinsicDimension(BaseEstimator):
    """The intrinsic dimension of samples, at one scale and at growing ones.

    Samples that are equal count as one. Computed in float32, or in float64 where X is and JAX's x64 is on. Nothing is
    random.

    Args:
        method: "gride", at the rank pair (rank, 2 rank); or "two_nn", the line through the ratios of the distances to
            the two nearest neighbours. TwoNN by maximum likelihood is "gride" with rank 1. See `landscape.gride`
            and `landscape.two_nn`.
        rank: of "gride"; the larger, the larger the scale. Where there are fewer than 2 rank + 1 distinct samples, the
            largest rank that they allow is used, with a warning. Unused by "two_nn".
        max_rank: largest rank of the growing scales; less where there are too few distinct samples.
        fraction: share of the ratios, the smallest ones, that "two_nn" fits its line to. Unused by "gride".
        metric: "euclidean", or "cosine": samples are divided by their lengths, and their distances are chords.

    Attributes:
        dimension_, dimension_error_: the method's dimension, and its standard error (of "two_nn", that of the fit
            alone).
        dimensions_, errors_, scales_: [P] Gride's dimension at growing scales, whatever the method; its standard
            error; and the mean distance to the two neighbours.
        ranks_: [P, 2] int32, the pairs of neighbours: (1, 2), (2, 4), (4, 8), ...
        rank_: the rank used by "gride"; 1 for "two_nn".
        n_features_in_: D.
        feature_names_in_: [D] names of the features, where X has them.
    """

    def __init__(self, method="gride", *, rank=16, max_rank=64, fraction=0.9, metric="euclidean"):
        self.method = method
        self.rank = rank
        self.max_rank = max_rank
        self.fraction = fraction
        self.metric = metric

    def fit(self, X, y=None):
        """Estimate the intrinsic dimension of the samples.

        Args:
            X: samples [N, D], dense and finite.
            y: ignored.

        Returns:
            The estimator.

        Raises:
            ValueError: fewer than 3 distinct samples, bad samples, or a bad parameter.
            TypeError: sparse samples, or a parameter of the wrong type.
        """
        check_scalar(self.rank, "rank", Integral, min_val=1)
        check_scalar(self.max_rank, "max_rank", Integral, min_val=2)
        check_scalar(self.fraction, "fraction", Real, min_val=0, max_val=1, include_boundaries="neither")
        _check_choice("method", self.method, _METHODS)
        _check_choice("metric", self.metric, METRICS)
        distinct = _distinct_samples(self, X, _MIN_SAMPLES)
        others = len(distinct.first) - 1
        rank = _largest_rank(self, "rank", others) if self.method == "gride" else 1
        nb = nearest_neighbors(distinct.points, min(max(2 * rank, self.max_rank), others))
        found = gride_at(nb, rank) if self.method == "gride" else two_nn(nb, fraction=self.fraction)

        self.rank_ = rank
        self.dimension_, self.dimension_error_ = float(found.id), float(found.error)
        self.dimensions_, self.errors_, self.scales_, self.ranks_ = map(np.array, gride(nb, self.max_rank))
        return self


class _Distinct(NamedTuple):
    """The M distinct of N samples: points [M, D]; first [M], their first occurrences; owner [N], the point of each."""

    points: jax.Array
    first: np.ndarray
    owner: np.ndarray


def _distinct_samples(estimator, X, least: int) -> _Distinct:
    """Check X as scikit-learn does, and leave out the samples that equal an earlier one; directions for the cosine."""
    # The precision it's computed in comes first: what overflows is refused, and what becomes equal is a duplicate.
    dtypes = [np.float32, jnp.result_type(float)]
    rows = validate_data(estimator, X, dtype=dtypes, ensure_min_samples=least)
    if estimator.metric == "cosine":
        rows = np.asarray(directions(jnp.asarray(rows), "X"))
    first = drop_duplicates(rows)
    if len(first) < least:
        raise ValueError(
            f"X must have at least {least} distinct samples for {type(estimator).__name__}, "
            f"got {len(first)} of n_samples={len(rows)}"
        )
    owner = np.arange(len(rows))
    if len(first) < len(rows):
        _, at, group = np.unique(row_bytes(rows), return_index=True, return_inverse=True)
        owner = np.searchsorted(first, at[group])
        rows = rows[first]
    return _Distinct(jnp.asarray(rows), first, owner)


def _largest_rank(estimator, name: str, others: int) -> int:
    """Return the parameter `name`, or, with a warning, the largest rank that `others`, a sample's others, allow."""
    asked = int(getattr(estimator, name))
    if 2 * asked <= others:
        return asked
    warnings.warn(
        f"{name} ({asked}) is more than {others + 1} distinct samples allow: they have {others} neighbours each, and "
        f"2 {name} are needed. {name} will be set to {others // 2}.",
        stacklevel=3,
    )
    return others // 2


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
