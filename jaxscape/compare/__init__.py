"""How partitions and neighbourhoods compare: with each other, with labels, across layers, and with chance.

Pure functions of arrays; needs JAX and NumPy only.
"""

from jaxscape.compare.neighborhoods import (
    InformationImbalance,
    conditional_ranks,
    imbalance_terms,
    information_imbalance,
    information_imbalances,
    label_agreement,
    label_overlap,
    mean_over_classes,
    neighbor_agreement,
    neighbor_overlap,
)
from jaxscape.compare.partitions import (
    Composition,
    adjusted_mutual_information,
    adjusted_rand_index,
    cluster_composition,
    completeness,
    homogeneity,
    normalized_mutual_information,
    purity,
    v_measure,
)
from jaxscape.compare.probes import Probe, linear_probe, stratified_folds
from jaxscape.compare.resampling import Interval, Null, bootstrap, half_sampling, permutation_test
from jaxscape.compare.transition import ChangePoint, ChangePointSamples, change_point, change_point_samples

__all__ = [
    "ChangePoint",
    "ChangePointSamples",
    "Composition",
    "InformationImbalance",
    "Interval",
    "Null",
    "Probe",
    "adjusted_mutual_information",
    "adjusted_rand_index",
    "bootstrap",
    "change_point",
    "change_point_samples",
    "cluster_composition",
    "completeness",
    "conditional_ranks",
    "half_sampling",
    "homogeneity",
    "imbalance_terms",
    "information_imbalance",
    "information_imbalances",
    "label_agreement",
    "label_overlap",
    "linear_probe",
    "mean_over_classes",
    "neighbor_agreement",
    "neighbor_overlap",
    "normalized_mutual_information",
    "permutation_test",
    "purity",
    "stratified_folds",
    "v_measure",
]
