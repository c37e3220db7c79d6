"""One contestant on one cloud, in a process of its own, so that its memory is its own: prints one line of JSON.

python landscape_run.py CONTESTANT points.npy K DENSITY_K REPEATS. Needs nothing of this project but for the contestant
"jaxscape": DADApy wants NumPy 1, hence another virtual environment.
"""

import json
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np

SIGNIFICANCE = 1.6


def jaxscape(x, k, density_k):
    """Neighbours, dimension, density and peaks; ready when the labels are on the host."""
    import jax

    from jaxscape import landscape

    clock = Clock()
    nb = jax.block_until_ready(landscape.nearest_neighbors(x, k))
    clock.lap("neighbors")
    landscape.gride(nb, 64).ids.block_until_ready()
    dimension = landscape.gride_at(nb, density_k).id
    clock.lap("dimension")
    density = jax.block_until_ready(landscape.knn_density(nb, dimension, density_k))
    clock.lap("density")
    peaks = landscape.advanced_density_peaks(nb, density, SIGNIFICANCE, x=x)
    clock.lap("peaks")
    return clock.laps, len(peaks.centers)


def dadapy(x, k, density_k):
    """The same steps, with the same rules."""
    from dadapy import Data

    clock = Clock()
    data = Data(x, maxk=k)
    data.compute_distances(maxk=k)
    clock.lap("neighbors")
    ids, _, _ = data.return_id_scaling_gride(range_max=64)
    data.set_id(float(ids[int(np.log2(density_k))]))
    clock.lap("dimension")
    data.compute_density_kNN(k=density_k)
    clock.lap("density")
    data.compute_clustering_ADP(Z=SIGNIFICANCE)
    clock.lap("peaks")
    return clock.laps, data.N_clusters


def scikit_learn(x, k, density_k):
    """Neighbours only, the fused search of scikit-learn."""
    from sklearn.neighbors import NearestNeighbors

    clock = Clock()
    NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=-1).fit(x).kneighbors()
    clock.lap("neighbors")
    return clock.laps, None


def faiss(x, k, density_k):
    """Neighbours only, FAISS's exact index."""
    import faiss

    clock = Clock()
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(x)
    index.search(x, k + 1)
    clock.lap("neighbors")
    return clock.laps, None


class Clock:
    """Seconds since the last lap, by name."""

    def __init__(self):
        self.laps, self.start = {}, time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.laps[name] = now - self.start
        self.start = now


def main():
    """Runs the contestant once to warm up, then as often as asked for."""
    contestant, file, k, density_k, repeats = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    run = {"jaxscape": jaxscape, "DADApy": dadapy, "scikit-learn": scikit_learn, "FAISS": faiss}[contestant]
    x = np.load(file)
    first, _ = run(x, k, density_k)
    laps, peaks = zip(*(run(x, k, density_k) for _ in range(repeats)), strict=True)
    print(json.dumps({"first": sum(first.values()), "laps": laps, "peaks": peaks[-1], "megabytes": peak_megabytes()}))


def peak_megabytes():
    """Return the most memory this process ever held; getrusage would count that of the process it was forked from."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) / 1024


if __name__ == "__main__":
    main()
