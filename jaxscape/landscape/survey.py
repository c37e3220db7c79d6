"""One layer, all of it: from representations to peaks; and a stack of layers, one after the other."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxscape.landscape.density import ADAPTIVE, Density, knn_density
from jaxscape.landscape.dimension import Gride, gride, gride_at
from jaxscape.landscape.distances import as_points
from jaxscape.landscape.neighbors import METRICS, Neighbors, directions, drop_duplicates, nearest_neighbors
from jaxscape.landscape.peaks import Peaks, advanced_density_peaks

_DENSITIES = ("knn", *ADAPTIVE)
_ADAPTIVE_NEIGHBORS = 300  # as many as an adaptive neighbourhood may grow to, unless more are asked for


class LayerLandscape(NamedTuple):
    """The probability landscape of one layer. N points came in; the M distinct ones are what the rest is about.

    n_points: N.
    n_duplicates: N - M, points left out because an earlier one is identical.
    kept: [M] int32, the indices of the distinct points among the N, ascending; indices below count in these.
    neighbors: Neighbors of the M points.
    gride: intrinsic dimension at growing scales.
    intrinsic_dim, intrinsic_dim_error: Gride's at the scale of the density, which is computed in it: at the rank
        pair (k, 2k) for the kNN density, at (2, 4) for the adaptive ones.
    density: Density of the M points.
    peaks: Peaks of the M points.
    """

    n_points: int
    n_duplicates: int
    kept: jax.Array
    neighbors: Neighbors
    gride: Gride
    intrinsic_dim: jax.Array
    intrinsic_dim_error: jax.Array
    density: Density
    peaks: Peaks


def survey(
    x,
    *,
    k: int = 16,
    z: float = 1.6,
    density: str = "knn",
    max_rank: int = 64,
    max_neighbors: int | None = None,
    metric: str = "euclidean",
    tile_size: int | None = None,
) -> LayerLandscape | list[LayerLandscape]:
    """Map the probability landscape of one layer's representations, or of a stack of layers.

    Duplicates are dropped; the neighbours of the rest are found; Gride gives the intrinsic dimension at growing
    scales, and at the density's own scale the one it is computed in; Advanced Density Peaks finds the peaks of that
    density. Layers of a stack that keep as many distinct points share every compiled program.

    Args:
        x: representations [N, D], or [L, N, D]; a stack is read a layer at a time, so that it may lie on the host, or
            on disk as a memory map.
        k: neighbours of the kNN density; 2k are needed.
        z: significance of the peaks, in standard errors.
        density: "knn", or, of adaptive neighbourhoods, "kstar" or "pak".
        max_rank: largest rank of Gride; fewer when there are too few distinct points.
        max_neighbors: neighbours to keep, at least; by default as many as the rest needs: max(2k, max_rank) for "knn",
            and 300 for the adaptive densities, whose neighbourhoods they bound. Fewer when there are too few points.
        metric: "euclidean", or "cosine": the points are divided by their lengths, and their distances are chords,
            sqrt(2 (1 - cos)), of which, unlike 1 - cos, dimensions and volumes can be made. Points of one
            direction are duplicates then.
        tile_size: see `nearest_neighbors`.

    Returns:
        LayerLandscape; of a stack, a list of them.

    Raises:
        ValueError: k < 1, max_rank < 2, max_neighbors < 1, an unknown density, fewer than 2k + 1 distinct points (5
            for the adaptive densities), or a bad `x`, `z`, `metric` or `tile_size`. Of a stack, the message names the
            layer.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got k={k}")
    if max_rank < 2:
        raise ValueError(f"max_rank must be at least 2, got max_rank={max_rank}")
    if max_neighbors is not None and max_neighbors < 1:
        raise ValueError(f"max_neighbors must be at least 1, got max_neighbors={max_neighbors}")
    if density not in _DENSITIES:
        raise ValueError(f"density must be one of {_DENSITIES}, got {density!r}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
    one = partial(_survey, k=k, z=z, density=density, max_rank=max_rank, max_neighbors=max_neighbors, metric=metric)
    if np.ndim(x) != 3:
        return one(x, tile_size=tile_size)
    layers = []
    for index in range(len(x)):
        try:
            layers.append(one(x[index], tile_size=tile_size))
        except ValueError as error:
            raise ValueError(f"layer {index} of x: {error}") from error
    return layers


def _survey(
    x, k: int, z: float, density: str, max_rank: int, max_neighbors: int | None, metric: str, tile_size: int | None
) -> LayerLandscape:
    knn = density == "knn"
    points = as_points(x)
    n = points.shape[0]
    if metric == "cosine":
        points = directions(points, "x")
    kept = drop_duplicates(points)
    least = 2 * k + 1 if knn else 5
    if len(kept) < least:
        need = f"2k + 1 = {least}" if knn else f"{least}"
        raise ValueError(f"x must have at least {need} distinct points, got {len(kept)} of {n} (k={k})")
    if len(kept) < n:
        points = points[kept]
    wanted = max(max_rank, 2 * k if knn else 4, max_neighbors or (0 if knn else _ADAPTIVE_NEIGHBORS))
    nb = nearest_neighbors(points, min(wanted, len(kept) - 1), tile_size=tile_size)
    at_scale = gride_at(nb, k if knn else 2)
    found = knn_density(nb, at_scale.id, k) if knn else ADAPTIVE[density](nb, at_scale.id)
    return LayerLandscape(
        n_points=n,
        n_duplicates=n - len(kept),
        kept=jnp.asarray(kept.astype(np.int32)),
        neighbors=nb,
        gride=gride(nb, max_rank),
        intrinsic_dim=at_scale.id,
        intrinsic_dim_error=at_scale.error,
        density=found,
        peaks=advanced_density_peaks(nb, found, z, x=points),
    )
