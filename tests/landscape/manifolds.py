"""Points on manifolds whose dimension is known, from a fixed NumPy seed.

In the manner of the benchmarks of M. Hein, J.-Y. Audibert (ICML 2005) and of P. Campadelli, E. Casiraghi, C. Ceruti,
A. Rozza (Math. Probl. Eng. 2015).
"""

import numpy as np


def _sphere(rng, n, d):
    x = rng.normal(size=(n, d + 1))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _affine_3_in_5(rng, n):
    x = 4 * rng.random((n, 3))
    return np.stack(
        [1.2 * x[:, 0] - 0.5 * x[:, 1] + 3, 0.5 * x[:, 0] + 0.9 * x[:, 1] - 1, -0.5 * x[:, 0] - 0.2 * x[:, 1] + x[:, 2],
         0.4 * x[:, 0] - 0.9 * x[:, 1] - 0.1 * x[:, 2], 1.1 * x[:, 0] - 0.3 * x[:, 2] + 8], axis=1)  # fmt: skip


def _nonlinear(rng, n, d):
    """A d-dimensional sheet of sines and cosines in 4d dimensions, all parameters entangled."""
    p = rng.random((n, d))
    turned = np.roll(p, -1, axis=1)
    return np.concatenate(
        [f(2 * np.pi * p) * turned for f in (np.cos, np.sin)] + [f(2 * np.pi * turned) * p for f in (np.cos, np.sin)],
        axis=1,
    )


def _mobius(rng, n):
    angle, across = 2 * np.pi * rng.random(n), rng.uniform(-1, 1, n)
    radius = 1 + across / 2 * np.cos(5 * angle)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), across / 2 * np.sin(5 * angle)], axis=1)


def _swiss_roll(rng, n):
    angle = 1.5 * np.pi * (1 + 2 * rng.random(n))
    return np.stack([angle * np.cos(angle), 21 * rng.random(n), angle * np.sin(angle)], axis=1)


def _helix(rng, n):
    """A surface: a helix's rulings."""
    radius, angle = rng.uniform(0, 10 * np.pi, n), rng.uniform(0, 10 * np.pi, n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), 0.5 * angle], axis=1)


def _clifford_torus(rng, n, d):
    angle = 2 * np.pi * rng.random((n, d))
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)


def _tilted(rng, n, d, ambient, draw):
    return draw(n, d) @ np.linalg.qr(rng.normal(size=(ambient, d)))[0].T


MANIFOLDS = {  # name: its dimension, the number of points, and how they are drawn
    "sphere 2": (2, 2000, lambda rng, n: _sphere(rng, n, 2)),
    "sphere 10": (10, 2000, lambda rng, n: _sphere(rng, n, 10)),
    "affine 3 in 5": (3, 2000, _affine_3_in_5),
    "nonlinear 4 in 16": (4, 2000, lambda rng, n: _nonlinear(rng, n, 4)),
    "nonlinear 12 in 48": (12, 2000, lambda rng, n: _nonlinear(rng, n, 12)),
    "helix 2 in 3": (2, 2000, _helix),
    "swiss roll": (2, 2000, _swiss_roll),
    "moebius band": (2, 2000, _mobius),
    "torus 1": (1, 2000, lambda rng, n: _clifford_torus(rng, n, 1)),
    "torus 6": (6, 2000, lambda rng, n: _clifford_torus(rng, n, 6)),
    "normal 20 in 40": (20, 2000, lambda rng, n: _tilted(rng, n, 20, 40, lambda *size: rng.normal(size=size))),
    "cube 10 in 20": (10, 2000, lambda rng, n: _tilted(rng, n, 10, 20, lambda *size: rng.random(size))),
    "cube 24 in 25": (24, 2000, lambda rng, n: _tilted(rng, n, 24, 25, lambda *size: rng.random(size))),
    "cube 70 in 71": (70, 2000, lambda rng, n: _tilted(rng, n, 70, 71, lambda *size: rng.random(size))),
}


def sample(name: str) -> np.ndarray:
    """Return the float64 points [N, D] of one manifold; always the same."""
    seed = list(MANIFOLDS).index(name)
    _, n, draw = MANIFOLDS[name]
    return draw(np.random.default_rng(seed), n)
