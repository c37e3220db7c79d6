"""The landscape of one layer against DADApy, scikit-learn and FAISS, side by side on this machine.

python -m tests.benchmarks.landscape [N D k ...] [--repeats 3]

Makes a virtual environment for DADApy 0.3.4 (it needs NumPy 1) and FAISS in the cache folder, once. The contestants
take turns, each in its own process; the best of all turns counts. The limit is the float32 matrix product of the
points with each other, in tiles, as XLA does it here; by symmetry half of it would do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.limits import median_seconds

SIZES = [1_000, 8, 100, 1_000, 576, 100, 1_000, 4_096, 100, 10_000, 64, 100, 9_183, 4_096, 1_000]
SIZES += [60_000, 8, 100, 60_000, 32, 100]
DENSITY_K = 16
TURNS = 2
REPOSITORY = Path(__file__).parents[2]


def main() -> None:
    """Prints, for every size, the seconds of each contestant and what they are to each other and to the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES, help="N D k of each cloud")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    pythons = {"jaxscape": sys.executable, **dict.fromkeys(("DADApy", "scikit-learn", "FAISS"), reference_python())}
    for n, dim, k in zip(*[iter(arguments.sizes)] * 3, strict=True):
        compare(pythons, n, dim, k, arguments.repeats)


def reference_python() -> Path:
    """Python of the environment that has DADApy, scikit-learn and FAISS; made if it isn't there."""
    cache = Path(os.environ.get("JAXSCAPE_CACHE") or Path.home() / ".cache" / "jaxscape")
    folder = cache / "benchmarks" / "dadapy-0.3.4"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        venv.create(folder, with_pip=True, clear=True)
        packages = ["dadapy==0.3.4", "numpy<2", "faiss-cpu"]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (folder / "ready").touch()
    return python


def compare(pythons, n: int, dim: int, k: int, repeats: int) -> None:
    """Lets the contestants take turns on one cloud: twenty overlapping Gaussians."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(20, dim))[rng.integers(20, size=n)] + rng.normal(size=(n, dim))).astype(np.float32)
    limit = product_seconds(x)
    print(f"\nN = {n:,}, D = {dim:,}, k = {k:,}; the product takes {limit:.2f} s, half of it {limit / 2:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "points.npy"
        np.save(file, x)
        results = {name: [] for name in pythons}
        for _ in range(TURNS):
            for name, python in pythons.items():
                results[name].append(run(name, python, file, k, repeats))
    totals = {name: best(turns) for name, turns in results.items()}
    for name, turns in results.items():
        print(describe(name, turns, totals, limit))


def run(name: str, python, file: Path, k: int, repeats: int) -> dict:
    """One turn of one contestant."""
    script = Path(__file__).with_name("landscape_run.py")
    command = [str(python), str(script), name, str(file), str(k), str(DENSITY_K), str(repeats)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY) if name == "jaxscape" else ""}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def best(turns: list[dict]) -> dict[str, float]:
    """Least seconds of each step, over all turns and repeats."""
    laps = [laps for turn in turns for laps in turn["laps"]]
    return {step: min(lap[step] for lap in laps) for step in laps[0]}


def describe(name: str, turns: list[dict], totals: dict, limit: float) -> str:
    """One line: seconds of every step and in all, first call, memory, and ratios."""
    mine, steps = totals[name], ", ".join(f"{step} {seconds:.3f}" for step, seconds in totals[name].items())
    same = sum(totals["jaxscape"][step] for step in mine)
    line = f"  {name:13}{sum(mine.values()):8.3f} s = {sum(mine.values()) / same:5.2f} x jaxscape  ({steps})"
    first, megabytes = min(turn["first"] for turn in turns), max(turn["megabytes"] for turn in turns)
    line += f"; first call {first:.1f} s, {megabytes:,.0f} MB"
    if name == "jaxscape":
        line += f"; neighbors are {mine['neighbors'] / (limit / 2):.2f} x half the product"
    return line


def product_seconds(x: np.ndarray) -> float:
    """Seconds of x @ x.T in float32, by tiles that the allocator can hand out again."""
    n = len(x)
    rows = min(n, max(1, (1 << 22) // n))
    points = jnp.asarray(x)
    product = jax.jit(lambda a, b: jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST))
    tile = points[:rows]
    seconds = median_seconds(lambda: product(tile, points), repeats=max(5, min(50, n // rows)))
    return seconds * n / rows


if __name__ == "__main__":
    main()
