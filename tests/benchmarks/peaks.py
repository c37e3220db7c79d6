"""How Advanced Density Peaks grows with the number of points, neighbours and density given.

python -m tests.benchmarks.peaks [N ...]

A mixture of a hundred Gaussians in four dimensions; its neighbours come from SciPy's k-d tree, as brute force would
take hours at a million points.
"""

import math
import sys

import jax.numpy as jnp
import numpy as np
from scipy.spatial import cKDTree

from jaxscape import landscape
from tests.benchmarks.limits import median_seconds

K, DIM, Z = 16, 4, 1.6


def main() -> None:
    """Prints a line a size: seconds, peaks, and nanoseconds over N log2 N."""
    for n in [int(a) for a in sys.argv[1:]] or [10_000, 30_000, 100_000, 300_000, 1_000_000]:
        rng = np.random.default_rng(0)
        x = 5 * rng.normal(size=(100, DIM))[rng.integers(100, size=n)] + rng.normal(size=(n, DIM))
        x = x.astype(np.float32)
        distances, indices = cKDTree(x).query(x, 2 * K + 1, workers=-1)
        nb = landscape.Neighbors(
            jnp.asarray(distances[:, 1:].astype(np.float32)), jnp.asarray(indices[:, 1:].astype(np.int32))
        )
        density = landscape.knn_density(nb, landscape.gride_at(nb, K).id, K)
        find = lambda nb=nb, density=density, x=x: landscape.advanced_density_peaks(nb, density, Z, x=x)  # noqa: E731
        seconds = median_seconds(lambda find=find: find().labels, repeats=3)
        growth = seconds / (n * math.log2(n)) * 1e9
        print(f"N = {n:9,}: {seconds:7.3f} s, {len(find().centers)} peaks, {growth:.1f} ns x N log2 N", flush=True)


if __name__ == "__main__":
    main()
