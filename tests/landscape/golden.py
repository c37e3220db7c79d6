"""The reference clouds: what DADApy 0.3.4 found in float64; they live outside the repository."""

from functools import cache
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
CLOUDS = (
    "embedded8_200d",
    "mixture20_10d",
    "overlap_gaussians_3d",
    "ring_bridge_2d",
    "swiss_roll",
    "two_gaussians_2d",
    "uniform_5d",
    *(f"smollm2_mmlu10_{shots}shot_layer{layer}" for shots in (0, 5) for layer in (5, 13, 21, 29)),
)
KEPT = 300  # neighbours the reference kept


@cache
def load(cloud):
    with np.load(GOLDEN / f"{cloud}.npz") as stored:
        return dict(stored)
