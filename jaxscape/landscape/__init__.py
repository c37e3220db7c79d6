"""Probability landscapes: neighbours, intrinsic dimension, density, density peaks and their hierarchy.

Pure functions of arrays; needs JAX and NumPy only (and SciPy for the trees of peaks). `AdvancedDensityPeaks` and
`IntrinsicDimension` wrap them for scikit-learn, where that is installed.
"""

from jaxscape.landscape.decision_graph import DecisionGraph, decision_graph, density_peaks, log_gamma
from jaxscape.landscape.density import Density, knn_density, kstar_density, pak_density
from jaxscape.landscape.dimension import (
    Decimation,
    DimensionAtScale,
    Gride,
    TwoNN,
    gride,
    gride_at,
    two_nn,
    two_nn_decimation,
)
from jaxscape.landscape.neighbors import Neighbors, drop_duplicates, nearest_neighbors
from jaxscape.landscape.peaks import Peaks, advanced_density_peaks
from jaxscape.landscape.survey import LayerLandscape, survey
from jaxscape.landscape.topography import cut_hierarchy, cut_labels, peak_hierarchy

__all__ = [
    "Decimation",
    "DecisionGraph",
    "Density",
    "DimensionAtScale",
    "Gride",
    "LayerLandscape",
    "Neighbors",
    "Peaks",
    "TwoNN",
    "advanced_density_peaks",
    "cut_hierarchy",
    "cut_labels",
    "decision_graph",
    "density_peaks",
    "drop_duplicates",
    "gride",
    "gride_at",
    "knn_density",
    "kstar_density",
    "log_gamma",
    "nearest_neighbors",
    "pak_density",
    "peak_hierarchy",
    "survey",
    "two_nn",
    "two_nn_decimation",
]

_ESTIMATORS = ("AdvancedDensityPeaks", "IntrinsicDimension")


def __getattr__(name: str):
    """Import the scikit-learn estimators when they are first asked for; the rest needs no scikit-learn."""
    if name in _ESTIMATORS:
        from jaxscape.landscape import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_ESTIMATORS])
