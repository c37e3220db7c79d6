"""The whole landscape of a layer, and what the first one costs: compilation, without and with a cache.

python -m tests.benchmarks.survey [N D k ...]
"""

import subprocess
import sys
import tempfile

SIZES = [1_248, 576, 16, 9_181, 4_096, 32]
CHILD = """
import sys, time
import jax, numpy as np
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from jaxscape import landscape
n, dim, k = map(int, sys.argv[2:])
rng = np.random.default_rng(0)
x = (rng.normal(size=(20, dim))[rng.integers(20, size=n)] + rng.normal(size=(n, dim))).astype(np.float32)
times = []
for _ in range(4):
    start = time.perf_counter()
    jax.block_until_ready(landscape.survey(x, k=k).peaks.labels)
    times.append(time.perf_counter() - start)
print(times[0], min(times[1:]))
"""


def main() -> None:
    """Prints, for every size: seconds of a layer, and of the first one in a process, cache empty and cache full."""
    sizes = [int(a) for a in sys.argv[1:]] or SIZES
    for n, dim, k in zip(*[iter(sizes)] * 3, strict=True):
        with tempfile.TemporaryDirectory() as cache:
            (cold, warm), (cached, _) = (run(cache, n, dim, k) for _ in range(2))
        line = f"N = {n:,}, D = {dim:,}, k = {k}: {warm:.3f} s a layer"
        print(f"{line}; the first {cold:.1f} s, from the cache {cached:.1f} s", flush=True)


def run(*arguments) -> list[float]:
    """Runs the survey in a process of its own: seconds of the first, least seconds of the next."""
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    return [float(a) for a in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


if __name__ == "__main__":
    main()
