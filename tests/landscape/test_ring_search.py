"""Nearest neighbours on rings of 1, 2 and 4 host devices: as on one device, and as in a plain float64 search."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxscape.landscape import ring_search

# name: points, neighbours, and what is out of the ordinary (4 devices, no queries, tiles as tall as fit, float32).
# Few shapes: what takes time is to compile a search.
FLAT, WIDE = [213, 3], [600, 50]
CASES = {
    "one feature": {"points": ["normal", 203, 1], "k": 10},
    "300 features, measured in several batches": {"points": ["normal", 461, 300], "k": 120, "devices": 2},
    "two levels of selection": {"points": ["normal", 1601, 4], "k": 2},
    "a device without points": {"points": ["normal", 5, 3], "k": 2},
    "all the others": {"points": ["normal", 37, 3], "k": 36},
    "as many neighbors as points": {"points": ["grid", 22, 3], "k": 22, "queries": 3, "ties": True},
    "more neighbors than a slice": {"points": ["normal", *FLAT], "k": 60},
    "far origin": {"points": ["far", *FLAT], "k": 60, "ties": True},
    "duplicates": {"points": ["repeated", *FLAT], "k": 60, "ties": True},
    "one point, over and over": {"points": ["constant", *FLAT], "k": 60, "ties": True},
    "grid": {"points": ["grid", *FLAT], "k": 60, "ties": True},
    "grid, low tiles": {"points": ["grid", *FLAT], "k": 60, "tile_size": 5, "ties": True},
    "far origin, 50 features": {"points": ["far", *WIDE], "k": 8},
    "tight clusters": {"points": ["clusters", *WIDE], "k": 8},
    "tight clusters, low tiles": {"points": ["clusters", *WIDE], "k": 8, "tile_size": 7},
    "tight clusters, 1 device": {"points": ["clusters", *WIDE], "k": 8, "devices": 1},
    "tight clusters, 2 devices": {"points": ["clusters", *WIDE], "k": 8, "devices": 2},
    "tight clusters, float64": {"points": ["clusters", *WIDE], "k": 8, "x64": True, "ties": True},
    "few points, often": {"points": ["repeated clusters", *WIDE], "k": 8, "ties": True},
    "queries": {"points": ["normal", *WIDE], "k": 8, "queries": 37},
    "queries in tight clusters": {"points": ["clusters", *WIDE], "k": 8, "queries": 37},
    "float64": {"points": ["normal", *WIDE], "k": 8, "x64": True, "ties": True},
}

ON_RINGS = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxscape.landscape import compiled_search, nearest_neighbors, ring_search

assert len(jax.devices()) == 4

def mesh_of(*shape):
    devices = np.asarray(jax.devices()[: np.prod(shape)])
    return Mesh(devices.reshape(shape), tuple("abc"[: len(shape)]))

def points_of(kind, n, dim, seed):
    rng = np.random.default_rng(seed)
    if kind == "normal":
        return rng.normal(size=(n, dim))
    if kind == "far":
        return 1e4 + 1e-2 * rng.normal(size=(n, dim))
    if kind == "clusters":
        centers = 100 * np.random.default_rng(1).normal(size=(6, dim))
        return centers[rng.integers(0, 6, n)] + 1e-3 * rng.normal(size=(n, dim))
    if kind == "repeated":
        return np.repeat(rng.normal(size=(-(-n // 40), dim)), 40, axis=0)[:n]
    if kind == "constant":
        return np.ones((n, dim))
    if kind == "repeated clusters":  # more of each than there are candidates, in no order
        return (2.0 ** rng.integers(-3, 9, (12, dim)))[rng.integers(0, 12, n)]
    return np.stack(np.meshgrid(*[np.arange(6)] * dim), axis=-1).reshape(-1, dim)[:n] + seed / 4

def plain(x, asking, k, itself):
    x, asking = x.astype(np.float64), asking.astype(np.float64)
    distances = np.stack([np.sqrt(((x - point) ** 2).sum(axis=1)) for point in asking])
    if itself:
        np.fill_diagonal(distances, np.inf)
    indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, indices, axis=1), indices, distances

def run(points, k, queries=None, devices=4, tile_size=None, x64=False, ties=False):
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        x = points_of(*points, 0).astype(dtype)
        asking = None if queries is None else points_of(points[0], queries, points[2], 1).astype(dtype)
        m = len(x if asking is None else asking)
        found = ring_search.search(x, asking, k, mesh_of(devices), tile_size)
        rows = compiled_search.tile_rows(m, len(x), None)
        expected = compiled_search.search(jnp.asarray(x), None if asking is None else jnp.asarray(asking), k, rows)
        dtypes, spread_rows = [str(a.dtype) for a in found], not found[0].is_fully_replicated
        (distances, indices), expected = (tuple(map(np.asarray, pair)) for pair in (found, expected))
        exact, order, all_of_them = plain(x, x if asking is None else asking, k, asking is None)
        above = np.where(exact > 0, exact, 1)
        there = np.take_along_axis(all_of_them, indices, axis=1)
        rises = np.diff(distances, axis=1)
        return {
            "dtypes": dtypes, "shapes": [distances.shape, indices.shape],
            "spread": spread_rows or devices == 1 or m % devices > 0,
            "same indices": bool(np.array_equal(indices, expected[1])),
            "ulps": float(np.max(np.abs(distances - expected[0]) / np.spacing(expected[0]))),
            "error": float(np.max(np.abs(distances - exact) / above)),
            "error of indices": float(np.max(np.abs(distances - there) / above)),
            "in order": bool(np.all((rises > 0) | ((rises == 0) & (np.diff(indices, axis=1) > 0)))),
            "plain indices": bool(np.array_equal(indices, order)),
        }

def inputs():
    # The same points from everywhere, over a mesh of two axes.
    mesh, x = mesh_of(2, 2), points_of("normal", 200, 12, 0).astype(np.float32)
    expected = ring_search.search(x, None, 5, mesh_of(4))
    def same(found, expected=expected):
        return all(bool(np.array_equal(a, b)) for a, b in zip(found, expected))
    by_rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec(("a", "b"))))
    explicit = jax.make_mesh((4,), ("e",), axis_types=(jax.sharding.AxisType.Explicit,))
    return {
        "list": same(ring_search.search(x.tolist(), None, 5, mesh)),
        "one device": same(ring_search.search(jnp.asarray(x), None, 5, mesh)),
        "by rows": same(ring_search.search(by_rows, None, 5, mesh)),
        "explicit axes": same(ring_search.search(jax.device_put(x, NamedSharding(explicit, PartitionSpec("e"))),
                                                 None, 5, explicit)),
        "spread": same(ring_search.search(ring_search.spread(x, mesh), None, 5, mesh)),
        "traced, one fewer": same(jax.jit(lambda x: ring_search.search(x[:199], None, 5, mesh))(by_rows),
                                  ring_search.search(x[:199], None, 5, mesh)),
        "public": same(nearest_neighbors(x, 5, mesh=mesh)),
        "public, cosine, padded": bool(np.array_equal(nearest_neighbors(x[:199], 5, "cosine", mesh=mesh).indices,
                                                      nearest_neighbors(x[:199], 5, "cosine").indices)),
        "half": str(ring_search.spread(jnp.asarray(x, jnp.bfloat16), mesh).rows.dtype) == "float32",
        "integers": str(ring_search.spread(np.arange(6).reshape(3, 2), mesh).rows.dtype) == "float32",
        "slices": {s.data.shape for s in ring_search.spread(x[:197], mesh).rows.addressable_shards} == {(50, 12)},
    }

def memory(n, dim, devices):
    ring = mesh_of(devices)
    x = jax.ShapeDtypeStruct((n, dim), jnp.float32,
                             sharding=NamedSharding(ring_search._ring(ring), PartitionSpec(ring_search._AXIS)))
    compiled = ring_search._search.lower(x, None, n, n, 8, ring_search._ring(ring), None).compile()
    held = compiled.memory_analysis()
    return {"temporary": held.temp_size_in_bytes, "arguments": held.argument_size_in_bytes,
            "whole": f"[{n},{dim}]" in compiled.as_text(), "slice": f"[{n // devices},{dim}]" in compiled.as_text()}

report = {name: run(**case) for name, case in json.loads(sys.argv[1]).items()}
print(json.dumps({"cases": report, "inputs": inputs(), "memory": memory(40_000, 8, 4)}))
"""


@pytest.fixture(scope="module")
def on_rings():
    """What a process of four host devices reports."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", ON_RINGS, json.dumps(CASES)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_neighbors_on_a_ring_are_those_of_one_device(name, on_rings):
    case, found = CASES[name], on_rings["cases"][name]
    assert found["same indices"]
    assert found["ulps"] <= 1
    rows = case.get("queries", case["points"][1])
    assert found["shapes"] == [[rows, case["k"]]] * 2
    assert found["dtypes"] == ["float64" if case.get("x64") else "float32", "int32"]
    assert found["spread"]  # by rows, wherever the devices divide them


@pytest.mark.parametrize("name", CASES)
def test_neighbors_on_a_ring_are_exact(name, on_rings):
    case, found = CASES[name], on_rings["cases"][name]
    tolerance = 1e-14 if case.get("x64") else 5e-7
    assert found["error"] < tolerance
    assert found["error of indices"] < tolerance
    assert found["in order"]
    if case.get("ties"):
        assert found["plain indices"]


def test_points_from_anywhere(on_rings):
    assert [name for name, same in on_rings["inputs"].items() if not same] == []


def test_a_slice_and_a_tile_are_all_that_a_device_holds(on_rings):
    n, devices, held = 40_000, 4, on_rings["memory"]
    assert held["arguments"] == n // devices * 8 * 4
    assert held["temporary"] < n * n // devices * 4 / 8
    assert held["slice"]
    assert not held["whole"]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros(3), r"x must have two dimensions.*\(3,\)"),
        (np.zeros((5, 0)), r"x must have at least one feature.*\(5, 0\)"),
        (np.ones((5, 2), np.complex64), "x must be real.*complex64"),
        (np.array([[1.0], [2.0], [-np.inf]]), r"x\[2, 0\] = -inf"),
    ],
)
def test_refuses(x, message):
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("a",))
    with pytest.raises(ValueError, match=message):
        ring_search.search(x, None, 1, mesh)
    with pytest.raises(ValueError, match=message.replace("x", "queries", 1)):
        ring_search.search(np.ones((3, 2)), x, 1, mesh)
